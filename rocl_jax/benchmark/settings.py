"""The config of the benchmark, checked."""

from dataclasses import dataclass, replace

from ml_collections import ConfigDict

from rocl_jax import models
from rocl_jax.attacks.balls import check_ball
from rocl_jax.errors import UserError
from rocl_jax.settings import FieldError, Place, at_least, one_of, parse, within
from rocl_jax.stages import (
  STAGES,
  finetune,
  linear_eval,
  pretrain,
  prune,
  supervised,
)


@dataclass(frozen=True, kw_only=True)
class Masks:
  """Attributes:
  sizes: numbers of scores in a layer.
  keep: kept fraction.
  """

  sizes: tuple[int, ...]
  keep: float

  def __post_init__(self):
    _numbers('sizes', self.sizes, 1)
    if not 0 < self.keep <= 1:
      raise FieldError('keep', self.keep, 'a kept fraction in (0, 1]')


@dataclass(frozen=True, kw_only=True)
class Scaling:
  """Attributes:
  devices: numbers of simulated devices.
  width: of the network.
  batch: images in a step: of all devices in strong scaling, of each in weak.
  steps: of the attack.
  """

  devices: tuple[int, ...]
  width: int
  batch: int
  steps: int

  def __post_init__(self):
    _numbers('devices', self.devices, 1)
    within('width', self.width, 1, 4096)
    at_least('batch', self.batch, 1)
    at_least('steps', self.steps, 0)
    for count in self.devices:
      if self.batch % count:
        wanted = f'numbers that divide the batch of {self.batch}'
        raise FieldError('devices', self.devices, wanted)


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
  """Attributes:
  model: a model folder; '' for the small network of `reference`.
  reference: the file of the reference vectors.
  images: the folder of the images; '' for the model's own, or the one that
    ROCL_CIFAR_DIR names.
  examples: the first so many test images.
  eps, norm: the ball.
  batch_size: images at a time.
  """

  model: Place
  reference: str
  images: Place
  examples: int
  eps: float
  norm: str
  batch_size: int

  def __post_init__(self):
    check_ball(self.eps, self.norm)
    at_least('examples', self.examples, 1)
    at_least('batch_size', self.batch_size, 1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
  """What the measured training steps are taken from."""

  model: models.Settings
  pretrain: pretrain.Settings
  linear_eval: linear_eval.Settings
  supervised: supervised.Settings
  prune: prune.Settings
  finetune: finetune.Settings


@dataclass(frozen=True, kw_only=True)
class Settings:
  """Attributes:
  rounds: times that every job runs, after a warm-up.
  image_size, classes: of the random images and labels.
  width, batch, dtype, steps: the grid.
  masks, scaling, autoattack: of those sections.
  recipe: the training steps.
  """

  rounds: int
  image_size: int
  classes: int
  width: tuple[int, ...]
  batch: tuple[int, ...]
  dtype: tuple[str, ...]
  steps: tuple[int, ...]
  masks: Masks
  scaling: Scaling
  autoattack: AutoAttack
  recipe: Recipe

  def __post_init__(self):
    at_least('rounds', self.rounds, 1)
    within('image_size', self.image_size, 8, 1024)
    within('classes', self.classes, 2, 100000)
    _numbers('width', self.width, 1)
    _numbers('batch', self.batch, 2)
    _numbers('steps', self.steps, 1)
    if not self.dtype:
      raise FieldError('dtype', self.dtype, 'at least one')
    for dtype in self.dtype:
      one_of('dtype', dtype, ('float32', 'tf32', 'bfloat16'))
      replace(self.recipe.model, dtype=dtype)  # which may refuse it here


def _numbers(field, values, low):
  if not values or min(values) < low:
    raise FieldError(field, values, f'at least one number, each {low} or more')


def parse_settings(config: ConfigDict) -> Settings:
  """Checks a config such as `configs/benchmark.py`.

  Raises:
    UserError: a mistake in it.
  """
  if not isinstance(config, ConfigDict) or 'recipe' not in config:
    raise UserError(
      '--config: wanted a config such as configs/benchmark.py, with a recipe'
    )
  values = config.copy_and_resolve_references().to_dict()
  sections = ('model', *STAGES)
  values['recipe'] = {
    k: v for k, v in values['recipe'].items() if k in sections
  }
  return parse(Settings, values, 'config')
