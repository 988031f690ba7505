"""FLOPs and bytes of each step: counted by hand, and from what XLA compiled."""

from collections.abc import Callable
from typing import Any

import jax

from rocl_jax import hlo
from rocl_jax.benchmark import attacks, programs
from rocl_jax.benchmark.settings import Settings


def measure(
  settings: Settings, say: Callable[[str], None]
) -> list[dict[str, Any]]:
  """One record a cell, with a row for each program; nothing is run."""
  records = []
  for cell in attacks.cells(settings):
    say(cell.name)
    bench = programs.bench(cell, jax.devices()[:1])
    built = attacks.build(bench, settings, say)
    records.append(
      {
        'cell': cell._asdict() | {'model': vars(cell.model)},
        'programs': {
          name: _row(cell, program)
          for name, program in built.items()
          if program.work
        },
      }
    )
  return records


def _row(cell, program):
  traffic = hlo.traffic(program.program) / cell.batch
  try:
    flops = hlo.flops(program.program) / cell.batch
  except ValueError:  # a library's convolutions have no text
    flops = None
  return {
    'hand_flops_per_image': program.work,
    'compiled_flops_per_image': flops,
    'bytes_per_image': traffic,
    'flops_per_byte': program.work / traffic,
    'memory_bytes': program.memory,
  }
