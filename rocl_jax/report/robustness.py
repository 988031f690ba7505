"""What the attacks found: ensembles, audits, classes, transfer, corruptions."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from rocl_jax import figures
from rocl_jax.report.reading import Workdir
from rocl_jax.report.records import (
  Record,
  attack_of,
  attacked,
  corrupted,
  strongest,
)
from rocl_jax.report.text import (
  Markup,
  Writer,
  attack_text,
  code,
  column,
  eps_text,
  md,
  number,
  plain,
  table,
)

MODEL = ('run', 'stage', 'selection', 'split')

# With more classes, neither a table nor a cell's number can be read.
MANY_CLASSES = 20
WORST = 10

UNMASKED = 'mask left out'

_EVERYONE: dict[Any, str] = {
  True: 'Images that are wrong without attack were attacked too.',
  False: 'Images that are wrong without attack count as broken at once.',
}


def _model(record: Record) -> list[str]:
  return [str(record[key]) for key in MODEL]


def _measured(record: Record) -> str:
  """Which number a picture or a line is about, in words."""
  run, stage, selection, split = _model(record)
  return (
    f'run {run}, stage {stage}, selection {selection}: {attack_text(record)}, '
    f'{plain(record.get("n"))} {split} images'
  )


# Ensembles.


def ensembles(out: Writer, work: Workdir) -> None:
  """What was left after each attack of an ensemble, by ensemble."""
  groups: dict[str, list[Record]] = {}
  for record in work.in_order(work.records):
    if record.get('members') and not corrupted(record):
      what = [attack_of(record)[:3], record.get('everyone')]
      what += [_without(m, 'robust_top1') for m in record['members']]
      groups.setdefault(json.dumps(what), []).append(record)
  if groups:
    out.text('## Attack by attack')
  for group in groups.values():
    members = group[0]['members']
    rows = []
    for r in group:
      after = [number(m.get('robust_top1')) for m in r['members']]
      clean = number(r.get('clean_top1'))
      rows.append([*_model(r), plain(r.get('n')), clean, *after])
    names = [member['attack'] for member in members]
    out.text(
      f'{md(attack_text(group[0]))}: top-1 accuracy in percent after each of '
      'its attacks, which see only the images that withstood all before them. '
      + _EVERYONE.get(group[0].get('everyone'), ''),
      table([*MODEL, 'n', 'clean', *names], rows, len(MODEL)),
      '\n'.join(f'- {_member(member)}' for member in members),
    )


def _without(record: Record, *keys: str) -> Record:
  return {k: v for k, v in record.items() if k not in keys}


def _member(member: Record) -> str:
  """'`apgd-ce`: apgd, linf, eps 0.1, steps 100'."""
  known = ('attack', 'algorithm', 'norm', 'eps', 'robust_top1')
  texts = [str(member[key]) for key in known[1:3] if member.get(key)]
  if 'eps' in member:
    texts.append(f'eps {eps_text(member["eps"])}')
  rest = _without(member, *known).items()
  texts += [f'{k.replace("_", " ")} {plain(v)}' for k, v in rest]
  return f'{code(member["attack"])}: {md(", ".join(texts))}'


# The audit.


def audit(out: Writer, work: Workdir) -> None:
  """Security curves, and whether the attack behaves as an attack must."""
  if not work.audits:
    return
  out.text(
    '## Audit of the attack',
    'An attack that finds little proves little. It must find more with a '
    'larger radius, more steps and more restarts, and everything in a ball '
    'that is large enough.',
  )
  lines = _checks(work.audits)
  if lines:
    out.text('\n'.join(lines))
  groups: dict[tuple, list[Record]] = {}
  for found in work.audits:
    if any(found.get('curves', {}).values()):
      key = (found['attack'], found.get('norm'), found['split'])
      groups.setdefault(key, []).append(found)
  for i, ((attack, norm, split), group) in enumerate(groups.items(), 1):
    sizes = sorted({found['n'] for found in group})
    images = ' or '.join(f'{n}' for n in sizes)
    out.picture(
      f'security_{i}' if len(groups) > 1 else 'security',
      f'Accuracy under {attack} ({norm}) by radius and by steps',
      figures.security,
      [_security_curve(found) for found in group],
      f'{attack} ({norm}), {images} {split} images',
    )
  rows = []
  for found in work.audits:
    for name, points in found.get('curves', {}).items():
      values = [f'{plain(p[name])}: {number(p["robust_top1"])}' for p in points]
      rows.append([*_model(found), found['attack'], name, ', '.join(values)])
  if rows:
    header = [*MODEL, 'attack', 'by', 'top-1 accuracy, %']
    out.text(table(header, rows, len(header)))


def _checks(audits: Sequence[Record]) -> list[str]:
  """A line a model: how many passed, and which failed, those first."""
  lines = []
  for found in audits:
    checks = found.get('checks', [])
    failed = [check for check in checks if not check['passed']]
    text = f'{len(checks) - len(failed)} of {len(checks)} checks passed'
    if failed:
      named = [
        f'**{md(c["check"])}** (found: {md(plain(c.get("found")))}; wanted: '
        f'{md(plain(c.get("wanted")))})'
        for c in failed
      ]
      text = f'**{text}**; failed: {"; ".join(named)}'
    if checks:
      mark = '✗' if failed else '✓'
      lines.append(f'- {mark} {md(_measured(found))}: {text}')
  return sorted(lines, key=lambda line: line.startswith('- ✓'))


def _security_curve(found: Record) -> figures.SecurityCurve:
  curves = found.get('curves', {})
  label = f'{found["run"]}, {found["stage"]}'
  if found['selection'] != 'last':
    label += f', {found["selection"]}'

  def points(name: str) -> tuple[list[float], list[float]]:
    rows = sorted(curves.get(name, []), key=lambda point: point[name])
    return column(rows, name), column(rows, 'robust_top1')

  return figures.SecurityCurve(
    found['run'],
    label,
    found.get('eps'),
    eps_text(found.get('eps')),
    points('eps'),
    points('steps'),
  )


# Classes.


def classes(out: Writer, work: Workdir) -> None:
  """The main run's last model, class by class."""
  known = [
    r
    for r in work.records
    if (r['run'], r['split']) == (work.main_run, work.split)
    and r['selection'] == 'last'
    and any(r.get(key) for key in ('per_class', 'confusion', 'confused'))
  ]
  stages = work.stages(work.main_run)
  last = max((stages.index(r['stage']) for r in known), default=None)
  known = [r for r in known if stages.index(r['stage']) == last]
  most = max((r.get('n') or 0 for r in known), default=0)
  record = strongest(
    [r for r in known if (r.get('n') or 0) == most], work.headline
  )
  if record is None:
    return
  out.text('## Class by class', f'{md(_measured(record))}.')
  if record.get('per_class'):
    _class_table(out, record)
  if record.get('confusion'):
    counts = np.array(record['confusion'], float)
    kept = (
      'An image that is wrong without attack is in the column of the class '
      'that it has without it. '
      if record.get('everyone') is False
      else ''
    )
    out.text(
      'Confusion: a row for each true class, a column for the class of the '
      f'{"adversarial image" if attacked(record) else "image"}. {kept}'
      f'{figures.CONFUSION_COLOURS}'
    )
    out.picture(
      'confusion',
      f'Confusion matrix, {_measured(record)}',
      figures.confusion,
      counts,
      _class_names(record, len(counts)),
      _measured(record),
      numbers=len(counts) <= MANY_CLASSES,
    )
  elif record.get('confused'):
    pairs = sorted(record['confused'], key=lambda p: -p[2])[:WORST]
    names = _class_names(record, 1 + max(max(p[:2]) for p in pairs))
    out.text(
      f'The {len(pairs)} most frequent confusions:',
      table(
        ['class', 'taken for', 'images'],
        [[names[a], names[b], plain(count)] for a, b, count in pairs],
        2,
      ),
    )


def _class_names(record: Record, count: int) -> list[str]:
  names = record.get('class_names') or [''] * count
  return [str(name) or f'class {k}' for k, name in enumerate(names)]


def _class_table(out: Writer, record: Record) -> None:
  found = record['per_class']
  count = len(found['n'])
  names = _class_names(record, count)
  wrong = _wrong(record)
  shown = list(range(count))
  if count > MANY_CLASSES:
    key = 'robust_top1' if attacked(record) else 'clean_top1'
    shown = [k for k in shown if found[key][k] is not None]
    shown = sorted(shown, key=lambda k: found[key][k])[:WORST]
    out.text(f'The {len(shown)} worst of {count} classes:')
  rows = []
  for k in shown:
    taken = '–'
    if wrong.get(k) and found['n'][k]:
      other, images = max(wrong[k].items(), key=lambda pair: pair[1])
      taken = f'{names[other]} ({100 * images / found["n"][k]:.0f} %)'
    rows.append(
      [
        names[k],
        plain(found['n'][k]),
        number(found['clean_top1'][k]),
        number(found['robust_top1'][k] if attacked(record) else None),
        taken,
      ]
    )
  header = ['class', 'n', 'clean top-1', 'robust top-1', 'most often taken for']
  out.text(table(header, rows, 1))


def _wrong(record: Record) -> dict[int, dict[int, float]]:
  """{label: {another class: images}}, as far as it is known."""
  pairs = record.get('confused')
  if pairs is None:
    matrix = np.array(record.get('confusion') or np.zeros((0, 0)), float)
    np.fill_diagonal(matrix, 0)
    places = np.argwhere(matrix).tolist()
    pairs = [(a, b, float(matrix[a, b])) for a, b in places]
  wrong: dict[int, dict[int, float]] = {}
  for label, other, images in pairs:
    wrong.setdefault(label, {})[other] = images
  return wrong


# Transfer.


def transfer(out: Writer, work: Workdir) -> None:
  """Images made on one model and shown to another, by attack."""
  groups: dict[tuple, list[Record]] = {}
  for r in work.transfers:
    groups.setdefault((*attack_of(r), r['split']), []).append(r)
  if groups:
    out.text(
      '## Transfer',
      'Adversarial images that were made on one model and scored on another. '
      'The white box, where both are the same, should be the hardest.',
    )
  if any(not r['masked'] for r in work.transfers):
    out.text(
      f'**“{UNMASKED}”: the dense weights of a pruned network were scored, '
      'without its mask, as for the published Table 4. That is an artefact: '
      'it says nothing of the pruned network.**'
    )
  for i, group in enumerate(groups.values(), 1):
    sources = _named(
      [(r['source_name'], r['source_fingerprint'], True) for r in group]
    )
    targets = _named(
      [(r['target_name'], r['target_fingerprint'], r['masked']) for r in group]
    )
    record = group[0]
    measured = (
      f'{attack_text(record)}, {plain(record["n"])} {record["split"]} images'
    )
    out.text(f'{md(measured)}:')
    rows, cells, clean = [], {}, {}
    for r in group:
      source = sources[r['source_name'], r['source_fingerprint'], True]
      target = targets[r['target_name'], r['target_fingerprint'], r['masked']]
      # The images were made on the masked network, in any case.
      white_box = r['white_box'] and r['masked']
      cells[source, target] = (_or_nan(r, 'robust_top1'), white_box)
      clean[target] = _or_nan(r, 'clean_top1')
      rows.append(
        [
          source,
          target,
          'white box' if white_box else '',
          number(r.get('clean_top1')),
          number(r.get('robust_top1')),
        ]
      )
    if len(sources) > 1 and len(targets) > 1:
      out.picture(
        f'transfer_{i}' if len(groups) > 1 else 'transfer',
        f'Accuracy by source and target, {measured}',
        figures.transfer,
        list(sources.values()),
        list(targets.values()),
        cells,
        clean,
        measured,
      )
    header = ['made on', 'scored on', '', 'clean top-1', 'top-1 on these']
    out.text(table(header, rows, 3))


def _named(models: Sequence[tuple]) -> dict[tuple, str]:
  """A name for each model; two of one name also have their fingerprints."""
  names = {}
  for name, fingerprint, masked in dict.fromkeys(models):
    twins = {f for n, f, _ in models if n == name}
    text = f'{name} {str(fingerprint)[:6]}' if len(twins) > 1 else name
    names[name, fingerprint, masked] = text if masked else f'{text}, {UNMASKED}'
  return names


def _or_nan(record: Record, key: str) -> float:
  return column([record], key)[0]


# Common corruptions.


def corruptions(out: Writer, work: Workdir) -> None:
  """A table for each model: corruptions by severity, without attack or with."""
  tables: dict[tuple[str, ...], dict[tuple, float]] = {}
  for r in work.in_order([r for r in work.records if corrupted(r)]):
    cell = (r['corruption'], r['severity'])
    model = (r['run'], r['stage'], r['selection'], plain(r.get('n')))
    clean = tables.setdefault((*model, 'none'), {})
    clean.setdefault(cell, _or_nan(r, 'clean_top1'))
    if attacked(r):
      under = tables.setdefault((*model, attack_text(r)), {})
      under[cell] = _or_nan(r, 'robust_top1')
  if not tables:
    return
  out.text(
    '## Common corruptions',
    'Top-1 accuracy in percent; a mean only where nothing is missing.',
  )
  parts, summary = [], []
  for key, cells in tables.items():
    names = list(dict.fromkeys(name for name, _ in cells))
    levels = sorted({severity for _, severity in cells})
    values = np.array(
      [[cells.get((n, s), np.nan) for s in levels] for n in names]
    )
    rows = np.column_stack([values, values.mean(axis=1)])
    rows = np.vstack([rows, rows.mean(axis=0)])
    run, stage, selection, n, attack = key
    parts += [
      md(f'Run {run}, stage {stage}, selection {selection}; attack: {attack}')
      + f'; {n} images of each:',
      table(
        ['corruption', *(f'severity {s}' for s in levels), 'mean'],
        [
          [name, *(number(None if np.isnan(x) else x) for x in row.tolist())]
          for name, row in zip([*names, Markup('**mean**')], rows, strict=True)
        ],
        1,
      ),
    ]
    mean = float(rows[-1, -1])
    size = f'{len(names)} × {len(levels)}'
    summary.append([*key, size, number(None if np.isnan(mean) else mean)])
  if len(tables) > 1:
    header = ['run', 'stage', 'selection', 'n', 'attack']
    header += ['corruptions × severities', 'mean']
    out.text(table(header, summary, 5))
  out.text(*parts)
