"""What there is to do of an experiment, and how long it will take.

One training step is measured; all else follows from FLOPs counted by hand.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from etils import epath

from rocl_jax import checkpoint, files, metrics
from rocl_jax.benchmark import programs, timing, work
from rocl_jax.data import Dataset
from rocl_jax.errors import UserError
from rocl_jax.experiment import Experiment, Run
from rocl_jax.progress import say
from rocl_jax.report.reproduction import SURROGATE
from rocl_jax.report.text import aligned
from rocl_jax.stages.supervised import Settings as Supervised
from rocl_jax.training import Training

# AutoAttack's work on an image that withstands it, as steps of PGD.
_AUTOATTACK_STEPS = 100 + 9 * 100 + 2 * 9 * 100 + 5000 // 2
_STANDING = 1 / 3  # of the images do, for a forecast


class Part(NamedTuple):
  """A stage of a run.

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


def parts(
  experiment: Experiment, root: epath.Path, dataset: Dataset
) -> list[Part]:
  """All stages of an experiment, and what a work directory has of them."""
  found = []
  for run in experiment.runs:
    start = run.init_from
    for (stage, section), folder in zip(run.stages, run.folders, strict=True):
      path, epochs = root / folder, section.total_epochs
      if checkpoint.is_model(path / 'model'):
        done, flops = epochs, 0.0
      else:
        done = min(epochs, len(metrics.read_lines(path / 'metrics.jsonl')))
        flops = _training(run, stage, section, epochs - done, dataset)
        if stage != 'pretrain':
          flops += _evaluation(experiment, run, section, epochs - done, dataset)
      found.append(Part(run.name, stage, start, epochs, done, flops))
      start = folder
  return found


def _sizes(dataset: Dataset) -> tuple[int, int]:
  return dataset.train.images.shape[1], len(dataset.class_names)


def _training(
  run: Run, stage: str, section: Training, epochs: int, dataset: Dataset
) -> float:
  update = work.step(stage, section, run.model, *_sizes(dataset))
  batches = len(dataset.train.labels) // section.batch_size
  return epochs * batches * section.batch_size * update


def _evaluation(
  experiment: Experiment,
  run: Run,
  section: Training,
  epochs: int,
  dataset: Dataset,
) -> float:
  """The first attack every so many epochs, all of them on what is kept."""
  most = experiment.eval.examples
  images = sum(
    min(most or len(split.labels), len(split.labels))
    for split in (dataset.validation, dataset.test)
  )
  steps = [
    attack.protocol.get('steps', 0) * attack.protocol.get('restarts', 1)
    for attack in experiment.eval.selected
  ]
  every = section.eval_epochs
  rounds = epochs / every if every else 0
  total = rounds * steps[0] + (3 if every else 1) * sum(steps)
  return images * total * _attack_step(run, dataset)


def _attack_step(run: Run, dataset: Dataset) -> float:
  count = work.forward(run.model, *_sizes(dataset))
  return work.attack(count.encoder + count.head, 1)


def speed(experiment: Experiment, dataset: Dataset, path: epath.Path) -> float:
  """FLOPs a second of the main run's supervised step on this device.

  Args:
    experiment: what is to be trained.
    dataset: the images' size and classes.
    path: a JSON file that keeps what was measured, by device and network.

  Raises:
    UserError: the main run has no such stage.
  """
  run = experiment.runs[0]
  section = next((s for _, s in run.stages if isinstance(s, Supervised)), None)
  if section is None:
    raise UserError('config.stages: the main run has no supervised stage')
  size, classes = _sizes(dataset)
  steps = section.attack.keywords['steps']
  cell = programs.Cell(run.model, section.batch_size, steps, size, classes)
  where = f'{jax.device_count()} {jax.devices()[0].device_kind}: {cell.name}'
  known = files.read_json(path, dict) if files.exists(path) else {}
  rate = known.get(where)
  if not (isinstance(rate, float) and 0 < rate < math.inf):
    say('measuring one training step')
    step = programs.training_step(programs.bench(cell), 'supervised', section)
    turns = timing.interleave({'step': step.job}, 3, lambda _: None)
    rate = step.work * cell.batch / timing.summary(turns['step']).median
    known[where] = rate
    if files.exists(path.parent):  # a dry run makes no folder
      files.write_json(path, known)
  return rate


def _has_autoattack(folder: epath.Path, n: int) -> bool:
  path = folder / 'results.json'
  records = files.read_json(path, list) if files.exists(path) else []
  return any(
    isinstance(r, dict) and (r.get('attack'), r.get('n')) == ('autoattack', n)
    for r in records
  )


def _duration(seconds: float) -> str:
  if seconds >= 3600:
    return f'{seconds / 3600:.1f} hours'
  return f'{seconds / 60:.1f} minutes'


def show(
  plans: Mapping[int, Experiment],
  root: epath.Path,
  dataset: Dataset,
  autoattack: int,
) -> None:
  """Prints what there is to do, for each seed, and the hours it will take."""
  rate = speed(next(iter(plans.values())), dataset, root / 'speed.json')
  lines = [['seed', 'run', 'stage', 'from', 'epochs', 'done', 'minutes left']]
  total, later = 0.0, 0.0
  for seed, one in plans.items():
    for part in parts(one, root / f'seed{seed}', dataset):
      start = part.start or 'fresh weights'
      numbers = [part.epochs, part.done, f'{part.flops / rate / 60:.1f}']
      lines.append([str(seed), part.run, part.stage, start, *map(str, numbers)])
      total += part.flops / rate
    steps = autoattack * _AUTOATTACK_STEPS * _STANDING
    later += sum(
      steps * _attack_step(run, dataset) / rate
      for run in one.runs
      if run.name != SURROGATE
      and not _has_autoattack(
        root / f'seed{seed}' / run.folders[-1], autoattack
      )
    )
  print(aligned(lines, {0, 1, 2, 3}))
  print(
    f'\n{_duration(total)} on this device, by FLOPs from one measured '
    f'step ({rate / 1e9:.1f} GFLOP/s), and compilation',
    flush=True,
  )
  if later:
    print(
      f'AutoAttack, where it was not run: at most {_duration(later)} more, '
      f'if a third of {autoattack} images withstand it',
      flush=True,
    )
