"""What every attack promises, over the registry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rocl_jax.attacks import ATTACKS, BALLS, worst_of_restarts
from rocl_jax.attacks.pgd import STARTS, pgd
from rocl_jax.losses import cross_entropy, margin

EPS = {'linf': 8 / 255, 'l2': 0.5}
IMAGES = jax.random.uniform(jax.random.key(0), (6, 8, 8, 3))
LABELS = jnp.arange(6) % 4
WEIGHTS = jax.random.normal(jax.random.key(1), (8 * 8 * 3, 16)) / 8
HEAD = jax.random.normal(jax.random.key(2), (16, 4))


def logits(images):
  hidden = jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS)
  return hidden @ HEAD


def loss_of(labels):
  return lambda x: cross_entropy(logits(x), labels)


def build(name, norm, start, steps=10):
  return functools.partial(
    ATTACKS[name],
    eps=EPS[norm],
    step_size=EPS[norm] / 4,
    steps=steps,
    norm=norm,
    start=start,
  )


everywhere = pytest.mark.parametrize(
  'attack, norm, start',
  [
    (build(name, norm, start), norm, start)
    for name in ATTACKS
    for norm in BALLS
    for start in STARTS
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)


@everywhere
def test_stays_inside_and_raises_the_objective(attack, norm, start):
  x = jax.jit(attack, static_argnums=0)(
    loss_of(LABELS), IMAGES, jax.random.key(3)
  )
  assert x.shape == IMAGES.shape and bool(jnp.isfinite(x).all())
  assert float(x.min()) >= 0 and float(x.max()) <= 1
  assert float(BALLS[norm].norm(x - IMAGES).max()) <= EPS[norm] * (1 + 1e-5)
  objective = loss_of(LABELS)
  assert bool((objective(x) > objective(IMAGES)).all())


@everywhere
def test_is_a_function_of_its_key_and_of_each_image_alone(attack, norm, start):
  key = jax.random.key(4)
  x = attack(loss_of(LABELS), IMAGES, key)
  np.testing.assert_array_equal(x, attack(loss_of(LABELS), IMAGES, key))
  if start == 'none':
    part = attack(loss_of(LABELS[:2]), IMAGES[:2], key)
    np.testing.assert_allclose(part, x[:2], atol=1e-6)
  else:
    other = attack(loss_of(LABELS), IMAGES, jax.random.key(5))
    assert bool((other != x).any())


@pytest.mark.parametrize('name', ATTACKS)
@pytest.mark.parametrize('norm', BALLS)
def test_a_ball_of_radius_zero_holds_the_image_alone(name, norm):
  attack = functools.partial(ATTACKS[name], norm=norm, eps=0, step_size=0.1)
  x = attack(loss_of(LABELS), IMAGES, jax.random.key(6), steps=3)
  np.testing.assert_allclose(x, IMAGES, atol=1e-7)


def test_no_steps_give_the_start_inside_the_box():
  x = build('pgd', 'linf', 'uniform', steps=0)(
    loss_of(LABELS), IMAGES, jax.random.key(7)
  )
  assert float(x.min()) >= 0 and float(x.max()) <= 1
  assert bool((x != IMAGES).any())


def test_more_steps_and_more_restarts_are_never_weaker():
  score = lambda x: margin(logits(x), LABELS)

  def reached(steps, restarts):
    attack = worst_of_restarts(
      build('pgd', 'linf', 'uniform', steps), restarts, score
    )
    return score(attack(loss_of(LABELS), IMAGES, jax.random.key(8)))

  assert float(reached(20, 1).mean()) >= float(reached(1, 1).mean())
  few, many = reached(2, 1), reached(2, 5)
  assert bool((many >= few).all()) and bool((many > few).any())


def test_linear_objective_ends_in_the_corner():
  """On w·x the attack must end at eps * sign(w), clipped to the image."""
  w = jax.random.normal(jax.random.key(9), IMAGES.shape)
  x = pgd(
    lambda x: (w * x).sum((1, 2, 3)),
    IMAGES,
    jax.random.key(0),
    eps=0.1,
    step_size=0.05,
    steps=5,
  )
  corner = jnp.clip(IMAGES + 0.1 * jnp.sign(w), 0, 1)
  np.testing.assert_allclose(x, corner, atol=1e-6)


def test_uniform_draws_fill_the_l2_ball():
  draws = BALLS['l2'].sample(jax.random.key(0), (4000, 1, 2, 1), 2.0)
  radii = BALLS['l2'].norm(draws)
  assert float(radii.max()) <= 2.0
  # In two dimensions half of the area lies within radius / sqrt(2).
  inner = float((radii < 2 / np.sqrt(2)).mean())
  assert abs(inner - 0.5) < 0.03
