"""What is counted in compiled programs, and the commands that measure."""

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


def test_jobs_take_turns_and_warm_up_apart():
  calls = []
  jobs = {name: lambda name=name: calls.append(name) for name in 'ab'}
  seconds = timing.interleave(jobs, 3, lambda _: None)
  assert calls == list('ab') * 4
  assert {name: len(s) for name, s in seconds.items()} == {'a': 3, 'b': 3}
  ratio = timing.ratio([4.0, 6.0, 5.0], [2.0, 2.0, 1.0])
  assert (ratio.median, ratio.minimum) == (2.5, 4.0)
  assert ratio.quartiles == (2.5, 4.0)


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
    result = subprocess.run(
      [sys.executable, '-m', 'rocl_jax.benchmark', *arguments],
      capture_output=True,
      text=True,
      env=os.environ | {'PYTHONPATH': os.getcwd()},
    )
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and 'Traceback' not in result.stderr


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


def test_pytorch_network_is_the_same_network():
  pytest.importorskip('torch', reason='needs the extra [peers]')
  import torch

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
