"""Two real processes that train together: agreement, stopping, dying."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from rocl_jax import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
SMALL = [
  '--config=configs/quickstart.py',
  '--config.model.name=resnet8',
  '--config.model.width=4',
  '--config.stages=supervised,',
  '--config.compare=',
  '--config.save_steps=5',
  '--config.supervised.total_epochs=4',
  '--config.supervised.batch_size=100',
  '--config.supervised.attack.steps=2',
  '--config.eval.examples=40',
]


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  kept = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return kept | {
    'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('cache')),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
    'JAX_PLATFORMS': 'cpu',
  }


@pytest.fixture
def start(environment):
  """Starts processes; what is left of them is killed in the end."""
  running = []

  def begin(*arguments, count=2, changes=()):
    address = f'127.0.0.1:{free_port()}'
    for index in range(count):
      more = changes[index] if changes else []
      command = [sys.executable, 'train.py', *map(str, arguments), *more]
      command += [f'--coordinator={address}', f'--processes={count}']
      running.append(
        subprocess.Popen(
          [*command, f'--process={index}'],
          cwd=ROOT,
          env=environment,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    return running[-count:]

  yield begin
  for process in running:
    if process.poll() is None:
      process.kill()
    process.communicate()


def wait_for(process, word, lines=200):
  """Reads what a process says until the word comes."""
  for _ in range(lines):
    line = process.stderr.readline()
    if word in line or not line:
      assert line, f'it ended before it said {word!r}'
      return


def end(processes, timeout=120):
  """(status, standard error) of each."""
  deadline = time.monotonic() + timeout
  ends = []
  for process in processes:
    _, errors = process.communicate(timeout=deadline - time.monotonic())
    ends.append((process.returncode, errors))
  return ends


def test_two_processes_stop_together(start, tmp_path):
  """SIGTERM to one of them: both stop after the same step, and go on."""
  workdir = tmp_path / 'w'
  first, second = start(*SMALL, f'--workdir={workdir}')
  wait_for(first, 'epoch 1/4')
  second.send_signal(signal.SIGTERM)
  for status, errors in end([first, second]):
    assert status == 143, errors
  saves = epath.Path(workdir) / '1_supervised' / 'checkpoints'
  newest = checkpoint.steps(saves)[-1]
  assert newest >= 12 and not (workdir / '1_supervised' / 'model').exists()

  both = start(*SMALL, f'--workdir={workdir}')
  (status, errors), (other, silent) = end(both)
  assert status == other == 0, errors + silent
  assert f'resumed at step {newest} of 48' in errors
  assert 'epoch' not in silent  # of several the first one speaks
  rows = (workdir / '1_supervised' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(row)['epoch'] for row in rows] == [1, 2, 3, 4]
  assert json.loads((workdir / 'results.json').read_text())


def test_a_process_that_dies_is_named(start, tmp_path):
  first, second = start(*SMALL, f'--workdir={tmp_path}')
  wait_for(first, 'epoch 1/4')
  second.kill()
  began = time.monotonic()
  ((status, errors),) = end([first], timeout=60)
  assert time.monotonic() - began < 40
  assert status == 3, errors
  assert 'process 1 on ' in errors and 'sign of life' in errors
  assert 'Traceback' not in errors
  run = json.loads((tmp_path / 'run.json').read_text())
  assert run['host'] in errors


def test_processes_that_disagree_are_told(start, tmp_path):
  both = start(
    *SMALL, f'--workdir={tmp_path}', changes=([], ['--config.seed=1'])
  )
  for status, errors in end(both):
    assert status == 2, errors
    assert 'config of ours.seed: process 1 on ' in errors
    assert 'has 1, process 0 on ' in errors


NEVER = """
import sys
from rocl_jax import processes
processes.start(sys.argv[1], 2, 0, join=4)
"""


def test_a_process_that_never_comes(environment):
  began = time.monotonic()
  result = subprocess.run(
    [sys.executable, '-c', NEVER, f'127.0.0.1:{free_port()}'],
    env=environment,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert time.monotonic() - began < 30
  assert result.returncode == 3
  assert 'process 0 of 2: not all 2 processes have come' in result.stderr
