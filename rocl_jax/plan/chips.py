"""Accelerators: what they have, and the names that people call slices by.

  slice_of('v5e-16')   # 16 chips of v5e, laid out 4x4
  slice_of('v5e:4x4')  # the same
  slice_of('h100x8')   # eight H100 in one machine

The number in a TPU's name counts TensorCores for v2, v3, v4 and v5p, which have
two a chip, and chips for v5e and v6e.
"""

import re
from typing import NamedTuple

from rocl_jax.errors import UserError, nearest

_GIB = 2**30


class Chip(NamedTuple):
  """One accelerator, or of v2 and v3 one chip of two.

  Attributes:
    memory: GiB that a program may use, on each device.
    bf16, f32: peak TFLOP/s of matrix products with that precision.
    bandwidth: GB/s of the main memory.
    link: GB/s to all other chips together, both directions added.
    devices: how many JAX sees for each chip; all but `link` is shared evenly.
    source: where the numbers are from.
    clock: GHz in which a TPU's compiler counts; 0 for GPUs.
  """

  memory: float
  bf16: float
  f32: float
  bandwidth: float
  link: float
  devices: int
  source: str
  clock: float = 0.0

  def peak(self, dtype: str) -> float:
    """FLOP/s of each device; 'tf32' is of GPUs alone."""
    peak = {'bfloat16': self.bf16, 'tf32': self.bf16 / 2}.get(dtype, self.f32)
    return 1e12 * peak / self.devices

  @property
  def memory_bytes(self) -> int:
    """Of each device."""
    return int(self.memory * _GIB)

  @property
  def bytes_per_second(self) -> float:
    """Of the main memory, for each device."""
    return 1e9 * self.bandwidth / self.devices

  @property
  def sent_per_second(self) -> float:
    """Bytes that each device can send at most, while it receives as many."""
    return 1e9 * self.link / 2 / self.devices


def _tpu(memory, bf16, bandwidth, link, clock, devices=1, page=''):
  # TPUs multiply bfloat16; XLA makes a float32 product of 'highest' precision,
  # which this project asks for, of six of them.
  source = f'https://cloud.google.com/tpu/docs/{page}'
  return Chip(memory, bf16, bf16 / 6, bandwidth, link, devices, source, clock)


# Memory: what libtpu 0.0.42.1 lets a program have, from its own message when
# one needs more; the pages say 16, 32, 32, 16, 95 and 32 GiB a chip. Links:
# v5e, v6e and v5p as the pages have them; v4, six links of 50 GB/s each way
# (2,400 Gbit/s in earlier versions of its page); v2 and v3, four links of 496
# and 656 Gbit/s each way (Jouppi et al., A Domain-Specific Supercomputer for
# Training Deep Neural Networks, CACM 2020). Clocks: at these the peaks are
# whole numbers of matrix units (128 by 128; v6e 256 by 256) times two.
TPUS = {
  'v2': _tpu(7.48, 46, 700, 496, 0.7, devices=2, page='v2'),
  'v3': _tpu(15.48, 123, 900, 656, 0.94, devices=2, page='v3'),
  'v4': _tpu(30.75, 275, 1200, 600, 1.05, page='v4'),
  'v5e': _tpu(15.75, 197, 819, 400, 1.5, page='v5e'),
  'v5p': _tpu(95.74, 459, 2765, 1200, 1.75, page='v5p'),
  'v6e': _tpu(31.25, 918, 1638, 800, 1.75, page='v6e'),
}


def _gpu(memory, bf16, f32, bandwidth, link, page):
  return Chip(memory, bf16, f32, bandwidth, link, 1, page)


_NVIDIA = 'https://www.nvidia.com/en-us/data-center/'

# Dense tensor cores for bfloat16; float32 without TF32, as 'highest' precision
# asks for. Memory as printed on the data sheets, less a tenth, which CUDA, its
# libraries and fragmentation take; JAX itself takes 75 % of it unless
# XLA_PYTHON_CLIENT_MEM_FRACTION says more. Links: NVLink, or PCIe.
GPUS = {
  'a100': _gpu(36, 312, 19.5, 1555, 600, _NVIDIA + 'a100/'),
  'a100-80': _gpu(72, 312, 19.5, 2039, 600, _NVIDIA + 'a100/'),
  'h100': _gpu(72, 989, 67, 3350, 900, _NVIDIA + 'h100/'),
  'h200': _gpu(126, 989, 67, 4800, 900, _NVIDIA + 'h200/'),
  'l4': _gpu(21.6, 121, 30.3, 300, 64, _NVIDIA + 'l4/'),
  'l40s': _gpu(43.2, 362, 91.6, 864, 64, _NVIDIA + 'l40s/'),
}

_FLAT = '1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'.split()
_CUBES = (
  '2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16'.split()
)
# The layouts on the pages above, without the twisted and the flat ones.
_LAYOUTS = {
  'v2': '2x2 4x4 8x8 8x16 16x16'.split(),
  'v3': '2x2 4x4 4x8 8x8 8x16 16x16 16x32 32x32'.split(),
  'v4': _CUBES,
  'v5p': _CUBES,
  'v5e': _FLAT,
  'v6e': _FLAT,
}
_PER_CORE = ('v2', 'v3', 'v4', 'v5p')
_MACHINE = (1, 2, 4, 8)  # GPUs in one


class Slice(NamedTuple):
  """Several chips of a kind.

  Attributes:
    name: 'v5e-16' or 'h100x8'.
    kind: 'v5e' or 'h100'.
    layout: '4x4'; '' for GPUs.
    chips: how many.
    chip: what each has.
  """

  name: str
  kind: str
  layout: str
  chips: int
  chip: Chip

  @property
  def devices(self) -> int:
    """How many JAX sees."""
    return self.chips * self.chip.devices


def _slices():
  for kind, layouts in _LAYOUTS.items():
    for layout in layouts:
      chips = 1
      for side in layout.split('x'):
        chips *= int(side)
      number = 2 * chips if kind in _PER_CORE else chips
      yield Slice(f'{kind}-{number}', kind, layout, chips, TPUS[kind])
  for kind, chip in GPUS.items():
    for chips in _MACHINE:
      yield Slice(f'{kind}x{chips}', kind, '', chips, chip)


SLICES = {s.name: s for s in _slices()}


def slice_of(name: str, flag: str = '--topology') -> Slice:
  """The slice of a name such as v4-8, v5e:4x4, v5litepod-16, h100x8 or h100.

  Raises:
    UserError: there is none of that name.
  """
  asked = name.lower().replace('v5litepod', 'v5e')
  by_layout = {f'{s.kind}:{s.layout}': s for s in SLICES.values() if s.layout}
  alone = {s.kind: s for s in SLICES.values() if s.name == f'{s.kind}x1'}
  known = SLICES | by_layout | alone
  if asked not in known:
    kind = asked.replace(':', '-').partition('-')[0]
    same = [s.name for s in SLICES.values() if s.kind == kind]
    some = same or ['v4-8', 'v5e-16', 'v5e-256', 'v6e-8', 'h100x8']
    hint = _nearest(asked, same) or nearest(asked, known)
    raise UserError(
      f'{flag}: found {name!r}, wanted one such as {", ".join(some)}{hint}'
    )
  return known[asked]


def _nearest(asked, names):
  """The hint for a kind that exists, in a number that does not."""
  number = re.fullmatch(r'[^-]*-(\d+)', asked)
  if not number or not names:
    return ''
  of = lambda name: int(re.split('[-x]', name)[-1])
  close = min(names, key=lambda name: abs(of(name) - int(number[1])))
  return f' (did you mean {close!r}?)'
