"""Saved classifiers, ready for evaluation.

model = load('runs/quickstart/4_finetune/model', '--model')
logits = network(model.network).predict(model.variables, images)
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from rocl_jax import checkpoint, models
from rocl_jax.errors import UserError, shown
from rocl_jax.files import is_remote
from rocl_jax.progress import say
from rocl_jax.settings import parse
from rocl_jax.types import Variables


class Network(NamedTuple):
  """What a network is, apart from its weights."""

  settings: models.Settings
  classes: int


class Saved(NamedTuple):
  """A model folder in memory.

  Attributes:
    field: where the user named it, for messages.
    folder: the folder.
    name: of run and stage, for people.
    network: what it is a set of weights of.
    variables: see `types.Variables`.
    about: what `model.json` says.
  """

  field: str
  folder: epath.Path
  name: str
  network: Network
  variables: Variables
  about: dict[str, Any]

  @property
  def class_names(self) -> list[str]:
    return self.about['class_names']

  def say(self, message: str) -> None:
    """Prints a line on this model."""
    say(f'{self.name}: {message}')

  def check_images(self, other: 'Saved') -> None:
    """Raises UserError unless both networks are for the same images."""
    for field in ('class_names', 'image_shape'):
      if self.about[field] != other.about[field]:
        raise UserError(
          f'{self.field}: {shown(self.folder)} has the {field} '
          f'{self.about[field]}, {shown(other.folder)} has {other.about[field]}'
        )


def load(folder: str, field: str, dtype: str = '') -> Saved:
  """Reads a model folder with a classifier in it.

  Args:
    folder: the path.
    field: where the user named it, for messages.
    dtype: of the encoder's arithmetic, if not as it was trained.

  Raises:
    UserError: no model, an encoder alone, or another network than it says.
  """
  if is_remote(folder):
    raise UserError(f'{field}: found {folder}, wanted a folder of this machine')
  path = epath.Path(os.path.realpath(os.path.expanduser(folder)))
  try:
    variables, about = checkpoint.load_model(path)
  except UserError as e:
    raise UserError(f'{field}: {e}') from None
  if 'head' not in variables['params']:
    raise UserError(
      f'{field}: {shown(path)} is an encoder without a classifier'
    )
  section = dict(about['config']['model'])
  section['dtype'] = dtype or section['dtype']
  settings = parse(models.Settings, section, 'config.model')
  which = Network(settings, len(about['class_names']))
  shape = tuple(about['image_shape'])
  fresh = jax.eval_shape(lambda: network(which).init(jax.random.key(0), shape))
  difference = models.mismatch(variables, fresh)
  if difference:
    raise UserError(
      f'{field}: {shown(path)} is not the network that its {checkpoint.ABOUT} '
      f'says: {difference}'
    )
  name = f'{about["run"]}/{about["stage"]}'
  return Saved(field, path, name, which, variables, about)


def names(saved: Sequence[Saved]) -> dict[epath.Path, str]:
  """Names by folder, with as much of its path as tells two apart."""
  named = {model.folder: model.name for model in saved}
  short = list(named.values())
  return {
    folder: name if short.count(name) == 1 else f'{name} ({folder})'
    for folder, name in named.items()
  }


@functools.cache
def network(which: Network) -> models.Model:
  """The architecture; the same object for the same settings."""
  return models.build(which.settings, which.classes)
