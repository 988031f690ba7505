"""What a compiled step executes, one record an operation: time, work, source.

An operation is a kernel of a GPU, or what a TPU runs as one piece. Its time on
a TPU is the compiler's own estimate, in cycles. The compiler for GPUs makes
none: there it is the longer one of arithmetic and memory at the chip's peaks.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rocl_jax import hlo
from rocl_jax.plan.chips import Chip


class Operation(NamedTuple):
  """What a step executes, in all its executions: equal ones are one.

  Attributes:
    name: of the layer, or else of the innermost scope, and JAX's primitive.
    kind: XLA's opcode, the library's function or what a fusion has in it.
    result: types and shapes of what it makes, up to three.
    source: 'models.py:106 FrozenConvNorm.__call__', the innermost line of this
      package.
    looped: whether it is inside a loop, of which the attack's is the longest.
    relayout: whether it transposes, or copies into another layout.
    times: how often a step executes it.
    seconds: of all times.
    flops: of all times.
    nbytes: between chip and main memory, of all times.
  """

  name: str
  kind: str
  result: str
  source: str
  looped: bool
  relayout: bool
  times: int
  seconds: float
  flops: float
  nbytes: float


class Total(NamedTuple):
  """Of several operations.

  Attributes:
    times: how many are executed; on a GPU, kernels launched.
    seconds: of all.
    nbytes: of all.
    relayouts: how many of them transpose, or copy into another layout.
  """

  times: int
  seconds: float
  nbytes: float
  relayouts: int


def total(operations: Iterable[Operation]) -> Total:
  found = list(operations)
  return Total(
    sum(o.times for o in found),
    sum(o.seconds for o in found),
    sum(o.nbytes for o in found),
    sum(o.times for o in found if o.relayout),
  )


def read(text: str, chip: Chip, dtype: str) -> tuple[Operation, ...]:
  """The operations of a compiled module, the most expensive one first.

  Args:
    text: of the module.
    chip: that it is compiled for.
    dtype: of the products, for their peak.
  """
  program = hlo.parse(text)
  source = _sources(text)
  found: dict[tuple[Any, ...], list[float]] = {}
  for run in hlo.kernels(program):
    made, scope = run.instruction, run.scope
    flops = hlo.flops_of(program, made, scope)
    nbytes = hlo.traffic_of(program, made, scope)
    if chip.clock:
      cycles = re.search(r'"estimated_cycles":"(\d+)"', made.attributes)
      seconds = int(cycles[1]) / (1e9 * chip.clock) if cycles else 0.0
    else:
      seconds = max(flops / chip.peak(dtype), nbytes / chip.bytes_per_second)
    told = _telling(program, made, scope)
    frame = re.search(r'stack_frame_id=(\d+)', told.attributes)
    what = (
      _name(told) or made.opcode,
      _kind(program, made),
      ' '.join(map(_shape, hlo.results(made)[:3])),
      source(int(frame[1])) if frame else '',
      run.looped,
      _relayout(program, made, scope),
    )
    sums = found.setdefault(what, [0, 0.0, 0, 0])
    for i, each in enumerate((1, seconds, flops, nbytes)):
      sums[i] += run.times * each
  operations = [Operation(*what, *sums) for what, sums in found.items()]
  return tuple(sorted(operations, key=lambda o: -o.seconds))


# Transformations, and what loops and branches add to a name.
_WRAPPING = re.compile(
  r'.*\(.*\)$|(while|body|cond|closed_call|checkpoint|branch_\d+_fun)$'
)


def _telling(program, instruction, scope):
  """What names an operation: the product in it, else itself, else a part."""
  parts = [part for part, _ in _parts(program, instruction, scope)]
  products = [p for p in parts if p.opcode in ('convolution', 'dot')]
  named = [*products, instruction, *reversed(parts)]
  return next((p for p in named if 'op_name=' in p.attributes), instruction)


def _shape(shape):
  return f'{shape.dtype}[{",".join(map(str, shape.dims))}]'


def _name(instruction):
  found = re.search(r'op_name="([^"]*)"', instruction.attributes)
  if not found:
    return ''
  *path, primitive = found[1].split('/')
  scopes = [part for part in path if not _WRAPPING.match(part)]
  backward = ['backward'] if 'transpose(' in found[1] else []
  return ' '.join([*scopes[-1:], primitive, *backward])


# What a fusion is of: the first of these that is in it.
_KINDS = 'convolution dot sort scatter gather reduce-window reduce'.split()


def _kind(program, instruction):
  target = re.search(r'custom_call_target="_*([^"]*)"', instruction.attributes)
  if target:
    return target[1]
  if instruction.opcode != 'fusion':
    return instruction.opcode
  opcodes = {i.opcode for i, _ in _parts(program, instruction, {})}
  return next((f'fused {x}' for x in _KINDS if x in opcodes), 'fused')


def _relayout(program, instruction, scope):
  """Whether an array of two dimensions or more changes its order in memory."""
  order = lambda i: i.shapes[0].layout.partition(':')[0]
  return any(
    sum(d > 1 for d in part.shapes[0].dims) > 1
    and (
      part.opcode == 'transpose'
      or part.opcode == 'copy'
      and order(part) != order(around[part.operands[0]])
    )
    for part, around in _parts(program, instruction, scope)
    if part.shapes
  )


def _parts(program, instruction, scope):
  """An instruction, or those that a fusion is made of, each with its scope."""
  if instruction.opcode != 'fusion':
    return [(instruction, scope)]
  inner = program.computations[hlo.called(instruction)[0]]
  return [x for i in inner.values() for x in _parts(program, i, inner)]


_TABLES = ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames')


def _sources(text: str) -> Callable[[int], str]:
  """From a stack frame's number to its innermost line in this package."""
  tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
  entries: dict[int, str] = {}
  for line in text.splitlines():
    if line in _TABLES:
      entries = tables[line]
    elif found := re.match(r'(\d+) (?:"(.*)"|\{(.*)\})$', line):
      entries[int(found[1])] = found[2] or found[3]
  files, functions, locations, frames = tables.values()
  package = os.path.join(os.path.dirname(hlo.__file__), '')

  def source(frame: int) -> str:
    while frame in frames:
      at = _numbers(frames[frame])
      place = _numbers(locations[at['file_location_id']])
      path = files[place['file_name_id']]
      if path.startswith(package):
        function = functions[place['function_name_id']]
        return f'{path.removeprefix(package)}:{place["line"]} {function}'
      parent = at.get('parent_frame_id', 0)
      frame = 0 if parent == frame else parent
    return ''

  return functools.cache(source)


def _numbers(fields: str) -> dict[str, int]:
  return {name: int(n) for name, n in re.findall(r'(\w+)=(\d+)', fields)}
