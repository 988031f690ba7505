"""Pruning (HYDRA): freeze the weights, learn which of them to keep.

One importance score a weight, started from the weights; the network sees the
top k of each layer, and the gradient passes straight through the selection to
the scores. BatchNorm's scale and bias train along, the classifier's bias does
not (`freeze_vars` of the published code). Paper, section 3.3.
"""

from dataclasses import dataclass

from rocl_jax import masks
from rocl_jax.adversarial import Adversarial, make_loss
from rocl_jax.models import Model, maskable
from rocl_jax.settings import FieldError, one_of
from rocl_jax.trees import flatten, unflatten
from rocl_jax.types import Stage, Trained


@dataclass(frozen=True, kw_only=True)
class Settings(Adversarial):
  """The `prune` section.

  Attributes:
    keep: kept fraction of each layer, in (0, 1]; the sparsity is 1 - keep.
    scores: what they start from: 'weights', HYDRA's scaled initialisation, or
      'random', a baseline: without epochs, masks that know nothing.
  """

  keep: float
  scores: str = 'weights'

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.keep <= 1:
      raise FieldError('keep', self.keep, 'a kept fraction in (0, 1]')
    one_of('scores', self.scores, masks.SCORES)


def stage(model: Model, settings: Settings) -> Stage:
  def start(upstream, key):
    parts = {k: upstream['params'][k] for k in ('encoder', 'head')}
    params = flatten(parts)
    kernels = maskable(params)
    rest = {p: x for p, x in params.items() if p not in kernels}
    norms = {p: x for p, x in rest.items() if p.startswith('encoder/')}
    fixed = {p: x for p, x in rest.items() if p not in norms}
    scores = masks.SCORES[settings.scores](kernels, key)
    trainable = {'scores': scores, 'norms': norms}
    frozen = {'kernels': kernels, 'fixed': fixed}
    return Trained(trainable, frozen, upstream['batch_stats'])

  def weights(trainable, frozen):
    masked = masks.apply(
      frozen['kernels'], masks.topk_masks(trainable['scores'], settings.keep)
    )
    return unflatten(masked | frozen['fixed'] | trainable['norms'])

  def finish(trained):
    kept = masks.topk_masks(trained.trainable['scores'], settings.keep)
    kernels = trained.frozen['kernels']
    return {
      'params': weights(trained.trainable, trained.frozen),
      'batch_stats': trained.batch_stats,
      'masks': {p: m.astype(bool) for p, m in kept.items()},
      'dropped': {p: w * (1 - kept[p]) for p, w in kernels.items()},
    }

  return Stage(start, weights, make_loss(model, settings), finish)
