"""The paper's rows on the digits, as small as `test_commands.SMALL`."""

from configs import paper, quickstart


def get_config():
  c = paper.get_config('', _scale)
  del c.baselines.small_99  # a tenth of four channels is none
  c.compare = tuple(name for name in c.compare if name != 'small_99')
  surrogate = c.baselines.surrogate
  surrogate.model.update(name='resnet8', width=4)
  surrogate.supervised.update(total_epochs=3, batch_size=100, eval_epochs=1)
  return c


def _scale(c):
  quickstart.scale(c)
  c.model.update(name='resnet8', width=4)
  c.save_steps = 4
  c.pretrain.total_epochs = 2
  c.supervised.total_epochs = 3
  c.supervised.batch_size = 100
  c.prune.total_epochs = 2
  c.finetune.total_epochs = 2
  c.linear_eval.total_epochs = 1
