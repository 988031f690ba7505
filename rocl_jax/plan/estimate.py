"""From what a step takes to how long it lasts and what fits.

A roofline: the longer one of arithmetic and memory, then the collectives. No
program is faster, and real ones take 1.5 to 3 times as long.
"""

import math
from typing import Any, NamedTuple

from rocl_jax.hlo import Collective
from rocl_jax.plan.chips import Slice
from rocl_jax.plan.operations import Operation, Total, total
from rocl_jax.plan.steps import Planned


class Memory(NamedTuple):
  """Bytes on each device.

  Attributes:
    arguments: state, training set, order.
    temporaries: activations and gradients at their fullest.
    outputs: results that take no argument's place.
    code: the program.
  """

  arguments: int
  temporaries: int
  outputs: int
  code: int

  @property
  def total(self) -> int:
    return sum(self)


class Step(NamedTuple):
  """One update of a stage, on each of the devices.

  Attributes:
    stage: its name.
    batch: images, over all devices.
    devices: how many.
    hand_flops: that the mathematics needs, with `benchmark.work`.
    compile_seconds: tracing and compiling; 0 where nothing was compiled.
    memory: what it holds.
    flops: what the program computes.
    traffic: bytes between the chip and its main memory.
    collectives: by kind.
    in_attack: those inside loops, of which the attack's is the one that could
      have any.
    operations: that the program executes; none where nothing was compiled.
    refused: why it does not fit, in the compiler's words; '' if it does.
  """

  stage: str
  batch: int
  devices: int
  hand_flops: float
  compile_seconds: float = 0.0
  memory: Memory = Memory(0, 0, 0, 0)
  flops: float = 0.0
  traffic: float = 0.0
  collectives: dict[str, Collective] = {}
  in_attack: dict[str, Collective] = {}
  operations: tuple[Operation, ...] = ()
  refused: str = ''

  @property
  def whole(self) -> Total:
    """All operations of a step."""
    return total(self.operations)

  @property
  def in_loops(self) -> Total:
    """Those inside loops: the attack's, where XLA makes no others."""
    return total(o for o in self.operations if o.looped)

  def record(self) -> dict[str, Any]:
    """As JSON."""
    plain = self._asdict()
    plain['memory'] = self.memory._asdict() | {'total': self.memory.total}
    for field in ('collectives', 'in_attack'):
      plain[field] = {k: c._asdict() for k, c in plain[field].items()}
    plain['whole'] = self.whole._asdict()
    plain['in_loops'] = self.in_loops._asdict()
    plain['operations'] = [o._asdict() for o in self.operations]
    return plain


class Prediction(NamedTuple):
  """A lower bound of time, and what follows from it.

  Attributes:
    arithmetic, memory, interconnect: seconds of a step.
    step: seconds, the longer of the first two and the third.
    images_per_second: over all devices.
    hours: of all epochs of the stage.
  """

  arithmetic: float
  memory: float
  interconnect: float
  step: float
  images_per_second: float
  hours: float


def predict(step: Step, planned: Planned, where: Slice) -> Prediction:
  """The roofline of a step on a slice."""
  chip = where.chip
  arithmetic = step.flops / chip.peak(planned.model.dtype)
  memory = step.traffic / chip.bytes_per_second
  interconnect = sent(step.collectives, step.devices) / chip.sent_per_second
  seconds = max(arithmetic, memory) + interconnect
  updates = planned.settings.total_epochs * (
    planned.images.number // step.batch
  )
  return Prediction(
    arithmetic,
    memory,
    interconnect,
    seconds,
    step.batch / seconds if seconds else math.inf,
    updates * seconds / 3600,
  )


def sent(collectives: dict[str, Collective], devices: int) -> float:
  """Bytes that each device sends at least.

  A ring's reduction sends everything twice but for the own part, a gathering
  once; the others send the result.
  """
  others = (devices - 1) / devices
  factor = {'all-reduce': 2 * others, 'all-gather': others}
  return sum(
    factor.get(kind, 1.0) * c.nbytes
    for kind, c in collectives.items()
    if devices > 1
  )


def second_batch(batch: int, devices: int, count: int) -> int | None:
  """Another batch to compile, for how memory grows; None if there is none.

  Twice the batch, and 256 images on each device if that is more: fewer are
  padded to a TPU's tiles of 128 and tell nothing about larger ones.
  """
  most = count // devices * devices
  other = min(max(2 * batch, 256 * devices), most)
  return other if other > batch else None


def largest_batch(one: Step, two: Step, where: Slice, count: int) -> int:
  """The largest batch that fits, from two compiled ones, `two` the larger.

  Temporaries grow with the batch: along the line through both, or in
  proportion from the larger one, whichever is steeper; beside them those of
  all pairs of images. Never more than the training set.
  """
  pairs = pair_bytes(one.stage) / one.devices
  single = lambda s: max(s.memory.temporaries - pairs * s.batch**2, 0)
  step = one if two.refused else two
  each = single(step) / step.batch
  if not two.refused:
    each = max(each, (single(two) - single(one)) / (two.batch - one.batch))
  fixed = step.memory.total - step.memory.temporaries
  offset = single(step) - each * step.batch  # below 0 if the line is steeper
  fits = lambda b: (
    fixed + offset + each * b + pairs * b**2 <= where.chip.memory_bytes
  )
  most = min(count, two.batch - 1) if two.refused else count
  low, high = 0, most // step.devices  # images a device
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (
      (middle, high) if fits(middle * step.devices) else (low, middle - 1)
    )
  return low * step.devices


def pair_bytes(stage: str) -> int:
  """Of what NT-Xent has for each pair of images, over all devices.

  Similarity, exponential and gradient of three views against three.
  """
  return 3 * 9 * 4 if stage == 'pretrain' else 0
