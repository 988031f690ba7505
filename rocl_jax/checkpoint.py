"""Orbax, in one place: train states while a stage runs, models when it ends.

  manager = open_states(directory / 'checkpoints')
  save_state(manager, step, state)
  state = restore_state(manager, like=state)         # None if there is none

  save_model(directory / 'model', variables, {'stage': 'prune', ...})
  variables, about = load_model(directory / 'model')

A model folder holds `variables/` and `model.json`, written last: without it
the folder is not a model. Masks are part of it, as data.
"""

import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rocl_jax.errors import UserError
from rocl_jax.files import read_json
from rocl_jax.trees import flatten, unflatten
from rocl_jax.types import TrainState, Variables

ABOUT = 'model.json'
_ABOUT_FIELDS = (
  *('run', 'stage', 'selection', 'epoch', 'config', 'dataset'),
  *('class_names', 'image_shape', 'fingerprint', 'sparsity', 'layers'),
)


def open_states(directory: epath.Path) -> ocp.CheckpointManager:
  """The train states of a stage; the newest two are kept."""
  options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
  return ocp.CheckpointManager(directory, options=options)


def save_state(
  manager: ocp.CheckpointManager, step: int, state: TrainState
) -> None:
  """Saves in the background; the state may be donated at once."""
  if step != manager.latest_step():
    manager.save(step, args=ocp.args.StandardSave(state))


def restore_state(
  manager: ocp.CheckpointManager, like: TrainState
) -> TrainState | None:
  """The newest state, laid out as `like` (arrays, or their abstract form)."""
  step = manager.latest_step()
  if step is None:
    return None
  return manager.restore(step, args=ocp.args.StandardRestore(like))


def read_state(directory: epath.Path) -> dict[str, Any] | None:
  """The newest train state as nested dicts, for who does not know its form."""
  with ocp.CheckpointManager(directory) as manager:
    step = manager.latest_step()
    if step is None:
      return None
    return manager.restore(step, args=ocp.args.StandardRestore())


def save_model(
  directory: epath.Path, variables: Variables, about: dict[str, Any]
) -> None:
  """Writes a model folder, in place of an older one.

  Args:
    directory: the folder.
    variables: see `types.Variables`.
    about: JSON to keep with it: run, stage, config and what else matters.
  """
  new = directory.with_name(directory.name + '.new')
  if new.exists():  # of an interrupted attempt
    new.rmtree()
  new.mkdir(parents=True)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(new.resolve() / 'variables', _nest(variables))
  (new / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True))
  if directory.exists():
    directory.rmtree()
  new.rename(directory)


def load_model(directory: epath.Path) -> tuple[Variables, dict[str, Any]]:
  """Reads a model folder.

  Returns:
    The variables, as NumPy arrays, and what `model.json` says.

  Raises:
    UserError: not a model folder, or a damaged one.
  """
  if not is_model(directory):
    inside = directory / 'model'
    hint = f' (did you mean {inside}?)' if is_model(inside) else ''
    raise UserError(f'{directory}: no model here, {ABOUT} is missing{hint}')
  about = read_json(directory / ABOUT, dict)
  for field in _ABOUT_FIELDS:
    if field not in about:
      raise UserError(f'{directory / ABOUT}: has no {field}')
  path = directory.resolve() / 'variables'
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      like = jax.tree.map(
        lambda x: np.empty(x.shape, x.dtype),
        checkpointer.metadata(path).item_metadata,
      )
      variables = _flat_masks(checkpointer.restore(path, like))
  except (ValueError, OSError, KeyError, TypeError, AttributeError) as e:
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise UserError(f'{path}: can not be read: {reason:.200}') from None
  return variables, about


def is_model(directory: epath.Path) -> bool:
  """Whether the folder holds a complete model."""
  return (directory / ABOUT).exists()


# On disk the flat parts are nested: a path is no good name for a file.
_FLAT_PARTS = ('masks', 'dropped')


def _nest(variables):
  return {
    k: unflatten(v) if k in _FLAT_PARTS else v for k, v in variables.items()
  }


def _flat_masks(variables):
  return {
    k: flatten(v) if k in _FLAT_PARTS else v for k, v in variables.items()
  }
