"""What can go wrong without being a bug, told in one line.

Raise `UserError` where a configuration value or an input file is wrong; the
command line prints the message without a stack trace and exits with status 2.
"""

import difflib
import shlex
from collections.abc import Collection


class UserError(Exception):
  """A mistake of the user: one line naming field, what was found, what is
  wanted; exit status 2."""


class RunFailed(Exception):
  """A run or an evaluation failed its own checks; exit status 3."""


class Unreadable(RunFailed):
  """What is there can't be read just now; that says nothing of its content."""


def unreadable(path: object, error: BaseException) -> Unreadable:
  """That a path can't be read, and why: a disk that is away, a wrong mode."""
  why = error.strerror if isinstance(error, OSError) else None
  return Unreadable(
    f'{shown(path)}: can not be read: {why or one_line(error)}; nothing was '
    'changed; run the same command again once it can be read'
  )


def shown(path: object) -> str:
  """A path as it can be pasted into a shell."""
  return shlex.quote(str(path))


def of_disk(error: OSError) -> str:
  """Names the file, if the error does, and what is wrong with it."""
  names = [shown(x) for x in (error.filename, error.filename2) if x]
  why = error.strerror or one_line(error)
  return f'{" -> ".join(names) or "disk or network"}: {why}'


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
