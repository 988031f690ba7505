"""The paper's tables beside what a reproduction measured."""

import math

from rocl_jax import published
from rocl_jax.report.records import Record
from rocl_jax.report.reproduction import (
  SURROGATE,
  Model,
  Reproduction,
  Value,
  paper_row,
  rows_of,
  sizes,
  value,
)
from rocl_jax.report.size import packed
from rocl_jax.report.tables import SELECTIONS
from rocl_jax.report.text import (
  Writer,
  aligned,
  attack_text,
  md,
  number,
  plain,
  printable,
  sparsity,
  table,
  terminal,
  told,
)
from rocl_jax.report.verdicts import MARK, notes

ATTACKS = {'pgd10': 'PGD-10', 'pgd20': 'PGD-20', 'autoattack': 'AutoAttack'}

_TRANSFER = 4
_TITLES = {
  1: 'Table 1: the method and its two parts',
  2: 'Table 2: 90 % pruned, stage by stage',
  3: 'Table 3: 99 % pruned, stage by stage',
  _TRANSFER: 'Table 4: transfer attacks',
  5: 'Table 5: without adversarial training',
}
_TOP1 = ('clean_top1', 'robust_top1')
_TOP5 = ('clean_top5', 'robust_top5')


def attack_of_row(row: Record) -> str:
  """Table 1 has the evaluation of RoCL's code for Baseline 1."""
  return 'pgd20' if row['row'] == 'baseline1' else 'pgd10'


# Tables 1 to 5.


def tables(out: Writer, found: Reproduction) -> None:
  out.text(
    "## The paper's tables",
    'Accuracy on test images in percent. “Paper” is the published figure, '
    'chosen by accuracy on the test images; “log” is the last epoch of the log '
    'published with it; “here” is the last epoch, chosen on nothing: compare '
    "it with the log first. The paper's robust accuracy is under PGD-10, but "
    "for Baseline 1, whose is under PGD-20; the difference is to the row's own "
    'attack.',
    '\n'.join(f'- {md(line)}' for line in _protocols(found)),
  )
  left_out = []
  for table_number in published.TABLES:
    if not any(
      found.transfers(row['row'], True)
      if table_number == _TRANSFER
      else found.records(found.holder(row['row'], row['stage']), 'pgd10')
      for row in rows_of(table_number)
    ):
      left_out.append(str(table_number))
      continue
    out.text(f'### {_TITLES[table_number]}')
    show = _transfer if table_number == _TRANSFER else _table
    show(out, found, rows_of(table_number))
  if left_out:
    out.text(f'Nothing was measured of: Table {", ".join(left_out)}.')


def _protocols(found: Reproduction) -> list[str]:
  """Each attack's protocol, as the first model that met it has it."""
  models = [model for run in found.runs if (model := found.last(run))]
  texts = []
  for attack, title in ATTACKS.items():
    records = [r for m in models for r in found.records(m, attack).values()]
    for record in [r for r in records if r.get('attack') == attack][:1]:
      text = f'{title}: {attack_text(record)}'
      for key in ('steps', 'step_size', 'start', 'restarts', 'n'):
        if record.get(key) is not None:
          text += f', {key.replace("_", " ")} {plain(record[key])}'
      texts.append(text)
  return texts


def _table(out: Writer, found: Reproduction, rows: list[Record]) -> None:
  """A table of the paper by stage: top-1, then top-5 where the paper has it."""
  seeds = len(found.seeds)
  first, second, missing, others = [], [], [], []
  shown: dict[str, None] = {}  # what is to be said of them
  fewer: dict[str, None] = {}  # images under PGD-20, where not all had it
  for row in rows:
    wanted = Model(row['row'], row['stage'])
    model = found.holder(*wanted)
    measured = {a: found.records(model, a) for a in ('pgd10', 'pgd20')}
    usual = measured['pgd10']
    said = notes(list(usual.values()))
    shown |= dict.fromkeys(said)
    what = f'{row["method"]}, {row["stage"]}'
    if not usual:
      missing.append(f'{what} ({model})')
    elif model != wanted:
      others.append(f'{what} is {model}')
    clean = value(usual, 'clean_top1')
    robust = {a: value(r, 'robust_top1') for a, r in measured.items()}
    same = robust[attack_of_row(row)]
    if measured['pgd20'] and sizes(measured['pgd20']) != sizes(usual):
      fewer[sizes(measured['pgd20'])] = None
    first.append(
      [
        row['method'],
        row['stage'] + (f' {MARK}' if said else ''),
        *(number(row[key]) for key in _TOP1),
        *(number(row[f'last_{key}']) for key in _TOP1),
        *(v.text(seeds) for v in (clean, *robust.values())),
        minus(clean, row['clean_top1']),
        minus(same, row['robust_top1']),
        ATTACKS[attack_of_row(row)],
        sizes(usual),
      ]
    )
    top5 = [value(usual, key) for key in _TOP5]
    second.append(
      [
        row['method'],
        row['stage'],
        *(number(row[key]) for key in _TOP5),
        *(v.text(seeds) for v in top5),
        *(minus(v, row[k]) for v, k in zip(top5, _TOP5, strict=True)),
      ]
    )
  header = ['method', 'stage', 'paper: clean', 'robust', 'log: clean', 'robust']
  header += ['here: clean', 'PGD-10', 'PGD-20', 'here − paper: clean', 'robust']
  out.text(table([*header, "paper's attack", 'n'], first, 2))
  if any(row[key] is not None for row in rows for key in _TOP5):
    header = ['method', 'stage', 'paper: clean top-5', 'robust top-5']
    header += ['here: clean top-5', 'PGD-10 top-5']
    header += ['here − paper: clean', 'robust']
    out.text(table(header, second, 2))
  out.text(*map(md, shown))
  _notes(out, 'Under PGD-20 here, another n', [*fewer])
  _notes(out, 'Made by another run', others)
  _notes(out, 'Not measured', missing)


def _notes(out: Writer, title: str, lines: list[str]) -> None:
  if lines:
    out.text(f'{title}: {md("; ".join(lines))}.')


def minus(here: Value, there: float | None) -> str:
  """The signed difference of means, '–' where one is missing."""
  difference = here.mean - (math.nan if there is None else there)
  return f'{difference:+.2f}' if math.isfinite(difference) else '–'


def _transfer(out: Writer, found: Reproduction, rows: list[Record]) -> None:
  seeds = len(found.seeds)
  cells, missing = [], []
  for row in rows:
    run = row['row']
    masked, dense = (found.transfers(run, masked) for masked in (True, False))
    if not masked:
      missing.append(f'{row["method"]} ({run})')
    with_, without = (value(r, 'robust_top1') for r in (masked, dense))
    cells.append(
      [
        row['method'],
        number(row['robust_top1']),
        with_.text(seeds),
        minus(with_, row['robust_top1']),
        value(masked, 'clean_top1').text(seeds),
        without.text(seeds),
        minus(without, row['robust_top1']),
        value(dense, 'clean_top1').text(seeds),
        sizes(masked),
      ]
    )
  header = ['method', 'paper', 'here', 'here − paper', 'clean']
  header += ['mask left out', 'that − paper', 'clean, mask left out', 'n']
  out.text(
    'Images made on a network of another kind (`surrogate`) by PGD-10, shown '
    'to the pruned networks. “Here” is each network with its mask. **“Mask '
    'left out” is an artefact, shown because the published table has it: the '
    'weights that pruning removed are put back, and what is measured is not '
    'the pruned network.**',
    table(header, cells, 1),
  )
  model = found.last(SURROGATE)
  known = found.records(model, 'pgd10') if model else {}
  if known:
    clean, robust = (value(known, key).text(seeds) for key in _TOP1)
    out.text(
      f'The surrogate itself: {clean} clean, {robust} under PGD-10 on its own '
      'images.'
    )
  _notes(out, 'Not measured', missing)


# Which epoch, which attack, which baseline.


def selections(out: Writer, found: Reproduction) -> None:
  """Last, best on validation images, best on test images, side by side."""
  seeds, rows = len(found.seeds), []
  for run in found.runs:
    last = found.last(run)
    for stage in found.stages(run):
      if last is None or stage not in ('supervised', 'prune', last.stage):
        continue
      row = [run, stage]
      for selection in SELECTIONS:
        records = found.records(Model(run, stage), 'pgd10', selection)
        epochs = [plain(r.get('epoch')) for r in records.values()]
        row.append(', '.join(epochs) or '–')
        row += [value(records, key).text(seeds) for key in _TOP1]
      if any(cell != '–' for cell in row[2:]):
        rows.append(row)
  if not rows:
    return
  header = ['run', 'stage']
  for selection in SELECTIONS:
    header += [f'{selection}: epoch', 'clean', 'PGD-10']
  out.text(
    '## Which epoch',
    'Accuracy on the test images of the model that each rule selects; an '
    'epoch for each seed:',
    '\n'.join(f'- `{name}`: {text}' for name, text in SELECTIONS.items()),
    table(header, rows, 2),
  )


def attacks(out: Writer, found: Reproduction) -> None:
  """The last model of each run under every attack."""
  rows = [
    [*model, *_under_attack(found, model)]
    for run in found.runs
    if (model := found.last(run)) and found.records(model, 'pgd10')
  ]
  if rows:
    out.text(
      '## Attack by attack',
      'The last model of each run; AutoAttack is on fewer images where its n '
      'is smaller, and what is beside it is on those.',
      table(['run', 'stage', *_ATTACK_HEADER], rows, 2),
    )


_ATTACK_HEADER = (
  *('clean', 'PGD-10', 'PGD-20', 'n', 'AutoAttack'),
  *(f'{name}, same images' for name in ('PGD-20', 'PGD-10', 'clean')),
  'n',
)


def _under_attack(found: Reproduction, model: Model) -> list[str]:
  seeds = len(found.seeds)
  usual, strong = (found.records(model, a) for a in ('pgd10', 'autoattack'))
  beside = lambda attack, records: value(
    found.alongside(attack, records), 'robust_top1'
  ).text(seeds)
  return [
    value(usual, 'clean_top1').text(seeds),
    value(usual, 'robust_top1').text(seeds),
    beside('pgd20', usual),
    sizes(usual),
    value(strong, 'robust_top1').text(seeds),
    beside('pgd20', strong),
    beside('pgd10', strong),
    value(strong, 'clean_top1').text(seeds),
    sizes(strong),
  ]


def baselines(out: Writer, found: Reproduction) -> None:
  """Ours beside the paper's: as many weights, and as many epochs."""
  rows = []
  shown: dict[str, None] = {}
  for kept in (90, 99):
    models = [Model(f'ours_{kept}', 'finetune')]
    models += [Model(f'magnitude_{kept}', s) for s in ('finetune', 'prune')]
    models += [Model(f'random_{kept}', s) for s in ('finetune', 'prune')]
    models += [Model(f'small_{kept}', 'supervised')]
    for model in models:
      records = found.records(model, 'pgd10')
      if not records:
        continue
      what = (
        f'{model.run}, not trained' if model.stage == 'prune' else model.run
      )
      said = notes(list(records.values()))
      shown |= dict.fromkeys(said)
      one = next(iter(records.values()))
      weights = sum(n for _, n in found.layers(model).values())
      size = packed(found, model)
      rows.append(
        [
          what + (f' {MARK}' if said else ''),
          sparsity(one.get('sparsity')),
          f'{weights:,}' if weights else '–',
          f'{size:,}' if size else '–',
          *_under_attack(found, model),
        ]
      )
  if not any(not row[0].startswith('ours') for row in rows):
    return
  header = ['run', 'sparsity %', 'kept weights', 'bytes', *_ATTACK_HEADER]
  out.text(
    '## Baselines beside the paper',
    'The same pre-training and supervised stage, pruned by the size of the '
    'weights or at random, trained as long as `prune` and `finetune` together; '
    '“not trained”: the same masks at once after pruning. `small` is a dense '
    'network of about as many weights, trained as long as all three stages. '
    'Bytes: packed, see “Accuracy against size”.',
    table(header, rows, 1),
    *map(md, shown),
  )


@told
def terminal_table(found: Reproduction) -> str:
  """The last model of each run in plain text, the paper's figures beside."""
  seeds = len(found.seeds)
  rows = [['run', 'stage', 'paper: clean', 'robust', 'here: clean', 'PGD-10']]
  shown: dict[str, None] = {}
  for run in found.runs:
    model = found.last(run)
    if model is None:
      continue
    paper, records = paper_row(model), found.records(model, 'pgd10')
    figures = [number(paper.get(key)) for key in _TOP1]
    figures += [value(records, key).text(seeds) for key in _TOP1]
    said = notes(list(records.values()))
    shown |= dict.fromkeys(said)
    stage = model.stage + (f' {MARK}' if said else '')
    rows.append([model.run, stage, *figures])
  lines = map(terminal, map(printable, shown))
  return '\n'.join([aligned(rows, {0, 1}), *lines])
