"""Several processes as one run: who writes, what all agree on, who is gone.

  start(cluster.find('10.0.0.1:8476', 2, 0))    # before any device work
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
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from rocl_jax.cluster import Member
from rocl_jax.errors import RunFailed, UserError, of_disk, one_line
from rocl_jax.trees import flatten

SILENCE = 20.0  # seconds without a sign of life
STALL = 300.0  # seconds that one may keep the others waiting
_BEAT = 2.0
_AT_ONCE = 1.0  # second after which it is said who is waited for
_PATIENCE = 3.0  # seconds for the main thread to find out for itself
_SAVING = 30.0
_FAILED = 3

T = TypeVar('T')


class _Group:
  """What this process is among the others; one for the process."""

  count = 1
  index = 0
  points = 0  # places that all must pass, and this process has
  gone: str | None = None  # who, and why
  line: socket.socket | None = None  # to the first one, which never speaks
  leaving = False
  busy = False  # with what must not be cut short
  stop: Any = None  # the last answer of `any_of`, still on its way


def start(member: Member) -> None:
  """Joins the other processes; to be called before any device work.

  Args:
    member: see `cluster.find`.

  Raises:
    UserError: the address is not free, or there is no such host.
    RunFailed: not all have come in time; the message says who has not.
  """
  address, count, index = member.address, member.count, member.index
  join = member.join
  if count == 1:
    return
  port = address.rpartition(':')[2]
  if member.by_hand:  # elsewhere the name of a pod may come after the pod
    try:
      socket.getaddrinfo(member.host, None)
    except (OSError, UnicodeError) as e:
      raise UserError(
        f'--coordinator: found {address}, and there is no host {member.host}: '
        f'{one_line(e)}'
      ) from None
  met = threading.Event()
  here: list[
    tuple[int, socket.socket]
  ] = []  # those that have come to the first
  waiting = (member, here, met)
  threading.Thread(
    target=_say_who_is_awaited, args=waiting, daemon=True
  ).start()
  try:
    missing = _meet(member.host, int(port) + 1, count, index, join, here)
  except OSError as e:
    raise UserError(
      f'--coordinator: port {int(port) + 1}: {e.strerror}; wanted {port} and '
      'the port after it'
    ) from None
  finally:
    met.set()
  if missing:
    raise RunFailed(
      f'process {index} of {count} (by {member.source}): {missing} within '
      f'{join} s; stopping. Start all of them, with the same --coordinator and '
      '--processes'
    )
  # JAX's own limits come after ours: it ends a process by SIGABRT.
  try:
    jax.distributed.initialize(
      address,
      count,
      index,
      local_device_ids=member.devices,
      initialization_timeout=join + 30,
      heartbeat_timeout_seconds=int(SILENCE) + 100,
    )
  except RuntimeError as e:
    raise RunFailed(f'--coordinator: {address}: {one_line(e)}') from None
  _Group.count, _Group.index = count, index
  _tell('host', socket.gethostname())
  threading.Thread(target=_beat, daemon=True).start()
  threading.Thread(target=_watch, daemon=True).start()
  if _Group.line is not None:
    threading.Thread(target=_watch_first, daemon=True).start()


def _say_who_is_awaited(
  member: Member, here: list[tuple[int, socket.socket]], met: threading.Event
) -> None:
  """Whoever started one process alone, or less than all, learns it at once."""
  if met.wait(_AT_ONCE):
    return
  awaited = f'process 0 at {member.address}'
  if not member.index:
    come = {number for number, _ in here}
    absent = [str(i) for i in range(1, member.count) if i not in come]
    more = f' and {len(absent) - 5} more' if len(absent) > 5 else ''
    awaited = f'process {", ".join(absent[:5])}{more}'
  line = (
    f'process {member.index} of {member.count} (by {member.source}): waiting '
    f'up to {member.join} s for {awaited}; to train with this process alone: '
    '--processes=1'
  )
  with contextlib.suppress(Exception):  # nobody may listen
    os.write(sys.stderr.fileno(), f'{line}\n'.encode())


def _meet(
  host: str,
  port: int,
  count: int,
  index: int,
  join: float,
  here: list[tuple[int, socket.socket]],
) -> str:
  """All come to one port first: JAX can not tell who is missing.

  Returns:
    What is wrong, the same for all that have come; '' if nothing is.
  """
  deadline = time.monotonic() + join
  left = lambda: max(deadline - time.monotonic(), 0.01)
  if index:
    while True:
      try:
        line = socket.create_connection((host, port), left())
        line.sendall(f'{index} {count}\n'.encode())
        line.settimeout(left() + 5)
        answer = line.makefile().readline()
        _Group.line = line
        return answer.strip() if answer else 'process 0 has gone'
      except OSError:
        if time.monotonic() > deadline:
          return f'process 0 has not come to {host}:{port}'
        time.sleep(0.2)
  problem = ''
  with contextlib.ExitStack() as open_lines:
    server = open_lines.enter_context(_server(host, port))
    while len(here) < count - 1 and not problem:
      server.settimeout(left())
      try:
        line = open_lines.enter_context(server.accept()[0])
      except TimeoutError:
        absent = sorted(set(range(1, count)) - {number for number, _ in here})
        problem = f'process {", ".join(map(str, absent))} has not come'
        break
      try:
        line.settimeout(5)
        other, others = map(int, line.makefile().readline().split())
      except (OSError, ValueError):
        continue  # somebody else, who tried the door
      if others != count:
        problem = f'process {other} was started as one of {others}'
      elif other in [number for number, _ in here]:
        problem = f'two processes have come as number {other} of {count}'
      here.append((other, line))
    for _, line in here:
      with contextlib.suppress(OSError):
        line.sendall(f'{problem}\n'.encode())
    if not problem:  # they stay open: the others notice when this one dies
      _OPEN.extend(line for _, line in here)
      open_lines.pop_all()
      server.close()
  return problem


def _server(host: str, port: int) -> socket.socket:
  """Listens on all addresses, of IPv6 where the host is."""
  if ':' not in host:
    return socket.create_server(('', port))
  both = socket.has_dualstack_ipv6()
  return socket.create_server(
    ('', port), family=socket.AF_INET6, dualstack_ipv6=both
  )


_OPEN: list[socket.socket] = []


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
    except OSError as e:
      problem = RunFailed(of_disk(e))
    except Exception as e:  # a bug: the others must not wait
      traceback.print_exc()
      problem = RunFailed(f'{type(e).__name__}: {e}')
    content = pickle.dumps((value, problem))
  _Group.points += 1
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

  _Group.points += 1
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

  _Group.points += 1
  mesh = Mesh(np.array(jax.devices()), ('data',))
  split = NamedSharding(mesh, PartitionSpec('data'))
  local = np.full(jax.local_device_count(), flag)
  flags = jax.make_array_from_process_local_data(split, local)
  last = _Group.stop
  _Group.stop = _any(mesh)(flags)
  stop = last is not None and bool(last)
  if stop:  # the others need this process for what is under way
    jax.block_until_ready(_Group.stop)
  return stop


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
  _say_farewell()
  if is_first():  # JAX aborts the others as soon as this process is gone
    _wait_for_the_others()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(Exception):
      stream.flush()
  # Not sys.exit: JAX would wait for the others, who may be gone.
  os._exit(status)


def _wait_for_the_others() -> None:
  wait = _PATIENCE if _Group.gone else 4 * _BEAT
  deadline = time.monotonic() + wait
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

  _Group.points += 1
  multihost_utils.sync_global_devices('finished')
  _Group.leaving = True
  _say_farewell()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
  """While within, this process does not leave because others have ended."""
  _Group.busy = True
  try:
    yield
  finally:
    _Group.busy = False


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
    _tell('beat', f'{number} {_Group.points}')
    time.sleep(_BEAT)


def _watch() -> None:
  """Looks for processes that have ended, or give no sign of life."""
  seen: dict[str, tuple[str, float]] = {}
  moved: dict[str, tuple[int, float]] = {}
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
      points = int(value.split()[1])
      if points >= _Group.points or moved.get(name, (-1, 0.0))[0] != points:
        moved[name] = (points, now)
      elif now - moved[name][1] > STALL:
        _lost(
          f'process {name}{_where(name)} hangs: the others have waited for it '
          f'for {STALL:.0f} s'
        )
    for key, why in ends.items():
      name = key.rpartition('/')[2]
      if int(name) != _Group.index:
        # One that was interrupted has told all others, who may be saving.
        patience = _SAVING if why.startswith('SIG') else _PATIENCE
        _lost(f'process {name}{_where(name)} ended: {why}', patience)
    time.sleep(_BEAT)


def _watch_first() -> None:
  """Notices at once when the first process is gone without a word: JAX aborts
  the others then, and does not say why."""
  line = _Group.line
  assert line is not None
  host = _where('0')
  line.settimeout(None)
  with contextlib.suppress(OSError):
    if line.recv(1):
      return  # a farewell
  with contextlib.suppress(OSError):
    who = f'process 0{host} has gone'
    os.write(sys.stderr.fileno(), f'\n{_farewell(who)}\n'.encode())
  os._exit(_FAILED)


def _say_farewell() -> None:
  for line in _OPEN:
    with contextlib.suppress(OSError):
      line.sendall(b'.')


def _where(name: str) -> str:
  try:
    return f' on {_client().key_value_try_get(f"rocl_jax/host/{name}")}'
  except Exception:
    return ''


def _lost(who: str, patience: float = _PATIENCE) -> None:
  """Leaves, unless the main thread does so first: it may hang for ever."""
  _Group.gone = who
  time.sleep(patience)
  while _Group.busy:
    time.sleep(0.1)
  if _Group.leaving:
    return
  with contextlib.suppress(Exception):  # nobody may listen any more
    os.write(sys.stderr.fileno(), f'\n{_farewell(who)}\n'.encode())
  leave(_FAILED, who)


def _farewell(who: str) -> str:
  return (
    f'process {_Group.index} of {_Group.count}: {who}; stopping. Start all of '
    'them again: the run goes on from the last save'
  )
