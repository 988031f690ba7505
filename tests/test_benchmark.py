"""What is counted in compiled programs, and the commands that measure."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax import lax

from configs import benchmark as benchmark_config
from rocl_jax import compiled, hlo, losses, models
from rocl_jax.benchmark import (
  attacks,
  autotuning,
  drift,
  output,
  programs,
  roofline,
  scaling,
  timing,
)
from rocl_jax.benchmark import masks as mask_speed
from rocl_jax.benchmark.settings import parse_settings
from rocl_jax.errors import UserError
from rocl_jax.stages import STAGES

MODEL = models.Settings(name='resnet8', width=4, dtype='float32')


def small_settings(**changes):
  config = benchmark_config.get_config()
  config.recipe.model.name = 'resnet8'
  fields = {'width': (4,), 'batch': (8,), 'steps': (2,)}
  fields |= {'rounds': 2, 'image_size': 16} | changes
  for name, value in fields.items():
    config[name] = value
  config.masks.sizes = (1000,)
  config.scaling.update(dict(devices=(1, 2), width=4, batch=8))
  return parse_settings(config)


def cell(steps, batch=8):
  return programs.Cell(MODEL, batch, steps, image_size=16, num_classes=10)


def counted(function, *arguments):
  lowered = jax.jit(function).lower(*arguments)
  return hlo.parse(lowered.compile().as_text())


def test_a_loop_counts_as_often_as_it_runs():
  a = jnp.ones((4, 5))
  b = jnp.ones((5, 5))
  program = counted(
    lambda a, b: lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ b), a), a, b
  )
  assert hlo.flops(program) == 7 * 2 * 4 * 5 * 5
  assert hlo.traffic(program) >= 7 * 4 * (4 * 5 + 5 * 5 + 4 * 5)
  assert not hlo.collectives(program)


@pytest.mark.parametrize('stride', [1, 2])
def test_a_convolution_counts_its_products_with_real_entries(stride):
  images, kernel = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 4))
  convolve = lambda x, w: lax.conv_general_dilated(
    x,
    w,
    (stride, stride),
    ((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  # Each product of ones adds one to the sum of the results.
  products = int(convolve(images, kernel).sum())
  assert hlo.flops(counted(convolve, images, kernel)) == 2 * products


def test_attack_work_and_memory_against_the_number_of_steps():
  """Work grows by the same with each step, memory not at all."""
  bench = programs.bench(cell(2), jax.devices()[:1])
  built = [
    programs.pgd_attack(bench._replace(cell=cell(steps)), eps=0.1)
    for steps in (2, 4, 8)
  ]
  two, four, eight = (hlo.flops(p.program) for p in built)
  assert eight - four == 2 * (four - two) > 0
  # What a step needs, but for the products with the padding.
  assert 0.6 < two / (8 * built[0].work) <= 1.0
  memory = [p.memory for p in built]
  assert memory[0] == memory[1] == memory[2] > 0


def test_training_step_memory_and_collectives_do_not_grow_with_the_attack():
  recipe = small_settings().recipe
  built = []
  for steps in (2, 6):
    bench = programs.bench(cell(steps), jax.devices()[:2])
    section = programs.with_cell(recipe.supervised, bench.cell)
    built.append(programs.training_step(bench, 'supervised', section))
  short, long = built
  assert short.memory == long.memory
  reductions = hlo.collectives(short.program)
  assert reductions == hlo.collectives(long.program)
  gradients = sum(
    x.nbytes
    for part in ('encoder', 'head')
    for x in jax.tree.leaves(bench.variables['params'][part])
  )
  assert reductions['all-reduce'].nbytes >= gradients
  assert set(reductions) == {'all-reduce'}


def test_naive_attack_is_the_same_attack():
  bench = programs.bench(cell(2), jax.devices()[:1])
  ours = programs.pgd_attack(bench, eps=0.1).run()
  naive = programs.naive_pgd_attack(bench, eps=0.1).run()
  assert (np.abs(ours - naive) < 1e-6).mean() > 0.98


def test_attacks_measures_every_program_and_writes_it_down(tmp_path):
  records = attacks.measure(small_settings(), False, lambda _: None)
  (record,) = records
  assert record['precision'] == {'ours': 'float32, IEEE products'}
  names = {'PGD', 'PGD, naive fori_loop', 'instance-wise attack'}
  names |= {'TRADES step', 'RoCL step', 'plain step', 'HYDRA masks'}
  assert set(record['programs']) == names
  for name, row in record['programs'].items():
    assert row['n'] == 2 and 0 < row['minimum'] <= row['median']
    assert row['memory_bytes'] > 0 and row['compile_seconds'] > 0
    if name != 'HYDRA masks':
      rate = row['images_per_second'] * row['flops_per_image']
      assert row['flops_per_second'] == pytest.approx(rate)
  folder = epath.Path(tmp_path)
  path = output.write(folder, 'attacks', records, 'attacks')
  assert json.loads((folder / 'attacks.json').read_text())['records']
  assert all(f'| {name} |' in path.read_text() for name in names)
  assert (folder / 'attacks.png').exists()


def test_other_sections_write_their_tables(tmp_path):
  settings, quiet = small_settings(), lambda _: None
  folder = epath.Path(tmp_path)
  measured = {
    'masks': mask_speed.measure(settings, False, quiet),
    'roofline': roofline.measure(settings, quiet),
  }
  for section, records in measured.items():
    output.write(folder, section, records, section)
    assert json.loads((folder / f'{section}.json').read_text())['records']


DRIFT = [
  {
    'stage': 'pretrain',
    'model': {'name': 'resnet8', 'width': 4},
    'batch': 8,
    'attack_steps': 2,
    'drift': {'2 devices': {'1 steps': 0.01}},
  }
]


@pytest.mark.slow
def test_scaling_counts_what_travels(tmp_path):
  records = scaling.measure(small_settings(), lambda _: None)
  path = output.write(epath.Path(tmp_path), 'scaling', records, 'scaling')
  assert json.loads(path.with_suffix('.json').read_text())['records']
  by_kind = {(r['kind'], r['devices']): r for r in records}
  assert not by_kind['strong', 1]['collectives']
  assert by_kind['weak', 2]['collectives']['all-reduce']['nbytes'] > 0
  assert by_kind['weak', 2]['batch'] == 16


def test_drift_is_a_small_share_of_the_way(tmp_path, monkeypatch):
  stages = {name: STAGES[name] for name in ('linear_eval',)}
  monkeypatch.setattr(drift, 'STAGES', stages)
  monkeypatch.setattr(drift, 'AFTER', (1, 2))
  records = drift.measure(small_settings(), lambda _: None)
  path = output.write(epath.Path(tmp_path), 'drift', records, 'drift')
  assert '2 devices, 1 steps' in path.read_text()
  assert [r['stage'] for r in records] == list(stages)
  for record in records:
    assert 0 <= record['drift']['2 devices']['1 steps'] < 0.02


class Device:
  """A queue on a clock of its own: a call takes 1 ms of the host and 20 ms of
  the device."""

  def __init__(self):
    self.now = self.done = 0.0
    self.log = []

  def job(self, name):
    return timing.Job(lambda: self.dispatch(name), self.wait)

  def dispatch(self, name):
    self.now += 0.001
    self.done = max(self.now, self.done) + 0.020
    self.log.append(name)
    return len(self.log)

  def wait(self, last):
    assert last == len(self.log)
    self.now = max(self.now, self.done)
    self.log.append('wait')

  def sleep(self, seconds):
    self.now += seconds
    self.log.append('sleep')


@pytest.fixture
def device(monkeypatch):
  device = Device()
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: device.now)
  monkeypatch.setattr(timing.time, 'sleep', device.sleep)
  return device


def test_on_a_cpu_a_turn_is_one_call_after_a_pause(device):
  jobs = {name: device.job(name) for name in 'ab'}
  seconds = timing.interleave(jobs, 3, lambda _: None)
  turns = [x for name in 'ab' for x in ('sleep', name, 'wait')]
  assert device.log == ['a', 'wait', 'b', 'wait', *turns * 3]
  assert seconds == {name: [pytest.approx(0.021)] * 3 for name in 'ab'}


@pytest.mark.parametrize(('least', 'calls'), [(0.5, 24), (0.1, 10)])
def test_elsewhere_a_turn_fills_the_queue_and_waits_once(
  device, monkeypatch, least, calls
):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(timing, 'ROW_SECONDS', least)
  jobs = {name: device.job(name) for name in 'ab'}
  seconds = timing.interleave(jobs, 2, lambda _: None)
  warm_up = [x for name in 'ab' for x in (name, 'wait') * 3]
  turns = [x for name in 'ab' for x in (*name * calls, 'wait')]
  assert device.log == warm_up + turns * 2
  each = 0.020 + 0.001 / calls  # the host is ahead but for the first call
  assert seconds == {name: [pytest.approx(each)] * 2 for name in 'ab'}


def test_a_job_waits_for_its_own_result():
  assert timing.Job(lambda: jnp.arange(3)).run().sum() == 3
  assert timing.Job(lambda: 1, lambda last: last + 1).run() == 2


def test_ratios_are_of_medians_and_of_rounds():
  ratio = timing.ratio([4.0, 6.0, 5.0], [2.0, 2.0, 1.0])
  assert (ratio.median, ratio.minimum) == (2.5, 4.0)
  assert ratio.quartiles == (2.5, 4.0)


def test_autotuning_is_kept_and_programs_are_not(tmp_path, monkeypatch):
  names = [f'jax_{x}' for x in ('compilation_cache_dir',)]
  names += ['jax_persistent_cache_min_compile_time_secs']
  names += ['jax_enable_compilation_cache']
  before = {name: jax.config.values[name] for name in names}
  try:
    assert autotuning.keep() is None  # a CPU has none
    assert not jax.config.values['jax_enable_compilation_cache']
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    jax.config.update('jax_compilation_cache_dir', str(tmp_path))
    kept = autotuning.keep()
    assert jax.config.values['jax_compilation_cache_dir'] == str(kept.folder)
    assert jax.config.values[names[1]] == float('inf')
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
  assert kept.folder.parent == tmp_path
  assert kept.counts() == {'kept': 0, 'new': 0}
  result = kept.folder / 'xla_gpu_per_fusion_autotune_cache_dir' / 'x.textproto'
  result.parent.mkdir(parents=True)
  result.write_text('')
  assert kept.counts() == {'kept': 0, 'new': 1}
  folder = epath.Path(tmp_path / 'out')
  path = output.write(folder, 'drift', DRIFT, 'drift', kept)
  assert '0 results of autotuning' in path.read_text()
  assert json.loads(path.with_suffix('.json').read_text())['autotuning']


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('width', (0,), 'config.width: found (0,)'),
    ('dtype', ('float23',), 'did you mean'),
    ('rounds', 0, 'config.rounds: found 0, wanted 1 or more'),
    ('batch', (), 'config.batch: found ()'),
  ],
)
def test_mistakes_in_the_config_are_named(field, value, message):
  with pytest.raises(UserError, match='config') as error:
    small_settings(**{field: value})
  assert message in str(error.value)


def test_mistakes_of_the_command_exit_with_2():
  for arguments, message in (
    (['atacks'], "did you mean 'attacks'"),
    (['scaling', '--peers'], 'wanted attacks or masks'),
    (['--config.widht=3'], "did you mean 'width'"),
  ):
    result = run(*arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and 'Traceback' not in result.stderr


def test_json_is_all_that_is_printed(tmp_path):
  small = '--config.masks.sizes=1000,', '--config.rounds=1'
  result = run('masks', '--json', f'--out={tmp_path}', *small)
  assert result.returncode == 0, result.stderr
  assert result.stdout == (tmp_path / 'masks.json').read_text()
  assert json.loads(result.stdout)['records'][0]['size'] == 1000


def run(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'rocl_jax.benchmark', *arguments],
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': os.getcwd()},
  )


def test_programs_are_kept_in_the_users_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  before = jax.config.values['jax_compilation_cache_dir']
  compiled.keep_programs()  # one that was chosen before stays
  assert jax.config.values['jax_compilation_cache_dir'] == before
  assert not list(tmp_path.iterdir())
  jax.config.update('jax_compilation_cache_dir', None)
  try:
    compiled.keep_programs()
    chosen = jax.config.values['jax_compilation_cache_dir']
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
  assert chosen.startswith(str(tmp_path / 'rocl_jax' / 'xla-'))


@pytest.fixture
def torch():
  torch = pytest.importorskip('torch', '2.6', reason='needs the extra [peers]')
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # others' tests run beside
  yield torch
  torch.set_num_threads(threads)


def problem(device, dtype='float32'):
  from rocl_jax.benchmark import peers

  settings = dataclasses.replace(MODEL, dtype=dtype)
  network = models.build(settings, 10)
  random = np.random.default_rng(0)
  draw = lambda: random.random((4, 8, 8, 3), np.float32)
  return peers.Problem(
    device=device,
    settings=settings,
    num_classes=10,
    variables=jax.device_get(network.init(jax.random.key(0), (8, 8, 3))),
    images=draw(),
    second=draw(),
    labels=random.integers(0, 10, 4),
    eps=8 / 255,
    step_size=2 / 255,
    steps=2,
    temperature=0.5,
    beta=6.0,
  )


def test_pytorch_network_is_the_same_network(torch):
  from rocl_jax.benchmark import torch_networks

  network = models.build(MODEL, 10)
  variables = network.init(jax.random.key(0), (16, 16, 3))
  images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
  _, moments = network.train(variables, images)
  variables['batch_stats'] = moments
  net = torch_networks.network(MODEL, 10, jax.device_get(variables))
  theirs = torch_networks.images_of(np.asarray(images), channels_last=True)
  theirs.requires_grad_(True)
  logits = net(theirs)
  np.testing.assert_allclose(
    logits.detach(), network.predict(variables, images), atol=1e-4
  )
  labels = jnp.arange(4)
  loss = lambda x: losses.cross_entropy(
    network.predict(variables, x), labels
  ).sum()
  torch.nn.functional.cross_entropy(
    logits, torch.arange(4), reduction='sum'
  ).backward()
  np.testing.assert_allclose(
    theirs.grad.permute(0, 2, 3, 1), jax.grad(loss)(images), atol=1e-4
  )


def test_peers_put_everything_on_their_device(torch):
  """On `meta`, which has no data, a tensor left elsewhere is an error."""
  from rocl_jax.benchmark import peers

  makers = [peers.lean, peers.hydra_loop, peers.rocl_loop, peers.rocl_step]
  makers += [peers.trades_step, peers.lean_trades_step]
  makers += [lambda p: peers.lean(p, folded=True)]
  makers += [lambda p: peers.plain_step(p, channels_last=True)]
  there = problem('meta')
  for make in makers:
    result = make(there)()
    assert result is None or result.device.type == 'meta'
  peers.mask_by_sort(np.arange(5.0), 0.4, 'meta').run()


def test_rivals_do_the_same_in_every_mode(torch):
  from rocl_jax.benchmark import peers

  here = problem('cpu')
  with torch.compiler.set_stance('force_eager'):
    rivals = peers.rivals(here)
    for peer in rivals.values():
      peer.job.run()
  assert {p.against for p in rivals.values()} == {
    programs.PGD,
    programs.TRADES,
    programs.PLAIN,
  }
  assert len(rivals) == 8


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_folded_networks_are_the_same_network(torch, dtype):
  from rocl_jax.benchmark import torch_networks

  given = problem('cpu', dtype)
  net = torch_networks.network(
    given.settings, given.num_classes, given.variables
  )
  images = torch_networks.images_of(given.images, channels_last=True)
  folded = torch_networks.fold(net)
  close = 1e-5 if dtype == 'float32' else 2e-2
  torch.testing.assert_close(folded(images), net(images), atol=close, rtol=0)
  kernel = folded.stem.conv.weight
  assert str(kernel.dtype) == f'torch.{dtype}' and not kernel.requires_grad
  assert folded(images).dtype == net(images).dtype == torch.float32
  with torch.no_grad():
    for weight in (*net.parameters(), *net.buffers()):
      if weight.is_floating_point():
        weight.mul_(1.1).add_(0.01)
  torch_networks.refold(folded, net)
  assert folded.stem.conv.weight is kernel  # what a graph has recorded
  torch.testing.assert_close(folded(images), net(images), atol=close, rtol=0)


def test_pytorch_is_as_precise_and_on_the_same_device(torch, monkeypatch):
  from rocl_jax.benchmark import torch_networks

  found = torch.backends.cudnn, torch.backends.cuda.matmul
  for dtype, allowed in (('tf32', True), ('float32', False)):
    assert str(allowed) in torch_networks.set_precision(dtype)
    assert [place.allow_tf32 for place in found] == [allowed, allowed]
  assert torch_networks.device() == 'cpu'
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
  with pytest.raises(UserError, match='on the same device: install a PyTorch'):
    torch_networks.device()
  monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
  assert torch_networks.device() == 'cuda'
