"""A stand-in for uv: an environment that is the one the tests run in."""

import pathlib
import sys

if sys.argv[1] == 'venv':
  folder = pathlib.Path(sys.argv[-1]) / 'bin'
  folder.mkdir(parents=True, exist_ok=True)
  python = folder / 'python'
  fake = pathlib.Path(__file__).with_name('fake_train.py')
  python.write_text(
    '#!/bin/sh\n'
    f'[ -z "${{FAKE_TRAIN:-}}" ] || {{ shift; set -- {fake} "$@"; }}\n'
    f'exec {sys.executable} "$@"\n'
  )
  python.chmod(0o755)
elif sys.argv[1:3] == ['pip', 'install']:
  assert '--require-hashes' in sys.argv
  assert pathlib.Path(sys.argv[-1]).is_file()
else:
  sys.exit(f'this fake does not know: {sys.argv[1:]}')
