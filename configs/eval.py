"""Evaluation suites.

  python -m rocl_jax.evaluate --model=W/4_finetune/model \
      --config=configs/eval.py:standard

| suite | what |
|---|---|
| paper | as in the paper's tables: 10 steps of eps/4, RoCL's 20 of eps/10 |
| quick | the first of these alone |
| standard | those, PGD-50 with 10 restarts, and AutoAttack |
| autoattack | AutoAttack alone: APGD-CE, targeted APGD-DLR, FAB-T, Square |
| rand | its version for networks that draw random numbers |
| transfer | images made on other networks, `transfer.surrogates` |
| matrix | images made on each of --model=A,B,... scored on each |
| corruptions | CIFAR-10-C, no attack: `data.dir` is its folder |

Any one attack is a suite, too: `:clean`, `:fab-t`. L2:
--config.eval.norm=l2 --config.eval.eps=0.5.
"""

from ml_collections import ConfigDict

from rocl_jax.errors import UserError, nearest

SUITES = {
  'paper': ('pgd10', 'pgd20'),
  'quick': ('pgd10',),
  'standard': ('clean', 'pgd10', 'pgd20', 'pgd50', 'autoattack'),
  'autoattack': ('autoattack',),
  'rand': ('autoattack-rand',),
  'transfer': ('pgd10', 'pgd20'),
  'matrix': ('pgd10',),
  'corruptions': ('clean',),
}
# Each member of an ensemble sees what those before it have left.
ENSEMBLES = {
  'clean': (),
  'autoattack': ('apgd-ce', 'apgd-t', 'fab-t', 'square'),
  'autoattack-rand': ('apgd-ce-eot', 'apgd-dlr-eot'),
}


def get_config(argument: str = 'paper') -> ConfigDict:
  c = ConfigDict()
  c.seed = 0
  c.split = 'test'  # or validation

  # Empty fields: as the model was trained.
  c.dtype = ''  # as trained; or float32, bfloat16, tf32
  c.data = ConfigDict()
  c.data.source = ''
  c.data.dir = ''

  c.eval = suite()
  c.audit = ConfigDict()
  c.audit.examples = 256  # images of the checks that cost an attack

  c.transfer = ConfigDict()
  c.transfer.surrogates = ()  # model folders
  c.transfer.matrix = False  # the models themselves are surrogates, too
  # Score fine-tuned models without their masks, too, as the published Table 4
  # did: an artefact.
  c.transfer.unmasked = False

  suites = {**SUITES, **{name: (name,) for name in _names(c.eval)}}
  if argument not in suites:
    wanted = f'one of {", ".join(suites)}{nearest(argument, suites)}'
    raise UserError(f'--config: found suite {argument!r}, wanted {wanted}')
  c.eval.suite = suites[argument]
  if argument == 'transfer':
    # What configs/surrogate.py makes.
    c.transfer.surrogates = ('runs/surrogate/1_supervised/model',)
  c.transfer.matrix = argument == 'matrix'
  if argument == 'corruptions':
    c.data.source = 'cifar10c'
    c.audit.examples = 0
  return c


def _names(section):
  return (*section.attacks, *section.ensembles)


def suite() -> ConfigDict:
  """The `eval` section: attacks by name, all of the section's norm and eps."""
  c = ConfigDict()
  c.eps = '8/255'
  c.norm = 'linf'
  c.batch_size = 500
  c.examples = 0  # the first so many images; 0 for all
  c.suite = SUITES['paper']
  c.attacks = ConfigDict()
  c.attacks.pgd10 = pgd('eps/4', 10)
  c.attacks.pgd20 = pgd('eps/10', 20)
  c.attacks.pgd20.start = 'uniform_clipped'  # as in RoCL's test
  c.attacks.pgd50 = pgd('eps/4', 50)
  c.attacks.pgd50.restarts = 10
  c.attacks['apgd-ce'] = apgd('ce')
  c.attacks['apgd-dlr'] = apgd('dlr')
  c.attacks['apgd-t'] = apgd('dlr')
  c.attacks['apgd-t'].targets = 9
  c.attacks['apgd-ce-eot'] = apgd('ce')
  c.attacks['apgd-ce-eot'].samples = 20
  c.attacks['apgd-dlr-eot'] = apgd('dlr')
  c.attacks['apgd-dlr-eot'].samples = 20
  c.attacks['fab-t'] = ConfigDict(dict(name='fab', steps=100, targets=9))
  c.attacks['square'] = ConfigDict(
    dict(name='square', queries=5000, share=0.8, restarts=1)
  )
  for attack in c.attacks.values():
    attack.eps = c.get_ref('eps').identity()
    attack.norm = c.get_ref('norm').identity()
  c.ensembles = ConfigDict(ENSEMBLES)
  return c


def pgd(step_size: str, steps: int) -> ConfigDict:
  """PGD as HYDRA evaluates with it."""
  return ConfigDict(
    dict(
      name='pgd',
      step_size=step_size,
      steps=steps,
      start='uniform',
      objective='cross_entropy',
      restarts=1,
    )
  )


def apgd(loss: str) -> ConfigDict:
  """Auto-PGD as AutoAttack runs it."""
  return ConfigDict(
    dict(name='apgd', loss=loss, steps=100, targets=0, restarts=1, samples=1)
  )
