"""The launchers, without a cloud: what they say, and the whole story.

Stand-ins for gcloud, SLURM and uv come first on PATH, keep state, and run the
remote commands here, with the variables of a real worker (tests/launch). The
dry runs of tests/launch/golden are commands and what they must print;
`ROCL_WRITE_GOLDEN=1 pytest tests/test_launch.py -k golden` writes them anew.
"""

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import jsonschema
import kubernetes_validate
import numpy as np
import packaging.requirements
import packaging.utils
import pytest
import yaml
from etils import epath

from rocl_jax import checkpoint
from rocl_jax.trees import flatten

ROOT = pathlib.Path(__file__).parent.parent
HERE = pathlib.Path(__file__).parent / 'launch'
SMALL = [
  '--config=configs/quickstart.py',
  '--config.model.name=resnet8',
  '--config.model.width=4',
  '--config.stages=supervised,',
  '--config.compare=',
  '--config.save_steps=3',
  '--config.supervised.total_epochs=4',
  '--config.supervised.batch_size=100',
  '--config.supervised.loss=natural',
  '--config.eval.examples=40',
]
# What a shell, an ssh or a sloppy launcher would change.
HARD = [
  '--workdir=gs://bucket/a run',
  '--config=configs/quickstart.py',
  '--config.eval.eps=8/255',
  "--config.compare=('rocl','natural')",
  '--config.data.dir=$HOME/"two  words"',
  "--config.a=it's; echo `id` & * ? \\ # ~ !x {a,b}",
  '--config.model.name=',
]
TPU = ['--name=t', '--zone=z-a', '--accelerator_type=v4-16', '--spot']
GIVEN = ['--config=configs/quickstart.py', '--workdir=W']
QUICK = ['--poll=0.05', '--settle=3', '--backoff=0.1']
STANDINS = {
  'gcloud': 'fake_gcloud.py',
  'uv': 'fake_uv.py',
  **{
    name: f'fake_slurm.py {name}'
    for name in ('sbatch', 'srun', 'squeue', 'scancel', 'scontrol')
  },
}


def every_core():
  """Two processes on one core would wait for each other's time slices."""
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, range(os.cpu_count()))


@pytest.fixture
def environment(tmp_path):
  """The stand-ins first on PATH, a cloud and a home of the test's own."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  for name, script in STANDINS.items():
    path = folder / name
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/{script} "$@"\n')
    path.chmod(0o755)
  for name in ('cloud', 'home'):
    (tmp_path / name).mkdir()
  unset = ('FAKE_TRAIN', 'SSH_AUTH_SOCK')
  kept = {k: v for k, v in os.environ.items() if k not in unset}
  yield kept | {
    'PATH': f'{folder}{os.pathsep}{os.environ["PATH"]}',
    'HOME': str(tmp_path / 'home'),
    'FAKE_CLOUD': str(tmp_path / 'cloud'),
    'ROCL_JAX_REST': '0',
    'JAX_PLATFORMS': 'cpu',
  }
  mark = f'FAKE_CLOUD={tmp_path / "cloud"}'.encode()
  for process in pathlib.Path('/proc').glob('[0-9]*'):  # what a failure left
    with contextlib.suppress(OSError):
      if mark in (process / 'environ').read_bytes().split(b'\0'):
        os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def launch(environment):
  """Calls a launcher; (exit status, output, errors)."""

  def call(name, *arguments, root=ROOT, timeout=400, cwd=None, **more):
    done = subprocess.run(
      [sys.executable, str(root / 'launch' / name), *map(str, arguments)],
      env=environment | more,
      capture_output=True,
      stdin=subprocess.DEVNULL,
      text=True,
      timeout=timeout,
      cwd=cwd,
      preexec_fn=every_core,
    )
    return done.returncode, done.stdout, done.stderr

  return call


@pytest.fixture
def calls(tmp_path):
  """The verbs that the stand-ins were called with."""

  def read():
    path = tmp_path / 'cloud' / 'calls'
    return path.read_text().splitlines() if path.exists() else []

  return read


def wait_until(condition, seconds=300):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'it did not happen'
    time.sleep(0.05)


# What the scripts are.


def test_shell_scripts_are_clean():
  scripts = [
    path
    for path in (ROOT / 'launch').rglob('*')
    if path.is_file() and b'bash' in path.read_bytes().split(b'\n')[0]
  ]
  assert len(scripts) >= 3
  for script in scripts:
    assert os.access(script, os.X_OK), script
    assert 'set -euo pipefail' in script.read_text()
  found = pathlib.Path(sys.executable).with_name('shellcheck')
  shellcheck = str(found) if found.exists() else shutil.which('shellcheck')
  assert shellcheck, "pip install -e '.[dev]' brings it"
  done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('name', ['tpu', 'slurm', 'local'])
def test_help_says_every_flag(launch, name):
  status, text, _ = launch(name, '--help')
  assert status == 0
  module = load(name)
  for flag in module.FLAGS:
    assert f'--{flag}' in text
  for verb in getattr(module, 'VERBS', ()):
    assert f'\n{verb} ' in text


def load(name):
  path = str(ROOT / 'launch' / name)
  loader = importlib.machinery.SourceFileLoader(f'launch_{name}', path)
  spec = importlib.util.spec_from_loader(loader.name, loader)
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str(ROOT / 'launch'))
  try:
    loader.exec_module(module)
  finally:
    sys.path.remove(str(ROOT / 'launch'))
  return module


# What they would do.

GOLDEN = sorted((HERE / 'golden').glob('*.txt'))


@pytest.mark.parametrize('path', GOLDEN, ids=lambda p: p.stem)
def test_golden_dry_run(launch, calls, path):
  first, _, wanted = path.read_text().partition('\n')
  name, *arguments = shlex.split(first.removeprefix('$ launch/'))
  assert '--dry_run' in arguments
  status, out, errors = launch(name, *arguments)
  found = out + errors  # commands, then what the launcher says itself
  assert status == 0 and calls() == []
  if os.environ.get('ROCL_WRITE_GOLDEN'):
    path.write_text(f'{first}\n{found}')
    return
  assert found == wanted


def test_dry_run_quotes_so_that_a_shell_gives_back_the_arguments(launch):
  for name, more in (('tpu', TPU), ('slurm', ()), ('local', ())):
    verb = [] if name == 'local' else ['run']
    status, out, _ = launch(name, *verb, *more, '--dry_run', '--', *HARD)
    assert status == 0
    (line, *_) = [x for x in out.splitlines() if '8/255' in x]
    words = shlex.split(line)
    if name == 'tpu':  # one word for the shell here, several for the one there
      (remote,) = [w for w in words if w.startswith('--command=')]
      words = shlex.split(remote.removeprefix('--command='))
    start = words.index(HARD[0])
    assert words[start : start + len(HARD)] == HARD


# Mistakes.


@pytest.mark.parametrize(
  'name, arguments, told',
  [
    ('tpu', ['run'], '--name: missing'),
    ('tpu', ['fly', *TPU], 'verb: found fly, wanted one of create, setup'),
    ('tpu', [*TPU], 'verb: found nothing, wanted one of create'),
    ('tpu', ['create', '--name=t', '--zone=z'], '--accelerator_type: missing'),
    ('tpu', ['create', *TPU, '--slices=0'], "--slices: found '0', wanted a wh"),
    ('tpu', ['create', *TPU, '--slices'], '--slices: found nothing, wanted'),
    (
      'tpu',
      ['create', *TPU, '--name=A b'],
      "--name: found 'A b', wanted small",
    ),
    ('tpu', ['create', *TPU, '--price=x'], "--price: found 'x', wanted a num"),
    ('tpu', ['create', *TPU, '--spto'], 'no such flag; did you mean --spot?'),
    ('tpu', ['create', *TPU, '--spot=maybe'], "found 'maybe', wanted true or"),
    (
      'tpu',
      ['create', *TPU, '--accelerator_type=h9-8'],
      '--runtime_version: m',
    ),
    ('tpu', ['create', *TPU, '--accelerator_type=v4'], "found 'v4', wanted a"),
    ('tpu', ['create', *TPU], '--yes: missing; nobody can be asked here'),
    ('tpu', ['delete', *TPU], '--yes: missing; nobody can be asked here'),
    (
      'tpu',
      ['run', *TPU, '--', '--workdir=W', '--config=configs/quickstart.py'],
      '--yes: missing; nobody can',
    ),
    ('tpu', ['run', *TPU, '--', '--workdir=W'], '--config: missing; it comes'),
    (
      'tpu',
      ['run', *TPU, '--', '--workdir=W', '--config=configs/quickstrat.py:x'],
      "configs/quickstrat.py (did you mean 'quickstart.py'?)",
    ),
    ('tpu', ['run', *TPU, '--yes'], "--workdir: missing; it comes after '--'"),
    ('tpu', ['run', *TPU, '--config.seed=1'], "of train.py come after '--'"),
    ('tpu', ['stop', *TPU, '--', '--x'], '--: found arguments of train.py'),
    ('slurm', ['stop'], "--job: missing; 'stop' needs the number"),
    ('slurm', ['stop', '--job=x'], "--job: found 'x', wanted the number of a"),
    ('slurm', ['run', '--time=soon'], "--time: found 'soon', wanted a time"),
    ('slurm', ['run', '--nodes=2'], '--workdir: missing'),
    ('local', ['--processes=none'], "--processes: found 'none', wanted a wh"),
    ('local', ['fly', '--', '--workdir=W'], 'verb: found fly, wanted run'),
    ('local', ['--processes=2'], '--workdir: missing'),
  ],
)
def test_mistakes_are_told_in_one_line(launch, calls, name, arguments, told):
  status, out, errors = launch(name, *arguments)
  own = [x for x in errors.splitlines() if not x.startswith('# ')]
  assert status == 2 and out == ''
  assert len(own) == 1 and own[0].startswith(f'{name}: ') and told in own[0]
  assert all('describe' in call for call in calls())


@pytest.mark.parametrize('two_words', [False, True])
def test_a_config_is_named_as_from_the_folder_of_the_user(
  launch, tmp_path, two_words
):
  own = tmp_path / 'home' / 'own config.py'
  own.write_text('')

  def named(file):
    words = ['--config', file] if two_words else [f'--config={file}']
    status, out, errors = launch(
      'local', '--dry_run', '--', *words, '--workdir=W', cwd=own.parent
    )
    assert 'Traceback' not in errors
    return shlex.split(out.splitlines()[0]) if status == 0 else status, errors

  for file, wanted in (
    ('own config.py', own),
    ('~/own config.py:a word', f'{own}:a word'),
    ('configs/quickstart.py', ROOT / 'configs/quickstart.py'),
  ):
    words, _ = named(file)
    assert f'--config={wanted}' in words
  for file in ('~no-such-user/x.py', 'x' * 300, 'other.py'):
    status, errors = named(file)
    assert status == 2 and f': {file}' in errors and errors.count('\n') == 1


def test_cost_is_said_before_anything_is_created(launch, calls):
  status, _, errors = launch('tpu', 'create', *TPU, '--slices=2', '--price=1.5')
  assert status == 2 and calls() == []
  assert 'v4-16 x 2, spot: 16 chips, about 24.00 dollars an hour' in errors


# Cloud TPU.


def verbs(calls):
  return [shlex.split(x)[3] for x in calls if 'queued-resources' in x]


def test_every_verb_of_a_slice(launch, calls, environment, tmp_path):
  """create, setup, run, status, stop, delete, one by one; two workers."""
  assert launch('tpu', 'create', *TPU, *QUICK, '--yes')[0] == 0
  status, _, errors = launch('tpu', 'create', *TPU, *QUICK, '--yes')
  assert status == 3 and 'ALREADY_EXISTS' in errors
  marker = 'touch "$HOME/mounted"'
  command = ['setup', *TPU, *QUICK, f'--setup_command={marker}']
  assert launch('tpu', *command)[0] == 0
  assert launch('tpu', *command)[0] == 0  # again is nothing
  homes = sorted((tmp_path / 'cloud' / 't').glob('*/worker*'))
  assert len(homes) == 2
  assert all((home / 'mounted').exists() for home in homes)
  status, out, _ = launch('tpu', 'status', *TPU)
  assert out.splitlines() == ['t: ACTIVE', *['nothing ran here'] * 2]

  running = subprocess.Popen(
    [sys.executable, ROOT / 'launch/tpu', 'run', *TPU, *QUICK, '--', *HARD],
    env=environment | {'FAKE_TRAIN': 'wait'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    wait_until(lambda: all((home / 'argv.json').exists() for home in homes))
    status, out, _ = launch('tpu', 'status', *TPU)
    assert out.count('running: ') == 2
    assert launch('tpu', 'stop', *TPU)[0] == 0
    out, errors = running.communicate(timeout=60)
  finally:
    running.kill()
  assert running.returncode == 143, errors
  assert 't is still there: exit status 143' in errors
  assert 't is kept, and costs: v4-16 x 1, spot: 8 chips' in errors
  for home in homes:  # what arrived is what was asked for, to the letter
    assert json.loads((home / 'argv.json').read_text()) == HARD
  assert 'TPU_WORKER_ID=' in out and 'training' in out
  status, out, _ = launch('tpu', 'status', *TPU)
  assert out.count('ended with status 143') == 2
  assert launch('tpu', 'delete', *TPU, *QUICK, '--yes')[0] == 0
  status, out, _ = launch('tpu', 'status', *TPU)
  assert out == 't: none\n'
  assert not any(home.exists() for home in homes)
  assert verbs(calls()).count('create') == 2


@pytest.mark.parametrize(
  'train, wanted, creations',
  [
    ('0', 0, 1),
    ('2', 2, 1),  # a mistake is never tried again
    ('3', 3, 1),  # a run that failed by itself neither
  ],
)
def test_what_ends_a_run(launch, calls, train, wanted, creations):
  command = ['run', *TPU, *QUICK, '--yes', '--teardown=delete', '--settle=0.2']
  status, _, errors = launch('tpu', *command, '--', *GIVEN, FAKE_TRAIN=train)
  assert status == wanted, errors
  assert verbs(calls()).count('create') == creations
  assert 't is deleted' in errors


@pytest.mark.parametrize(
  'answers, wanted, done',
  [
    ('n\n', 2, []),
    ('y\nn\n', 0, ['create']),
    ('y\ny\n', 0, ['create', 'delete']),
  ],
)
def test_one_at_a_terminal_is_asked(environment, calls, answers, wanted, done):
  """Before creating, with the cost; and at the end before deleting."""
  ours, theirs = os.openpty()
  os.write(ours, answers.encode())
  command = [sys.executable, ROOT / 'launch/tpu', 'run', *TPU, *QUICK]
  ended = subprocess.run(
    [*command, '--', *GIVEN],
    env=environment | {'FAKE_TRAIN': '0'},
    stdin=theirs,
    capture_output=True,
    text=True,
  )
  os.close(ours)
  os.close(theirs)
  assert ended.returncode == wanted, ended.stderr
  where, _, cost, question = ended.stderr.splitlines()[:4]
  assert 'on the disks of the workers' in where
  assert '8 chip-hours an hour until deleted' in cost
  assert question.startswith('Create t, and again at most 20 times? [y/N]')
  assert [v for v in verbs(calls()) if v in ('create', 'delete')] == done
  if done:
    assert 'Delete t, with all that lies on its own disks' in ended.stderr


def preempt(environment, *more):
  subprocess.run(
    [sys.executable, HERE / 'fake_gcloud.py', 'preempt', 't', *more],
    env=environment,
    check=True,
  )


def test_slices_are_told_of_each_other(launch):
  command = ['run', *TPU, *QUICK, '--yes', '--slices=2', '--settle=0.2', '--']
  status, out, errors = launch(
    'tpu', *command, *GIVEN, FAKE_TRAIN='0', FAKE_WORKERS='1'
  )
  assert status == 0, errors
  for line in ('NUM_SLICES=2', 'SLICE_ID=0', 'SLICE_ID=1'):
    assert f'MEGASCALE_{line}\n' in out
  assert out.count('training') == 2


def run_and_preempt(environment, command, ready, times=1, more=()):
  """Runs a launcher, and preempts its slice when the condition holds."""
  running = subprocess.Popen(
    [sys.executable, ROOT / 'launch/tpu', 'run', *map(str, command)],
    env=environment,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    preexec_fn=every_core,
  )
  try:
    for _ in range(times):
      wait_until(ready)
      preempt(environment, *more)
    out, errors = running.communicate(timeout=400)
  finally:
    running.kill()
  return running.returncode, out, errors


@pytest.mark.parametrize('more', [(), ('--look_alive',)])
def test_retries_have_a_limit(environment, calls, tmp_path, more):
  """Preempted twice, one retry; also where gcloud learns of it late."""
  started = tmp_path / 'cloud' / 'started'

  def ready():
    new = started.exists() and len(started.read_text().splitlines()) == 2
    if new:
      started.unlink()
    return new

  command = [*TPU, *QUICK, '--yes', '--retries=1', '--', *GIVEN]
  status, _, errors = run_and_preempt(
    environment | {'FAKE_TRAIN': 'wait'}, command, ready, 2, more
  )
  assert status == 3
  assert 't was preempted: recreating it, 1 of 1' in errors
  assert '--retries: t was preempted after 1 retries; the same' in errors
  assert verbs(calls()).count('create') == 2


def test_an_outage_of_gcloud_is_no_preemption(launch, calls):
  command = ['run', *TPU, *QUICK, '--yes', '--settle=0.5', '--', *GIVEN]
  status, _, errors = launch('tpu', *command, FAKE_TRAIN='3', FAKE_OUTAGE='1')
  assert status == 3 and 't is still there: exit status 3' in errors
  assert verbs(calls()).count('create') == 1


def test_a_leftover_is_not_recreated_without_a_question(
  launch, environment, calls
):
  assert launch('tpu', 'create', *TPU, *QUICK, '--yes')[0] == 0
  preempt(environment)
  status, _, errors = launch('tpu', 'run', *TPU, *QUICK, '--', *GIVEN)
  assert status == 2 and '--yes: missing; nobody can be asked' in errors
  assert verbs(calls()).count('create') == 1


def test_a_slice_that_never_comes(launch):
  status, _, errors = launch(
    'tpu', 'create', *TPU, *QUICK, '--yes', FAKE_FIRST_STATE='FAILED'
  )
  assert status == 3 and 't is FAILED: `gcloud compute tpus' in errors
  command = ['create', *TPU, *QUICK, '--yes', '--name=u']
  status, _, errors = launch('tpu', *command, FAKE_FIRST_STATE='SUSPENDING')
  assert status == 3 and 'u was taken away before it was there' in errors


def test_a_worker_is_found_again(environment, tmp_path):
  """A broken connection neither ends a run nor starts a second one."""
  script = str(ROOT / 'launch/worker.sh')

  def worker(*arguments):
    return subprocess.run(
      [script, *arguments], env=environment, capture_output=True, text=True
    )

  sleep = ['bash', '-c', 'echo "$1"; sleep 3; exit 7', '-', 'a  b $HOME']
  first = subprocess.Popen([script, 'run', '1', *sleep], env=environment)
  state = tmp_path / 'home' / '.rocl_jax_run'
  wait_until(lambda: (state / 'pid').exists())
  first.kill()
  other = worker('run', '2', 'true')
  assert other.returncode == 2 and 'another command runs here' in other.stderr
  again = worker('run', '2', *sleep)  # follows the one that runs
  assert again.returncode == 7 and 'a  b $HOME' in again.stdout
  assert worker('run', '1', *sleep).returncode == 7  # ended: tells how
  assert worker('run', '2', 'true').returncode == 0  # a new one
  wait_until(lambda: worker('status').stdout.startswith('ended with status 0'))
  assert worker('fly').returncode == 2


# The whole story, with real training.


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """The folder of a run of two processes, by launch/local."""
  workdir = tmp_path_factory.mktemp('runs') / 'straight'
  done = local(workdir, 2)
  assert done.returncode == 0, done.stderr
  assert 'epoch 4/4' in done.stderr and 'report.md' in done.stdout
  return workdir


def local(workdir, count, config=SMALL):
  return subprocess.run(
    [sys.executable, ROOT / 'launch/local', f'--processes={count}', '--']
    + [*config, f'--workdir={workdir}'],
    env=plain(),
    capture_output=True,
    text=True,
    preexec_fn=every_core,
  )


def plain(devices=1):
  flag = f' --xla_force_host_platform_device_count={devices}'
  return os.environ | {
    'XLA_FLAGS': os.environ['XLA_FLAGS'] + flag,
    'JAX_PLATFORMS': 'cpu',
  }


def weights(workdir, stage='1_supervised'):
  variables, _ = checkpoint.load_model(epath.Path(workdir) / stage / 'model')
  return {k: np.asarray(v) for k, v in flatten(variables).items()}


def assert_same(one, other):
  a, b = weights(one), weights(other)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def saved(workdir, step):
  folder = epath.Path(workdir) / '1_supervised' / 'checkpoints'
  steps = checkpoint.steps(folder) if folder.exists() else []
  return bool(steps) and steps[-1] >= step


def resumed(text):
  return [x for x in text.splitlines() if 'resumed at step' in x]


@pytest.mark.slow  # a story of minutes
def test_a_preempted_slice_is_recreated_and_the_run_goes_on(
  environment, calls, tmp_path, uninterrupted
):
  """create, run, kill -9 of both workers, recreated, resumed, finished."""
  workdir = tmp_path / 'disk' / 'w'
  command = [*TPU, *QUICK, '--yes', '--teardown=delete', '--']
  command += [*SMALL, f'--workdir={workdir}']
  status, out, errors = run_and_preempt(
    environment, command, lambda: saved(workdir, 6)
  )
  assert status == 0, out + errors
  (line,) = resumed(out + errors)
  assert int(line.split('resumed at step ')[1].split()[0]) >= 6
  assert 't was preempted: recreating it, 1 of 20' in errors
  ours = [v for v in verbs(calls()) if v != 'describe']
  once = ['create', 'scp', 'ssh', 'ssh']  # copy, set up, train
  assert ours == [*once, 'delete', *once, 'delete']
  assert_same(workdir, uninterrupted)


@pytest.mark.slow
def test_slices_train_as_one(launch, environment, tmp_path, uninterrupted):
  """Two slices of one worker are what one slice of two is."""
  workdir = tmp_path / 'w'
  command = ['run', *TPU, *QUICK, '--yes', '--slices=2', '--']
  status, out, errors = launch(
    'tpu', *command, *SMALL, f'--workdir={workdir}', FAKE_WORKERS='1'
  )
  assert status == 0, out + errors
  assert 'MEGASCALE_NUM_SLICES=2' in out
  assert_same(workdir, uninterrupted)


@pytest.fixture
def checkout(environment, tmp_path):
  """A copy of this checkout, with .venv made by `launch/slurm setup`."""
  folder = tmp_path / 'checkout'
  listed = subprocess.run(
    ['git', '-C', ROOT, 'ls-files'], capture_output=True, text=True, check=True
  )
  for name in listed.stdout.splitlines():
    if (ROOT / name).exists():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, folder / name)
  return folder


def job_of(tmp_path, job):
  return json.loads((tmp_path / 'cloud' / 'jobs' / f'{job}.json').read_text())


@pytest.mark.slow
def test_a_job_at_its_time_limit_is_requeued_and_goes_on(
  launch, calls, environment, checkout, tmp_path, uninterrupted
):
  """setup, run, time limit, saved, requeued, resumed, finished."""
  assert launch('slurm', 'create', root=checkout)[0] == 0
  assert launch('slurm', 'setup', '--environment=cpu', root=checkout)[0] == 0
  workdir = tmp_path / 'shared disk' / 'w'
  status, out, errors = launch(
    *('slurm', 'run', '--nodes=2', '--', *SMALL, f'--workdir={workdir}'),
    root=checkout,
  )
  job = out.strip()
  assert status == 0 and job.isdigit(), errors
  assert '2 GPUs for up to 24:00:00 each time' in errors
  standin = [sys.executable, HERE / 'fake_slurm.py']
  log = checkout / 'runs' / 'slurm' / f'{job}.log'
  try:
    wait_until(lambda: saved(workdir, 6))
    status, out, _ = launch('slurm', 'status', f'--job={job}', root=checkout)
    assert status == 0 and f'{job} RUNNING' in out
    subprocess.run([*standin, 'limit', job], env=environment, check=True)
    wait_until(lambda: job_of(tmp_path, job).get('status') is not None)
  finally:
    launch('slurm', 'delete', f'--job={job}', root=checkout)
  text = log.read_text()
  assert 'time limit: the run saves' in text
  assert f'scontrol requeue {job}' in calls()
  (line,) = resumed(text)
  assert job_of(tmp_path, job)['status'] == 0, text
  assert_same(workdir, uninterrupted)


@pytest.mark.parametrize(
  'train, end, wanted, restarts',
  [
    ('2', None, 2, 0),
    ('wait', 'stop', 143, 0),
    ('wait 0', 'fail', 0, 1),
    ('wait 0', 'limit', 0, 1),
  ],
)
def test_what_ends_a_job(
  launch, checkout, environment, tmp_path, train, end, wanted, restarts
):
  """A mistake, `stop`; a node's failure or the time limit do not end it."""
  launch('slurm', 'setup', '--environment=cpu', root=checkout)
  command = ['slurm', 'run', '--gpus_per_node=2', '--', *HARD]
  _, out, errors = launch(*command, root=checkout, FAKE_TRAIN=train)
  job = out.strip()
  assert job, errors
  started = tmp_path / 'cloud' / 'started'
  wait_until(started.exists, 20)
  wait_until(lambda: len(started.read_text().splitlines()) >= 2, 20)
  if end == 'stop':
    assert launch('slurm', 'stop', f'--job={job}', root=checkout)[0] == 0
  elif end:
    subprocess.run(
      [sys.executable, HERE / 'fake_slurm.py', end, job],
      env=environment,
      check=True,
    )
  wait_until(lambda: job_of(tmp_path, job).get('status') is not None, 30)
  found = job_of(tmp_path, job)
  assert (found['status'], found['restarts']) == (wanted, restarts)
  for rank in (0, 1):
    path = tmp_path / 'home' / f'{rank}.json'
    assert json.loads(path.read_text()) == HARD


def test_two_local_processes_match_one(tmp_path, uninterrupted):
  """Two processes of a device each, and one process of two."""
  workdir = tmp_path / 'w'
  done = subprocess.run(
    [sys.executable, 'train.py', *SMALL, f'--workdir={workdir}'],
    cwd=ROOT,
    env=plain(2),
    capture_output=True,
    text=True,
    preexec_fn=every_core,
  )
  assert done.returncode == 0, done.stderr
  assert_same(workdir, uninterrupted)


@pytest.mark.slow
def test_four_local_processes_match_one(tmp_path):
  """One step, to rounding: four terms are not added in the same order, and
  after twenty steps that makes another run (docs/devices.md)."""
  several, one = tmp_path / 'several', tmp_path / 'one'
  step = ['--config.supervised.total_epochs=1']
  step += ['--config.supervised.batch_size=1000']
  done = local(several, 4, [*SMALL, *step])
  assert done.returncode == 0, done.stderr
  done = subprocess.run(
    [sys.executable, 'train.py', *SMALL, *step, f'--workdir={one}'],
    cwd=ROOT,
    env=plain(4),
    capture_output=True,
    text=True,
    preexec_fn=every_core,
  )
  assert done.returncode == 0, done.stderr
  a, b = weights(several), weights(one)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)


def test_a_python_without_the_environment_is_named(tmp_path):
  arguments = ['--config=configs/quickstart.py', f'--workdir={tmp_path}/w']
  done = subprocess.run(
    [sys.executable, '-S', ROOT / 'launch/local', '--', *arguments],
    env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert f'{sys.executable} has no jax' in done.stderr


LOCAL = """
import signal, sys, time
what, number = sys.argv[1], int(sys.argv[2])
if what == 'asked':
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print('here', number, flush=True)
if what == 'dies' and number == 1:
  sys.exit(9)
if what == 'mistake':
  sys.exit(2 + number)
time.sleep(60)
"""


@pytest.mark.parametrize(
  'what, wanted', [('asked', 143), ('dies', 137), ('mistake', 2)]
)
def test_local_processes_end_together(tmp_path, what, wanted):
  """Asked to; with force, after one died; and the status that tells most."""
  driver = f"""
import importlib.machinery, importlib.util, sys
sys.path.insert(0, {str(ROOT / 'launch')!r})
loader = importlib.machinery.SourceFileLoader('l', 'launch/local')
spec = importlib.util.spec_from_loader('l', loader)
local = importlib.util.module_from_spec(spec)
loader.exec_module(local)
local.PATIENCE = 1
commands = [[sys.executable, '-c', {LOCAL!r}, {what!r}, str(i)] for i in (0, 1)]
sys.exit(local.run_all(commands, False))
"""
  process = subprocess.Popen(
    [sys.executable, '-c', driver],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'here 0\n'  # the first one's as it is
  if what == 'asked':
    assert process.stderr.readline() == '[1] here 1\n'
    process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=30)
  assert process.returncode == wanted, errors
  assert what == 'asked' or '[1] here 1' in errors
  assert 'process 1: exit status' in errors


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_local_processes_train_the_quickstart(tmp_path, count):
  """The whole quickstart, beside one process with as many devices."""
  config = [
    '--config=configs/quickstart.py',
    '--config.supervised.batch_size=52',
  ]
  config += ['--config.compare=', '--config.model.width=4']
  done = local(tmp_path / 'several', count, config)
  assert done.returncode == 0, done.stderr
  done = subprocess.run(
    [sys.executable, 'train.py', *config, f'--workdir={tmp_path / "one"}'],
    cwd=ROOT,
    env=plain(count),
    capture_output=True,
    text=True,
    preexec_fn=every_core,
  )
  assert done.returncode == 0, done.stderr
  tables = []
  for name in ('several', 'one'):
    records = json.loads((tmp_path / name / 'results.json').read_text())
    tables.append(
      {
        (r['stage'], key): r[key]
        for r in records
        if r['selection'] == 'last' and r['split'] == 'test'
        for key in ('clean_top1', 'robust_top1')
      }
    )
  assert tables[0].keys() == tables[1].keys() and tables[0]
  for key, value in tables[0].items():
    assert abs(value - tables[1][key]) < 3, (key, tables)


# Kubernetes, the container, the locks.

MANIFESTS = [
  pytest.param(document, id=f'{path.stem}-{document["kind"]}')
  for path in sorted((ROOT / 'launch/k8s').glob('*.yaml'))
  for document in yaml.safe_load_all(path.read_text())
]


def job_within(document):
  """What Kubernetes itself will see, of a JobSet the jobs that it makes."""
  if document['kind'] != 'JobSet':
    return document
  schema = json.loads((HERE / 'jobset.schema.json').read_text())
  jsonschema.validate(document, schema)
  (replicated,) = document['spec']['replicatedJobs']
  spec = replicated['template']['spec']
  meta = {'name': f'{document["metadata"]["name"]}-{replicated["name"]}-0'}
  return {
    'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': meta, 'spec': spec
  }  # fmt: skip


@pytest.mark.parametrize('document', MANIFESTS)
def test_manifests_are_what_kubernetes_takes(document):
  kubernetes_validate.validate(job_within(document), '1.32', strict=True)


def test_a_wrong_manifest_is_refused():
  """The schemas are not so wide that anything passes."""
  (document,) = [m.values[0] for m in MANIFESTS if 'JobSet' in m.id]
  wrong = json.loads(json.dumps(document))
  wrong['spec']['replicatedJobs'][0]['replica'] = 2
  with pytest.raises(jsonschema.ValidationError):
    job_within(wrong)
  wrong = json.loads(json.dumps(document))
  job = wrong['spec']['replicatedJobs'][0]['template']['spec']
  job['template']['spec']['restart'] = 'Never'
  with pytest.raises(kubernetes_validate.ValidationError):
    kubernetes_validate.validate(job_within(wrong), '1.32', strict=True)


def jobs():
  for parameter in MANIFESTS:
    document = parameter.values[0]
    if document['kind'] in ('Job', 'JobSet'):
      yield document['kind'], job_within(document)['spec']


def test_pods_have_time_to_save_and_mistakes_are_not_tried_again():
  found = dict(jobs())
  assert set(found) == {'Job', 'JobSet'}
  for spec in found.values():
    pod = spec['template']['spec']
    assert spec['completionMode'] == 'Indexed'
    assert spec['completions'] == spec['parallelism'] > 1
    assert pod['terminationGracePeriodSeconds'] >= 30
    assert pod['restartPolicy'] == 'Never'  # what podFailurePolicy needs
    codes = [
      rule['onExitCodes']['values']
      for rule in spec['podFailurePolicy']['rules']
      if rule['action'] == 'FailJob'
    ]
    assert codes == [[2]]
    (container,) = pod['containers']
    assert container['command'] == ['python', 'train.py']


def test_pods_find_each_other():
  """The variables of the job, as its pods will see them."""
  from rocl_jax import cluster

  documents = [m.values[0] for m in MANIFESTS]
  (service,) = [d for d in documents if d['kind'] == 'Service']
  (job,) = [d for d in documents if d['kind'] == 'Job']
  pod = job['spec']['template']
  assert service['spec']['clusterIP'] == 'None'
  assert service['spec']['publishNotReadyAddresses'] is True
  assert pod['spec']['subdomain'] == service['metadata']['name']
  labels = {'batch.kubernetes.io/job-name': job['metadata']['name']}
  assert service['spec']['selector'] == labels
  variables = {e['name']: e for e in pod['spec']['containers'][0]['env']}
  field = variables['JAX_PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']
  index = 'batch.kubernetes.io/job-completion-index'
  assert field == f"metadata.annotations['{index}']"
  values = {k: v.get('value', '3') for k, v in variables.items()}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in values.items():
      patch.setenv(name, value)
    member = cluster.find('', 0, 0)
  first = f'{job["metadata"]["name"]}-0.{service["metadata"]["name"]}'
  assert member.address == f'{first}:8476'
  assert (member.count, member.index) == (job['spec']['completions'], 3)


@pytest.mark.parametrize('name', ['cpu', 'cuda', 'tpu'])
def test_locks_hold_what_the_project_needs(name):
  """Every requirement of pyproject.toml, in a version that it allows."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  extras = project['optional-dependencies']
  wanted = [*project['dependencies'], *extras.get(name, [])]
  if name == 'tpu':
    wanted += extras['gcs']
  lock = (ROOT / f'launch/locks/requirements-{name}.txt').read_text()
  locked = dict(re.findall(r'^([\w.-]+)==(\S+)', lock, re.M))
  for text in wanted:
    requirement = packaging.requirements.Requirement(text)
    found = locked[packaging.utils.canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(found), text
  assert lock.count('--hash=sha256:') >= len(locked)
  assert 'uv pip compile --python-version 3.11' in lock
  assert {'cuda': 'nvidia-nccl-cu13', 'tpu': 'libtpu'}.get(
    name, 'jax'
  ) in locked


def test_the_container_is_made_of_the_locks():
  text = (ROOT / 'launch/Containerfile').read_text()
  assert 'launch/locks/requirements-${ENVIRONMENT}.txt' in text
  assert '--require-hashes' in text and 'python:3.11' in text
