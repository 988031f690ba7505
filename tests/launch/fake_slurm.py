"""A stand-in for SLURM: sbatch, srun, squeue, scancel and scontrol.

The state lies in $FAKE_CLOUD. A job's script runs here, with the variables of
a real one, and `srun` starts its tasks as local processes. A job that was
requeued starts again with SLURM_RESTART_COUNT. Of its own it has

  fake_slurm.py limit JOB    USR1 to the batch script, as --signal=B:USR1 asks
  fake_slurm.py fail JOB     a node fails: kill -9 of all, and requeued
"""

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

CLOUD = pathlib.Path(os.environ['FAKE_CLOUD'])
SBATCH = {
  'parsable', 'chdir', 'job-name', 'nodes', 'ntasks-per-node', 'time', 'gres',
  'partition', 'account', 'output', 'qos', 'requeue', 'open-mode', 'signal',
}  # fmt: skip


def path_of(job):
  return CLOUD / 'jobs' / f'{job}.json'


def read(job):
  try:
    return json.loads(path_of(job).read_text())
  except FileNotFoundError:
    sys.exit(f'slurm_load_jobs error: Invalid job id specified: {job}')


def change(job, **fields):
  path = path_of(job)
  new = path.with_suffix(f'.new{os.getpid()}')
  new.write_text(json.dumps(read(job) | fields))
  new.replace(path)


def options(words):
  """(flags, what follows them)."""
  flags = {}
  for i, word in enumerate(words):
    if not word.startswith('--'):
      return flags, words[i:]
    name, _, value = word[2:].partition('=')
    if name not in SBATCH:
      sys.exit(f"sbatch: unrecognized option '{word}'")
    flags[name] = value
  return flags, []


def sbatch(arguments):
  flags, (script, *rest) = options(arguments)
  lines = pathlib.Path(script).read_text().splitlines()
  inside = [
    line.split(maxsplit=1)[1] for line in lines if re.match('#SBATCH ', line)
  ]
  flags = options([w for line in inside for w in shlex.split(line)])[0] | flags
  assert 'requeue' in flags and flags['signal'].startswith('B:USR1@')
  jobs = CLOUD / 'jobs'
  jobs.mkdir(parents=True, exist_ok=True)
  job = str(4096 + len(list(jobs.glob('*.json'))))
  (jobs / f'{job}.json').write_text(
    json.dumps({'state': 'PENDING', 'restarts': 0, 'flags': flags})
  )
  # As the real one, it keeps a copy of the script.
  copy = jobs / f'{job}.sh'
  copy.write_text('\n'.join(lines) + '\n')
  subprocess.Popen(
    [sys.executable, __file__, 'controller', job, str(copy), *rest],
    start_new_session=True,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  print(job if 'parsable' in flags else f'Submitted batch job {job}')


def controller(job, script, *arguments):
  """Runs the job, as often as it is requeued."""
  flags = read(job)['flags']
  output = pathlib.Path(flags['chdir']) / flags['output'].replace('%j', job)
  tasks = int(flags['nodes']) * int(flags['ntasks-per-node'])
  while True:
    environment = {
      **os.environ,
      'FAKE_JOB': job,
      'SLURM_JOB_ID': job,
      'SLURM_NTASKS': str(tasks),
      'SLURM_JOB_NUM_NODES': flags['nodes'],
    }
    restarts = read(job)['restarts']
    if restarts:
      environment['SLURM_RESTART_COUNT'] = str(restarts)
    with output.open('a') as log:
      batch = subprocess.Popen(
        ['bash', script, *arguments],
        cwd=flags['chdir'],
        env=environment,
        stdout=log,
        stderr=log,
      )
      change(job, state='RUNNING', batch=batch.pid, requeued=False)
      status = batch.wait()
    kill(job, signal.SIGKILL)  # what is left of the step
    if not read(job)['requeued']:
      break
    change(job, state='PENDING', restarts=restarts + 1)
  cancelled = read(job)['state'] == 'CANCELLED'
  done = 'COMPLETED' if status == 0 else 'FAILED'
  change(job, state='CANCELLED' if cancelled else done, status=status)


def srun(arguments):
  """The tasks of a step; signals are passed on to them."""
  assert arguments[0] == '--kill-on-bad-exit=1'
  command = arguments[1:]
  n = int(os.environ['SLURM_NTASKS'])
  per_node = n // int(os.environ['SLURM_JOB_NUM_NODES'])
  # JAX takes the port from the job's number; other tests may have it.
  port = free_ports()
  running = []
  for i in range(n):
    more = {
      'SLURM_STEP_NODELIST': 'localhost',
      'SLURM_PROCID': str(i),
      'SLURM_LOCALID': str(i % per_node),
      'JAX_COORDINATOR_PORT': str(port),
      'FAKE_TASK': '1',
    }
    running.append(subprocess.Popen(command, env={**os.environ, **more}))
  for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, _: [p.send_signal(n) for p in running])
  bad_since = None
  while any(p.poll() is None for p in running):
    if any(p.poll() for p in running):
      bad_since = bad_since or time.monotonic()
      if time.monotonic() - bad_since > 40:
        for process in running:
          process.kill()
    time.sleep(0.1)
  worst = max(p.returncode % 256 for p in running)
  sys.exit(worst)


def free_ports():
  while True:
    with socket.socket() as one, socket.socket() as two:
      one.bind(('127.0.0.1', 0))
      with contextlib.suppress(OSError, OverflowError):
        two.bind(('127.0.0.1', one.getsockname()[1] + 1))
        return one.getsockname()[1]


def kill(job, number, marks=()):
  """A signal to the processes of a job that have all these variables."""
  wanted = {f'FAKE_JOB={job}'.encode(), *marks}
  for process in pathlib.Path('/proc').glob('[0-9]*'):
    with contextlib.suppress(OSError):
      found = set((process / 'environ').read_bytes().split(b'\0'))
      cloud = f'FAKE_CLOUD={CLOUD}'.encode()
      if wanted <= found and cloud in found:
        os.kill(int(process.name), number)


def scancel(arguments):
  *flags, job = arguments
  if flags == ['--signal=TERM']:
    return kill(job, signal.SIGTERM, [b'FAKE_TASK=1'])
  assert not flags
  change(job, state='CANCELLED', requeued=False)
  kill(job, signal.SIGTERM, [b'FAKE_TASK=1'])


def main():
  name, arguments = sys.argv[1], sys.argv[2:]
  if name in ('sbatch', 'srun', 'scancel', 'squeue', 'scontrol'):
    CLOUD.mkdir(exist_ok=True)
    with (CLOUD / 'calls').open('a') as file:
      file.write(shlex.join([name, *arguments]) + '\n')
  if name == 'sbatch':
    sbatch(arguments)
  elif name == 'controller':
    controller(*arguments)
  elif name == 'srun':
    srun(arguments)
  elif name == 'scancel':
    scancel(arguments)
  elif name == 'squeue':
    job = arguments[0].removeprefix('--jobs=')
    print('JOBID STATE')
    print(job, read(job)['state'])
  elif name == 'scontrol':
    assert arguments[0] == 'requeue'
    change(arguments[1], requeued=True)
  elif name == 'limit':
    os.kill(read(arguments[0])['batch'], signal.SIGUSR1)
  elif name == 'fail':
    change(arguments[0], requeued=True)
    kill(arguments[0], signal.SIGKILL)
  else:
    sys.exit(f'this fake does not know: {name}')


if __name__ == '__main__':
  main()
