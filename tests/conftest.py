"""Four CPU devices, so that sharding is tested where there is one machine.

Programs that several tests compile, here or in processes of their own, are
compiled once a session. Here that is without LLVM's optimisations and by XLA's
older emitters, which takes a fifth of the time; processes, which train longer,
get LLVM's first level. XLA's own passes are the same. Of several workers each
has cores of its own: their threads would wait for each other's.
"""

import os
import tempfile

_worker = os.environ.get('PYTEST_XDIST_WORKER', '')
if _worker and hasattr(os, 'sched_setaffinity'):  # before JAX counts them
  _cores = sorted(os.sched_getaffinity(0))
  _mine = _cores[
    int(_worker[2:]) :: int(os.environ['PYTEST_XDIST_WORKER_COUNT'])
  ]
  os.sched_setaffinity(0, _mine or _cores)

_FLAGS = os.environ.get('XLA_FLAGS', '')
_QUICK = (
  '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
)
os.environ['XLA_FLAGS'] = f'{_FLAGS} {_QUICK}'

if not _worker:  # workers and processes inherit it
  _CACHE = tempfile.TemporaryDirectory(prefix='rocl_jax_tests')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.devices()  # which reads XLA_FLAGS
os.environ['XLA_FLAGS'] = f'{_FLAGS} --xla_backend_optimization_level=1'

# With several workers the long files first, so that none is left for the end.
_LONG = (
  'commands',
  'stages',
  'processes',
  'launch',
  'mirror',
  'benchmark',
  'autoattack_reference',
  'plan',
)


def pytest_collection_modifyitems(items):
  rank = {f'test_{name}.py': i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture
def lower_for(monkeypatch):
  """lower_for('tpu') takes a TPU's branches from then on, on this CPU."""

  def choose(platform):
    monkeypatch.setattr(
      jax.lax,
      'platform_dependent',
      lambda *operands, default=None, **branches: branches.get(
        platform, default
      )(*operands),
    )

  return choose


@pytest.fixture(autouse=True)
def uninterrupted():
  """What asked one test's run to stop must not stop the next test's."""
  yield
  from rocl_jax import interruption

  interruption._State.number, interruption._State.heard = None, False
