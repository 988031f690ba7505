"""Pre-training (RoCL): learn representations that an adversary can't confuse.

The instance-wise attack moves view 1 to maximise its contrastive loss against
view 2, without labels. Training minimises NT-Xent over {view 1, view 2,
adversary} plus `regulariser` times NT-Xent over {adversary, view 2}. Paper,
section 3.1; published as `rocl_train.py` and `attack_lib.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from rocl_jax import augment
from rocl_jax.attacks.settings import AttackSettings
from rocl_jax.losses import CONTRASTIVE, apart, nt_xent
from rocl_jax.mesh import gathered
from rocl_jax.models import Model, update_statistics
from rocl_jax.settings import FieldError, at_least, one_of
from rocl_jax.training import Training
from rocl_jax.types import Stage, Trained


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
  """The `pretrain` section.

  Attributes:
    temperature: of NT-Xent, everywhere.
    regulariser: weight of the second term, 1/256 in the paper.
    loss: 'nt_xent' as published, or 'eq3', the paper's formula.
    detach_keys: whether only anchors get a gradient, as published.
    local_negatives: equal parts of a batch whose images are each other's only
      negatives in the attack and in the regulariser; 0 for the whole batch.
      The published code has one part a GPU, and the whole batch in the main
      term alone.
    crop_scale: smallest share of the area in the random resized crop.
    attack: the instance-wise attack.
  """

  temperature: float
  regulariser: float
  loss: str
  detach_keys: bool
  crop_scale: float
  attack: AttackSettings
  local_negatives: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.microbatch:
      wanted = '0: parts of a batch would be without the other negatives'
      raise FieldError('microbatch', self.microbatch, wanted)
    at_least('local_negatives', self.local_negatives, 0)
    if self.local_negatives and self.batch_size % self.local_negatives:
      wanted = f'a divisor of batch_size, {self.batch_size}'
      raise FieldError('local_negatives', self.local_negatives, wanted)
    one_of('loss', self.loss, CONTRASTIVE)
    at_least('regulariser', self.regulariser, 0)
    if not self.temperature > 0:
      raise FieldError('temperature', self.temperature, 'more than 0')
    if not 0 < self.crop_scale <= 1:
      raise FieldError('crop_scale', self.crop_scale, 'a share in (0, 1]')


def stage(model: Model, settings: Settings) -> Stage:
  contrastive = CONTRASTIVE[settings.loss]
  local = apart(nt_xent, settings.local_negatives)

  def start(upstream, key):
    del key
    params = {k: upstream['params'][k] for k in ('encoder', 'projector')}
    return Trained(params, {}, upstream['batch_stats'])

  def weights(trainable, frozen):
    del frozen
    return trainable

  def loss(params, batch_stats, batch, key):
    first, second, attack_key = jax.random.split(key, 3)
    with jax.named_scope('views'):
      view1 = augment.views(batch.images, first, settings.crop_scale)
      view2 = augment.views(batch.images, second, settings.crop_scale)
    variables = {'params': params, 'batch_stats': batch_stats}

    with jax.named_scope('attack'):
      frozen = model.prepare(variables)
      # Once: no gradient reaches view 1 through it.
      target = gathered(frozen(view2, 'projection'))
      objective = lambda x: local(
        [frozen(x, 'projection'), target], settings.temperature
      )
      found = settings.attack.attack(objective, view1, attack_key)
    x_adv = lax.stop_gradient(found.images)

    # Two training-mode passes, as published: the regulariser's first. Each
    # mixes clean and adversarial images in one BatchNorm batch. The views of
    # an image lie side by side, on one device.
    def embed(*views):
      images = jnp.stack(views, 1).reshape(-1, *views[0].shape[1:])
      z, moments = model.train(variables, images, 'projection')
      return [z[i :: len(views)] for i in range(len(views))], moments

    pair, pair_moments = embed(x_adv, view2)
    triple, triple_moments = embed(view1, view2, x_adv)
    detach = settings.detach_keys
    similarity = contrastive(triple, settings.temperature, detach).mean()
    regulariser = local(pair, settings.temperature, detach).mean()
    total = similarity + settings.regulariser * regulariser
    statistics = update_statistics(batch_stats, [pair_moments, triple_moments])
    metrics = {'contrastive': similarity, 'regulariser': regulariser}
    return total, (statistics, metrics | found.metrics)

  def finish(trained):
    return {'params': trained.trainable, 'batch_stats': trained.batch_stats}

  return Stage(start, weights, loss, finish)
