"""Which records of `results.json` stand for what, and which are compared."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = dict[str, Any]

STAGES = ('pretrain', 'linear_eval', 'supervised', 'prune', 'finetune')

ACCURACIES = ('clean_top1', 'clean_top5', 'robust_top1', 'robust_top5')

# What must agree for two records to be the same measurement.
IDENTITY = (
  'run',
  'stage',
  'selection',
  'fingerprint',
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


Key = tuple[str, str, str]  # run, stage, selection


def key_of(record: Record) -> Key:
  return record['run'], record['stage'], record['selection']


def newest(records: Iterable[Record]) -> dict[Key, Any]:
  """The fingerprints of the weights that were measured last."""
  return {key_of(record): record.get('fingerprint') for record in records}


def apart(
  records: Iterable[Record],
  last: Mapping[Key, Any],
  there: Mapping[Key, Mapping[str, str]] = {},
) -> tuple[list[Record], list[Record]]:
  """Records of the models that count, and those of other weights.

  Args:
    records: merged.
    last: what counts of a model that no folder has, see `newest`.
    there: of each model in a folder, its fingerprints and a name for each; of
      several the records get it beside their run's.
  """
  records, kept, others = list(records), [], []
  seen: dict[Key, set] = {}
  for record in records:
    seen.setdefault(key_of(record), set()).add(record.get('fingerprint'))
  for record in records:
    key, own = key_of(record), record.get('fingerprint')
    names = there.get(key, {})
    counts = seen[key] & {*names} if names else {last.get(key)}
    # Earlier versions' records don't say of which weights they are.
    if own not in (counts or {None}):
      others.append(record)
    elif len(names) > 1 and own:
      kept.append(record | {'run': f'{record["run"]} ({names[own]})'})
    else:
      kept.append(record)
  return kept, others


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


_STANDARD = {'steps': 100, 'queries': 5000, 'targets': 9}


def shortened(record: Record) -> bool:
  """Whether an AutoAttack has less of anything than the standard one."""
  classes = len(record.get('class_names') or ()) or 10
  most = _STANDARD | {'targets': min(_STANDARD['targets'], classes - 1)}
  return any(
    isinstance(member.get(key), int) and 0 < member[key] < number
    for member in record.get('members') or ()
    for key, number in most.items()
  )


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
