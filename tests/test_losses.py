"""Losses on small literal cases; for published numbers see test_reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rocl_jax import losses
from rocl_jax.logits import INVALID, in_top, predict

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


def test_classes_that_are_ruled_out_change_nothing():
  """-inf for a class that can not win: finite, value and gradient, and with
  the softmax of the others alone."""
  ruled_out = jnp.array([[2.0, -jnp.inf, 0.5, -1.0, -jnp.inf]])
  lowest = jnp.nan_to_num(ruled_out, neginf=jnp.finfo('float32').min)
  rest, label = ruled_out[:, jnp.array([0, 2, 3])], jnp.array([0])
  other = jnp.array([[0.0, -jnp.inf, 1.0, -jnp.inf, -2.0]])
  for name, loss in {
    'ce': lambda z: losses.cross_entropy(z, label),
    'margin': lambda z: losses.margin(z, label),
    'dlr': lambda z: losses.dlr(z, label),
    'to an open class': lambda z: losses.targeted_dlr(z, label, label + 2),
    'to a closed one': lambda z: losses.targeted_dlr(z, label, label + 1),
    'kl': lambda z: losses.kl_divergence(z, other),
    'kl, other way': lambda z: losses.kl_divergence(other, z),
    'trades': lambda z: losses.trades(z, other, label, 6.0),
  }.items():
    for z in (ruled_out, ruled_out.astype('bfloat16'), 99 * ruled_out, lowest):
      total = lambda z, loss=loss: loss(z).sum()
      value, gradient = jax.value_and_grad(total)(z)
      assert bool(jnp.isfinite(value)), name
      assert bool(jnp.isfinite(gradient).all()), name
      assert gradient[0, 1] == 0, name
      assert gradient[0, 0] != 0 or z[0, 0] > 99, name
  for loss in (losses.cross_entropy, losses.margin, losses.dlr):
    np.testing.assert_allclose(loss(ruled_out, label), loss(rest, label))
  # All others ruled out: nothing can win.
  lone = jnp.array([[1.0, -jnp.inf, -jnp.inf]])
  assert float(losses.margin(lone, label)[0]) < -900
  assert float(losses.cross_entropy(lone, label)[0]) == 0


def test_what_is_no_answer_is_no_class():
  inf, nan = jnp.inf, jnp.nan
  rows = {
    (0.0, 2.0, 1.0): 1,
    (-inf, 2.0, -inf): 1,
    (nan, 2.0, 1.0): INVALID,
    (0.0, 2.0, nan): INVALID,
    (inf, 2.0, 1.0): INVALID,
    (0.0, inf, 1.0): INVALID,
    (0.0, -inf, 1.0): INVALID,
    (-inf, -inf, -inf): INVALID,
    (-3e38, -3e38, -3e38): INVALID,
  }
  logits, labels = jnp.array(list(rows)), jnp.ones(len(rows), int)
  found = predict(logits, labels)
  assert found.tolist() == list(rows.values())
  np.testing.assert_array_equal(in_top(logits, labels, 1), found == 1)
  np.testing.assert_array_equal(in_top(logits, labels, 3), found == 1)


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


# ------------------------------------------------ NT-Xent at low temperatures


def published_contrastive(name, views, temperature, detach_keys):
  """RoCL's formula as it stands in the code, and Eq. 3: for float64."""
  unit = lambda x: (
    x
    / (
      jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-30)) + 1e-8
    )
  )
  z = [unit(view) for view in views]
  n, everything = len(z[0]), jnp.concatenate(z)
  keys = jax.lax.stop_gradient(everything) if detach_keys else everything
  exps = jnp.exp(everything @ keys.T / temperature)
  total = (exps * (1 - jnp.eye(len(exps)))).sum(1)
  rows, ratios = jnp.arange(n), {}
  for a in range(len(z)):
    for k in range(len(z)):
      positive = exps[a * n + rows, k * n + rows]
      ratios[a, k] = positive / (total[a * n + rows] + 1e-8)
  if name == 'nt_xent_eq3':
    return -jnp.log(sum(ratios[0, k] for k in range(1, len(z))) + 1e-8)
  pairs = [-jnp.log(x + 1e-8) for (a, k), x in ratios.items() if a != k]
  return sum(pairs) / len(z)


def embeddings(kind, views):
  random = np.random.default_rng(0).standard_normal((views, 8, 16))
  common = np.random.default_rng(1).standard_normal((1, 1, 16))
  return {
    'random': random,
    'aligned': random[:1] + 0.01 * random,
    'nearly equal': common + 1e-3 * random,
    'antipodal': np.concatenate([-random[1:2], random[1:]]),
    'zero': np.zeros_like(random),
    'some zero': random * (np.arange(8) % 2)[:, None],
  }[kind].astype(np.float32)


@pytest.mark.parametrize(
  'name, detach_keys, groups',
  [
    ('nt_xent', True, 0),
    ('nt_xent', False, 2),
    ('nt_xent_eq3', True, 2),
    ('nt_xent_eq3', False, 0),
  ],
)
def test_nt_xent_in_float32_is_the_published_formula_in_float64(
  name, detach_keys, groups
):
  """Value and gradient, where float32 has no exp(cosine / temperature)."""

  def both(loss):
    def mean(z, temperature):
      grouped = losses.apart(loss, groups)
      return grouped(list(z), temperature, detach_keys).mean()

    return jax.jit(jax.value_and_grad(mean))

  ours = both(getattr(losses, name))
  theirs = both(lambda *rest: published_contrastive(name, *rest))
  temperatures = (0.5, 0.1, 0.0225, 0.0125, 0.01, 0.005)
  kinds = ('random', 'nearly equal', 'antipodal', 'zero', 'some zero')
  for views, kind in (*((3, kind) for kind in kinds), (2, 'aligned')):
    z = embeddings(kind, views)
    for temperature in temperatures:
      with jax.enable_x64(True):
        wide = jnp.asarray(z, jnp.float64)
        wanted, slope = theirs(wide, temperature)
        exact, exact_slope = ours(wide, temperature)
        # Equal to rounding in float64: the guards mean the same.
        np.testing.assert_allclose(exact, wanted, rtol=1e-12, atol=1e-14)
        # Where one positive outweighs all, the formula itself rounds.
        scale, rounding = float(jnp.abs(slope).max()), 1e-14 / temperature
        limit = 1e-9 * scale + rounding
        np.testing.assert_allclose(exact_slope, slope, rtol=0, atol=limit)
      found, found_slope = ours(jnp.asarray(z), temperature)
      assert found.dtype == jnp.float32
      np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
      limit = 1e-3 * scale + rounding
      np.testing.assert_allclose(found_slope, slope, rtol=0, atol=limit)


def test_nt_xent_of_bfloat16_is_that_of_the_same_numbers():
  z = jnp.asarray(embeddings('random', 3), jnp.bfloat16)
  for loss in (losses.nt_xent, losses.nt_xent_eq3):
    found = loss(list(z), 0.01)
    assert found.dtype == jnp.float32
    same = loss(list(z.astype(jnp.float32)), 0.01)
    np.testing.assert_array_equal(found, same)


def test_nt_xent_of_one_instance_is_its_guards():
  z = jnp.asarray(embeddings('random', 1)[[0, 0], :1])
  for loss in (losses.nt_xent, losses.nt_xent_eq3):
    mean = lambda z, loss=loss: loss(list(z), 0.01).mean()
    value, slope = jax.value_and_grad(mean)(z)
    assert abs(float(value)) < 1e-6
    assert float(jnp.abs(slope).max()) < 1e-6
