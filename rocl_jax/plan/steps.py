"""The stages' training steps on shapes alone: neither data nor weights.

They are what a run executes: `loop.make_step` of the recipe's own stages.
"""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rocl_jax import loop, models, optim
from rocl_jax.data import digits
from rocl_jax.errors import UserError
from rocl_jax.experiment import Run, parse_experiment
from rocl_jax.mesh import check_batch, replicated
from rocl_jax.stages import STAGES
from rocl_jax.training import Training
from rocl_jax.types import Stage, TrainingSet, Variables

_CIFAR10 = ('tfds', 'binary', 'python')


class Images(NamedTuple):
  """Sizes of the training set: number, height and width, classes."""

  number: int
  size: int
  classes: int


class Planned(NamedTuple):
  """A stage that a run would train.

  Attributes:
    name: of the stage.
    stage: its four functions.
    settings: its section.
    upstream: shapes of what the stage before hands on.
    model: the network's section.
    images: the training set.
  """

  name: str
  stage: Stage
  settings: Training
  upstream: Variables
  model: models.Settings
  images: Images


def read(
  config: ConfigDict, images: int, image_size: int, classes: int
) -> tuple[Run, Images]:
  """The main run of a config, and the sizes of its images; 0 for the source's.

  Raises:
    UserError: a mistake in the config, or a source whose sizes are not known.
  """
  if not isinstance(config, ConfigDict) or 'stages' not in config:
    raise UserError(
      '--config: wanted a training config such as configs/cifar10.py'
    )
  config = copy.deepcopy(config)
  source, folder = config.data.source, config.data.dir
  held_out = config.data.validation
  with config.unlocked():
    # The images need not be here. Digits always are.
    if source in (*_CIFAR10, 'folder'):
      config.data.source, config.data.dir = 'digits', ''
  run = parse_experiment(config).runs[0]
  asked = run.config['data'] | {'source': source, 'dir': folder}
  run = dataclasses.replace(run, config=run.config | {'data': asked})
  if source in _CIFAR10:
    known = Images(50_000, 32, 10)
  elif source == 'digits':
    raw = digits.read('')
    known = Images(
      len(raw.train.labels), raw.train.images.shape[1], len(raw.class_names)
    )
  else:
    known = Images(0, 0, 0)
  given = (images, image_size, classes)
  sizes = Images(*(a or b for a, b in zip(given, known, strict=True)))
  if not all(sizes):
    raise UserError(
      f'config.data.source: the sizes of {source!r} are not known without its '
      'images; wanted --images=N --image_size=S --classes=K'
    )
  if not images:  # of --images nothing is held out
    sizes = sizes._replace(number=sizes.number - held_out)
  return run, sizes


def plan(run: Run, images: Images) -> Iterator[Planned]:
  """The stages of a run, each on the shapes that the one before hands on."""
  model = models.build(run.model, images.classes)
  shape = (images.size, images.size, 3)
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), shape))
  for name, settings in run.stages:
    stage = STAGES[name].stage(model, settings)
    yield Planned(name, stage, settings, variables, run.model, images)
    trained = jax.eval_shape(stage.start, variables, _key())
    variables = jax.eval_shape(stage.finish, trained)


def check(planned: Planned, devices: int) -> None:
  """Raises UserError unless a run would take the batch on so many devices."""
  batch, count = planned.settings.batch_size, planned.images.number
  field = f'config.{planned.name}.batch_size'
  if batch > count:
    raise UserError(
      f'{field}: found {batch}, wanted at most the {count} training images'
    )
  check_batch(f'--{field}', batch, devices)


def program(
  planned: Planned, batch_size: int, where: Mesh
) -> tuple[Any, tuple[Any, ...]]:
  """The jitted step, and shapes of its arguments, the state first."""
  everywhere = replicated(where)
  count, size, _ = planned.images
  settings = planned.settings
  steps = count // batch_size
  optimizer, _ = optim.make(
    settings.optimizer, settings.total_epochs, steps, settings.segments
  )
  array = jax.ShapeDtypeStruct
  rest = (
    TrainingSet(
      array((count, size * size * 3), jnp.uint8),
      array((count,), jnp.int32),
      (size, size, 3),
    ),
    array((steps, batch_size), jnp.int32),
    _key(),
  )
  step = loop.make_step(planned.stage, optimizer, where, settings.microbatch)
  first = loop.first_state(planned.stage, optimizer, step, rest)
  state = jax.eval_shape(first, planned.upstream, _key())
  arguments = jax.tree.map(
    lambda x: array(x.shape, x.dtype, sharding=everywhere), (state, *rest)
  )
  return jax.jit(step, donate_argnums=0, out_shardings=everywhere), arguments


def _key():
  return jax.eval_shape(lambda: jax.random.key(0))
