"""What training takes on accelerators that are not there."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from configs import cifar10, quickstart
from rocl_jax import hlo
from rocl_jax.benchmark import work
from rocl_jax.errors import UserError
from rocl_jax.hlo import Collective
from rocl_jax.plan import arithmetic, chips, estimate, steps
from rocl_jax.plan import compile as ahead
from rocl_jax.plan.estimate import Memory, Step

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="needs the TPU compiler: pip install -e '.[tpu]'",
)


@pytest.mark.parametrize(
  'name, layout, count, devices',
  [
    ('v4-8', '2x2x1', 4, 4),
    ('v5e-16', '4x4', 16, 16),
    ('v5e-256', '16x16', 256, 256),
    ('v5litepod-8', '2x4', 8, 8),
    ('v5e:2x4', '2x4', 8, 8),
    ('V6E-8', '2x4', 8, 8),
    ('v5p-8', '2x2x1', 4, 4),
    ('v3-32', '4x4', 16, 32),
    ('h100x8', '', 8, 8),
    ('l4', '', 1, 1),
  ],
)
def test_names_are_those_that_people_use(name, layout, count, devices):
  found = chips.slice_of(name)
  assert (found.layout, found.chips, found.devices) == (layout, count, devices)


def test_numbers_in_names_count_cores_or_chips():
  for name, s in chips.SLICES.items():
    if s.layout:
      cores = 2 if s.kind in ('v2', 'v3', 'v4', 'v5p') else 1
      assert name == f'{s.kind}-{cores * s.chips}'
    assert chips.slice_of(name) == s


def test_the_table_is_plausible_and_has_sources():
  for chip in (*chips.TPUS.values(), *chips.GPUS.values()):
    assert chip.source.startswith('https://')
    assert chip.f32 < chip.bf16 and 5 < chip.memory < 200
    # Operations a byte, of matrix units and of what feeds them.
    assert 50 < chip.peak('bfloat16') / chip.bytes_per_second < 600
  v3 = chips.TPUS['v3']
  assert v3.peak('bfloat16') == 123e12 / 2  # of a core
  assert v3.peak('float32') == v3.peak('bfloat16') / 6


@pytest.mark.parametrize(
  'name, hint',
  [
    ('v5e-17', "did you mean 'v5e-16'"),
    ('v4:2x2', 'v4-8'),
    ('h100x7', 'h100x8'),
    ('v7x-8', 'v5e-256'),
    ('', 'v4-8'),
  ],
)
def test_a_wrong_name_is_told_in_one_line(name, hint):
  with pytest.raises(UserError) as e:
    chips.slice_of(name)
  message = str(e.value)
  assert message.startswith('--topology: found ') and hint in message


def small(**fields):
  config = cifar10.get_config()
  config.data.source = 'digits'
  config.model.name, config.model.width = 'resnet8', 4
  for name, value in fields.items():
    section, _, field = name.partition('__')
    config[section][field] = value
  return config


def stages(config, images=0, size=0, classes=0):
  run, sizes = steps.read(config, images, size, classes)
  return {s.name: s for s in steps.plan(run, sizes)}


def test_sizes_come_from_the_source_and_need_no_files():
  config = cifar10.get_config()
  config.data.source, config.data.dir = 'binary', '/nowhere'
  run, sizes = steps.read(config, 0, 0, 0)
  assert sizes == (49_000, 32, 10) and run.config['data']['dir'] == '/nowhere'
  assert config.data.source == 'binary'
  assert steps.read(quickstart.get_config(), 0, 0, 0)[1] == (1_300, 8, 10)
  config.data.source = 'folder'
  with pytest.raises(UserError, match='--images=N'):
    steps.read(config, 100, 0, 0)
  assert steps.read(config, 100, 64, 3)[1] == (100, 64, 3)


def test_a_batch_that_the_chips_can_not_share_is_told():
  planned = stages(cifar10.get_config())['supervised']
  steps.check(planned, 256)  # an image a chip
  with pytest.raises(UserError, match='--config.supervised.batch_size.*384'):
    steps.check(planned, 384)


def made(batch, each, stage='supervised', **fields):
  memory = Memory(1000, each * batch, 10, 10)
  return Step(stage, batch, 4, hand_flops=0, memory=memory, **fields)


def slice_with(memory, **fields):
  chip = chips.TPUS['v5e']._replace(memory=memory / 2**30, **fields)
  return chips.Slice('x', 'v5e', '2x2', 4, chip)


def test_largest_batch_is_the_last_that_fits():
  where = slice_with(1020 + 3 * 1001)
  one, two = made(100, 3), made(200, 3)
  assert estimate.largest_batch(one, two, where, 10_000) == 1000
  assert estimate.largest_batch(one, two, where, 500) == 500
  # Padding flatters the smaller one: the line is steeper than its share.
  assert estimate.largest_batch(made(100, 1), two, where, 10_000) < 1000
  refused = Step('supervised', 800, 4, 0, refused='too large')
  assert estimate.largest_batch(one, refused, where, 10_000) == 796
  # All pairs of images.
  assert (
    estimate.largest_batch(
      made(100, 3, 'pretrain'), made(200, 3, 'pretrain'), where, 10_000
    )
    < 1000
  )


def test_a_second_batch_fills_the_tiles():
  assert estimate.second_batch(256, 8, 49_000) == 2048
  assert estimate.second_batch(4096, 8, 49_000) == 8192
  assert estimate.second_batch(256, 256, 49_000) == 48_896
  assert estimate.second_batch(1437, 1, 1437) is None


def test_time_is_the_slower_resource_and_the_collectives():
  planned = stages(small())['supervised']
  where = slice_with(1e9, bf16=6.0, f32=1.0, bandwidth=1.0, link=2.0)
  step = made(
    256,
    1,
    flops=2e9,
    traffic=3e6,
    collectives={'all-reduce': Collective(5, 2e6)},
  )
  found = estimate.predict(step, planned, where)
  assert found.arithmetic == pytest.approx(2e-3)
  assert found.memory == pytest.approx(3e-3)
  assert found.interconnect == pytest.approx(2 * 3 / 4 * 2e-3)
  assert found.step == pytest.approx(6e-3)
  assert found.images_per_second == pytest.approx(256 / 6e-3)
  updates = 25 * ((1437 - 1000) // 256)
  assert found.hours == pytest.approx(updates * 6e-3 / 3600)


def test_arithmetic_of_gpus():
  planned = stages(small(), images=1000, size=16, classes=10)
  stage = planned['supervised']
  one, two = (arithmetic.step(stage, 64, n) for n in (1, 2))
  needed = work.step(stage.name, stage.settings, stage.model, 16, 10)
  assert one.flops == 64 * needed == 2 * two.flops
  assert one.memory.temporaries > two.memory.temporaries
  assert one.collectives == {} and two.collectives['all-reduce'].times == 1
  images, order = 1000 * 16 * 16 * 3 + 4 * 1000, 4 * (1000 // 64) * 64
  first = jax.eval_shape(stage.stage.start, stage.upstream, jax.random.key(0))
  size = lambda tree: 4 * sum(x.size for x in jax.tree.leaves(tree))
  state = 2 * size(first.trainable) + size(first.batch_stats)
  rest = one.memory.arguments - images - order - state
  assert 0 < rest < 100  # counters


def test_arithmetic_of_memory_beside_what_xla_compiles():
  """On a CPU, whose arrays have no padding."""
  config = small(supervised__loss='natural')
  stage = stages(config, images=1000, size=32, classes=10)['supervised']
  mesh = jax.sharding.Mesh(jax.devices()[:1], ('data',))
  jitted, arguments = steps.program(stage, 64, mesh)
  compiled = jitted.lower(*arguments).compile().memory_analysis()
  counted = arithmetic.step(stage, 64, 1).memory
  key = 1000
  assert abs(compiled.argument_size_in_bytes - counted.arguments) < key
  ratio = compiled.temp_size_in_bytes / counted.temporaries
  assert 0.5 < ratio < 3.0, ratio


TPU_TEXT = """
%body (p: (s32[], f32[32,8])) -> (s32[], f32[32,8]) {
  %p = (s32[]{:T(128)}, f32[32,8]{0,1:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[32,8]{0,1:T(8,128)} get-tuple-element(%p), index=1
  %g = (f32[4,8]{1,0:T(8,128)}, f32[32,8]{1,0:T(8,128)}) all-gather-start(%x)
  %d = f32[32,8]{1,0:T(8,128)} all-gather-done(%g)
  ROOT %t = (s32[]{:T(128)}, f32[32,8]{0,1:T(8,128)}) tuple(%i, %d)
}

%condition (p.1: (s32[], f32[32,8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[32,8]{0,1:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} constant(12)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (a: f32[32,8]) -> f32[32,8] {
  %a = f32[32,8]{0,1:T(8,128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %first = s32[]{:T(128)} copy(%two)
  %state = (s32[]{:T(128)}, f32[32,8]{0,1:T(8,128)}) tuple(%first, %a)
  %w = (s32[]{:T(128)}, f32[32,8]{0,1:T(8,128)}) while(%state), \
condition=%condition, body=%body
  %y = f32[32,8]{0,1:T(8,128)} get-tuple-element(%w), index=1
  %s = (f32[32,8]{0,1:T(8,128)S(1)}, f32[32,8]{0,1:T(8,128)}, u32[]{:S(2)}) \
copy-start(%y)
  %e = f32[32,8]{0,1:T(8,128)S(1)} copy-done(%s)
  ROOT %r = f32[32,8]{0,1:T(8,128)} negate(%e)
}
"""


def test_programs_of_tpus_are_read():
  program = hlo.parse(TPU_TEXT)
  gathers = {'all-gather': Collective(10, 10 * 32 * 8 * 4)}
  assert hlo.collectives(program) == gathers
  assert hlo.collectives(program, in_loops=True) == gathers
  array = hlo.Shape('bf16', (3, 5, 32, 8), '2,3,1,0:T(8,128)(2,1)')
  assert array.nbytes == 2 * 3 * 5 * 32 * 8
  assert array.moved == array.stored == 2 * 3 * 5 * 128 * 8
  inside = array._replace(layout=array.layout + 'S(1)')
  assert inside.moved == 0 and inside.stored == array.stored
  # Copied from main memory, and the result written there.
  padded = 4 * 128 * 8
  loop = 10 * (padded + 32 * 128 * 4)  # the gathered rows are padded to 128
  assert hlo.traffic(program) == loop + 2 * padded + 2 * 4 + 10 * 9


def test_without_the_compiler_one_sentence_names_the_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
    ahead.check_installed()


def plan(*arguments, timeout=120):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1'}
  return subprocess.run(
    [sys.executable, '-m', 'rocl_jax.plan', *arguments],
    capture_output=True,
    text=True,
    env=environment,
    timeout=timeout,
  )


CONFIG = '--config=configs/cifar10.py'


def test_mistakes_end_with_status_two_before_anything_compiles():
  for arguments, told in (
    ([], '--topology: missing'),
    (['--topology=v5e-17'], '--topology: found'),
    (['--topology=h100x8', '--stages=prun'], '--stages: found'),
    (['--topology=h100x8', '--config.prune.batch_size=9'], '8 or 16'),
  ):
    result = plan(CONFIG, *arguments)
    assert result.returncode == 2, result.stderr
    assert told in result.stderr and result.stderr.count('\n') <= 2


def test_gpus_are_written_down(tmp_path):
  result = plan(CONFIG, '--compare=h100x8,a100-80x4', f'--output={tmp_path}')
  assert result.returncode == 0, result.stderr
  assert 'Side by side' in result.stdout and 'prune' in result.stdout
  assert (tmp_path / 'plan.md').read_text() in result.stdout
  record = json.loads((tmp_path / 'plan.json').read_text())
  assert [s['name'] for s in record['slices']] == ['h100x8', 'a100-80x4']
  assert record['versions']['jax'] == jax.__version__
  assert record['slices'][0]['stages'][0]['prediction']['step'] > 0


NARROW = (
  CONFIG,
  '--topology=v5e:2x4',
  '--effort=-1',
  '--nolargest_batch',
  '--config.model.name=resnet8',
  '--config.model.width=4',
  '--config.model.dtype=bfloat16',
)


def compiled(tmp_path, *arguments, timeout):
  result = plan(*NARROW, f'--output={tmp_path}', *arguments, timeout=timeout)
  assert result.returncode == 0, result.stderr
  record = json.loads((tmp_path / 'plan.json').read_text())
  return record['slices'][0]['stages'][0]['step']


@needs_libtpu
def test_a_step_is_compiled_for_a_tpu_that_is_not_there(tmp_path):
  step = compiled(
    tmp_path,
    "--config.stages=('pretrain','linear_eval')",
    '--stages=linear_eval',
    '--config.linear_eval.loss=adversarial',
    '--config.linear_eval.attack.steps=3',
    timeout=300,
  )
  assert step['devices'] == 8 and step['compile_seconds'] > 0
  # The program leaves out the products with padding.
  assert 0.7 < step['flops'] / step['hand_flops'] < 1.0
  images = 49_000 * (32 * 32 * 3 + 4)
  assert images < step['memory']['arguments'] < 1.1 * images
  assert 'all-reduce' in step['collectives'] and step['in_attack'] == {}


@needs_libtpu
@pytest.mark.slow
def test_instance_wise_attack_gathers_embeddings_once_a_step(tmp_path):
  step = compiled(
    tmp_path,
    '--stages=pretrain',
    '--config.pretrain.attack.steps=3',
    timeout=900,
  )
  found = dict(step['in_attack'])
  gathers = found.pop('all-gather', {'times': 0, 'nbytes': 0})
  assert not found and gathers['times'] <= 3
  assert gathers['nbytes'] <= 3 * 256 * 128 * 4
