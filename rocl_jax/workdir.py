"""The work directory: one run at a time, and a note on how the last one ended.

  root = make(path, '--workdir')
  with claim(root, '--workdir'):
    ...

`run.json` says who holds the folder, or how its last holder ended. On one
machine the kernel's file lock decides, which a dead process can not keep; on a
file system shared between machines the holder renews the file's time, and one
that has not done so for two minutes is dead; who comes before waits for that.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import pathlib
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from etils import epath

from rocl_jax import interruption, processes
from rocl_jax.errors import RunFailed, UserError, shown
from rocl_jax.files import reading
from rocl_jax.interruption import Interrupted
from rocl_jax.progress import say

RUN = 'run.json'
_BEAT = 20.0  # seconds between signs of life
_SILENCE = 120.0  # without one the holder is dead

# What a user can mend by another path or mode; the rest is the disk's.
_MISTAKES = (
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
  *(errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)

Signs = Callable[[], tuple[float, float]]


def make(path: str, field: str) -> epath.Path:
  """The folder, made if missing.

  Args:
    path: what the user wrote.
    field: where, for messages.

  Raises:
    UserError: it can't be written.
    OSError: the disk is full, or away.
  """
  root = epath.Path(os.path.realpath(os.path.expanduser(path)))
  try:
    root.mkdir(parents=True, exist_ok=True)
    probe = root / f'.writable-{os.getpid()}'
    probe.write_text('')
    probe.unlink(missing_ok=True)
  except OSError as e:
    if e.errno not in _MISTAKES:
      raise
    raise UserError(
      f'{field}: {shown(root)} is no folder that can be written: {e.strerror}'
    ) from None
  return root


@contextlib.contextmanager
def claim(root: epath.Path, field: str, name: str = RUN) -> Iterator[None]:
  """Holds a folder against other runs.

  Args:
    root: the folder.
    field: where the user named it, for messages.
    name: of the file that says who holds it.

  Raises:
    UserError: another run holds it; the message says which.
  """
  path = pathlib.Path(root) / name
  file, me = processes.from_first(lambda: _acquire(path, field))
  if not processes.is_first():
    yield
    return
  try:
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
    try:
      yield
      me['status'] = 'finished'
    except Interrupted as e:
      me['status'] = f'interrupted by {e}'
      raise
    except (UserError, RunFailed) as e:
      me['status'] = f'failed: {e}'
      raise
    except BaseException as e:
      me['status'] = f'failed: {type(e).__name__}: {e}'
      raise
    finally:
      ended.set()
      me['ended'] = datetime.now(UTC).isoformat(timespec='seconds')
      with contextlib.suppress(OSError):  # a full disk, say
        _write(file, me)
  finally:
    os.close(file)  # and with it goes the lock


def _acquire(path, field):
  """Takes the folder; (the open file, what it says of this process)."""
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      locked = True
    except BlockingIOError:
      raise held(path.parent, field, parse(_content(path))) from None
    except OSError:  # a file system without locks: the file's time decides
      locked = False
    holder = parse(_content(path))
    unsure = not locked or holder.get('host') != socket.gethostname()
    if holder.get('status') == 'running' and unsure:
      await_silence(path.parent, field, holder, lambda: _signs(path))
    me = {
      'status': 'running',
      'host': socket.gethostname(),
      'process': os.getpid(),
      'started': datetime.now(UTC).isoformat(timespec='seconds'),
      'command': shlex.join(sys.argv),
    }
    _write(file, me)
  except BaseException:
    os.close(file)
    raise
  return file, me


def await_silence(
  place: object, field: str, holder: dict[str, Any], signs: Signs
) -> None:
  """Waits until a holder on another machine counts as dead.

  A run that was killed there starts again elsewhere within seconds.

  Args:
    place: the folder, for messages.
    field: where the user named it, for messages.
    holder: what the file says of it.
    signs: gives the time now and that of the last sign of life, by one clock.

  Raises:
    UserError: it gave a sign of life.
    Interrupted: the process was asked to stop.
  """
  found = signs()
  if not _fresh(found):
    return
  _, last = found
  where = holder.get('host', '?')
  say(
    f'{shown(place)}: held by a run on {where}; waiting up to {_SILENCE:.0f} s '
    'for a sign of life of it'
  )
  while _fresh(found := signs()):
    if found[1] != last:
      raise held(place, field, holder)
    interruption.check_alone()
    time.sleep(min(1.0, _SILENCE / 4))


def holder(root: epath.Path, name: str = RUN) -> dict[str, Any]:
  """What the file says; `alive` tells whether its process holds the folder.

  Returns:
    An empty dict where nothing ever ran.

  Raises:
    Unreadable: it can't be known.
  """
  path = pathlib.Path(root) / name
  found = parse(_content(path))
  if not found:
    return {}
  alive = False
  if found.get('status') == 'running':
    with contextlib.suppress(OSError):  # of a folder that can only be read
      alive = _fresh(_signs(path))
    if found.get('host') == socket.gethostname():
      alive = _locked(path)
  return found | {'alive': alive}


def _locked(path):
  with contextlib.suppress(OSError):
    file = os.open(path, os.O_RDONLY)
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
    finally:
      os.close(file)
  return False


def held(place: object, field: str, holder: dict[str, Any]) -> UserError:
  """That a folder is in use, and by whom; the arguments of `await_silence`."""
  who = (
    f'process {holder.get("process", "?")} on {holder.get("host", "?")}, '
    f'started {holder.get("started", "?")}'
  )
  return UserError(
    f'{field}: {shown(place)} is in use by {who}; wait for it, stop it, or '
    f'take another folder (of another machine: {_SILENCE:.0f} s after its last '
    'sign of life it counts as dead)'
  )


def _content(path):
  with reading(path):
    try:
      return path.read_bytes()
    except FileNotFoundError:
      return b''


def parse(content: bytes) -> dict[str, Any]:
  """What the file's content says; {} if it is none of ours."""
  try:
    found = json.loads(content)
  except (ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def _write(file, value):
  text = json.dumps(value, indent=1).encode() + b'\n'
  os.ftruncate(file, 0)
  os.pwrite(file, text, 0)


def _signs(path):
  """See `await_silence`; by the file system's own clock."""
  try:
    probe = path.with_name(f'.{path.name}.{os.getpid()}')
    probe.write_text('')
    now = probe.stat().st_mtime
    probe.unlink()
    return now, path.stat().st_mtime
  except FileNotFoundError:  # who held it has gone
    return math.inf, 0.0


def _fresh(signs):
  now, last = signs
  return now - last < _SILENCE


def _beat(path, ended):
  while not ended.wait(_BEAT):
    with contextlib.suppress(OSError):
      os.utime(path)
