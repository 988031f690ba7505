"""Small JSON files: written whole or not at all, read with a plain word."""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from rocl_jax.errors import UserError


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
    UserError: it can't be read, is not JSON, or not a `kind` at the top.
  """
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'{path}: not a valid JSON file: {e}') from None
  if not isinstance(value, kind):
    raise UserError(f'{path}: found {value!r:.40}, wanted a {kind.__name__}')
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
      f'{path}: record {i}, {record.get("attack")!r} on {record["run"]!r}, '
      f'{record["stage"]!r}, is not what was written; delete it to measure anew'
    )


def cache_folder() -> pathlib.Path:
  """The user's cache folder for this project; it may not be there yet."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(home).expanduser() / 'rocl_jax'
