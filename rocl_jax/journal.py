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

from rocl_jax import processes, provenance
from rocl_jax.attacks.ensemble import Fates
from rocl_jax.errors import shown
from rocl_jax.files import exists, reading
from rocl_jax.progress import say

_LARGEST = 1 << 28  # bytes, unpacked: those of six million images
_SECONDS = 5.0  # between writes: no more than this is done twice


class Journal:
  """One evaluation's file, named after the protocol that it follows.

  Args:
    results: the results.json that the evaluation will write to.
    protocol: what its outcome depends on beside versions, as JSON values.

  Attributes:
    earlier: what `provenance.versions` said before they last changed, in
      order; known after `read`.
  """

  def __init__(self, results: epath.Path, protocol: dict[str, Any]):
    text = json.dumps(protocol, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = f'evaluation-{protocol["attack"]}-{digest}.npz'
    self._path = results.with_name(name)
    self._written = time.monotonic()
    self._versions = provenance.versions()
    self.earlier: list[dict[str, str]] = []

  def read(self) -> Fates | None:
    """The last state; None where there is none, or a damaged one.

    Says which versions have changed since.

    Raises:
      Unreadable: it can't be read now.
    """
    fates, self.earlier = processes.from_first(self._read)
    return fates

  def _read(self) -> tuple[Fates | None, list[dict[str, str]]]:
    if not exists(self._path):
      return None, []
    with reading(self._path):
      content = io.BytesIO(self._path.read_bytes())
    try:
      with zipfile.ZipFile(content) as members:
        if sum(x.file_size for x in members.infolist()) > _LARGEST:
          raise ValueError('a zip bomb')
      with np.load(content, allow_pickle=False) as arrays:
        fates = Fates(**{name: arrays[name] for name in Fates._fields})
        said = json.loads(str(arrays['versions']))
      _check(fates)
      *earlier, last = [dict(x.items()) for x in said]
      new = provenance.changed(last, self._versions)
    # Damaged bytes raise whatever zipfile, zlib and NumPy's parsers raise.
    except Exception:
      say(f'{shown(self._path)}: is damaged; this evaluation starts anew')
      return None, []
    for line in new:
      say(f'{shown(self._path)}: {line}')
    if new:
      say(
        'the evaluation continues; its result may now differ from that of an '
        'uninterrupted one'
      )
      earlier.append(last)
    return fates, earlier

  def write(self, fates: Fates, now: bool = False) -> None:
    """Saves the state, unless that was done a moment ago and need not be
    done `now`."""
    recent = time.monotonic() - self._written < _SECONDS
    if not processes.is_first() or (recent and not now):
      return
    content = io.BytesIO()
    versions = json.dumps([*self.earlier, self._versions])
    np.savez_compressed(content, **fates._asdict(), versions=versions)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    new = self._path.with_name(self._path.name + '.new')
    new.write_bytes(content.getvalue())
    new.replace(self._path)
    self._written = time.monotonic()

  def remove(self) -> None:
    """Deletes the file: the evaluation is in results.json."""
    if processes.is_first():
      self._path.unlink(missing_ok=True)


def _check(fates: Fates) -> None:
  """Raises ValueError unless the arrays belong to one evaluation."""
  n = len(fates.robust)
  kinds = dict.fromkeys(('robust', 'top5', 'disputed'), 'b')
  kinds |= dict.fromkeys(('distance', 'outside'), 'f')
  for name, array in fates._asdict().items():
    shape = {'turn': (), 'done': ()}.get(name, (n,))
    if name in ('after', 'waiting'):
      shape = array.shape[:1]
    if array.shape != shape or array.dtype.kind != kinds.get(name, 'i'):
      raise ValueError(f'{name} is {array.dtype} {array.shape}')
  waiting, done = fates.waiting, fates.done
  rows = len(waiting) == 0 or 0 <= waiting.min() <= waiting.max() < n
  if not rows or not 0 <= done <= len(waiting) or fates.turn < 0:
    raise ValueError('it is not where an evaluation can be')
