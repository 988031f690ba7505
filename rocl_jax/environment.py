"""What a command makes of its environment before JAX and matplotlib do."""

import importlib
import os
import sys

from rocl_jax.errors import one_line

_USER_ERROR = 2
# Where JAX looks for GPUs: plain Linux, containers, Windows' subsystem.
_NVIDIA = ('/dev/nvidia0', '/dev/nvidiactl', '/dev/dxg')


def prepare() -> None:
  """Ends a command in one line where JAX can't be imported as it is set.

  Of a library, in a notebook say, nothing is touched.
  """
  if not _is_command():
    return
  # Pictures go to files; a notebook's backend may not be there.
  os.environ['MPLBACKEND'] = 'agg'
  # Without a GPU, JAX's plugin for them is there to compile, see `plan`. That
  # NVIDIA's libraries are missing is no fault then, nor worth a stack trace.
  if not any(map(os.path.exists, _NVIDIA)):
    os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  try:
    importlib.import_module('jax')
  except Exception as e:  # whatever JAX makes of a variable's value
    names = ', '.join(k for k in sorted(os.environ) if k.startswith('JAX_'))
    if not names:
      raise
    print(
      f'rocl_jax: JAX does not start: {one_line(e)}; these are set: {names}',
      file=sys.stderr,
    )
    sys.exit(_USER_ERROR)


def _is_command() -> bool:
  """Whether this is `python -m rocl_jax.NAME`, or train.py."""
  main = getattr(sys.modules.get('__main__'), '__file__', None) or ''
  beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  train = os.path.join(beside, 'train.py')
  return sys.argv[:1] == ['-m'] or os.path.abspath(main) == train
