"""Configs: what they mean, and what is said of one that is wrong."""

import os
import pathlib
import re
import sys
import warnings

import pytest

from configs import cifar10, eval, quickstart, surrogate
from rocl_jax import command, files
from rocl_jax.errors import UserError
from rocl_jax.experiment import parse_experiment
from rocl_jax.settings import amount


def digits():
  config = cifar10.get_config()
  config.data.source = 'digits'
  return config


def test_amounts():
  assert amount('8/255', '') == 8 / 255
  assert amount(' 0.03 ', '') == 0.03
  assert amount('eps/4', '', {'eps': 0.1}) == 0.1 / 4
  assert amount(3, '') == 3.0
  for wrong in ('8/0', 'x', '', '1/', 'nan', 'inf', None, True, 'eps/4', [1]):
    with pytest.raises(UserError, match='wanted a number'):
      amount(wrong, 'config.eval.eps')


def test_derived_values_follow_an_override():
  config = digits()
  config.supervised.attack.eps = '4/255'
  config.supervised.attack.steps = 3
  config.finetune.total_epochs = 5
  config.supervised.optimizer.learning_rate = 0.3
  config.eval.eps = '2/255'
  experiment = parse_experiment(config)
  stages = dict(experiment.runs[0].stages)
  for name in ('supervised', 'prune', 'finetune'):
    keywords = stages[name].attack.keywords
    assert keywords['eps'] == 4 / 255 and keywords['step_size'] == 1 / 255
    assert keywords['steps'] == 3
  assert stages['pretrain'].attack.keywords['eps'] == 8 / 255
  assert stages['finetune'].total_epochs == 5
  rates = {name: s.optimizer.learning_rate for name, s in stages.items()}
  assert rates['prune'] == 0.3 and rates['finetune'] == 0.01
  assert stages['prune'].total_epochs == stages['supervised'].total_epochs == 25
  pgd20 = experiment.eval.attacks['pgd20'].protocol
  assert pgd20['eps'] == 2 / 255
  assert pgd20['step_size'] == pytest.approx(0.2 / 255)


def test_as_run_preset():
  config = cifar10.get_config('asrun')
  config.data.source = 'digits'
  experiment = parse_experiment(config)
  stages = dict(experiment.runs[0].stages)
  assert experiment.data.validation == 0
  assert stages['pretrain'].segments * 101 == stages['pretrain'].total_epochs
  keywords = stages['finetune'].attack.keywords
  assert keywords['eps'] == 0.031 and keywords['step_size'] == 0.0078
  assert keywords['start'] == 'gaussian' and stages['prune'].beta == 6.0
  assert stages['finetune'].optimizer.learning_rate == 0.01


def test_baselines_are_overlays():
  experiment = parse_experiment(quickstart.get_config())
  runs = {run.name: run for run in experiment.runs}
  assert list(runs)[0] == 'ours'
  assert dict(runs['natural'].stages)['supervised'].loss == 'natural'
  assert dict(runs['ours'].stages)['supervised'].loss == 'trades'
  assert dict(runs['magnitude'].stages)['prune'].total_epochs == 0
  assert dict(runs['ours'].stages)['prune'].total_epochs > 0


def test_surrogate_is_a_natural_resnet20():
  config = surrogate.get_config()
  assert config.data.source == 'tfds' and config.eval.eps == '8/255'
  config.data.source = 'digits'  # the only one that is always there
  (run,) = parse_experiment(config).runs
  assert (run.name, run.init_from) == ('surrogate', '')
  assert (run.model.name, run.model.width) == ('resnet20', 16)
  ((stage, settings),) = run.stages
  assert (stage, settings.loss) == ('supervised', 'natural')
  assert (settings.total_epochs, settings.batch_size) == (200, 128)
  assert (settings.crop_padding, settings.flip) == (4, True)
  optimizer = settings.optimizer
  assert (optimizer.name, optimizer.schedule) == ('sgd', 'cosine')
  assert (optimizer.learning_rate, optimizer.momentum) == (0.1, 0.9)
  assert optimizer.weight_decay == 1e-4


def test_surrogate_of_a_quickstart_model():
  experiment = parse_experiment(surrogate.get_config('digits'))
  quick = parse_experiment(quickstart.get_config())
  assert experiment.data == quick.data
  ours, theirs = (
    [a.protocol for a in e.eval.selected] for e in (experiment, quick)
  )
  assert ours == theirs
  (run,) = experiment.runs
  assert (run.model.name, run.model.width) == ('resnet20', 8)
  ((stage, settings),) = run.stages
  assert (stage, settings.loss) == ('supervised', 'natural')
  assert (settings.total_epochs, settings.batch_size) == (20, 50)
  assert (settings.crop_padding, settings.flip) == (0, False)


def test_surrogate_names_what_it_was_given():
  for argument in ('digit', 'asrun'):
    with pytest.raises(UserError, match=f'found :{argument}, wanted :digits'):
      surrogate.get_config(argument)


def set_field(path, value):
  def change(config):
    *parents, last = path.split('.')
    for name in parents:
      config = config[name]
    with config.unlocked(), config.ignore_type():
      config[last] = value

  return change


def baseline(name, overlay):
  def change(config):
    with config.unlocked():
      config.baselines[name] = overlay
      config.compare = (name,)

  return change


WRONG = [
  (set_field('supervised.attack.eps', '8'), 'config.supervised.attack.eps',
   'did you mean 8/255?'),
  (set_field('supervised.attack.eps', '-1/255'), 'eps', '0 or more'),
  (set_field('eval.eps', 'nan'), 'config.eval.eps', "'8/255'"),
  (set_field('eval.suite', ('pgd11',)), 'config.eval.suite', "mean 'pgd1"),
  (set_field('eval.attacks.pgd10.restarts', 0), 'pgd10.restarts', '1 or more'),
  (set_field('eval.attacks.pgd10.stepsize', 1), 'pgd10.stepsize',
   "did you mean 'step_size'"),
  (set_field('eval.attacks.pgd10.objective', 'ce'), 'pgd10.objective',
   'cross_entropy'),
  (set_field('prune.keep', 0.0), 'config.prune.keep', '(0, 1]'),
  (set_field('prune.keep', 1.5), 'config.prune.keep', '(0, 1]'),
  (set_field('prune.keep', float('nan')), 'config.prune.keep', 'number'),
  (set_field('prune.total_epochs', 2.5), 'config.prune.total_epochs',
   'whole number'),
  (set_field('prune.total_epoch', 2), 'config.prune.total_epoch:',
   "did you mean 'total_epochs'?"),
  (set_field('pretrian', 2), 'config.pretrian', "did you mean 'pretrain'?"),
  (set_field('stages', ('pretrain', 'prunee')), 'config.stages', "'prune'"),
  (set_field('stages', ('prune', 'prune')), 'config.stages', 'at most once'),
  (set_field('stages', ()), 'config.stages', 'at least one'),
  (set_field('data.source', 'digit'), 'data.source', "did you mean 'digits'?"),
  (set_field('data.validation', -1), 'data.validation', '0 or more'),
  (set_field('model.name', 'resnet'), 'config.model.name', 'resnet18'),
  (set_field('model.width', '8'), 'config.model.width', 'whole number'),
  (set_field('model.dtype', 'float16'), 'config.model.dtype', 'bfloat16'),
  (set_field('pretrain.attack.norm', 'l1'), 'attack.norm', 'linf'),
  (set_field('pretrain.attack.start', 'random'), 'attack.start', 'uniform'),
  (set_field('pretrain.attack.name', 'pgdd'), 'attack.name', "'pgd'"),
  (set_field('pretrain.attack', 3), 'config.pretrain.attack', 'section'),
  (set_field('pretrain.temperature', 0.0), 'temperature', 'more than 0'),
  (set_field('pretrain.optimizer.schedule', 'cosin'), 'schedule', "'cosine'"),
  (set_field('supervised.loss', 'trade'), 'config.supervised.loss', "'trades'"),
  (set_field('supervised.batch_size', 0), 'batch_size', '1 or more'),
  (set_field('save_steps', 0), 'config.save_steps', '1 or more'),
  (set_field('profile', -1), 'config.profile', '0 or more'),
  (set_field('profile', True), 'config.profile', 'whole number'),
  (baseline('a', {'profile': 3}), 'config.baselines.a.profile', 'shares'),
  (set_field('init_from', '1_pretrain'), 'config.init_from',
   'has a stage folder'),
  (baseline('a', {'init_from': 'a/1_prune'}), 'baselines.a.init_from',
   'no run before'),
  (set_field('seed', -1), 'config.seed', '0 to 4294967295'),
  (set_field('seed', 2**32), 'config.seed', '0 to 4294967295'),
  (set_field('name', '1_pretrain'), 'config.name', 'starts with a letter'),
  (set_field('compare', ('nature',)), 'config.compare', "mean 'natural'"),
  (baseline('ours', {}), 'config.baselines.ours', 'already'),
  (baseline('a', {'data': {}}), 'baselines.a.data', 'shares'),
  (baseline('a', {'suprevised': {}}), 'baselines.a.suprevised',
   "did you mean 'supervised'?"),
  (baseline('a', {'supervised': {'loss': 'nat'}}),
   'config.baselines.a.supervised.loss', 'natural'),
  (baseline('a', 3), 'config.baselines.a', 'section'),
  (baseline('a', {'seed': {'b': 3}}), 'config.baselines.a.seed', 'section'),
  (set_field('pretrain.optimizer.warmup_epochs', 1.0), 'warmup_epochs', 'rocl'),
]  # fmt: skip


@pytest.mark.parametrize('change, field, wanted', WRONG)
def test_a_wrong_value_is_named_with_what_is_wanted(change, field, wanted):
  config = digits()
  change(config)
  with pytest.raises(UserError) as error:
    parse_experiment(config)
  message = str(error.value)
  assert field in message and wanted in message and '\n' not in message


def test_commas_make_a_tuple_as_a_shell_user_types_it():
  config = digits()
  config.eval.suite = ('pgd10,pgd20',)
  config.stages = ('pretrain,supervised,',)
  experiment = parse_experiment(config)
  assert [a.name for a in experiment.eval.selected] == ['pgd10', 'pgd20']
  run = experiment.runs[0]
  assert [name for name, _ in run.stages] == ['pretrain', 'supervised']
  assert run.config['stages'] == ('pretrain', 'supervised')


def test_every_suite_names_attacks_that_exist():
  for name in eval.SUITES:
    config = digits()
    config.eval = eval.get_config(name).eval
    assert parse_experiment(config).eval.selected


QUICKSTART = str(pathlib.Path(quickstart.__file__))
OVERRIDES = [
  ('--config.compare=rocl --config.seed=1e3', "config.seed: found '1e3'"),
  ('--config.compare=rocl', None),
  ('--config.tensorboard --config.seed 3', None),
  ('--noconfig.tensorboard --config.seed', "config.seed: found ''"),
  ('--config.seed 3 --config.model.width x', "config.model.width: found 'x'"),
  ('--config.model.width=3 --config.sede=3', "config.sede: no .*'seed'"),
  ('--config.model=3', 'config.model: .* section'),
  ('--config.eval.attacks.apgd-t.targets=3', None),
  ('--config.eval.attacks["apgd-t"].targets=3', None),
  ("--config.eval.attacks['fab-t'].steps=x", 'attacks.fab-t.steps: found'),
  ('--config.eval.attacks.apgd-t.targets=x', 'attacks.apgd-t.targets: found'),
  ('--config.eval.attacks.apgdt.targets=3', "apgdt: no such.*'apgd-t'"),
  ('--config.stages[0]=prune', r'config.stages\[0\]: no field to be set'),
  ('--config.prune.keep=1/3', "config.prune.keep: found '1/3'"),
]


@pytest.mark.parametrize('warnings_', ['default', 'error'])
@pytest.mark.parametrize('words, told', OVERRIDES)
def test_the_override_that_was_refused_is_named(words, told, warnings_):
  """And none that ml_collections takes, under -W error neither."""
  argv = ['train.py', f'--config={QUICKSTART}', *words.split()]
  with warnings.catch_warnings():
    warnings.simplefilter(warnings_)
    with command._tolerant():
      argv = command._normal(argv, QUICKSTART)
      found = command._explain(argv, QUICKSTART)
  if told is None:
    assert found is None
  else:
    assert re.search(told, found), found


def test_one_config():
  found = command._config_path(['train.py', '--config', 'a/b.py:x', 'y'])
  assert found == f'{os.getcwd()}/a/b.py:x'
  two = ['train.py', f'--config={QUICKSTART}', '--config', QUICKSTART]
  with pytest.raises(UserError, match='2 times, .* wanted once'):
    command._config_path(two)
  two[-1] = QUICKSTART.replace('quickstart', 'quickstat')
  with pytest.raises(UserError, match="did you mean 'quickstart.py'"):
    command._config_path(two)


def test_paths_are_absolute_and_know_the_home(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', '/home/me')
  monkeypatch.chdir(tmp_path)
  for text, wanted in (
    ('~/run', '/home/me/run'),
    ('~', '/home/me'),
    ('a/../b', f'{tmp_path}/b'),
    ('./~x', f'{tmp_path}/~x'),
    ('gs://b/~/x', 'gs://b/~/x'),
    ('', ''),
  ):
    assert files.place(text) == wanted
  with pytest.raises(UserError, match="no user 'nobody-of-us'"):
    files.place('~nobody-of-us/x')
  (tmp_path / 'a,lr=0.1' / 'model').mkdir(parents=True)
  (tmp_path / 'a').mkdir()
  one, a = f'{tmp_path}/a,lr=0.1/model', f'{tmp_path}/a'
  assert files.places('a,lr=0.1/model') == [one]
  assert files.places('a,a,lr=0.1/model,gs://b/c,') == [a, one, 'gs://b/c']
  assert files.places('~/x,b') == ['/home/me/x', f'{tmp_path}/b']
  config = digits()
  config.data.dir, config.init_from = '~/data', 'a,lr=0.1/model'
  experiment = parse_experiment(config)
  assert experiment.data.dir == '/home/me/data'
  (run, *_) = experiment.runs
  assert run.init_from == run.config['init_from'] == one
  assert run.config['data']['dir'] == '/home/me/data'


def test_a_stage_folder_is_no_path():
  runs = parse_experiment(quickstart.get_config()).runs
  assert {run.init_from for run in runs} >= {'', '1_pretrain'}


def test_neighbours_are_those_of_the_file(tmp_path, monkeypatch):
  """Whatever else is called configs, and wherever one is."""
  loaded = {k: m for k, m in sys.modules.items() if k.startswith('configs')}
  other, mine = tmp_path / 'other', tmp_path / 'mine' / 'configs'
  for folder in (other / 'configs', mine):
    folder.mkdir(parents=True)
  (other / 'configs' / '__init__.py').write_text('')
  (mine / 'near.py').write_text('SEED = 7')
  text = 'from configs import near, quickstart\n'
  text += 'def get_config():\n  config = quickstart.get_config()\n'
  (mine / 'own.py').write_text(
    text + '  config.seed = near.SEED\n  return config'
  )
  alone = text.replace('near, ', '') + '  return config'
  (tmp_path / 'alone.py').write_text(alone)
  monkeypatch.syspath_prepend(str(other))
  monkeypatch.setattr(sys, 'path', list(sys.path))
  try:
    for name in loaded:
      del sys.modules[name]
    monkeypatch.chdir(tmp_path)
    assert command.load_config('mine/configs/own.py').seed == 7
    for path in ('alone.py', QUICKSTART):
      assert command.load_config(path).seed == 0
  finally:
    for name in [k for k in sys.modules if k.startswith('configs')]:
      del sys.modules[name]
    sys.modules.update(loaded)
