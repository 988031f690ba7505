"""Says what a run is, how far it got, whether its bytes are whole, what next.

  python -m rocl_jax.doctor WORKDIR

Reads every file of every model and every save against the checksums that were
written with it, and needs no device. WORKDIR may be a model folder, too. Exit
status 3: something is damaged, or can not be read just now.
"""

import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from etils import epath

from rocl_jax import command, manifest, workdir
from rocl_jax.errors import RunFailed, Unreadable, UserError, shown
from rocl_jax.files import entries, exists, is_remote, place, read_json
from rocl_jax.manifest import Damaged

_MODELS = ('model', 'best_validation', 'best_test')
_STAGE = re.compile(r'\d+_\w+')
T = TypeVar('T')
_LEFTOVERS = ('.writing', '.new', '.old')


@dataclass
class Findings:
  """What was found in a folder.

  Attributes:
    lines: (heading, text) for people.
    damage: one line for each thing that is not what was written.
    unreadable: one line for each thing that can't be read just now.
    first: what must be done before the run can go on.
    files, bytes: how much was read and is whole.
    complete: whether every stage has its model.
  """

  lines: list[tuple[str, str]] = field(default_factory=list)
  damage: list[str] = field(default_factory=list)
  unreadable: list[str] = field(default_factory=list)
  first: list[str] = field(default_factory=list)
  files: int = 0
  bytes: int = 0
  complete: bool = True


def examine(path: epath.Path) -> Findings:
  """Reads all of a work directory, or of a model folder.

  Raises:
    UserError: it is neither.
    Unreadable: that can't be known.
  """
  found = Findings()
  if exists(path / 'model.json'):
    about = _json(found, path / 'model.json', dict)
    found.lines.append(('model', _model_line(about)))
    _sealed(found, path)
    return found
  if not exists(path / 'config.json'):
    seeds = [p.name for p in entries(path) if p.name.startswith('seed')]
    if seeds:
      raise UserError(
        f'{shown(path)}: a reproduction; wanted one of its work directories, '
        f'such as {shown(path / seeds[0])}'
      )
    raise UserError(
      f'{shown(path)}: neither a work directory (no config.json) nor a '
      'model folder (no model.json)'
    )
  config = _json(found, path / 'config.json', dict)
  found.lines.append(('run', _run_line(config)))
  found.lines.append(('state', _state_line(_holder(found, path))))
  for changes in _lines(found, path / 'changes.jsonl'):
    was = f'{changes.get("field")} {changes.get("from")!r}'
    change = 'changed', f'{was} -> {changes.get("to")!r}'
    if change not in found.lines:  # of the run, and of each stage
      found.lines.append(change)
  for line in _version_lines(found, path / 'versions.jsonl'):
    found.lines.append(('changed', line))
  stages = list(_stages(path))
  wanted = [
    path / f'{i + 1}_{name}' for i, name in enumerate(config.get('stages', ()))
  ]
  for directory in [*wanted, *(s for s in stages if s not in wanted)]:
    name = directory.relative_to(path).as_posix()
    text = 'not begun'
    if directory in stages or exists(directory):
      try:
        text = _stage(found, directory)
      except Unreadable as e:
        found.unreadable.append(str(e))
        text = 'can not be read'
    else:
      found.complete = False
    found.lines.append((name, text))
  if exists(path / 'results.json'):
    records = _results(found, path / 'results.json')
    found.lines.append(('results', f'{len(records)} records'))
  return found


def _stages(path: epath.Path) -> Iterator[epath.Path]:
  """The stage folders of the main run, then those of its baselines."""
  folders = entries(path)  # and files, which hold nothing
  yield from (p for p in folders if _STAGE.fullmatch(p.name))
  for folder in folders:
    if not _STAGE.fullmatch(folder.name):
      yield from (p for p in entries(folder) if _STAGE.fullmatch(p.name))


def _stage(found: Findings, directory: epath.Path) -> str:
  parts = []
  request = directory / 'request.json'
  asked = _json(found, request, dict) if exists(request) else {}
  name = directory.name.partition('_')[2]
  epochs = (asked.get(name) or {}).get('total_epochs', '?')
  models = [m for m in _MODELS if manifest.is_sealed(directory / m)]
  rows = len(_lines(found, directory / 'metrics.jsonl'))
  if 'model' in models:
    parts.append(f'finished, {epochs} epoch{"s" * (epochs != 1)}')
  else:
    found.complete = False
    parts.append(f'epoch {rows} of {epochs} done')
  whole = [m for m in models if _sealed(found, directory / m)]
  if whole:
    parts.append(f'{", ".join(whole)} whole')
  saves = directory / 'checkpoints'
  names = entries(saves)
  numbers = sorted((p for p in names if p.name.isdigit()), key=_number)
  unknown = len(found.unreadable)
  good = [p.name for p in numbers if _sealed(found, p)]
  _blocked(
    found,
    directory,
    models,
    whole,
    bool(good) or len(found.unreadable) > unknown,
  )
  if good:
    parts.append(f'saves of step {" and ".join(good)} whole')
  for folder in (directory / 'damaged', saves / 'damaged'):
    if aside := entries(folder):
      parts.append(f'{len(aside)} set aside in {shown(folder)}')
  skipped = _lines(found, directory / 'skipped.jsonl')
  if skipped:
    parts.append(f'{len(skipped)} updates skipped, not finite')
  beside = [p for folder in (directory, saves) for p in entries(folder)]
  leftovers = [p.name for p in beside if p.name.endswith(_LEFTOVERS)]
  if leftovers:
    parts.append(f'left over from an interruption: {", ".join(leftovers)}')
  return '; '.join(parts)


def _number(path: epath.Path) -> int:
  return int(path.name)


def _blocked(
  found: Findings,
  directory: epath.Path,
  models: list[str],
  whole: list[str],
  saved: bool,
) -> None:
  """Notes what the run stumbles over in a stage; see `Findings.first`."""
  lost = [m for m in models if m not in whole]
  if found.unreadable:  # then what is lost is not known
    return
  for name in lost:
    if name != 'model':
      found.first.append(f'delete {shown(directory / name)}')
  saves = directory / 'checkpoints'
  if not ('model' in whole or saved) and entries(saves):
    found.first.append(
      f'delete {shown(saves)} to train the stage from its start, as no save is '
      'whole'
    )


def _sealed(found: Findings, folder: epath.Path) -> bool:
  """Whether every byte is as written; if not, that is damage."""
  try:
    manifest.verify(folder)
    files = manifest.read(folder)['files'].values()
  except Unreadable as e:
    found.unreadable.append(str(e))
    return False
  except Damaged as e:
    if exists(folder):  # a run that goes on deletes its older saves
      found.damage.append(str(e))
    return False
  found.files += len(files)
  found.bytes += sum(f['bytes'] for f in files)
  return True


def _json(found: Findings, path: epath.Path, kind: type) -> Any:
  return _read(found, path, lambda: read_json(path, kind), kind())


def _lines(found: Findings, path: epath.Path) -> list[dict[str, Any]]:
  from rocl_jax import metrics

  return _read(found, path, lambda: metrics.read_lines(path), [])


def _version_lines(found: Findings, path: epath.Path) -> list[str]:
  from rocl_jax import provenance

  said = (line.get('versions') for line in _lines(found, path))
  versions = [x for x in said if isinstance(x, dict)]
  pairs = itertools.pairwise(versions)
  return [line for pair in pairs for line in provenance.changed(*pair)]


def _results(found: Findings, path: epath.Path) -> list[dict[str, Any]]:
  from rocl_jax import results

  return _read(found, path, lambda: results.read(path), [])


def _read(
  found: Findings, path: epath.Path, function: Callable[[], T], nothing: T
) -> T:
  """What the function reads of a file; `nothing` where it can't."""
  try:
    return function()
  except Unreadable as e:
    found.unreadable.append(str(e))
  except UserError as e:
    found.damage.append(str(e))
    found.first.append(f'delete {shown(path)}')
  return nothing


def _run_line(config: dict[str, Any]) -> str:
  model, data = config.get('model', {}), config.get('data', {})
  return (
    f'{config.get("name")}: {model.get("name")}, width {model.get("width")}, '
    f'{model.get("dtype")}, {data.get("source")}, seed {config.get("seed")}'
  )


def _model_line(about: dict[str, Any]) -> str:
  keys = ('run', 'stage', 'selection', 'epoch', 'dataset', 'fingerprint')
  told = ', '.join(f'{k} {about.get(k)}' for k in keys)
  return f'{told}, sparsity {about.get("sparsity")}'


def _holder(found: Findings, path: epath.Path) -> dict[str, Any]:
  try:
    return workdir.holder(path)
  except Unreadable as e:
    if str(e) not in found.unreadable:
      found.unreadable.append(str(e))
    return {}


def _state_line(holder: dict[str, Any]) -> str:
  if not holder:
    return 'never started'
  who = f'process {holder.get("process")} on {holder.get("host")}'
  if holder['alive']:
    return f'running: {who}, since {holder.get("started")}'
  status = holder.get('status')
  if status == 'running':
    return f'died: {who}, started {holder.get("started")}'
  return f'{status}, {holder.get("ended")} ({who})'


def _next(path: epath.Path, found: Findings, holder: dict[str, Any]) -> str:
  if holder.get('alive'):
    return 'nothing: it is running'
  status, command = holder.get('status'), holder.get('command')
  again = 'the command that began it'
  if command:
    # Of a copy, the command's own folder is another.
    here = f'--workdir={path}'
    words = [
      here if x.startswith('--workdir=') and not is_remote(x) else x
      for x in shlex.split(command)
    ]
    again = shlex.join(['python', *words])
  if found.unreadable:
    return (
      f'nothing is lost: make these files readable again, then run: {again}'
    )
  if found.first:
    return f'{", ".join(dict.fromkeys(found.first))}; then run: {again}'
  if found.damage:
    return (
      f'{again}: damaged saves and models that it still needs are set aside, '
      'and the ones before used'
    )
  if found.complete and status == 'finished':
    return f'python -m rocl_jax.report {shown(path)}'
  if str(status).startswith('failed'):
    why = str(status).removeprefix('failed: ')
    return f'fix this first: {why}; then run: {again}'
  return f'{again}: it goes on'


def text(path: epath.Path, found: Findings) -> str:
  """The findings, on one screen."""
  lines = [(shown(path), ''), *found.lines]
  whole = f'{found.files} files, {found.bytes / 1e6:.1f} MB as written'
  lines.append(('bytes', whole))
  lines += [('DAMAGED', problem) for problem in found.damage]
  lines += [('UNREADABLE', problem) for problem in found.unreadable]
  if exists(path / 'config.json'):
    lines.append(('next', _next(path, found, _holder(found, path))))
  width = max(len(heading) for heading, _ in lines[1:])
  return '\n'.join(f'{h:<{width}}  {t}'.rstrip() for h, t in lines)


def main(arguments: list[str]) -> None:
  if is_remote(arguments[0]):
    raise UserError(
      f'found {arguments[0]}, wanted a folder of this machine, such as a copy'
    )
  path = epath.Path(place(arguments[0]))
  if not exists(path) or not path.is_dir():
    raise UserError(f'{arguments[0]}: no such folder')
  found = examine(path)
  print(text(path, found))
  if found.damage:
    raise RunFailed(f'{len(found.damage)} damaged: {found.damage[0]}')
  if found.unreadable:
    raise Unreadable(found.unreadable[0])


if __name__ == '__main__':
  command.run(main, usage=__doc__ or '', positional=(1,))
