"""What a folder must hold, to the byte: written last, checked before use.

  seal(folder, {'step': 200})    # lists every file in it with its checksum
  about = verify(folder)         # raises Damaged, or returns {'step': 200}

Orbax restores flipped bits and half-written folders without a word. A folder
with a manifest is whole; one without is none.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from rocl_jax.errors import UserError, one_line, shown
from rocl_jax.files import exists, reading

MANIFEST = 'manifest.json'
_CHUNK = 1 << 22


class Damaged(UserError):
  """A folder is not what its manifest says; one line that names the file.

  What can't be read just now is not damaged: `errors.Unreadable`.
  """


def seal(folder: epath.Path, about: dict[str, Any]) -> None:
  """Writes the manifest: `about`, and size and SHA-256 of every file.

  Args:
    folder: nothing may write to it any more.
    about: JSON to keep with it, under the same protection.
  """
  files = {}
  for path in _files(folder):
    size, digest = _checksum(path, sync=True)
    name = path.relative_to(folder).as_posix()
    files[name] = {'bytes': size, 'sha256': digest}
  content = {'about': about, 'files': files}
  text = json.dumps(content | {'sha256': _own(content)}, indent=1)
  new = folder / (MANIFEST + '.new')
  new.write_text(text + '\n')
  _checksum(new, sync=True)
  new.replace(folder / MANIFEST)


def is_sealed(folder: epath.Path) -> bool:
  """Whether the folder was finished; nothing of it is read.

  Raises:
    Unreadable: it can't be known.
  """
  return exists(folder / MANIFEST)


def verify(folder: epath.Path) -> dict[str, Any]:
  """Reads every file and compares.

  Returns:
    What `about` was when the folder was sealed.

  Raises:
    Damaged: the manifest or a file is missing, or not what it was.
    Unreadable: one of them can't be read now.
  """
  content = read(folder)
  for name, wanted in content['files'].items():
    path = folder / name
    try:
      with reading(path):
        size, digest = _checksum(path)
    except OSError:
      raise Damaged(f'{shown(path)}: missing') from None
    if size != wanted['bytes']:
      raise Damaged(
        f'{shown(path)}: has {size} bytes, wanted {wanted["bytes"]}'
      )
    if digest != wanted['sha256']:
      raise Damaged(f'{shown(path)}: its bytes are not those that were written')
  return content['about']


def read(folder: epath.Path) -> dict[str, Any]:
  """The manifest alone: {'about': ..., 'files': {name: {'bytes', 'sha256'}}}.

  Raises:
    Damaged: it is missing, or not what it was.
    Unreadable: it can't be read now.
  """
  path = folder / MANIFEST
  try:
    with reading(path):
      text = path.read_bytes()
    content = json.loads(text)
    wanted = content.pop('sha256')
    if wanted != _own(content):
      raise ValueError('it is not what was written')
    files, about = content['files'], content['about']
    if not isinstance(about, dict) or not all(
      is_inside(name) and type(f['bytes']) is int and type(f['sha256']) is str
      for name, f in files.items()
    ):
      raise ValueError('no manifest of ours')
  except OSError:
    raise Damaged(f'{shown(path)}: missing') from None
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise Damaged(f'{shown(path)}: is damaged: {one_line(e)}') from None
  except RecursionError:
    raise Damaged(f'{shown(path)}: is damaged: nested too deeply') from None
  return content


def _own(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def is_inside(name: str) -> bool:
  """Whether a path, wherever it is from, stays in the folder it is put in."""
  plain = name.isprintable() and not name.startswith('/')
  return plain and '..' not in name.split('/')


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files(path)
    elif path.name != MANIFEST:
      yield path


def _checksum(path: epath.Path, sync: bool = False) -> tuple[int, str]:
  digest, size = hashlib.sha256(), 0
  with path.open('rb') as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
      size += len(chunk)
    if sync:
      os.fsync(file.fileno())
  return size, digest.hexdigest()
