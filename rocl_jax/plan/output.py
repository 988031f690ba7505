"""What was planned, as tables for people and as JSON."""

from typing import Any, NamedTuple

from etils import epath

from rocl_jax import provenance
from rocl_jax.files import write_json, write_text
from rocl_jax.plan.chips import Slice
from rocl_jax.plan.compile import Calibration
from rocl_jax.plan.estimate import Prediction, Step, predict
from rocl_jax.plan.steps import Planned

_GIB = 2**30


class Row(NamedTuple):
  """A stage on a slice.

  Attributes:
    planned: the stage.
    step: its update.
    larger: the update with a larger batch, if there is one.
    prediction: the roofline; None if the step does not fit.
    largest: the largest batch that fits; None where one step was looked at.
  """

  planned: Planned
  step: Step
  larger: Step | None
  prediction: Prediction | None
  largest: int | None


def row(
  planned: Planned,
  step: Step,
  larger: Step | None,
  largest: int | None,
  where: Slice,
) -> Row:
  prediction = None if step.refused else predict(step, planned, where)
  return Row(planned, step, larger, prediction, largest)


class Sheet(NamedTuple):
  """What was planned on a slice.

  Attributes:
    where: the slice.
    rows: its stages.
    calibration: of the compiler's estimates; None for GPUs.
  """

  where: Slice
  rows: list[Row]
  calibration: Calibration | None


def heading(where: Slice, dtype: str) -> str:
  """What the slice is and has, as one paragraph."""
  chip = where.chip
  shared = f', {chip.devices} devices each' if chip.devices > 1 else ''
  layout = f' ({where.layout})' if where.layout else ''
  each = 'device' if chip.devices > 1 else 'chip'
  return (
    f'{where.chips} × {where.kind}{layout}{shared}. For each {each}: '
    f'{chip.memory:g} GiB that a program may use, '
    f'{chip.peak(dtype) / 1e12:.3g} TFLOP/s in {dtype}, '
    f'{chip.bytes_per_second / 1e9:,.0f} GB/s of memory, '
    f'{chip.sent_per_second / 1e9:,.0f} GB/s to the others. {chip.source}'
  )


def tables(sheet: Sheet, dtype: str) -> list[str]:
  """The lines of one slice."""
  where, rows, _ = sheet
  memory, work, times = [], [], []
  for r in rows:
    s, p, name = r.step, r.prediction, r.planned.name
    if p is None:
      memory.append([name, str(s.batch), f'does not fit: {s.refused}'])
      continue
    m = s.memory
    share = m.total / where.chip.memory_bytes
    memory.append(
      [
        name,
        f'{s.batch:,} ({s.batch // s.devices:,})',
        *(f'{x / _GIB:.2f}' for x in (m.arguments, m.temporaries)),
        f'{(m.outputs + m.code) / _GIB:.2f}',
        f'{m.total / _GIB:.2f}',
        f'{share:.1%}',
        '' if r.largest is None else _batch(r, where),
        f'{s.compile_seconds:.0f}' if s.compile_seconds else '',
      ]
    )
    work.append(
      [
        name,
        f'{s.flops / 1e9:,.1f}' if s.compile_seconds else '',
        f'{s.hand_flops / 1e9:,.1f}',
        f'{s.traffic / 1e9:,.2f}',
        _kinds(s.collectives),
        _kinds(s.in_attack) if s.compile_seconds else 'not known',
      ]
    )
    times.append(
      [
        name,
        *(
          f'{1e3 * t:,.2f}'
          for t in (p.arithmetic, p.memory, p.interconnect, p.step)
        ),
        f'{p.images_per_second:,.0f}',
        _hours(p.hours),
      ]
    )
  hours = sum(r.prediction.hours for r in rows if r.prediction)
  if len(times) > 1:
    times.append(['all', *[''] * 5, _hours(hours)])
  lines = table(
    ['memory, GiB', 'batch (a chip)', 'arguments', 'temporaries']
    + ['code, outputs', 'total', 'of the chip', 'largest batch', 'compile s'],
    memory,
  )
  lines += ['', *table(_WORK, work), '', *table(_TIMES, times)]
  compiled = [r for r in rows if r.step.operations]
  if compiled:
    lines += ['', *_estimates(sheet, compiled, dtype)]
  for r in compiled:
    lines += ['', *_most_expensive(r, where, dtype)]
  return lines


_WORK = ['a chip, a step', 'GFLOP compiled', 'by hand', 'GB moved']
_WORK += ['collectives, MB', 'of them in the attack']
_TIMES = ['at best', 'arithmetic ms', 'memory ms', 'collectives ms']
_TIMES += ['step ms', 'images/s', 'hours']


def _estimates(sheet: Sheet, rows: list[Row], dtype: str) -> list[str]:
  chip, found = sheet.where.chip, []
  for r in rows:
    whole, looped = r.step.whole, r.step.in_loops
    found.append(
      [
        r.planned.name,
        f'{1e3 * whole.seconds:,.2f}',
        f'{1e3 * looped.seconds:,.2f}',
        _mfu(r.step.flops, whole.seconds, chip.peak(dtype)),
        f'{whole.nbytes / 1e9:,.3f}',
        f'{looped.nbytes / 1e9:,.3f}',
        f'{whole.times:,}',
        f'{looped.times:,}',
        f'{whole.relayouts:,}',
        f'{looped.relayouts:,}',
      ]
    )
  head = [f'estimate {_BY[bool(chip.clock)]}', 'ms', 'in loops', 'MFU', 'GB']
  head += ['in loops', 'kernels' if not chip.clock else 'operations']
  head += ['in loops', 'transposes', 'in loops']
  lines = table(head, found)
  if c := sheet.calibration:
    lines += [
      '',
      f'Calibration, by the same compiler at {chip.clock:g} GHz: an 8192³ '
      f'product in bfloat16 gets {c.product:.0%} of the peak, a stream '
      f'{c.float32:.0%} of the bandwidth in float32 and {c.bfloat16:.0%} in '
      'bfloat16.',
    ]
  return lines


# Whether the compiler counts cycles.
_BY = {True: 'by the compiler', False: 'kernel by kernel'}


def _most_expensive(r: Row, where: Slice, dtype: str) -> list[str]:
  whole, peak = r.step.whole, where.chip.peak(dtype)
  rows = [
    [
      label(o.name, o.looped),
      o.result.partition(' ')[0],
      o.source,
      f'{1e3 * o.seconds:,.3f}',
      f'{o.seconds / whole.seconds:.1%}',
      f'{o.times:,}',
      f'{o.nbytes / 1e9:,.3f}',
      _mfu(o.flops, o.seconds, peak),
    ]
    for o in r.step.operations[:MOST]
    if o.seconds
  ]
  head = [f'{r.planned.name}, most expensive', 'makes', 'source', 'ms']
  return table([*head, 'share', 'times', 'GB', 'MFU'], rows, left=3)


def _mfu(flops: float, seconds: float, peak: float) -> str:
  """The share of the peak that an estimated time makes of the arithmetic."""
  return f'{flops / peak / seconds:.2f}' if flops and seconds else ''


MOST = 10  # operations that are printed


def label(name: str, looped: bool) -> str:
  """An operation's name, short enough for a table."""
  short = name.replace('conv_general_dilated', 'conv')
  return f'loop: {short}' if looped else short


def _batch(r: Row, where: Slice) -> str:
  if r.largest and r.largest >= r.planned.images.number - where.devices:
    return 'all images'
  return f'{r.largest:,}'


def _hours(hours: float) -> str:
  return f'{hours:.2f}' if hours >= 1 else f'{hours:.2g}'


def _kinds(collectives) -> str:
  return (
    ', '.join(
      f'{c.times} {kind} {c.nbytes / 1e6:,.2f}'
      for kind, c in sorted(collectives.items())
    )
    or 'none'
  )


def comparison(planned: list[Sheet]) -> list[str]:
  """Several slices side by side, a line for each stage of each."""
  rows = []
  for where, stages, _ in planned:
    for r in stages:
      p = r.prediction
      share = r.step.memory.total / where.chip.memory_bytes
      rows.append(
        [
          where.name,
          r.planned.name,
          f'{r.step.batch // r.step.devices:,}',
          f'{share:.1%}' if p else 'does not fit',
          '' if r.largest is None else _batch(r, where),
          *(
            (f'{1e3 * p.step:,.2f}', f'{p.images_per_second:,.0f}')
            if p
            else ('', '')
          ),
          _hours(p.hours) if p else '',
          f'{1e3 * r.step.whole.seconds:,.2f}' if r.step.operations else '',
        ]
      )
  head = ['topology', 'stage', 'batch a chip', 'memory of the chip']
  head += ['largest batch', 'step ms, at best', 'images/s', 'hours']
  head.append('estimate ms')
  return table(head, rows, left=2)


def table(head, rows, left=1):
  """Markdown whose columns also line up on a terminal."""
  rows = [[*r, *[''] * (len(head) - len(r))] for r in rows]
  widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]

  def line(cells):
    pads = (
      c.ljust(w) if i < left else c.rjust(w)
      for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    )
    return '| ' + ' | '.join(pads) + ' |'

  rule = [
    '-' * w if i < left else '-' * (w - 1) + ':' for i, w in enumerate(widths)
  ]
  return [line(head), line(rule), *map(line, rows)]


NOTES = (
  'Step time is the longer one of arithmetic and memory, and the collectives: '
  'a lower bound (roofline; expect 1.5 to 3 times as long). The latency of '
  'collectives is not in it: with few images a chip it is what counts.'
)
COMPILED = (
  'Compiled ahead of time on a machine without that chip; FLOPs, bytes and '
  'collectives are read from the program, with loops multiplied out. The '
  'hand count has the products with padding, which XLA leaves out.'
)
CYCLES = (
  'The compiler’s estimate is the sum of its cycles over all operations, loops '
  'multiplied out: pessimistic for what the calibration gives less of the peak '
  'or of the bandwidth than chips reach. Nothing was run.'
)
KERNELS = (
  'GPUs: XLA estimates no times. Kernel by kernel the longer one of '
  'arithmetic and memory at the peaks is summed, without launches and links; '
  'nothing was tuned or run. cuDNN’s workspace is not in the memory.'
)
QUICK = (
  'Compiled with exec_time_optimization_effort {:g}: the same mathematics '
  'and collectives, but XLA leaves the chip’s vector memory unused, so that '
  'many times the bytes move and step times are no lower bounds; those '
  'of the arithmetic are (--effort=0).'
)
LARGER = (
  'The largest batch is from this program’s memory and that of a larger '
  'batch, which is compiled with the least effort: within about a tenth.'
)
COUNTED = (
  'GPUs: counted by arithmetic, nothing was compiled. State and training set '
  'are exact; activations and traffic are counted for perfect fusion, without '
  'cuDNN’s workspace: compiled programs had up to 1.9 times the temporaries '
  '(docs/plan).'
)


def notes(planned: list[Sheet], effort: float, roofline: bool) -> list[str]:
  compiled = [s for s in planned if any(r.step.compile_seconds for r in s.rows)]
  of_tpus = [s for s in compiled if s.where.layout]
  lines = [NOTES] if roofline else []
  if compiled:
    lines.append(COMPILED)
  if of_tpus:
    lines.append(CYCLES)
  if len(of_tpus) < len(compiled):
    lines.append(KERNELS)
  if any(r.larger for s in compiled for r in s.rows):
    lines.append(LARGER)
  if effort and of_tpus:
    lines.append(QUICK.format(effort))
  if len(compiled) < len(planned):
    lines.append(COUNTED)
  return [line for note in lines for line in (note, '')][:-1]


def versions() -> dict[str, str]:
  """What the numbers depend on."""
  names = ('jax', 'jaxlib', 'libtpu', 'jax-cuda13-plugin', 'flax', 'optax')
  found = {name: provenance.version_of(name) for name in names}
  return {name: version for name, version in found.items() if version}


def write(
  folder: epath.Path,
  text: list[str],
  planned: list[Sheet],
  asked: str,
  config: dict[str, Any],
  before: dict[str, Any] | None,
) -> epath.Path:
  """Writes plan.md and plan.json; returns the first."""
  folder.mkdir(parents=True, exist_ok=True)
  write_json(
    folder / 'plan.json',
    {
      'command': asked,
      'versions': versions(),
      'config': config,
      'slices': [
        {
          'name': where.name,
          'layout': where.layout,
          'chips': where.chips,
          'devices': where.devices,
          'chip': where.chip._asdict(),
          'calibration': calibration and calibration._asdict(),
          'stages': [_record(r) for r in rows],
        }
        for where, rows, calibration in planned
      ],
      'before': before,
    },
  )
  path = folder / 'plan.md'
  write_text(path, '\n'.join(text) + '\n')
  return path


def _record(r: Row) -> dict[str, Any]:
  return {
    'stage': r.planned.name,
    'images': r.planned.images._asdict(),
    'epochs': r.planned.settings.total_epochs,
    'step': r.step.record(),
    'larger': r.larger._replace(operations=()).record() if r.larger else None,
    'prediction': r.prediction._asdict() if r.prediction else None,
    'largest_batch': r.largest,
  }
