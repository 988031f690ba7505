"""HYDRA's masks: keep the k largest importance scores of each layer.

  scores = init_scores(weights)                  # {path: array}, from weights
  masks = topk_masks(scores, keep)
  pruned = apply(params, masks)

All of these are flat dicts by path ('encoder/stem/kernel'); scores and masks
hold only the tensors that are pruned. `keep` is the kept fraction, the same
in every layer; the published code's rule decides the count. A mask is exact:
never one entry more or less, and among equal scores the earlier entry stays.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Flat = dict[str, jax.Array]


def kept_count(size: int, keep: float) -> int:
  """How many of `size` entries stay: all but int((1 - keep) * size), or one."""
  return max(1, size - int((1 - keep) * size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def topk_mask(scores: jax.Array, keep: float) -> jax.Array:
  """1.0 where |score| is among the layer's largest, else 0.0.

  The gradient passes straight through the selection to |score|: it is the
  cotangent times sign(score), for kept and for dropped entries alike
  (HYDRA, `GetSubnet`).
  """
  return _largest(jnp.abs(scores), keep).astype(scores.dtype)


def _mask_forward(scores, keep):
  return topk_mask(scores, keep), jnp.sign(scores)


def _mask_backward(keep, sign, cotangent):
  del keep
  return (cotangent * sign,)


topk_mask.defvjp(_mask_forward, _mask_backward)


def topk_masks(scores: Flat, keep: float) -> Flat:
  """`topk_mask` of each layer of a pytree of scores."""
  return jax.tree.map(lambda s: topk_mask(s, keep), scores)


def _largest(magnitudes: jax.Array, keep: float) -> jax.Array:
  """Marks the kept_count largest of non-negative float32, without sorting.

  Non-negative floats order as their bit patterns do, so the threshold is found
  by bisection over bits, and the place where the ties end by bisection over
  positions: some fifty counts of the layer, where a sort takes twenty times as
  long on a CPU.
  """
  flat = magnitudes.astype(jnp.float32).reshape(-1)
  count = kept_count(flat.size, keep)
  bits = lax.bitcast_convert_type(flat, jnp.int32)
  # The largest threshold that at least `count` entries reach.
  threshold = _bisect(lambda t: (bits >= t).sum() >= count, 31)
  ties = bits == threshold
  position = lax.iota(jnp.int32, flat.size)
  spare = count - (bits > threshold).sum()
  # The last position up to which the ties before it do not exceed `spare`.
  end = _bisect(
    lambda p: (ties & (position < p)).sum() <= spare, flat.size.bit_length()
  )
  return ((bits > threshold) | (ties & (position < end))).reshape(
    magnitudes.shape
  )


def _bisect(holds, bits: int) -> jax.Array:
  """The largest `bits`-bit integer for which the monotone `holds` is true."""

  def body(i, low):
    candidate = low | (jnp.int32(1) << (bits - 1 - i))
    return jnp.where(holds(candidate), candidate, low)

  return lax.fori_loop(0, bits, body, jnp.int32(0))


def init_scores(weights: Flat) -> Flat:
  """HYDRA's scaled initialisation: sqrt(6 / fan_in) * w / max|w|, signed."""

  def scores(w):
    fan_in = w.size // w.shape[-1]
    return (6 / fan_in) ** 0.5 * w / jnp.abs(w).max()

  return {path: scores(w) for path, w in weights.items()}


def random_scores(weights: Flat, key: jax.Array) -> Flat:
  """Scores as large as HYDRA's, sqrt(6 / fan_in) * uniform(-1, 1)."""
  keys = jax.random.split(key, len(weights))
  return init_scores(
    {
      path: jax.random.uniform(k, w.shape, w.dtype, -1, 1)
      for k, (path, w) in zip(keys, weights.items(), strict=True)
    }
  )


# (weights, key) -> scores, by name.
SCORES: dict[str, Callable[[Flat, jax.Array], Flat]] = {
  'weights': lambda weights, key: init_scores(weights),
  'random': random_scores,
}


def apply(params: Flat, masks: Flat) -> Flat:
  """Multiplies the tensors that have a mask; the others stay as they are."""
  return {p: x * masks[p] if p in masks else x for p, x in params.items()}


def density(masks: Flat) -> dict[str, tuple[int, int]]:
  """{path: (kept, size)} as counted from the masks."""
  return {p: (int(m.astype(bool).sum()), m.size) for p, m in masks.items()}
