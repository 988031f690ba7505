"""One run on 1, 2, 4 or 8 devices and in 2 processes: what must not differ.

Chance is a function of seed and step, so indices and draws are equal to the
bit. Sums over a batch round differently: in float64 the first gradients agree
to 1e-10, in float32 flips of ReLUs and of signs drive runs apart, which
`python -m rocl_jax.benchmark drift` measures.
"""

import collections
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_processes import free_port
from test_stages import FRESH, MODEL, TRAIN, mesh_of, settings_of, upstream_of

from rocl_jax import hlo, loop, losses, models, optim
from rocl_jax.attacks import pgd
from rocl_jax.benchmark import programs
from rocl_jax.errors import UserError
from rocl_jax.stages import STAGES
from rocl_jax.trees import flatten
from rocl_jax.types import TrainingSet

ROOT = pathlib.Path(__file__).parent.parent


def run(path, *arguments, **environment):
  """Starts tests/topology.py; a full pipe would hold up one of two."""
  with path.open('w') as output:
    return subprocess.Popen(
      [sys.executable, 'tests/topology.py', *arguments],
      cwd=ROOT,
      env=os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT}/tests'} | environment,
      stdout=output,
    )


def results(path, process):
  assert process.wait(timeout=600) == 0
  lines = path.read_text().splitlines()  # Gloo's among them
  return [json.loads(line) for line in lines if line.startswith('{')]


@pytest.mark.slow  # a story of minutes
def test_chance_is_the_same_everywhere(tmp_path):
  address = f'127.0.0.1:{free_port()}'
  jobs = [('1,8', 'draws')]
  jobs += [('2,4', 'draws', address, '2', str(i)) for i in range(2)]
  paths = [tmp_path / str(i) for i in range(len(jobs))]
  started = [run(path, *job) for path, job in zip(paths, jobs, strict=True)]
  rows = sum(map(results, paths, started), [])
  assert len(rows) == 6
  for row in rows:
    assert row['draws'] == rows[0]['draws']
    np.testing.assert_allclose(row['images'], rows[0]['images'], atol=1e-6)


def check_first_steps(path, devices, names):
  rows = results(path, run(path, devices, names, JAX_ENABLE_X64='1'))
  count = len(devices.split(','))
  assert len(rows) == count * len(names.split(','))
  first = {row['name']: row for row in rows[: len(rows) // count]}
  for row in rows:
    one = first[row['name']]
    assert one['loss'] == pytest.approx(row['loss'], rel=1e-10)
    wanted, found = np.array(one['update']), np.array(row['update'])
    size = np.linalg.norm(wanted)
    assert size > 0 and np.linalg.norm(found - wanted) < 1e-10 * size


def test_first_gradients_agree(tmp_path):
  check_first_steps(tmp_path / 'steps', '1,4', 'pretrain')


@pytest.mark.slow
def test_first_gradients_agree_on_all_numbers_of_devices(tmp_path):
  check_first_steps(tmp_path / 'steps', '1,2,4,8', ','.join(STAGES))


def in_loops(program):
  """{(kind, dimensions): how many} of the collectives in loops."""
  found = collections.Counter()
  for run in hlo.executed(program):
    kind = run.instruction.opcode.removesuffix('-start')
    if kind in hlo.COLLECTIVES and run.times > 1:
      assert run.times == STEPS
      found[kind, *(shape.dims for shape in run.instruction.shapes)] += 1
  return found


STEPS, BATCH = 7, 16
CELL = programs.Cell(
  models.Settings(name='resnet8', width=4, dtype='float32'), BATCH, STEPS, 8, 4
)


def test_no_collective_in_the_loop_of_pgd():
  bench = programs.bench(CELL, jax.devices()[:4])
  attack = programs.pgd_attack(bench, 8 / 255)
  assert not hlo.collectives(attack.program)


@pytest.mark.parametrize(
  'local, wanted',
  [
    (0, {('all-gather', (128, BATCH)): 1}),
    pytest.param(4, {}, marks=pytest.mark.slow),
  ],
)
def test_the_loop_of_the_instance_wise_attack_gathers_embeddings(local, wanted):
  """Embeddings of the batch, once a step; none with negatives of their own."""
  bench = programs.bench(CELL, jax.devices()[:4])
  settings = programs.with_cell(settings_of('pretrain'), CELL)
  settings = dataclasses.replace(settings, local_negatives=local)
  step = programs.training_step(bench, 'pretrain', settings)
  found = in_loops(step.program)
  turned = {(kind, dims[::-1]): n for (kind, dims), n in found.items()}
  assert wanted in (found, turned)


def test_local_negatives_are_those_of_the_part():
  keys = jax.random.split(jax.random.key(0), 3)
  views = [jax.random.normal(key, (12, 8)) for key in keys]
  found = losses.apart(losses.nt_xent, 3)(views, 0.5)
  wanted = [
    losses.nt_xent([view[i : i + 4] for view in views], 0.5) for i in (0, 4, 8)
  ]
  np.testing.assert_allclose(found, np.concatenate(wanted), rtol=1e-6)
  assert abs(found - losses.nt_xent(views, 0.5)).min() > 0.1


def gradient_of(name, rows, microbatch=0):
  """The update of a step, which is the gradient times the rate."""
  settings = settings_of(name, loss='natural', flip=False, crop_padding=0)
  optimizer = optim.make(
    optim.Settings(learning_rate=1.0, momentum=0.0, schedule='constant'), 1, 1
  )[0]
  stage = STAGES[name].stage(MODEL, settings)
  step = loop.make_step(stage, optimizer, mesh_of(2), microbatch)
  arguments = (TrainingSet.of(*TRAIN), jnp.array([rows]), jax.random.key(0))
  first = loop.first_state(stage, optimizer, step, arguments)
  state = jax.jit(first)(upstream_of(name), jax.random.key(1))
  after, seen = jax.jit(step)(state, *arguments)
  parts = (state.trained.trainable, after.trained.trainable)
  before, trained = map(flatten, parts)
  update = {path: trained[path] - before[path] for path in before}
  return update, flatten(after.trained.batch_stats), float(seen.loss)


@pytest.mark.parametrize(
  'name', [pytest.param('supervised', marks=pytest.mark.slow), 'prune']
)
def test_microbatches_are_averaged(name):
  rows = list(range(8))
  halves = [gradient_of(name, part) for part in (rows[:4], rows[4:])]
  found = gradient_of(name, rows, microbatch=4)
  wanted = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
  for have, want in zip(found[:2], wanted[:2], strict=True):
    assert have.keys() == want.keys()
    for path in want:
      np.testing.assert_allclose(have[path], want[path], rtol=1e-4, atol=1e-6)
  assert found[2] == pytest.approx(wanted[2], rel=1e-5)
  whole = gradient_of(name, rows)
  same = gradient_of(name, rows, microbatch=8)
  jax.tree.map(np.testing.assert_array_equal, same, whole)


@pytest.mark.parametrize(
  'name, changes, told',
  [
    ('pretrain', {'microbatch': 4}, 'pretrain.microbatch: found 4, wanted 0'),
    ('supervised', {'microbatch': 3}, 'microbatch: found 3, wanted a divisor'),
    ('pretrain', {'local_negatives': 3}, 'found 3, wanted a divisor of'),
    ('pretrain', {'local_negatives': -1}, 'found -1, wanted 0 or more'),
  ],
)
def test_parts_that_can_not_be(name, changes, told):
  with pytest.raises(UserError, match=told):
    settings_of(name, **changes)


def test_rematerialised_gradients_are_the_same_and_smaller():
  """Less is kept for the gradient: of a block what goes in, and no more."""
  settings = models.Settings(name='resnet8', width=4, dtype='float32')
  images = jax.random.uniform(jax.random.key(1), (32, 16, 16, 3))
  found, kept = [], []
  for remat in (False, True):
    model = models.build(dataclasses.replace(settings, remat=remat), 4)

    def loss(params, model=model):
      variables = {**FRESH, 'params': params}
      frozen = model.prepare(variables)
      x = pgd(
        lambda x: losses.margin(frozen(x), jnp.zeros(32, int)),
        images,
        jax.random.key(2),
        eps=0.03,
        step_size=0.01,
        steps=2,
      )
      return model.train(variables, x)[0].sum()

    found.append(jax.jit(jax.grad(loss))(FRESH['params']))
    _, pullback = jax.vjp(
      lambda params, model=model: model.train(
        {**FRESH, 'params': params}, images
      )[0],
      FRESH['params'],
    )
    kept.append(sum(x.nbytes for x in jax.tree.leaves(pullback)))
  for path, wanted in flatten(found[0]).items():
    np.testing.assert_allclose(
      flatten(found[1])[path], wanted, rtol=1e-3, atol=1e-5
    )
  assert kept[1] < 0.5 * kept[0]
