"""Which records of `results.json` stand for what, and which are compared."""

from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]

STAGES = ('pretrain', 'linear_eval', 'supervised', 'prune', 'finetune')

ACCURACIES = ('clean_top1', 'clean_top5', 'robust_top1', 'robust_top5')

# What must agree for two records to be the same measurement.
IDENTITY = (
  'run',
  'stage',
  'selection',
  'split',
  'attack',
  'eps',
  'norm',
  'dtype',
  'n',
)


def merge(
  groups: Iterable[Iterable[Record]], identity: Sequence[str] = IDENTITY
) -> list[Record]:
  """All records, the later group's where two measure the same thing."""
  merged: dict[tuple, Record] = {}
  for group in groups:
    for record in group:
      merged[tuple(record.get(key) for key in identity)] = record
  return list(merged.values())


def runs_in_order(records: Sequence[Record]) -> list[str]:
  runs = dict.fromkeys(record['run'] for record in records)
  return sorted(runs, key=lambda run: run != 'ours')


def stage_order(stages: Iterable[str]) -> list[str]:
  """The method's stages in its order, then a user's own as they come."""
  names = list(dict.fromkeys(stages))
  rank = {name: i for i, name in enumerate(STAGES)}
  return sorted(names, key=lambda name: rank.get(name, len(STAGES)))


def attack_of(record: Record) -> tuple:
  return tuple(record.get(key) for key in ('attack', 'norm', 'eps', 'n'))


def attacked(record: Record) -> bool:
  """Whether there was an attack: without one, 'robust' is just 'clean'."""
  return record.get('attack') != 'clean'


def corrupted(record: Record) -> bool:
  """Whether the images had a common corruption, such as fog."""
  return record.get('corruption') is not None


def main_split(records: Sequence[Record]) -> str:
  splits = [r['split'] for r in records if not corrupted(r)]
  return 'test' if 'test' in splits or not splits else splits[0]


def find_headline(records: Sequence[Record], split: str) -> tuple | None:
  """The evaluation that most models have: the one the tables compare.

  Of equals, the one on more images, then the one recorded first.
  """
  counts: dict[tuple, int] = {}
  for record in records:
    if record['split'] == split and record['selection'] == 'last':
      key = attack_of(record)
      counts[key] = counts.get(key, 0) + 1
  if not counts:
    return None
  return max(
    counts, key=lambda key: (key[0] != 'clean', counts[key], key[3] or 0)
  )


def pick(
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
    if attack_of(record) == headline:
      return record
  return max(found, key=lambda r: (attacked(r), r.get('n') or 0), default=None)


def strongest(
  records: Sequence[Record], headline: tuple | None
) -> Record | None:
  """AutoAttack at the headline's radius, or else the headline itself."""
  return max(
    records,
    key=lambda r: (
      r.get('attack') == 'autoattack',
      attack_of(r) == headline,
      headline is not None and attack_of(r)[1:3] == headline[1:3],
      attacked(r),
      r.get('n') or 0,
    ),
    default=None,
  )
