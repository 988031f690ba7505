"""The state of an evaluation on disk, so that a killed one goes on.

book = Journal(results, protocol)     # beside a results.json
fates = book.read()                   # None if there is nothing to go on with
book.write(fates)                     # at most every few seconds
book.remove()
"""

import hashlib
import io
import json
import time
import zipfile
from typing import Any

import numpy as np
from etils import epath

from rocl_jax.attacks.ensemble import Fates
from rocl_jax.progress import say

_SECONDS = 5.0  # between writes: no more than this is done twice


class Journal:
  """One evaluation's file, named after the protocol that it follows.

  Args:
    results: the results.json that the evaluation will write to.
    protocol: all that its outcome depends on, as JSON values.
  """

  def __init__(self, results: epath.Path, protocol: dict[str, Any]):
    text = json.dumps(protocol, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = f'evaluation-{protocol["attack"]}-{digest}.npz'
    self._path = results.with_name(name)
    self._written = time.monotonic()

  def read(self) -> Fates | None:
    """The last state; None where there is none, or a damaged one."""
    if not self._path.exists():
      return None
    try:
      with self._path.open('rb') as file:
        content = io.BytesIO(file.read())
      with np.load(content, allow_pickle=False) as arrays:
        return Fates(**{name: arrays[name] for name in Fates._fields})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      say(f'{self._path}: can not be read; this evaluation starts anew')
      return None

  def write(self, fates: Fates) -> None:
    """Saves the state, unless that was done a moment ago."""
    if time.monotonic() - self._written < _SECONDS:
      return
    content = io.BytesIO()
    np.savez_compressed(content, **fates._asdict())
    self._path.parent.mkdir(parents=True, exist_ok=True)
    new = self._path.with_name(self._path.name + '.new')
    new.write_bytes(content.getvalue())
    new.replace(self._path)
    self._written = time.monotonic()

  def remove(self) -> None:
    """Deletes the file: the evaluation is in results.json."""
    self._path.unlink(missing_ok=True)
