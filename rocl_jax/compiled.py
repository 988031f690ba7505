"""How this project's top-level programs are compiled, and kept."""

import functools
import hashlib
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax

from rocl_jax import gpu
from rocl_jax.files import cache_folder

# XLA's default fusion of convolutions on the CPU uses one thread for some
# shapes; without it attack steps are about a quarter faster.
_CPU_OPTIONS: dict[str, Any] = {'xla_cpu_experimental_ynn_fusion_type': ''}


def jit(function: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
  """`jax.jit` for a whole step, with the options that the backend likes.

  A jitted function inside another can't have options of its own: use it for
  programs that are dispatched from the host, and nowhere else.
  """
  return jax.jit(function, compiler_options=options() or None, **keywords)


@functools.cache
def options() -> dict[str, Any]:
  """What XLA is asked for on this machine's devices."""
  if jax.default_backend() == 'gpu':
    return gpu.options()
  if jax.default_backend() != 'cpu':
    return {}
  try:  # an option that this jaxlib does not know is an error
    jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS)()
  except jax.errors.JaxRuntimeError:
    return {}
  return _CPU_OPTIONS


def keep_programs() -> None:
  """Keeps compiled programs in the user's cache folder, for the next process.

  A cache that JAX was told to use before stays, JAX_COMPILATION_CACHE_DIR
  among them. XLA's programs for a CPU run on that kind of CPU alone, so each
  kind has a folder of its own, where homes are shared.
  """
  if jax.config.values['jax_compilation_cache_dir'] is not None:
    return
  folder = cache_folder() / f'xla-{cpu_kind()}'
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:  # no home, or a read-only one: compile anew each time
    return
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


def cpu_kind() -> str:
  """Tells what this CPU can do from what another can."""
  return hashlib.sha256(_cpu().encode()).hexdigest()[:8]


def _cpu() -> str:
  """What the CPU can do, as Linux tells, or else its name."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  flags = [x for x in lines if x.startswith(('flags', 'Features'))]
  return flags[0] if flags else platform.machine() + platform.processor()
