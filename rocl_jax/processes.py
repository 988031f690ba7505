"""Several processes as one run: who writes, what all agree on, who is gone.

  start('10.0.0.1:8476', count=2, index=0)    # before any device work
  agree({'config': config, 'images': '3ad1'})
  records = from_first(lambda: results.read(path))
  if is_first(): ...

The first process alone reads and writes the work directory, and tells the
others what it found, so that all of them take the same turns. Each gives a
sign of life every other second, and an ending process says why it ends. Who
hears nothing of another for `SILENCE` seconds names it and leaves, instead of
waiting for it in a collective for ever. With one process all of this is
nothing.
"""

import contextlib
import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from rocl_jax.errors import RunFailed, UserError
from rocl_jax.trees import flatten

JOIN = 60  # seconds that all have to come
SILENCE = 20.0  # seconds without a sign of life
_BEAT = 2.0
_PATIENCE = 3.0  # seconds for the main thread to find out for itself
_SAVING = 30.0
_FAILED = 3

T = TypeVar('T')


class _Group:
  """What this process is among the others; one for the process."""

  count = 1
  index = 0
  gone: str | None = None  # who, and why
  leaving = False
  stop: Any = None  # the last answer of `any_of`, still on its way


def start(address: str, count: int, index: int, join: int = JOIN) -> None:
  """Joins the other processes; to be called before any device work.

  Args:
    address: host and port of the first process.
    count: of all processes.
    index: of this one.
    join: seconds to wait for the others.

  Raises:
    UserError: numbers that can not be.
    RunFailed: not all have come in time; the message says who has not.
  """
  if count < 1 or not 0 <= index < count:
    raise UserError(
      f'--process: found {index} of {count}, wanted 0 to {count - 1}'
    )
  if count == 1:
    return
  host, colon, port = address.rpartition(':')
  if not colon or not host or not port.isdigit():
    raise UserError(f'--coordinator: found {address!r}, wanted HOST:PORT')
  timer = threading.Timer(join, _nobody, (address, count, index, join))
  timer.daemon = True
  timer.start()
  # JAX's own limits come after ours: it ends a process by SIGABRT.
  jax.distributed.initialize(
    address,
    count,
    index,
    initialization_timeout=join + 30,
    heartbeat_timeout_seconds=int(SILENCE) + 30,
  )
  timer.cancel()
  _Group.count, _Group.index = count, index
  _tell('host', socket.gethostname())
  threading.Thread(target=_beat, daemon=True).start()
  threading.Thread(target=_watch, daemon=True).start()


def is_first() -> bool:
  """Whether this process reads and writes the work directory."""
  return _Group.index == 0


def count() -> int:
  """How many processes there are."""
  return _Group.count


def from_first(function: Callable[[], T]) -> T:
  """What the function returns in the first process, which alone calls it.

  All processes must come here. The value must be picklable.

  Raises:
    UserError, RunFailed: as the function did, in every process.
  """
  if _Group.count == 1:
    return function()
  from jax.experimental import multihost_utils

  content = b''
  if is_first():
    value: Any = None
    problem: Exception | None = None
    try:
      value = function()
    except (UserError, RunFailed) as e:
      problem = e
    content = pickle.dumps((value, problem))
  size = int(multihost_utils.broadcast_one_to_all(np.int64(len(content))))
  # Few different sizes: each is a program to compile.
  room = np.zeros(1 << max(size - 1, 4095).bit_length(), np.uint8)
  room[: len(content)] = np.frombuffer(content, np.uint8)
  received = np.asarray(multihost_utils.broadcast_one_to_all(room))
  value, problem = pickle.loads(received[:size].tobytes())
  if problem is not None:
    raise problem
  return value


def agree(facts: Mapping[str, Any]) -> None:
  """Compares what must be the same in all processes.

  Args:
    facts: JSON values by name; dicts are compared field by field.

  Raises:
    UserError: in every process; names the first difference, and whose it is.
  """
  if _Group.count == 1:
    return
  from jax.experimental import multihost_utils

  gather = multihost_utils.process_allgather
  own = json.dumps({'host': socket.gethostname(), 'facts': dict(facts)})
  content = np.frombuffer(own.encode(), np.uint8)
  size = int(np.max(gather(np.int64(len(content)))))
  room = np.full(size, ord(' '), np.uint8)
  room[: len(content)] = content
  everyone = [json.loads(row.tobytes()) for row in np.asarray(gather(room))]
  first = flatten(everyone[0]['facts'])
  for i, other in enumerate(everyone[1:], 1):
    mine = flatten(other['facts'])
    for name in sorted(first.keys() | mine.keys()):
      if first.get(name) != mine.get(name):
        raise UserError(
          f'{name.replace("/", ".")}: process {i} on {other["host"]} has '
          f'{mine.get(name)!r}, process 0 on {everyone[0]["host"]} has '
          f'{first.get(name)!r}; wanted the same everywhere'
        )


def any_of(flag: bool) -> bool:
  """Whether the flag was set in any process at the last call.

  Every process gets the same answer. It is that of the call before, which has
  arrived meanwhile, so that nobody waits.
  """
  if _Group.count == 1:
    return flag
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  mesh = Mesh(np.array(jax.devices()), ('data',))
  split = NamedSharding(mesh, PartitionSpec('data'))
  local = np.full(jax.local_device_count(), flag)
  flags = jax.make_array_from_process_local_data(split, local)
  last = _Group.stop
  _Group.stop = _any(mesh)(flags)
  return last is not None and bool(last)


def _any(mesh: Any) -> Callable[[jax.Array], jax.Array]:
  from jax.sharding import NamedSharding, PartitionSpec

  if mesh not in _PROGRAMS:
    everywhere = NamedSharding(mesh, PartitionSpec())
    _PROGRAMS[mesh] = jax.jit(lambda x: x.any(), out_shardings=everywhere)
  return _PROGRAMS[mesh]


_PROGRAMS: dict[Any, Callable[..., jax.Array]] = {}


def leave(status: int, why: str = '') -> None:
  """Ends this process, telling the others why; returns if it is alone."""
  if _Group.count == 1:
    return
  _Group.leaving = True
  _tell('end', why or f'exit status {status}')
  if is_first():  # JAX aborts the others as soon as this process is gone
    _wait_for_the_others()
  sys.stdout.flush()
  sys.stderr.flush()
  # Not sys.exit: JAX would wait for the others, who may be gone.
  os._exit(status)


def _wait_for_the_others() -> None:
  deadline = time.monotonic() + 4 * _BEAT
  while time.monotonic() < deadline:
    time.sleep(0.2)
    with contextlib.suppress(Exception):
      if len(_client().key_value_dir_get('rocl_jax/end/')) == _Group.count:
        time.sleep(0.5)
        return


def finish() -> None:
  """The end of a run that succeeded: waits for the others, so that none is
  taken for dead."""
  if _Group.count == 1:
    return
  from jax.experimental import multihost_utils

  multihost_utils.sync_global_devices('finished')
  _Group.leaving = True


def explain() -> str | None:
  """Says who is gone, where that is why a collective failed; else None.

  It takes up to `SILENCE` seconds to know.
  """
  if _Group.count == 1:
    return None
  deadline = time.monotonic() + SILENCE + 3 * _BEAT
  while _Group.gone is None and time.monotonic() < deadline:
    time.sleep(0.1)
  return _Group.gone and _farewell(_Group.gone)


def _client() -> Any:
  # JAX has no public way to its key-value store.
  from jax._src import distributed

  return distributed.global_state.client


def _tell(what: str, value: str) -> None:
  key = f'rocl_jax/{what}/{_Group.index}'
  # Without the first process there is no store: `_watch` says so.
  with contextlib.suppress(Exception):
    _client().key_value_set(key, value, allow_overwrite=True)


def _beat() -> None:
  number = 0
  while not _Group.leaving:
    number += 1
    _tell('beat', str(number))
    time.sleep(_BEAT)


def _watch() -> None:
  """Looks for processes that have ended, or give no sign of life."""
  seen: dict[str, tuple[str, float]] = {}
  unreachable_since: float | None = None
  while not _Group.leaving:
    now = time.monotonic()
    try:
      beats = dict(_client().key_value_dir_get('rocl_jax/beat/'))
      ends = dict(_client().key_value_dir_get('rocl_jax/end/'))
      unreachable_since = None
    except Exception:
      unreachable_since = unreachable_since or now
      if now - unreachable_since > 2 * _BEAT and not is_first():
        _lost('process 0 can not be reached')
      time.sleep(_BEAT)
      continue
    for key, value in beats.items():
      name = key.rpartition('/')[2]
      if int(name) == _Group.index:
        continue
      if seen.get(name, ('', 0.0))[0] != value:
        seen[name] = (value, now)
      elif now - seen[name][1] > SILENCE:
        _lost(
          f'process {name}{_where(name)} gave no sign of life for '
          f'{SILENCE:.0f} s'
        )
    for key, why in ends.items():
      name = key.rpartition('/')[2]
      if int(name) != _Group.index:
        # One that was interrupted has told all others, who may be saving.
        patience = _SAVING if why.startswith('SIG') else _PATIENCE
        _lost(f'process {name}{_where(name)} ended: {why}', patience)
    time.sleep(_BEAT)


def _where(name: str) -> str:
  try:
    return f' on {_client().key_value_try_get(f"rocl_jax/host/{name}")}'
  except Exception:
    return ''


def _lost(who: str, patience: float = _PATIENCE) -> None:
  """Leaves, unless the main thread does so first: it may hang for ever."""
  _Group.gone = who
  time.sleep(patience)
  if _Group.leaving:
    return
  os.write(sys.stderr.fileno(), f'\n{_farewell(who)}\n'.encode())
  leave(_FAILED, who)


def _farewell(who: str) -> str:
  return (
    f'process {_Group.index} of {_Group.count}: {who}; stopping. Start all of '
    'them again: the run goes on from the last save'
  )


def _nobody(address: str, count: int, index: int, join: int) -> None:
  text = (
    f'\nprocess {index} of {count}: not all {count} processes have come to '
    f'{address} within {join} s; start all of them, with the same '
    '--coordinator and --processes, and --process=0 to '
    f'{count - 1}\n'
  )
  os.write(sys.stderr.fileno(), text.encode())
  os._exit(_FAILED)
