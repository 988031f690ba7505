"""Training sets that the devices do not hold: batches come as they are needed.

The order is that of `loop.epoch_order`, so a run sees the same images in the
same steps as one whose set lies on the devices, and the step of a checkpoint
says where it is. Grain reads ahead, and each process reads its part of a batch
alone. Needs the extra [stream].
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rocl_jax.data import Split
from rocl_jax.mesh import replicated
from rocl_jax.settings import FieldError
from rocl_jax.types import TrainingSet

_AHEAD = 4  # batches that are read before they are asked for


def check() -> None:
  """Raises FieldError unless Grain is installed."""
  if importlib.util.find_spec('grain') is None:
    wanted = "True, or Grain to read with: pip install 'rocl-jax[stream]'"
    raise FieldError('resident', False, wanted)


# (order [S, B], the step to begin with) -> the epoch's data, step by step.
Feed = Callable[[jax.Array, int], Iterator[TrainingSet]]


def make(
  train: Split, batch_size: int, mesh: Mesh, resident: bool
) -> tuple[TrainingSet, Feed]:
  """What a step gets, as arrays or shapes, and what gives it.

  Args:
    train: all examples; streamed, a memory-mapped array will do.
    batch_size: examples in a step, over all devices.
    mesh: the devices.
    resident: whether they hold all examples, each of them.
  """
  if resident:
    data = jax.device_put(TrainingSet.of(*train), replicated(mesh))
    return data, lambda order, first: itertools.repeat(data)
  shape = train.images.shape[1:]
  batch = TrainingSet(
    jax.ShapeDtypeStruct((batch_size, math.prod(shape)), train.images.dtype),
    jax.ShapeDtypeStruct((batch_size,), train.labels.dtype),
    shape,
    one_batch=True,
  )
  return batch, lambda order, first: _read(train, order, first, mesh)


def _read(train, order, first, mesh):
  import grain

  sharding = NamedSharding(mesh, PartitionSpec('data'))
  size = order.shape[1]
  mine = np.zeros(size, bool)
  for index in sharding.addressable_devices_indices_map((size,)).values():
    mine[index] = True

  def examples(rows):
    return train.images[rows].reshape(len(rows), -1), train.labels[rows]

  read_ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_AHEAD)
  rows = np.asarray(order)[first:, mine]
  dataset = grain.MapDataset.source(rows).map(examples)
  for parts in dataset.to_iter_dataset(read_ahead):
    images, labels = (
      jax.make_array_from_process_local_data(sharding, x) for x in parts
    )
    yield TrainingSet(images, labels, train.images.shape[1:], one_batch=True)
