"""What logits say of an image: its class, or that they are invalid.

`argmax` takes NaN for the class that it stands at, so a network that answers
NaN would look fooled, or robust. Everything that judges a network asks
`predict` instead.
"""

import jax
import jax.numpy as jnp
from jax import lax

INVALID = -1  # in the place of a class
RULED_OUT = -1e30  # and below: -inf, or float32's lowest number in its place


def floats(logits: jax.Array) -> jax.Array:
  """The logits in float32, those in float64 as they are."""
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def bounded(logits: jax.Array) -> jax.Array:
  """`floats`, with -inf replaced by a number far below all others of its row.

  Networks rule classes out by -inf, or by a number near the lowest of float32.
  The replacement is so low that no softmax sees it, and gets no gradient; but
  differences and ratios of logits are numbers that an attack can climb.

  Args:
    logits: [N, K].
  """
  z = floats(logits)
  ruled_out = z <= RULED_OUT
  low = jnp.where(ruled_out, jnp.inf, z).min(-1, keepdims=True)
  low = lax.stop_gradient(jnp.where(low == jnp.inf, 0, low))
  return jnp.where(ruled_out, low - jnp.abs(low) - 1e3, z)


def of_class(logits: jax.Array, classes: jax.Array) -> jax.Array:
  """The logit of one class of each row; [N, K] and int [N] -> [N]."""
  index = classes.astype(jnp.int32)[:, None]
  return jnp.take_along_axis(logits, index, axis=1)[:, 0]


def invalid(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Whether a row has NaN or +inf anywhere, or rules the label out.

  A row that rules all classes out is invalid, too; one that rules out some
  other classes is not.

  Args:
    logits: [N, K].
    labels: int [N].

  Returns:
    bool [N].
  """
  z = floats(logits)
  return ~(z < jnp.inf).all(-1) | (of_class(z, labels) <= RULED_OUT)


def predict(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The class of each row, INVALID where the row is invalid; int32 [N].

  So an image counts as right where this is its label, and as wrong where it is
  another class; where it is INVALID, as neither.
  """
  first = floats(logits).argmax(-1).astype(jnp.int32)
  return jnp.where(invalid(logits, labels), INVALID, first)


def in_top(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
  """Whether fewer than k classes stand before the label; ties stand behind.

  False where the row is invalid.
  """
  z = floats(logits)
  before = (z > of_class(z, labels)[:, None]).sum(-1)
  return (before < k) & ~invalid(z, labels)


def ranked_class(logits: jax.Array, rank: jax.Array | int) -> jax.Array:
  """The class at this rank of each row, 0 for the highest logit; int [N].

  Ranks that do not exist are the last one.
  """
  order = jnp.argsort(floats(logits), axis=-1, descending=True)
  return jnp.take(order, jnp.minimum(rank, logits.shape[-1] - 1), axis=-1)
