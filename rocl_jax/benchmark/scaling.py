"""Weak and strong scaling of the TRADES step over simulated devices.

The devices are slices of one CPU: times tell what the split costs, not what
real devices gain. Collectives are read from the compiled program, one device's
share of it; there they are as on real devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from rocl_jax import hlo, models
from rocl_jax.benchmark import programs, timing
from rocl_jax.benchmark.settings import Settings


def measure(
  settings: Settings, say: Callable[[str], None]
) -> list[dict[str, Any]]:
  """One record a kind of scaling and number of devices."""
  scaling = settings.scaling
  model = models.Settings(
    name=settings.recipe.model.name, width=scaling.width, dtype='float32'
  )
  compiled = {}
  for kind in ('strong', 'weak'):
    for count in scaling.devices:
      say(f'compiling for {count} devices, {kind} scaling')
      batch = scaling.batch * (count if kind == 'weak' else 1)
      cell = programs.Cell(
        model, batch, scaling.steps, settings.image_size, settings.classes
      )
      section = programs.with_cell(settings.recipe.supervised, cell)
      bench = programs.bench(cell, jax.devices()[:count])
      step = programs.training_step(bench, 'supervised', section)
      compiled[kind, count] = (batch, step)
  jobs = {
    f'{kind}, {count}': step.job
    for (kind, count), (_, step) in compiled.items()
  }
  seconds = timing.interleave(jobs, settings.rounds, say)
  records = []
  for (kind, count), (batch, step) in compiled.items():
    times = timing.summary(seconds[f'{kind}, {count}'])
    records.append(
      {
        'kind': kind,
        'devices': count,
        'batch': batch,
        'model': dataclasses.asdict(model),
        'steps': scaling.steps,
        **times._asdict(),
        'images_per_second': batch / times.median,
        'memory_bytes_per_device': step.memory,
        'collectives': {
          name: collective._asdict()
          for name, collective in hlo.collectives(step.program).items()
        },
      }
    )
  return records
