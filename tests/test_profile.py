"""Traces: what is in them, what is printed, and that nothing else changes."""

import dataclasses
import gzip
import json
import re
from types import SimpleNamespace

import jax
import pytest
from etils import epath
from test_stages import (
  Interruption,
  assert_equal_trees,
  rows_without_clocks,
  stage_run,
)

from configs import quickstart
from rocl_jax import data, loop, pipeline, profile
from rocl_jax.experiment import parse_experiment
from rocl_jax.files import write_json


def traced_run(folder, count):
  run = stage_run('supervised', folder)
  return dataclasses.replace(run, profile=count)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """(what a run hands on, its rows) without a trace."""
  folder = tmp_path_factory.mktemp('plain')
  return loop.run_stage(traced_run(folder, 0)), rows_without_clocks(folder)


def assert_as(plain, variables, folder):
  assert_equal_trees(variables, plain[0])
  assert rows_without_clocks(folder) == plain[1]


def test_a_trace_names_the_parts_of_a_step_and_changes_nothing(
  plain, tmp_path, capfd, monkeypatch
):
  read, costs = [], profile.costs
  monkeypatch.setattr(
    profile, 'costs', lambda *args: read.append(costs(*args)) or read[0]
  )
  assert_as(plain, loop.run_stage(traced_run(tmp_path, 2)), tmp_path)
  (folder,) = (tmp_path / 'profile' / 'plugins' / 'profile').iterdir()
  with gzip.open(folder / 'perfetto_trace.json.gz') as file:
    events = json.load(file)['traceEvents']
  steps = [e['args'] for e in events if e.get('name') == 'supervised']
  assert sorted(int(args['step_num']) for args in steps) == [2, 3]
  for scope in ('views', 'attack/gradient/forward', 'learn/backward'):
    assert any(e.get('name', '').startswith(f'{scope}: ') for e in events)

  printed = capfd.readouterr().err
  assert 'supervised: 2 of 2 steps traced' in printed
  rows = {
    scope: float(ms)
    for scope, ms in re.findall(r'^  (\S.*?) +([\d.]+) +[\d.]+%', printed, re.M)
  }
  total = rows.pop('total')
  assert sum(rows.values()) == pytest.approx(total, abs=0.1)
  assert {'attack/gradient/backward', 'views', 'learn/forward'} < rows.keys()
  (spent,) = read
  assert {'update', 'checks', 'attack/move', 'learn/backward'} < spent.keys()
  busy = sum(spent.values()) - spent[profile.IDLE]
  assert 0 < spent[profile.UNNAMED] < 0.05 * busy


SILENT = jax.profiler.ProfileOptions()
SILENT.host_tracer_level = SILENT.python_tracer_level = 0


@pytest.mark.parametrize('fault', ['no folder', 'another trace'])
def test_a_trace_that_fails_is_one_warning(fault, plain, tmp_path, capfd):
  if fault == 'no folder':
    (tmp_path / 'profile').write_text('')
  else:
    jax.profiler.start_trace(tmp_path / 'other', profiler_options=SILENT)
  profile.warn.cache_clear()
  variables = loop.run_stage(traced_run(tmp_path, 1))
  if fault == 'another trace':
    jax.profiler.stop_trace()
  assert_as(plain, variables, tmp_path)
  lines = capfd.readouterr().err.splitlines()
  assert sum('warning: supervised: no profile: ' in line for line in lines) == 1
  jax.profiler.start_trace(tmp_path / 'next', profiler_options=SILENT)
  jax.profiler.stop_trace()  # none was left under way


def test_what_ends_early_is_traced_as_far_as_it_goes(
  plain, tmp_path, capfd, monkeypatch
):
  def show(self, done, note):
    if done == 6:
      raise Interruption

  with monkeypatch.context() as patch:
    patch.setattr(loop.Progress, 'show', show)
    with pytest.raises(Interruption):
      loop.run_stage(traced_run(tmp_path, 100))
  assert 'steps traced' not in capfd.readouterr().err
  # From the save of step 3 on: nine steps, of which two warm up.
  assert_as(plain, loop.run_stage(traced_run(tmp_path, 100)), tmp_path)
  assert 'supervised: 7 of 100 steps traced' in capfd.readouterr().err


def test_a_trace_is_no_part_of_what_a_run_is(tmp_path, capfd):
  root, config = epath.Path(tmp_path), quickstart.get_config()
  experiment = parse_experiment(config)
  dataset = data.load('digits', '', config.data.validation)
  main, *_ = pipeline._chains(experiment, dataset, root)
  write_json(root / 'config.json', main.run.config)
  request = pipeline._request(main, 'pretrain')
  write_json(root / '1_pretrain' / 'request.json', request)
  config.profile = 3
  pipeline.check(parse_experiment(config), dataset, root)
  told = capfd.readouterr().err.splitlines()
  assert told == ['the run: config.profile was 0, is 3']


def test_an_instant_belongs_to_what_began_last():
  spent = profile.self_times(
    [
      (0, 10, 'loop'),
      (1, 3, 'body'),
      (3, 6, 'body'),
      (5, 8, 'beside'),  # another stream, partly at the same time
      (12, 13, 'next'),
      (12, 12, 'nothing'),
    ]
  )
  assert {name: ns for name, ns in spent.items() if ns} == {
    **{'loop': 3, 'body': 4, 'beside': 3, 'next': 1},
    profile.IDLE: 2,
  }


@pytest.mark.parametrize(
  'name, scope',
  [
    ('jit(step)/prune/weights/jvp()/top_k', 'weights'),
    ('jit(step)/prune/learn/jvp(views)/vmap()/add', 'views'),
    ('jit(step)/learn/jvp()/dot_general;jit(step)', 'learn/forward'),
    ('jit(step)/learn/transpose(jvp(ResNet))/mul', 'learn/backward'),
    ('jit(step)/learn/jvp(attack)/add', 'attack'),
    ('jit(step)/jvp(learn)/attack/while/body/closed_call/move/clamp',
     'attack/move'),
    ('a/attack/gradient/transpose(gradient)/jvp(ResNet)/mul',
     'attack/gradient/backward'),
    ('jit(step)/jit(update)/add', ''),
    ('reduce_sum', ''),
  ],
)  # fmt: skip
def test_the_scope_of_an_operation(name, scope):
  assert profile.scope_of(name) == scope


TEXT = """HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0), metadata={op_name="x"}
  %fusion.1 = f32[2]{0} add(%x, %x), metadata={op_name="jit(step)/attack/add"}
  %copy.2 = f32[2]{0} copy(%fusion.1)
  ROOT %fusion.3 = f32[2]{0} add(%copy.2, %x), metadata={op_name="jit(step)/update/add"}
}
"""  # noqa: E501


def event(name, start, duration, **stats):
  return SimpleNamespace(
    name=name, start_ns=start, duration_ns=duration, stats=stats.items()
  )


def plane(name, **lines):
  return SimpleNamespace(
    name=name,
    lines=[
      SimpleNamespace(name=line.replace('_', ' '), events=events)
      for line, events in lines.items()
    ],
  )


HOST = plane('/host:CPU', python=[event('train', 0, 99)])
STEP = {'hlo_module': 'jit_step', 'device_ordinal': 0}
OTHER = {'hlo_module': 'jit_other', 'device_ordinal': 0}
PLANES = {
  'cpu': [
    plane(
      '/host:CPU',
      python=[event('train', 0, 99)],
      thread_1=[
        event('fusion.1', 0, 1, hlo_op='fusion.1', _p=5, **STEP),
        event('fusion.3', 6, 2, hlo_op='fusion.3', _p=6, **STEP),
        event('end: fusion.3', 8, 0, _c=6),
        event('fusion.3', 0, 99, hlo_op='fusion.3', device_ordinal=1),
      ],
      thread_2=[
        event('end: fusion.1', 4, 0, _c=5),
        event('copy.2', 4, 2, hlo_op='copy.2', **STEP),
        event('copy.2', 8, 1, hlo_op='copy.2', **OTHER),
      ],
    ),
  ],
  'gpu': [
    HOST,
    plane('/device:GPU:1', Stream_7=[event('k', 0, 99)]),
    plane(
      '/device:GPU:0',
      Stream_13=[
        event('kernel_a', 0, 4, hlo_op='fusion.1', **STEP),
        event('kernel_c', 6, 2, hlo_op='fusion.3', **STEP),
        event('kernel_d', 8, 1, hlo_op='fusion.3', **OTHER),
      ],
      Stream_20=[event('MemcpyD2D', 2, 4, hlo_op='copy.2', **STEP)],
      Launch_Stats=[event('x', 0, 99)],
    ),
  ],
  'tpu': [
    HOST,
    plane(
      '/device:TPU:0',
      Steps=[event('7', 0, 99)],
      XLA_Modules=[event('jit_step(1)', 0, 99)],
      XLA_Ops=[
        event('%fusion.1 = f32[2]{0} add(...)', 0, 2),
        event('%copy.2 = f32[2]{0} copy(...)', 2, 4),
        event('%fusion.3 = f32[2]{0} add(...)', 6, 2),
        event('%other = f32[2]{0} add(...)', 8, 1),
      ],
    ),
  ],
}


@pytest.mark.parametrize('kind', PLANES)
def test_the_operations_of_a_trace(kind, tmp_path, monkeypatch):
  """Stand-ins, with lines and statistics as XLA names them."""
  (tmp_path / 'host.xplane.pb').write_text('')
  monkeypatch.setattr(
    jax.profiler.ProfileData,
    'from_file',
    lambda path: SimpleNamespace(planes=PLANES[kind]),
  )
  rest = profile.UNNAMED if kind == 'tpu' else profile.OTHER
  scopes = profile.scopes_of(TEXT)
  spent = profile.costs(epath.Path(tmp_path), scopes, 'jit_step')
  assert {name: ns for name, ns in spent.items() if ns} == {
    **{'attack': 6, 'update': 2, rest: 1}
  }
