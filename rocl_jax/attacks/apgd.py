"""Auto-PGD (Croce and Hein 2020): gradient ascent that sets its own steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rocl_jax import losses
from rocl_jax.attacks import arguments
from rocl_jax.attacks.balls import BALLS, draw, usable
from rocl_jax.attacks.classifier import ClassifierAttack, fold
from rocl_jax.attacks.pgd import Ascent
from rocl_jax.logits import INVALID, predict, ranked_class
from rocl_jax.settings import FieldError

LOSSES = {'ce': losses.cross_entropy, 'dlr': losses.dlr}
_MOMENTUM = 0.25  # the share of the last displacement in the next
_ENOUGH_UPS = 0.75  # of a window's steps must have raised the loss


def apgd(
  *,
  eps: float,
  steps: int = 100,
  loss: str = 'ce',
  targets: int = 0,
  norm: str = 'linf',
  restarts: int = 1,
  samples: int = 1,
) -> ClassifierAttack:
  """APGD on the cross-entropy or the difference-of-logits ratio.

  The step starts at 2 eps and halves, from the best point so far, at
  checkpoints up to which too few steps have raised the loss, or since which
  the best has not changed. As the official code: one step keeps a quarter of
  the displacement before it; the last point that fooled the network counts.
  An image stays at the first point where its logits are invalid, unless it
  fooled the network before.

  Args:
    eps: radius.
    steps: gradient steps a turn.
    loss: 'ce' or 'dlr'.
    targets: 0, or the number of classes to push towards with the targeted
      ratio: the ones ranked next to the label on the clean image, a turn each.
    norm: 'linf' or 'l2'.
    restarts: turns from different starts where there are no targets.
    samples: gradients to average at each point, for networks that draw random
      numbers: their logits function then takes (images, key), of a batch one.
  """
  eps = arguments.radius('eps', eps, norm)
  arguments.name('loss', loss, LOSSES)
  arguments.count('steps', steps, 1)
  arguments.count('targets', targets)
  arguments.count('restarts', restarts, 1)
  arguments.count('samples', samples, 1)
  if targets and loss != 'dlr':
    raise FieldError('loss', loss, "'dlr', the loss with targets")

  # A network that draws random numbers may change its mind.
  stops = samples == 1

  def run(logits_fn, images, labels, keys, turn):
    keys = fold(keys, turn)
    if targets:
      clean = _last_sample(logits_fn, samples)(images, keys)
      wanted = ranked_class(clean, turn + 1)
      values = lambda z: losses.targeted_dlr(z, labels, wanted)
    else:
      values = lambda z: LOSSES[loss](z, labels)
    measure = _measure(logits_fn, values, labels, samples)
    return _ascend(
      *(measure, images, labels, keys),
      eps=eps,
      steps=steps,
      norm=norm,
      stop_early=stops,
    )

  passes = 2 * (steps + 1) * samples
  turns = targets or restarts
  return ClassifierAttack(turns, passes, eps, norm, run, stops, bool(targets))


class _Point(NamedTuple):
  """Images, and what the network makes of them.

  Attributes:
    images: [N, H, W, C].
    value: the loss [N].
    gradient: [N, H, W, C], 0 where it is not finite.
  """

  images: jax.Array
  value: jax.Array
  gradient: jax.Array


class _State(NamedTuple):
  """Attributes:
  step: steps done.
  iterate: where the last step led; at first the start.
  before: where it came from.
  last_value: the loss at the iterate before.
  best: the point of highest loss.
  found: the last images that fooled the network, or the first whose logits
    were invalid.
  fooled, invalid: which of them it is, if any [N].
  stuck: gradient entries that were not finite [N].
  step_size: [N].
  ups: steps of this window that raised the loss [N].
  reduced: whether the last checkpoint halved the step [N].
  best_at_check: the best loss at the last checkpoint [N].
  """

  step: jax.Array
  iterate: jax.Array
  before: jax.Array
  last_value: jax.Array
  best: _Point
  found: jax.Array
  fooled: jax.Array
  invalid: jax.Array
  stuck: jax.Array
  step_size: jax.Array
  ups: jax.Array
  reduced: jax.Array
  best_at_check: jax.Array


def _ascend(measure, images, labels, keys, *, eps, steps, norm, stop_early):
  ball = BALLS[norm]
  windows = jnp.asarray(_windows(steps))
  n = len(images)
  wide = lambda x: x[:, None, None, None]
  inside = lambda x: jnp.clip(images + ball.project(x - images, eps), 0, 1)
  # What happens after that, in a batch that goes on, must not count.
  over = lambda state: state.fooled | state.invalid

  def advance(state):
    point, stuck, prediction = measure(state.iterate, fold(keys, state.step))
    invalid = (prediction == INVALID) & ~state.fooled & ~state.invalid
    fooled = (prediction != INVALID) & (prediction != labels) & ~state.invalid
    best = _where(point.value > state.best.value, point, state.best)

    # At the start there is nothing to look back on.
    started = state.step > 0
    window = windows[state.step]
    ups = state.ups + (started & (point.value > state.last_value))
    stalled = ~state.reduced & (state.best_at_check >= best.value)
    reduce = (window > 0) & ((ups <= _ENOUGH_UPS * window) | stalled)
    at_check = lambda new, old: jnp.where(window > 0, new, old)
    step_size = jnp.where(reduce, state.step_size / 2, state.step_size)

    here = _where(reduce, best, point)
    x = here.images
    momentum = jnp.where(started, _MOMENTUM, 0.0).astype(images.dtype)
    target = inside(x + wide(step_size) * ball.steepest(here.gradient))
    moved = (1 - momentum) * (target - x) + momentum * (x - state.before)
    return _State(
      step=state.step + 1,
      iterate=inside(x + moved),
      before=x,
      # Not the start's value: the official code looks one entry before its
      # list, where a zero stands.
      last_value=jnp.where(started, point.value, 0.0),
      best=best,
      found=jnp.where(wide(fooled | invalid), state.iterate, state.found),
      fooled=state.fooled | fooled,
      invalid=state.invalid | invalid,
      stuck=state.stuck + jnp.where(over(state), 0, stuck),
      step_size=step_size,
      ups=at_check(0, ups),
      reduced=at_check(reduce, state.reduced),
      best_at_check=jnp.where(
        started, at_check(best.value, state.best_at_check), point.value
      ),
    )

  noise = draw(ball.surface, keys, images.shape, eps)
  start = jnp.clip(images + noise, 0, 1).astype(images.dtype)
  nothing, no = jnp.zeros(n, images.dtype), jnp.zeros(n, bool)
  state = _State(
    step=jnp.int32(0),
    iterate=start,
    before=start,
    last_value=nothing,
    best=_Point(start, nothing - jnp.inf, jnp.zeros_like(start)),
    found=start,
    fooled=no,
    invalid=no,
    stuck=jnp.zeros(n, jnp.int32),
    step_size=jnp.full(n, 2.0 * eps, images.dtype),
    ups=jnp.zeros(n, jnp.int32),
    reduced=~no,
    best_at_check=nothing,
  )
  # Where the network draws random numbers, one lucky draw proves little.
  done = lambda state: stop_early & over(state).all()
  going = lambda state: (state.step <= steps) & ~done(state)
  state = lax.while_loop(going, advance, state)
  x = jnp.where(wide(over(state)), state.found, state.best.images)
  return Ascent(x, state.stuck)


def _measure(logits_fn, values, labels, samples):
  """(images, keys) -> _Point, how many entries of its gradient were not finite
  [N], and what the network takes the images for [N]."""
  one = logits_fn if samples > 1 else lambda x, _: logits_fn(x)

  def total(images, key):
    logits = one(images, key)
    value = values(logits).astype(images.dtype)
    return value.sum(), (value, predict(logits, labels))

  gradient_of = jax.grad(total, has_aux=True)

  def measure(images, keys):
    if samples == 1:
      return of(images, *gradient_of(images, None))

    def sample(i):
      return of(images, *gradient_of(images, jax.random.fold_in(keys[0], i)))

    def add(i, carry):
      (_, _, total), all_stuck, seen = carry
      point, stuck, prediction = sample(i)
      # One draw with invalid logits is enough.
      prediction = jnp.where(seen == INVALID, INVALID, prediction)
      point = point._replace(gradient=total + point.gradient)
      return point, all_stuck + stuck, prediction

    point, *rest = lax.fori_loop(1, samples, add, sample(0))
    return point._replace(gradient=point.gradient / samples), *rest

  def of(images, gradient, aux):
    value, prediction = aux
    gradient, stuck = usable(gradient)
    return _Point(images, value, gradient), stuck, prediction

  return measure


def _last_sample(logits_fn, samples):
  if samples > 1:
    return lambda images, keys: logits_fn(images, keys[0])
  return lambda images, keys: logits_fn(images)


def _where(choose: jax.Array, new: _Point, old: _Point) -> _Point:
  wide = choose[:, None, None, None]
  return _Point(
    images=jnp.where(wide, new.images, old.images),
    value=jnp.where(choose, new.value, old.value),
    gradient=jnp.where(wide, new.gradient, old.gradient),
  )


def _windows(steps: int) -> np.ndarray:
  """By steps done: at a checkpoint those since the one before, else 0."""
  share = lambda fraction: max(int(fraction * steps), 1)
  windows = np.zeros(steps + 1, np.int32)
  length, at = share(0.22), 0
  while at + length <= steps:
    at += length
    windows[at] = length
    length = max(length - share(0.03), share(0.06))
  return windows
