"""Evaluation suites.

  python -m rocl_jax.evaluate --model=W/4_finetune/model \
      --config=configs/eval.py:paper

`:paper` is what the paper's tables use: 10 steps of eps/4 for all rows but
RoCL's, 20 steps of eps/10 for that. `:quick` is the first of them alone. Any
one attack: --config.eval.suite="('pgd20',)".
"""

from ml_collections import ConfigDict

from rocl_jax.errors import UserError, nearest

SUITES = {
  'paper': ('pgd10', 'pgd20'),
  'quick': ('pgd10',),
}


def get_config(argument: str = 'paper') -> ConfigDict:
  if argument not in SUITES:
    wanted = f'one of {", ".join(SUITES)}{nearest(argument, SUITES)}'
    raise UserError(f'--config: found suite {argument!r}, wanted {wanted}')
  c = ConfigDict()
  c.seed = 0
  c.split = 'test'  # or validation

  # Empty fields: as the model was trained.
  c.data = ConfigDict()
  c.data.source = ''
  c.data.dir = ''

  c.eval = ConfigDict()
  c.eval.eps = '8/255'
  c.eval.batch_size = 500
  c.eval.examples = 0  # the first so many images; 0 for all
  c.eval.suite = SUITES[argument]
  c.eval.attacks = ConfigDict()
  for name, step_size, steps in (
    ('pgd10', 'eps/4', 10),
    ('pgd20', 'eps/10', 20),
  ):
    c.eval.attacks[name] = pgd(step_size, steps)
    c.eval.attacks[name].eps = c.eval.get_ref('eps').identity()
  c.eval.attacks.pgd20.start = 'uniform_clipped'  # as in RoCL's test
  return c


def pgd(step_size: str, steps: int) -> ConfigDict:
  """PGD as HYDRA evaluates with it; its eps follows the suite's."""
  return ConfigDict(
    dict(
      name='pgd',
      step_size=step_size,
      steps=steps,
      start='uniform',
      norm='linf',
      objective='cross_entropy',
      restarts=1,
    )
  )
