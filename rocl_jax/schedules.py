"""Learning rates, as tables by epoch and as plain schedules by step.

The published schedulers set the rate once an epoch; `by_epoch` turns their
tables into an optax schedule. `e` is the epoch, from 0.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import optax

WARMUP_MULTIPLIER = 15  # RoCL's peak is 1.5 for a base rate of 0.1
WARMUP_EPOCHS = 10


def rocl(base: float, epochs: int) -> list[float]:
  """RoCL's GradualWarmup, then a cosine that starts at epoch 10.

  Up to epoch 9 the rate climbs linearly to 15 * base; the cosine has the
  period of all epochs, so it ends ten epochs before it would reach 0.
  """
  peak = WARMUP_MULTIPLIER * base

  def rate(e):
    if e < WARMUP_EPOCHS:
      return base * (1 + (WARMUP_MULTIPLIER - 1) * (e + 1) / WARMUP_EPOCHS)
    return peak * (1 + math.cos(math.pi * (e - WARMUP_EPOCHS) / epochs)) / 2

  return [rate(e) for e in range(epochs)]


def hydra(base: float, epochs: int, warmup: int = 0) -> list[float]:
  """HYDRA's cosine with its off-by-one, after `warmup` constant epochs.

  The index starts at -1: epoch 0 is just below `base`, epoch 1 is `base`, and
  the last epoch is above 0.
  """
  cosine = [
    base * (1 + math.cos(math.pi * (e - 1) / epochs)) / 2 for e in range(epochs)
  ]
  return [base] * warmup + cosine


def milestones(
  base: float, epochs: int, after: Sequence[int] = (30, 50, 100)
) -> list[float]:
  """A tenth after each of the epochs `after`, as in RoCL's linear evaluation.

  The published change comes at the end of those epochs: it acts from 31 on.
  """
  return [base * 0.1 ** sum(e > m for m in after) for e in range(epochs)]


def by_epoch(
  rates: Sequence[float], steps_per_epoch: int
) -> Callable[..., jnp.ndarray]:
  """The schedule that holds each epoch's rate for all of its steps."""
  table = jnp.asarray(rates, jnp.float32)
  last = len(rates) - 1
  return lambda step: table[jnp.minimum(step // steps_per_epoch, last)]


PER_EPOCH: dict[str, Callable[[float, int], list[float]]] = {
  'rocl': rocl,
  'hydra': hydra,
  'milestones': milestones,
}


def _cosine(rate, steps, warmup_steps):
  first = 0.0 if warmup_steps else rate
  steps = max(steps, warmup_steps + 1)
  return optax.warmup_cosine_decay_schedule(first, rate, warmup_steps, steps)


def _constant(rate, steps, warmup_steps):
  del steps
  warmup = optax.linear_schedule(0.0, rate, max(warmup_steps, 1))
  constant = optax.constant_schedule(rate)
  return optax.join_schedules([warmup, constant], [warmup_steps])


PER_STEP: dict[str, Callable[..., optax.Schedule]] = {
  'cosine': _cosine,
  'constant': _constant,
}
