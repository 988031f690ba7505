"""What was measured: one table that compares, and all the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rocl_jax import figures
from rocl_jax.figures import printable
from rocl_jax.report.reading import Workdir
from rocl_jax.report.records import (
  ACCURACIES,
  Record,
  apart,
  attack_of,
  attacked,
  corrupted,
  find_headline,
  main_split,
  merge,
  newest,
  pick,
  runs_in_order,
  shortened,
  stage_order,
)
from rocl_jax.report.text import (
  Writer,
  accuracies,
  aligned,
  attack_text,
  code,
  column,
  dataset_text,
  eps_text,
  md,
  number,
  plain,
  short_dataset,
  sparsity,
  table,
  terminal,
  told,
)
from rocl_jax.report.verdicts import MARK, collapse, marked, notes

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
  'last': 'the last epoch',
  'best_validation': 'most robust on validation images, held out of the '
  'training set; of equals the first',
  'best_test': 'most robust on the test images, for comparison with the paper '
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
  'everyone',
)

# An image that is wrong without attack need not be attacked to be broken.
_ATTACKED: dict[Any, str] = {True: 'all', False: 'those right without attack'}

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
    attack = attack_text(record)
  return [
    record['run'],
    marked(record),
    sparsity(record.get('sparsity')),
    *accuracies(record),
    attack,
    plain(record.get('n')),
  ]


def _strong(records: Sequence[Record], record: Record) -> Record | None:
  """AutoAttack of the same model in the same ball, on the most images; None
  beside itself."""
  if record.get('attack') == 'autoattack':
    return None
  same = ('run', 'stage', 'selection', 'fingerprint', 'split', 'norm', 'eps')
  found = [
    r
    for r in records
    if r.get('attack') == 'autoattack'
    and all(r.get(key) == record.get(key) for key in same)
  ]
  return max(found, key=lambda r: r.get('n') or 0, default=None)


def _beside(
  header: Sequence[str],
  rows: Sequence[list[str]],
  strong: Sequence[Record | None],
) -> tuple[list[str], list[list[str]]]:
  """The main table, with AutoAttack's column where any row has it."""
  if not any(strong):
    return list(header), list(rows)
  place, n = header.index('attack'), header.index('n')
  cells = []
  for row, record in zip(rows, strong, strict=True):
    cell = '–'
    if record:
      cell = number(record.get('robust_top1'))
      size = plain(record.get('n'))
      cell += f' (n {size})' if size != row[n] else ''
      cell += ', shortened' if shortened(record) else ''
    cells.append([*row[:place], cell, *row[place:]])
  return [*header[:place], 'AutoAttack top-1', *header[place:]], cells


def _caption(
  shown: Sequence[Record], split: str, headline: tuple | None
) -> str:
  """One line saying what the numbers of a table are."""
  usual = next(r for r in shown if attack_of(r) == headline)
  mixed = any(attack_of(r) != headline for r in shown)
  datasets = dict.fromkeys(dataset_text(r.get('dataset')) for r in shown)
  return (
    f'selection: last; split: {split}; attack: {attack_text(usual)}; '
    f'n: {plain(usual.get("n"))}'
    f'{" (unless a row says otherwise)" if mixed else ""}; '
    f'dataset: {", ".join(datasets)}'
  )


@told
def terminal_table(records: Sequence[Record]) -> str:
  """The main table in plain text, for the end of a training run."""
  last = newest(records)
  records, _ = apart(merge([records]), last)
  split = main_split(records)
  headline = find_headline(records, split)
  shown = []
  for run in runs_in_order(records):
    for stage in stage_order(r['stage'] for r in records if r['run'] == run):
      record = pick(records, run, stage, 'last', split, headline)
      if record:
        shown.append(record)
  if not shown:
    return 'No evaluation yet.'
  strong = [_strong(records, record) for record in shown]
  header, rows = _beside(
    MAIN_HEADER, [_main_row(r, headline) for r in shown], strong
  )
  left = {0, 1, header.index('attack')}
  lines = [aligned([header, *rows], left)]
  lines += [_caption(shown, split, headline)]
  lines += notes([*shown, *filter(None, strong)])
  return '\n'.join([lines[0], *map(terminal, map(printable, lines[1:]))])


@told
def evaluation_table(records: Sequence[Record]) -> str:
  """All records of one evaluation in plain text, a row each.

  Below an ensemble its members, with what had withstood all up to each.
  """
  texts = ('run', 'stage', 'selection', 'split', 'n')
  rows = [[*texts, 'attack', 'sparsity %', *_accuracy_header()]]
  for record in records:
    cells = [plain(record.get(key)) for key in texts]
    cells[1] = marked(record)
    cells += [attack_text(record), sparsity(record.get('sparsity'))]
    rows.append([*cells, *accuracies(record)])
    for member in record.get('members') or ():
      after = number(member.get('robust_top1'))
      name = f'  {member.get("attack")}'
      rows.append([*[''] * len(texts), name, *[''] * 3, after, ''])
  lines = [terminal(printable(line)) for line in notes(records)]
  return '\n'.join([aligned(rows, set(range(len(texts) + 1))), *lines])


@told
def transfer_table(records: Sequence[Record]) -> str:
  """Transfer attacks in plain text: made on the first, scored on the second."""
  header = ('made on', 'scored on', 'split', 'n', 'attack')
  rows = [[*header, 'clean top-1', 'under attack']]
  for record in records:
    target = str(record['target_name'])
    if not record['masked']:
      target += ', mask left out (as the published Table 4: an artefact)'
    if record['white_box']:
      target += ', white box'
    cells = [str(record['source_name']), target, record['split']]
    cells += [plain(record['n']), attack_text(record)]
    cells += [number(record[k]) for k in ('clean_top1', 'robust_top1')]
    rows.append(cells)
  return aligned(rows, set(range(len(header))))


def _accuracy_header() -> list[str]:
  return [key.replace('_top', ' top-') for key in ACCURACIES]


def introduction(out: Writer, work: Workdir) -> None:
  config = work.config
  title = config.get('name') or work.path.resolve().name
  network = config.get('model')
  network = network if isinstance(network, Mapping) else {}
  lines = [f'- Main run: {code(work.main_run)}']
  datasets = ', '.join(map(dataset_text, work.datasets())) or 'unknown'
  shapes = [m['image_shape'] for m in work.models() if m.get('image_shape')]
  if shapes:
    shape = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    datasets += f', images of {" × ".join(map(str, shape))}'
  lines.append(f'- Data set: {md(datasets)}')
  text = str(network.get('name', 'unknown'))
  if 'width' in network:
    text += f', width {network["width"]}'
  sizes = [r['parameters'] for r in work.records if r.get('parameters')]
  if sizes:
    text += f', {sizes[0]:,} parameters'
  lines.append(f'- Network: {md(text)}')
  prune = config.get('prune')
  keep = prune.get('keep') if isinstance(prune, Mapping) else None
  if isinstance(keep, int | float) and 'prune' in work.stages(work.main_run):
    lines.append(f'- Pruning keeps {100 * keep:.4g} % of the weights')
  models = [work.model(work.main_run, s) for s in work.stages(work.main_run)]
  trained: list[Any] = [m.get('config') for m in models]
  trained = [x for x in trained if isinstance(x, Mapping)] or [config]
  seeds = dict.fromkeys(x['seed'] for x in trained if 'seed' in x)
  if seeds:
    lines.append(f'- Seed: {md(", ".join(map(str, seeds)))}')
  for record in work.records:
    if attack_of(record) == work.headline:
      attack = md(attack_text(record))
      lines.append(f'- Attack of the main table: {attack}')
      break
  failed = [
    (audit, check)
    for audit in work.audits
    for check in audit.get('checks', ())
    if not check['passed']
  ]
  if failed:
    which = dict.fromkeys(f'{a["run"]}, {a["stage"]}' for a, _ in failed)
    lines.append(
      f'- **✗ Failed checks of the attack: {len(failed)} '
      f'({md("; ".join(which))}), see “Audit of the attack”**'
    )
  out.text(f'# Report: {md(title)}', '\n'.join(lines))
  stages = work.stages(work.main_run)
  if stages:
    texts = [(s, *STAGE_TEXTS.get(s, ('', '', ''))) for s in stages]
    alt = f'The stages of the run: {", ".join(stages)}'
    out.picture('overview', alt, figures.overview, texts)
  known = [f'- `{run}`: {RUNS[run]}' for run in work.runs if run in RUNS]
  if len(work.runs) > 1 and known:
    out.text('Runs:', '\n'.join(known))


def main_results(out: Writer, work: Workdir) -> list[Record]:
  """The main table and its picture; returns the records that they show."""
  split, headline = work.split, work.headline
  rows, shown, strong = [], [], []
  for run in work.runs:
    for stage in work.stages(run):
      record = pick(work.records, run, stage, 'last', split, headline)
      if record:
        shown.append(record)
        rows.append(_main_row(record, headline))
        strong.append(_strong(work.records, record))
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
      strong.append(None)
  out.text('## Results')
  if not shown:
    out.text('No model has been evaluated yet.')
  else:
    caption = md(_caption(shown, split, headline))
    out.text(f'Percent of images; {caption}.')
  if rows:
    out.text(table(*_beside(MAIN_HEADER, rows, strong), 2))
  lines = [f'- {md(x)}' for x in notes([*shown, *filter(None, strong)])]
  if lines:
    out.text('\n'.join(lines))
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
    if attacked(record)
    and np.isfinite(column([record], 'clean_top1')).all()
    and np.isfinite(column([record], 'robust_top1')).all()
  ]
  if drawn:
    datasets = dict.fromkeys(short_dataset(r.get('dataset')) for r in shown)
    record = next(r for r in shown if attack_of(r) == headline)
    title = f'Accuracy on {", ".join(datasets)}, clean and under attack'
    subtitle = f'{attack_text(record)}, {record.get("n")} {split} images'
    alt = 'Clean and robust accuracy of every model'
    out.picture('results', alt, figures.results, drawn, title, subtitle)
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
    parts.append(f'{plain(record.get("n"))} images')
  collapsed = collapse(record)
  if collapsed:
    parts.append(f'{MARK} {collapsed[0]}')
  return ', '.join(parts)


def selections(out: Writer, work: Workdir) -> list[Record]:
  """What each rule of selection gives; returns the records shown."""
  split, headline = work.split, work.headline
  rows, shown = [], []
  present = {r['selection'] for r in work.records if r['split'] == split}
  names = [name for name in SELECTIONS if name in present]
  if len(names) < 2:
    return []
  for run in work.runs:
    for stage in work.stages(run):
      picked = [
        pick(work.records, run, stage, name, split, headline) for name in names
      ]
      if not any(picked):
        continue
      row = [run, stage]
      for record in picked:
        record = record or {}
        row += [
          plain(record.get('epoch')),
          *accuracies(record)[::2],
        ]
      rows.append(row)
      shown += [record for record in picked if record]
  header = ['run', 'stage']
  for name in names:
    header += [f'{name}: epoch', 'clean', 'robust']
  out.text(
    '## Which epoch',
    f'Top-1 accuracy on the {md(split)} images of the model that each rule '
    'selects:',
    '\n'.join(f'- `{name}`: {SELECTIONS[name]}' for name in names),
    table(header, rows, 2),
  )
  return shown


def others(out: Writer, work: Workdir, shown: Sequence[Record]) -> None:
  """Every record that no table above has: nothing measured goes unsaid."""
  used = {id(record) for record in shown}
  rows: dict[tuple[str, ...], list[str]] = {}  # selections of one epoch: a row
  old = {id(r) for r in work.superseded}
  for r in [*work.records, *work.superseded]:
    if id(r) in old or (id(r) not in used and not corrupted(r)):
      run = r['run']
      if id(r) in old:
        run += f' (weights {plain(r.get("fingerprint"))}, not those of now)'
      cells = [run, r['stage'], plain(r.get('epoch')), r['split']]
      cells += [attack_text(r), plain(r.get('n')), *accuracies(r)]
      rows.setdefault(tuple(cells), []).append(r['selection'])
  if rows:
    header = ['run', 'stage', 'selection', 'epoch', 'split', 'attack', 'n']
    header += _accuracy_header()
    merged = [
      [*cells[:2], ', '.join(dict.fromkeys(names)), *cells[2:]]
      for cells, names in rows.items()
    ]
    out.text('## Other evaluations', table(header, merged, 6))


def protocol(out: Writer, work: Workdir) -> None:
  groups: dict[tuple[str, ...], dict[str, None]] = {}
  for record in work.records:
    cells = [plain(record.get(key)) for key in PROTOCOL]
    cells[PROTOCOL.index('eps')] = eps_text(record.get('eps'))
    cells[PROTOCOL.index('everyone')] = _ATTACKED.get(
      record.get('everyone'), '–'
    )
    if corrupted(record):
      cells[PROTOCOL.index('split')] = 'common corruptions'
    groups.setdefault(tuple(cells), {})[record['run']] = None
  if groups:
    header = [key.replace('_', ' ') for key in PROTOCOL[:-1]]
    header += ['images attacked', 'runs']
    rows = [[*cells, ', '.join(runs)] for cells, runs in groups.items()]
    out.text(
      '## Protocol',
      'How the accuracies above were measured:',
      table(header, rows, 2),
    )
