"""Losses, one value an example.

Every loss returns [N] and is minimised in training; an attack maximises the
same function of its images. The caller takes the mean.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_TINY = 1e-12  # as in AutoAttack's ratios
_GUARD = 1e-8  # as in RoCL's `loss.py`, in the norm and in both logarithms


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """-log softmax(logits)[label]; logits [N, C], labels int [N] -> [N]."""
  log_p = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]


def kl_divergence(logits: jax.Array, other: jax.Array) -> jax.Array:
  """KL(softmax(logits) || softmax(other)); [N, C] twice -> [N]."""
  log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
  return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Largest other logit less the label's: above 0 means misclassified."""
  is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
  others = jnp.where(is_label, -jnp.inf, logits).max(-1)
  return others - jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Difference-of-logits ratio: the margin in units of the first logit's lead
  over the third, so that scaling the logits changes nothing.

  Croce and Hein 2020. With two classes there is no third: they get the margin.
  """
  ranked = jnp.sort(logits, axis=-1, descending=True)
  lead = ranked[:, 0] - ranked[:, 2] if logits.shape[-1] > 2 else 1.0
  return margin(logits, labels) / (lead + _TINY)


def targeted_dlr(
  logits: jax.Array, labels: jax.Array, targets: jax.Array
) -> jax.Array:
  """`dlr` towards a class of each image; `targets` int [N] -> [N].

  The unit is the first logit's lead over the mean of the third and fourth; of
  three classes, over the third; of two, 1.
  """
  of = lambda classes: jnp.take_along_axis(logits, classes[:, None], axis=1)
  ranked = jnp.sort(logits, axis=-1, descending=True)
  low = ranked[:, 2:4]
  lead = ranked[:, 0] - low.mean(-1) if low.shape[-1] else 1.0
  return (of(targets) - of(labels))[:, 0] / (lead + _TINY)


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
  count, n = len(views), views[0].shape[0]
  exps, total = _similarities(views, temperature, detach_keys)
  exps = exps.reshape(count, n, count, n)
  total = total.reshape(count, n)
  loss = jnp.zeros(n)
  for anchor in range(count):
    for key in range(count):
      if anchor != key:
        positive = jnp.diagonal(exps[anchor, :, key])
        ratio = positive / (total[anchor] + _GUARD)
        loss = loss - jnp.log(ratio + _GUARD)
  return loss / count


def nt_xent_eq3(
  views: Sequence[jax.Array], temperature: float, detach_keys: bool = True
) -> jax.Array:
  """The paper's Eq. 3: the first view is the only anchor, and the logarithm
  is taken once, of the summed positives. Arguments as `nt_xent`; [N]."""
  count, n = len(views), views[0].shape[0]
  exps, total = _similarities(views, temperature, detach_keys)
  exps = exps.reshape(count, n, count, n)
  positives = sum(jnp.diagonal(exps[0, :, key]) for key in range(1, count))
  return -jnp.log(positives / (total[:n] + _GUARD) + _GUARD)


def _similarities(views, temperature, detach_keys):
  """exp(cosine / temperature) of all pairs, own pair 0, and the row sums."""
  z = jnp.concatenate(views)
  # The inner maximum keeps the gradient of a zero embedding finite.
  norm = jnp.sqrt(jnp.maximum(jnp.square(z).sum(-1, keepdims=True), 1e-30))
  z = z / (norm + _GUARD)
  keys = lax.stop_gradient(z) if detach_keys else z
  cosine = jnp.dot(z, keys.T, precision=lax.Precision.HIGHEST)
  exps = jnp.exp(cosine / temperature) * (1 - jnp.eye(len(z)))
  return exps, exps.sum(1)


CONTRASTIVE = {'nt_xent': nt_xent, 'eq3': nt_xent_eq3}
