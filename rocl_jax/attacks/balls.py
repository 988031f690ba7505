"""Norm balls: where an attack may go, and which way is steepest.

All functions act on images [N, H, W, C] and treat each image by itself; a
radius is in the units of the images, which lie in [0, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ball(NamedTuple):
  """A norm ball round the origin.

  Attributes:
    project: (delta, radius) -> the nearest point of the ball.
    sample: (key, shape, radius) -> a uniform draw from the ball.
    steepest: gradient -> the unit step that raises a linear function most.
    norm: delta -> [N].
  """

  project: Callable[[jax.Array, float], jax.Array]
  sample: Callable[[jax.Array, tuple[int, ...], float], jax.Array]
  steepest: Callable[[jax.Array], jax.Array]
  norm: Callable[[jax.Array], jax.Array]


def _linf_sample(key, shape, radius):
  return jax.random.uniform(key, shape, minval=-radius, maxval=radius)


def _l2_norm(delta):
  return jnp.sqrt(jnp.square(delta).sum((1, 2, 3)))


def _l2_scale(delta, factor):
  return delta * factor[:, None, None, None]


def _l2_project(delta, radius):
  return _l2_scale(delta, jnp.minimum(1, radius / (_l2_norm(delta) + 1e-12)))


def _l2_sample(key, shape, radius):
  direction, distance = jax.random.split(key)
  gaussian = jax.random.normal(direction, shape)
  dimension = shape[1] * shape[2] * shape[3]
  share = jax.random.uniform(distance, shape[:1]) ** (1 / dimension)
  return _l2_scale(gaussian, radius * share / (_l2_norm(gaussian) + 1e-12))


def _l2_steepest(gradient):
  return _l2_scale(gradient, 1 / (_l2_norm(gradient) + 1e-12))


BALLS = {
  'linf': Ball(
    project=lambda delta, radius: jnp.clip(delta, -radius, radius),
    sample=_linf_sample,
    steepest=jnp.sign,
    norm=lambda delta: jnp.abs(delta).max((1, 2, 3)),
  ),
  'l2': Ball(_l2_project, _l2_sample, _l2_steepest, _l2_norm),
}
