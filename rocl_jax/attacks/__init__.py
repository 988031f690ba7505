"""Attacks: pure functions from an objective and images to worse images.

  from rocl_jax.attacks import pgd
  from rocl_jax.losses import cross_entropy

  objective = lambda x: cross_entropy(logits_fn(x), labels)      # images -> [N]
  x_adv = pgd(objective, images, key, eps=8/255, step_size=2/255, steps=10)

An attack never sees a network, a label or a BatchNorm mode: the objective
closes over them. So one attack serves cross-entropy, TRADES's divergence and
RoCL's contrastive loss. All act image by image, stay in the ball and in
[0, 1], and can be jitted, sharded and nested.

A new attack is one file with one such function and one line in ATTACKS; the
tests of `tests/test_attacks.py` run over this dict.
"""

from collections.abc import Callable

import jax

from rocl_jax.attacks.balls import BALLS as BALLS
from rocl_jax.attacks.pgd import pgd
from rocl_jax.attacks.restarts import worst_of_restarts as worst_of_restarts

ATTACKS: dict[str, Callable[..., jax.Array]] = {
  'pgd': pgd,
}
