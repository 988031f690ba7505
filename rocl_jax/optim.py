"""Optimisers: a config section to an optax transformation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from rocl_jax import schedules
from rocl_jax.settings import FieldError, at_least, one_of


@dataclass(frozen=True, kw_only=True)
class Settings:
  """The `optimizer` section of a stage.

  Attributes:
    name: 'sgd' or 'lars'.
    learning_rate: what the schedule starts from.
    momentum: of SGD; 0 for none.
    weight_decay: L2, on every trained parameter, as published.
    schedule: 'rocl', 'hydra' or 'milestones' set the rate once an epoch as
      published; 'cosine' and 'constant' are by step.
    warmup_epochs: linear warm-up of the schedules by step.
  """

  name: str = 'sgd'
  learning_rate: float
  momentum: float = 0.9
  weight_decay: float = 0.0
  schedule: str
  warmup_epochs: float = 0.0

  def __post_init__(self):
    one_of('name', self.name, OPTIMIZERS)
    one_of('schedule', self.schedule, SCHEDULES)
    for field in ('learning_rate', 'momentum', 'weight_decay', 'warmup_epochs'):
      at_least(field, getattr(self, field), 0)
    if self.warmup_epochs and self.schedule in schedules.PER_EPOCH:
      wanted = f'0: the schedule {self.schedule} has none of its own to set'
      raise FieldError('warmup_epochs', self.warmup_epochs, wanted)


def make(
  settings: Settings, epochs: int, steps_per_epoch: int, segments: int = 1
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Builds the optimiser of a stage and its learning rate by step.

  Args:
    settings: the stage's `optimizer` section.
    epochs: length of the stage.
    steps_per_epoch: whole batches in the training set.
    segments: times that a per-epoch schedule starts over within `epochs`, as
      the published pre-training did (3 x 101 epochs).
  """
  rate, name = settings.learning_rate, settings.schedule
  if name in schedules.PER_EPOCH:
    length = -(-max(epochs, 1) // segments)
    table = schedules.PER_EPOCH[name](rate, length) * segments
    schedule = schedules.by_epoch(table, steps_per_epoch)
  else:
    schedule = schedules.PER_STEP[name](
      rate,
      epochs * steps_per_epoch,
      round(settings.warmup_epochs * steps_per_epoch),
    )
  return OPTIMIZERS[settings.name](settings, schedule), schedule


def _sgd(settings, schedule):
  # As PyTorch: the decay enters the momentum, and applies to every parameter,
  # BatchNorm, biases and dropped weights included.
  return optax.chain(
    optax.add_decayed_weights(settings.weight_decay),
    optax.sgd(schedule, momentum=settings.momentum or None),
  )


def _lars(settings, schedule):
  return optax.chain(
    lars_rate(settings.weight_decay),
    optax.sgd(schedule, momentum=settings.momentum or None),
  )


def lars_rate(
  weight_decay: float, trust: float = 1e-3, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
  """The layer-wise rate of torchlars, which RoCL's official code uses.

  (g + wd * p) * trust * |p| / (|g| + wd * |p| + eps), with rate 1 where either
  norm is 0. `optax.lars` has the norm of the sum in the denominator instead,
  and no decay of its own. All tensors take part, BN and biases included.
  """

  def local(g, p):
    g_norm, p_norm = jnp.linalg.norm(g), jnp.linalg.norm(p)
    rate = trust * p_norm / (g_norm + weight_decay * p_norm + eps)
    rate = jnp.where((g_norm == 0) | (p_norm == 0), 1.0, rate)
    return (g + weight_decay * p) * rate

  return optax.stateless(
    lambda updates, params: jax.tree.map(local, updates, params)
  )


OPTIMIZERS = {'sgd': _sgd, 'lars': _lars}
SCHEDULES = schedules.PER_EPOCH | schedules.PER_STEP
