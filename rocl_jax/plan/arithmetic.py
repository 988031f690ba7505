"""What a step takes on GPUs, counted, where their compiler is not installed.

FLOPs are those that the mathematics needs. State and training set are exact.
Activations are counted for the network of `models.ResNet`: what each layer
keeps for the gradient, and what passes through memory if XLA fuses all that it
can.
"""

import math

import jax

from rocl_jax import optim
from rocl_jax.benchmark import work
from rocl_jax.hlo import Collective
from rocl_jax.plan import estimate, steps
from rocl_jax.plan.estimate import Memory, Step

# Of each convolution's result: itself, for BatchNorm's gradient, and the
# ReLU's, for the next convolution's.
_KEPT = 2
# Times that it passes through memory. Constant weights: written, read by the
# next; their gradient: read, written, and the ReLU's result once more.
# Training: written, read for the statistics, read to normalise, written, read;
# backward the gradient three times, the results twice, two writes.
_FORWARD, _ATTACK, _TRAIN = 2, 5, 12


def step(planned: steps.Planned, batch_size: int, devices: int) -> Step:
  """What a step of a stage takes on each of so many GPUs, by arithmetic."""
  settings, model, images = planned.settings, planned.model, planned.images
  optimizer, _ = optim.make(settings.optimizer, 1, 1)
  key = jax.eval_shape(lambda: jax.random.key(0))
  trained = jax.eval_shape(planned.stage.start, planned.upstream, key)
  state = (trained, jax.eval_shape(optimizer.init, trained.trainable))
  trainable = _bytes(trained.trainable)
  updates = images.number // batch_size
  order = updates * (4 * batch_size + 1)  # and which of them were skipped
  data = images.number * (3 * images.size**2 + 4)
  count = work.forward(model, images.size, images.classes)
  passes = work.passes(planned.name, settings, count)
  results = model.arrays.itemsize * sum(
    size**2 * outputs
    for size, _, _, outputs in work.convolutions(model, images.size)
  )
  own = batch_size / devices
  alive = max(passes.train, 1)
  times = (
    passes.forward * _FORWARD
    + passes.attack_steps * (_FORWARD + _ATTACK)
    + passes.train * _TRAIN
  )
  needed = work.step(planned.name, settings, model, images.size, images.classes)
  return Step(
    stage=planned.name,
    batch=batch_size,
    devices=devices,
    hand_flops=own * needed,
    memory=Memory(
      arguments=_bytes(state) + data + order,
      temporaries=int(
        trainable
        + own * alive * _KEPT * results
        + own * batch_size * estimate.pair_bytes(planned.name)
      ),
      outputs=0,
      code=0,
    ),
    flops=own * needed,
    traffic=own * times * results + 3 * _bytes(state),
    collectives={'all-reduce': Collective(1, trainable)} if devices > 1 else {},
  )


def _bytes(tree):
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
