"""Linear evaluation (the paper's Baseline 1): a linear head on a fixed encoder.

Trains on the images as they are, without augmentation; the encoder stays in
evaluation mode. Published as `linear_eval.py`.
"""

from dataclasses import dataclass

import jax

from rocl_jax import augment, losses
from rocl_jax.attacks.settings import AttackSettings
from rocl_jax.logits import predict
from rocl_jax.models import Model
from rocl_jax.settings import one_of
from rocl_jax.training import Training
from rocl_jax.types import Stage, Trained


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
  """The `linear_eval` section.

  Attributes:
    loss: 'natural', or 'adversarial' for the robust variant (r-LE), which
      trains the head on attacked images.
    attack: the attack of the robust variant.
  """

  loss: str
  attack: AttackSettings

  def __post_init__(self):
    super().__post_init__()
    one_of('loss', self.loss, ('natural', 'adversarial'))


def stage(model: Model, settings: Settings) -> Stage:
  def start(upstream, key):
    encoder = upstream['params']['encoder']
    masks = {  # the new head is dense
      path: mask
      for path, mask in upstream.get('masks', {}).items()
      if path.startswith('encoder/')
    }
    frozen = {'encoder': encoder, 'masks': masks}
    trainable = {'head': model.init_head(key)}
    return Trained(trainable, frozen, upstream['batch_stats'])

  def weights(trainable, frozen):
    return trainable | {'encoder': frozen['encoder']}

  def loss(params, batch_stats, batch, key):
    with jax.named_scope('views'):
      images = augment.to_float(batch.images)
    variables = {'params': params, 'batch_stats': batch_stats}
    metrics = {}
    if settings.loss == 'adversarial':
      with jax.named_scope('attack'):
        frozen = model.prepare(variables)
        found = settings.attack.attack(
          lambda x: losses.cross_entropy(frozen(x), batch.labels), images, key
        )
      images, metrics = found.images, found.metrics
    images = jax.lax.stop_gradient(images)
    logits = model.predict(variables, images)
    value = losses.cross_entropy(logits, batch.labels).mean()
    accuracy = (predict(logits, batch.labels) == batch.labels).mean()
    return value, (batch_stats, metrics | {'accuracy': accuracy})

  def finish(trained):
    params = weights(trained.trainable, trained.frozen)
    return {
      'params': params,
      'batch_stats': trained.batch_stats,
      'masks': trained.frozen['masks'],
    }

  return Stage(start, weights, loss, finish)
