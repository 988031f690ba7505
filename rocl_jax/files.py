"""Paths as users write them; small JSON files, written whole or not at all.

What can't be read just now is neither missing nor damaged: `Unreadable`.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from rocl_jax.errors import UserError, one_line, shown, unreadable

_MISSING = (FileNotFoundError, NotADirectoryError)
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)


def is_remote(place: str) -> bool:
  """Whether it is a URL, not a path."""
  return '://' in place


def place(text: str) -> str:
  """A path as a user wrote it, absolute and without `~`; URLs and '' stay.

  Raises:
    UserError: `~` and no user of that name.
  """
  if not text or is_remote(text):
    return text
  path = os.path.expanduser(text)
  if path.startswith('~'):
    raise UserError(
      f'found {text}, and there is no user {path.partition("/")[0][1:]!r}; '
      f'wanted a path, such as ./{path}'
    )
  return os.path.abspath(path)


def places(text: str) -> list[str]:
  """The paths of a text that separates them by commas; see `place`.

  A folder that is there may have commas in its name.
  """
  words, found = text.split(','), []
  while words:
    count = next(
      (
        n
        for n in range(len(words), 1, -1)
        if os.path.isdir(place(','.join(words[:n])))
      ),
      1,
    )
    found.append(place(','.join(words[:count])))
    words = words[count:]
  return [path for path in found if path]


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
  """Within, what can't be read is told as `Unreadable`.

  Raises:
    FileNotFoundError, NotADirectoryError: as they were: an answer.
    Unreadable: any other error of the file system.
  """
  try:
    yield
  except _MISSING:
    raise
  except OSError as e:
    raise unreadable(e.filename or path, e) from None


def exists(path: os.PathLike) -> bool:
  """Whether there is such a file or folder.

  `Path.exists` says no where it can't be known. Nothing has a name that is too
  long, or is at the end of links that lead to each other.

  Raises:
    Unreadable: it can't be known.
  """
  with reading(path):
    try:
      os.stat(path)
    except OSError as e:
      if e.errno in _NO_NAME or isinstance(e, _MISSING):
        return False
      raise
  return True


def entries(folder: epath.Path) -> list[epath.Path]:
  """What is in a folder, by name; nothing where there is none.

  Raises:
    Unreadable: it can't be known.
  """
  with reading(folder):
    try:
      return sorted(folder / name for name in os.listdir(folder))
    except _MISSING:
      return []


def write_text(path: epath.Path, text: str) -> None:
  """Replaces the file's content; an interruption leaves the old one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(path.name + '.new')
  with new.open('w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())  # or a crash may leave the new name, and no bytes
  new.replace(path)


def read_json(path: epath.Path, kind: type) -> Any:
  """The content of a JSON file.

  Raises:
    UserError: there is none, it is not JSON, or not a `kind` at the top.
    Unreadable: it can't be read now.
  """
  try:
    with reading(path):
      content = path.read_bytes()
    value = json.loads(content)
  except (OSError, ValueError, RecursionError) as e:
    why = f'not a valid JSON file: {one_line(e)}'
    if isinstance(e, OSError):
      why = 'no such file'
    raise UserError(f'{shown(path)}: {why}') from None
  if not isinstance(value, kind):
    raise UserError(
      f'{shown(path)}: found {value!r:.40}, wanted a {kind.__name__}'
    )
  return value


def write_json(path: epath.Path, value: Any) -> None:
  """`write_text` of indented JSON, lists of nothing but numbers in a line."""
  text = json.dumps(value, indent=1)
  # No string has a line break of its own in JSON.
  numbers = re.compile(r'\[\n[^"\[\]{}]*\]')
  in_a_line = lambda found: f'[{" ".join(found[0][1:-1].split())}]'
  write_text(path, numbers.sub(in_a_line, text) + '\n')


def checksum(record: Mapping[str, Any]) -> str:
  """Of what a record says beside its own field `checksum`."""
  rest = {k: v for k, v in record.items() if k != 'checksum'}
  text = json.dumps(rest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_record(path: object, i: int, record: Mapping[str, Any]) -> None:
  """Raises UserError if a record of a results.json is not what was written."""
  if record.get('checksum', '') not in ('', checksum(record)):
    raise UserError(
      f'{shown(path)}: record {i}, {record.get("attack")!r} on '
      f'{record["run"]!r}, {record["stage"]!r}, is not what was written; '
      'delete it to measure anew'
    )


def cache_folder() -> pathlib.Path:
  """The user's cache folder for this project, which need not exist yet."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(home).expanduser() / 'rocl_jax'
