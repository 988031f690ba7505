"""Attacks on a classifier, as evaluation runs them.

  attack = apgd(eps=8 / 255, loss='dlr', targets=9)
  x = attack.run(logits_fn, images, labels, keys, turn)    # one turn of nine

Where an attack of `pgd`'s kind climbs one objective, these read the logits:
they see when an image has fooled the network, and rank its classes. Each image
has a key of its own, so its fate does not depend on the others in its batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rocl_jax import losses
from rocl_jax.attacks import arguments

OBJECTIVES = {'cross_entropy': losses.cross_entropy, 'margin': losses.margin}


class ClassifierAttack(NamedTuple):
  """An attack in turns, of which each may see the survivors of those before.

  Attributes:
    turns: restarts or target classes.
    passes: forward passes of one turn, a gradient counted as one more: what a
      turn costs.
    eps: radius, in units of the images.
    norm: 'linf' or 'l2'.
    run: (logits_fn, images, labels, keys, turn) -> `pgd.Ascent`: images in the
      ball and in [0, 1], and how many gradient entries were not finite.
      `logits_fn` maps images float [N, H, W, C] to logits [N, K]; `labels` are
      int32; `keys` holds a PRNG key for each image; `turn` may be traced.
    stops: whether an image that fools the network is left alone from then on.
    targeted: whether each turn aims at another class.
  """

  turns: int
  passes: int
  eps: float
  norm: str
  run: Callable[..., jax.Array]
  stops: bool = True
  targeted: bool = False

  def of_classes(self, count: int) -> 'ClassifierAttack':
    """With no more turns than a network of so many classes has targets."""
    if not self.targeted:
      return self
    return self._replace(turns=min(self.turns, count - 1))


def on_objective(
  attack: Callable[..., jax.Array],
  keywords: dict[str, Any],
  objective: str,
  restarts: int,
) -> ClassifierAttack:
  """An attack such as `pgd` on a loss of the logits; the last iterate counts.

  Args:
    attack: a function of ATTACKS.
    keywords: its own.
    objective: a name in OBJECTIVES.
    restarts: turns from different starts.
  """
  arguments.name('objective', objective, OBJECTIVES)
  arguments.count('restarts', restarts, 1)
  loss = OBJECTIVES[objective]

  def run(logits_fn, images, labels, keys, turn):
    climbed = lambda x: loss(logits_fn(x), labels)
    return attack(climbed, images, fold(keys, turn), True, **keywords)

  passes = 2 * max(keywords.get('steps', 1), 1)
  eps, norm = keywords.get('eps', 0.0), keywords.get('norm', 'linf')
  return ClassifierAttack(restarts, passes, eps, norm, run, stops=False)


def image_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
  """A key for each image, from its index in the data set [N]."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def fold(keys: jax.Array, number: jax.Array | int) -> jax.Array:
  """`fold_in` of one number into every key [N]."""
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
