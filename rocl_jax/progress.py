"""Progress on standard error: one moving line, or plain lines without a tty.

Of several processes the first one speaks.
"""

import contextlib
import functools
import sys
import time

from rocl_jax import processes

_TERMINAL_SECONDS = 0.2
_PLAIN_SECONDS = 20.0


def say(message: str) -> None:
  """Prints a line, over the moving one if there is one."""
  if not processes.is_first():
    return
  clear = '\r\x1b[K' if sys.stderr.isatty() else ''
  _print(f'{clear}{message}\n')


@functools.cache  # once for each message
def warn(message: str) -> None:
  """Prints a warning, unless it was printed before."""
  say(f'warning: {message}')


class Progress:
  """Counts work done, and shows rate and time left now and then.

    progress = Progress('finetune', total=120, per_count=256)
    progress.show(done=17, note='loss 1.203')

  Args:
    label: what is being done.
    total: how many counts make the whole.
    per_count: images a count, for the rate.
  """

  def __init__(self, label: str, total: int, per_count: int):
    self._label, self._total, self._per_count = label, total, per_count
    self._first: int | None = None  # counts done when the clock started
    self._began = self._shown = 0.0

  def show(self, done: int, note: str = '') -> None:
    """Shows the state unless it was shown a moment ago.

    The clock starts with the first call: the step before it was compiled.
    """
    terminal = sys.stderr.isatty()
    now = time.monotonic()
    if self._first is None:
      self._first, self._began, self._shown = done, now, now
    wait = _TERMINAL_SECONDS if terminal else _PLAIN_SECONDS
    if now - self._shown < wait or done <= self._first:
      return
    self._shown = now
    rate = (done - self._first) / (now - self._began)
    left = duration((self._total - done) / rate)
    line = (
      f'{self._label}  {done}/{self._total}  '
      f'{rate * self._per_count:,.0f} images/s  {left} left  {note}'
    )
    _show(line, terminal)


class Countdown:
  """Shows the time left of work that may turn out less than it seemed.

    countdown = Countdown('autoattack')
    countdown.show(worked=120, left=5000, note='apgd-t 2/9')

  Args:
    label: what is being done.
  """

  def __init__(self, label: str):
    self._label = label
    self._worked = 0.0
    self._began: float | None = None
    self._shown = 0.0

  def show(self, worked: float, left: float, note: str = '') -> None:
    """Shows the state unless it was shown a moment ago.

    The clock starts with the first call: the work before it was compiled.

    Args:
      worked: work done since the last call, in any unit.
      left: work that is left at most, in the same unit.
      note: what is being done.
    """
    terminal = sys.stderr.isatty()
    now = time.monotonic()
    if self._began is None:
      self._began = self._shown = now
      return
    self._worked += worked
    wait = _TERMINAL_SECONDS if terminal else _PLAIN_SECONDS
    if now - self._shown < wait or not self._worked:
      return
    self._shown = now
    seconds = left * (now - self._began) / self._worked
    _show(f'{self._label}  {note}  at most {duration(seconds)} left', terminal)


def _show(line, terminal):
  if not processes.is_first():
    return
  _print(f'\r\x1b[K{line}' if terminal else f'{line}\n')


def _print(text):
  # Who listened may have gone: no reason for a run to end.
  with contextlib.suppress(OSError, ValueError):
    sys.stderr.write(text)
    sys.stderr.flush()


def duration(seconds: float) -> str:
  """75 -> '1:15', 4000 -> '1:06:40'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02d}:{seconds:02d}'
  return f'{minutes}:{seconds:02d}'
