"""How far float32 runs on several devices drift from one on a single device.

Same seed, same images, same draws: what differs is the order in which sums
over the batch are added. A ReLU or a sign in the attack that flips makes a
rounding error a step's length, so runs part, as two runs on different
hardware do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rocl_jax import compiled, data, loop, mesh, models, optim
from rocl_jax.benchmark import programs
from rocl_jax.benchmark.settings import Settings
from rocl_jax.stages import STAGES
from rocl_jax.trees import flatten
from rocl_jax.types import TrainingSet

AFTER = (1, 20)  # steps
_SEED = 0


def measure(
  settings: Settings, say: Callable[[str], None]
) -> list[dict[str, Any]]:
  """One record a stage: distances by devices and steps, as a share of the
  way that the single device has gone."""
  scaling = settings.scaling
  train = data.load('digits', '', 0).train
  shape = train.images.shape[1:]
  cell = programs.Cell(
    models.Settings(
      name=settings.recipe.model.name, width=scaling.width, dtype='float32'
    ),
    scaling.batch,
    scaling.steps,
    shape[0],
    10,
  )
  model = models.build(cell.model, cell.num_classes)
  fresh = jax.jit(lambda: model.init(jax.random.key(_SEED), shape))()
  records = []
  for name in STAGES:
    section = programs.with_cell(getattr(settings.recipe, name), cell)
    upstream = fresh
    if name == 'finetune':
      pruning = STAGES['prune'].stage(model, settings.recipe.prune)
      upstream = pruning.finish(pruning.start(fresh, jax.random.key(_SEED)))
    upstream = jax.device_get(upstream)
    stage = STAGES[name].stage(model, section)
    paths = {}
    for count in (1, *[n for n in scaling.devices if n > 1]):
      say(f'{name} on {count} devices')
      paths[count] = _walk(name, section, stage, upstream, train, count)
    start, *alone = paths.pop(1)
    records.append(
      {
        'stage': name,
        'model': dataclasses.asdict(cell.model),
        'data': 'digits',
        'batch': cell.batch,
        'attack_steps': cell.steps,
        'optimizer': dataclasses.asdict(section.optimizer),
        'drift': {
          f'{count} devices': {
            f'{steps} steps': _distance(there, here) / _distance(start, here)
            for steps, there, here in zip(AFTER, path[1:], alone, strict=True)
          }
          for count, path in paths.items()
        },
      }
    )
  return records


def _walk(name, section, stage, upstream, train, count):
  """What is trained at the start, and after each number of steps."""
  where = Mesh(np.array(jax.devices()[:count]), ('data',))
  everywhere = mesh.replicated(where)
  steps = len(train.labels) // section.batch_size
  optimizer, _ = optim.make(
    section.optimizer, section.total_epochs, steps, section.segments
  )
  step = loop.make_step(stage, optimizer, where, section.microbatch)
  key = loop.stage_key(_SEED, name)
  batches = jax.device_put(TrainingSet.of(*train), everywhere)
  order = loop.epoch_order(
    key, jnp.int32(0), len(train.labels), section.batch_size
  )
  first = loop.first_state(stage, optimizer, step, (batches, order, key))
  state = jax.jit(first, out_shardings=everywhere)(upstream, key)
  run = compiled.jit(step, donate_argnums=0, out_shardings=everywhere)
  path = [_flat(state)]
  for done in range(1, max(AFTER) + 1):
    state, _ = run(state, batches, order, key)
    if done in AFTER:
      path.append(_flat(state))
  return path


def _flat(state):
  leaves = flatten(jax.device_get(state.trained.trainable))
  return np.concatenate([leaves[path].ravel() for path in sorted(leaves)])


def _distance(a, b):
  return float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)))
