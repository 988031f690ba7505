"""What a compiled program does, read from its text: work, traffic, collectives.

  program = hlo.parse(jitted.lower(*arguments).compile().as_text())
  hlo.flops(program), hlo.traffic(program), hlo.collectives(program)

XLA's own `cost_analysis` counts the body of a loop once. Here it counts as
often as it runs, so an attack of ten steps is ten times one of its steps.
Programs of CPUs, TPUs and GPUs are read, with what GPUs leave to cuDNN and
cuBLAS.
"""

import collections
import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Shape(NamedTuple):
  """An array's element type, as XLA names it, its dimensions, its layout.

  Attributes:
    layout: such as '3,0,2,1:T(8,128)(2,1)S(1)': the dimensions from the minor
      one on, the tiles that TPUs pad to, and S(1) in a core's vector memory.
  """

  dtype: str
  dims: tuple[int, ...]
  layout: str = ''

  @property
  def nbytes(self) -> int:
    return self._bytes(self.dims)

  @property
  def moved(self) -> int:
    """Bytes of main memory that it takes, padding included."""
    return 0 if 'S(1)' in self.layout else self.stored

  @property
  def stored(self) -> int:
    """Bytes that it takes, padding included, in whatever memory."""
    order, _, rest = self.layout.partition(':')
    dims = list(self.dims)
    tile = re.match(r'T\(([\d,]+)\)', rest)
    if tile and order:
      axes = [int(d) for d in order.split(',')]
      sizes = [int(d) for d in tile[1].split(',')]
      for axis, size in zip(axes, reversed(sizes), strict=False):
        dims[axis] = -(-dims[axis] // size) * size
    return self._bytes(dims)

  def _bytes(self, dims):
    bits = re.search(r'\d+', self.dtype)  # pred and token have none
    return math.prod(dims) * max(int(bits[0]) if bits else 8, 8) // 8


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: without the percent sign.
    shapes: of the result; several for a tuple.
    opcode: such as 'convolution'.
    operands: names; of a parameter, its number; of a constant, its value.
    attributes: the rest of the line.
  """

  name: str
  shapes: tuple[Shape, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def nbytes(self) -> int:
    return sum(shape.nbytes for shape in self.shapes)

  @property
  def moved(self) -> int:
    return sum(shape.moved for shape in self.shapes)


class Program(NamedTuple):
  """A module: computations by name, each {name: Instruction}, and the entry."""

  computations: dict[str, dict[str, Instruction]]
  entry: str


def parse(text: str) -> Program:
  """Parses the text of a compiled module.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    header = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if header:
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif current is not None and ' = ' in line:
      instruction = _instruction(line)
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError('the text has no entry computation')
  return Program(computations, entry)


def _instruction(line):
  name, rest = line.strip().removeprefix('ROOT ').split(' = ', 1)
  end = _closing(rest, 0) + 1 if rest[0] == '(' else rest.index(' ')
  types, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition('(')
  end = _closing(rest, len(opcode))
  return Instruction(
    name=name.removeprefix('%'),
    shapes=tuple(
      Shape(dtype, tuple(int(d) for d in dims.split(',') if d), layout)
      for dtype, dims, layout in re.findall(
        r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?', types
      )
    ),
    opcode=opcode,
    operands=_operands(opcode, rest[len(opcode) + 1 : end]),
    attributes=rest[end + 1 :],
  )


def _operands(opcode, text):
  if opcode in ('parameter', 'constant'):
    return (text,)
  return tuple(re.findall(r'%([\w.-]+)', text))


def _closing(text, start):
  """The position of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if depth == 0:
      return i
  raise ValueError(f'unbalanced parentheses in {text!r:.80}')


class Executed(NamedTuple):
  """An instruction, its computation, and how often it runs.

  Attributes:
    instruction: the instruction.
    scope: the instructions of its computation, by name.
    times: how often one run of the program executes it. A loop whose trip
      count XLA does not know counts once.
    fused: whether it is part of a fusion, whose results stay in registers.
    looped: whether it is part of a loop.
  """

  instruction: Instruction
  scope: dict[str, Instruction]
  times: int
  fused: bool
  looped: bool


def executed(program: Program) -> Iterator[Executed]:
  """All instructions that a run of the program executes."""
  yield from _walk(program, program.entry, 1, False, False)


_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)='
  r'%?([\w.-]+)'
)


def called(instruction: Instruction) -> list[str]:
  """The computations that an instruction runs: a loop's, a fusion's."""
  names = _CALLED.findall(instruction.attributes)
  branches = re.search(r'branch_computations=\{(.*?)\}', instruction.attributes)
  if branches:
    names += re.findall(r'%?([\w.-]+)', branches[1])
  return names


_TRANSPARENT = ('while', 'call', 'conditional', 'async-start')


def _walk(program, computation, times, fused, looped):
  scope = program.computations[computation]
  for instruction in scope.values():
    yield Executed(instruction, scope, times, fused, looped)
    inner, is_loop = times, instruction.opcode == 'while'
    if is_loop:
      inner = times * trip_count(program, instruction, scope)
    inside = fused or instruction.opcode not in _TRANSPARENT
    for name in called(instruction):
      yield from _walk(program, name, inner, inside, looped or is_loop)


def trip_count(
  program: Program, loop: Instruction, scope: dict[str, Instruction]
) -> int:
  """How often the body of a `while` runs, as far as XLA knows; else 1.

  TPU programs do not say: there the condition does, if it compares a counter
  from a constant on, in steps of one as `fori_loop`'s, with another constant.
  """
  found = re.search(r'"known_trip_count":(\{[^}]*\})', loop.attributes)
  if found:
    return int(json.loads(found[1])['n'])
  called = re.search(r'condition=%?([\w.-]+)', loop.attributes)
  condition = program.computations.get(called[1], {}) if called else {}
  compare = [x for x in condition.values() if x.opcode == 'compare']
  if len(compare) != 1 or 'direction=LT' not in compare[0].attributes:
    return 1
  counter, bound = (condition.get(name) for name in compare[0].operands)
  carried = scope.get(loop.operands[0])

  def start(instruction):
    """What the loop is entered with, where the condition reads its state."""
    if instruction is None or instruction.opcode != 'get-tuple-element':
      return instruction
    index = re.search(r'index=(\d+)', instruction.attributes)
    if carried is None or carried.opcode != 'tuple' or index is None:
      return None
    return scope.get(carried.operands[int(index[1])])

  first = _constant(start(counter), scope)
  last = _constant(start(bound), scope)
  return 1 if first is None or last is None else max(last - first, 0)


def _constant(instruction, scope):
  while instruction is not None and instruction.opcode in ('copy', 'bitcast'):
    instruction = scope.get(instruction.operands[0])
  if instruction is None or instruction.opcode != 'constant':
    return None
  value = instruction.operands[0]
  return int(value) if re.fullmatch(r'-?\d+', value) else None


def kernels(program: Program) -> Iterator[Executed]:
  """What runs as one piece, each fusion as one: on a GPU, what is launched."""
  for run in executed(program):
    if not run.fused and run.instruction.opcode not in _FREE:
      yield run


def flops(program: Program) -> int:
  """Multiplications and additions of all convolutions and matrix products.

  Only products with real entries count, not those with padding or with the
  zeros between the entries of a dilated operand.
  """
  return sum(
    run.times * flops_of(program, run.instruction, run.scope)
    for run in kernels(program)
  )


def flops_of(
  program: Program, instruction: Instruction, scope: dict[str, Instruction]
) -> int:
  """Those of one instruction, and of what is fused into it."""
  if instruction.opcode == 'convolution' or library(instruction) == 'cudnn':
    return _convolution_flops(instruction, scope)
  if instruction.opcode == 'dot' or library(instruction) == 'cublas':
    return _dot_flops(instruction, scope)
  return sum(
    flops_of(program, inner, program.computations[name])
    for name in called(instruction)
    for inner in program.computations[name].values()
  )


def library(instruction: Instruction) -> str:
  """'cudnn' or 'cublas' if a GPU calls one there for a product, else ''."""
  found = re.search(
    r'custom_call_target="__(cudnn)\$conv|custom_call_target="__(cublas)\$',
    instruction.attributes,
  )
  return (found[1] or found[2]) if found else ''


def _dot_flops(dot, scope):
  lhs = scope[dot.operands[0]].shapes[0]
  found = re.search(
    r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', dot.attributes
  )
  axes = [int(d) for d in re.findall(r'\d+', found[1])] if found else []
  return (
    2 * math.prod(dot.shapes[0].dims) * math.prod(lhs.dims[a] for a in axes)
  )


def _convolution_flops(convolution, scope):
  lhs, rhs = (scope[name].shapes[0].dims for name in convolution.operands[:2])
  out = convolution.shapes[0].dims
  # cuDNN's gradients carry the labels and the window of the forward pass.
  if '$convBackwardInput' in convolution.attributes:
    lhs, out = out, lhs
  elif '$convBackwardFilter' in convolution.attributes:
    rhs, out = out, rhs
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', convolution.attributes)
  window = re.search(r'window=\{(.*?)\}', convolution.attributes)
  assert labels is not None
  fields = dict(f.split('=') for f in window[1].split()) if window else {}

  def of(field, axis, default):
    values = fields.get(field)
    return values.split('x')[axis] if values else default

  products = 1
  for axis in range(sum(c.isdigit() for c in labels[1])):
    low = int(of('pad', axis, '0_0').split('_')[0])
    stride = int(of('stride', axis, 1))
    hole = int(of('lhs_dilate', axis, 1))
    reach = int(of('rhs_dilate', axis, 1))
    size = lhs[labels[1].index(str(axis))]
    taps = rhs[labels[2].index(str(axis))]
    places = (
      o * stride + t * reach - low
      for o in range(out[labels[3].index(str(axis))])
      for t in range(taps)
    )
    products *= sum(
      p % hole == 0 and 0 <= p <= (size - 1) * hole for p in places
    )
  groups = re.search(r'batch_group_count=(\d+)', convolution.attributes)
  products *= out[labels[3].index('b')] * out[labels[3].index('f')]
  products *= rhs[labels[2].index('i')]
  return 2 * products // (int(groups[1]) if groups else 1)


# Results of these are no traffic: they name memory, or hold other programs.
_FREE = frozenset(
  'parameter tuple get-tuple-element bitcast constant while call conditional '
  'after-all partition-id async-start async-update async-done copy-done '
  'slice-done all-reduce-done all-gather-done collective-permute-done '
  'opt-barrier'.split()
)
_SLICES = ('dynamic-slice', 'slice', 'gather')


def traffic(program: Program) -> int:
  """Bytes that instructions read and write, each fusion as one of them.

  What caches save is not subtracted. Slices and gathers read what they take.
  On TPUs arrays are as large as their tiles make them, and what stays in the
  vector memory is no traffic.
  """
  return sum(
    run.times * traffic_of(program, run.instruction, run.scope)
    for run in kernels(program)
  )


def traffic_of(
  program: Program, instruction: Instruction, scope: dict[str, Instruction]
) -> int:
  """Bytes that one instruction reads and writes."""
  written = sum(shape.moved for shape in results(instruction))
  if instruction.opcode in _SLICES:
    return 2 * written
  if instruction.opcode == 'slice-start':  # from main into vector memory
    return written + sum(shape.stored for shape in results(instruction))
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * scope[instruction.operands[1]].moved
  return written + sum(
    _read(program, instruction, i, scope[name])
    for i, name in enumerate(instruction.operands)
    if name in scope
  )


def _read(program, instruction, position, operand):
  """Bytes of an operand that an instruction reads."""
  called = _CALLED.search(instruction.attributes)
  if instruction.opcode != 'fusion' or called is None:
    return operand.moved
  inner = program.computations[called[1]].values()
  (parameter,) = (
    i.name
    for i in inner
    if i.opcode == 'parameter' and i.operands == (str(position),)
  )
  users = [i for i in inner if parameter in i.operands]
  slices = [
    u for u in users if u.opcode in _SLICES and u.operands[0] == parameter
  ]
  if len(slices) < len(users):
    return operand.moved
  return sum(u.moved for u in slices)


_AFTER_OPERANDS = (
  'all-gather-start',
  'collective-permute-start',
  'slice-start',
)


def results(instruction):
  """What an instruction makes; the start of a later one names operands too."""
  count = len(instruction.operands)
  if instruction.opcode in _AFTER_OPERANDS:
    return instruction.shapes[count : 2 * count]
  if instruction.opcode == 'copy-start':
    return instruction.shapes[:1]
  if library(instruction):  # the last one is its workspace
    return instruction.shapes[:-1] or instruction.shapes
  return instruction.shapes


COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)


class Collective(NamedTuple):
  """How often a run executes a kind of collective, and its results' bytes."""

  times: int
  nbytes: int


def collectives(
  program: Program, in_loops: bool = False
) -> dict[str, Collective]:
  """{kind: Collective} of one device, loops multiplied out.

  Args:
    program: the program.
    in_loops: whether to count those in loops alone.
  """
  counts: dict[str, int] = collections.Counter()
  sizes: dict[str, int] = collections.Counter()
  for instruction, _, times, _, looped in executed(program):
    kind = instruction.opcode.removesuffix('-start')
    if kind in COLLECTIVES and looped >= in_loops:
      counts[kind] += times
      sizes[kind] += times * sum(x.nbytes for x in results(instruction))
  return {kind: Collective(counts[kind], sizes[kind]) for kind in counts}
