"""What one step of each stage gives on a number of devices, as JSON lines.

  JAX_ENABLE_X64=1 python tests/topology.py 1,2,4,8 pretrain,prune
  python tests/topology.py 2,4 draws 127.0.0.1:4711 2 0      # one of two

A process of its own, as JAX fixes the number of devices when it starts.
"""

import dataclasses
import json
import sys
import zlib

import jax

DEVICES = [int(n) for n in sys.argv[1].split(',')]
NAMES = sys.argv[2].split(',')
COUNT = int(sys.argv[4]) if len(sys.argv) > 4 else 1
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', max(DEVICES) // COUNT)
if COUNT > 1:
  jax.distributed.initialize(sys.argv[3], COUNT, int(sys.argv[5]))

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from test_stages import settings_of  # noqa: E402

from rocl_jax import augment, loop, mesh, models, optim  # noqa: E402
from rocl_jax.attacks.pgd import start_noise  # noqa: E402
from rocl_jax.stages import STAGES  # noqa: E402
from rocl_jax.trees import flatten  # noqa: E402
from rocl_jax.types import TrainingSet  # noqa: E402

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (48, 8, 8, 3), np.uint8)
LABELS = RANDOM.integers(0, 4, 48).astype(np.int32)
X64 = jax.config.values['jax_enable_x64']
DTYPE = 'float64' if X64 else 'float32'
BATCH = 16


def mesh_of(count):
  devices = np.array(jax.devices())
  if COUNT > 1:  # equally many of each process
    devices = devices.reshape(COUNT, -1)[:, : count // COUNT].reshape(-1)
  return Mesh(devices[:count], ('data',))


def digest(array):
  return zlib.crc32(np.ascontiguousarray(array).tobytes())


def draws(where):
  """What chance decides, as checksums; and the images, summed."""
  everywhere = mesh.replicated(where)

  def draw(images):
    key = loop.stage_key(3, 'supervised')
    order = loop.epoch_order(key, 1, 48, BATCH)
    batch = mesh.split(images[order[1]], where)
    views = augment.views(batch, key, 0.08)
    crops = augment.crops(batch, key, 2, True)
    starts = [
      start_noise(key, views.shape, 8 / 255, 'linf', start)
      for start in ('uniform', 'gaussian')
    ]
    return order, starts, views, crops

  images = jax.device_put(IMAGES, everywhere)
  order, starts, views, crops = jax.jit(draw, out_shardings=everywhere)(images)
  return {
    'draws': [digest(x.addressable_data(0)) for x in (order, *starts)],
    'images': [
      np.asarray(x.addressable_data(0)).reshape(-1).tolist()
      for x in (views, crops)
    ],
  }


def upstream_of(model, name):
  fresh = model.init(jax.random.key(0), (8, 8, 3))
  if X64:
    fresh = jax.tree.map(lambda x: x.astype(jnp.float64), fresh)
  if name != 'finetune':
    return fresh
  pruning = STAGES['prune'].stage(model, settings_of('prune'))
  return pruning.finish(pruning.start(fresh, jax.random.key(0)))


def first_step(where, name):
  """Loss, and what the first step changes: the gradient, by the rate."""
  model = models.build(
    models.Settings(name='resnet8', width=4, dtype=DTYPE), num_classes=4
  )
  settings = settings_of(name, batch_size=BATCH)
  constant = {'schedule': 'constant', 'learning_rate': 0.1}
  optimizer = dataclasses.replace(settings.optimizer, **constant)
  stage = STAGES[name].stage(model, settings)
  optimizer, _ = optim.make(optimizer, 1, 3, 1)
  everywhere = mesh.replicated(where)
  step = loop.make_step(stage, optimizer, where, settings.microbatch)
  data = jax.device_put(TrainingSet.of(IMAGES, LABELS), everywhere)
  key = loop.stage_key(3, name)
  order = loop.epoch_order(key, 0, 48, BATCH)
  first = loop.first_state(stage, optimizer, step, (data, order, key))
  state = jax.jit(first, out_shardings=everywhere)(
    jax.device_get(upstream_of(model, name)), key
  )
  before = flatten(jax.device_get(state.trained.trainable))
  state, seen = jax.jit(step, out_shardings=everywhere)(state, data, order, key)
  after = flatten(jax.device_get(state.trained.trainable))
  update = np.concatenate([(after[p] - before[p]).ravel() for p in before])
  return {'loss': float(seen.loss), 'update': update.tolist()}


if __name__ == '__main__':
  for count in DEVICES:
    where = mesh_of(count)
    for name in NAMES:
      result = draws(where) if name == 'draws' else first_step(where, name)
      print(json.dumps({'devices': count, 'name': name, **result}), flush=True)
