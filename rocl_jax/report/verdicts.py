"""What an accuracy hides: predictions of few classes, logits that are none."""

from collections.abc import Sequence

import numpy as np

from rocl_jax.report.records import Record, attacked
from rocl_jax.report.text import plain

MARK = '⚠'
_FEWEST = 5  # images of other classes that say something


def collapse(record: Record) -> tuple[str, str] | None:
  """Whether a network answers with few classes whatever the image is.

  It does where, of the images of all other classes, more than half are surely
  taken for one class, as its surplus of predictions shows (of a class with
  most of the images: a larger part); or where fewer than half of the classes
  with images are ever predicted, of five images each or more.

  Earlier versions' records have predictions under attack alone, which crowd
  into few classes in sound networks, too: there, what is right without attack
  counts against it.

  Returns:
    In few words and in a clause, or None.
  """
  known = record.get('per_class') or {}
  counts, n = known.get('clean_predicted'), known.get('n')
  matrix = record.get('confusion')
  crowded = counts is None and attacked(record)
  if counts is None and matrix:
    n = n or [sum(row) for row in matrix]
    counts = np.sum(matrix, axis=0)
  if counts is None or n is None:
    return None
  labels = np.nan_to_num(np.array(n, float))
  found = np.nan_to_num(np.array(counts, float))
  if not (labels.any() and found.any()):
    return None
  total, which = labels.sum(), 'attacked images' if crowded else 'images'
  k = int(found.argmax())
  others, surplus = total - labels[k], found[k] - labels[k]
  classes, used = labels > 0, found > 0
  if crowded:
    share = known.get('clean_top1') or [record.get('clean_top1')] * len(labels)
    right = labels * np.nan_to_num(np.array(share, float)) / 100
    surplus = min(surplus, others - right.sum() + right[k])
    used |= right > 0
  if others >= _FEWEST and surplus > others * max(0.5, labels[k] / total):
    names = record.get('class_names') or []
    name = str(names[k]) if k < len(names) else f'class {k}'
    part = f'{100 * found[k] / found.sum():.0f} %'
    return (
      f'{part} are called {name}',
      f'predictions collapse: {part} of all {which} are taken for “{name}”, '
      f'which {100 * labels[k] / total:.0f} % are',
    )
  if 2 * used.sum() < classes.sum() and total >= 5 * classes.sum():
    few = f'{used.sum()} of {classes.sum()} classes'
    return (
      f'{few} predicted',
      f'predictions collapse: {few} are ever predicted, of all {which}',
    )
  return None


def notes(records: Sequence[Record]) -> list[str]:
  """A line for each reason not to take a number for what it seems."""
  lines: dict[tuple, str] = {}  # of several splits or attacks the first
  for record in records:
    model = f'{record.get("run")}, {record.get("stage")}'
    if record.get('selection', 'last') != 'last':
      model += f', {record["selection"]}'
    collapsed = collapse(record)
    if collapsed:
      lines.setdefault(
        (model,),
        f'{MARK} {model}: {collapsed[1]}. What seems robust is an answer that '
        'hardly depends on the image.',
      )
    for key, when in (('clean_invalid', 'without attack'), ('invalid', '')):
      if record.get(key):
        when = when or f'under {record.get("attack")}'
        lines.setdefault(
          (model, when),
          f'{MARK} {model}: {record[key]} of {plain(record.get("n"))} images '
          f'have logits that are not numbers {when}; they count neither as '
          'robust nor as broken by the attack.',
        )
  return list(lines.values())


def marked(record: Record) -> str:
  """The stage's name, with a mark where `notes` has a line on its model."""
  stage = str(record.get('stage'))
  return f'{stage} {MARK}' if notes([record]) else stage
