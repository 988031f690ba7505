"""The paper's rows at toy scale: a narrow network on a tenth of CIFAR-10.

  python -m rocl_jax.reproduce --config=configs/paper_small.py \\
    --config.data.dir=D --workdir=W

For a machine without an accelerator: ResNet-18 of width 16, batches of 64, and
the recipe of `configs/paper.py` with every length scaled down. D holds some
thousand real images in the official binary version, whatever part of it. What
comes out is the method at toy scale, not the paper's numbers.
"""

from ml_collections import ConfigDict

from configs import paper


def get_config(argument: str = '') -> ConfigDict:
  c = paper.get_config(argument, _scale)
  # Our own baselines at 99 % are left out: they cost as much as the tables.
  c.compare = tuple(name for name in c.compare if name not in _LEFT_OUT)
  for name in set(c.baselines).intersection(_LEFT_OUT):
    del c.baselines[name]
  if 'surrogate' in c.compare:
    c.baselines.surrogate.supervised.total_epochs = 20
  return c


_LEFT_OUT = ('magnitude_99', 'random_99', 'small_99')


def _scale(c: ConfigDict) -> None:
  c.data.source = 'binary'
  c.data.validation = 200
  c.model.width = 16
  c.pretrain.total_epochs = 10
  c.pretrain.segments = 1  # too few epochs to start over, as run or not
  c.pretrain.batch_size = 64
  c.pretrain.optimizer.learning_rate = 0.3
  c.pretrain.optimizer.schedule = 'cosine'
  c.pretrain.optimizer.warmup_epochs = 2.0
  c.supervised.total_epochs = 3  # prune and finetune follow
  c.supervised.batch_size = 64
  c.linear_eval.total_epochs = 30
  c.linear_eval.batch_size = 256
  # PGD-20 costs as much as training here; it comes with AutoAttack, on as many
  # images.
  c.eval.suite = ('pgd10',)
