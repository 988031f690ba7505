"""Exact-k selection against sorting, by layer size."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rocl_jax import compiled, masks
from rocl_jax.benchmark import timing
from rocl_jax.benchmark.settings import Settings

OURS, SORT, TOP_K = 'bisection', 'sort', 'lax.top_k'
PUBLISHED = "HYDRA's sort, PyTorch"


def measure(
  settings: Settings, peers: bool, say: Callable[[str], None]
) -> list[dict[str, Any]]:
  """One record a size: times, and how many times as long the others take."""
  return [_measure_size(n, settings, peers, say) for n in settings.masks.sizes]


def _measure_size(size, settings, peers, say):
  say(f'{size:,} scores')
  keep = settings.masks.keep
  count = masks.kept_count(size, keep)
  draw = np.random.default_rng(0).normal(size=size).astype(np.float32)
  scores = jnp.asarray(draw)

  def by_sort(scores):
    order = jnp.argsort(-jnp.abs(scores), stable=True)
    return jnp.zeros(size, scores.dtype).at[order[:count]].set(1)

  def by_top_k(scores):
    _, kept = jax.lax.top_k(jnp.abs(scores), count)
    return jnp.zeros(size, scores.dtype).at[kept].set(1)

  functions = {
    OURS: lambda s: masks.topk_mask(s, keep),
    SORT: by_sort,
    TOP_K: by_top_k,
  }
  jobs: dict[str, timing.Job] = {}
  results = []
  for name, function in functions.items():
    select = compiled.jit(function)
    results.append(np.asarray(select(scores)))
    jobs[name] = timing.Job(functools.partial(select, scores))
  if not all(np.array_equal(results[0], other) for other in results[1:]):
    raise AssertionError(f'the masks of {size:,} scores differ')
  if peers:
    from rocl_jax.benchmark.peers import mask_by_sort
    from rocl_jax.benchmark.torch_networks import device

    jobs[PUBLISHED] = mask_by_sort(draw, keep, device())
  seconds = timing.interleave(jobs, settings.rounds, say)
  return {
    'size': size,
    'kept': count,
    'seconds': {n: timing.summary(s)._asdict() for n, s in seconds.items()},
    'ratios': {
      name: timing.ratio(seconds[name], seconds[OURS])._asdict()
      for name in jobs
      if name != OURS
    },
  }
