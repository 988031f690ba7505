"""A trace of a few training steps, and which parts of a step take the time.

The parts are named where they are computed, by `jax.named_scope`: SCOPES. The
trace is that of `jax.profiler`, in `profile/plugins/profile/<time>/`: XProf and
TensorBoard open `profile/`, ui.perfetto.dev opens `perfetto_trace.json.gz`, in
which operations have their part before their name. Of several processes the
first writes one; its first device is in the table.
"""

import contextlib
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from etils import epath

from rocl_jax import hlo, processes
from rocl_jax.errors import one_line, shown
from rocl_jax.progress import say, warn

SCOPES = (
  'weights',  # from what is trained to what the network sees: masks
  'views',  # the batch and its augmentation
  'attack',  # its network, target and start; in its loop the next two
  'gradient',
  'move',
  'learn',  # all else of the loss
  'update',  # the optimiser
  'checks',  # finite or not, metrics
)
UNNAMED, OTHER, IDLE = 'unnamed', 'other programs', 'idle'
_WARM = 2  # steps before the trace: the first one compiles
_ROWS = 10


@contextlib.contextmanager
def traced(
  step: Any, count: int, directory: epath.Path, label: str
) -> Iterator[Callable[..., Any]]:
  """Within, `step`, of which calls are traced from the third on.

  The table is printed after the last of them. A trace that fails is a warning.

  Args:
    step: jitted; (state, ...) -> (state, Seen).
    count: calls to trace; with 0 `step` stays itself.
    directory: for the trace.
    label: of run and stage.
  """
  calls, offset, text, seen = 0, 0, '', None
  trace = contextlib.ExitStack()

  def call(state, *arguments):
    nonlocal calls, seen
    if calls == _WARM:
      with _warned(label):
        begin(state, *arguments)
    with jax.profiler.StepTraceAnnotation(label, step_num=offset + calls):
      state, seen = step(state, *arguments)
    calls += 1
    if calls == _WARM + count:
      end()
    return state, seen

  def begin(state, *arguments):
    nonlocal offset, text
    # In all processes: should it compile again, they do so together.
    program = step.lower(state, *arguments).compile().as_text()
    offset = int(state.step) - calls  # when the steps before have ended
    if processes.is_first():
      # JAX would know at the end, and then never begin another.
      directory.mkdir(parents=True, exist_ok=True)
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # it would slow the loop down
      trace.enter_context(
        jax.profiler.trace(str(directory), profiler_options=options)
      )
      text = program

  def end():
    if calls <= _WARM:
      say(f'{label}: no steps to trace: the first {_WARM} only warm up')
    if not text:
      return
    with _warned(label):
      jax.block_until_ready(seen)
      trace.close()
      folder = max(directory.glob('plugins/profile/*'), key=str)
      scopes, steps = scopes_of(text), calls - _WARM
      module = text.split(maxsplit=2)[1].rstrip(',')  # HloModule jit_step, ...
      spent = costs(folder, scopes, module)
      _for_perfetto(folder, scopes, module)
      if not spent.keys() - {UNNAMED, OTHER, IDLE}:
        warn(
          'the kept program is of an earlier version, and has no scopes; '
          'JAX_ENABLE_COMPILATION_CACHE=false compiles it again'
        )
      say(
        f'{label}: {steps} of {count} steps traced, in {shown(directory)}\n'
        f'{table(spent, steps)}'
      )

  try:
    yield call if count else step
    if count and calls < _WARM + count:
      end()
  finally:
    with _warned(label):
      trace.close()


@contextlib.contextmanager
def _warned(label):
  try:
    yield
  except Exception as e:  # a trace is never worth a run
    warn(f'{label}: no profile: {one_line(e)}')


def costs(
  folder: epath.Path, scopes: dict[str, str], module: str
) -> dict[str, float]:
  """Nanoseconds of a device by scope.

  Args:
    folder: of one trace.
    scopes: of the step's instructions.
    module: the step's name; all else is OTHER.
  """

  def scope(event, stats):
    if stats.get('hlo_module', module) != module:
      return OTHER
    name = str(stats.get('hlo_op') or event.name)
    # TPU: the instruction's line.
    return scopes.get(name.removeprefix('%').partition(' ')[0], UNNAMED)

  (path,) = folder.glob('*.xplane.pb')
  return self_times(
    (event.start_ns, end, scope(event, stats))
    for event, end, stats in _operations(path)
  )


def _for_perfetto(folder, scopes, module):
  """Writes the trace as Perfetto reads it, with the scopes."""
  (path,) = folder.glob('*.trace.json.gz')
  with gzip.open(path) as file:
    trace = json.load(file)
  for event in trace['traceEvents']:
    args = event.get('args', {})
    scope = scopes.get(args.get('hlo_op', event.get('name')))
    if scope and args.get('hlo_module', module) == module:
      event['name'] = f'{scope}: {event["name"]}'
  del trace['metadata']  # Perfetto refuses it
  with gzip.open(folder / 'perfetto_trace.json.gz', 'wt') as file:
    json.dump(trace, file)


def scopes_of(text: str) -> dict[str, str]:
  """The scope of each instruction of a compiled program, by its name.

  XLA leaves some without: they have that of the latest of their operands, or
  of the loop that they are in.
  """
  program = hlo.parse(text)
  found: dict[str, str] = {}

  def walk(computation, outer):
    scopes: dict[str, str] = {}  # in the order of their execution
    for instruction in program.computations[computation].values():
      named = re.search(r'op_name="([^"]*)"', instruction.attributes)
      scope = scope_of(named[1]) if named else ''
      if not scope:
        earlier = [s for n, s in scopes.items() if n in instruction.operands]
        scope = next((s for s in reversed(earlier) if s != UNNAMED), outer)
      scopes[instruction.name] = scope
      for name in hlo.called(instruction):
        walk(name, scope)
    found.update(scopes)

  walk(program.entry, UNNAMED)
  return found


def scope_of(name: str) -> str:
  """'jit(step)/jvp(learn)/attack/while/body/gradient/jvp()/mul' ->
  'attack/gradient/forward'; '' if it names none of SCOPES."""
  name, _, _ = name.partition(';')  # of several that XLA made one
  parts = re.findall(r'(?:^|/)(?:(?!jit)\w+\()*(\w+)\)*(?=/|$)', name)
  words = list(dict.fromkeys(part for part in parts if part in SCOPES))
  if len(words) > 1 and words[0] == 'learn':  # it holds views and attack
    words = words[1:]
  if words and words[-1] in ('gradient', 'learn'):
    words.append('backward' if 'transpose(' in name else 'forward')
  return '/'.join(words)


def _operations(path):
  """The first device's operations: (event, end in ns, {stat: value})."""
  planes = {
    p.name: p for p in jax.profiler.ProfileData.from_file(str(path)).planes
  }
  devices = sorted(n for n in planes if re.match(r'/device:[GT]PU:\d+$', n))
  lines = planes[devices[0] if devices else '/host:CPU'].lines
  found = [(e, dict(e.stats), line.name) for line in lines for e in line.events]
  if devices:  # a TPU has one line of all operations, a GPU a line a stream
    lines = {name for *_, name in found}
    wanted = 'XLA Ops' if 'XLA Ops' in lines else 'Stream'
    found = [x for x in found if x[2].startswith(wanted)]
  # A CPU's operation may begin on one thread, and end on another.
  ends = {
    stats.get('_c'): event.start_ns
    for event, stats, _ in found
    if event.name.startswith('end: ')
  }
  if not devices:
    found = [x for x in found if 'hlo_op' in x[1]]
    first = min(stats['device_ordinal'] for _, stats, _ in found)
    found = [x for x in found if x[1]['device_ordinal'] == first]
  for event, stats, _ in found:
    end = event.start_ns + event.duration_ns
    yield event, max(end, ends.get(stats.get('_p'), end)), stats


def self_times(
  operations: Iterable[tuple[float, float, str]],
) -> dict[str, float]:
  """Time by name, of operations (begin, end, name): that of an instant goes to
  what began last.

  So a loop has what its body leaves, and what runs side by side counts once.
  The sum is the time from the first beginning to the last end; IDLE is what
  no operation covers.
  """
  ordered = sorted(operations, key=lambda x: (x[0], -x[1]))
  spent = {name: 0.0 for *_, name in ordered} | {IDLE: 0.0}
  under_way: list[tuple[float, str]] = []
  last = max(end for _, end, _ in ordered)
  at = ordered[0][0]
  for begin, end, name in [*ordered, (last, last, '')]:
    while under_way and at < begin:
      until, inner = under_way.pop()
      if until > at:
        spent[inner] += min(until, begin) - at
        at = min(until, begin)
      if until > begin:
        under_way.append((until, inner))
    spent[IDLE] += begin - at
    at = begin
    under_way.append((end, name))
  return spent


def table(spent: dict[str, float], steps: int) -> str:
  """The dearest scopes: milliseconds a step, and the share of all time."""
  total = sum(spent.values())
  rows = sorted(spent.items(), key=lambda x: -x[1])
  rest = sum(ns for _, ns in rows[_ROWS:])
  lines = [f'  {"scope":26}{"ms a step":>10}{"share":>8}']
  for name, ns in [*rows[:_ROWS], ('all others', rest), ('total', total)]:
    lines.append(f'  {name:26}{ns / steps / 1e6:10.2f}{ns / total:8.1%}')
  return '\n'.join(lines)
