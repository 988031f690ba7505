"""Optimisers and schedules; the published tables are in test_reference."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rocl_jax import optim, schedules


def settings(**changes):
  fields = dict(learning_rate=0.1, schedule='constant') | changes
  return optim.Settings(**fields)


def test_sgd_is_that_of_pytorch():
  """The decay enters the momentum: b = m b + g + wd p, p = p - lr b."""
  optimizer, _ = optim.make(settings(weight_decay=0.2), 1, 10)
  p, b = np.array([1.0, -2.0]), 0.0
  params = jnp.asarray(p)
  state = optimizer.init(params)
  for step in range(3):
    g = np.array([0.5, step - 1.0])
    updates, state = optimizer.update(jnp.asarray(g), state, params)
    params = optax.apply_updates(params, updates)
    b = 0.9 * b + g + 0.2 * p
    p = p - 0.1 * b
  np.testing.assert_allclose(params, p, rtol=1e-5)


def test_lars_is_that_of_torchlars():
  p = {'w': jnp.array([[3.0, 4.0]]), 'zero': jnp.zeros(2)}
  g = {'w': jnp.array([[0.6, 0.8]]), 'zero': jnp.ones(2)}
  rule = optim.lars_rate(weight_decay=0.1)
  updates, _ = rule.update(g, rule.init(p), p)
  local = 1e-3 * 5 / (1 + 0.1 * 5 + 1e-8)
  np.testing.assert_allclose(
    updates['w'],
    local * (np.asarray(g['w']) + 0.1 * np.asarray(p['w'])),
    rtol=1e-6,
  )
  np.testing.assert_array_equal(updates['zero'], np.ones(2))


def test_segments_start_the_schedule_over():
  _, rate = optim.make(settings(schedule='rocl'), 22, 5, segments=2)
  table = schedules.rocl(0.1, 11)
  for epoch in range(22):
    for step in (0, 4):
      wanted = table[epoch % 11]
      assert float(rate(epoch * 5 + step)) == pytest.approx(wanted, rel=1e-6)


def test_milestones_act_one_epoch_late():
  table = schedules.milestones(0.1, 150)
  assert table[30] == 0.1 and table[31] == pytest.approx(0.01)
  assert table[50] == pytest.approx(0.01) and table[51] == pytest.approx(1e-3)
  assert table[100] == pytest.approx(1e-3)
  assert table[101] == table[149] == pytest.approx(1e-4)


def test_warm_up_is_linear_and_the_cosine_ends_at_zero():
  _, rate = optim.make(settings(schedule='cosine', warmup_epochs=2.0), 10, 10)
  assert float(rate(0)) == 0.0
  assert float(rate(10)) == pytest.approx(0.05)
  assert float(rate(20)) == pytest.approx(0.1)
  assert float(rate(100)) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize('schedule', optim.SCHEDULES)
@pytest.mark.parametrize('epochs', [0, 1, 3])
def test_every_schedule_has_a_rate_for_every_length(schedule, epochs):
  warmup = 1.0 if schedule in schedules.PER_STEP else 0.0
  given = settings(schedule=schedule, warmup_epochs=warmup)
  _, rate = optim.make(given, epochs, 4)
  assert all(np.isfinite(float(rate(s))) for s in range(4 * epochs + 1))
