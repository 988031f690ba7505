"""The commands as a user calls them: results, resuming, mistakes.

A whole run of a very small network on the digits; TensorFlow is a trap.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from rocl_jax import checkpoint, manifest
from rocl_jax.trees import flatten

ROOT = pathlib.Path(__file__).parent.parent
SMALL = [
  '--config=configs/quickstart.py',
  '--config.model.name=resnet8',
  '--config.model.width=4',
  '--config.save_steps=4',
  '--config.pretrain.total_epochs=2',
  '--config.supervised.total_epochs=3',
  '--config.supervised.batch_size=100',
  '--config.prune.total_epochs=2',
  '--config.finetune.total_epochs=2',
  '--config.linear_eval.total_epochs=1',
]


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  """TensorFlow is a trap."""
  trap = tmp_path_factory.mktemp('trap')
  (trap / 'tensorflow.py').write_text('raise SystemExit("TensorFlow loaded")')
  return os.environ | {
    'PYTHONPATH': f'{trap}{os.pathsep}{ROOT}',
    'JAX_PLATFORMS': 'cpu',
  }


@pytest.fixture(scope='module')
def call(environment):
  def run(*arguments, status=0):
    result = subprocess.run(
      [sys.executable, *map(str, arguments)],
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=900,
    )
    assert result.returncode == status, result.stderr[-3000:]
    return result

  return run


@pytest.fixture(scope='module')
def finished(call, tmp_path_factory):
  """The work directory and the output of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('runs') / 'straight'
  result = call('train.py', *SMALL, f'--workdir={workdir}')
  return workdir, result


def clockless(row):
  clocks = ('seconds', 'images_per_second')
  return {k: v for k, v in row.items() if k not in clocks}


def records_of(workdir):
  return json.loads((workdir / 'results.json').read_text())


def test_a_run_ends_with_table_report_and_records(finished):
  workdir, result = finished
  for stage in ('supervised', 'prune', 'finetune'):
    assert re.search(rf'ours +{stage} +\d', result.stdout)
  assert 'natural' in result.stdout and 'report.md' in result.stdout
  assert (workdir / 'report.md').exists()
  assert (workdir / 'figures' / 'results.png').stat().st_size > 10_000

  records = records_of(workdir)
  keys = ('run', 'stage', 'selection', 'split', 'attack')
  assert len({tuple(r[k] for k in keys) for r in records}) == len(records)
  last = {
    (r['run'], r['stage']): r
    for r in records
    if r['selection'] == 'last' and r['split'] == 'test'
  }
  assert set(last) == {
    *(('ours', s) for s in ('supervised', 'prune', 'finetune')),
    ('natural', 'supervised'),
    ('magnitude', 'prune'),
    ('rocl', 'linear_eval'),
  }
  for record in last.values():
    assert record['n'] == 360 and record['eps'] == 0.1
    assert 0 <= record['robust_top1'] <= record['robust_top5'] <= 100
    assert record['clean_top1'] <= record['clean_top5'] <= 100
    assert record['config']['model']['width'] == 4
    pruned = record['stage'] in ('prune', 'finetune')
    assert record['sparsity'] == pytest.approx(0.9 if pruned else 0, abs=2e-3)
  assert {r['selection'] for r in records} == {
    'last',
    'best_validation',
    'best_test',
  }


def test_published_weights_are_zero_outside_their_masks(finished):
  workdir, _ = finished
  for stage in ('3_prune', '4_finetune'):
    variables, about = checkpoint.load_model(
      epath.Path(workdir / stage / 'model')
    )
    params = flatten(variables['params'])
    for path, mask in variables['masks'].items():
      np.testing.assert_array_equal(params[path] != 0, mask)
      assert about['layers'][path] == {'size': mask.size, 'kept': mask.sum()}


def test_the_same_command_again_does_nothing_twice(call, finished):
  workdir, _ = finished
  before = (workdir / 'results.json').read_bytes()
  report = (workdir / 'report.md').read_bytes()
  again = call('train.py', *SMALL, f'--workdir={workdir}')
  assert again.stderr.count('finished before') == 7
  assert 'epoch' not in again.stderr
  assert (workdir / 'results.json').read_bytes() == before
  assert (workdir / 'report.md').read_bytes() == report


def started(command, environment):
  """A run whose words on standard error can be read."""
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def stop_after(command, environment, lines, delay, number):
  """Starts a run and sends it a signal some time after a line of its output.

  Returns:
    Exit status and output; the status is 0 if it was over before.
  """
  process = started(command, environment)
  output = [process.stderr.readline() for _ in range(lines)]
  time.sleep(delay)
  process.send_signal(number)
  output += process.stderr.readlines()
  return process.wait(timeout=60), ''.join(output)


def kill_at(command, environment, word, delay):
  """Starts a run and kills it some time after a line that begins so.

  Returns:
    Exit status and output; the status is 0 if it was over before.
  """
  process = started(command, environment)
  output = []
  for line in process.stderr:
    output.append(line)
    if line.startswith(word):
      time.sleep(delay)
      process.kill()
  return process.wait(timeout=60), ''.join(output)


def assert_same_run(workdir, straight):
  """Weights, statistics, masks, optimisers and rows are equal to the bit."""
  stages = ('1_pretrain', '2_supervised', '3_prune', '4_finetune')
  for stage in (*stages, 'natural/1_supervised', 'rocl/1_linear_eval'):
    one, other = workdir / stage, straight / stage
    folders = [p.name for p in other.iterdir() if checkpoint.is_model(p)]
    assert 'model' in folders
    for folder in folders:
      actual, _ = checkpoint.load_model(epath.Path(one / folder))
      wanted, _ = checkpoint.load_model(epath.Path(other / folder))
      assert_equal_trees(actual, wanted)
    states = [
      checkpoint.read_state(epath.Path(root / 'checkpoints'))
      for root in (one, other)
    ]
    assert_equal_trees(*states)
    rows = [
      [clockless(json.loads(line)) for line in path.read_text().splitlines()]
      for path in (one / 'metrics.jsonl', other / 'metrics.jsonl')
    ]
    assert rows[0] == rows[1]
  # The checksum covers the versions, among them this checkout's state.
  clocks = ('versions', 'checksum')
  without = lambda r: {k: v for k, v in r.items() if k not in clocks}
  identity = lambda r: (r['run'], r['stage'], r['selection'], r['split'])
  records = [
    sorted(map(without, records_of(root)), key=identity)
    for root in (workdir, straight)
  ]
  assert records[0] == records[1]


def assert_equal_trees(actual, wanted):
  actual, wanted = flatten(actual), flatten(wanted)
  assert actual.keys() == wanted.keys()
  for path in wanted:
    np.testing.assert_array_equal(actual[path], wanted[path], err_msg=path)


def test_stopped_and_started_again_it_ends_bit_equal(
  finished, environment, call, tmp_path
):
  """kill -9 three times, SIGTERM, SIGINT, a damaged save and a damaged model;
  then the same command, and the same network."""
  straight, _ = finished
  workdir = tmp_path / 'stopped'
  command = [sys.executable, 'train.py', *SMALL, f'--workdir={workdir}']
  random = np.random.default_rng(0)
  kill, term, interrupt = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
  for number, lines in ((kill, 3), (term, 5), (kill, 6), (interrupt, 6)):
    delay = random.uniform(0, 0.5)
    status, output = stop_after(command, environment, lines, delay, number)
    assert status == {kill: -9, term: 143, interrupt: 130}[number], output
    if number != kill:
      assert 'the same command goes on' in output
  status, output = stop_after(command, environment, 8, 0.2, kill)
  assert status == -9
  saves = workdir.glob('*/checkpoints/[0-9]*/manifest.json')
  newest = max(saves, key=lambda p: p.stat().st_mtime).parent
  (damaged,) = (newest / 'state' / 'd').iterdir()
  content = bytearray(damaged.read_bytes())
  content[len(content) // 2] ^= 1
  damaged.write_bytes(content)
  # If that stage had ended, it had not said so yet.
  shutil.rmtree(newest.parent.parent / 'model', ignore_errors=True)
  model = next((workdir / '1_pretrain/model/variables/d').iterdir())
  model.write_bytes(model.read_bytes()[:-1])
  last = call('train.py', *SMALL, f'--workdir={workdir}')
  assert last.stderr.count('set aside') == 2
  assert_same_run(workdir, straight)
  healthy = call('-m', 'rocl_jax.doctor', workdir)
  assert 'whole' in healthy.stdout and 'DAMAGED' not in healthy.stdout


@pytest.mark.slow
def test_killed_at_twenty_random_instants(
  finished, environment, call, tmp_path
):
  """During steps, saves, hand-over, evaluation and report."""
  straight, result = finished
  workdir = tmp_path / 'killed'
  command = [sys.executable, 'train.py', *SMALL, f'--workdir={workdir}']
  seed = int(time.time())
  random = np.random.default_rng(seed)
  # Places all over what the run says, and one after its last word.
  said = [
    re.split(r' after |  loss|: resumed', line)[0]
    for line in result.stderr.splitlines()
  ]
  places = sorted(random.choice(len(said), 19, replace=False))
  where = []
  for word in [*(said[place] for place in places), said[-1]]:
    delay = random.uniform(0, 1)
    status, output = kill_at(command, environment, word, delay)
    where.append(f'{word!r} + {delay:.2f} s: {status}')
    if status == 0:  # passed before: let the run do its last stage again
      shutil.rmtree(workdir / 'rocl', ignore_errors=True)
  print(f'seed {seed}', *where, sep='\n')
  assert sum(line.endswith('-9') for line in where) >= 15
  call('train.py', *SMALL, f'--workdir={workdir}')
  assert_same_run(workdir, straight)


def test_a_saved_model_can_be_evaluated_again(call, environment, finished):
  workdir, _ = finished
  model = workdir / '4_finetune' / 'model'
  suite = '--config=configs/eval.py:paper'
  arguments = (
    '-m', 'rocl_jax.evaluate', f'--model={model}', suite,
    '--config.eval.eps=1/20', '--config.eval.examples=100',
  )  # fmt: skip
  command = [sys.executable, *map(str, arguments)]
  # At the first word of the second attack.
  status, said = stop_after(command, environment, 2, 0, signal.SIGTERM)
  assert status == 143 and 'same command goes on' in said, said
  result = call(*arguments)
  assert 'pgd20' in result.stdout
  records = json.loads((workdir / '4_finetune' / 'results.json').read_text())
  assert {r['attack'] for r in records} == {'pgd10', 'pgd20'}
  trained = [r for r in records_of(workdir) if r['stage'] == 'finetune'][0]
  for record in records:
    assert record['eps'] == 0.05 and record['n'] == 100
    assert record['sparsity'] == trained['sparsity']
  again = call(*arguments)
  assert '100 test images, last' not in again.stderr  # it was all there
  call('-m', 'rocl_jax.report', workdir)
  assert 'pgd20' in (workdir / 'report.md').read_text()


def test_a_retrained_stage_is_evaluated_anew(call, finished, tmp_path):
  """Delete the last stage, ask for another: no number of the old one stays."""
  workdir = tmp_path / 'copy'
  shutil.copytree(finished[0], workdir)
  shutil.rmtree(workdir / '4_finetune')
  more = '--config.finetune.total_epochs=1'
  call('train.py', *SMALL, more, f'--workdir={workdir}')
  before, after = (
    [r for r in records_of(w) if r['stage'] == 'finetune']
    for w in (finished[0], workdir)
  )
  last = [r for r in after if r['selection'] == 'last']
  assert last and all(r['epoch'] == 1 for r in last)
  assert not {r['fingerprint'] for r in last} & {
    r['fingerprint'] for r in before if r['selection'] == 'last'
  }


def reseal(folder, like):
  """As somebody who knows how would make another's content look whole."""
  about = manifest.read(epath.Path(like))['about']
  manifest.seal(epath.Path(folder), about)


def test_weights_that_are_not_the_models_own_are_refused(
  call, finished, tmp_path
):
  """Faults that would put one network's accuracy under another's name."""
  stage = tmp_path / 'stage'
  shutil.copytree(finished[0] / '4_finetune', stage)
  shutil.rmtree(stage / 'model' / 'variables')
  arguments = (
    *('-m', 'rocl_jax.evaluate', '--config=configs/eval.py:quick'),
    f'--model={stage}/model',
  )
  missing = call(*arguments, status=2)
  assert missing.stderr.count('\n') == 1 and 'variables' in missing.stderr
  other = finished[0] / '3_prune' / 'model' / 'variables'
  shutil.copytree(other, stage / 'model' / 'variables')
  assert 'its bytes are not' in call(*arguments, status=2).stderr
  reseal(stage / 'model', other.parent)
  swapped = call(*arguments, status=3)
  assert 'holds other weights' in swapped.stderr
  (stage / 'model' / 'model.json').write_text('{}')
  reseal(stage / 'model', other.parent)
  assert 'has no run' in call(*arguments, status=2).stderr


MISTAKES = [
  (['--config.pretrain.totl_epochs=3'], "did you mean 'total_epochs'?"),
  (['--config.pretrian.total_epochs=3'], "did you mean 'pretrain'?"),
  (['--config.prune.keep=0'], 'config.prune.keep'),
  (['--config.prune.keep=abc'], 'config.prune.keep'),
  (['--config.model.width=wide'], 'config.model.width'),
  (['--config.eval.eps=8'], 'did you mean 8/255?'),
  (['--config.supervised=3'], 'section'),
  (['--config.stages=("pretrain","prunee")'], "'prune'"),
  (['--config.stages=prune,pretrain'], "did you mean '2_pretrain'?"),
  (['--config.data.source=binary', '--config.data.dir=/nowhere'], '/nowhere'),
  (['--config.supervised.batch_size=5000'], 'config.supervised.batch_size'),
  (['--config.tensorboard=true'], 'config.tensorboard'),
  (['--config.seed=-1'], 'config.seed'),
  (['--config.seed'], 'config.seed'),
  (['--workdir='], '--workdir: missing'),
  (['--workdir=nope://bucket/run'], 'nope://bucket/run'),
  (['--config.init_from=/nowhere'], '/nowhere'),
  (['--confg.seed=3'], 'confg'),
  (['--config=configs/quickstat.py'], "did you mean 'quickstart.py'?"),
  (['--config=configs/cifar10.py'], 'found 2 times'),
  (['--config.compare=rocl', '--config.seed=1e3'], "config.seed: found '1e3'"),
  (['--workdir=~nobody-of-us/w'], "no user 'nobody-of-us'"),
  (
    ['--coordinator=no-such-host.invalid:1', '--processes=2', '--process=1'],
    'there is no host no-such-host.invalid',
  ),
  (['stray'], 'stray'),
]


@pytest.mark.parametrize('arguments, wanted', MISTAKES)
def test_a_mistake_is_told_in_one_line(call, tmp_path, arguments, wanted):
  base = ['--config=configs/quickstart.py', f'--workdir={tmp_path / "w"}']
  result = call('train.py', *base, *arguments, status=2)
  assert wanted in result.stderr
  assert result.stderr.count('\n') == 1 and 'Traceback' not in result.stderr
  assert not list(tmp_path.rglob('checkpoints'))


TRAIN = ['train.py', '--config=configs/quickstart.py', '--workdir=w']
SURROUNDINGS = [
  (TRAIN, {'JAX_PLATFORMS': 'nonsense'}, 2, 'JAX_PLATFORMS: found nonsense'),
  (TRAIN, {'JAX_PLATFORMS': 'cuda'}, 2, 'available here: cpu. Set'),
  (
    ['-m', 'rocl_jax.report', 'w'],
    {'JAX_PLATFORMS': 'cuda'},  # a report needs no device
    *(2, 'w: no such folder'),
  ),
  (
    [*TRAIN, '--help'],
    {'JAX_DEFAULT_MATMUL_PRECISION': 'mighty'},
    *(2, 'jax_default_matmul_precision'),
  ),
  (
    ['-m', 'rocl_jax.doctor', 'w'],
    {'JAX_ENABLE_X64': 'maybe'},
    *(2, 'JAX_ENABLE_X64'),
  ),
  (
    ['-m', 'rocl_jax.report', 'no-such-folder'],
    {'MPLBACKEND': 'module://matplotlib_inline.backend_inline'},
    *(2, 'no-such-folder: no such folder'),
  ),
  ([*TRAIN, '--help'], {'MPLBACKEND': 'nonsense'}, 0, ''),
  (
    [*TRAIN, '--config.compare=rocl', '--config.seed=x'],
    {'PYTHONWARNINGS': 'error::DeprecationWarning'},
    *(2, "config.seed: found 'x'"),
  ),
]


@pytest.mark.parametrize('arguments, variables, status, wanted', SURROUNDINGS)
def test_surroundings_are_told_of_in_one_line(
  environment, tmp_path, arguments, variables, status, wanted
):
  """What a notebook or another machine has left in the environment."""
  files = [ROOT / x if x == 'train.py' else x for x in arguments]
  files = [
    x.replace('=configs', f'={ROOT}/configs') if isinstance(x, str) else x
    for x in files
  ]
  result = subprocess.run(
    [sys.executable, *map(str, files)],
    cwd=tmp_path,
    env=environment | variables,
    capture_output=True,
    text=True,
  )
  assert result.returncode == status, result.stderr
  assert wanted in result.stderr and 'Traceback' not in result.stderr
  assert result.stderr.count('\n') == (status != 0)
  assert not list(tmp_path.rglob('checkpoints'))


def test_other_mistakes(call, finished, tmp_path):
  workdir, _ = finished
  file = tmp_path / 'file'
  file.write_text('')
  broken = tmp_path / 'broken.py'
  broken.write_text('def get_config():\n  return 1 / 0\n')
  quick = '--config=configs/quickstart.py'
  paper = '--config=configs/eval.py:paper'
  evaluate = ('-m', 'rocl_jax.evaluate')
  for arguments, wanted in [
    (('train.py', quick), '--workdir: missing'),
    (('train.py', quick, f'--workdir={file}'), str(file)),
    (('train.py', f'--config={broken}', '--workdir=w'), 'broken.py:2'),
    (('train.py', 'a', quick, '--workdir=w'), 'found arguments: a'),
    (
      ('train.py', *SMALL, f'--workdir={workdir}', '--config.prune.keep=0.2'),
      'was made with 0.1',
    ),
    (
      (
        'train.py',
        '--config=configs/cifar10.py',
        f'--workdir={tmp_path}/w',
        '--config.data.source=digits',
        "--config.stages=('prune','pretrain')",
      ),
      'pretrain can not start from prune, which has no projector',
    ),  # fmt: skip
    ((*evaluate, paper), '--model: missing'),
    ((*evaluate, paper, f'--model={tmp_path}'), 'no model here'),
    (
      (*evaluate, paper, f'--model={workdir}/1_pretrain/model'),
      'without a classifier',
    ),
    ((*evaluate, '--config=configs/eval.py:papr', '--model=m'), "'papr'"),
    (('-m', 'rocl_jax.report', tmp_path), str(tmp_path)),
    (('-m', 'rocl_jax.report'), 'wanted 1'),
  ]:
    result = call(*arguments, status=2)
    assert wanted in result.stderr, result.stderr
    told = [  # what a changed config differs in stands before
      line
      for line in result.stderr.splitlines()
      if line and not re.match(r'warning:|[\w /]+: config\.[\w.]+ was ', line)
    ]
    assert len(told) == 1, result.stderr


@pytest.mark.slow
def test_quickstart_shows_what_it_promises(call, tmp_path):
  """The orderings that the README's table shows, on the full quickstart."""
  workdir = tmp_path / 'w'
  call('train.py', '--config=configs/quickstart.py', f'--workdir={workdir}')
  robust = {
    (r['run'], r['stage']): r['robust_top1']
    for r in records_of(workdir)
    if r['selection'] == 'last' and r['split'] == 'test'
  }
  assert robust['ours', 'supervised'] > 75
  assert robust['ours', 'finetune'] > 70
  assert robust['natural', 'supervised'] < 60
  assert robust['magnitude', 'prune'] < 20
