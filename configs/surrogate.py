"""The surrogate of the paper's transfer attacks: a natural ResNet-20.

  python train.py --config=configs/surrogate.py --workdir=runs/surrogate
  python train.py --config=configs/surrogate.py:digits --workdir=runs/digits20

The model is then in `runs/surrogate/1_supervised/model`. `:digits` is a quick
look: scikit-learn's digits, width 8, about a minute on two cores and no
network; a surrogate for the models of `configs/quickstart.py`.

The paper says that it trains a ResNet-20; epochs and rates are not known. Its
code downloads pytorchcv's `resnet20_cifar10` (width 16, 5.97 % error on
normalised images) and feeds it images in [0, 1] without the normalisation, at
89.15 % clean accuracy. Here it is trained on what it will see. Where the paper
is silent, the recipe is the usual one of ResNets on CIFAR-10 (He et al. 2016:
SGD at 0.1, momentum 0.9, weight decay 1e-4, batches of 128, crops and flips),
with a cosine over 200 epochs in place of two drops over some 180.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import cifar10
from rocl_jax.errors import UserError, nearest

CHANGES = {
  'model': {'name': 'resnet20', 'width': 16},
  'supervised': {
    'total_epochs': 200,
    'batch_size': 128,
    'eval_epochs': 10,  # each costs as much as some two epochs
    'loss': 'natural',
    'optimizer': {
      'learning_rate': 0.1,
      'weight_decay': 1e-4,
      'schedule': 'cosine',
    },
  },
}


def overlay(section: ConfigDict, changes: Mapping[str, Any]) -> None:
  """Sets the fields of nested sections."""
  for field, value in changes.items():
    if isinstance(value, Mapping):
      overlay(section[field], value)
    else:
      section[field] = value


def get_config(argument: str = '') -> ConfigDict:
  if argument not in ('', 'digits'):
    hint = nearest(argument, ('digits',))
    raise UserError(
      f'--config: found :{argument}, wanted :digits or none{hint}'
    )
  c = cifar10.get_config()
  c.name = 'surrogate'
  c.stages = ('supervised',)
  overlay(c, CHANGES)
  c.eval.suite = ('pgd10',)

  if argument == 'digits':
    c.data.source = 'digits'
    c.data.validation = 137
    c.model.width = 8
    c.supervised.total_epochs = 20
    c.supervised.batch_size = 50
    c.supervised.crop_padding = 0
    c.supervised.flip = False  # a mirrored digit is another sign
    c.eval.eps = '0.1'
  return c
