"""What has changed in the config since a work directory was begun."""

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from etils import epath

from rocl_jax import metrics
from rocl_jax.errors import UserError, shown
from rocl_jax.progress import say
from rocl_jax.trees import flatten

FILE = 'changes.jsonl'  # a line for each change that was gone on with


class Changes:
  """The changes of a config between two starts in one work directory.

  Args:
    root: the work directory.

  Attributes:
    found: those of this start.
  """

  def __init__(self, root: epath.Path):
    self._path = root / FILE
    self._unfit: dict[str, str] = {}
    self.found: list[dict[str, Any]] = []

  def compare(
    self,
    before: dict,
    now: dict,
    where: str,
    folder: str | None = None,
  ) -> bool:
    """Adds what differs; with a `folder`, it decided what is in there.

    Args:
      before: nested dicts.
      now: the same.
      where: in words, for messages.
      folder: of the stage that was made with `before`.

    Returns:
      Whether anything differs.
    """
    count = len(self.found)
    old, new = flatten(before), flatten(now)
    for field in sorted(old.keys() | new.keys()):
      if old.get(field) != new.get(field):
        self.found.append(
          {
            'field': 'config.' + field.replace('/', '.'),
            'in': where,
            'from': old.get(field),
            'to': new.get(field),
            'folder': folder,
          }
        )
    return len(self.found) > count

  def unfit(self, folder: str, why: str) -> None:
    """Says that a stage's folder can't be gone on with as the config is."""
    self._unfit[folder] = why

  def fields(self) -> set[str]:
    """What changed, now or at an earlier start."""
    lines = [*self.found, *metrics.read_lines(self._path)]
    return {str(change.get('field')) for change in lines}

  def settle(self, allowed: Collection[str], keep: bool = True) -> None:
    """Prints all, and writes down what is gone on with, if it is to `keep`.

    Raises:
      UserError: what decided a finished stage, or one begun, is not `allowed`,
        or does not fit.
    """
    known = metrics.read_lines(self._path)
    same = lambda c: {k: v for k, v in c.items() if k != 'at'}
    # What was gone on with once is no question any more.
    new = [c for c in self.found if c not in map(same, known)]
    for change in new:
      say(
        f'{change["in"]}: {change["field"]} was {change["from"]!r}, is '
        f'{change["to"]!r}'
      )
    for folder, why in self._unfit.items():
      fields = dict.fromkeys(
        c['field'] for c in self.found if c['folder'] == folder
      )
      raise UserError(
        f'{", ".join(fields)}: {shown(folder)} was made with other values, and '
        f'what is in it does not fit these: {why}; take another --workdir, or '
        'delete that folder and those after it'
      )
    decided = [change for change in new if change['folder']]
    for change in decided:
      if change['field'] not in allowed:
        fields = dict.fromkeys(c['field'] for c in decided)
        raise UserError(
          f'{change["field"]}: found {change["to"]!r}, but '
          f'{shown(change["folder"])} '
          f'was made with {change["from"]!r}; take another --workdir, delete '
          'that folder and those after it, or go on with what is there: '
          f'--allow_change={",".join(fields)}'
        )
    at = datetime.now(UTC).isoformat(timespec='seconds')
    if new and keep:
      metrics.write(self._path, [*known, *({'at': at} | c for c in new)])
