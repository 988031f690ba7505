"""Square attack (Andriushchenko et al. 2020): random search, no gradients."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rocl_jax import losses
from rocl_jax.attacks import arguments
from rocl_jax.attacks.balls import BALLS
from rocl_jax.attacks.classifier import ClassifierAttack, fold
from rocl_jax.attacks.pgd import Ascent
from rocl_jax.logits import invalid

# The share of the image that a square covers, by queries done: it halves.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TINY = 1e-12


def square(
  *,
  eps: float,
  queries: int = 5000,
  norm: str = 'linf',
  share: float = 0.8,
  restarts: int = 1,
) -> ClassifierAttack:
  """Moves one square of an image at a time; keeps what lowers the margin.

  As the official code, but for this: it draws one place and one colour for
  all images of a batch, here each image draws its own.

  Args:
    eps: radius.
    queries: forward passes a turn, the first point's not counted.
    norm: 'linf' or 'l2'.
    share: of the image's area that the first squares cover (p_init).
    restarts: turns.
  """
  eps = arguments.radius('eps', eps, norm)
  arguments.count('queries', queries, 1)
  arguments.count('restarts', restarts, 1)
  share = arguments.amount('share', share, high=1)
  proposals = _linf if norm == 'linf' else _l2

  def run(logits_fn, images, labels, keys, turn):
    keys = fold(keys, turn)

    def margin_of(x):
      """Above 0 the network is fooled; at 0 too, as far as the search goes.
      Where the logits are invalid the search is over."""
      logits = logits_fn(x)
      margin = losses.margin(logits, labels).astype(x.dtype)
      return jnp.where(invalid(logits, labels), jnp.inf, margin)

    start, propose = proposals(images, eps, queries, share)
    wide = lambda x: x[:, None, None, None]

    def advance(state):
      margin = margin_of(state.candidate)
      better = (state.margin < 0) & (margin > state.margin)
      images = jnp.where(wide(better), state.candidate, state.images)
      return _State(
        query=state.query + 1,
        candidate=propose(images, state.query, fold(keys, state.query + 1)),
        images=images,
        margin=jnp.where(better, margin, state.margin),
      )

    first = start(fold(keys, 0))
    nothing = jnp.full(len(images), -jnp.inf, images.dtype)
    state = _State(jnp.int32(0), first, first, nothing)
    going = lambda s: (s.query <= queries) & (s.margin < 0).any()
    x = lax.while_loop(going, advance, state).images
    return Ascent(x, jnp.zeros(len(x), jnp.int32))

  return ClassifierAttack(restarts, queries + 1, eps, norm, run)


class _State(NamedTuple):
  """Attributes:
  query: queries done; the first is the start's.
  candidate: what the next query is about.
  images: the best so far.
  margin: theirs [N].
  """

  query: jax.Array
  candidate: jax.Array
  images: jax.Array
  margin: jax.Array


def _sizes(queries, share, height, width, smallest, odd):
  """The side of the square after so many queries, in NumPy [queries + 1]."""
  sizes = np.empty(queries + 1, np.int32)
  for query in range(queries + 1):
    covered = share / 2 ** sum(query > h for h in _HALVINGS)
    side = max(round(math.sqrt(covered * height * width)), smallest)
    if odd and side % 2 == 0:
      side += 1
    sizes[query] = min(side, height, width)
  return sizes


def _signs(uniform):
  return jnp.where(uniform < 0.5, -1.0, 1.0)


def _uniform(keys, *shape):
  """Numbers in [0, 1) [N, *shape], of each image's own key."""
  draw = lambda key: jax.random.uniform(key, shape, jnp.float32)
  return jax.vmap(draw)(keys)


def _corner(uniform, length, side):
  """A place for a square; the last one is never drawn, as officially."""
  return jnp.floor(uniform * (length - side)).astype(jnp.int32)


def _window(first, side, length):
  """Marks `side` entries from `first` [N] on: bool [N, length]."""
  place = jnp.arange(length)[None] - first[:, None]
  return (place >= 0) & (place < side)


def _linf(images, eps, queries, share):
  """Starts with vertical stripes; each query sets a square to one corner of
  the ball in each channel."""
  _, height, width, channels = images.shape
  sizes = jnp.asarray(
    _sizes(queries, share, height, width, smallest=1, odd=False)
  )
  inside = lambda x: jnp.clip(jnp.clip(x, images - eps, images + eps), 0, 1)

  def start(keys):
    stripes = _signs(_uniform(keys, 1, width, channels))
    return jnp.clip(images + eps * stripes, 0, 1)

  def propose(x, query, keys):
    side = sizes[query]
    uniform = _uniform(keys, 2 + channels)
    rows = _window(_corner(uniform[:, 0], height, side), side, height)
    columns = _window(_corner(uniform[:, 1], width, side), side, width)
    marked = (rows[:, :, None] & columns[:, None])[..., None]
    colour = _signs(uniform[:, 2:])[:, None, None]
    return inside(x + jnp.where(marked, 2 * eps * colour, 0.0))

  return start, propose


def _l2(images, eps, queries, share):
  """Moves the mass of one window into another, as a bump and its negative."""
  n, height, width, channels = images.shape
  by_query = _sizes(queries, share, height, width, smallest=3, odd=True)
  kinds, kind = np.unique(by_query, return_inverse=True)
  sizes, kind_of = jnp.asarray(by_query), jnp.asarray(kind)
  most = kinds.max()
  padded = np.zeros((len(kinds), most, most), np.float32)
  for i, side in enumerate(kinds):
    padded[i, :side, :side] = _bump(side)
  bumps = jnp.asarray(padded.reshape(-1))
  norm = BALLS['l2'].norm
  wide = lambda x: x[:, None, None, None]

  def onto_sphere(delta):
    unit = delta / (wide(norm(delta)) + _TINY)
    return jnp.clip(images + eps * unit, 0, 1)

  def start(keys):
    side = max(height // 5, 1)
    down, across = height // side, width // side
    uniform = _uniform(keys, down, across, 1 + channels)
    bump = jnp.asarray(_bump(side))
    tilted = jnp.where(uniform[..., :1, None] > 0.5, bump.T, bump)
    tiles = tilted[..., None] * _signs(uniform[..., 1:])[..., None, None, :]
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5)
    tiles = tiles.reshape(n, down * side, across * side, channels)
    margins = [(height - down * side) // 2, (width - across * side) // 2]
    margins = [
      (m, length - m - size * side)
      for m, length, size in zip(
        margins, (height, width), (down, across), strict=True
      )
    ]
    return onto_sphere(jnp.pad(tiles, ((0, 0), *margins, (0, 0))))

  def propose(x, query, keys):
    side = sizes[query]
    uniform = _uniform(keys, 5 + channels)
    corners = [
      _corner(uniform[:, i], length, side)
      for i, length in enumerate((height, width, height, width))
    ]
    mark = lambda row, column: (
      _window(row, side, height)[:, :, None]
      & _window(column, side, width)[:, None]
    )[..., None]
    into, out_of = mark(*corners[:2]), mark(*corners[2:])
    # Each pixel looks its value up: outside of the window any will do.
    place = lambda length, first: jnp.clip(
      jnp.arange(length)[None] - first[:, None], 0, most - 1
    )
    down = place(height, corners[0])[:, :, None]
    across = place(width, corners[1])[:, None]
    tilted = (uniform[:, 4] > 0.5)[:, None, None]
    entry = jnp.where(tilted, across * most + down, down * most + across)
    bump = bumps[kind_of[query] * most**2 + entry][..., None]
    bump = bump * _signs(uniform[:, 5:])[:, None, None]

    delta = x - images
    mass = lambda d: jnp.sqrt(jnp.square(d).sum((1, 2), keepdims=True))
    new = bump + jnp.where(into, delta, 0) / (mass(delta * into) + _TINY)
    new = jnp.where(into, new, 0)
    unused = jnp.maximum(eps**2 - jnp.square(wide(norm(delta))), 0) / channels
    budget = unused + jnp.square(mass(delta * (into | out_of)))
    new = new / (mass(new) + _TINY) * jnp.sqrt(budget)
    return onto_sphere(jnp.where(into, new, jnp.where(out_of, 0, delta)))

  return start, propose


def _bump(side: int) -> np.ndarray:
  """A square of unit norm: a bump above, its negative below."""
  half = side // 2
  both = np.concatenate([_hill(half, side), -_hill(side - half, side)])
  return (both / np.linalg.norm(both)).astype(np.float32)


def _hill(rows: int, columns: int) -> np.ndarray:
  """Falls off with the distance from the middle, summed as 1 / r^2."""
  if rows == 0:
    return np.zeros((0, columns))
  middle = rows // 2, columns // 2
  distance = np.maximum(
    np.abs(np.arange(rows) - middle[0])[:, None],
    np.abs(np.arange(columns) - middle[1])[None],
  )
  most = max(middle) + 1
  weights = 1 / np.arange(1, most + 1) ** 2
  hill = np.stack([weights[d:].sum() for d in distance.ravel()])
  return hill.reshape(rows, columns) / np.linalg.norm(hill)
