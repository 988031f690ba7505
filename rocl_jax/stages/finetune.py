"""Fine-tuning: the kept weights learn on, the masks stay.

Weights, BatchNorm and the classifier's bias train from what pruning left.
Dropped weights get no gradient, but weight decay shrinks them, as published;
the network, and what is published, hold exact zeros in their place. Paper,
section 3.4.
"""

from dataclasses import dataclass

from rocl_jax import masks
from rocl_jax.adversarial import Adversarial, make_loss
from rocl_jax.models import Model
from rocl_jax.trees import flatten, unflatten
from rocl_jax.types import Stage, Trained


@dataclass(frozen=True, kw_only=True)
class Settings(Adversarial):
  """The `finetune` section."""


def stage(model: Model, settings: Settings) -> Stage:
  def start(upstream, key):
    del key
    parts = {k: upstream['params'][k] for k in ('encoder', 'head')}
    params = flatten(parts)
    for path, dropped in upstream.get('dropped', {}).items():
      params[path] = params[path] + dropped
    frozen = {'masks': upstream.get('masks', {})}
    return Trained(params, frozen, upstream['batch_stats'])

  def weights(trainable, frozen):
    return unflatten(masks.apply(trainable, frozen['masks']))

  def finish(trained):
    return {
      'params': weights(trained.trainable, trained.frozen),
      'batch_stats': trained.batch_stats,
      'masks': trained.frozen['masks'],
    }

  return Stage(start, weights, make_loss(model, settings), finish)
