"""Times taken side by side: all jobs in turn, round after round.

What else the machine does then hits every job alike. Compilation and the first
call are not in the times.

A job's threads may spin on for a while after its turn, waiting for more work:
OpenMP's for up to 0.2 s. Each job's turn starts after a pause in which those of
the last one fall asleep, so that none slows the next, and each keeps the
waiting that its library chose.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

SETTLE = 0.3  # seconds

Job = Callable[[], Any]  # runs once and waits for its own result


def interleave(
  jobs: Mapping[str, Job], rounds: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
  """Seconds of each job in each round, after one warm-up call of each."""
  progress(f'warming up {len(jobs)} jobs')
  for job in jobs.values():
    job()
  seconds: dict[str, list[float]] = {name: [] for name in jobs}
  for number in range(rounds):
    progress(f'round {number + 1} of {rounds}')
    for name, job in jobs.items():
      time.sleep(SETTLE)
      start = time.perf_counter()
      job()
      seconds[name].append(time.perf_counter() - start)
  return seconds


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
