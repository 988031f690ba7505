"""What every stage promises, over the registry, on a very small network."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh

from configs import cifar10
from rocl_jax import (
  augment,
  checkpoint,
  loop,
  losses,
  masks,
  metrics,
  models,
  optim,
)
from rocl_jax.data import Split
from rocl_jax.errors import RunFailed
from rocl_jax.settings import parse
from rocl_jax.stages import STAGES
from rocl_jax.trees import flatten
from rocl_jax.types import Batch, Skips, TrainingSet

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 4, 36).astype(np.int32)
TRAIN = Split(  # the label shows in the brightness
  (
    RANDOM.integers(0, 60, (36, 8, 8, 3)) + 60 * LABELS[:, None, None, None]
  ).astype(np.uint8),
  LABELS,
)
MODEL = models.build(
  models.Settings(name='resnet8', width=4, dtype='float32'), num_classes=4
)
FRESH = MODEL.init(jax.random.key(0), (8, 8, 3))


def settings_of(name, **changes):
  """The stage's section of the paper's config, made short.

  A stage that has none there takes the supervised one's, as far as it fits.
  """
  config = cifar10.get_config().copy_and_resolve_references().to_dict()
  target = STAGES[name].Settings
  known = inspect.signature(target).parameters
  section = config.get(name, config['supervised'])
  section = {k: v for k, v in section.items() if k in known}
  section |= {'total_epochs': 3, 'batch_size': 8, 'eval_epochs': 1} | changes
  if 'attack' in section:
    section['attack'] |= {'steps': 2}
  return parse(target, section, name)


def upstream_of(name):
  """A pruned network for fine-tuning, a fresh one for all others."""
  if name != 'finetune':
    return FRESH
  pruning = STAGES['prune'].stage(MODEL, settings_of('prune'))
  return pruning.finish(pruning.start(FRESH, jax.random.key(0)))


def mesh_of(devices):
  return Mesh(np.array(jax.devices()[:devices]), ('data',))


def stage_run(name, directory, devices=1, measure=None, **changes):
  settings = settings_of(name, **changes)
  return loop.StageRun(
    name=name,
    label=name,
    stage=STAGES[name].stage(MODEL, settings),
    settings=settings,
    upstream=upstream_of(name),
    train=TRAIN,
    seed=3,
    mesh=mesh_of(devices),
    directory=epath.Path(directory),
    measure=measure,
    about={
      **{'run': 'test', 'stage': name, 'config': {}, 'dataset': 'none'},
      **{'class_names': [], 'image_shape': []},
    },
    save_steps=3,
    max_skipped=3,
    tensorboard=False,
  )


def assert_equal_trees(actual, wanted):
  actual, wanted = flatten(actual), flatten(wanted)
  assert actual.keys() == wanted.keys()
  for path in wanted:
    np.testing.assert_array_equal(actual[path], wanted[path], err_msg=path)


def rows_without_clocks(directory):
  rows = metrics.read_lines(epath.Path(directory) / 'metrics.jsonl')
  clocks = ('seconds', 'images_per_second')
  return [{k: v for k, v in r.items() if k not in clocks} for r in rows]


def stem_size(variables):
  """Stands for an accuracy: some number that training changes."""
  kernel = flatten(variables['params'])['encoder/stem/kernel']
  return {'validation_robust_top1': float(jnp.abs(kernel).sum())}


class Interruption(Exception):
  pass


def test_compiles_nothing_after_the_first_epoch(tmp_path, monkeypatch):
  compilations, by_step = [], {}
  listen = lambda event, seconds, **_: (
    compilations.append(event) if 'backend_compile' in event else None
  )
  jax.monitoring.register_event_duration_secs_listener(listen)
  monkeypatch.setattr(
    loop.Progress,
    'show',
    lambda self, done, note: by_step.update({done: len(compilations)}),
  )
  try:
    loop.run_stage(stage_run('linear_eval', tmp_path, total_epochs=4))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  steps = len(by_step) // 4
  assert by_step[1] > 0
  assert by_step[steps + 1] == by_step[4 * steps]


@pytest.mark.parametrize('name', STAGES)
def test_resumes_bit_exactly(name, tmp_path, monkeypatch):
  """Stopped twice within an epoch, on the way to the next save, and run on."""
  runs = {
    folder: stage_run(name, tmp_path / folder, measure=stem_size)
    for folder in ('straight', 'stopped')
  }
  check_resumed(runs['straight'], runs['stopped'], monkeypatch)


def check_resumed(straight, stopped, monkeypatch):
  wanted = loop.run_stage(straight)
  for stop in (5, 8):

    def show(self, done, note, stop=stop):
      if done == stop:
        raise Interruption

    with monkeypatch.context() as patch:
      patch.setattr(loop.Progress, 'show', show)
      with pytest.raises(Interruption):
        loop.run_stage(stopped)
    saves = stopped.directory / 'checkpoints'
    assert max(int(p.name) for p in saves.iterdir()) == stop // 3 * 3
  actual = loop.run_stage(stopped)

  assert_equal_trees(actual, wanted)
  straight, stopped = straight.directory, stopped.directory
  assert rows_without_clocks(stopped) == rows_without_clocks(straight)
  for folder in ('model', 'best_validation'):
    one, about = checkpoint.load_model(stopped / folder)
    other, about_other = checkpoint.load_model(straight / folder)
    assert_equal_trees(one, other)
    assert about == about_other


@pytest.mark.parametrize('name', ['linear_eval', 'supervised'])
def test_streamed_is_as_if_on_the_devices(name, tmp_path, monkeypatch):
  """To the bit, on two devices, and wherever it is stopped."""
  straight, stopped = (
    stage_run(name, tmp_path / folder, 2, stem_size, loss='natural')
    for folder in ('straight', 'stopped')
  )
  stopped = dataclasses.replace(stopped, resident=False)
  check_resumed(straight, stopped, monkeypatch)


# What moves in a stage: patterns of paths in what it hands on.
MOVES = {
  'pretrain': r'params/(encoder|projector)/|batch_stats/',
  'linear_eval': r'params/head/',
  'supervised': r'params/(encoder|head)/|batch_stats/',
  'prune': r'params/encoder/.*/(scale|bias)$|batch_stats/',
  'finetune': r'params/|batch_stats/',
}


@pytest.mark.parametrize('name', STAGES)
def test_trains_what_it_says_and_nothing_else(name):
  """One step: all of it moves, and nothing else does."""
  run, before, after, _ = one_step(name, devices=1)
  start, end = (flatten(run.stage.finish(t)) for t in (before, after))
  moved = {p for p in end if np.any(np.asarray(end[p]) != start[p])}
  pattern = MOVES.get(name, '')
  if name == 'prune':  # scores too: what is kept may change, not its value
    dense = lambda v, p: v['params/' + p] + v['dropped/' + p]
    for path in before.frozen['kernels']:
      np.testing.assert_allclose(dense(start, path), dense(end, path))
    moved = {p for p in moved if not p.endswith('/kernel')}
    scores = (t.trainable['scores'] for t in (before, after))
    assert all(
      np.any(a != b) for a, b in zip(*map(dict.values, scores), strict=True)
    )
  wanted = {p for p in end if re.match(pattern, p)} if pattern else moved
  assert moved == wanted and moved


def one_step(name, devices):
  """A stage's first step: (run, Trained before, Trained after, loss)."""
  run = stage_run(name, '/nowhere', devices)
  optimizer, _ = optim.make(run.settings.optimizer, 3, 4)
  before = run.stage.start(run.upstream, jax.random.key(0))
  state = loop.TrainState(
    step=jnp.int32(0),
    trained=before,
    opt_state=optimizer.init(before.trainable),
    sums={},
    skips=Skips(jnp.zeros(4, bool), jnp.int32(0)),
  )
  step = jax.jit(loop.make_step(run.stage, optimizer, run.mesh))
  state, data = jax.device_put(
    (state, TrainingSet.of(*TRAIN)), loop.replicated(run.mesh)
  )
  order = loop.epoch_order(jax.random.key(1), 0, 36, 8)
  state, seen = step(state, data, order, jax.random.key(2))
  return run, *jax.device_get((before, state.trained, seen.loss))


def running(statistics, *batches):
  """The running averages after some batches, written out."""
  result = flatten(statistics)
  for moments in map(flatten, batches):
    result = {p: 0.9 * x + 0.1 * moments[p] for p, x in result.items()}
  return result


def test_batchnorm_sees_the_published_passes():
  """TRADES: clean, clean, adversarial, clean. RoCL: regulariser, then all."""
  key = jax.random.key(1)
  batch = Batch(jnp.asarray(TRAIN.images[:8]), jnp.asarray(TRAIN.labels[:8]))
  trades = STAGES['supervised'].stage(
    MODEL, settings_of('supervised', crop_padding=0, flip=False)
  )
  _, (statistics, _) = trades.loss(
    FRESH['params'], FRESH['batch_stats'], batch, key
  )
  settings = settings_of('supervised')
  images = augment.to_float(batch.images)
  frozen = MODEL.prepare(FRESH)
  clean = frozen(images)
  x_adv, _ = settings.attack.attack(
    lambda x: losses.kl_divergence(clean, frozen(x)),
    images,
    jax.random.split(key)[1],
  )
  first, second = (MODEL.train(FRESH, x)[1] for x in (images, x_adv))
  wanted = running(FRESH['batch_stats'], first, first, second, first)
  for path, value in flatten(statistics).items():
    np.testing.assert_allclose(value, wanted[path], rtol=2e-4, atol=1e-5)
  wrong = running(FRESH['batch_stats'], first, second, first)
  stem = 'stem/mean'
  assert abs(wrong[stem] - wanted[stem]).max() > 1e-3

  settings = settings_of('pretrain')
  _, (statistics, _) = (
    STAGES['pretrain']
    .stage(MODEL, settings)
    .loss(FRESH['params'], FRESH['batch_stats'], batch, key)
  )
  keys = jax.random.split(key, 3)
  view1, view2 = (augment.views(batch.images, k, 0.08) for k in keys[:2])
  target = frozen(view2, 'projection')
  x_adv, _ = settings.attack.attack(
    lambda x: losses.nt_xent([frozen(x, 'projection'), target], 0.5),
    view1,
    keys[2],
  )
  pair, triple = (
    MODEL.train(FRESH, jnp.concatenate(views))[1]
    for views in ([x_adv, view2], [view1, view2, x_adv])
  )
  wanted = running(FRESH['batch_stats'], pair, triple)
  for path, value in flatten(statistics).items():
    np.testing.assert_allclose(value, wanted[path], rtol=2e-3, atol=1e-4)


def test_pruning_keeps_k_a_layer_and_tuning_never_leaves_the_mask(tmp_path):
  pruned = loop.run_stage(stage_run('prune', tmp_path / 'p', keep=0.2))
  kept = masks.density(pruned['masks'])
  assert set(kept) == set(models.maskable(flatten(pruned['params'])))
  assert all(k == masks.kept_count(n, 0.2) for k, n in kept.values())

  run = dataclasses.replace(
    stage_run('finetune', tmp_path / 'f'), upstream=pruned
  )
  tuned = loop.run_stage(run)
  assert_equal_trees(tuned['masks'], pruned['masks'])
  before, after = flatten(pruned['params']), flatten(tuned['params'])
  for path, mask in pruned['masks'].items():
    assert not np.any(np.asarray(after[path])[~np.asarray(mask)])
    assert np.any(np.asarray(after[path]) != np.asarray(before[path]))
  # The dense weights, decayed but not zero, stay in the train state.
  trained = run.stage.start(pruned, jax.random.key(0))
  dense = flatten(FRESH['params'])
  for path in pruned['masks']:
    np.testing.assert_allclose(trained.trainable[path], dense[path], atol=1e-7)


def test_no_epochs_hand_on_magnitude_pruning(tmp_path):
  run = stage_run('prune', tmp_path, total_epochs=0, keep=0.5)
  pruned = loop.run_stage(run)
  for path, w in models.maskable(flatten(FRESH['params'])).items():
    if path in pruned['masks']:
      wanted = masks.topk_mask(w, 0.5).astype(bool)
      np.testing.assert_array_equal(pruned['masks'][path], wanted)


@pytest.mark.parametrize(
  'name, changes',
  [
    ('pretrain', {'loss': 'eq3', 'detach_keys': False}),
    ('supervised', {'loss': 'ce_pgd'}),
    ('supervised', {'loss': 'natural'}),
    ('linear_eval', {'loss': 'adversarial'}),
  ],
)
def test_every_loss_learns(name, changes, tmp_path):
  gentle = {'learning_rate': 0.01, 'schedule': 'constant'}
  run = stage_run(
    name, tmp_path, total_epochs=12, eval_epochs=0, optimizer=gentle, **changes
  )
  loop.run_stage(run)
  values = [row['loss'] for row in rows_without_clocks(tmp_path)]
  assert np.mean(values[-3:]) < values[0]


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
  key = jax.random.key(0)
  orders = [np.asarray(loop.epoch_order(key, e, 20, 6)) for e in (0, 1, 0)]
  assert orders[0].shape == (3, 6) and len(np.unique(orders[0])) == 18
  np.testing.assert_array_equal(orders[0], orders[2])
  assert (orders[0] != orders[1]).any()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  section = {'name': 'sgd', 'learning_rate': 1e30, 'schedule': 'constant'}
  run = stage_run('supervised', tmp_path, optimizer=section, loss='natural')
  with pytest.raises(RunFailed, match='not finite in 4 steps in a row'):
    loop.run_stage(run)


def test_the_best_epoch_is_the_first_of_equals_and_never_nan(tmp_path):
  values = iter([float('nan'), 5.0, 5.0])
  measure = lambda variables: {'validation_robust_top1': next(values)}
  loop.run_stage(stage_run('supervised', tmp_path, measure=measure))
  _, about = checkpoint.load_model(epath.Path(tmp_path) / 'best_validation')
  assert about['epoch'] == 2 and about['selection'] == 'best_validation'
