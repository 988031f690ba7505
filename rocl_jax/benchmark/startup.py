"""From process start to the first training step, without and with a cache."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rocl_jax.benchmark import timing
from rocl_jax.benchmark.settings import Settings
from rocl_jax.errors import RunFailed

_DONE = 'first step'  # what `loop` says then


def measure(
  settings: Settings, say: Callable[[str], None]
) -> list[dict[str, Any]]:
  """One record a width: seconds of first and of second starts."""
  return [_measure_width(w, settings, say) for w in settings.width]


def _measure_width(width, settings, say):
  first, second = [], []
  for number in range(settings.rounds):
    with tempfile.TemporaryDirectory() as cache:
      say(f'width {width}, round {number + 1}: first start')
      first.append(_start(width, cache))
      say(f'width {width}, round {number + 1}: second start')
      second.append(_start(width, cache))
  return {
    'width': width,
    'first': timing.summary(first)._asdict(),
    'second': timing.summary(second)._asdict(),
    'ratio': timing.ratio(first, second)._asdict(),
  }


def _start(width: int, cache: str) -> float:
  """Seconds until the first step of supervised training on the digits."""
  root = Path(__file__).resolve().parents[2]
  with tempfile.TemporaryDirectory() as workdir:
    command = [
      sys.executable,
      str(root / 'train.py'),
      f'--config={root / "configs" / "quickstart.py"}',
      f'--workdir={workdir}',
      '--config.stages=supervised,',
      '--config.compare=',
      f'--config.model.width={width}',
    ]
    environment = {'JAX_COMPILATION_CACHE_DIR': cache}
    began = time.perf_counter()
    process = subprocess.Popen(
      command,
      stderr=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      text=True,
      env=os.environ | environment,
    )
    lines = []
    assert process.stderr is not None
    with process:
      for line in process.stderr:
        lines.append(line)
        if _DONE in line:
          seconds = time.perf_counter() - began
          process.kill()
          return seconds
  raise RunFailed(f'train.py did not come to its first step: {lines[-1:]}')
