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
  return jax.random.uniform(key, shape, minval=-radius, maxval=radius)


def _linf_norm(delta):
  return jnp.abs(delta).max((1, 2, 3))


def _linf_surface(key, shape, radius):
  uniform = jax.random.uniform(key, shape, minval=-1)
  return uniform * (radius / _linf_norm(uniform))[:, None, None, None]


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


def _l2_surface(key, shape, radius):
  return radius * _l2_steepest(jax.random.normal(key, shape))


def _l2_steepest(gradient):
  return _l2_scale(gradient, 1 / (_l2_norm(gradient) + 1e-12))


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
