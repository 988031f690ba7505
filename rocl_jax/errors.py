"""What can go wrong without being a bug, told in one line.

Raise `UserError` where a configuration value or an input file is wrong; the
command line prints the message without a stack trace and exits with status 2.
"""

import difflib
from collections.abc import Collection


class UserError(Exception):
  """A mistake of the user: one line naming field, what was found, what is
  wanted; exit status 2."""


class RunFailed(Exception):
  """A run or an evaluation failed its own checks; exit status 3."""


def nearest(name: str, names: Collection[str]) -> str:
  """Returns " (did you mean 'digits'?)" for a name like one of `names`.

  Args:
    name: what the user wrote.
    names: the names that exist.

  Returns:
    The hint with a leading space, or '' when nothing is close.
  """
  close = difflib.get_close_matches(name, list(names), n=1)
  close = close or [other for other in names if other.lower() == name.lower()]
  return f' (did you mean {close[0]!r}?)' if close else ''


def one_line(error: BaseException) -> str:
  """Returns the first line of the message, or the name of its kind.

  No more than 300 characters: some parsers quote the file.
  """
  lines = str(error).strip().splitlines()
  return lines[0][:300] if lines else type(error).__name__
