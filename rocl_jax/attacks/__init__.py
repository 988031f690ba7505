"""Attacks: pure functions from images to worse images.

  from rocl_jax.attacks import autoattack, pgd
  from rocl_jax.losses import cross_entropy

  objective = lambda x: cross_entropy(logits_fn(x), labels)      # images -> [N]
  x_adv = pgd(objective, images, key, eps=8/255, step_size=2/255, steps=10)
  result = autoattack(logits_fn, images, labels, eps=8/255)

ATTACKS climb an objective and see nothing else: no network, no label, no
BatchNorm mode. So one attack serves cross-entropy, TRADES's divergence and
RoCL's contrastive loss. CLASSIFIER_ATTACKS read the logits: see `classifier`.
All act image by image, stay in the ball and in [0, 1], and can be jitted,
sharded and nested.

A new attack is one file and one line in either dict; the tests of
`tests/test_attacks.py` run over both.
"""

from collections.abc import Callable
from typing import Any

from rocl_jax.attacks.apgd import apgd
from rocl_jax.attacks.autoattack import autoattack as autoattack
from rocl_jax.attacks.balls import BALLS as BALLS
from rocl_jax.attacks.classifier import ClassifierAttack
from rocl_jax.attacks.fab import fab
from rocl_jax.attacks.pgd import pgd
from rocl_jax.attacks.square import square

ATTACKS: dict[str, Callable[..., Any]] = {
  'pgd': pgd,
}

CLASSIFIER_ATTACKS: dict[str, Callable[..., ClassifierAttack]] = {
  'apgd': apgd,
  'fab': fab,
  'square': square,
}
