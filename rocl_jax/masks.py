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

from rocl_jax.mesh import spread

Flat = dict[str, jax.Array]


def kept_count(size: int, keep: float) -> int:
  """How many of `size` entries stay: all but int((1 - keep) * size), or one."""
  return max(1, size - int((1 - keep) * size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def topk_masks(scores: Flat, keep: float) -> Flat:
  """1.0 where |score| is among the largest of its layer, else 0.0.

  The gradient passes straight through the selection to |score|: it is the
  cotangent times sign(score), for kept and for dropped entries alike
  (HYDRA, `GetSubnet`).
  """
  counts = {path: kept_count(s.size, keep) for path, s in scores.items()}
  # Non-negative floats order as their bit patterns do.
  bits = {
    path: lax.bitcast_convert_type(
      jnp.abs(s).astype(jnp.float32).reshape(-1), jnp.int32
    )
    for path, s in scores.items()
  }
  largest = lax.platform_dependent(
    bits,
    cpu=lambda bits: {  # layer by layer: each in as few passes as it takes
      path: _by_counting({path: b}, {path: b}, counts, digit=1)[path]
      for path, b in bits.items()
    },
    tpu=lambda bits: _by_counting(
      bits, jax.tree.map(spread, bits), counts, digit=4
    ),
    default=lambda bits: _by_sorting(bits, counts),
  )
  return {
    path: largest[path].reshape(s.shape).astype(s.dtype)
    for path, s in scores.items()
  }


def _masks_forward(scores, keep):
  return topk_masks(scores, keep), jax.tree.map(jnp.sign, scores)


def _masks_backward(keep, signs, cotangents):
  del keep
  return (jax.tree.map(jnp.multiply, cotangents, signs),)


topk_masks.defvjp(_masks_forward, _masks_backward)


def topk_mask(scores: jax.Array, keep: float) -> jax.Array:
  """`topk_masks` of one layer."""
  return topk_masks({'': scores}, keep)['']


def _by_sorting(bits: Flat, counts: dict[str, int]) -> Flat:
  """Marks the `counts` largest of each int32 [N], the earlier of equal ones.

  For GPUs, where each pass of `_by_counting` is a kernel or two.
  """

  def mark(bits, count):
    position = lax.iota(jnp.int32, bits.size)
    keys, places = lax.sort((~bits, position), num_keys=1, is_stable=True)
    return _marked(bits, ~keys[count - 1], places[count - 1] + 1)

  return {path: mark(b, counts[path]) for path, b in bits.items()}


def _by_counting(
  bits: Flat, shares: Flat, counts: dict[str, int], digit: int
) -> Flat:
  """`_by_sorting` without sorting, which takes twenty times as long on a CPU.

  First the threshold of each layer is found, digit by digit, then the position
  where the ties end.

  Args:
    bits: {path: int32 [N]}, each below 2**31.
    shares: the same, as they are to be counted: where each device has a part
      of them, it counts that part. Zeros may follow.
    counts: {path: how many to mark}.
    digit: bits of a digit. One pass over a layer counts for 2**digit - 1
      candidates.
  """
  threshold = _search(
    lambda path, t: (shares[path] >= t).sum() >= counts[path],
    dict.fromkeys(bits, 31),
    digit,
  )
  ties = {path: s == threshold[path] for path, s in shares.items()}
  spare = {
    path: counts[path] - (s > threshold[path]).sum()
    for path, s in shares.items()
  }

  def room(path, end):
    before = lax.iota(jnp.int32, ties[path].size) < end
    return (ties[path] & before).sum() <= spare[path]

  lengths = {path: b.size.bit_length() for path, b in bits.items()}
  end = _search(room, lengths, digit)
  return {
    path: _marked(b, threshold[path], end[path]) for path, b in bits.items()
  }


def _marked(bits, threshold, end):
  """What is above the threshold, and what equals it before position `end`."""
  position = lax.iota(jnp.int32, bits.size)
  return (bits > threshold) | ((bits == threshold) & (position < end))


def _search(
  holds: Callable[[str, jax.Array], jax.Array],
  lengths: dict[str, int],
  digit: int,
) -> Flat:
  """The largest integers, of `lengths` bits, for which `holds`, a monotone
  function of path and integer, is true."""
  passes = -(-max(lengths.values()) // digit)

  def body(i, low):
    shift = jnp.int32(digit * (passes - 1 - i))

    def reached(path, candidate):  # below 0 it has overflown
      return ((candidate > 0) & holds(path, candidate)).astype(jnp.int32)

    found = {
      path: sum(
        reached(path, x | jnp.int32(d) << shift) for d in range(1, 2**digit)
      )
      for path, x in low.items()
    }
    return {path: x | found[path] << shift for path, x in low.items()}

  zeros = dict.fromkeys(lengths, jnp.int32(0))
  return lax.fori_loop(0, passes, body, zeros)


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
