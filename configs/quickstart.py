"""The whole method in minutes: narrow ResNet-18 on scikit-learn's digits.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Real handwritten digits, 8x8 pixels, their grey in three channels that an
attack may move apart; no network needed. The attack may move
each pixel by a tenth of its range, three times as far as on CIFAR-10. Beside
the method run three baselines: RoCL's linear evaluation, magnitude pruning
without any training, and the same network trained without adversaries.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config(argument: str = '') -> ConfigDict:
  c = cifar10.get_config(argument)
  scale(c)
  c.compare = ('rocl', 'magnitude', 'natural')
  return c


def scale(c: ConfigDict) -> None:
  """Sets the digits, and a network and lengths that suit them."""
  c.save_steps = 100
  c.data.source = 'digits'
  c.data.validation = 137
  c.model.width = 8

  c.pretrain.total_epochs = 15
  c.pretrain.batch_size = 100
  c.pretrain.crop_scale = 0.3  # 8 % of 64 pixels would be two by two
  c.pretrain.attack.eps = '0.1'
  c.pretrain.attack.steps = 5
  c.pretrain.optimizer.schedule = 'cosine'
  c.pretrain.optimizer.warmup_epochs = 1.0

  c.supervised.total_epochs = 20
  c.supervised.batch_size = 50
  c.supervised.crop_padding = 0
  c.supervised.flip = False  # a mirrored digit is another sign
  c.supervised.attack.eps = '0.1'
  c.supervised.attack.steps = 5
  c.supervised.optimizer.schedule = 'cosine'
  c.prune.total_epochs = 10
  c.finetune.total_epochs = 12
  c.finetune.optimizer.learning_rate = 0.05
  c.linear_eval.total_epochs = 20
  c.linear_eval.batch_size = 100

  c.eval.eps = '0.1'
  c.eval.suite = ('pgd10',)
