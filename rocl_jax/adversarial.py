"""The loss that `supervised`, `prune` and `finetune` share: attack, then learn.

The published trainer is TRADES (HYDRA's `utils/adv.py`), not the paper's
Eq. 5; both are here, and plain training. Attacks see running BatchNorm
statistics; then clean and adversarial images pass in training mode, each in a
batch of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import lax

from rocl_jax import augment, losses
from rocl_jax.attacks.settings import AttackSettings
from rocl_jax.logits import predict
from rocl_jax.models import Model, update_statistics
from rocl_jax.settings import at_least, one_of, within
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
    flip: whether to mirror images, with probability 0.5.
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
    within('crop_padding', self.crop_padding, 0, 64)


def make_loss(
  model: Model, settings: Adversarial
) -> Callable[..., tuple[jax.Array, tuple[Tree, Metrics]]]:
  """A stage's `loss`: views of the batch, the attack, the loss on both."""
  objective = LOSSES[settings.loss]

  def loss(params: Tree, batch_stats: Tree, batch: Batch, key: jax.Array):
    view_key, attack_key = jax.random.split(key)
    with jax.named_scope('views'):
      images = augment.crops(
        batch.images, view_key, settings.crop_padding, settings.flip
      )
    variables = {'params': params, 'batch_stats': batch_stats}
    values, passes, metrics = objective(
      model, variables, images, batch.labels, attack_key, settings
    )
    statistics = update_statistics(batch_stats, passes)
    return values.mean(), (statistics, metrics)

  return loss


def _trades(model, variables, images, labels, key, settings):
  with jax.named_scope('attack'):
    frozen = model.prepare(variables)
    clean = frozen(images)  # once: it is constant while the attack runs
    found = settings.attack.attack(
      lambda x: losses.kl_divergence(clean, frozen(x)), images, key
    )
  logits, other, moments, other_moments = _train(
    model, variables, images, found.images
  )
  values = losses.trades(logits, other, labels, settings.beta)
  # The published step runs four training-mode passes, for the accuracy meter,
  # the cross-entropy, the adversary and the KL's target, and each of them
  # updates the running averages. Only two of them differ.
  passes = [moments, moments, other_moments, moments]
  metrics = _accuracies(labels, logits, other) | found.metrics
  return values, passes, metrics


def _ce_pgd(model, variables, images, labels, key, settings):
  with jax.named_scope('attack'):
    frozen = model.prepare(variables)
    found = settings.attack.attack(
      lambda x: losses.cross_entropy(frozen(x), labels), images, key
    )
  logits, other, moments, other_moments = _train(
    model, variables, images, found.images
  )
  values = losses.cross_entropy(logits, labels)
  values += settings.beta * losses.cross_entropy(other, labels)
  metrics = _accuracies(labels, logits, other) | found.metrics
  return values, [moments, other_moments], metrics


def _natural(model, variables, images, labels, key, settings):
  del key, settings
  logits, moments = model.train(variables, images)
  values = losses.cross_entropy(logits, labels)
  return values, [moments], _accuracies(labels, logits)


def _train(model, variables, images, x_adv):
  """Clean and adversarial images in training mode, each its own batch."""
  logits, moments = model.train(variables, images)
  other, other_moments = model.train(variables, lax.stop_gradient(x_adv))
  return logits, other, moments, other_moments


def _accuracies(labels, *logits):
  names = ('accuracy', 'adversarial_accuracy')
  right = ((predict(x, labels) == labels).mean() for x in logits)
  return dict(zip(names, right, strict=False))


# (model, variables, images, labels, key, settings) -> (loss [N], moments of
# the training-mode passes in their order, metrics)
LOSSES: dict[str, Callable[..., tuple[jax.Array, list[Tree], Metrics]]] = {
  'trades': _trades,
  'ce_pgd': _ce_pgd,
  'natural': _natural,
}
