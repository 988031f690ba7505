"""Losses, one value an example.

Every loss returns [N] and is minimised in training; an attack maximises the
same function of its images. The caller takes the mean. Those of logits compute
in float32 at least, and are finite, value and gradient, where -inf rules out
classes other than the label.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from rocl_jax.logits import RULED_OUT, bounded, floats, of_class
from rocl_jax.mesh import gathered

_TINY = 1e-12  # as in AutoAttack's ratios
_GUARD = 1e-8  # as in RoCL's `loss.py`, in the norm and in both logarithms
_LOG_GUARD = math.log(_GUARD)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """-log softmax(logits)[label]; logits [N, C], labels int [N] -> [N]."""
  return -of_class(jax.nn.log_softmax(bounded(logits)), labels)


def kl_divergence(logits: jax.Array, other: jax.Array) -> jax.Array:
  """KL(softmax(logits) || softmax(other)); [N, C] twice -> [N]."""
  log_p, log_q = map(jax.nn.log_softmax, (bounded(logits), bounded(other)))
  return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Largest other logit less the label's: above 0 means misclassified."""
  z = bounded(logits)
  is_label = jax.nn.one_hot(labels, z.shape[-1], dtype=bool)
  return jnp.where(is_label, -jnp.inf, z).max(-1) - of_class(z, labels)


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Difference-of-logits ratio: the margin in units of the first logit's lead
  over the third, so that scaling the logits changes nothing.

  Croce and Hein 2020. With two classes there is no third: they get the margin.
  """
  return margin(logits, labels) / _unit_of_logits(logits, 3)


def targeted_dlr(
  logits: jax.Array, labels: jax.Array, targets: jax.Array
) -> jax.Array:
  """`dlr` towards a class of each image; `targets` int [N] -> [N].

  The unit is the first logit's lead over the mean of the third and fourth; of
  three classes, over the third; of two, 1.
  """
  z = bounded(logits)
  towards = of_class(z, targets) - of_class(z, labels)
  return towards / _unit_of_logits(logits, 4)


def _unit_of_logits(logits: jax.Array, last: int) -> jax.Array:
  """The first logit's lead over the mean of the third to the `last`, of those
  that are not ruled out; 1 where there are none; [N].

  No more than 1e4: what is further below the first, such as -1e9, rules a class
  out, too, and gradients in float16 would be 0 in this unit.
  """
  ranked = jnp.sort(floats(logits), axis=-1, descending=True)
  low = ranked[:, 2:last]
  there = low > RULED_OUT
  mean = jnp.where(there, low, 0).sum(-1) / jnp.maximum(there.sum(-1), 1)
  lead = jnp.where(there.any(-1), ranked[:, 0] - mean, 1)
  return jnp.minimum(lead + _TINY, 1e4)


def trades(
  logits: jax.Array, adversarial: jax.Array, labels: jax.Array, beta: float
) -> jax.Array:
  """CE(clean) + beta * KL(clean || adversarial); beta is 6 in HYDRA's runs.

  Gradients flow through both sides of the divergence, as published.
  """
  divergence = kl_divergence(logits, adversarial)
  return cross_entropy(logits, labels) + beta * divergence


def nt_xent(
  views: Sequence[jax.Array], temperature: float, detach_keys: bool = True
) -> jax.Array:
  """NT-Xent over two or more views, as RoCL's `loss.py` computes it.

  Each ordered pair of views is a softmax of its own over all V * N - 1 other
  embeddings, the other positives among the negatives. The key side of the
  similarities is detached: an embedding learns from its rows as anchor alone.

  Args:
    views: V arrays [N, D]; row i of each is the same instance.
    temperature: divides the cosine similarities.
    detach_keys: False lets gradients flow into the keys too.

  Returns:
    [N]; the mean is the published loss, twice a per-pair mean for V = 3.
  """
  positives, rest = _similarities(views, temperature, detach_keys)
  loss = jnp.zeros(())
  for anchor, found in enumerate(positives):
    for i, positive in enumerate(found):
      others = [rest[anchor], *found[:i], *found[i + 1 :]]
      odds = functools.reduce(jnp.logaddexp, others) - positive
      loss = loss + _minus_log_ratio(odds)
  return loss / len(views)


def apart(
  loss: Callable[..., jax.Array], groups: int
) -> Callable[..., jax.Array]:
  """`nt_xent` or `nt_xent_eq3` with the other images of the group alone as
  negatives.

  Args:
    loss: (views, *rest) -> [N].
    groups: equal parts of the batch, each of neighbours; 0 for no such parts.

  Returns:
    The same of the whole batch, [N].
  """
  if not groups:
    return loss

  def of_groups(views, *rest):
    parts = [view.reshape(groups, -1, view.shape[-1]) for view in views]
    return jax.vmap(lambda *part: loss(part, *rest))(*parts).reshape(-1)

  return of_groups


def nt_xent_eq3(
  views: Sequence[jax.Array], temperature: float, detach_keys: bool = True
) -> jax.Array:
  """The paper's Eq. 3: the first view is the only anchor, and the logarithm
  is taken once, of the summed positives. Arguments as `nt_xent`; [N]."""
  positives, rest = _similarities(views, temperature, detach_keys)
  return _minus_log_ratio(
    rest[0] - functools.reduce(jnp.logaddexp, positives[0])
  )


def _minus_log_ratio(odds):
  """-log(p / (p + r) + guard) of log(r / p).

  Of the odds and not of the sum, or the gradient of a positive that outweighs
  all else would be the difference of two large numbers.
  """
  return -jnp.logaddexp(-jax.nn.softplus(odds), _LOG_GUARD)


def _similarities(views, temperature, detach_keys):
  """Logarithms of exp(cosine / temperature), summed and singled out.

  Logarithms, as float32 has no such exponentials at low temperatures. View by
  view, each with a product of its own: one long batch of all views would not
  lie where its images do, and devices had to exchange them. So the embeddings
  of each view are gathered once, as keys, and nothing else moves.

  Returns:
    For each view, as anchor, those of its positives, [N] for each other view;
    and for each view [N], that of the sum over all other instances and the
    guard.
  """
  z = [_unit(view) for view in views]
  keys = [gathered(x) for x in (lax.stop_gradient(z) if detach_keys else z)]
  own = jnp.eye(len(z[0]), dtype=bool)
  positives, rest = [], []
  for a, anchor in enumerate(z):
    rows, found = [], []
    for k, key in enumerate(keys):
      cosine = jnp.dot(anchor, key.T, precision=lax.Precision.HIGHEST)
      rows.append(jnp.where(own, -jnp.inf, cosine))
      if a != k:
        found.append((anchor * key).sum(-1) / temperature)
    largest = [lax.stop_gradient(row).max(1, keepdims=True) for row in rows]
    # The guard is as one more, and the only one in a batch of one.
    top = functools.reduce(jnp.maximum, largest, temperature * _LOG_GUARD)
    sums = [jnp.exp((row - top) / temperature).sum(1) for row in rows]
    top = top[:, 0] / temperature
    rest.append(top + jnp.log(sum(sums) + jnp.exp(_LOG_GUARD - top)))
    positives.append(found)
  return positives, rest


def _unit(z):
  z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
  # The inner maximum keeps the gradient of a zero embedding finite.
  norm = jnp.sqrt(jnp.maximum(jnp.square(z).sum(-1, keepdims=True), 1e-30))
  return z / (norm + _GUARD)


CONTRASTIVE = {'nt_xent': nt_xent, 'eq3': nt_xent_eq3}
