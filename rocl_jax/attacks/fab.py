"""Fast adaptive boundary attack (Croce and Hein 2020), targeted.

It looks for the nearest adversarial image, whatever the radius: it steps onto
the boundary between label and target as the network's gradient has it, with a
pull back towards the image, and closer again once it is across.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rocl_jax.attacks import arguments
from rocl_jax.attacks.balls import BALLS, usable
from rocl_jax.attacks.classifier import ClassifierAttack
from rocl_jax.attacks.pgd import Ascent
from rocl_jax.logits import INVALID, bounded, of_class, predict, ranked_class


def fab(
  *,
  eps: float,
  steps: int = 100,
  targets: int = 9,
  norm: str = 'linf',
  pull: float = 0.1,
  overshoot: float = 1.05,
  backward: float = 0.9,
) -> ClassifierAttack:
  """FAB-T, from the image itself.

  Args:
    eps: the radius within which an adversarial image counts.
    steps: steps a turn.
    targets: classes to cross into, ranked next to the label on the clean
      image, a turn each.
    norm: 'linf' or 'l2'.
    pull: the largest weight of the projection of the image itself (alpha_max
      of the official code).
    overshoot: how far a step goes, 1 onto the boundary (eta).
    backward: what is left of the displacement once the image is adversarial
      (beta).
  """
  eps = arguments.radius('eps', eps, norm)
  arguments.count('steps', steps, 1)
  arguments.count('targets', targets, 1)
  pull = arguments.amount('pull', pull, high=1)
  overshoot = arguments.amount('overshoot', overshoot)
  backward = arguments.amount('backward', backward, high=1)
  ball = BALLS[norm]
  wide = lambda x: x[:, None, None, None]

  def run(logits_fn, images, labels, keys, turn):
    del keys
    target = ranked_class(logits_fn(images), turn + 1)

    def lead(x):
      z = bounded(logits_fn(x))
      value = (of_class(z, target) - of_class(z, labels)).astype(x.dtype)
      return value.sum(), value

    def advance(state):
      x = state.candidate
      prediction = predict(logits_fn(x), labels)
      invalid = prediction == INVALID
      fooled = ~invalid & (prediction != labels)
      distance = ball.norm(x - images)
      # One inside the ball settles the fate of its image: the rest of the
      # batch, which may take longer, must not change it.
      closer = (fooled | (invalid & (distance <= eps))) & (
        distance < state.distance
      )
      closer &= state.distance > eps
      best = jnp.where(wide(closer), x, state.best)
      x = jnp.where(wide(fooled), images + backward * (x - images), x)

      normal, value = jax.grad(lead, has_aux=True)(x)
      normal, stuck = usable(normal)
      # Squares of large entries would be infinite, and those of small ones 0.
      largest = jnp.abs(normal).max((1, 2, 3))
      scale = jnp.where(largest > 0, largest, 1)
      normal = normal / wide(scale)
      # Where there is no boundary to see, the step leads nowhere.
      value = jnp.nan_to_num(value) / scale
      offset = (normal * x).sum((1, 2, 3)) - value
      starts = jnp.concatenate([x, images])
      twice = lambda y: jnp.concatenate([y, y])
      onto = project(starts, twice(normal), twice(offset), norm) - starts
      from_here, from_image = jnp.split(onto, 2)
      near = jnp.maximum(ball.norm(from_here), 1e-8)
      far = jnp.maximum(ball.norm(from_image), 1e-8)
      weight = wide(jnp.minimum(near / (near + far), pull))
      x = (1 - weight) * (x + overshoot * from_here)
      x = jnp.clip(x + weight * (images + overshoot * from_image), 0, 1)
      return _State(
        step=state.step + 1,
        candidate=x,
        best=best,
        distance=jnp.where(closer, distance, state.distance),
        stuck=state.stuck + jnp.where(state.distance > eps, stuck, 0),
      )

    far = jnp.full(len(images), jnp.inf, images.dtype)
    none = jnp.zeros(len(images), jnp.int32)
    state = _State(jnp.int32(0), images, images, far, none)
    going = lambda state: (state.step <= steps) & (state.distance > eps).any()
    state = lax.while_loop(going, advance, state)
    x = jnp.where(wide(state.distance <= eps), state.best, images)
    return Ascent(x, state.stuck)

  passes = 3 * steps + 1
  return ClassifierAttack(targets, passes, eps, norm, run, targeted=True)


class _State(NamedTuple):
  """Attributes:
  step: steps done.
  candidate: where the last step led; at first the image.
  best: the nearest adversarial image so far, or the first in the ball whose
    logits are invalid.
  distance: of that one [N]; infinite where there is none.
  stuck: gradient entries that were not finite [N].
  """

  step: jax.Array
  candidate: jax.Array
  best: jax.Array
  distance: jax.Array
  stuck: jax.Array


def project(
  points: jax.Array, normal: jax.Array, offset: jax.Array, norm: str
) -> jax.Array:
  """The nearest images on a hyperplane of each point's own.

  Along the way to `normal · x = offset` every coordinate moves at a speed of
  its own, |normal| in L2 and 1 in L-infinity, until it meets 0 or 1. What is
  gained is concave and piecewise linear in the time, so Newton's method comes
  to the crossing from below, exactly, in a few iterations; the official code
  sorts all coordinates instead.

  Args:
    points: [N, H, W, C] in [0, 1].
    normal: [N, H, W, C].
    offset: [N].
    norm: 'linf' or 'l2', in which the images are nearest.

  Returns:
    [N, H, W, C] in [0, 1]; where the box does not reach the hyperplane, the
    corner nearest to it.
  """
  wide = lambda x: x[:, None, None, None]
  total = lambda x: x.sum((1, 2, 3))
  gap = offset - total(normal * points)
  direction = jnp.sign(normal) * wide(jnp.where(gap >= 0, 1.0, -1.0))
  slope = jnp.abs(normal)
  speed = jnp.sign(slope) if norm == 'linf' else slope
  room = jnp.where(direction > 0, 1 - points, points)
  moved = lambda time: jnp.minimum(wide(time) * speed, room)
  left = lambda time: jnp.abs(gap) - total(slope * moved(time))

  def refine(carry):
    time, _, i = carry
    free = wide(time) * speed < room
    rate = total(jnp.where(free, slope * speed, 0.0))
    missing = jnp.maximum(left(time), 0)
    later = time + missing / jnp.where(rate > 0, rate, jnp.inf)
    return later, later > time * (1 + 1e-6), i + 1

  start = jnp.zeros_like(gap)
  going = lambda carry: carry[1].any() & (carry[2] < _MOST)
  time, _, _ = lax.while_loop(
    going, refine, (start, jnp.ones_like(gap, bool), 0)
  )
  return points + direction * moved(time)


_MOST = 40  # iterations of Newton's method; ten are many
