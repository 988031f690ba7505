"""The paper's tables: which runs they need, and what is measured of them."""

import copy
from collections.abc import Collection, Iterator, Sequence

from etils import epath
from ml_collections import ConfigDict

from rocl_jax import audit as audits
from rocl_jax import data, evaluate, pipeline, published, report
from rocl_jax import workdir as folders
from rocl_jax.errors import RunFailed, UserError, nearest, shown
from rocl_jax.experiment import Run, parse_experiment
from rocl_jax.files import is_remote
from rocl_jax.mesh import counting_in
from rocl_jax.report.reproduction import SURROGATE
from rocl_jax.reproduce import forecast

BASELINES = 'baselines'
_TRANSFER = 4  # the table of transfer attacks


def rows(config: ConfigDict, tables: Sequence[str]) -> tuple[str, ...]:
  """The runs beside the main one that tables need, in the config's order.

  Args:
    config: see `configs/paper.py`.
    tables: numbers of tables, and 'baselines'.

  Raises:
    UserError: there is no such table, or the config has no such run.
  """
  known = [*map(str, published.TABLES), BASELINES]
  if not tables:
    raise UserError(f'--tables: found none, wanted some of {",".join(known)}')
  needed: set[str] = set()
  listed = config.get('compare', ())
  for name in listed:
    if name not in config.baselines:
      hint = nearest(name, config.baselines)
      raise UserError(f'config.compare: no run {name} in baselines{hint}')
  there = {config.get('name'), *listed}
  for table in tables:
    if table not in known:
      raise UserError(
        f'--tables: found {table!r}, wanted some of {",".join(known)}'
        f'{nearest(table, known)}'
      )
    if table == BASELINES:
      needed |= there.intersection(published.BASELINES)
    else:
      needed |= {*published.runs_of(int(table))}
    if table == str(_TRANSFER):
      needed.add(SURROGATE)
  if missing := needed - there:
    raise UserError(
      f'--config: compares no run {min(missing)}, which --tables needs; wanted '
      'configs/paper.py or one like it, without a row'
    )
  for name in reversed(config.compare):  # and what they start from
    if name in needed:
      start = config.baselines[name].get('init_from', '')
      needed.add(start.rpartition('/')[0])
  return tuple(name for name in config.compare if name in needed)


def evaluations(
  config: ConfigDict,
  runs: Sequence[Run],
  root: epath.Path,
  tables: Sequence[str],
  autoattack: int,
  audit: int,
) -> Iterator[tuple[ConfigDict, list[str]]]:
  """What is measured of a work directory beside its training's own suite.

  Yields:
    A config as of `configs/eval.py`, and the model folders.
  """
  last = {run.name: str(root / run.folders[-1] / 'model') for run in runs}

  def asked(suite, examples, audit, surrogates):
    changed = copy.deepcopy(config.eval)
    changed.update(suite=suite, examples=examples)
    transfer = {'surrogates': surrogates, 'matrix': False}
    return ConfigDict(
      {
        **{'seed': config.seed, 'split': 'test', 'dtype': ''},
        'data': {'source': '', 'dir': config.data.dir},
        'eval': changed,
        'audit': {'examples': audit},
        'transfer': transfer | {'unmasked': bool(surrogates)},
      }
    )

  if autoattack:
    models = [path for name, path in last.items() if name != SURROGATE]
    # PGD on the same images, to set beside it.
    suite = ('pgd10', 'pgd20', 'autoattack')
    yield asked(suite, autoattack, audit, ()), models
  if str(_TRANSFER) in tables:
    models = [last[name] for name in published.runs_of(_TRANSFER)]
    everything = config.eval.examples
    yield asked(('pgd10',), everything, 0, (last[SURROGATE],)), models


def reproduce(
  config: ConfigDict,
  workdir: str,
  tables: Sequence[str],
  seeds: Sequence[int],
  autoattack: int,
  audit: int,
  dry_run: bool,
  allowed: Collection[str] = (),
) -> str:
  """Runs what is missing; the path of the report, '' for a dry run.

  Args:
    config: see `configs/paper.py`.
    workdir: a folder of this machine.
    tables: as for `rows`.
    seeds: a work directory each.
    autoattack: images that AutoAttack gets.
    audit: images of the checks of those evaluations.
    dry_run: whether to show the plan alone, and to write nothing.
    allowed: fields that may have changed, as for `pipeline.run`.

  Raises:
    UserError: a mistake in what was asked.
    RunFailed: an audit failed; everything was run, and is in the report.
    Interrupted: the process was asked to stop.
  """
  if is_remote(workdir):
    raise UserError(
      f'--workdir: found {workdir}, wanted a folder of this machine; train.py '
      'alone can work there'
    )
  if config.seed:
    raise UserError(
      f'config.seed: found {config.seed}, wanted --seeds={config.seed}'
    )
  names = rows(config, tables)
  configs, plans = {}, {}
  for seed in seeds:
    configs[seed] = copy.deepcopy(config)
    with configs[seed].unlocked():
      configs[seed].update(seed=seed, compare=names)
    plans[seed] = parse_experiment(configs[seed])
  first = plans[seeds[0]]
  with counting_in([one.model.dtype for one in first.runs]):
    return _reproduce(
      *(configs, plans, workdir, tables, autoattack, audit, dry_run, allowed)
    )


def _reproduce(
  configs, plans, workdir, tables, autoattack, audit, dry_run, allowed
):
  first = next(iter(plans.values()))
  where = first.data
  dataset = data.load(where.source, where.dir, where.validation)
  root = epath.Path(workdir).expanduser().resolve()
  for seed, one in plans.items():
    pipeline.check(one, dataset, root / f'seed{seed}', allowed)
  if not dry_run:
    folders.make(workdir, '--workdir')
  forecast.show(plans, root, dataset, autoattack)
  if dry_run:
    return ''
  problems = []
  for seed in plans:
    folder = root / f'seed{seed}'
    pipeline.run(configs[seed], str(folder), allowed)
    for asked, models in evaluations(
      configs[seed], plans[seed].runs, folder, tables, autoattack, audit
    ):
      found = evaluate.evaluate(asked, models)
      problems += [
        f'{name}: {check.check}: {check.found}'
        for name, checks in found.checks.items()
        for check in audits.failed(checks)
      ]
  path = report.attempt(str(root))
  if problems:
    raise RunFailed(
      f'{shown(path or root)}: an audit failed, so those accuracies prove '
      f'nothing: {problems[0]}'
      + (f' and {len(problems) - 1} more' if len(problems) > 1 else '')
    )
  return path
