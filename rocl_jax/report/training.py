"""How it was trained: curves, the published ones, examples, densities."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rocl_jax import figures, published
from rocl_jax.report.reading import Workdir
from rocl_jax.report.records import Record, stage_order
from rocl_jax.report.text import (
  Writer,
  column,
  eps_text,
  file_name,
  md,
  number,
  plain,
  short_dataset,
  table,
)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
  """Rank correlation, ties sharing their mean rank; NaN where undefined."""
  if len(a) < 3:
    return math.nan

  def ranks(values: Sequence[float]) -> np.ndarray:
    _, place, counts = np.unique(
      values, return_inverse=True, return_counts=True
    )
    return (np.cumsum(counts) - (counts - 1) / 2)[place]

  x, y = ranks(a), ranks(b)
  if np.ptp(x) == 0 or np.ptp(y) == 0:
    return math.nan
  return float(np.corrcoef(x, y)[0, 1])


def _curve(run: str, rows: Sequence[Record], split: str) -> figures.Curve:
  return figures.Curve(
    run,
    column(rows, 'epoch'),
    column(rows, 'loss'),
    column(rows, f'{split}_clean_top1'),
    column(rows, f'{split}_robust_top1'),
  )


def _curve_split(rows: Iterable[Record], preferred: str) -> str:
  """Which accuracy was followed during training: 'validation' or 'test'."""
  seen = {key for row in rows for key in row}
  order = sorted(('validation', 'test'), key=lambda s: s != preferred)
  for split in order:
    if f'{split}_clean_top1' in seen:
      return split
  return preferred


def _published_stage(rows: Record, run: str) -> figures.Curve:
  epochs = np.array(rows['epoch'], float)

  def values(key: str) -> list[float]:
    found = rows.get(key, [None] * len(epochs))
    return [math.nan if value is None else value for value in found]

  return figures.Curve(
    run,
    list(epochs / epochs.max()),
    values('loss'),
    values('clean_top1'),
    values('robust_top1'),
  )


def _planned_epochs(config: Mapping, stage: str, done: float) -> float:
  """How long the stage is to be; a run in progress has not got there yet."""
  planned = _section(config, stage).get('total_epochs')
  known = isinstance(planned, int) and planned >= done
  return planned if known and planned else done


def _compare(
  here: Sequence[float],
  at: Sequence[float],
  there: Sequence[float],
  there_at: Sequence[float],
) -> list[str] | None:
  """Start, end and rank correlation at the fractions that `here` measured."""
  ours = np.array([at, here], float)
  ours = ours[:, np.isfinite(ours).all(axis=0)]
  published = np.array([there_at, there], float)
  published = published[:, np.isfinite(published).all(axis=0)]
  if not (ours.size and published.size):
    return None
  other = np.interp(ours[0], *published)
  rank = spearman(list(ours[1]), list(other))
  return [
    f'{ours[1][0]:.2f} → {ours[1][-1]:.2f}',
    f'{other[0]:.2f} → {other[-1]:.2f}',
    number(rank) if math.isfinite(rank) else '–',
  ]


def recipes(out: Writer, work: Workdir) -> None:
  """What each run was trained on, how long, and against what."""
  rows = []
  for run in work.runs:
    config, stages = work.config_of(run), work.stages(run)
    models = [work.model(run, stage) for stage in stages]
    source = _section(config, 'data').get('source')
    dataset = next((m['dataset'] for m in models if m.get('dataset')), source)
    epochs, taken = [], 0.0
    images, about = [m.get('train_images') for m in models], None
    attacks: dict[str, list[str]] = {}
    for stage, model in zip(stages, models, strict=True):
      settings, measured = _section(config, stage), work.metrics(run, stage)
      done = measured[-1]['epoch'] if measured else None
      planned = settings.get('total_epochs')
      text = plain(planned if done is None else done)
      if done is not None and isinstance(planned, int) and done < planned:
        text += f' of {planned}'
      if not model and done is None:
        text += ', not trained yet'
      epochs.append(f'{stage} {text}')
      against = _against(settings) if planned != 0 else 'not trained'
      attacks.setdefault(against, []).append(stage)
      taken += sum(x for x in column(measured, 'seconds') if math.isfinite(x))
      about = about or images_an_epoch(settings, measured)
    if any(models) or taken:
      rows.append(
        [
          run,
          short_dataset(dataset) if dataset else '–',
          plain(source),
          next(
            (f'{n:,}' for n in images if isinstance(n, int)),
            f'about {about:,}' if about else '–',
          ),
          ', '.join(epochs),
          '; '.join(
            f'{what} ({", ".join(on)})' for what, on in attacks.items()
          ),
          _duration(taken),
        ]
      )
  if rows:
    header = ['run', 'data set', 'source', 'training images']
    header += ['epochs', 'loss and attack in training', 'time']
    out.text(
      '## How each run was trained',
      'Its own stages alone. Time: wall time in training, compilation '
      'included, evaluation not; of an epoch that was interrupted the last '
      'part alone.',
      table(header, rows, len(header) - 1),
    )


def _section(config: Mapping, name: str) -> Mapping:
  found = config.get(name)
  return found if isinstance(found, Mapping) else {}


def images_an_epoch(
  settings: Mapping, measured: Sequence[Record]
) -> int | None:
  """As counted from the steps and the batch."""
  batch = settings.get('batch_size')
  for row in measured[-1:]:
    step, epoch = row.get('step'), row['epoch']
    if isinstance(step, int) and isinstance(batch, int) and epoch > 0:
      return step * batch // epoch
  return None


def _against(settings: Mapping) -> str:
  """'trades, pgd: eps 8/255, 10 steps of eps/4'."""
  loss, attack = plain(settings.get('loss')), _section(settings, 'attack')
  if not attack or loss == 'natural':
    return f'{loss}, no attack' if settings else 'unknown'
  eps = attack.get('eps')
  return (
    f'{loss}, {plain(attack.get("name"))}: eps '
    f'{eps if isinstance(eps, str) else eps_text(eps)}, '
    f'{plain(attack.get("steps"))} steps of {plain(attack.get("step_size"))}'
  )


def _duration(seconds: float) -> str:
  if seconds <= 0:
    return '–'
  minutes, rest = divmod(round(seconds), 60)
  hours, left = divmod(minutes, 60)
  if hours:
    return f'{hours} h {left} min'
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def curves(out: Writer, work: Workdir) -> None:
  metrics = {
    (run, stage): rows
    for run in work.runs
    for stage in work.stages(run)
    if (rows := work.metrics(run, stage))
  }
  split = _curve_split(
    (r for rows in metrics.values() for r in rows), 'validation'
  )
  stages = {}
  for stage in stage_order(stage for _, stage in metrics):
    drawn = [
      _curve(run, metrics[run, stage], split)
      for run in work.runs
      if (run, stage) in metrics
    ]
    if drawn:
      stages[stage] = drawn
  if stages:
    out.text(
      '## Training',
      f'Training loss, and accuracy on the {split} images after each epoch: '
      'clean solid (○), under attack dashed (●).',
    )
    alt = 'Loss and accuracy by epoch, a column for each stage'
    out.picture('curves', alt, figures.curves, stages, split)


def against_published(out: Writer, work: Workdir) -> None:
  """The published runs are on CIFAR-10: nothing else is set against them."""
  if work.datasets() == ['cifar10']:
    pretrained = bool(work.metrics(work.main_run, 'pretrain'))
    name = 'ours' if pretrained else 'baseline2'
    shape(out, work, work.main_run, work.config, name)


def shape(
  out: Writer, work: Workdir, run: str, config: Mapping, name: str
) -> None:
  """A run's curves over those of a published one.

  Args:
    out: where to.
    work: what has the run's metrics.
    run: the run.
    config: its config, for the planned epochs.
    name: of the published run, see `published.curves`.
  """
  metrics = {s: work.metrics(run, s) for s in work.stages(run)}
  metrics = {stage: rows for stage, rows in metrics.items() if rows}
  logs = published.curves()
  reference = logs['runs'][name]
  split = _curve_split((r for rows in metrics.values() for r in rows), 'test')
  stages, rows = {}, []
  for stage, measured in metrics.items():
    if stage not in reference['stages']:
      continue
    here = _curve(run, measured, split)
    length = _planned_epochs(config, stage, max(here.x)) or 1
    here = here._replace(x=[x / length for x in here.x])
    there = _published_stage(reference['stages'][stage], 'published')
    stages[stage] = (here, there)
    for label in ('loss', 'clean', 'robust'):
      compared = _compare(
        getattr(here, label), here.x, getattr(there, label), there.x
      )
      if compared:
        rows.append([stage, label, *compared])
  if not stages:
    return
  lengths = ', '.join(
    f'{stage} {max(reference["stages"][stage]["epoch"])}' for stage in stages
  )
  main = run == work.main_run
  out.text(
    f'## Shape against the published curves{"" if main else f": {md(run)}"}',
    f'Published: {reference["title"]} (epochs: {lengths}), full-size network '
    f'and all of CIFAR-10. This run has a scale of its own, so the level of a '
    'curve need not agree; its shape should. Accuracy of this run is on '
    f'{split} images, the published one on test images.',
  )
  out.picture(
    'published' if main else f'published_{file_name(run)}',
    'This run and the published one by the fraction of each stage',
    figures.against_published,
    stages,
    split,
    reference['title'],
  )
  out.text(
    'First → last measured epoch, the published values at the same fractions '
    'of the stage, and the rank correlation (Spearman) of the two curves. It '
    'ranks only noise where a curve is flat, as the published fine-tuning is.',
    table(
      ['stage', 'quantity', 'this run', 'published', 'rank correlation'],
      rows,
      2,
    ),
  )
  if main:  # once is enough
    notes = [f'- {key}: {note}' for key, note in logs['notes'].items()]
    out.text(logs['source'], '\n'.join(notes))


def density(out: Writer, work: Workdir) -> None:
  pruned = [
    model
    for model in work.models()
    if (model.get('sparsity') or 0) > 0 and model.get('layers')
  ]
  if not pruned:
    return
  model = pruned[0]
  layers = {
    name: (layer['size'], layer['kept'])
    for name, layer in model['layers'].items()
  }
  which = f'run {model.get("run")}, stage {model.get("stage")}'
  size = sum(size for size, _ in layers.values())
  kept = sum(kept for _, kept in layers.values())
  rows = [
    [name, f'{s:,}', f'{k:,}', number(100 * k / s if s else None)]
    for name, (s, k) in [*layers.items(), ('total', (size, kept))]
  ]
  out.text('## Density by layer', f'The pruned model of {md(which)}.')
  out.picture(
    'density',
    'Weights and kept weights of each layer',
    figures.density,
    layers,
    f'{which}: {kept:,} of {size:,} weights kept',
  )
  out.text(table(['layer', 'weights', 'kept', 'kept %'], rows, 1))


def examples(out: Writer, work: Workdir) -> None:
  """Each stage's pictures, the last first, the natural run's beside them."""
  wanted = []
  for stage in reversed(work.stages(work.main_run)):
    wanted += [(run, stage) for run in (work.main_run, 'natural')]
  titled = False
  for run, stage in dict.fromkeys(wanted):
    data = work.examples(run, stage)
    if not data.get('images'):
      continue
    if not titled:
      out.text(
        '## Examples',
        'Clean images above, the same images under attack below them, and '
        'what the attack added, magnified about mid grey; ✓ and green: '
        'predicted right, ✗ and orange: predicted wrong.',
      )
      titled = True
    attack = f'{data.get("attack", "attack")}, eps {eps_text(data.get("eps"))}'
    images = [
      figures.Example(
        *(image[key] for key in figures.Example._fields[:3]),
        *(np.array(image[key]) for key in figures.Example._fields[3:]),
      )
      for image in data['images']
    ]
    title = f'run {run}, stage {stage}: {attack}'
    out.picture(
      f'examples_{file_name(run)}_{file_name(stage)}',
      f'Predictions of {run}, {stage}',
      figures.examples,
      images,
      data.get('class_names', []),
      title,
      data.get('eps'),
    )
