"""What XLA chose for a GPU by trying, kept for the next run.

JAX keeps it beside its cache of programs. Here that cache takes no programs:
compile times stay compile times, but without the trying.
"""

import math
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib

from rocl_jax.compiled import keep_programs
from rocl_jax.files import is_remote


class Kept(NamedTuple):
  """Attributes:
  folder: where results are.
  before: how many were there at the start.
  """

  folder: Path
  before: int

  def counts(self) -> dict[str, int]:
    """Results that earlier runs have left, and new ones."""
    return {'kept': self.before, 'new': _count(self.folder) - self.before}


def keep() -> Kept | None:
  """To be called before anything is compiled; None if nothing is kept.

  Only GPUs have such results. They are in the folder of the cache of programs,
  JAX_COMPILATION_CACHE_DIR or the user's, apart for each version of XLA.
  """
  if jax.default_backend() == 'gpu':
    keep_programs()
    programs = jax.config.values['jax_compilation_cache_dir']
    if programs is not None and not is_remote(programs):
      folder = Path(programs) / f'autotuned-{jaxlib.__version__}'
      jax.config.update('jax_compilation_cache_dir', str(folder))
      jax.config.update('jax_persistent_cache_min_compile_time_secs', math.inf)
      return Kept(folder, _count(folder))
  jax.config.update('jax_enable_compilation_cache', False)
  return None


def _count(folder: Path) -> int:
  return sum(path.is_file() for path in folder.rglob('*'))
