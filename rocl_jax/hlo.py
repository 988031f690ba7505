"""What a compiled program does, read from its text: work, traffic, collectives.

  program = hlo.parse(jitted.lower(*arguments).compile().as_text())
  hlo.flops(program), hlo.traffic(program), hlo.collectives(program)

XLA's own `cost_analysis` counts the body of a loop once. Here it counts as
often as it runs, so an attack of ten steps is ten times one of its steps.
"""

import collections
import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Shape(NamedTuple):
  """An array's element type, as XLA names it, and its dimensions."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    bits = re.search(r'\d+', self.dtype)  # pred and token have none
    return math.prod(self.dims) * max(int(bits[0]) if bits else 8, 8) // 8


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: without the percent sign.
    shapes: of the result; several for a tuple.
    opcode: such as 'convolution'.
    operands: names; of a parameter, its number.
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
      Shape(dtype, tuple(int(d) for d in dims.split(',') if d))
      for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', types)
    ),
    opcode=opcode,
    operands=_operands(opcode, rest[len(opcode) + 1 : end]),
    attributes=rest[end + 1 :],
  )


def _operands(opcode, text):
  if opcode == 'parameter':
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
  """

  instruction: Instruction
  scope: dict[str, Instruction]
  times: int
  fused: bool


def executed(program: Program) -> Iterator[Executed]:
  """All instructions that a run of the program executes."""
  yield from _walk(program, program.entry, 1, False)


_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)='
  r'%?([\w.-]+)'
)


def _walk(program, computation, times, fused):
  scope = program.computations[computation]
  for instruction in scope.values():
    yield Executed(instruction, scope, times, fused)
    inner = times
    if instruction.opcode == 'while':
      inner = times * trip_count(instruction)
    branches = re.search(
      r'branch_computations=\{(.*?)\}', instruction.attributes
    )
    called = _CALLED.findall(instruction.attributes)
    if branches:
      called += re.findall(r'%?([\w.-]+)', branches[1])
    inside = fused or instruction.opcode not in ('while', 'call', 'conditional')
    for name in called:
      yield from _walk(program, name, inner, inside)


def trip_count(loop: Instruction) -> int:
  """How often the body of a `while` runs, as far as XLA knows; else 1."""
  found = re.search(r'"known_trip_count":(\{[^}]*\})', loop.attributes)
  return int(json.loads(found[1])['n']) if found else 1


def flops(program: Program) -> int:
  """Multiplications and additions of all convolutions and matrix products.

  Only products with real entries count, not those with padding or with the
  zeros between the entries of a dilated operand.

  Raises:
    ValueError: the program calls a library for some of them, as on GPUs.
  """
  total = 0
  for instruction, scope, times, _ in executed(program):
    if instruction.opcode == 'convolution':
      total += times * _convolution_flops(instruction, scope)
    elif instruction.opcode == 'dot':
      total += times * _dot_flops(instruction, scope)
    elif re.search('"__cu(dnn|blas)', instruction.attributes):
      raise ValueError('the program calls cuDNN or cuBLAS')
  return total


def _dot_flops(dot, scope):
  lhs = scope[dot.operands[0]].shapes[0]
  found = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', dot.attributes)
  axes = [int(d) for d in found[1].split(',') if d] if found else []
  return (
    2 * math.prod(dot.shapes[0].dims) * math.prod(lhs.dims[a] for a in axes)
  )


def _convolution_flops(convolution, scope):
  lhs, rhs = (scope[name].shapes[0].dims for name in convolution.operands[:2])
  out = convolution.shapes[0].dims
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
  'after-all partition-id'.split()
)
_SLICES = ('dynamic-slice', 'slice', 'gather')


def traffic(program: Program) -> int:
  """Bytes that instructions read and write, each fusion as one of them.

  What caches save is not subtracted. Slices and gathers read what they take.
  """
  total = 0
  for instruction, scope, times, fused in executed(program):
    if fused or instruction.opcode in _FREE:
      continue
    written = instruction.nbytes
    if instruction.opcode in _SLICES:
      read = written
    elif instruction.opcode == 'dynamic-update-slice':
      read = written = scope[instruction.operands[1]].nbytes
    else:
      read = sum(
        _read(program, instruction, i, scope[name])
        for i, name in enumerate(instruction.operands)
        if name in scope
      )
    total += times * (read + written)
  return total


def _read(program, instruction, position, operand):
  """Bytes of an operand that an instruction reads."""
  called = _CALLED.search(instruction.attributes)
  if instruction.opcode != 'fusion' or called is None:
    return operand.nbytes
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
    return operand.nbytes
  return sum(u.nbytes for u in slices)


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


def collectives(program: Program) -> dict[str, Collective]:
  """{kind: Collective} of one device, loops multiplied out."""
  counts: dict[str, int] = collections.Counter()
  sizes: dict[str, int] = collections.Counter()
  for instruction, _, times, _ in executed(program):
    kind = instruction.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      counts[kind] += times
      sizes[kind] += times * instruction.nbytes
  return {kind: Collective(counts[kind], sizes[kind]) for kind in counts}
