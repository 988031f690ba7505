"""Train states while a stage runs, models when it ends: safe on disk.

  with States(directory / 'checkpoints') as states:
    state, rows = states.restore(like=state) or (state, [])
    states.save(step, state, rows)

  save_model(directory / 'model', variables, {'stage': 'prune', ...})
  variables, about = load_model(directory / 'model')

Orbax writes the arrays; `manifest` says whether they are still what was
written. What is new is read back and compared before what it replaces goes. A
model folder holds `variables/` and `model.json`; masks are part of it, as data.
"""

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rocl_jax import manifest, processes
from rocl_jax.errors import RunFailed, UserError, one_line, shown, unreadable
from rocl_jax.files import entries, exists, read_json
from rocl_jax.manifest import Damaged
from rocl_jax.progress import say
from rocl_jax.trees import flatten, unflatten
from rocl_jax.types import TrainState, Variables

ABOUT = 'model.json'
_ABOUT_FIELDS = (
  *('run', 'stage', 'selection', 'epoch', 'config', 'dataset'),
  *('class_names', 'image_shape', 'fingerprint', 'sparsity', 'layers'),
)
KEPT = 2  # states: the newest, and one to fall back to
_PAUSES = (1.0, 2.0, 4.0)  # seconds before a failed write is tried again
_WRITING = '.writing'
_OLD = '.old'
_DAMAGED = 'damaged'

Rows = list[dict[str, Any]]


class States:
  """The train states of a stage, by step; the newest two are kept.

  Args:
    directory: their folder; made if missing.
  """

  def __init__(self, directory: epath.Path):
    self._directory = directory
    self._writer: threading.Thread | None = None
    self._failure: RunFailed | None = None
    if not processes.is_first():
      return
    if not exists(directory):
      directory.mkdir(parents=True, exist_ok=True)
    for path in entries(directory):  # what an interruption left over
      half = path.name.isdigit() and not manifest.is_sealed(path)
      if half or path.name.endswith((_WRITING, _OLD)):
        shutil.rmtree(path, ignore_errors=True)

  def __enter__(self) -> 'States':
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    if kind is None:
      self.wait()
    elif self._writer is not None:
      self._writer.join()

  def restore(self, like: TrainState) -> tuple[TrainState, Rows] | None:
    """The newest state that is whole; damaged ones are set aside.

    Args:
      like: a state of the wanted shapes, on the wanted devices.

    Returns:
      The state, and the metric rows that were saved with it. None if nothing
      was saved yet.

    Raises:
      UserError: the state is that of another network, stage or optimiser.
      RunFailed: there are states, and none of them is whole; or one can't be
        read now, which leaves all as it is.
    """
    found = processes.from_first(self._newest)
    if found is None:
      return None
    step, arrays, rows = found
    return _fit(arrays, like, self._directory / str(step)), rows

  def _newest(self) -> tuple[int, dict[str, np.ndarray], Rows] | None:
    found = steps(self._directory)
    for step in reversed(found):
      path = self._directory / str(step)
      try:
        arrays, about = _read(path, 'state')
      except Damaged as e:
        moved = set_aside(path)
        say(f'{e}; set aside as {shown(moved)}')
        continue
      return step, arrays, about['rows']
    if exists(self._directory / _DAMAGED):
      raise RunFailed(
        f'{shown(self._directory)}: no save is whole, all were set aside; '
        'delete that folder to train the stage from its start'
      )
    return None

  def save(self, step: int, state: TrainState, rows: Rows) -> None:
    """Saves in the background; the state may be donated at once.

    Of several processes the first one saves.

    Raises:
      RunFailed: the save before this one could not be written.
    """
    self.wait()
    if not processes.is_first() or step in steps(self._directory):
      return
    arrays = _named(state)
    about = {'step': step, 'rows': [dict(row) for row in rows]}
    self._writer = threading.Thread(
      target=self._write, args=(step, arrays, about), daemon=True
    )
    self._writer.start()

  def wait(self) -> None:
    """Returns when all is on disk.

    Raises:
      RunFailed: it could not be written.
    """
    if self._writer is not None:
      self._writer.join()
      self._writer = None
    if self._failure is not None:
      raise self._failure

  def _write(self, step, arrays, about):
    path = self._directory / str(step)
    try:
      _replace(path, lambda new: _fill(new, 'state', arrays, about))
    except Exception as e:  # what Orbax raises depends on the file system
      told = f'step {step} could not be saved: '
      told += _why(self._directory, arrays, e)
      self._failure = RunFailed(told)
      with contextlib.suppress(OSError, RunFailed):  # it may be away
        newest = steps(self._directory)[-1:]
        kept = f'the save of step {newest[0]} is' if newest else 'no save is'
        told += f'; {kept} there; the same command goes on from it'
        self._failure = RunFailed(told)
      return
    with contextlib.suppress(OSError, RunFailed):  # then next time
      for old in steps(self._directory)[:-KEPT]:
        _discard(self._directory / str(old))


def steps(directory: epath.Path) -> list[int]:
  """The steps that were saved whole, ascending; damage is not looked for.

  Raises:
    Unreadable: it can't be known.
  """
  names = [p.name for p in entries(directory) if p.name.isdigit()]
  return sorted(int(n) for n in names if manifest.is_sealed(directory / n))


def read_state(directory: epath.Path) -> dict[str, Any] | None:
  """The newest whole train state as nested dicts, whatever its form.

  Returns:
    None where there is none.

  Raises:
    Unreadable: it can't be read now.
  """
  for step in reversed(steps(directory)):
    try:
      return unflatten(_read(directory / str(step), 'state')[0])
    except Damaged as e:
      say(f'{e}; an older save is read instead')
  return None


def save_model(
  directory: epath.Path, variables: Variables, about: dict[str, Any]
) -> None:
  """Writes a model folder; an older one goes when the new one is whole.

  Args:
    directory: the folder.
    variables: see `types.Variables`.
    about: JSON to keep with it: run, stage, config and what else matters.

  Raises:
    RunFailed: it could not be written; an older one is untouched.
  """
  arrays = _named(variables)
  text = json.dumps(about, indent=1, sort_keys=True)

  def fill(new):
    (new / ABOUT).write_text(text)
    _fill(new, 'variables', arrays, {})

  try:
    _replace(directory, fill)
  except Exception as e:
    why = _why(directory.parent, arrays, e)
    raise RunFailed(f'{shown(directory)}: could not be saved: {why}') from None


def load_model(directory: epath.Path) -> tuple[Variables, dict[str, Any]]:
  """Reads a model folder, after checking every byte of it.

  Returns:
    The variables, as NumPy arrays, and what `model.json` says.

  Raises:
    Damaged: not a model folder, or one that is not what was written.
    UserError: one of another version.
    Unreadable: it can't be read now.
  """
  if not is_model(directory):
    inside = [directory / 'model', *sorted(directory.glob('*_*/model'))[::-1]]
    there = next((path for path in inside if is_model(path)), None)
    hint = f' (did you mean {shown(there)}?)' if there else ''
    missing = f'no model here, {manifest.MANIFEST} is missing'
    if not exists(directory):
      missing = 'no such folder'
    raise Damaged(f'{shown(directory)}: {missing}{hint}')
  arrays, _ = _read(directory, 'variables')
  about = read_json(directory / ABOUT, dict)
  for field in _ABOUT_FIELDS:
    if field not in about:
      raise UserError(f'{shown(directory / ABOUT)}: has no {field}')
  variables = unflatten(arrays)
  for part in ('masks', 'dropped'):  # flat by path, as `types` says
    if part in variables:
      variables[part] = flatten(variables[part])
  return variables, about


def is_model(directory: epath.Path) -> bool:
  """Whether the folder holds a finished model."""
  return manifest.is_sealed(directory) and exists(directory / ABOUT)


def forms(folder: epath.Path) -> dict[str, str] | None:
  """Type and shape of each array of a model or save, by path; nothing is read
  but the manifest. None for a folder that is damaged, or of another version.

  Raises:
    Unreadable: it can't be read now.
  """
  try:
    found = manifest.read(folder)['about'].get('leaves')
  except Damaged:
    return None
  return found if isinstance(found, dict) else None


def forms_of(tree: Any) -> dict[str, str]:
  """The same of arrays, or of their shapes."""
  return {path: _kind(leaf) for path, leaf in _by_path(tree).items()}


def difference(found: dict[str, str], asked: dict[str, str]) -> str:
  """What two `forms` differ in, the first three; '' if in nothing.

  An epoch's sums of metrics do not count: versions measure different things.
  """
  apart = [
    k
    for k in {**asked, **found}
    if found.get(k) != asked.get(k) and not k.startswith('sums/')
  ]
  if not apart:
    return ''
  told = [
    f'{k} is {found.get(k, "missing")}, wanted {asked.get(k, "none")}'
    for k in apart[:3]
  ]
  more = f', and {len(apart) - 3} more' if len(apart) > 3 else ''
  return '; '.join(told) + more


def set_aside(path: epath.Path) -> epath.Path:
  """Moves a damaged folder to `damaged/` beside it; returns where it is."""
  folder = path.parent / _DAMAGED
  folder.mkdir(exist_ok=True)
  names = [path.name, *(f'{path.name}-{i}' for i in range(2, 1000))]
  target = next(folder / n for n in names if not exists(folder / n))
  path.rename(target)
  return target


def _replace(directory: epath.Path, fill: Callable[[epath.Path], None]) -> None:
  """Puts a new folder in the place of an old one, which goes last.

  Args:
    directory: the folder.
    fill: writes what is new to the empty folder that it gets, and seals it.
  """
  new = directory.with_name(directory.name + _WRITING)
  for pause in (*_PAUSES, None):
    try:
      shutil.rmtree(new, ignore_errors=True)
      new.mkdir(parents=True)
      fill(new)
      break
    except Exception:
      shutil.rmtree(new, ignore_errors=True)
      if pause is None:
        raise
      time.sleep(pause)
  old = directory.with_name(directory.name + _OLD)
  shutil.rmtree(old, ignore_errors=True)
  if exists(directory):
    directory.rename(old)
  try:
    new.rename(directory)
  except OSError:
    if exists(old):
      old.rename(directory)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _discard(folder: epath.Path) -> None:
  """Deletes a folder; an interruption leaves none of its name."""
  old = folder.with_name(folder.name + _OLD)
  folder.rename(old)
  shutil.rmtree(old, ignore_errors=True)


def _fill(folder, name, arrays, about):
  """Writes arrays, reads them back, and seals the folder."""
  _check_space(folder, arrays)
  nested = unflatten(arrays)
  with _orbax() as checkpointer:
    checkpointer.save(folder.resolve() / name, nested)
  leaves = {path: _kind(x) for path, x in arrays.items()}
  back = _restore(folder.resolve() / name, leaves)
  if back.keys() != arrays.keys() or not all(
    _equal(arrays[k], back[k]) for k in arrays
  ):
    raise OSError('what was read back is not what was written')
  manifest.seal(folder, about | {'leaves': leaves})


def _read(folder, name):
  """(arrays by path, about) of a sealed folder; raises Damaged, or Unreadable
  where its bytes are whole, and something else is wrong."""
  about = manifest.verify(folder)
  leaves = about.get('leaves')
  if not isinstance(leaves, dict):
    raise Damaged(f'{shown(folder)}: its manifest does not tell its arrays')
  try:
    return _restore(folder.resolve() / name, leaves), about
  except Exception as e:  # whatever Orbax, TensorStore and JAX raise
    raise unreadable(folder / name, e) from None


# Two saves of Orbax at a time mix up their operation numbers, and one of them
# waits until its limit of five minutes for a signal that the other got.
_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.StandardCheckpointer]:
  # Only the first process comes here: Orbax must not wait for the others.
  alone = ocp.options.MultiprocessingOptions(
    primary_host=0,
    active_processes={0} if processes.count() > 1 else None,
    barrier_sync_key_prefix='first' if processes.count() > 1 else None,
  )
  with (
    _ONE_AT_A_TIME,
    ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer,
  ):
    yield checkpointer


def _restore(path, leaves):
  # Not of Orbax's own metadata: each look at them leaves a third of a MB.
  like = unflatten({k: _empty(kind) for k, kind in leaves.items()})
  with _orbax() as checkpointer:
    return flatten(checkpointer.restore(path, like))


def _empty(kind):
  dtype, _, shape = kind.partition('[')
  return np.empty(json.loads(f'[{shape}'), jnp.dtype(dtype))


def _fit(arrays, like, folder):
  """The arrays as a state of the form of `like`, on its devices.

  Raises:
    UserError: they are not of that form; the message names the first fields.
  """
  wanted = _by_path(like)
  apart = difference(forms_of(arrays), forms_of(like))
  if apart:
    raise UserError(
      f'{shown(folder)}: was saved by another network, stage or optimiser: '
      f'{apart}'
    )
  # Only of metrics, which `difference` passes over, there may be new ones.
  found = lambda p, x: arrays.get(p, np.zeros(x.shape, x.dtype))
  leaves = [jax.device_put(found(p, x), x.sharding) for p, x in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _by_path(tree):
  """{'trained/trainable/encoder/stem/kernel': leaf} in the tree's order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in leaves
  }


def _named(tree):
  """As `_by_path`, with copies on the host: the device's may be donated."""
  return {k: np.array(x) for k, x in _by_path(jax.device_get(tree)).items()}


def _kind(array):
  return f'{array.dtype}{list(array.shape)}'


def _equal(a, b):
  return _kind(a) == _kind(b) and a.tobytes() == b.tobytes()


def _check_space(folder, arrays):
  needed = sum(x.nbytes for x in arrays.values())
  free = _free(folder)
  if free is not None and free < needed:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _free(folder):
  """Free bytes of the file system, None where that can't be told."""
  try:
    return shutil.disk_usage(folder).free
  except OSError:
    return None


def _why(folder, arrays, error):
  reason = one_line(error)
  needed, free = sum(x.nbytes for x in arrays.values()), _free(folder)
  room = '' if free is None else f', {free / 1e6:.1f} MB are free'
  return (
    f'{shown(folder)}: {reason:.200} ({needed / 1e6:.1f} MB to write{room})'
  )
