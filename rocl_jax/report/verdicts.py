"""What an accuracy hides: predictions of few classes, logits that are none."""

from collections.abc import Sequence

import numpy as np

from rocl_jax.report.records import Record, attacked
from rocl_jax.report.text import plain

MARK = '⚠'
_FEWEST = 5  # images of other classes that say something


def collapse(record: Record) -> tuple[str, str] | None:
  """Whether a network answers with few classes whatever the image is.

  It does where more than half of the images of all other classes are surely
  taken for one class, as its surplus of predictions shows, or where fewer than
  half of the classes with images are ever predicted, of five images each or
  more. Earlier versions' records have predictions under attack alone, which
  crowd into few classes in sound networks, too; there, images that are right
  without attack count as of their own class.

  Returns:
    In few words and in a clause, or None.
  """
  known = record.get('per_class') or {}
  counts, n = known.get('clean_predicted'), known.get('n')
  matrix, which = record.get('confusion'), 'images'
  if counts is None and matrix:
    which = 'attacked images' if attacked(record) else 'images'
    n = n or [sum(row) for row in matrix]
    counts = np.sum(matrix, axis=0)
  if counts is None or n is None:
    return None
  labels, found = np.array(n, float), np.array(counts, float)
  total, answered = labels.sum(), found.sum()
  if not (total > 0 and answered > 0):
    return None
  k = int(found.argmax())
  names = record.get('class_names') or []
  name = str(names[k]) if k < len(names) else f'class {k}'
  others = total - labels[k]
  surplus = found[k] - labels[k]
  if which != 'images' and known.get('clean_top1'):
    right = labels * np.array([x or 0 for x in known['clean_top1']]) / 100
    surplus = min(surplus, others - (right.sum() - right[k]))
  if others >= _FEWEST and surplus > others / 2:
    share = f'{100 * found[k] / answered:.0f} %'
    return (
      f'{share} are called {name}',
      f'predictions collapse: {share} of all {which} are taken for “{name}”, '
      f'which {100 * labels[k] / total:.0f} % are',
    )
  classes, used = int((labels > 0).sum()), int((found > 0).sum())
  if 2 * used < classes and total >= 5 * classes:
    return (
      f'{used} of {classes} classes predicted',
      f'predictions collapse: {used} of {classes} classes are ever predicted, '
      f'of {which}',
    )
  return None


def notes(records: Sequence[Record]) -> list[str]:
  """A line for each reason not to take a number for what it seems."""
  lines: dict[str, None] = {}
  for record in records:
    model = f'{record.get("run")}, {record.get("stage")}'
    if record.get('selection', 'last') != 'last':
      model += f', {record["selection"]}'
    collapsed = collapse(record)
    if collapsed:
      lines[
        f'{MARK} {model}: {collapsed[1]}. What seems robust is an answer that '
        'hardly depends on the image.'
      ] = None
    for key, when in (('clean_invalid', 'without attack'), ('invalid', '')):
      if record.get(key):
        when = when or f'under {record.get("attack")}'
        lines[
          f'{MARK} {model}: {record[key]} of {plain(record.get("n"))} images '
          f'have logits that are not numbers {when}; they count neither as '
          'robust nor as broken by the attack.'
        ] = None
  return list(lines)


def marked(record: Record) -> str:
  """The stage's name, with a mark where `notes` has a line on its model."""
  stage = str(record.get('stage'))
  return f'{stage} {MARK}' if notes([record]) else stage
