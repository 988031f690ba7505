"""What a number depends on beside its config: versions, devices, settings.

Two runs of one config are expected to be equal to the bit where `versions`
are, but for `commit`: what it says of the code is in `code`.
"""

import functools
import hashlib
import os
import pathlib
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata

import jax

from rocl_jax import compiled

_PACKAGES = ('rocl-jax', 'jax', 'jaxlib', 'flax', 'optax')
_LIBRARIES = re.compile(
  r'numpy|libtpu|jax-(cuda|rocm|metal).*|nvidia-(cudnn|cublas).*'
)
# Settings of JAX, whoever made them ...
_SETTINGS = (
  *('jax_enable_x64', 'jax_numpy_dtype_promotion', 'jax_allow_f16_reductions'),
  *('jax_default_matmul_precision', 'jax_default_prng_impl'),
  *('jax_threefry_partitionable', 'jax_random_seed_offset'),
  *('jax_disable_jit', 'jax_disable_most_optimizations'),
  *('jax_optimization_level', 'jax_exec_time_optimization_effort'),
)
# ... and variables of what it calls that are known to change numbers.
_VARIABLES = re.compile(
  r'XLA_FLAGS|LIBTPU_INIT_ARGS|NVIDIA_TF32_OVERRIDE|(PJRT_)?NPROC|TF_XLA_FLAGS'
  r'|(OMP|MKL|OPENBLAS|EIGEN|ONEDNN|DNNL|MIOPEN)_.*|.*(CUDNN|CUBLAS|ONEDNN).*'
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
  elif jax.default_backend() == 'gpu':
    found |= {name: str(v) for name, v in compiled.options().items()}
  found |= {name: str(getattr(jax.config, name, None)) for name in _SETTINGS}
  return found | _variables()


def deciding(versions: Mapping[str, str]) -> dict[str, str]:
  """Those that may change a number; a commit may be of the README alone."""
  return {k: v for k, v in versions.items() if k != 'commit'}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
  """A line for each of `deciding` that differs; nothing where none does."""
  old, new = deciding(before), deciding(now)
  return [
    f'versions.{name} was {old.get(name)!r}, is {new.get(name)!r}'
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  ]


def _variables() -> dict[str, str]:
  found = {}
  for name in sorted(os.environ):
    value = os.environ[name]
    if name == 'XLA_FLAGS':
      words = value.split()
      value = ' '.join(w for w in words if not _HARMLESS_FLAGS.match(w))
    if value and _VARIABLES.fullmatch(name):
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
