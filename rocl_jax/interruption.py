"""Asked to stop: finish the step, save, and leave within the grace time.

  install('the last save is whole')    # once, in the main thread of a command
  for ...:
    ...                                # one step, or one batch
    check()                            # raises Interrupted, if it is time

Cloud machines send SIGTERM some 30 seconds before they are gone, people send
SIGINT. Who can not come to a `check` in time, since a program is being
compiled or a step is long, is ended all the same: the last save is whole. A
second signal ends the process at once.
"""

import contextlib
import os
import signal
import sys
import threading

from rocl_jax import processes

PATIENCE = 20.0  # seconds to come to a `check`
GRACE = 28.0  # seconds to be gone, saved or not
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
  """The run was asked to stop. Not an error: nothing should catch it but who
  has something to save.

  Attributes:
    status: the exit status, 128 and the signal's number.
  """

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.status = 128 + number


class _State:
  """One for the process, as signals are."""

  number: int | None = None  # of the first signal
  heard = False  # whether the main thread knows


def install(message: str = 'interrupted') -> None:
  """Takes over SIGTERM and SIGINT; for the main thread of a command.

  A thread listens, since Python's own handlers wait for the main thread, which
  may be in a compiler for minutes.

  Args:
    message: what is said where there was no time to save.
  """
  read, write = os.pipe()
  os.set_blocking(write, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  for number in _SIGNALS:
    signal.signal(number, lambda *_: None)  # the thread acts
  threading.Thread(target=_listen, args=(read, message), daemon=True).start()


def requested() -> bool:
  """Whether a signal has come."""
  return _State.number is not None


def check() -> None:
  """Raises Interrupted if a signal has come.

  Of several processes all must come here, and all are interrupted together.
  """
  if processes.any_of(_State.number is not None):
    _State.heard = True
    raise Interrupted(_State.number or signal.SIGTERM)


def check_alone() -> None:
  """As `check`, where the other processes do not come: they hear of it when
  this one leaves."""
  if _State.number is not None:
    _State.heard = True
    raise Interrupted(_State.number)


def request() -> None:
  """Asks the run to stop at its next `check`, as a SIGTERM would."""
  if _State.number is None:
    _State.number = signal.SIGTERM


def _listen(read: int, message: str) -> None:
  while True:
    for number in os.read(read, 1):
      if number not in _SIGNALS:
        continue
      if _State.number is not None:
        os._exit(128 + number)
      _State.number = number
      for seconds in (PATIENCE, GRACE):
        late = seconds == GRACE
        timer = threading.Timer(seconds, _leave, (number, message, late))
        timer.daemon = True
        timer.start()
      name = signal.Signals(number).name
      _say(f'{name}: stopping after this step; once more stops at once')


def _leave(number: int, message: str, late: bool) -> None:
  if late or not _State.heard:
    _say(message)
    os._exit(128 + number)


def _say(text: str) -> None:
  # As `print` may wait for a lock that the main thread holds.
  with contextlib.suppress(Exception):  # nobody may listen any more
    os.write(sys.stderr.fileno(), f'\n{text}\n'.encode())
