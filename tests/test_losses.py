"""Losses on small literal cases; for published numbers see test_reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rocl_jax import losses

LOGITS = jnp.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
LABELS = jnp.array([0, 1])


def test_cross_entropy_and_margin():
  exps = np.exp(np.asarray(LOGITS))
  wanted = -np.log(exps[[0, 1], [0, 1]] / exps.sum(1))
  np.testing.assert_allclose(
    losses.cross_entropy(LOGITS, LABELS), wanted, rtol=1e-5
  )
  np.testing.assert_allclose(losses.margin(LOGITS, LABELS), [-2.0, 2.5])


def test_trades_is_cross_entropy_plus_beta_times_the_divergence():
  np.testing.assert_allclose(
    losses.trades(LOGITS, LOGITS, LABELS, 6.0),
    losses.cross_entropy(LOGITS, LABELS),
  )
  p, q = jax.nn.softmax(LOGITS), jax.nn.softmax(LOGITS[::-1])
  divergence = (p * jnp.log(p / q)).sum(-1)
  added = losses.trades(LOGITS, LOGITS[::-1], LABELS, 6.0) - losses.trades(
    LOGITS, LOGITS[::-1], LABELS, 0.0
  )
  np.testing.assert_allclose(added, 6 * divergence, rtol=1e-4)


def brute_force_eq3(views, temperature):
  z = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in views]
  everything = np.concatenate(z)
  n = len(z[0])
  similarity = np.exp(z[0] @ everything.T / temperature)
  total = similarity.sum(1) - similarity[np.arange(n), np.arange(n)]
  positives = sum(
    similarity[np.arange(n), v * n + np.arange(n)] for v in range(1, len(z))
  )
  return -np.log(positives / total)


@pytest.mark.parametrize('views', [2, 3])
def test_eq3_has_one_anchor_and_sums_the_positives(views):
  random = np.random.default_rng(0)
  z = [random.standard_normal((5, 4)).astype(np.float32) for _ in range(views)]
  np.testing.assert_allclose(
    losses.nt_xent_eq3([jnp.asarray(v) for v in z], 0.5),
    brute_force_eq3(z, 0.5),
    rtol=1e-4,
  )


def test_detached_keys_change_gradients_not_values():
  z = jax.random.normal(jax.random.key(0), (2, 6, 4))
  loss = lambda z, detach: losses.nt_xent(list(z), 0.5, detach).mean()
  assert float(loss(z, True)) == float(loss(z, False))
  detached, full = jax.grad(loss)(z, True), jax.grad(loss)(z, False)
  assert float(jnp.abs(detached - full).max()) > 1e-3


def test_zero_embeddings_have_finite_gradients():
  z = jnp.zeros((2, 3, 4))
  gradient = jax.grad(lambda z: losses.nt_xent(list(z), 0.5).sum())(z)
  assert bool(jnp.isfinite(gradient).all())
