"""Evaluations of saved models: suites, interruptions, transfer, corruptions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh
from PIL import Image

from configs import eval as eval_configs
from configs import quickstart
from rocl_jax import (
  audit,
  checkpoint,
  evaluation,
  journal,
  models,
  provenance,
  results,
)
from rocl_jax.attacks.ensemble import begin
from rocl_jax.attacks.robustness import Outcome, build
from rocl_jax.attacks.square import square
from rocl_jax.data import digits
from rocl_jax.data.records import CIFAR10_CLASSES
from rocl_jax.errors import UserError
from rocl_jax.evaluate import evaluate
from rocl_jax.files import read_json, write_json
from rocl_jax.report import write as write_report
from rocl_jax.trees import flatten, unflatten

SETTINGS = models.Settings(name='resnet8', width=4, dtype='float32')
MODEL = models.build(SETTINGS, 10)


def random_model(seed, shape=(8, 8, 3), spread=30.0, classes=10):
  """A network whose classes vary from image to image."""
  model = models.build(SETTINGS, classes)
  variables = model.init(jax.random.key(seed), shape)
  images = jax.random.uniform(jax.random.key(seed), (64, *shape))
  _, moments = model.train(variables, images)
  variables['batch_stats'] = moments
  head = variables['params']['head']
  head['kernel'] = head['kernel'] * spread
  features = model.predict(variables, images, 'features').mean(0)
  head['bias'] = -features @ head['kernel']
  return jax.device_get(variables)


def save(folder, variables, **changes):
  """A model folder as a stage of a run leaves it."""
  config = quickstart.get_config()
  config.model.update(vars(SETTINGS))
  config = config.copy_and_resolve_references().to_dict()
  about = {
    'run': 'ours',
    'stage': 'finetune',
    'selection': 'last',
    'epoch': 1,
    'dataset': 'digits',
    'class_names': list(digits.read('').class_names),
    'image_shape': [8, 8, 3],
    'config': config,
    'versions': {},
  }
  about |= changes | results.identity(variables)
  checkpoint.save_model(epath.Path(folder), variables, about)
  return str(folder)


@pytest.fixture
def folder(tmp_path):
  return save(tmp_path / 'run' / '4_finetune' / 'model', random_model(0))


def config_of(suite, **changes):
  c = eval_configs.get_config(suite)
  c.eval.eps = '0.01'
  c.eval.examples = 60
  c.eval.batch_size = 16
  c.audit.examples = 0
  for name in ('apgd-ce', 'apgd-t', 'fab-t'):
    c.eval.attacks[name].steps = 5
  for name in ('apgd-t', 'fab-t'):
    c.eval.attacks[name].targets = 3
  c.eval.attacks['square'].queries = 20
  c.eval.attacks.pgd50.update(steps=5, restarts=3)
  for path, value in changes.items():
    node, _, leaf = path.rpartition('__')
    target = c
    for part in node.split('__') if node else ():
      target = target[part]
    target[leaf] = value
  return c


def clockless(records):
  return [{k: v for k, v in r.items() if k != 'versions'} for r in records]


def test_the_standard_suite(folder, tmp_path, monkeypatch):
  found = evaluate(config_of('standard'), [folder])
  by_name = {r['attack']: r for r in found.records}
  assert list(by_name) == ['clean', 'pgd10', 'pgd20', 'pgd50', 'autoattack']
  auto = by_name['autoattack']
  assert [m['attack'] for m in auto['members']] == [
    *('apgd-ce', 'apgd-t', 'fab-t', 'square')
  ]
  after = [m['robust_top1'] for m in auto['members']]
  assert (
    after == sorted(after, reverse=True) and after[-1] == (auto['robust_top1'])
  )
  assert 0 < auto['robust_top1'] < auto['clean_top1']
  for record in found.records:
    assert record['n'] == sum(record['per_class']['n']) == 60
    confusion = np.array(record['confusion'])
    np.testing.assert_array_equal(confusion.sum(1), record['per_class']['n'])
    hits = 100 * np.trace(confusion) / 60
    assert record['robust_top1'] == pytest.approx(hits, abs=1e-3)
    eps = 0.01 if record['attack'] != 'clean' else 0
    assert record['largest_distance'] <= eps + 1e-6
  # The whole protocol stands beside each number.
  protocol = {'eps', 'norm', 'seed', 'n', 'dtype', 'matmul_precision'}
  protocol |= {'selection', 'sparsity', 'versions', 'fingerprint', 'split'}
  assert all(protocol <= r.keys() for r in found.records)
  assert not [c for c in found.checks['ours/finetune'] if not c.passed]
  monkeypatch.setattr(results, '_attack', None)  # nothing is done again
  assert evaluate(config_of('standard'), [folder]).records == found.records
  again = evaluate(config_of('standard'), [folder])
  assert clockless(again.records) == clockless(found.records)
  write_report(str(tmp_path / 'run'))
  text = (tmp_path / 'run' / 'report.md').read_text()
  assert 'apgd-t' in text and 'confusion.png' in text


@pytest.mark.parametrize('norm, eps', [('linf', '0.01'), ('l2', '0.1')])
def test_a_single_attack_is_a_suite_in_both_norms(folder, norm, eps):
  for name in ('apgd-ce', 'fab-t', 'square'):
    config = config_of(name, eval__norm=norm, eval__eps=eps)
    (record,) = evaluate(config, [folder]).records
    assert record['attack'] == name and record['norm'] == norm
    assert record['robust_top1'] <= record['clean_top1']


def test_a_killed_evaluation_ends_with_the_same_numbers(tmp_path, monkeypatch):
  straight = save(tmp_path / 'a' / 'model', random_model(0))
  wanted = evaluate(config_of('autoattack'), [straight]).records
  monkeypatch.setattr(journal, '_SECONDS', 0.0)
  write = journal.Journal.write
  writes, kills = 0, [1, 2, 4, 7]

  def interrupted(self, fates, now):
    nonlocal writes
    write(self, fates, now)
    writes += 1
    if kills and writes == kills[0]:
      kills.pop(0)
      raise KeyboardInterrupt

  monkeypatch.setattr(journal.Journal, 'write', interrupted)
  folder = save(tmp_path / 'b' / 'model', random_model(0))
  tries = 0
  while True:
    tries += 1
    try:
      found = evaluate(config_of('autoattack'), [folder]).records
      break
    except KeyboardInterrupt:
      assert list((tmp_path / 'b').glob('evaluation-autoattack-*.npz'))
  assert tries == 5 and not kills
  assert clockless(found) == clockless(wanted)
  assert found[0]['earlier_versions'] == []
  assert not list((tmp_path / 'b').glob('evaluation-*'))
  # A damaged state is told of, and costs no more than a new start.
  book = journal.Journal(epath.Path(tmp_path / 'b/results.json'), wanted[0])
  book._path.write_bytes(b'PK\x03\x04 cut short')
  assert book.read() is None


def test_other_versions_of_a_resumed_evaluation_are_recorded(
  tmp_path, monkeypatch, capfd
):
  write, here = journal.Journal.write, provenance.versions
  monkeypatch.setattr(journal, '_SECONDS', 0.0)

  def on(device):
    monkeypatch.setattr(
      provenance, 'versions', lambda: here() | {'device': device}
    )

  def stopped(self, fates, now):
    write(self, fates, now)
    raise KeyboardInterrupt

  folder = save(tmp_path / 'model', random_model(0))
  on('a')
  with monkeypatch.context() as patch:
    patch.setattr(journal.Journal, 'write', stopped)
    with pytest.raises(KeyboardInterrupt):
      evaluate(config_of('square'), [folder])
  assert 'versions.device' not in capfd.readouterr().err
  on('b')
  (record,) = evaluate(config_of('square'), [folder]).records
  assert capfd.readouterr().err.count("versions.device was 'a', is 'b'") == 1
  assert [v['device'] for v in record['earlier_versions']] == ['a']
  assert record['versions']['device'] == 'b'
  # Any number of times, and there and back.
  for device in 'aabba':
    on(device)
    book = journal.Journal(epath.Path(tmp_path) / 'x', {'attack': 'square'})
    book.read()
    book.write(begin(*np.ones((3, 4))))
  assert [v['device'] for v in book.earlier] == ['a', 'b']


def test_devices_and_batches_do_not_decide_an_images_fate():
  variables = random_model(0)
  test = digits.read('').test
  images, labels = test.images[:30], test.labels[:30]
  forwards = evaluation.logits_functions(MODEL)
  outcomes = []
  for devices, size in ((1, 30), (4, 12), (2, 64)):
    mesh = Mesh(np.array(jax.devices()[:devices]), ('data',))
    members = [('square', square(eps=0.02, queries=10))]
    measure = build(members, forwards, mesh, size)
    seen = evaluation.visible(variables)
    outcomes.append(measure(seen, images, labels, 0)[0])
  for other in outcomes[1:]:
    for field in ('clean_top1', 'robust_top1', 'adversarial_prediction'):
      np.testing.assert_array_equal(
        getattr(other, field), getattr(outcomes[0], field)
      )


def test_a_model_that_proves_nothing_fails_the_audit(tmp_path, monkeypatch):
  """One class for all: nothing moves it, and no attack can."""
  variables = random_model(0)
  head = variables['params']['head']
  head['kernel'], head['bias'] = 0 * head['kernel'], jnp.arange(10.0)
  folder = save(tmp_path / 'model', jax.device_get(variables))
  found = evaluate(config_of('quick', audit__examples=20), [folder])
  bad = [c.check for c in found.checks['ours/finetune'] if not c.passed]
  assert 'no gradient of the margin vanishes' in bad
  assert 'an unbounded attack breaks every image' in bad
  (entry,) = json.loads((tmp_path / 'audit.json').read_text())
  assert entry['n'] == 20 and not all(c['passed'] for c in entry['checks'])
  # It is not done again, and no later evaluation with fewer images hides it.
  monkeypatch.setattr(audit, 'audit', None)
  for fewer in (20, 10, 0):
    again = evaluate(config_of('quick', audit__examples=fewer), [folder])
    assert again.checks == found.checks
    assert json.loads((tmp_path / 'audit.json').read_text()) == [entry]


def test_a_model_without_answers_fails_the_audit(tmp_path):
  """Weights that overflow: NaN is neither the label nor another class."""
  variables = random_model(0)
  head = variables['params']['head']
  head['kernel'] = np.full_like(head['kernel'], 3e38)
  folder = save(tmp_path / 'model', variables)
  config = config_of('quick', audit__examples=20)
  found = evaluate(config, [folder])
  (record,) = found.records
  assert record['clean_invalid'] == record['invalid'] == record['n'] == 60
  assert record['clean_top1'] == record['robust_top1'] == 0
  assert record['robust_top5'] == 0 and not np.any(record['confusion'])
  bad = {
    c.check: c.found for c in found.checks['ours/finetune'] if not c.passed
  }
  for which in ('clean', 'attacked'):
    name = f'no {which} image has invalid logits'
    assert bad[name].startswith('20 of 20 images have NaN')
    assert bad[f'pgd10 on test: {name}'] == '60 of 60 images'


def three_classes(folder):
  """Images of three classes, as the source `folder` wants them."""
  random = np.random.default_rng(0)
  for part in ('train', 'test'):
    for name in 'abc':
      place = folder / part / name
      place.mkdir(parents=True)
      for i in range(4):
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(place / f'{i}.png')
  return {'data__source': 'folder', 'data__dir': str(folder)}


def test_records_of_other_weights_stay(tmp_path):
  """Two networks of one name and stage, of three classes, side by side; then
  another in the place of the first."""
  where = three_classes(tmp_path / 'images')
  about = {'class_names': [*'abc'], 'run': 'published'}
  models_of = lambda seed: random_model(seed, classes=3)
  config = config_of('autoattack', **where)
  for name in ('apgd-ce', 'apgd-t', 'fab-t'):
    config.eval.attacks[name].steps = 2
    if name != 'apgd-ce':
      config.eval.attacks[name].targets = 9
  config.eval.attacks.square.queries = 2
  for seed in range(2):
    folder = save(tmp_path / 'w' / f'm{seed}', models_of(seed), **about)
    (record,) = evaluate(config, [folder]).records
    targets = [m['targets'] for m in record['members'] if 'fab' in m['attack']]
    assert targets == [2]
  path = epath.Path(tmp_path / 'w' / 'results.json')
  prints = lambda: {r['folder']: r['fingerprint'] for r in results.read(path)}
  before = prints()
  assert set(before) == {'m0', 'm1'} and len(set(before.values())) == 2
  epath.Path(folder).rename(tmp_path / 'away')
  evaluate(config, [save(tmp_path / 'w' / 'm1', models_of(2), **about)])
  after = prints()
  assert after['m0'] == before['m0'] and after['m1'] != before['m1']
  assert len(results.read(path)) == 2


@pytest.mark.parametrize('classes, most', [(10, 10_000), (1500, 250_000)])
def test_records_grow_with_the_number_of_classes(tmp_path, classes, most):
  random = np.random.default_rng(0)
  n = 10_000
  labels, clean, taken = random.integers(0, classes, (3, n))
  outcome = Outcome(
    *(clean == labels, clean == labels, taken == labels, taken == labels),
    *(clean, taken, *[np.zeros(n)] * 4, np.zeros(0), n),
  )
  names = [f'class {i}' for i in range(classes)]
  record = results.by_class(outcome, labels, names)
  assert sum(record['per_class']['robust_predicted']) == n
  rest = quickstart.get_config().copy_and_resolve_references().to_dict()
  path = epath.Path(tmp_path / 'results.json')
  write_json(path, [record | {'config': rest}])
  assert path.stat().length < most
  assert read_json(path, list)[0]['per_class'] == record['per_class']
  if classes > 20:
    label, other, count = record['confused'][0]
    assert count == ((labels == label) & (taken == other)).sum() > 1


def test_transfer_and_the_published_artefact(tmp_path):
  """Images made on one network, scored on another with and without masks."""
  target = tmp_path / 'w' / '4_finetune'
  variables = random_model(0)
  dense = flatten(variables['params'])
  masks = {
    p: np.random.default_rng(0).random(x.shape) < 0.9
    for p, x in dense.items()
    if p.endswith('kernel') and not p.startswith('projector')
  }
  kept = dense | {p: dense[p] * m for p, m in masks.items()}
  pruned = variables | {'params': unflatten(kept), 'masks': masks}
  folders = [
    save(target / 'model', pruned),
    save(tmp_path / 'o' / '1_supervised' / 'model', random_model(1), run='nat'),
  ]
  trainable = {p: x for p, x in dense.items() if not p.startswith('projector')}
  with checkpoint.States(epath.Path(target / 'checkpoints')) as states:
    state = {
      'trained': {
        'trainable': trainable,
        'frozen': {},
        'batch_stats': variables['batch_stats'],
      }
    }
    states.save(3, state, [])
  config = config_of('matrix')
  found = evaluate(config, folders).transfers
  cells = {(r['source_name'], r['target_name']): r for r in found}
  names = ('ours/finetune', 'nat/finetune')
  assert set(cells) == {(s, t) for s in names for t in names}
  for (source, name), record in cells.items():
    assert record['white_box'] == (source == name) and record['masked']
    own = cells[name, name]
    assert own['robust_top1'] <= record['robust_top1']
    assert own['clean_top1'] == record['clean_top1']

  config = config_of('transfer', transfer__surrogates=(folders[1],))
  config.transfer.unmasked = True
  found = evaluate(config, folders[:1]).transfers
  masked = [r for r in found if r['masked']]
  bare = [r for r in found if not r['masked']]
  assert len(masked) == len(bare) == 4  # two attacks, own and surrogate
  # Without masks it is the network before pruning.
  logits = MODEL.predict(variables, digits.read('').test.images[:60] / 255)
  right = (logits.argmax(-1) == digits.read('').test.labels[:60]).mean()
  assert {r['clean_top1'] for r in bare} == {round(100 * float(right), 4)}
  assert not any(r['white_box'] for r in bare)
  text = write_report(str(tmp_path / 'w'))
  assert 'artefact' in epath.Path(text).read_text()
  with pytest.raises(UserError, match='has no masks to leave out'):
    config.transfer.surrogates = ()
    config.transfer.matrix = True
    evaluate(config, folders[1:])


def test_common_corruptions(tmp_path):
  rng = np.random.default_rng(0)
  source = tmp_path / 'CIFAR-10-C'
  source.mkdir()
  labels = rng.integers(0, 10, 6)
  np.save(source / 'labels.npy', np.tile(labels, 5))
  for name in ('fog', 'snow'):
    images = rng.integers(0, 256, (30, 32, 32, 3), np.uint8)
    np.save(source / f'{name}.npy', images)
  folder = save(
    tmp_path / 'run' / '2_supervised' / 'model',
    random_model(2, (32, 32, 3)),
    class_names=list(CIFAR10_CLASSES),
    image_shape=[32, 32, 3],
    dataset='cifar10',
    stage='supervised',
  )
  config = config_of('corruptions', data__dir=str(source))
  found = evaluate(config, [folder]).records
  assert len(found) == 10
  assert {(r['corruption'], r['severity']) for r in found} == {
    (c, s) for c in ('fog', 'snow') for s in range(1, 6)
  }
  assert all(r['attack'] == 'clean' and r['n'] == 6 for r in found)
  path = write_report(str(tmp_path / 'run'))
  assert 'snow' in epath.Path(path).read_text()


@pytest.mark.parametrize(
  'suite, changes, message',
  [
    ('quick', {'eval__suite': ('fab',)}, "did you mean 'fab-t'"),
    ('fab-t', {'eval__norm': 'linff'}, "did you mean 'linf'"),
    ('apgd-ce', {'eval__eps': '8'}, 'did you mean 8/255'),
    ('apgd-ce', {'eval__attacks__apgd-ce__loss': 'cee'}, "did you mean 'ce'"),
    ('square', {'eval__attacks__square__queries': 0}, 'queries: found 0'),
    (
      'autoattack',
      {'eval__attacks__square__eps': '0.2'},
      'wanted attacks of one norm and one eps',
    ),
    ('quick', {'audit__examples': 300}, 'config.audit.examples: found 300'),
    ('transfer', {}, 'config.transfer.surrogates: /'),
    ('quick', {'data__source': 'cifar10'}, 'config.data.source: found'),
    ('quick', {'transfer__unmasked': True}, 'config.transfer.unmasked: found'),
    ('quick', {'eval__attacks__pgd10__steps': 3 * 10**9}, 'steps: found'),
  ],
)
def test_a_mistake_is_named(folder, suite, changes, message):
  with pytest.raises(UserError, match='config') as error:
    evaluate(config_of(suite, **changes), [folder])
  assert message in str(error.value) and '\n' not in str(error.value)


def test_networks_of_other_images_are_refused(folder, tmp_path):
  other = save(
    tmp_path / 'x' / 'model', random_model(2, (32, 32, 3)),
    image_shape=[32, 32, 3],
  )  # fmt: skip
  with pytest.raises(UserError, match='image_shape'):
    evaluate(config_of('quick'), [folder, other])


def test_other_images_or_another_protocol_are_measured_anew(folder, tmp_path):
  """Neither a record nor a transfer is taken for what was not measured so."""
  first = evaluate(config_of('quick'), [folder]).records
  images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
  for number, name in enumerate(digits.read('').class_names):
    for part in ('train', 'test'):
      place = tmp_path / 'noise' / part / name
      place.mkdir(parents=True)
      for i in range(2):
        image = Image.fromarray(images[2 * number + i])
        image.save(place / f'{i}.png')
  noise = config_of(
    'quick', data__source='folder', data__dir=str(tmp_path / 'noise')
  )
  (other,) = evaluate(noise, [folder]).records
  assert other['images_crc32'] != first[0]['images_crc32']
  config = config_of('quick', transfer__surrogates=(folder,))
  one = evaluate(config, [folder]).transfers
  assert [r['white_box'] for r in one] == [True]  # it is its own surrogate
  config.eval.attacks.pgd10.steps = 1
  (weaker,) = evaluate(config, [folder]).transfers
  assert weaker['steps'] == 1 and weaker['robust_top1'] >= one[0]['robust_top1']
  (record,) = evaluate(config, [folder]).records
  assert record['robust_top1'] == weaker['robust_top1']
  noise.data.dir = str(tmp_path / 'large')
  (tmp_path / 'noise').rename(tmp_path / 'large')
  for path in (tmp_path / 'large').rglob('*.png'):
    Image.fromarray(images[0]).resize((16, 16)).save(path)
  with pytest.raises(UserError, match='the model is for'):
    evaluate(noise, [folder])
