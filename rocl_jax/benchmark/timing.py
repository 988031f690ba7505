"""Times taken side by side: all jobs in turn, round after round.

What else the machine does then hits every job alike. Compilation and the first
calls are not in the times.

On a CPU a turn is one call. A job's threads may spin on for a while after it,
waiting for more work: OpenMP's for up to 0.2 s. Each turn starts after a pause
in which those of the last one fall asleep, so that none slows the next, and
each keeps the waiting that its library chose.

On an accelerator a turn is a row of calls without a pause: its queue stays
full, as in a run, and its clocks stay up. It is waited for once, at the end.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

SETTLE = 0.3  # seconds of the pause
ROW_SECONDS, ROW_CALLS = 0.5, 10  # a row is at least as long as both


class Job(NamedTuple):
  """Work on a device.

  Attributes:
    dispatch: starts it once, and may return before it is done.
    wait: takes what the last `dispatch` has returned, and returns it when that
      and all dispatched before it is done.
  """

  dispatch: Callable[[], Any]
  wait: Callable[[Any], Any] = jax.block_until_ready

  def run(self) -> Any:
    """Does it once."""
    return self.wait(self.dispatch())


def interleave(
  jobs: Mapping[str, Job], rounds: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
  """Seconds of a call of each job in each round, after a warm-up."""
  progress(f'warming up {len(jobs)} jobs')
  calls = {name: _warm_up(job) for name, job in jobs.items()}
  seconds: dict[str, list[float]] = {name: [] for name in jobs}
  for number in range(rounds):
    progress(f'round {number + 1} of {rounds}')
    for name, job in jobs.items():
      if not in_rows():
        time.sleep(SETTLE)
      seconds[name].append(_seconds(job, calls[name]))
  return seconds


def in_rows() -> bool:
  """Whether a turn is a row of calls."""
  return jax.default_backend() != 'cpu'


def _warm_up(job):
  """Returns how many calls a turn takes."""
  if not in_rows():
    job.run()
    return 1
  # What is compiled when it first runs may record graphs in the call after.
  fastest = min(_seconds(job, 1) for _ in range(3))
  return max(ROW_CALLS, math.ceil(ROW_SECONDS / fastest))


def _seconds(job, calls):
  """Of one call, on average over a row that is waited for once."""
  start = time.perf_counter()
  for _ in range(calls):
    last = job.dispatch()
  job.wait(last)
  return (time.perf_counter() - start) / calls


class Summary(NamedTuple):
  """Of n times: the median, the smallest and the quartiles, in seconds."""

  n: int
  median: float
  minimum: float
  quartiles: tuple[float, float]


def summary(seconds: list[float]) -> Summary:
  return Summary(
    n=len(seconds),
    median=statistics.median(seconds),
    minimum=min(seconds),
    quartiles=quartiles(seconds),
  )


class Ratio(NamedTuple):
  """How many times as long one job takes as another.

  Attributes:
    median: ratio of the medians.
    minimum: ratio of the smallest times.
    quartiles: of the ratios within each round.
  """

  median: float
  minimum: float
  quartiles: tuple[float, float]


def ratio(slow: list[float], fast: list[float]) -> Ratio:
  return Ratio(
    median=statistics.median(slow) / statistics.median(fast),
    minimum=min(slow) / min(fast),
    quartiles=quartiles([s / f for s, f in zip(slow, fast, strict=True)]),
  )


def quartiles(values: list[float]) -> tuple[float, float]:
  if len(values) < 2:
    return values[0], values[0]
  low, _, high = statistics.quantiles(values, n=4, method='inclusive')
  return low, high
