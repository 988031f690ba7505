"""Norm balls: where an attack may go, and which way is steepest.

All functions act on images [N, H, W, C] and treat each image by itself; a
radius is in the units of the images, which lie in [0, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rocl_jax.settings import FieldError, at_least, one_of


class Ball(NamedTuple):
  """A norm ball round the origin.

  Attributes:
    project: (delta, radius) -> the nearest point of the ball.
    sample: (key, shape, radius) -> a uniform draw from the ball.
    surface: (key, shape, radius) -> a random point of that norm.
    steepest: gradient -> the unit step that raises a linear function most.
    norm: delta -> [N].
  """

  project: Callable[[jax.Array, float], jax.Array]
  sample: Callable[[jax.Array, tuple[int, ...], float], jax.Array]
  surface: Callable[[jax.Array, tuple[int, ...], float], jax.Array]
  steepest: Callable[[jax.Array], jax.Array]
  norm: Callable[[jax.Array], jax.Array]


def _linf_sample(key, shape, radius):
  return jax.random.uniform(
    key, shape, jnp.float32, minval=-radius, maxval=radius
  )


def _linf_norm(delta):
  return jnp.abs(delta).max((1, 2, 3))


def _linf_surface(key, shape, radius):
  uniform = jax.random.uniform(key, shape, jnp.float32, minval=-1)
  return uniform * (radius / _linf_norm(uniform))[:, None, None, None]


def _l2_norm(delta):
  return jnp.sqrt(jnp.square(delta).sum((1, 2, 3)))


def _l2_scale(delta, factor):
  return delta * factor[:, None, None, None]


def _l2_project(delta, radius):
  return _l2_scale(delta, jnp.minimum(1, radius / (_l2_norm(delta) + 1e-12)))


def _l2_sample(key, shape, radius):
  direction, distance = jax.random.split(key)
  gaussian = jax.random.normal(direction, shape, jnp.float32)
  dimension = shape[1] * shape[2] * shape[3]
  uniform = jax.random.uniform(distance, shape[:1], jnp.float32)
  share = uniform ** (1 / dimension)
  return _l2_scale(gaussian, radius * share / (_l2_norm(gaussian) + 1e-12))


def _l2_surface(key, shape, radius):
  return radius * _l2_unit(jax.random.normal(key, shape, jnp.float32))


def _l2_unit(x):
  return _l2_scale(x, 1 / (_l2_norm(x) + 1e-12))


def _l2_steepest(gradient):
  # Squares of entries above 1e19 or below 1e-19 would be infinite, or 0.
  largest = _linf_norm(gradient)
  scale = jnp.where(largest > 0, largest, 1)
  return _l2_unit(gradient / scale[:, None, None, None])


BALLS = {
  'linf': Ball(
    project=lambda delta, radius: jnp.clip(delta, -radius, radius),
    sample=_linf_sample,
    surface=_linf_surface,
    steepest=jnp.sign,
    norm=_linf_norm,
  ),
  'l2': Ball(_l2_project, _l2_sample, _l2_surface, _l2_steepest, _l2_norm),
}


def usable(gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The gradient with 0 for entries that are not finite, and their number.

  Args:
    gradient: [N, H, W, C].

  Returns:
    [N, H, W, C], and int32 [N].
  """
  finite = jnp.isfinite(gradient)
  return jnp.where(finite, gradient, 0), (~finite).sum((1, 2, 3), jnp.int32)


def draw(
  sampler: Callable[..., jax.Array],
  key: jax.Array,
  shape: tuple[int, ...],
  radius: float,
) -> jax.Array:
  """Draws [N, H, W, C] by `sample` or `surface`, from one key for all, or from
  a key for each image [N]."""
  if key.ndim == 0:
    return sampler(key, shape, radius)
  one = lambda k: sampler(k, (1, *shape[1:]), radius)[0]
  return jax.vmap(one)(key)


def check_ball(eps: float, norm: str) -> None:
  """Raises FieldError unless there is such a ball round images in [0, 1]."""
  one_of('norm', norm, BALLS)
  at_least('eps', eps, 0)
  if norm == 'linf' and eps > 1:
    wanted = 'a radius in [0, 1], the range of the pixels'
    raise FieldError('eps', eps, f'{wanted} (did you mean {eps:g}/255?)')
