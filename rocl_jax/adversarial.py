"""The loss that `supervised`, `prune` and `finetune` share: attack, then learn.

The published trainer is TRADES (HYDRA's `utils/adv.py`), not the paper's
Eq. 5; both are here, and plain training. Attacks see running BatchNorm
statistics; then clean and adversarial images pass in training mode, each in a
batch of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from rocl_jax import augment, losses
from rocl_jax.attacks.settings import AttackSettings
from rocl_jax.models import Model, update_statistics
from rocl_jax.settings import at_least, one_of
from rocl_jax.training import Training
from rocl_jax.types import Batch, Metrics, Tree


@dataclass(frozen=True, kw_only=True)
class Adversarial(Training):
  """Fields of the three stages that train a classifier.

  Attributes:
    loss: 'trades', 'ce_pgd' (the paper's Eq. 5) or 'natural'.
    beta: weight of the adversarial term.
    attack: the training attack; 'natural' does not use it.
    crop_padding: zeros round the image before a random crop of its size.
    flip: whether to mirror every other image.
  """

  loss: str
  beta: float
  attack: AttackSettings
  crop_padding: int
  flip: bool

  def __post_init__(self):
    super().__post_init__()
    one_of('loss', self.loss, LOSSES)
    at_least('beta', self.beta, 0)
    at_least('crop_padding', self.crop_padding, 0)


def make_loss(
  model: Model, settings: Adversarial
) -> Callable[..., tuple[jax.Array, tuple[Tree, Metrics]]]:
  """A stage's `loss`: views of the batch, the attack, the loss on both."""
  objective = LOSSES[settings.loss]

  def loss(params: Tree, batch_stats: Tree, batch: Batch, key: jax.Array):
    view_key, attack_key = jax.random.split(key)
    images = augment.crops(
      batch.images, view_key, settings.crop_padding, settings.flip
    )
    variables = {'params': params, 'batch_stats': batch_stats}
    return objective(
      model, variables, images, batch.labels, attack_key, settings
    )

  return loss


def _trades(model, variables, images, labels, key, settings):
  frozen = model.prepare(variables)
  clean = frozen(images)  # once: it is constant while the attack runs
  x_adv = settings.attack.attack(
    lambda x: losses.kl_divergence(clean, frozen(x)), images, key
  )
  logits, moments = model.train(variables, images)
  adversarial, adversarial_moments = model.train(
    variables, lax.stop_gradient(x_adv)
  )
  loss = losses.trades(logits, adversarial, labels, settings.beta).mean()
  # The published step runs four training-mode passes, for the accuracy meter,
  # the cross-entropy, the adversary and the KL's target, and each of them
  # updates the running averages. Only two of them differ.
  passes = [moments, moments, adversarial_moments, moments]
  statistics = update_statistics(variables['batch_stats'], passes)
  metrics = {
    'accuracy': _accuracy(logits, labels),
    'adversarial_accuracy': _accuracy(adversarial, labels),
  }
  return loss, (statistics, metrics)


def _ce_pgd(model, variables, images, labels, key, settings):
  frozen = model.prepare(variables)
  x_adv = settings.attack.attack(
    lambda x: losses.cross_entropy(frozen(x), labels), images, key
  )
  logits, moments = model.train(variables, images)
  adversarial, adversarial_moments = model.train(
    variables, lax.stop_gradient(x_adv)
  )
  clean_loss = losses.cross_entropy(logits, labels)
  adversarial_loss = losses.cross_entropy(adversarial, labels)
  loss = (clean_loss + settings.beta * adversarial_loss).mean()
  passes = [moments, adversarial_moments]
  statistics = update_statistics(variables['batch_stats'], passes)
  metrics = {
    'accuracy': _accuracy(logits, labels),
    'adversarial_accuracy': _accuracy(adversarial, labels),
  }
  return loss, (statistics, metrics)


def _natural(model, variables, images, labels, key, settings):
  del key, settings
  logits, moments = model.train(variables, images)
  loss = losses.cross_entropy(logits, labels).mean()
  statistics = update_statistics(variables['batch_stats'], [moments])
  return loss, (statistics, {'accuracy': _accuracy(logits, labels)})


def _accuracy(logits, labels):
  return (logits.argmax(-1) == labels).mean()


LOSSES: dict[str, Any] = {
  'trades': _trades,
  'ce_pgd': _ce_pgd,
  'natural': _natural,
}
