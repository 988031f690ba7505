"""Memory, open files and disk over many stages, and over many kills.

  python tests/faults/soak.py stages [200]   # in one process
  python tests/faults/soak.py kills [50]     # kill -9 and the same command

Prints a line every so often, and exits with status 1 if anything grows: the
last quarter may stand 5 % above the second one, no more. Memory may grow by
half a MiB a stage besides: Orbax keeps 0.05 MiB an operation, alone in a loop
too, and a stage has eight or so.
"""

import ctypes
import gc
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]


def resident_mib():
  """Memory of this process, after what can be given back was."""
  ctypes.CDLL(None).malloc_trim(0)
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmRSS'):
      return int(line.split()[1]) / 1024
  return 0.0


def open_files():
  return len(os.listdir('/proc/self/fd'))


def on_disk(folder):
  """(MB, files) below a folder."""
  files = [p for p in pathlib.Path(folder).rglob('*') if p.is_file()]
  return sum(p.stat().st_size for p in files) / 1e6, len(files)


def stages(count):
  """Short stages back to back in one process."""
  import jax
  from test_stages import stage_run, stem_size

  from rocl_jax import loop

  cache = tempfile.mkdtemp()
  jax.config.update('jax_compilation_cache_dir', cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for i in range(count):
      name = ('linear_eval', 'supervised', 'prune', 'finetune')[i % 4]
      place = pathlib.Path(folder) / name
      shutil.rmtree(place, ignore_errors=True)
      loop.run_stage(stage_run(name, place, measure=stem_size))
      jax.clear_caches()
      gc.collect()
      rows.append((resident_mib(), open_files(), *on_disk(folder)))
      if i % max(count // 10, 1) == 0 or i == count - 1:
        show(i + 1, rows[-1])
  return rows


def kills(count):
  """A run that is killed again and again, one step or two further each time."""
  import numpy as np
  from test_processes import SMALL

  rows = []
  random = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    environment = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': f'{folder}/cache',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
      'PYTHONPATH': str(ROOT),
    }
    workdir = f'{folder}/w'
    command = [sys.executable, 'train.py', *SMALL, f'--workdir={workdir}']
    command += ['--config.supervised.total_epochs=500']
    for i in range(count):
      process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
      )
      while 'first step' not in (line := process.stderr.readline()):
        assert line, 'it ended by itself'
      time.sleep(random.uniform(0.5, 2.0))
      process.send_signal(signal.SIGKILL)
      process.communicate()
      rows.append((0.0, open_files(), *on_disk(workdir)))
      if i % max(count // 10, 1) == 0 or i == count - 1:
        show(i + 1, rows[-1])
  return rows


def show(done, row):
  memory, files, disk, count = row
  print(
    f'{done:4d}  {memory:8.1f} MiB  {files:4d} open files  {disk:8.2f} MB in '
    f'{count} files',
    flush=True,
  )


def grows(rows):
  """The columns whose last quarter is above the second one."""
  quarter = len(rows) // 4
  bad = []
  for name, *values in zip(
    ('memory', 'open files', 'MB', 'files'), *rows, strict=True
  ):
    before = statistics.median(values[quarter : 2 * quarter])
    after = statistics.median(values[-quarter:])
    print(
      f'{name}: median {before:.1f} in the second quarter, {after:.1f} in '
      'the last'
    )
    slack = len(rows) / 4 if name == 'memory' else 1
    if after > before * 1.05 + slack:
      bad.append(name)
  return bad


if __name__ == '__main__':
  kind = sys.argv[1] if len(sys.argv) > 1 else ''
  if kind not in ('stages', 'kills'):
    sys.exit(__doc__)
  usual = {'stages': 200, 'kills': 50}[kind]
  number = int(sys.argv[2]) if len(sys.argv) > 2 else usual
  found = grows({'stages': stages, 'kills': kills}[kind](number))
  sys.exit(f'grows: {", ".join(found)}' if found else 0)
