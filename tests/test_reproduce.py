"""The paper's rows: what they share, what is left to do, one command."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from etils import epath
from paper_tiny import get_config

from configs import paper, paper_small
from rocl_jax import data, evaluate, published
from rocl_jax.errors import UserError
from rocl_jax.experiment import parse_experiment
from rocl_jax.reproduce import evaluations, forecast, rows
from rocl_jax.settings import parse

ROOT = pathlib.Path(__file__).parent.parent
EVERY = ['1', '2', '3', '4', '5', 'baselines']


def lineage(run, by_folder):
  """(name, section) of all stages of a run, those it starts from included."""
  before = by_folder[run.init_from] if run.init_from else []
  return [*before, *run.stages]


@functools.cache
def shared(argument):
  """{run: (model, all its stages)} of the config of all rows."""
  config = paper.get_config(argument)
  config.data.source = 'digits'
  by_folder, found = {}, {}
  for run in parse_experiment(config).runs:
    whole = lineage(run, by_folder)
    found[run.name] = (run.model, whole)
    own = len(whole) - len(run.stages)
    for i, folder in enumerate(run.folders, own + 1):
      by_folder[folder] = whole[:i]
  return found


@pytest.mark.parametrize('preset', ['', 'asrun'])
def test_a_row_alone_is_what_it_is_among_the_others(preset):
  together = shared(preset)
  for name, run in published.row_names().items():
    config = paper.get_config(f'{name},{preset}')
    config.data.source = 'digits'
    (alone,) = parse_experiment(config).runs
    assert (alone.name, alone.init_from) == (run, '')
    assert (alone.model, list(alone.stages)) == together[run]


def test_presets_differ_as_the_logs_do():
  def epochs(run, preset):
    return [s.total_epochs for _, s in shared(preset)[run][1]]

  assert epochs('baseline2_90', '') == [25, 25, 25]
  assert epochs('baseline2_90', 'asrun') == [20, 20, 20]
  assert epochs('baseline12_90', '') == [300, 150, 25, 25]
  assert epochs('baseline12_90', 'asrun') == [303, 150, 3, 25, 25]
  ours, theirs = (shared('asrun')[r][1][0][1] for r in ('ours_90', 'baseline1'))
  assert ours.attack.keywords['steps'] == 7
  assert theirs.attack.keywords['eps'] == 8 / 255
  losses = [s.loss for _, s in shared('asrun')['ours_natural_90'][1]]
  assert losses[1:] == ['trades', 'natural', 'natural']


def test_the_small_scale_has_both_presets_in_proportion():
  def epochs(preset):
    config = paper_small.get_config(preset)
    config.data.source = 'digits'
    runs = parse_experiment(config).runs
    return {r.name: [s.total_epochs for _, s in r.stages] for r in runs}

  assert epochs('')['baseline2_90'] == [3, 3, 3]
  assert epochs('asrun')['baseline2_90'] == [2, 2, 2]
  assert epochs('asrun')['baseline12_90'] == [1, 3, 3]
  assert epochs('asrun')['small_90'] == [10, 9]


def test_a_small_network_has_as_many_weights():
  assert shared('')['small_90'][0].width == 20
  assert shared('')['small_99'][0].width == 6


@pytest.mark.parametrize(
  'argument, told',
  [
    ('table2_our', "did you mean 'table2_ours'"),
    ('table1_ours_natural', 'wanted a row'),
    ('asrum', "did you mean 'asrun'"),
    ('ours_90,ours_99', 'wanted a row'),
  ],
)
def test_a_wrong_row_is_told(argument, told):
  with pytest.raises(UserError, match=told):
    paper.get_config(argument)


def test_tables_bring_what_their_runs_start_from():
  config = paper.get_config('')
  assert rows(config, ['1']) == ('baseline1', 'baseline2_90')
  third = rows(config, ['3'])
  assert third == ('baseline2_90', 'ours_99', 'baseline2_99')
  assert 'surrogate' in rows(config, ['4'])
  assert rows(config, EVERY) == config.compare
  asrun = paper.get_config('asrun')
  assert 'baseline1' in rows(asrun, ['5'])  # its pre-training
  with pytest.raises(UserError, match="--tables: found '6', wanted some of 1,"):
    rows(config, ['6'])
  with pytest.raises(UserError, match='--config: compares no run baseline1'):
    rows(paper.get_config('table2_ours'), ['1'])


def test_the_forecast_counts_what_is_left(tmp_path):
  config = get_config()
  experiment = parse_experiment(config)
  dataset = data.load('digits', '', config.data.validation)
  root = epath.Path(tmp_path)
  before = {
    (p.run, p.stage): p for p in forecast.parts(experiment, root, dataset)
  }
  assert before['ours_90', 'supervised'].start == '1_pretrain'
  assert before['magnitude_90', 'prune'].epochs == 0
  assert all(p.flops > 0 and p.done == 0 for p in before.values())
  (root / '1_pretrain').mkdir()
  (root / '1_pretrain' / 'metrics.jsonl').write_text('{"epoch": 1}\n')
  first, *rest = forecast.parts(experiment, root, dataset)
  assert (first.epochs, first.done) == (2, 1)
  assert first.flops == before['ours_90', 'pretrain'].flops / 2
  assert rest == list(before.values())[1:]
  forecast.speed(experiment, dataset, root / 'new' / 'speed.json')
  assert not (root / 'new').exists()  # a dry run makes none
  speed = root / 'speed.json'
  rate = forecast.speed(experiment, dataset, speed)
  speed.write_text(speed.read_text().replace(str(rate), '3.5'))
  assert forecast.speed(experiment, dataset, speed) == 3.5


def test_what_is_evaluated_beside_the_suite(tmp_path):
  config = get_config()
  runs = parse_experiment(config).runs
  root = epath.Path(tmp_path)
  found = list(evaluations(config, runs, root, EVERY, 128, 16))
  (strong, models), (transfer, targets) = [
    (parse(evaluate.Settings, c.to_dict(), 'config'), names)
    for c, names in found
  ]
  suite = ['pgd10', 'pgd20', 'autoattack']
  assert [a.name for a in strong.eval.selected] == suite
  assert (strong.eval.examples, strong.eval.eps) == (128, 0.1)
  assert f'{root}/4_finetune/model' in models
  assert len(models) == len(runs) - 1  # all but the surrogate
  assert transfer.transfer.surrogates == (
    f'{root}/surrogate/1_supervised/model',
  )
  assert transfer.transfer.unmasked
  assert len(targets) == 5
  assert not list(evaluations(config, runs, root, ['1'], 0, 0))


def call(*arguments, status=0):
  done = subprocess.run(
    [sys.executable, '-m', 'rocl_jax.reproduce', *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=1800,
  )
  assert done.returncode == status, done.stderr[-3000:]
  return done


TINY = '--config=tests/paper_tiny.py'


@pytest.mark.slow  # a story of minutes
def test_one_command_runs_what_is_missing(tmp_path):
  options = [TINY, '--tables=1', '--autoattack=0', f'--workdir={tmp_path}']
  done = call(*options)
  assert 'minutes on this device, by FLOPs' in done.stdout
  records = json.loads((tmp_path / 'seed0' / 'results.json').read_text())
  assert {r['run'] for r in records} == {'ours_90', 'baseline1', 'baseline2_90'}
  assert not (tmp_path / 'seed0' / 'baseline1' / '2_linear_eval').exists()
  assert (tmp_path / 'report.md').exists()
  plan = call(*options, '--dry_run').stdout
  left = [line.split()[-1] for line in plan.splitlines() if line[:2] == '0 ']
  assert left == ['0.0'] * 8
  other = call(*options, '--config.supervised.beta=3.0', status=2)
  assert 'config.supervised.beta: found 3.0, but' in other.stderr
  assert 'one measured step' not in other.stdout
  (allowed,) = re.findall('--allow_change=[a-z.,]+', other.stderr)
  assert allowed.endswith('config.prune.beta,config.finetune.beta')
  call(*options, '--config.supervised.beta=3.0', allowed, '--dry_run')
  doctor = subprocess.run(
    [sys.executable, '-m', 'rocl_jax.doctor', str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert doctor.returncode == 2 and doctor.stderr.strip().endswith('seed0')


@pytest.mark.parametrize(
  'options, told',
  [
    (['--tables=7'], "--tables: found '7', wanted some of 1,2,3,4,5,baselines"),
    (['--seeds=a'], '--seeds: found a, wanted numbers'),
    (['--seeds='], '--seeds: found none'),
    (['--config=configs/quickstart.py'], '--config: compares no run'),
    (['--tables='], '--tables: found none'),
    (['--config.compare=()'], '--config: compares no run'),
    (
      ['--config.compare=("baseline2_9",)'],
      'config.compare: no run baseline2_9 in baselines (did you mean',
    ),
    (['--config=configs/paper.py:table9_ours'], 'wanted a row'),
    (['--audit=999'], '--audit'),
    (['--config.seed=2'], 'config.seed: found 2, wanted --seeds=2'),
    (['--workdir=gs://b/r'], '--workdir: found gs://b/r, wanted a folder of'),
  ],
)
def test_mistakes_are_told_in_a_line(tmp_path, options, told):
  config = [] if '--config=' in options[0] else [TINY]
  done = call(f'--workdir={tmp_path}/w', *config, *options, status=2)
  assert told in done.stderr and len(done.stderr.strip().splitlines()) == 1
  assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_every_table(tmp_path):
  call(TINY, '--autoattack=8', '--audit=0', f'--workdir={tmp_path}')
  seed = tmp_path / 'seed0'
  records = [
    record
    for path in seed.rglob('results.json')
    for record in json.loads(path.read_text())
  ]
  strong = {r['run'] for r in records if r['attack'] == 'autoattack'}
  assert strong == {*published.row_names().values()} - {'small_99'}
  transfers = [
    record
    for path in seed.rglob('transfer.json')
    for record in json.loads(path.read_text())
  ]
  assert {r['target']['run'] for r in transfers} == {*published.runs_of(4)}
  assert {r['masked'] for r in transfers} == {True, False}
