"""What every attack promises, over the registry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rocl_jax.attacks import (
  ATTACKS,
  BALLS,
  CLASSIFIER_ATTACKS,
  autoattack,
  ensemble,
)
from rocl_jax.attacks.apgd import apgd
from rocl_jax.attacks.classifier import image_keys, on_objective
from rocl_jax.attacks.fab import fab, project
from rocl_jax.attacks.pgd import STARTS, pgd
from rocl_jax.attacks.square import square
from rocl_jax.logits import INVALID, predict, ranked_class
from rocl_jax.losses import cross_entropy, dlr, margin, targeted_dlr

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


def test_more_steps_are_no_weaker():
  score = lambda steps: margin(
    logits(
      build('pgd', 'linf', 'uniform', steps)(
        loss_of(LABELS), IMAGES, jax.random.key(8)
      )
    ),
    LABELS,
  )
  assert float(score(20).mean()) >= float(score(1).mean())


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


# Attacks that read the logits.

RIGHT = logits(IMAGES).argmax(-1)  # labels that the network agrees with
KEYS = image_keys(jax.random.key(3), jnp.arange(6))
# A radius at which some images break and others do not.
EDGE = {'linf': 0.02, 'l2': 0.25}
OPTIONS = {
  'apgd': ({'loss': 'ce'}, {'loss': 'dlr'}, {'loss': 'dlr', 'targets': 3}),
  'fab': ({'targets': 3},),
  'square': ({'queries': 300},),
}
classifier_attacks = pytest.mark.parametrize(
  'attack, norm',
  [
    (functools.partial(CLASSIFIER_ATTACKS[name], norm=norm, **options), norm)
    for name in CLASSIFIER_ATTACKS
    for options in OPTIONS.get(name, ({},))
    for norm in BALLS
  ],
  ids=lambda value: (
    value
    if isinstance(value, str)
    else f'{value.func.__name__}-'
    + '-'.join(str(v) for v in value.keywords.values())
  ),
)


def run_all(attack, images=IMAGES, labels=RIGHT, keys=KEYS):
  """All turns, each image at the first of them that fools the network."""
  found = images
  run = lambda turn: attack.run(logits, images, labels, keys, turn).images
  turn_of = jax.jit(run)
  for turn in range(attack.turns):
    x = turn_of(turn)
    standing = (logits(found).argmax(-1) == labels)[:, None, None, None]
    found = jnp.where(standing, x, found)
  return found


@classifier_attacks
def test_classifier_attack_stays_inside_and_fools(attack, norm):
  x = run_all(attack(eps=EPS[norm] * 3))
  assert float(x.min()) >= 0 and float(x.max()) <= 1
  limit = EPS[norm] * 3 * (1 + 1e-5)
  assert float(BALLS[norm].norm(x - IMAGES).max()) <= limit
  assert bool((margin(logits(x), RIGHT) > margin(logits(IMAGES), RIGHT)).any())
  fooled = logits(x).argmax(-1) != RIGHT
  assert float(fooled.mean()) >= 0.5


@classifier_attacks
def test_an_images_fate_is_its_own(attack, norm):
  """Neither its place in the batch nor its neighbours matter."""
  run = jax.jit(functools.partial(attack(eps=EDGE[norm]).run, logits))
  x, _ = run(IMAGES, RIGHT, KEYS, 0)
  order = jnp.array([4, 1, 5])
  part, _ = run(IMAGES[order], RIGHT[order], KEYS[order], 0)
  together = logits(x[order]).argmax(-1) == RIGHT[order]
  np.testing.assert_array_equal(
    logits(part).argmax(-1) == RIGHT[order], together
  )


def test_a_larger_ball_never_saves_an_image():
  for norm in BALLS:
    robust = []
    for eps in (0, EDGE[norm], 4 * EDGE[norm]):
      few = [('apgd-ce', apgd(eps=eps, norm=norm, steps=20))]
      few.append(('square', square(eps=eps, norm=norm, queries=50)))
      result = autoattack(
        *(logits, IMAGES, RIGHT), eps=eps, norm=norm, attacks=few
      )
      robust.append(result.robust)
    assert robust[0].all() and not robust[-1].any()
    shares = [r.mean() for r in robust]
    assert shares == sorted(shares, reverse=True)


def test_checkpoints_of_apgd():
  """At 22 %, then 3 % less each time, at the least 6 % (official code)."""
  from rocl_jax.attacks.apgd import _windows

  windows = _windows(100)
  places = np.flatnonzero(windows)
  np.testing.assert_array_equal(windows[places][:7], [22, 19, 16, 13, 10, 7, 6])
  np.testing.assert_array_equal(places[:4], [22, 41, 57, 70])


def test_squares_shrink_as_published():
  from rocl_jax.attacks.square import _sizes

  sizes = np.asarray(_sizes(5000, 0.8, 32, 32, smallest=1, odd=False))
  at = [0, 10, 11, 51, 201, 501, 1001, 2001, 4001]
  np.testing.assert_array_equal(sizes[at], [29, 29, 20, 14, 10, 7, 5, 4, 3])
  sizes = np.asarray(_sizes(5000, 0.8, 32, 32, smallest=3, odd=True))
  np.testing.assert_array_equal(sizes[at], [29, 29, 21, 15, 11, 7, 5, 5, 3])


@pytest.mark.parametrize('norm', BALLS)
def test_projection_onto_a_hyperplane_in_the_box(norm):
  """On the plane, in the box, and no random point of both is nearer."""
  key = jax.random.split(jax.random.key(0), 4)
  points = jax.random.uniform(key[0], (5, 3, 3, 2))
  normal = jax.random.normal(key[1], points.shape)
  inside = jax.random.uniform(key[2], points.shape)  # the plane meets the box
  offset = (normal * inside).sum((1, 2, 3))
  nearest = project(points, normal, offset, norm)
  assert float(nearest.min()) >= 0 and float(nearest.max()) <= 1
  np.testing.assert_allclose(
    (normal * nearest).sum((1, 2, 3)), offset, atol=1e-5
  )
  distance = BALLS[norm].norm(nearest - points)
  for k in jax.random.split(key[3], 50):
    start = jax.random.uniform(k, points.shape)
    other = project(start, normal, offset, 'l2')  # some point of both
    assert bool((distance <= BALLS[norm].norm(other - points) + 1e-5).all())
  # Along one axis the answer is plain.
  axis = jnp.zeros((1, 1, 1, 2)).at[..., 0].set(2.0)
  moved = project(jnp.full((1, 1, 1, 2), 0.5), axis, jnp.array([1.6]), norm)
  np.testing.assert_allclose(moved[0, 0, 0], [0.8, 0.5], atol=1e-6)
  # Out of reach: the corner.
  moved = project(jnp.full((1, 1, 1, 2), 0.5), axis, jnp.array([9.0]), norm)
  np.testing.assert_allclose(moved[0, 0, 0], [1.0, 0.5], atol=1e-6)


def test_ratios_of_logits():
  z = jnp.array([[3.0, 1.0, 2.0, -1.0]])
  label = jnp.array([0])
  np.testing.assert_allclose(dlr(z, label), [-(3 - 2) / (3 - 1)], rtol=1e-6)
  np.testing.assert_allclose(dlr(7 * z, label), dlr(z, label), rtol=1e-6)
  wanted = (1.0 - 3.0) / (3.0 - (1.0 - 1.0) / 2)
  np.testing.assert_allclose(
    targeted_dlr(z, label, jnp.array([1])), [wanted], rtol=1e-6
  )
  for classes in (2, 3):
    few = z[:, :classes]
    assert np.isfinite(targeted_dlr(few, label, jnp.array([1]))).all()
    assert np.isfinite(dlr(few, label)).all()
  np.testing.assert_array_equal(
    [ranked_class(z, rank)[0] for rank in range(4)], [0, 2, 1, 3]
  )


def test_autoattack_counts_every_image_once_whatever_the_batch():
  n, labels = 21, jnp.arange(21) % 4
  images = jax.random.uniform(jax.random.key(5), (n, 8, 8, 3))
  labels = jnp.where(labels == 0, logits(images).argmax(-1), labels)
  few = (('apgd-ce', apgd(eps=EDGE['linf'], steps=20)),)
  few += (('square', square(eps=EDGE['linf'], queries=50)),)
  lines = []
  one, other = (
    autoattack(
      *(logits, images, labels),
      eps=EDGE['linf'],
      attacks=few,
      batch_size=size,
      say=lines.append,
    )
    for size in (4, 64)
  )
  np.testing.assert_array_equal(one.robust, other.robust)
  np.testing.assert_array_equal(one.clean, logits(images).argmax(-1) == labels)
  assert list(one.after) == ['apgd-ce', 'square'] and len(lines) == 4
  assert one.after['square'] == one.robust.mean() <= one.after['apgd-ce']
  assert 0 < one.robust.sum() < one.clean.sum() < n
  # Its images are those that it speaks of.
  taken = logits(jnp.asarray(one.images)).argmax(-1)
  np.testing.assert_array_equal(taken, one.prediction)
  np.testing.assert_array_equal(taken == labels, one.robust)
  assert np.abs(one.images - images).max() <= EDGE['linf'] + 1e-6


def test_a_run_goes_on_from_any_batch_to_the_same_end():
  """State after each batch is enough, as it is after writing and reading."""
  rng = np.random.default_rng(0)
  strength = rng.random((2, 3, 40))  # by member, turn and image
  labels = np.zeros(40, int)
  members = [('a', apgd(eps=0.1, restarts=3)), ('b', square(eps=0.1))]
  calls, states = [], []

  def attempt(member, turn, rows, size):
    calls.append((member, turn, tuple(rows)))
    prediction = np.zeros(size, int)
    prediction[: len(rows)] = strength[member, turn, rows] > 0.8
    zeros = np.zeros(size)
    return ensemble.Attempt(zeros, prediction, *[zeros] * 5)

  run = lambda fates, settled=lambda *_: None: ensemble.run(
    members, attempt, labels, fates, (4, 8), settled
  )
  first = ensemble.begin(rng.random(40) > 0.1, labels, labels == 0)
  straight = run(first, lambda fates, *_: states.append(fates))
  assert straight.after[-1] == straight.robust.sum() < straight.after[0]
  counted = lambda fates: ensemble.counted_once(members, first.robust, fates)
  assert counted(straight) == 40
  twice = straight.tries + (np.arange(40) == 3)
  assert counted(straight._replace(tries=twice)) == 39
  every = list(calls)
  sizes = [len(rows) for *_, rows in every]
  assert max(sizes) == 8 and sum(s < 8 for s in sizes) <= 4  # one a turn
  for done, state in enumerate(states):
    calls.clear()
    again = run(state)
    assert calls == every[done + 1 :]
    for a, b in zip(again, straight, strict=True):
      np.testing.assert_array_equal(a, b)


def test_restarts_add_to_what_fewer_find():
  attack = functools.partial(
    *(on_objective, pgd),
    {'eps': EDGE['linf'], 'step_size': EDGE['linf'] / 4, 'steps': 1},
    'cross_entropy',
  )
  images = jax.random.uniform(jax.random.key(5), (40, 8, 8, 3))
  labels = logits(images).argmax(-1)
  few, many = (
    autoattack(
      *(logits, images, labels),
      eps=EDGE['linf'],
      attacks=[('pgd', attack(restarts))],
    ).robust
    for restarts in (1, 8)
  )
  assert bool((many <= few).all()) and many.sum() < few.sum()


def test_random_networks_are_attacked_in_expectation():
  """Noise that hides a step's gradient averages out over samples."""

  def noisy(images, key):
    return logits(images + 0.1 * jax.random.normal(key, images.shape))

  result = autoattack(
    *(noisy, IMAGES, RIGHT), eps=4 * EDGE['linf'], version='rand'
  )
  assert list(result.after) == ['apgd-ce', 'apgd-dlr']
  assert not result.robust.any()


# Networks that give no answer, or no gradient.

SHADES = 0.1 + 0.2 * jnp.arange(5)  # of the first pixel: which trouble


def shade(images):
  """Which of SHADES the first pixel has, a little moved or not."""
  return jnp.abs(images[:, 0, 0, :1] - SHADES).argmin(-1)


def troubled(centres, eps):
  """A network that is sound on images of the first shade, rules out a class by
  -inf on the second, has infinite gradients at black pixels on the third,
  answers NaN at a distance from the centres on the fourth, +inf on the fifth.
  """

  def network(images):
    kind = shade(images)[:, None]
    moved = jnp.abs(images[:, None] - centres[None]).min(1).max((1, 2, 3))
    answers = logits(images)
    answers = jnp.where((kind == 1) & ruled_out, -jnp.inf, answers)
    dark = jnp.where((kind == 2)[..., None, None], images, 1) ** 0.5
    answers += dark.mean((1, 2, 3))[:, None] - 1
    far = (kind == 3) & (moved > eps / 40)[:, None]
    answers = jnp.where(far, jnp.nan, answers)
    return jnp.where((kind == 4) & (jnp.arange(4) == 0), jnp.inf, answers)

  ruled_out = jax.nn.one_hot(TROUBLED_LABELS, 4).sum(0) == 0
  return network


TROUBLED = IMAGES[:5].at[:, 0, 0, 0].set(SHADES).at[2, 4:].set(0)
TROUBLED_LABELS = logits(TROUBLED).argmax(-1)


def check_troubled(x, eps, norm):
  """Finite, in its ball, and without an answer where the network has none."""
  network = troubled(TROUBLED, eps)
  assert bool(jnp.isfinite(x).all())
  assert float(x.min()) >= 0 and float(x.max()) <= 1
  limit = eps * (1 + 1e-5)
  assert float(BALLS[norm].norm(x - TROUBLED).max()) <= limit
  verdict = np.asarray(predict(network(x), TROUBLED_LABELS))
  assert (verdict[:3] != INVALID).all() and (verdict[3:] == INVALID).all()


@everywhere
def test_only_finite_gradients_are_followed(attack, norm, start):
  network = troubled(TROUBLED, EPS[norm])
  objective = lambda x: cross_entropy(network(x), TROUBLED_LABELS)
  x, stuck = attack(objective, TROUBLED, jax.random.key(0), counted=True)
  check_troubled(x, EPS[norm], norm)
  assert int(stuck[0]) == int(stuck[1]) == 0 and int(stuck[4]) > 0
  assert bool((x != TROUBLED)[:3].any((1, 2, 3)).all())
  if start == 'none':  # black pixels stay, and only they
    assert int(stuck[2]) == 10 * int((TROUBLED[2] == 0).sum())
    assert bool((x[2] == 0)[TROUBLED[2] == 0].all())


@classifier_attacks
def test_no_answer_is_neither_robust_nor_broken(attack, norm):
  eps = EPS[norm] * 3
  network = troubled(TROUBLED, eps)
  keys, labels = KEYS[:5], TROUBLED_LABELS
  x, stuck = jax.jit(functools.partial(attack(eps=eps).run, network))(
    TROUBLED, labels, keys, 0
  )
  check_troubled(x, eps, norm)
  assert int(stuck[0]) == int(stuck[1]) == 0
  # A class that can not win changes nothing but that it is none.
  far_below = lambda x: jnp.where(
    jnp.isneginf(network(x)), logits(x).min() - 50, network(x)
  )
  other, _ = jax.jit(functools.partial(attack(eps=eps).run, far_below))(
    TROUBLED, labels, keys, 0
  )
  fate = lambda x: np.asarray(predict(network(x), labels))[:2] == labels[:2]
  np.testing.assert_array_equal(fate(x), fate(other))


def test_one_draw_without_an_answer_is_enough():
  """NaN in some draws only, as a division by a random number may give."""

  def unsound(images, key):
    odd = jax.random.bernoulli(key, 0.2, (len(images), 1))
    return jnp.where(odd, jnp.nan, logits(images))

  few = [('apgd-ce', apgd(eps=0.01, steps=5, samples=20))]
  result = autoattack(
    *(unsound, IMAGES, RIGHT), eps=0.01, version='rand', attacks=few
  )
  assert result.invalid.all() and not result.robust.any()


def test_numbers_of_any_size_are_attacked_alike():
  """Logits out of all proportion, and classes far below the others, with
  gradients in float16."""
  two = logits(IMAGES)[:, :2]
  labels = two.argmax(-1)
  for norm in BALLS:
    eps = EPS[norm]
    made = [
      ('dlr', apgd(eps=eps, norm=norm, loss='dlr', steps=10)),
      ('fab', fab(eps=eps, norm=norm, targets=1, steps=10)),
    ]
    run = lambda f, eps=eps, norm=norm, made=made: autoattack(
      f, IMAGES, labels, eps=eps, norm=norm, attacks=made
    )
    wanted = run(lambda x: logits(x)[:, :2])
    large = run(lambda x: 1e20 * logits(x)[:, :2])
    np.testing.assert_array_equal(large.robust, wanted.robust)

    def masked(images):
      features = jnp.tanh(images.reshape(len(images), -1) @ WEIGHTS)
      half = (features @ HEAD).astype('float16').astype('float32')
      return jnp.where(jnp.arange(4) < 2, half, -1e9)

    assert run(masked).after['dlr'] <= wanted.after['dlr'] + 0.2


def test_autoattack_counts_what_has_no_answer():
  few = [('apgd-ce', apgd(eps='8/255', steps=10))]
  few += [('apgd-t', apgd(eps=8 / 255, loss='dlr', targets=9, steps=10))]
  with pytest.warns(
    UserWarning, match='apgd-t: found 9 targets, and 4 classes'
  ):
    result = autoattack(
      *(troubled(TROUBLED, 8 / 255), TROUBLED, TROUBLED_LABELS),
      eps='8/255',
      attacks=few,
    )
  np.testing.assert_array_equal(result.invalid, [0, 0, 0, 1, 1])
  assert not (result.robust & result.invalid).any()
  assert (result.prediction[3:] == INVALID).all() and result.stuck[2] > 0
  nothing = autoattack(
    *(lambda x: logits(x) * jnp.nan, IMAGES, jnp.zeros(6, int)),
    eps=8 / 255,
    attacks=few,
  )
  assert nothing.invalid.all() and not nothing.robust.any()
  assert not nothing.clean.any()


TYPES = [
  ('bfloat16', False),
  ('float16', False),
  ('float32', False),
  ('float32', True),
  ('float64', True),
]


@pytest.mark.parametrize('kind, x64', TYPES)
def test_logits_of_every_type(kind, x64):
  """Loops have carries of one type: tracing them shows it."""
  eps = EPS['linf']
  with jax.enable_x64(x64):
    weights, head = (np.asarray(w, kind) for w in (WEIGHTS, HEAD))

    def network(images):
      flat = images.reshape(len(images), -1).astype(kind)
      return jnp.tanh(flat @ weights) @ head

    for norm in BALLS:
      made = [
        CLASSIFIER_ATTACKS[name](eps=eps, norm=norm, **options)
        for name in CLASSIFIER_ATTACKS
        for options in OPTIONS[name]
      ]
      keywords = {'eps': eps, 'step_size': eps, 'steps': 2, 'norm': norm}
      made += [on_objective(ATTACKS[n], keywords, 'margin', 1) for n in ATTACKS]
      for attack in made:
        x, stuck = jax.eval_shape(
          functools.partial(attack.run, network),
          *(jnp.asarray(IMAGES), RIGHT.astype(jnp.int32), KEYS, jnp.int32(0)),
        )
        assert (x.dtype, stuck.dtype) == ('float32', 'int32'), attack
    few = [('apgd', apgd(eps=EDGE['linf'], steps=5, loss='dlr', targets=3))]
    run = functools.partial(autoattack, eps=EDGE['linf'], attacks=few)
    images, labels = np.asarray(IMAGES), np.asarray(RIGHT)
    robust = run(network, images, labels).robust
    if kind == 'float32':
      np.testing.assert_array_equal(robust, run(logits, IMAGES, RIGHT).robust)


def test_images_and_labels_of_every_kind():
  eight = (np.asarray(IMAGES) * 255).round().astype(np.uint8)
  read_only = (eight / 255).astype(np.float32)
  read_only.flags.writeable = False
  few = [('square', square(eps=EDGE['linf'], queries=20))]
  pairs = [
    (eight, np.asarray(RIGHT, np.int64)),
    (read_only, np.asarray(RIGHT, np.uint8)),
    (jnp.asarray(eight / 255), RIGHT),
    (eight / 255, np.asarray(RIGHT).tolist()),
  ]
  results = [
    autoattack(logits, *pair, eps=EDGE['linf'], attacks=few) for pair in pairs
  ]
  for result in results[1:]:
    np.testing.assert_allclose(result.images, results[0].images, atol=1e-6)
    np.testing.assert_array_equal(result.robust, results[0].robust)
  objective = lambda x: cross_entropy(logits(x), RIGHT)
  attack = build('pgd', 'linf', 'uniform')
  key = jax.random.key(3)
  for images, _ in pairs[:3]:
    x = attack(objective, images, key)
    np.testing.assert_allclose(x, attack(objective, eight, key), atol=1e-6)
  # Keys of the old style are keys.
  old = attack(objective, eight, jax.random.PRNGKey(3))
  np.testing.assert_array_equal(old, attack(objective, eight, key))
  # Out of range by rounding alone.
  edge = jnp.clip(IMAGES, 0, 1).at[0, 0, 0, 0].set(1 + 2**-23)
  assert float(attack(objective, edge, key).max()) <= 1


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((logits, IMAGES * 255, RIGHT), 'images: found.*divide by 255'),
    ((logits, IMAGES * 2 - 1, RIGHT), 'images: found.*normalisation belongs'),
    (
      (logits, IMAGES * 1.2, RIGHT),
      r'images: found .*wanted values in .0, 1.$',
    ),
    ((logits, IMAGES * jnp.nan, RIGHT), "images: found 'nan to nan'"),
    ((logits, IMAGES[0], RIGHT), 'images: found'),
    ((logits, IMAGES, RIGHT[:3]), 'labels: found'),
    ((logits, IMAGES, RIGHT + 4), 'labels: found .*wanted 0 to 3'),
    ((logits, IMAGES, jax.nn.one_hot(RIGHT, 4)), 'labels: found'),
    ((lambda x: x, IMAGES, RIGHT), 'logits_fn: found'),
    ((lambda x: logits(x)[:, :1], IMAGES, RIGHT * 0), 'two classes or more'),
    ((lambda x: logits(x).argmax(-1), IMAGES, RIGHT), 'logits_fn: found .int'),
    ((lambda x: np.asarray(x), IMAGES, RIGHT), 'JAX can not trace'),
    ((lambda x: x[x > 0], IMAGES, RIGHT), 'JAX can not trace'),
    ((None, IMAGES, RIGHT), 'logits_fn: found None, wanted a function'),
    ((logits, IMAGES, np.int64(RIGHT) + 2**32), 'labels: found .*from 0'),
    ((logits, [[1], [1, 2]], RIGHT), 'images: found .rows of different'),
    ((logits, np.ma.masked_less(IMAGES, 0.5), RIGHT), 'without a mask'),
  ],
)
def test_autoattack_names_what_it_was_given(arguments, message):
  with pytest.raises(ValueError, match=message):
    autoattack(*arguments, eps=0.1)


@pytest.mark.parametrize(
  'keywords, message',
  [
    ({'eps': 8}, 'eps: found 8.0, wanted .*did you mean 8/255'),
    ({'eps': '8/'}, "eps: found '8/', wanted a number, or a quotient"),
    ({'eps': -0.1}, 'eps: found -0.1, wanted 0 to'),
    ({'norm': 'L2'}, "norm: found 'L2', wanted one of l2, linf.*mean 'l2'"),
    ({'seed': -1}, 'seed: found -1, wanted 0 to'),
    ({'batch_size': 0}, 'batch_size: found 0, wanted 1 to'),
    ({'batch_size': 2.5}, 'batch_size: found 2.5, wanted a whole number'),
    ({'version': 'plus'}, "version: found 'plus'"),
    ({'mesh': 'cpu'}, "mesh: found 'str'"),
    ({'attacks': 5}, 'attacks: found 5, wanted pairs'),
    (
      {'attacks': [('a', apgd(eps=0.2))]},
      r"attacks.0.: found 'linf 0.2', wanted the ball of all, linf 0.1",
    ),
    (
      {'attacks': [('a', apgd(eps=0.1)), ('a', square(eps=0.1))]},
      r"attacks.1.: found 'a', wanted another name",
    ),
    ({'attacks': ['apgd']}, r"attacks\[0\]: found 'apgd', wanted pairs"),
  ],
)
def test_autoattack_names_a_keyword_of_the_wrong_kind(keywords, message):
  with pytest.raises(ValueError, match=message):
    autoattack(logits, IMAGES, RIGHT, **({'eps': 0.1} | keywords))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'eps': 8}, 'eps: found 8.0, .*did you mean 8/255'),
    ({'step_size': -1}, 'step_size: found -1'),
    ({'steps': 1.5}, 'steps: found 1.5, wanted a whole number'),
    ({'start': 'random'}, "start: found 'random', wanted one of gaussian"),
    ({'norm': 'L2'}, "norm: found 'L2'"),
    ({'images': IMAGES * 255}, 'images: found .*divide by 255'),
    ({'step_size': 1e39}, 'step_size: found 1e'),
    ({'objective': None}, 'objective: found None, wanted a function'),
    (
      {'objective': lambda x: np.asarray(x).sum((1, 2, 3))},
      'objective: found .a function that JAX can not trace',
    ),
    ({'images': IMAGES[:, :0]}, r'images: found .float32 .6, 0, 8, 3'),
    ({'key': 0}, "key: found '0', wanted a key, such as jax.random.key"),
    ({'key': jax.random.PRNGKey(0)[None]}, r'key: found .1., wanted one key'),
    ({'key': KEYS[:3]}, r'key: found \[3\], wanted one key'),
    ({'objective': lambda x: x.sum()}, 'objective: found .* a number for each'),
    ({'objective': lambda x: x}, 'objective: found'),
  ],
)
def test_pgd_names_what_it_was_given(changes, message):
  given = {
    'objective': loss_of(RIGHT),
    'images': IMAGES,
    'key': jax.random.key(0),
  }
  settings = {'eps': '8/255', 'step_size': '2/255', 'steps': 2} | changes
  positional = [settings.pop(k, given[k]) for k in given]
  with pytest.raises(ValueError, match=message):
    pgd(*positional, **settings)


def test_devices_may_lie_along_any_axes():
  devices = np.array(jax.devices()[:4]).reshape(2, 2)
  few = [('square', square(eps=EDGE['linf'], queries=5))]
  run = functools.partial(
    autoattack, logits, IMAGES, RIGHT, eps=EDGE['linf'], attacks=few
  )
  wide = run(mesh=jax.sharding.Mesh(devices, ('a', 'b')))
  np.testing.assert_array_equal(wide.robust, run().robust)
  with jax.set_mesh(jax.make_mesh((1,), ('data',))):
    np.testing.assert_array_equal(wide.robust, run().robust)
