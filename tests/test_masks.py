"""Masks keep exactly k, whatever the scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rocl_jax import masks

RANDOM = np.random.default_rng(0)
SCORES = {
  'distinct': RANDOM.standard_normal((3, 3, 7, 5)),
  'ties': RANDOM.integers(-2, 3, (3, 3, 7, 5)).astype(float),
  'equal': np.full((40, 10), -0.25),
  'zeros': np.where(RANDOM.random(500) < 0.5, 0.0, -0.0),
  'tiny': RANDOM.standard_normal(300) * 1e-42,  # denormal
  'wide': RANDOM.standard_normal(301) * 10.0 ** RANDOM.integers(-30, 30, 301),
  'one': np.array([3.0]),
}


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
@pytest.mark.parametrize('keep', [1.0, 0.5, 0.1, 0.01, 0.999])
@pytest.mark.parametrize('scores', SCORES.values(), ids=SCORES)
def test_keeps_exactly_k_and_the_first_of_equals(
  scores, keep, platform, lower_for
):
  lower_for(platform)
  scores = jnp.asarray(scores, jnp.float32)
  mask = np.asarray(masks.topk_mask(scores, keep)).reshape(-1)
  k = scores.size - int((1 - keep) * scores.size)
  assert mask.sum() == k == masks.kept_count(scores.size, keep)
  magnitudes = np.abs(np.asarray(scores)).reshape(-1)
  wanted = np.zeros_like(mask)
  wanted[np.argsort(-magnitudes, kind='stable')[:k]] = 1
  np.testing.assert_array_equal(mask, wanted)


def test_paper_counts():
  """As logged for k = 0.1 and k = 0.01 (conv1, linear)."""
  assert masks.kept_count(1728, 0.1) == 173
  assert masks.kept_count(5120, 0.1) == 512
  assert masks.kept_count(1728, 0.01) == 18
  assert masks.kept_count(5120, 0.01) == 52


def test_gradient_passes_straight_through_to_all_scores():
  scores = {'a': jnp.array([0.3, -0.2, 0.1, 0.0])}
  weights = jnp.array([1.0, 2.0, 3.0, 4.0])

  def loss(scores):
    return (masks.topk_masks(scores, 0.5)['a'] * weights).sum()

  assert float(loss(scores)) == 3.0
  gradient = jax.jit(jax.grad(loss))(scores)['a']
  np.testing.assert_array_equal(gradient, [1.0, -2.0, 3.0, 0.0])


def test_same_choice_compiled_or_not():
  scores = jnp.asarray(SCORES['ties'], jnp.float32)
  np.testing.assert_array_equal(
    masks.topk_mask(scores, 0.3),
    jax.jit(lambda s: masks.topk_mask(s, 0.3))(scores),
  )


def test_initial_scores_rank_as_the_weights_do():
  w = jnp.asarray(RANDOM.standard_normal((3, 3, 4, 8)), jnp.float32)
  scores = masks.init_scores({'w': w})['w']
  assert float(jnp.abs(scores).max()) == pytest.approx((6 / 36) ** 0.5)
  np.testing.assert_array_equal(
    masks.topk_mask(scores, 0.2), masks.topk_mask(w, 0.2)
  )
