"""The worst of several runs of an attack."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Attack = Callable[..., jax.Array]


def worst_of_restarts(
  attack: Attack,
  restarts: int,
  score: Callable[[jax.Array], jax.Array],
) -> Attack:
  """Runs `attack` from several starts; keeps each image's highest score.

  Args:
    attack: (objective, images, key) -> images.
    restarts: number of runs, at least 1. Run r draws from fold_in(key, r), so
      more restarts only add to fewer.
    score: images -> [N]. With the margin loss an image that fooled the network
      in any run is returned as one that does.

  Returns:
    An attack of the same signature.
  """

  def run(objective, images, key):
    def once(r):
      x = attack(objective, images, jax.random.fold_in(key, r))
      return x, score(x)

    def body(r, best):
      x, value = once(r)
      better = value > best[1]
      images = jnp.where(better[:, None, None, None], x, best[0])
      return images, jnp.where(better, value, best[1])

    return lax.fori_loop(1, restarts, body, once(0))[0]

  return run
