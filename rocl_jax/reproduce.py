r"""Runs what is missing of the paper's tables, and reports.

  python -m rocl_jax.reproduce --tables=1,2,3,4,5 --workdir=W
  python -m rocl_jax.reproduce --config=configs/paper_small.py \
      --config.data.dir=D --workdir=W

--workdir=FOLDER       W/seed0 and so on: a work directory for each seed; the
                       same command goes on where it was
--tables=1,2,3,4,5     and `baselines`, ours beside the paper's: all by default
--config=FILE          configs/paper.py, :asrun of it, or
                       configs/paper_small.py; --config.FIELD=VALUE overrides
--seeds=0              as 0,1,2: the config's rows once for each
--autoattack=1000      test images that AutoAttack gets, of each last model; 0
                       for none
--audit=64             images of the checks of each of those evaluations; 0
                       checks the records alone
--dry_run              the plan alone: rows, stages, epochs, hours

Rows share what they have in common: one pre-training serves them all. Table 4
attacks from `surrogate`, a network of its own. Exit status 3: all was run, but
an audit failed.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rocl_jax import command, published
from rocl_jax.errors import RunFailed, UserError, nearest

SURROGATE = 'surrogate'
BASELINES = 'baselines'
_TRANSFER = 4  # the table of transfer attacks
# AutoAttack's work on an image that withstands it, as steps of PGD.
_AUTOATTACK_STEPS = 100 + 9 * 100 + 2 * 9 * 100 + 5000 // 2
_STANDING = 1 / 3  # of the images do, for a prediction


def rows(config: ConfigDict, tables: Sequence[str]) -> tuple[str, ...]:
  """The runs beside the main one that tables need, in the config's order.

  Args:
    config: see `configs/paper.py`.
    tables: numbers of tables, and 'baselines'.

  Raises:
    UserError: there is no such table, or the config has no such run.
  """
  known = [*map(str, published.TABLES), BASELINES]
  needed: set[str] = set()
  there = {config.get('name'), *config.get('baselines', {})}
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
      f'--config: has no run {min(missing)}; wanted configs/paper.py or one '
      'like it, without a row'
    )
  for name in reversed(config.compare):  # and what they start from
    if name in needed:
      start = config.baselines[name].get('init_from', '')
      needed.add(start.rpartition('/')[0])
  return tuple(name for name in config.compare if name in needed)


class Part(NamedTuple):
  """A stage of a run, in a plan.

  Attributes:
    run, stage, start: what is trained, and the stage folder it starts from.
    epochs, done: of its training.
    flops: what is left, training and evaluation.
  """

  run: str
  stage: str
  start: str
  epochs: int
  done: int
  flops: float


def plan(experiment: Any, root: epath.Path, dataset: Any) -> list[Part]:
  """What there is to do in a work directory, by stages."""
  from rocl_jax import checkpoint, metrics
  from rocl_jax.benchmark import work

  size, classes = dataset.train.images.shape[1], len(dataset.class_names)
  measured = sum(
    min(len(split.labels), experiment.eval.examples or len(split.labels))
    for split in (dataset.validation, dataset.test)
  )
  steps = [
    a.protocol.get('steps', 0) * a.protocol.get('restarts', 1)
    for a in experiment.eval.selected
  ]
  parts = []
  for run in experiment.runs:
    count = work.forward(run.model, size, classes)
    attack = work.attack(count.encoder + count.head, 1) * measured
    start = run.init_from
    for (stage, section), folder in zip(run.stages, run.folders, strict=True):
      path = root / folder
      if run is not experiment.runs[0]:
        path = root / run.name / folder
      done = len(metrics.read_lines(path / 'metrics.jsonl'))
      flops = 0.0
      if checkpoint.is_model(path / 'model'):
        done = section.total_epochs
      else:
        batches = len(dataset.train.labels) // section.batch_size
        update = work.step(stage, section, run.model, size, classes)
        left = section.total_epochs - done
        flops += left * batches * section.batch_size * update
        if stage != 'pretrain':
          every = section.eval_epochs
          flops += attack * steps[0] * (left / every if every else 0)
          flops += attack * sum(steps) * (3 if every else 1)
      parts.append(
        Part(run.name, stage, start, section.total_epochs, done, flops)
      )
      start = folder
  return parts


def _speed(experiment: Any, dataset: Any, path: epath.Path) -> float:
  """FLOPs a second of the main run's adversarial step on this device.

  Measured once for each device and network, and kept in a file.
  """
  import jax

  from rocl_jax import files
  from rocl_jax.benchmark import programs, timing

  run = experiment.runs[0]
  section = dict(run.stages)['supervised']
  cell = programs.Cell(
    run.model,
    section.batch_size,
    section.attack.keywords['steps'],
    dataset.train.images.shape[1],
    len(dataset.class_names),
  )
  where = f'{jax.device_count()} {jax.devices()[0].device_kind}: {cell.name}'
  known = files.read_json(path, dict) if path.exists() else {}
  if where not in known:
    step = programs.training_step(programs.bench(cell), 'supervised', section)
    step.run()
    seconds = []
    for _ in range(3):
      begin = time.perf_counter()
      step.run()
      seconds.append(time.perf_counter() - begin)
    known[where] = step.work * cell.batch / timing.summary(seconds).median
    files.write_json(path, known)
  return known[where]


def _autoattack_flops(experiment: Any, run: Any, dataset: Any, n: int) -> float:
  from rocl_jax.benchmark import work

  size, classes = dataset.train.images.shape[1], len(dataset.class_names)
  count = work.forward(run.model, size, classes)
  steps = _AUTOATTACK_STEPS * _STANDING
  return n * work.attack(count.encoder + count.head, 1) * steps


def _evaluation(config: ConfigDict, seed: int, **changes: Any) -> ConfigDict:
  """The config of an evaluation with the attacks of a training config."""
  suite = copy.deepcopy(config.eval)
  suite.update(changes.pop('eval'))
  nothing = {'surrogates': (), 'matrix': False, 'unmasked': False}
  return ConfigDict(
    {
      'seed': seed,
      'split': 'test',
      'dtype': '',
      'data': {'source': '', 'dir': config.data.dir},
      'eval': suite,
      'audit': {'examples': changes['audit']},
      'transfer': nothing | changes.get('transfer', {}),
    }
  )


def evaluations(
  config: ConfigDict,
  experiment: Any,
  root: epath.Path,
  tables: Sequence[str],
  autoattack: int,
  audit: int,
) -> Iterator[tuple[ConfigDict, list[str]]]:
  """What is measured of a work directory beside its training's own suite.

  Yields:
    A config as of `configs/eval.py`, and the model folders.
  """
  last = {}
  for run in experiment.runs:
    folder = root / run.folders[-1]
    if run is not experiment.runs[0]:
      folder = root / run.name / run.folders[-1]
    last[run.name] = str(folder / 'model')
  seed = experiment.runs[0].seed
  if autoattack:
    suite = {'suite': ('autoattack',), 'examples': autoattack}
    models = [path for name, path in last.items() if name != SURROGATE]
    yield _evaluation(config, seed, eval=suite, audit=audit), models
  if str(_TRANSFER) in tables:
    yield (
      _evaluation(
        config,
        seed,
        eval={'suite': ('pgd10',)},
        audit=0,
        transfer={'surrogates': (last[SURROGATE],), 'unmasked': True},
      ),
      [last[name] for name in published.runs_of(_TRANSFER)],
    )


def reproduce(
  config: ConfigDict,
  workdir: str,
  tables: Sequence[str],
  seeds: Sequence[int],
  autoattack: int,
  audit: int,
  dry_run: bool,
) -> str:
  """Runs what is missing; the path of the report, '' for a dry run.

  Raises:
    UserError: a mistake in what was asked.
    RunFailed: an audit failed; everything was run, and is in the report.
    Interrupted: the process was asked to stop.
  """
  from rocl_jax import audit as audits
  from rocl_jax import data, evaluate, experiment, pipeline, report
  from rocl_jax import workdir as folders

  names = rows(config, tables)
  configs, plans = {}, {}
  for seed in seeds:
    configs[seed] = copy.deepcopy(config)
    with configs[seed].unlocked():
      configs[seed].update(seed=seed, compare=names)
    plans[seed] = experiment.parse_experiment(configs[seed])
  first = plans[seeds[0]]
  where = first.data
  dataset = data.load(where.source, where.dir, where.validation)
  root = folders.make(workdir, '--workdir')
  _show_plan(plans, root, dataset, autoattack)
  if dry_run:
    return ''
  problems = []
  for seed in seeds:
    folder = root / f'seed{seed}'
    pipeline.run(configs[seed], str(folder))
    for asked, models in evaluations(
      configs[seed], plans[seed], folder, tables, autoattack, audit
    ):
      found = evaluate.evaluate(asked, models)
      problems += [
        f'{name}: {check.check}: {check.found}'
        for name, checks in found.checks.items()
        for check in audits.failed(checks)
      ]
    report.write(str(folder))
  path = report.write(str(root))
  if problems:
    raise RunFailed(
      f'{path}: an audit failed, so those accuracies prove nothing: '
      f'{problems[0]}, and {len(problems) - 1} more'
    )
  return path


def _show_plan(plans, root, dataset, autoattack):
  from rocl_jax.report.text import aligned

  speed = _speed(next(iter(plans.values())), dataset, root / 'speed.json')
  header = ['seed', 'run', 'stage', 'from', 'epochs', 'done', 'minutes left']
  lines, total, later = [header], 0.0, 0.0
  for seed, one in plans.items():
    for part in plan(one, root / f'seed{seed}', dataset):
      minutes = part.flops / speed / 60
      total += minutes
      lines.append(
        [
          *(str(seed), part.run, part.stage, part.start or 'fresh weights'),
          *(str(part.epochs), str(part.done), f'{minutes:.1f}'),
        ]
      )
    later += sum(
      _autoattack_flops(one, run, dataset, autoattack) for run in one.runs
    )
  print(aligned(lines, {0, 1, 2, 3}))
  hours = total / 60
  print(
    f'\n{hours:.1f} hours on this device, by FLOPs from one measured step '
    f'({speed / 1e9:.1f} GFLOP/s), and compilation'
    + (
      f'; AutoAttack at most {later / speed / 3600:.1f} more, if a third of '
      f'{autoattack} images withstand it'
      if autoattack
      else ''
    ),
    flush=True,
  )


def main(_: list[str]) -> None:
  from rocl_jax import compiled, interruption

  group = flags.FLAGS
  if not isinstance(group.config, ConfigDict) or 'data' not in group.config:
    raise UserError('--config: wanted configs/paper.py or one like it')
  seeds = _whole('--seeds', group.seeds)
  if not seeds:
    raise UserError('--seeds: found none, wanted numbers such as 0,1,2')
  interruption.install('stopped; the same command goes on where it was')
  compiled.keep_programs()
  path = reproduce(
    group.config,
    group.workdir,
    list(dict.fromkeys(group.tables)),
    list(dict.fromkeys(seeds)),
    group.autoattack,
    group.audit,
    group.dry_run,
  )
  if path:
    print(f'\nReport: {path}')


def _whole(flag, words):
  try:
    return [int(word) for word in words]
  except ValueError:
    raise UserError(
      f'{flag}: found {",".join(words)}, wanted numbers such as 0,1,2'
    ) from None


if __name__ == '__main__':
  command.define_config()
  tables = [*map(str, published.TABLES), BASELINES]
  flags.DEFINE_string('workdir', None, 'Folder of everything it writes.')
  flags.DEFINE_list('tables', tables, 'Which tables.')
  flags.DEFINE_list('seeds', ['0'], 'A work directory for each.')
  flags.DEFINE_integer('autoattack', 1000, 'Images.', lower_bound=0)
  flags.DEFINE_integer('audit', 64, 'Images.', 0, 256)
  flags.DEFINE_bool('dry_run', False, 'The plan alone.')
  command.run(
    main,
    usage=__doc__ or '',
    required=('workdir',),
    default_config='configs/paper.py',
  )
