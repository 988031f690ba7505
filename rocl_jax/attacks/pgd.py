"""Projected gradient ascent (Madry et al. 2018)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from rocl_jax.attacks.balls import BALLS, draw

STARTS = ('none', 'uniform', 'uniform_clipped', 'gaussian')
GAUSSIAN_START = 0.001  # standard deviation, of TRADES's published start


def pgd(
  objective: Callable[[jax.Array], jax.Array],
  images: jax.Array,
  key: jax.Array,
  *,
  eps: float,
  step_size: float,
  steps: int,
  norm: str = 'linf',
  start: str = 'uniform',
) -> jax.Array:
  """Steps up the objective, back into the ball and into [0, 1] each time.

  Every attack of the method is this one with another objective: cross-entropy
  for evaluation, KL to the clean logits for TRADES, the contrastive loss
  against the other view for RoCL's instance-wise attack. The last iterate
  counts. Memory does not grow with `steps`.

  Args:
    objective: images -> [N], larger is worse for the defender.
    images: [N, H, W, C] in [0, 1], the centres of the balls.
    key: PRNG key of the start, or one for each image [N].
    eps: radius of the ball, in units of the images.
    step_size: length of a step in the ball's norm.
    steps: number of gradient steps.
    norm: 'linf' or 'l2'.
    start: 'none'; 'uniform', from the ball and, as HYDRA's evaluation does,
      not clipped to [0, 1] before the first gradient; 'uniform_clipped', as
      RoCL does; 'gaussian', 0.001 * N(0, 1), as TRADES does.

  Returns:
    Adversarial images [N, H, W, C] in the ball and in [0, 1].
  """
  first = images + start_noise(key, images.shape, eps, norm, start)
  if start == 'uniform_clipped':
    first = jnp.clip(first, 0, 1)
  return ascend(
    objective,
    images,
    first,
    eps=eps,
    step_size=step_size,
    steps=steps,
    norm=norm,
  )


def start_noise(
  key: jax.Array, shape: tuple[int, ...], eps: float, norm: str, start: str
) -> jax.Array:
  """The displacement that an attack starts with, of the given shape."""
  if start == 'none':
    return jnp.zeros(shape)
  if start == 'gaussian':
    normal = lambda key, shape, scale: scale * jax.random.normal(key, shape)
    return draw(normal, key, shape, GAUSSIAN_START)
  return draw(BALLS[norm].sample, key, shape, eps)


def ascend(
  objective: Callable[[jax.Array], jax.Array],
  images: jax.Array,
  first: jax.Array,
  *,
  eps: float,
  step_size: float,
  steps: int,
  norm: str = 'linf',
) -> jax.Array:
  """`pgd` from a given first iterate [N, H, W, C]."""
  ball = BALLS[norm]
  gradient = jax.grad(lambda x: objective(x).sum())
  inside = lambda x: jnp.clip(images + ball.project(x - images, eps), 0, 1)

  def step(_, x):
    return inside(x + step_size * ball.steepest(gradient(x)))

  first = jnp.where(steps == 0, inside(first), first)
  return lax.fori_loop(0, steps, step, first)
