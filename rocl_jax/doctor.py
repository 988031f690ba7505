"""Says what a run is, how far it got, whether its bytes are whole, what next.

  python -m rocl_jax.doctor WORKDIR

Reads every file of every model and every save against the checksums that were
written with it, and needs no device. WORKDIR may be a model folder, too. Exit
status 3: something is damaged.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from rocl_jax import command, manifest, workdir
from rocl_jax.errors import RunFailed, UserError
from rocl_jax.files import is_remote, read_json
from rocl_jax.manifest import Damaged

_MODELS = ('model', 'best_validation', 'best_test')
_STAGE = re.compile(r'\d+_\w+')
_LEFTOVERS = ('.writing', '.new', '.old')


@dataclass
class Findings:
  """What was found in a folder.

  Attributes:
    lines: (heading, text) for people.
    damage: one line for each thing that is not what was written.
    files, bytes: how much was read and is whole.
    complete: whether every stage has its model.
  """

  lines: list[tuple[str, str]] = field(default_factory=list)
  damage: list[str] = field(default_factory=list)
  files: int = 0
  bytes: int = 0
  complete: bool = True


def examine(path: epath.Path) -> Findings:
  """Reads all of a work directory, or of a model folder.

  Raises:
    UserError: it is neither.
  """
  found = Findings()
  if (path / 'model.json').exists():
    about = _json(found, path / 'model.json', dict)
    found.lines.append(('model', _model_line(about)))
    _sealed(found, path)
    return found
  if not (path / 'config.json').exists():
    seeds = sorted(p.name for p in path.glob('seed*') if p.is_dir())
    if seeds:
      raise UserError(
        f'{path}: a reproduction; wanted one of its work directories, such as '
        f'{path / seeds[0]}'
      )
    raise UserError(
      f'{path}: neither a work directory (no config.json) nor a model folder '
      '(no model.json)'
    )
  config = _json(found, path / 'config.json', dict)
  found.lines.append(('run', _run_line(config)))
  found.lines.append(('state', _state_line(workdir.holder(path))))
  for changes in _lines(found, path / 'changes.jsonl'):
    was = f'{changes.get("field")} {changes.get("from")!r}'
    found.lines.append(('changed', f'{was} -> {changes.get("to")!r}'))
  stages = list(_stages(path))
  wanted = [
    path / f'{i + 1}_{name}' for i, name in enumerate(config.get('stages', ()))
  ]
  for directory in [*wanted, *(s for s in stages if s not in wanted)]:
    name = directory.relative_to(path).as_posix()
    text = 'not begun'
    if directory.is_dir():
      text = _stage(found, directory)
    else:
      found.complete = False
    found.lines.append((name, text))
  if (path / 'results.json').exists():
    records = _results(found, path / 'results.json')
    found.lines.append(('results', f'{len(records)} records'))
  return found


def _stages(path: epath.Path) -> Iterator[epath.Path]:
  """The stage folders of the main run, then those of its baselines."""
  folders = sorted(p for p in path.iterdir() if p.is_dir())
  yield from (p for p in folders if _STAGE.fullmatch(p.name))
  for folder in folders:
    if not _STAGE.fullmatch(folder.name):
      inner = sorted(p for p in folder.iterdir() if p.is_dir())
      yield from (p for p in inner if _STAGE.fullmatch(p.name))


def _stage(found: Findings, directory: epath.Path) -> str:
  parts = []
  request = directory / 'request.json'
  asked = _json(found, request, dict) if request.exists() else {}
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
  names = [p for p in saves.iterdir()] if saves.is_dir() else []
  numbers = sorted((p for p in names if p.name.isdigit()), key=_number)
  good = [p.name for p in numbers if _sealed(found, p)]
  if good:
    parts.append(f'saves of step {" and ".join(good)} whole')
  for folder in (directory / 'damaged', saves / 'damaged'):
    if folder.is_dir():
      parts.append(f'{len(list(folder.iterdir()))} set aside in {folder}')
  skipped = _lines(found, directory / 'skipped.jsonl')
  if skipped:
    parts.append(f'{len(skipped)} updates skipped, not finite')
  beside = [p for folder in (directory, saves) for p in _entries(folder)]
  leftovers = [p.name for p in beside if p.name.endswith(_LEFTOVERS)]
  if leftovers:
    parts.append(f'left over from an interruption: {", ".join(leftovers)}')
  return '; '.join(parts)


def _number(path: epath.Path) -> int:
  return int(path.name)


def _entries(folder: epath.Path) -> list[epath.Path]:
  return sorted(folder.iterdir()) if folder.is_dir() else []


def _sealed(found: Findings, folder: epath.Path) -> bool:
  """Whether every byte is as written; if not, that is damage."""
  try:
    manifest.verify(folder)
    files = manifest.read(folder)['files'].values()
  except Damaged as e:
    if folder.exists():  # a run that goes on deletes its older saves
      found.damage.append(str(e))
    return False
  found.files += len(files)
  found.bytes += sum(f['bytes'] for f in files)
  return True


def _json(found: Findings, path: epath.Path, kind: type) -> Any:
  try:
    return read_json(path, kind)
  except UserError as e:
    found.damage.append(str(e))
    return kind()


def _lines(found: Findings, path: epath.Path) -> list[dict[str, Any]]:
  from rocl_jax import metrics

  try:
    return metrics.read_lines(path)
  except UserError as e:
    found.damage.append(str(e))
    return []


def _results(found: Findings, path: epath.Path) -> list[dict[str, Any]]:
  from rocl_jax import results

  try:
    return results.read(path)
  except UserError as e:
    found.damage.append(str(e))
    return []


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
  again = shlex.join(['python', *shlex.split(holder.get('command') or '')])
  if found.damage:
    return (
      f'{again}: damaged saves and models that it still needs are set aside, '
      'and the ones before used; delete what else is damaged'
    )
  if found.complete and holder.get('status') == 'finished':
    return f'python -m rocl_jax.report {path}'
  return f'{again}: it goes on'


def text(path: epath.Path, found: Findings) -> str:
  """The findings, on one screen."""
  lines = [(str(path), ''), *found.lines]
  whole = f'{found.files} files, {found.bytes / 1e6:.1f} MB as written'
  lines.append(('bytes', whole))
  lines += [('DAMAGED', problem) for problem in found.damage]
  if (path / 'config.json').exists():
    lines.append(('next', _next(path, found, workdir.holder(path))))
  width = max(len(heading) for heading, _ in lines[1:])
  return '\n'.join(f'{h:<{width}}  {t}'.rstrip() for h, t in lines)


def main(arguments: list[str]) -> None:
  if is_remote(arguments[0]):
    raise UserError(
      f'found {arguments[0]}, wanted a folder of this machine, such as a copy'
    )
  path = epath.Path(arguments[0]).expanduser().resolve()
  if not path.is_dir():
    raise UserError(f'{arguments[0]}: no such folder')
  found = examine(path)
  print(text(path, found))
  if found.damage:
    raise RunFailed(f'{len(found.damage)} damaged: {found.damage[0]}')


if __name__ == '__main__':
  command.run(main, usage=__doc__ or '', positional=(1,))
