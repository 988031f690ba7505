"""Writing small files so that a reader never sees half of one."""

import json
from typing import Any

from etils import epath


def write_text(path: epath.Path, text: str) -> None:
  """Replaces the file's content; an interruption leaves the old one."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(path.name + '.new')
  new.write_text(text)
  new.replace(path)


def write_json(path: epath.Path, value: Any) -> None:
  """`write_text` of indented JSON."""
  write_text(path, json.dumps(value, indent=1) + '\n')
