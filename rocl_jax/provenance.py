"""What a number depends on beside its config: versions, devices, settings.

Two runs of one config are equal to the bit where `versions` are.
"""

import functools
import hashlib
import os
import pathlib
import re
import subprocess
from importlib import metadata

import jax

from rocl_jax import compiled

_PACKAGES = ('rocl-jax', 'jax', 'jaxlib', 'flax', 'optax')
_LIBRARIES = re.compile(
  r'numpy|libtpu|jax-(cuda|rocm|metal).*|nvidia-(cudnn|cublas).*'
)
# How JAX counts and draws, whoever set it.
_FORMATS = (
  *('jax_enable_x64', 'jax_default_matmul_precision', 'jax_default_prng_impl'),
  *('jax_threefry_partitionable', 'jax_numpy_dtype_promotion'),
)
# Variables that JAX, XLA and what they call read ...
_READ = re.compile(
  r'JAX_.*|XLA_.*|LIBTPU_INIT_ARGS|NVIDIA_TF32_OVERRIDE|CU(BLAS|DNN)_.*|MIOPEN_.*'
  r'|TF_(CUDNN|ENABLE_ONEDNN|DISABLE|NUM|XLA).*|(PJRT_)?NPROC'
  r'|(OMP|MKL|OPENBLAS|EIGEN)_.*|ONEDNN_.*|DNNL_.*'
)
# ... and of those what changes no number, or is told of as a device.
_HARMLESS = re.compile(
  r'JAX_(PLATFORM.*|COORDINATOR_.*|NUM_PROCESSES|PROCESS_ID|LOCAL_.*'
  r'|NUM_CPU_DEVICES|.*VISIBLE_DEVICES|.*CACHE.*|.*LOG.*|.*TRACEBACK.*|DUMP_.*'
  r'|.*EXPLAIN.*|.*CHECK.*|.*GUARD.*|DISTRIBUTED_.*|FORCE_.*|PPRINT_.*'
  r'|CROSS_HOST_.*|CAPTURED_.*|TRACER_.*|HLO_SOURCE_.*|INCLUDE_.*|.*TIMEOUT.*'
  r'|DEBUG_(LEAKED|KEY).*|ENABLE_(PREEMPTION|RECOVERABILITY).*|.*VERBOSE.*)'
  r'|XLA_PYTHON_CLIENT_.*|.*_(LOG|LOGLEVEL|LOGINFO|LOGDEST|VERBOSE)(_.*)?'
)
_HARMLESS_FLAGS = re.compile(r'--xla_(dump|hlo_profile|\w*cache_dir)')


def software() -> dict[str, str]:
  """Versions of code and packages, and the kind of device."""
  found = {p: version_of(p) or 'not installed' for p in _PACKAGES}
  return found | {'commit': _commit(), 'device': jax.devices()[0].device_kind}


def versions() -> dict[str, str]:
  """All that a number depends on beside its config, by name."""
  found = software() | _libraries()
  found |= {'code': code_fingerprint(), 'devices': str(jax.device_count())}
  found['processes'] = str(jax.process_count())
  if jax.default_backend() == 'cpu':
    found |= {'cpu': compiled.cpu_kind(), 'threads': str(_cores())}
  found |= {name: str(getattr(jax.config, name, None)) for name in _FORMATS}
  return found | _variables()


def _variables() -> dict[str, str]:
  found = {}
  for name in sorted(os.environ):
    value = os.environ[name]
    if name == 'XLA_FLAGS':
      words = value.split()
      value = ' '.join(w for w in words if not _HARMLESS_FLAGS.match(w))
    known = name.lower() in _FORMATS or _HARMLESS.fullmatch(name)
    if value and _READ.fullmatch(name) and not known:
      found[name] = value
  return found


@functools.cache
def _libraries() -> dict[str, str]:
  names = {d.metadata['Name'] or '' for d in metadata.distributions()}
  return {n: version_of(n) for n in sorted(names) if _LIBRARIES.fullmatch(n)}


def _cores() -> int:
  """Cores that XLA's threads may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


@functools.cache
def code_fingerprint() -> str:
  """Tells this package's source from another's, committed or not."""
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).parent
  for path in sorted(root.rglob('*.py')):
    digest.update(path.relative_to(root).as_posix().encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def version_of(package: str) -> str:
  """The version of an installed package, '' where it is not."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return ''


@functools.cache
def _commit() -> str:
  """The commit of the source tree, if it is one; else ''."""
  here = pathlib.Path(__file__).resolve().parent.parent
  command = ['git', '-C', str(here), 'describe', '--always', '--dirty']
  try:
    result = subprocess.run(command, capture_output=True, text=True, timeout=5)
  except (OSError, subprocess.TimeoutExpired):
    return ''
  return result.stdout.strip()
