"""jit as this project's top-level programs are compiled."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# XLA's default fusion of convolutions on the CPU uses one thread for some
# shapes; without it attack steps are about a quarter faster.
_CPU_OPTIONS = {'xla_cpu_experimental_ynn_fusion_type': ''}


def jit(function: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
  """`jax.jit` for a whole step, with the options that the backend likes.

  A jitted function inside another can't have options of its own: use it for
  programs that are dispatched from the host, and nowhere else.
  """
  return jax.jit(function, compiler_options=_options(), **keywords)


@functools.cache
def _options() -> dict[str, Any] | None:
  if jax.default_backend() != 'cpu':
    return None
  try:  # an option that this jaxlib does not know is an error
    jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS)()
  except jax.errors.JaxRuntimeError:
    return None
  return _CPU_OPTIONS
