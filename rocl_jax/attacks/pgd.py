"""Projected gradient ascent (Madry et al. 2018)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rocl_jax.attacks import arguments
from rocl_jax.attacks.balls import BALLS, draw, usable
from rocl_jax.types import Metrics

STARTS = ('none', 'uniform', 'uniform_clipped', 'gaussian')
GAUSSIAN_START = 0.001  # standard deviation, of TRADES's published start


class Ascent(NamedTuple):
  """Where an ascent led.

  Attributes:
    images: [N, H, W, C].
    stuck: gradient entries that were not finite, over all steps; int32 [N].
  """

  images: jax.Array
  stuck: jax.Array

  @property
  def metrics(self) -> Metrics:
    """`attack_stuck`: the share of images with any such entry."""
    return {'attack_stuck': (self.stuck > 0).mean()}


def pgd(
  objective: Callable[[jax.Array], jax.Array],
  images: jax.Array,
  key: jax.Array,
  counted: bool = False,
  *,
  eps: float,
  step_size: float,
  steps: int,
  norm: str = 'linf',
  start: str = 'uniform',
) -> jax.Array | Ascent:
  """Steps up the objective, back into the ball and into [0, 1] each time.

  Every attack of the method is this one with another objective: cross-entropy
  for evaluation, KL to the clean logits for TRADES, the contrastive loss
  against the other view for RoCL's instance-wise attack. The last iterate
  counts. Memory does not grow with `steps`. Where an entry of the gradient is
  not finite, its pixel stays where it is.

  Args:
    objective: images -> [N], larger is worse for the defender.
    images: [N, H, W, C] in [0, 1], the centres of the balls; uint8 count as
      255ths.
    key: PRNG key of the start, or one for each image [N].
    counted: whether to return an Ascent, with the gradient entries that were
      not finite.
    eps: radius of the ball, in units of the images; also as text, '8/255'.
    step_size: length of a step in the ball's norm.
    steps: number of gradient steps.
    norm: 'linf' or 'l2'.
    start: 'none'; 'uniform', from the ball and, as HYDRA's evaluation does,
      not clipped to [0, 1] before the first gradient; 'uniform_clipped', as
      RoCL does; 'gaussian', 0.001 * N(0, 1), as TRADES does. A network that is
      not defined outside of [0, 1] may lose its first step to 'uniform'.

  Returns:
    Adversarial images [N, H, W, C] in the ball and in [0, 1].

  Raises:
    ValueError: an argument of the wrong kind. Values that JAX traces are not
      looked at.
  """
  eps = arguments.radius('eps', eps, norm)
  step_size = arguments.amount('step_size', step_size)
  arguments.function('objective', objective)
  arguments.count('steps', steps)
  arguments.name('start', start, STARTS)
  images = arguments.images(images)
  key = arguments.keys(key, len(images))
  first = images + start_noise(key, images.shape, eps, norm, start)
  if start == 'uniform_clipped':
    first = jnp.clip(first, 0, 1)
  with arguments.traceable('objective'):
    found = ascend(
      objective,
      images,
      first.astype(images.dtype),
      eps=eps,
      step_size=step_size,
      steps=steps,
      norm=norm,
    )
  return found if counted else found.images


def start_noise(
  key: jax.Array, shape: tuple[int, ...], eps: float, norm: str, start: str
) -> jax.Array:
  """The displacement that an attack starts with, float32 of the given shape."""
  if start == 'none':
    return jnp.zeros(shape, jnp.float32)
  if start == 'gaussian':
    normal = lambda key, shape, scale: (
      scale * jax.random.normal(key, shape, jnp.float32)
    )
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
) -> Ascent:
  """`pgd` from a given first iterate [N, H, W, C]."""
  ball = BALLS[norm]
  inside = lambda x: jnp.clip(images + ball.project(x - images, eps), 0, 1)

  def total(x):
    return arguments.values(objective(x), x).sum()

  def step(_, carry):
    with jax.named_scope('gradient'):
      gradient, stuck = usable(jax.grad(total)(carry.images))
    with jax.named_scope('move'):
      x = carry.images + step_size * ball.steepest(gradient)
      return Ascent(inside(x).astype(first.dtype), carry.stuck + stuck)

  first = jnp.where(steps == 0, inside(first), first)
  stuck = jnp.zeros(len(images), jnp.int32)
  return lax.fori_loop(0, steps, step, Ascent(first, stuck))
