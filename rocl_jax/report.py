"""Tables and pictures of a training run, from the files it left behind.

  python -m rocl_jax.report runs/quickstart

reads `runs/quickstart` and writes `runs/quickstart/report.md` with its
pictures in `runs/quickstart/figures`. A run in progress gives a report of what
there is, and the same files always give the same text.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rocl_jax import command, figures
from rocl_jax.errors import UserError

Record = dict[str, Any]

STAGES = ('pretrain', 'linear_eval', 'supervised', 'prune', 'finetune')
STAGE_FOLDER = re.compile(r'(\d+)_(.+)')

DATASETS = {
  'digits': 'scikit-learn digits (handwritten digits, not CIFAR-10)',
  'cifar10': 'CIFAR-10',
}

RUNS = {
  'ours': 'the full method',
  'natural': 'the same network from scratch, trained without adversaries',
  'rocl': 'a linear classifier on the frozen pre-trained encoder',
  'magnitude': 'pruned by weight magnitude, and not trained any further',
}

# What the overview says of a stage: what happens, what it trains, what not.
STAGE_TEXTS = {
  'pretrain': (
    'contrastive learning against instance-wise attacks, no labels',
    'encoder, projector',
    '',
  ),
  'linear_eval': ('a linear classifier on the features', 'head', 'encoder'),
  'supervised': ('adversarial training with labels', 'encoder, head', ''),
  'prune': (
    'learn which weights matter, keep the top k of each layer',
    'scores, BatchNorm',
    'weights',
  ),
  'finetune': (
    'train the kept weights further',
    'kept weights, BatchNorm',
    'masks',
  ),
}

SELECTIONS = {
  'last': 'the last epoch, selected on nothing',
  'best_validation': 'best on validation images, held out of the training set',
  'best_test': 'selected on the test images, for comparison with the paper '
  'only',
}

PROTOCOL = (
  'attack',
  'norm',
  'eps',
  'steps',
  'step_size',
  'start',
  'restarts',
  'split',
  'n',
  'seed',
  'dtype',
  'matmul_precision',
)

# What must agree for two records to be the same measurement.
IDENTITY = (
  'run',
  'stage',
  'selection',
  'split',
  'attack',
  'eps',
  'norm',
  'n',
)


# Reading.


def _read_json(path: Path) -> Any:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:  # also covers bytes that are not UTF-8
    raise UserError(f'{path}: not valid JSON: {error}') from error


def _read_object(path: Path) -> Record:
  value = _read_json(path)
  if not isinstance(value, dict):
    raise UserError(f'{path}: expected a JSON object')
  return value


def _read_results(path: Path) -> list[Record]:
  records = _read_json(path)
  if not isinstance(records, list):
    raise UserError(f'{path}: expected a list of records')
  for i, record in enumerate(records):
    if not isinstance(record, dict):
      raise UserError(f'{path}: record {i} is not a JSON object')
    for key in ('run', 'stage', 'selection', 'split'):
      if not isinstance(record.get(key), str):
        raise UserError(f'{path}: record {i} has no {key!r}')
  return records


def _read_metrics(path: Path) -> list[Record]:
  """The rows of a metrics file by epoch; a resumed epoch's last row counts."""
  lines = path.read_text(encoding='utf-8', errors='replace').split('\n')
  rows = {}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      rows[int(row['epoch'])] = row
    except (ValueError, TypeError, KeyError) as error:
      # The last line of a run in progress may still be half written.
      if number == len(lines):
        break
      raise UserError(
        f'{path}, line {number}: not a JSON object with an "epoch"'
      ) from error
  return [rows[epoch] for epoch in sorted(rows)]


def _stage_folders(folder: Path) -> dict[str, Path]:
  """The `<k>_<stage>` folders, in the order of k."""
  found = []
  for path in folder.iterdir():
    match = STAGE_FOLDER.fullmatch(path.name)
    if match and path.is_dir():
      found.append((int(match[1]), match[2], path))
  return {stage: path for _, stage, path in sorted(found)}


def _load_results(workdir: Path) -> list[Record]:
  files = sorted(
    workdir.rglob('results.json'), key=lambda p: (p.stat().st_mtime_ns, str(p))
  )
  return merge(_read_results(path) for path in files)


def merge(groups: Iterable[Iterable[Record]]) -> list[Record]:
  """All records, the later group's where two measure the same thing."""
  merged: dict[tuple, Record] = {}
  for group in groups:
    for record in group:
      merged[tuple(record.get(key) for key in IDENTITY)] = record
  return list(merged.values())


class Workdir:
  """What was found below a work directory."""

  def __init__(self, path: Path) -> None:
    self.path = path
    if not path.is_dir():
      raise UserError(f'{path}: no such folder')
    self.records = _load_results(path)
    config = path / 'config.json'
    self.config = _read_object(config) if config.is_file() else {}
    main = _stage_folders(path)
    others = {
      folder.name: stages
      for folder in sorted(path.iterdir())
      if folder.is_dir()
      and not STAGE_FOLDER.fullmatch(folder.name)
      and (stages := _stage_folders(folder))
    }
    self.main_run = self._main_run(main, others)
    # The main run comes first in every table and picture.
    self.folders = {self.main_run: main} | others
    if not (self.records or self.config or main or others):
      raise UserError(
        f'{path}: nothing to report; looked for results.json (at any depth), '
        'config.json, and stage folders such as 1_pretrain and '
        'natural/1_supervised'
      )
    self.runs = list(
      dict.fromkeys([*self.folders, *_runs_in_order(self.records)])
    )

  def _main_run(
    self, main: Mapping[str, Path], others: Mapping[str, Any]
  ) -> str:
    for folder in main.values():
      for name in ('model/model.json', 'examples.json'):
        if (folder / name).is_file():
          run = _read_object(folder / name).get('run')
          if isinstance(run, str):
            return run
    recorded = [r for r in _runs_in_order(self.records) if r not in others]
    return recorded[0] if recorded else 'ours'

  def metrics(self, run: str, stage: str) -> list[Record]:
    path = self.folders.get(run, {}).get(stage)
    path = path and path / 'metrics.jsonl'
    return _read_metrics(path) if path and path.is_file() else []

  def model(self, run: str, stage: str) -> Record:
    path = self.folders.get(run, {}).get(stage)
    path = path and path / 'model' / 'model.json'
    return _read_object(path) if path and path.is_file() else {}

  def examples(self, run: str, stage: str) -> Record:
    path = self.folders.get(run, {}).get(stage)
    path = path and path / 'examples.json'
    return _read_object(path) if path and path.is_file() else {}

  def stages(self, run: str) -> list[str]:
    """A run's stages in order: its folders, its plan, then its records."""
    planned = self.config.get('stages') if run == self.main_run else None
    if not isinstance(planned, list | tuple):
      planned = []
    names = [name for name in planned if isinstance(name, str)]
    names += [name for name in self.folders.get(run, {}) if name not in names]
    recorded = {r['stage']: 0 for r in self.records if r['run'] == run}
    return names + [s for s in _stage_order(recorded) if s not in names]


def _runs_in_order(records: Sequence[Record]) -> list[str]:
  runs = dict.fromkeys(record['run'] for record in records)
  return sorted(runs, key=lambda run: run != 'ours')


def _stage_order(stages: Iterable[str]) -> list[str]:
  """The method's stages in its order, then a user's own as they come."""
  names = list(dict.fromkeys(stages))
  rank = {name: i for i, name in enumerate(STAGES)}
  return sorted(names, key=lambda name: rank.get(name, len(STAGES)))


# Choosing records.


def _attack_of(record: Record) -> tuple:
  return tuple(record.get(key) for key in ('attack', 'norm', 'eps', 'n'))


def _main_split(records: Sequence[Record]) -> str:
  splits = [record['split'] for record in records]
  return 'test' if 'test' in splits or not splits else splits[0]


def _headline(records: Sequence[Record], split: str) -> tuple | None:
  """The evaluation that most models have: the one the tables compare.

  Of equals, the one on more images, then the one recorded first.
  """
  counts: dict[tuple, int] = {}
  for record in records:
    if record['split'] == split and record['selection'] == 'last':
      key = _attack_of(record)
      counts[key] = counts.get(key, 0) + 1
  if not counts:
    return None
  return max(counts, key=lambda key: (counts[key], key[3] or 0))


def _pick(
  records: Sequence[Record],
  run: str,
  stage: str,
  selection: str,
  split: str,
  headline: tuple | None,
) -> Record | None:
  """The headline evaluation of a model, or its own on the most images."""
  wanted = (run, stage, selection, split)
  found = [
    r
    for r in records
    if (r['run'], r['stage'], r['selection'], r['split']) == wanted
  ]
  for record in found:
    if _attack_of(record) == headline:
      return record
  return max(found, key=lambda r: r.get('n') or 0, default=None)


# Text.


def _number(value: Any, digits: int = 2) -> str:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return '–'
  return f'{value:.{digits}f}' if math.isfinite(value) else str(value)


def _plain(value: Any) -> str:
  if value is None:
    return '–'
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def _sparsity(value: Any) -> str:
  known = isinstance(value, int | float)
  return f'{round(100 * value, 1):g}' if known else '–'


def eps_text(eps: Any) -> str:
  """0.0313725 -> '0.03137 = 8/255'; 0.031, no such fraction -> '0.031'."""
  if isinstance(eps, bool) or not isinstance(eps, int | float):
    return '–'
  n = round(eps * 255)
  exact = n > 0 and abs(eps * 255 - n) < 1e-3
  return f'{eps:.4g} = {n}/255' if exact else f'{eps:.4g}'


def dataset_text(name: Any) -> str:
  return DATASETS.get(name, str(name)) if name else 'unknown'


def _attack_text(record: Record) -> str:
  return (
    f'{record.get("attack", "unknown attack")} '
    f'({record.get("norm", "unknown norm")}, eps {eps_text(record.get("eps"))})'
  )


def _cell(text: str) -> str:
  return text.replace('|', '\\|').replace('\n', ' ')


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int):
  """A Markdown table; columns after the first `left` are right-aligned."""
  marks = [' --- ' if i < left else ' ---: ' for i in range(len(header))]
  lines = ['| ' + ' | '.join(header) + ' |', '|' + '|'.join(marks) + '|']
  lines += ['| ' + ' | '.join(map(_cell, row)) + ' |' for row in rows]
  return '\n'.join(lines)


ACCURACIES = ('clean_top1', 'clean_top5', 'robust_top1', 'robust_top5')

MAIN_HEADER = (
  'run',
  'stage',
  'sparsity %',
  'clean top-1',
  'clean top-5',
  'robust top-1',
  'robust top-5',
  'attack',
  'n',
)


def _main_row(record: Record, headline: tuple | None) -> list[str]:
  attack = str(record.get('attack', '–'))
  if headline and (record.get('norm'), record.get('eps')) != headline[1:3]:
    attack = _attack_text(record)
  return [
    record['run'],
    record['stage'],
    _sparsity(record.get('sparsity')),
    *(_number(record.get(key)) for key in ACCURACIES),
    attack,
    _plain(record.get('n')),
  ]


def _caption(
  shown: Sequence[Record], split: str, headline: tuple | None
) -> str:
  """One line saying what the numbers of a table are."""
  usual = next(r for r in shown if _attack_of(r) == headline)
  mixed = any(_attack_of(r) != headline for r in shown)
  datasets = dict.fromkeys(dataset_text(r.get('dataset')) for r in shown)
  return (
    f'selection: last; split: {split}; attack: {_attack_text(usual)}; '
    f'n: {_plain(usual.get("n"))}'
    f'{" (unless a row says otherwise)" if mixed else ""}; '
    f'dataset: {", ".join(datasets)}'
  )


def terminal_table(records: Sequence[Record]) -> str:
  """The main table in plain text, for the end of a training run."""
  records = merge([records])
  split = _main_split(records)
  headline = _headline(records, split)
  shown = []
  for run in _runs_in_order(records):
    for stage in _stage_order(r['stage'] for r in records if r['run'] == run):
      record = _pick(records, run, stage, 'last', split, headline)
      if record:
        shown.append(record)
  if not shown:
    return 'No evaluation yet.'
  table = [list(MAIN_HEADER), *(_main_row(r, headline) for r in shown)]
  return f'{_aligned(table, {0, 1, 7})}\n{_caption(shown, split, headline)}'


def evaluation_table(records: Sequence[Record]) -> str:
  """All records of one evaluation in plain text, a row each."""
  header = ('run', 'stage', 'selection', 'split', 'n', 'attack')
  accuracies = ('clean_top1', 'clean_top5', 'robust_top1', 'robust_top5')
  table = [[*header, *(a.replace('_top', ' top-') for a in accuracies)]]
  for record in records:
    texts = [str(record[k]) for k in header[:-1]]
    numbers = [_number(record[k]) for k in accuracies]
    table.append([*texts, _attack_text(record), *numbers])
  return _aligned(table, set(range(len(header))))


def _aligned(table: Sequence[Sequence[str]], left: set[int]) -> str:
  """Rows as columns of text, a rule below the first."""
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = []
  for row in table:
    cells = [
      cell.ljust(width) if i in left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append('  '.join(cells).rstrip())
  lines.insert(1, '  '.join('-' * width for width in widths))
  return '\n'.join(lines)


# Curves.


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


def _column(rows: Sequence[Record], key: str) -> list[float]:
  values = (row.get(key) for row in rows)
  return [float(v) if isinstance(v, int | float) else math.nan for v in values]


def _curve(run: str, rows: Sequence[Record], split: str) -> figures.Curve:
  return figures.Curve(
    run,
    _column(rows, 'epoch'),
    _column(rows, 'loss'),
    _column(rows, f'{split}_clean_top1'),
    _column(rows, f'{split}_robust_top1'),
  )


def _curve_split(rows: Iterable[Record], preferred: str) -> str:
  """Which accuracy was followed during training: 'validation' or 'test'."""
  seen = {key for row in rows for key in row}
  order = sorted(('validation', 'test'), key=lambda s: s != preferred)
  for split in order:
    if f'{split}_clean_top1' in seen:
      return split
  return preferred


def published_curves() -> Record:
  text = resources.files('rocl_jax') / 'published' / 'curves.json'
  return json.loads(text.read_text(encoding='utf-8'))


def _published_stage(rows: Record, run: str) -> figures.Curve:
  epochs = np.array(rows['epoch'], float)

  def column(key: str) -> list[float]:
    values = rows.get(key, [None] * len(epochs))
    return [math.nan if value is None else value for value in values]

  return figures.Curve(
    run,
    list(epochs / epochs.max()),
    column('loss'),
    column('clean_top1'),
    column('robust_top1'),
  )


def _planned_epochs(config: Mapping, stage: str, done: float) -> float:
  """How long the stage is to be; a run in progress has not got there yet."""
  settings = config.get(stage)
  planned = (
    settings.get('total_epochs') if isinstance(settings, Mapping) else None
  )
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
    _number(rank) if math.isfinite(rank) else '–',
  ]


# The report.


class _Writer:
  """Collects Markdown and writes the pictures it refers to."""

  def __init__(self, folder: Path) -> None:
    self.folder = folder
    self.parts: list[str] = []

  def text(self, *parts: str) -> None:
    self.parts += parts

  def picture(self, name: str, alt: str, figure: Figure) -> None:
    path = self.folder / 'figures' / f'{name}.png'
    path.parent.mkdir(exist_ok=True)
    _replace(path, lambda tmp: figure.savefig(tmp, dpi=figures.DPI))
    self.text(f'![{alt}](figures/{name}.png)')

  def save(self) -> str:
    path = self.folder / 'report.md'
    content = '\n\n'.join(self.parts) + '\n'
    _replace(path, lambda tmp: tmp.write_text(content, encoding='utf-8'))
    return str(path)


def _replace(path: Path, write_to: Callable[[Path], object]) -> None:
  """Writes beside `path` and renames: a reader never sees half a file."""
  temporary = path.with_name(f'.{os.getpid()}.{path.name}')
  try:
    write_to(temporary)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write(workdir: str) -> str:
  """Writes `report.md` and its pictures; the path of the report."""
  work = Workdir(Path(workdir))
  split = _main_split(work.records)
  headline = _headline(work.records, split)
  out = _Writer(work.path)
  _header(out, work, split, headline)
  shown = _main_results(out, work, split, headline)
  shown += _selections(out, work, split, headline)
  _curves(out, work)
  _published(out, work)
  _examples(out, work)
  _density(out, work)
  _others(out, work, shown)
  _protocol(out, work)
  return out.save()


def _models(work: Workdir) -> Iterator[Record]:
  for run in work.runs:
    for stage in reversed(work.stages(run)):
      if model := work.model(run, stage):
        yield model


def _datasets(work: Workdir) -> list[str]:
  names = [r.get('dataset') for r in work.records]
  names += [model.get('dataset') for model in _models(work)]
  if not any(names):
    data = work.config.get('data')
    names = [data.get('source') if isinstance(data, Mapping) else None]
  return list(dict.fromkeys(str(name) for name in names if name))


def _header(
  out: _Writer, work: Workdir, split: str, headline: tuple | None
) -> None:
  config = work.config
  title = config.get('name') or work.path.resolve().name
  network = config.get('model')
  network = network if isinstance(network, Mapping) else {}
  lines = [f'- Main run: `{work.main_run}`']
  datasets = ', '.join(map(dataset_text, _datasets(work))) or 'unknown'
  shapes = [m['image_shape'] for m in _models(work) if m.get('image_shape')]
  if shapes:
    datasets += f', images of {" × ".join(map(str, shapes[0]))}'
  lines.append(f'- Data set: {datasets}')
  text = str(network.get('name', 'unknown'))
  if 'width' in network:
    text += f', width {network["width"]}'
  sizes = [r['parameters'] for r in work.records if r.get('parameters')]
  if sizes:
    text += f', {sizes[0]:,} parameters'
  lines.append(f'- Network: {text}')
  prune = config.get('prune')
  if isinstance(prune, Mapping) and isinstance(prune.get('keep'), int | float):
    lines.append(f'- Pruning keeps {100 * prune["keep"]:.4g} % of the weights')
  if 'seed' in config:
    lines.append(f'- Seed: {config["seed"]}')
  for record in work.records:
    if _attack_of(record) == headline:
      lines.append(f'- Attack of the main table: {_attack_text(record)}')
      break
  out.text(f'# Report: {title}', '\n'.join(lines))
  stages = work.stages(work.main_run)
  if stages:
    texts = [(s, *STAGE_TEXTS.get(s, ('', '', ''))) for s in stages]
    alt = f'The stages of the run: {", ".join(stages)}'
    out.picture('overview', alt, figures.overview(texts))
  known = [f'- `{run}`: {RUNS[run]}' for run in work.runs if run in RUNS]
  if len(work.runs) > 1 and known:
    out.text('Runs:', '\n'.join(known))


def _main_results(
  out: _Writer, work: Workdir, split: str, headline: tuple | None
) -> list[Record]:
  rows, shown = [], []
  for run in work.runs:
    for stage in work.stages(run):
      record = _pick(work.records, run, stage, 'last', split, headline)
      if record:
        shown.append(record)
        rows.append(_main_row(record, headline))
        continue
      if stage == 'pretrain':
        state = 'no classifier in this stage'
        if 'rocl' in work.runs and run != 'rocl':
          state += '; see run rocl, stage linear_eval'
      elif stage in work.folders.get(run, {}):
        state = 'not evaluated yet'
      else:
        state = 'not started'
      rows.append([run, stage, *['–'] * 5, state, '–'])
  out.text('## Results')
  if not shown:
    out.text('No model has been evaluated yet.')
  else:
    caption = _caption(shown, split, headline)
    out.text(f'Percent of images; {caption}.')
  if rows:
    out.text(_table(MAIN_HEADER, rows, 2))
  drawn = [
    figures.Result(
      record['run'],
      record['stage'],
      record.get('sparsity') or 0.0,
      float(record['clean_top1']),
      float(record['robust_top1']),
      _note(record, headline),
    )
    for record in shown
    if np.isfinite(_column([record], 'clean_top1')).all()
    and np.isfinite(_column([record], 'robust_top1')).all()
  ]
  if drawn:
    datasets = dict.fromkeys(_short_dataset(r.get('dataset')) for r in shown)
    record = next(r for r in shown if _attack_of(r) == headline)
    title = f'Accuracy on {", ".join(datasets)}, clean and under attack'
    subtitle = f'{_attack_text(record)}, {record.get("n")} {split} images'
    out.picture(
      'results',
      'Clean and robust accuracy of every model',
      figures.results(drawn, title, subtitle),
    )
  return shown


def _note(record: Record, headline: tuple | None) -> str:
  """What sets a model's evaluation apart from the headline, in few words."""
  attack, norm, eps, n = headline or (None,) * 4
  parts = []
  if record.get('attack') != attack:
    parts.append(str(record.get('attack')))
  if record.get('norm') != norm:
    parts.append(str(record.get('norm')))
  if record.get('eps') != eps:
    parts.append(f'eps {eps_text(record.get("eps"))}')
  if record.get('n') != n:
    parts.append(f'{_plain(record.get("n"))} images')
  return ', '.join(parts)


def _short_dataset(name: Any) -> str:
  return {'digits': 'handwritten digits', 'cifar10': 'CIFAR-10'}.get(
    name, str(name)
  )


def _selections(
  out: _Writer, work: Workdir, split: str, headline: tuple | None
) -> list[Record]:
  rows, shown = [], []
  present = {r['selection'] for r in work.records if r['split'] == split}
  names = [name for name in SELECTIONS if name in present]
  if len(names) < 2:
    return []
  for run in work.runs:
    for stage in work.stages(run):
      picked = [
        _pick(work.records, run, stage, name, split, headline) for name in names
      ]
      if not any(picked):
        continue
      row = [run, stage]
      for record in picked:
        record = record or {}
        row += [
          _plain(record.get('epoch')),
          _number(record.get('clean_top1')),
          _number(record.get('robust_top1')),
        ]
      rows.append(row)
      shown += [record for record in picked if record]
  header = ['run', 'stage']
  for name in names:
    header += [f'{name}: epoch', 'clean', 'robust']
  out.text(
    '## Which epoch',
    f'Top-1 accuracy on the {split} images of the model that each rule '
    'selects:',
    '\n'.join(f'- `{name}`: {SELECTIONS[name]}' for name in names),
    _table(header, rows, 2),
  )
  return shown


def _curves(out: _Writer, work: Workdir) -> None:
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
  for stage in work.stages(work.main_run):
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
      f'Training loss, and accuracy on the {split} images after each epoch.',
    )
    out.picture(
      'curves',
      'Loss and accuracy by epoch, a column for each stage',
      figures.curves(stages, split),
    )


def _published(out: _Writer, work: Workdir) -> None:
  """The published runs are on CIFAR-10: nothing else is set against them."""
  if _datasets(work) != ['cifar10']:
    return
  metrics = {
    s: work.metrics(work.main_run, s) for s in work.stages(work.main_run)
  }
  metrics = {stage: rows for stage, rows in metrics.items() if rows}
  published = published_curves()
  name = 'ours' if 'pretrain' in metrics else 'baseline2'
  reference = published['runs'][name]
  split = _curve_split((r for rows in metrics.values() for r in rows), 'test')
  stages, rows = {}, []
  for stage, measured in metrics.items():
    if stage not in reference['stages']:
      continue
    here = _curve(work.main_run, measured, split)
    length = _planned_epochs(work.config, stage, max(here.x)) or 1
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
  out.text(
    '## Shape against the published curves',
    f'Published: {reference["title"]} (epochs: {lengths}), full-size network '
    f'and all of CIFAR-10. This run has a scale of its own, so the level of a '
    'curve need not agree; its shape should. Accuracy of this run is on '
    f'{split} images, the published one on test images.',
  )
  out.picture(
    'published',
    'This run and the published one by the fraction of each stage',
    figures.against_published(stages, split, reference['title']),
  )
  out.text(
    'First → last measured epoch, the published values at the same fractions '
    'of the stage, and the rank correlation (Spearman) of the two curves. It '
    'ranks only noise where a curve is flat, as the published fine-tuning is.',
    _table(
      ['stage', 'quantity', 'this run', 'published', 'rank correlation'],
      rows,
      2,
    ),
    published['source'],
    '\n'.join(f'- {key}: {note}' for key, note in published['notes'].items()),
  )


def _examples(out: _Writer, work: Workdir) -> None:
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
        'Clean images above, the same images under attack below; ✓ and green: '
        'predicted right, ✗ and red: predicted wrong.',
      )
      titled = True
    attack = f'{data.get("attack", "attack")}, eps {eps_text(data.get("eps"))}'
    images = [
      figures.Example(*(image[key] for key in figures.Example._fields))
      for image in data['images']
    ]
    title = f'run {run}, stage {stage}: {attack}'
    out.picture(
      f'examples_{_file_name(run)}_{_file_name(stage)}',
      f'Predictions of {run}, {stage}',
      figures.examples(images, data.get('class_names', []), title),
    )


def _file_name(text: str) -> str:
  return re.sub(r'[^A-Za-z0-9._-]', '_', text)


def _density(out: _Writer, work: Workdir) -> None:
  pruned = [
    model
    for model in _models(work)
    if (model.get('sparsity') or 0) > 0 and model.get('layers')
  ]
  if not pruned:
    return
  model = pruned[0]
  layers = {
    name: (int(layer['size']), int(layer['kept']))
    for name, layer in model['layers'].items()
  }
  which = f'run {model.get("run")}, stage {model.get("stage")}'
  size = sum(size for size, _ in layers.values())
  kept = sum(kept for _, kept in layers.values())
  rows = [
    [name, f'{s:,}', f'{k:,}', _number(100 * k / s if s else None)]
    for name, (s, k) in [*layers.items(), ('total', (size, kept))]
  ]
  out.text('## Density by layer', f'The pruned model of {which}.')
  out.picture(
    'density',
    'Weights and kept weights of each layer',
    figures.density(layers, f'{which}: {kept:,} of {size:,} weights kept'),
  )
  out.text(_table(['layer', 'weights', 'kept', 'kept %'], rows, 1))


def _others(out: _Writer, work: Workdir, shown: Sequence[Record]) -> None:
  """Every record that no table above has: nothing measured goes unsaid."""
  used = {id(record) for record in shown}
  rows = [
    [
      r['run'],
      r['stage'],
      r['selection'],
      r['split'],
      _attack_text(r),
      _plain(r.get('n')),
      *(_number(r.get(key)) for key in ACCURACIES),
    ]
    for r in work.records
    if id(r) not in used
  ]
  if rows:
    header = ['run', 'stage', 'selection', 'split', 'attack', 'n']
    header += [key.replace('_top', ' top-') for key in ACCURACIES]
    out.text('## Other evaluations', _table(header, rows, 5))


def _protocol(out: _Writer, work: Workdir) -> None:
  groups: dict[tuple[str, ...], dict[str, None]] = {}
  for record in work.records:
    cells = [_plain(record.get(key)) for key in PROTOCOL]
    cells[PROTOCOL.index('eps')] = eps_text(record.get('eps'))
    groups.setdefault(tuple(cells), {})[record['run']] = None
  if groups:
    header = [key.replace('_', ' ') for key in PROTOCOL] + ['runs']
    rows = [[*cells, ', '.join(runs)] for cells, runs in groups.items()]
    out.text(
      '## Protocol',
      'How the accuracies above were measured:',
      _table(header, rows, 2),
    )


def main(arguments: list[str]) -> None:
  (workdir,) = arguments
  path = write(workdir)
  print(terminal_table(_load_results(Path(workdir))))
  print(f'\nReport, curves and pictures: {path}')


if __name__ == '__main__':
  command.run(main, usage=__doc__ or '', positional=(1,))
