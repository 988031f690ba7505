"""A stand-in for train.py: notes its arguments, and ends as $FAKE_TRAIN says.

A number is its exit status; `wait` waits for SIGTERM, and ends with 143. So
does `wait STATUS`, with that status, for a second start in the same folder.
"""

import json
import os
import pathlib
import signal
import sys
import time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
name = os.environ.get('SLURM_PROCID', 'argv')
(pathlib.Path.home() / f'{name}.json').write_text(json.dumps(sys.argv[1:]))
print('training', flush=True)
how, _, later = os.environ['FAKE_TRAIN'].partition(' ')
started = pathlib.Path(os.environ['FAKE_CLOUD']) / 'started'
with started.open('a') as file:
  file.write('once more\n')
if later and len(started.read_text().splitlines()) > 2:  # two workers
  how = later
if how == 'wait':
  time.sleep(60)
sys.exit(int(how))
