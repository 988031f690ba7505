"""Supervised adversarial training, from pre-trained weights or from scratch.

What HYDRA's code calls pretrain. Paper, section 3.2; `trainer/adv.py`.
"""

from dataclasses import dataclass

from rocl_jax.adversarial import Adversarial, make_loss
from rocl_jax.models import Model
from rocl_jax.settings import one_of
from rocl_jax.types import Stage, Trained


@dataclass(frozen=True, kw_only=True)
class Settings(Adversarial):
  """The `supervised` section.

  Attributes:
    init: 'extractor' takes the encoder of the stage before and a fresh head,
      'complete' its head too, where it has one (`--load_RoCL` of the code).
  """

  init: str

  def __post_init__(self):
    super().__post_init__()
    one_of('init', self.init, ('extractor', 'complete'))


def stage(model: Model, settings: Settings) -> Stage:
  def start(upstream, key):
    # Nothing but these: weight decay would shrink a leftover projector.
    params = {'encoder': upstream['params']['encoder']}
    head = upstream['params'].get('head')
    if settings.init == 'extractor' or head is None:
      head = model.init_head(key)
    params['head'] = head
    return Trained(params, {}, upstream['batch_stats'])

  def weights(trainable, frozen):
    del frozen
    return trainable

  def finish(trained):
    return {'params': trained.trainable, 'batch_stats': trained.batch_stats}

  return Stage(start, weights, make_loss(model, settings), finish)
