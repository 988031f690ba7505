"""The paper's orderings, one by one: which hold here, and how surely."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from rocl_jax.report.records import Record
from rocl_jax.report.reproduction import (
  Model,
  Reproduction,
  Value,
  paper_row,
  rows_of,
  value,
)
from rocl_jax.report.text import Writer, md, number, table

SHOWN, OPPOSITE, NOISE = 'shown', 'not shown (opposite)', 'within noise'
GUESSES = 'at chance level'
_SURE = 2.0  # standard errors
_NAMED = 6  # orderings that were not tested, the rest is counted
_TITLES = {
  'clean_top1': 'clean',
  'robust_top1': 'PGD-10',
  'transfer': 'transfer, masked',
}


class Ordering(NamedTuple):
  """A claim: one model is more accurate than another, without or under attack.

  Attributes:
    claim: in words.
    above, below: the two models.
    key: 'clean_top1', 'robust_top1' or 'transfer'.
  """

  claim: str
  above: Model
  below: Model
  key: str


class Outcome(NamedTuple):
  """What became of an ordering: `difference` and `error` in points."""

  difference: Value
  error: float
  verdict: str


def all_of_them(found: Reproduction) -> Iterator[Ordering]:
  """Those of the paper's tables, then those with baselines of ours."""

  def last(run: str) -> Model:
    return found.last(run) or Model(run, 'finetune')

  def both(claim: str, above: Model, below: Model) -> Iterator[Ordering]:
    for key in ('clean_top1', 'robust_top1'):
      yield Ordering(claim, above, below, key)

  ours, sparser = last('ours_90'), last('ours_99')
  second, its_sparser = last('baseline2_90'), last('baseline2_99')
  natural, its_natural = last('ours_natural_90'), last('baseline2_natural_90')
  first, third = last('baseline1'), last('baseline12_90')
  yield from both('ours over Baseline 2, 90 %', ours, second)
  yield from both('ours over Baseline 2, 99 %', sparser, its_sparser)
  yield from both('ours over Baseline 1 + Baseline 2', ours, third)
  yield Ordering('ours over Baseline 1', ours, first, 'robust_top1')
  yield Ordering('Baseline 1 over ours', first, ours, 'clean_top1')
  with_, without = 'with adversarial training over without', 'without over with'
  yield Ordering(f'{with_}, ours', ours, natural, 'robust_top1')
  yield Ordering(f'{without}, ours', natural, ours, 'clean_top1')
  yield Ordering(f'{with_}, Baseline 2', second, its_natural, 'robust_top1')
  yield Ordering(f'{without}, Baseline 2', its_natural, second, 'clean_top1')
  yield from both('90 % over 99 %, ours', ours, sparser)
  yield from both('90 % over 99 %, Baseline 2', second, its_sparser)
  tuned = ('ours_90', 'ours_99', 'baseline2_90', 'baseline2_99')
  for run in (*tuned, 'baseline12_90'):
    pair = Model(run, 'finetune'), Model(run, 'prune')
    yield from both(f'finetune over prune, {run}', *pair)
  for run in ('ours_90', 'ours_99'):
    pair = Model(run, 'supervised'), last(run)
    yield from both(f'unpruned over pruned, {run}', *pair)
  yield Ordering('ours over Baseline 2, Table 4', ours, second, 'transfer')
  for sparsity in (90, 99):
    run = f'ours_{sparsity}'
    for name in ('magnitude', 'random', 'small'):
      other = last(f'{name}_{sparsity}')
      claim = f'ours over {name}, {sparsity} %'
      yield from both(claim, last(run), other)


def judge(found: Reproduction, ordering: Ordering) -> Outcome | None:
  """Mean difference over the seeds, and whether it is more than chance.

  Of a seed, the error is that of two binomial proportions, as of independent
  images: records don't say which images they are, so it is larger than that
  of a paired comparison. The seeds' own spread is added where there are
  several, divided by their number; the images, which are the same for all,
  don't count anew with each seed.

  Returns:
    None where one of the two was not measured.
  """
  above, below = (
    _by_seed(found, model, ordering.key)
    for model in (ordering.above, ordering.below)
  )
  seeds = [seed for seed in above if seed in below]
  if not seeds:
    return None
  key = 'robust_top1' if ordering.key == 'transfer' else ordering.key
  differences, variances = [], []
  for seed in seeds:
    pair = (above[seed], below[seed])
    differences.append(pair[0][key] - pair[1][key])
    variances.append(sum(_variance(r[key], r['n']) for r in pair))
  difference = Value(tuple(differences))
  variance = sum(variances) / len(variances)
  if differences[1:]:
    variance += difference.sd**2 / len(differences)
  error = math.sqrt(variance)
  verdict = NOISE
  if not any(_knows(r, key) for s in seeds for r in (above[s], below[s])):
    verdict = GUESSES
  elif abs(difference.mean) > _SURE * error:
    verdict = SHOWN if difference.mean > 0 else OPPOSITE
  return Outcome(difference, error, verdict)


def _knows(record: Record, key: str) -> bool:
  """Whether it is surely more accurate than one answer for all images."""
  classes = record.get('class_names')
  if not isinstance(classes, list) or not classes:
    return True
  chance = 100 / len(classes)
  error = math.sqrt(_variance(chance, record['n']))
  return record[key] > chance + _SURE * error


def _variance(percent: float, n: int) -> float:
  """Of a percentage of n images."""
  return percent * (100 - percent) / n


def _by_seed(found: Reproduction, model: Model, key: str) -> dict[str, Record]:
  """The records that have the number, by seed."""
  if key == 'transfer':
    records = found.transfers(model.run, masked=True)
    key = 'robust_top1'
  else:
    records = found.records(found.holder(*model), 'pgd10')
  return {seed: r for seed, r in records.items() if _is_share(r, key)}


def _is_share(record: Record, key: str) -> bool:
  """Whether it has a percentage of some images."""
  found = value({'': record}, key).values
  return bool(found) and 0 <= found[0] <= 100 and (record.get('n') or 0) > 0


def _paper(ordering: Ordering) -> float | None:
  """The paper's own difference, from its rounded figures."""
  models = (ordering.above, ordering.below)
  above, below = (_figures(ordering, model) for model in models)
  return None if above is None or below is None else above - below


def _figures(ordering: Ordering, model: Model) -> float | None:
  if ordering.key == 'transfer':
    return {r['row']: r['robust_top1'] for r in rows_of(4)}.get(model.run)
  return paper_row(model).get(ordering.key)


def section(out: Writer, found: Reproduction) -> None:
  """All orderings in one table."""
  rows, missing = [], []
  for ordering in all_of_them(found):
    outcome = judge(found, ordering)
    paper = _paper(ordering)
    if outcome is None:
      missing.append(f'{ordering.claim} ({_TITLES[ordering.key]})')
      continue
    rows.append(
      [
        ordering.claim,
        _TITLES[ordering.key],
        _signed(paper),
        _signed(outcome.difference.mean),
        number(outcome.error),
        outcome.verdict,
      ]
    )
  out.text(
    '## Orderings',
    'Difference of top-1 accuracy in points, first minus second, last epochs, '
    'each pair under the same attack. “Shown” and “opposite” are more than two '
    'standard errors from zero, all else is within noise, or at chance level '
    'where neither of the two does better than one answer for all images. The '
    'error is that of two binomial proportions'
    + (
      ' and of the spread over seeds. '
      if len(found.seeds) > 1
      else ': one seed says nothing of the spread between trainings. '
    )
    + 'The paper has one run of each.',
  )
  if rows:
    header = ['ordering', 'accuracy', 'paper', 'here', '± error', 'here it is']
    out.text(table(header, rows, 2))
  if missing:
    told = '; '.join(missing[:_NAMED])
    more = len(missing) - _NAMED
    out.text(
      f'Not tested, for want of a measurement: {md(told)}'
      + (f'; and {more} more.' if more > 0 else '.')
    )


def counts(found: Reproduction) -> dict[str, int]:
  """How many orderings of the paper's tables came out how."""
  tally = dict.fromkeys((SHOWN, NOISE, OPPOSITE, GUESSES), 0)
  for ordering in all_of_them(found):
    outcome = judge(found, ordering)
    if outcome and _paper(ordering) is not None:
      tally[outcome.verdict] += 1
  return tally


def _signed(points: float | None) -> str:
  return '–' if points is None else f'{points:+.2f}'
