"""Two real processes that train together: agreement, stopping, dying."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image

from rocl_jax import checkpoint, processes
from rocl_jax.cluster import Member
from rocl_jax.trees import flatten

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
  '--config.supervised.loss=natural',
  '--config.eval.examples=40',
]


def every_core():
  """Two processes on one core would wait for each other's time slices."""
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, range(os.cpu_count()))


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


@pytest.fixture
def environment():
  return os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}


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
          preexec_fn=every_core,
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


def started(code, environment, numbers=(0, 1)):
  """Processes that run a few lines; these get an address and their number."""
  address = f'127.0.0.1:{free_port()}'
  return [
    subprocess.Popen(
      [sys.executable, '-c', code, address, str(number)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in numbers
  ]


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
  assert f'resumed at step {newest} of 52' in errors
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


@pytest.mark.slow
def test_large_images_stream_to_each_process(start, environment, tmp_path):
  """A folder as of ImageNet: two processes that read a part each, and one of
  two devices that hold all."""
  random = np.random.default_rng(0)
  for split, count in (('train', 20), ('test', 4)):
    for name in ('n01440764', 'n01443537'):
      folder = tmp_path / 'images' / split / name
      folder.mkdir(parents=True)
      for i in range(count):
        pixels = random.integers(0, 256, (224, 224, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f'{name}_{i}.JPEG')
  config = [*SMALL, '--config.data.source=folder', '--config.data.validation=4']
  config += [f'--config.data.dir={tmp_path / "images"}']
  config += ['--config.supervised.batch_size=8']
  streamed = ['--config.data.resident=false', f'--workdir={tmp_path / "parts"}']
  for status, errors in end(start(*config, *streamed), timeout=600):
    assert status == 0, errors
  flags = environment.get('XLA_FLAGS', '')
  flags += ' --xla_force_host_platform_device_count=2'
  environment['XLA_FLAGS'] = flags
  ((status, errors),) = end(
    start(*config, f'--workdir={tmp_path / "whole"}', count=1), timeout=600
  )
  assert status == 0, errors
  one, other = (
    checkpoint.load_model(epath.Path(tmp_path) / name / '1_supervised/model')[0]
    for name in ('parts', 'whole')
  )
  one, other = flatten(one), flatten(other)
  assert one.keys() == other.keys()
  for path in one:
    np.testing.assert_array_equal(one[path], other[path], err_msg=path)


def test_the_first_process_that_dies_is_named(environment):
  """Before JAX aborts the others without a word."""
  first, second = started(WAIT, environment)
  while (said := second.stdout.readline()) != 'together\n':
    assert said  # Gloo's
  first.kill()
  (status, errors), _ = end([second, first], timeout=20)
  # Its host is named if it had time to say it.
  assert status == 3 and re.search('process 0 (on .*)?has gone', errors)


def test_processes_that_disagree_are_told(start, tmp_path):
  both = start(
    *SMALL, f'--workdir={tmp_path}', changes=([], ['--config.seed=1'])
  )
  for status, errors in end(both):
    assert status == 2, errors
    assert 'config of ours.seed: process 1 on ' in errors
    assert 'has 1, process 0 on ' in errors


WAIT = """
import sys, time
from rocl_jax import cluster, processes
processes.start(cluster.find(sys.argv[1], 2, int(sys.argv[2])))
processes.from_first(lambda: 1)
print('together', flush=True)
time.sleep(60)
"""

AGREE = """
import sys
from rocl_jax import cluster, errors, processes
index = int(sys.argv[2])
processes.start(cluster.find(sys.argv[1], 2, index))
facts = {
  'config of ours': {'seed': 0}, 'versions': {'jax': '1'}, 'code': 'abc',
  'images': [1, 2, 3],
}
for name, other in (
  ('code', 'abd'), ('versions', {'jax': '2'}), ('images', [1, 2, 4]),
):
  try:
    processes.agree(facts | ({name: other} if index else {}))
  except errors.UserError as e:
    print(e, flush=True)
processes.agree(facts)
processes.finish()
"""


def test_each_process_hears_what_differs(environment):
  """Code, versions, images: the command compares these, too."""
  for process in started(AGREE, environment):
    said, _ = process.communicate(timeout=60)
    told = [line for line in said.splitlines() if ': process 1 on ' in line]
    assert [line.split(':')[0] for line in told] == [
      *('code', 'versions.jax', 'images'),
    ]
    assert all('wanted the same everywhere' in line for line in told)
    assert process.returncode == 0


HANG = """
import sys, time
from rocl_jax import cluster, processes
processes.STALL = 5
index = int(sys.argv[2])
processes.start(cluster.find(sys.argv[1], 2, index))
processes.from_first(lambda: 1)
if index == 1:
  time.sleep(60)
processes.from_first(lambda: 2)
"""


def test_a_process_that_hangs_is_named(environment):
  """It lives, and gives signs of life, but never comes to a collective."""
  (status, errors), _ = end(started(HANG, environment), timeout=60)
  assert status == 3 and 'process 1 on ' in errors and 'hangs' in errors


JOIN = """
import dataclasses, sys
from rocl_jax import cluster, errors, processes
member = cluster.find(sys.argv[1], 3, int(sys.argv[2]))
try:
  processes.start(dataclasses.replace(member, join=3))
except errors.RunFailed as e:
  print(e)
"""


@pytest.mark.parametrize(
  'numbers, told',
  [
    ([0, 1], 'process 2 has not come'),
    ([1], 'process 0 has not come'),
    ([0, 1, 1], 'two processes have come as number 1 of 3'),
  ],
)
def test_a_process_that_never_comes_is_named(environment, numbers, told):
  began = time.monotonic()
  waiting = started(JOIN, environment, numbers)
  for number, process in zip(numbers, waiting, strict=True):
    said, _ = process.communicate(timeout=60)
    assert f'process {number} of 3 (by flags): {told}' in said
  assert time.monotonic() - began < 30


@pytest.mark.parametrize('host', ['127.0.0.1', '::1'])
def test_processes_meet_by_either_protocol(host, monkeypatch):
  if ':' in host:
    try:
      socket.create_server((host, 0), family=socket.AF_INET6).close()
    except OSError:
      pytest.skip('this machine has no IPv6')
  monkeypatch.setattr(processes, '_OPEN', [])
  monkeypatch.setattr(processes._Group, 'line', None)
  found, port = {}, free_port()

  def meet(index):
    found[index] = processes._meet(host, port, 2, index, 20, [])

  threads = [threading.Thread(target=meet, args=(i,)) for i in (0, 1)]
  [t.start() for t in threads], [t.join() for t in threads]
  assert found == {0: '', 1: ''}
  for line in (*processes._OPEN, processes._Group.line):
    line.close()


@pytest.mark.parametrize(
  'member, told',
  [
    (Member('h:1', 8, 0, source='slurm'), 'process 2, 3, 4, 5, 6 and 1 more'),
    (Member('h:1', 2, 1), 'process 0 at h:1'),
  ],
)
def test_who_is_awaited_is_said_at_once(member, told, capfd, monkeypatch):
  """In an interactive shell of SLURM nobody else was started."""
  monkeypatch.setattr(processes, '_AT_ONCE', 0.01)
  here = [(1, None)]
  processes._say_who_is_awaited(member, here, threading.Event())
  said = capfd.readouterr().err
  assert f'{told}; ' in said and '--processes=1' in said
  assert said.count('\n') == 1
  met = threading.Event()
  met.set()
  processes._say_who_is_awaited(member, here, met)
  assert not capfd.readouterr().err
