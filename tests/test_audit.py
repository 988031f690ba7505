"""Networks with a planted defect must not pass; one without must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rocl_jax import losses
from rocl_jax.audit import audit, chance, failed, of_records, white_box

N, SIZE, CLASSES = 48, 6, 4
IMAGES = np.asarray(
  jax.random.uniform(jax.random.key(0), (N, SIZE, SIZE, 3))
).round(2)
WEIGHTS = jax.random.normal(jax.random.key(1), (SIZE * SIZE * 3, 16)) / 4
HEAD = jax.random.normal(jax.random.key(2), (16, CLASSES))
EPS = 0.02


def features(images):
  flat = images.reshape(len(images), -1)
  return jnp.tanh((flat - 0.5) @ WEIGHTS)


def sound(images):
  return features(images) @ HEAD


LABELS = np.asarray(sound(IMAGES).argmax(-1))


def softmax(images):
  return jax.nn.softmax(sound(images))


def quantised(images):
  """Rounds its input: almost nowhere a gradient."""
  return sound(jnp.round(images * 4) / 4)


def saturated(images):
  """A float32 softmax of large logits is exactly 0 and 1."""
  return jax.nn.softmax(1e3 * sound(images)) * 10


def training_batchnorm(images):
  z = features(images)
  z = (z - z.mean(0)) / (z.std(0) + 1e-5)
  return z @ HEAD


def dropout(images):
  """Left on, with the key of the training step that was traced."""
  z = features(images)
  keep = jax.random.bernoulli(jax.random.key(0), 0.7, z.shape)
  return jnp.where(keep, z / 0.7, 0) @ HEAD


_RANDOM = np.random.default_rng(0)


def noise(images):
  """Other numbers in each pass."""
  shape = jax.ShapeDtypeStruct(images.shape, jnp.float32)
  draw = lambda: _RANDOM.normal(0, 0.05, images.shape).astype(np.float32)
  return sound(images + jax.pure_callback(draw, shape))


def not_finite(images):
  """The gradient of a square root at 0."""
  z = sound(images)
  return z + 1e-6 * jnp.sqrt(jnp.square(z - jax.lax.stop_gradient(z)))


def nan_away(images):
  """No answer but for the data."""
  moved = jnp.abs(images[:, None] - IMAGES[None]).min(1).max((1, 2, 3))
  return jnp.where(moved[:, None] > EPS / 8, jnp.nan, sound(images))


def infinite(images):
  return sound(images).at[:, 0].set(jnp.inf)


def nothing(images):
  return sound(images) * jnp.nan


def far_below(logits):
  """One more class, which a number far below the others rules out."""
  return jnp.pad(logits, ((0, 0), (0, 1)), constant_values=-1e9)


def label_ruled_out(images):
  return jnp.where(
    jax.nn.one_hot(LABELS[0], CLASSES) > 0, -jnp.inf, sound(images)
  )


def black_pixels(images):
  """An infinite gradient at 0, where IMAGES have some pixels."""
  return sound(images**0.5)


def check(logits_fn, attacked=None, **keywords):
  forwards = lambda _: (attacked or logits_fn, logits_fn)
  return audit(forwards, None, IMAGES, LABELS, **({'eps': EPS} | keywords))


@pytest.mark.parametrize('norm, eps', [('linf', EPS), ('l2', 0.2)])
def test_a_sound_network_passes(norm, eps):
  checks, curves = check(sound, norm=norm, eps=eps)
  assert not failed(checks), failed(checks)
  by_eps = [point['robust_top1'] for point in curves['eps']]
  assert by_eps[0] == 100 and 0 < by_eps[4] < 100
  assert [point['eps'] / eps for point in curves['eps']] == pytest.approx(
    [0, 0.25, 0.5, 0.75, 1, 1.5, 2]
  )
  assert [p['steps'] for p in curves['steps']] == [1, 2, 5, 10, 20, 50]


@pytest.mark.parametrize(
  'network',
  [
    lambda x: 1e-5 * sound(x),
    lambda x: jax.nn.log_softmax(sound(x)),
    lambda x: 3 + sound(x),
  ],
)
def test_a_sound_networks_numbers_may_lie_anywhere(network):
  assert not failed(check(network)[0])


def test_the_unbounded_attack_crosses_the_whole_range():
  """What is far from the other class is not robust for that."""
  bright = lambda x: x.mean((1, 2, 3)) - 0.85
  network = lambda x: 10 * jnp.stack([bright(x), -bright(x)], 1)
  images = np.where(np.arange(N)[:, None, None, None] % 2, 0.95, 0.05)
  images = np.broadcast_to(images, IMAGES.shape).astype(np.float32)
  labels = np.asarray(network(images).argmax(-1))
  checks, _ = audit(lambda _: (network,) * 2, None, images, labels, eps=EPS)
  assert 'an unbounded attack breaks every image' not in [
    c.check for c in failed(checks)
  ]


def test_classes_that_are_ruled_out_are_no_defect():
  """Two more, which no label has."""

  def network(images):
    return jnp.pad(sound(images), ((0, 0), (0, 2)), constant_values=-jnp.inf)

  checks, curves = check(network)
  assert not failed(checks), failed(checks)
  assert curves == check(sound)[1]


@pytest.mark.parametrize(
  'defect, name',
  [
    (softmax, 'logits, not probabilities'),
    (quantised, 'no gradient of the margin vanishes'),
    (saturated, 'no gradient of the margin vanishes'),
    (training_batchnorm, 'an image has the same logits beside other images'),
    (dropout, 'a permuted batch gives permuted logits'),
    (noise, 'two passes give the same logits'),
    (not_finite, 'gradients are finite'),
    (black_pixels, 'gradients are finite'),
    (lambda x: jax.nn.sigmoid(sound(x)), 'logits, not probabilities'),
    (lambda x: far_below(softmax(x)), 'logits, not probabilities'),
    (
      lambda x: far_below(training_batchnorm(x)),
      'an image has the same logits beside other images',
    ),
    (nan_away, 'no attacked image has invalid logits'),
    (nothing, 'no clean image has invalid logits'),
    (infinite, 'no clean image has invalid logits'),
    (label_ruled_out, 'no clean image has invalid logits'),
  ],
)
def test_a_planted_defect_is_caught(defect, name):
  checks, _ = check(defect)
  (found,) = [c.found for c in failed(checks) if c.check == name]
  assert all(c.found and c.wanted for c in checks)
  if 'invalid' in name:
    wanted = (LABELS == LABELS[0]).sum() if defect is label_ruled_out else N
    assert f'{wanted} of {N} images have NaN' in found


def test_gradients_of_another_network_are_caught():
  """A surrogate's gradients do not break the network that judges."""
  other = functools.partial(jnp.roll, shift=1, axis=-1)
  names = [c.check for c in failed(check(sound, lambda x: other(sound(x)))[0])]
  assert 'the attacked network is the judged one' in names
  # Gradients that lead nowhere: more steps, a larger ball, none at all.
  stuck = lambda x: sound(jax.lax.stop_gradient(x)) + 0 * x.mean((1, 2))[:, :1]
  names = [c.check for c in failed(check(sound, stuck)[0])]
  assert 'an unbounded attack breaks every image' in names


def test_robust_accuracy_that_grows_with_the_radius_is_caught():
  """An image far from all that it knows is taken for the nearest of them."""

  def trap(images):
    distances = jnp.abs(images[:, None] - IMAGES[None]).max((2, 3, 4))
    label = jax.nn.one_hot(jnp.asarray(LABELS)[distances.argmin(1)], CLASSES)
    moved = distances.min(1) > 1.2 * EPS
    return sound(images) + jnp.where(moved, 1e3, 0.0)[:, None] * label

  names = [c.check for c in failed(check(trap)[0])]
  assert 'robust accuracy does not grow with eps' in names


def test_labels_and_images_that_can_not_be_are_told():
  forwards = lambda _: (sound, sound)
  for images, labels, problem in [
    (IMAGES, LABELS + 1, 'labels: found .1 to 4., wanted 0 to 3'),
    (IMAGES * 255, LABELS, r'wanted values in \[0, 1\]; divide by 255'),
    (IMAGES * 2 - 1, LABELS, r'wanted values in \[0, 1\]; normalisation'),
    (IMAGES * np.nan, LABELS, r'images: found .nan to nan.'),
    (IMAGES[:, 0], LABELS, 'images: found'),
    (IMAGES, LABELS[1:], 'labels: found'),
  ]:
    with pytest.raises(ValueError, match=problem):
      audit(forwards, None, images, labels, eps=EPS)
  for keywords, problem in [
    ({'eps': 8}, 'did you mean 8/255'),
    ({'eps': 0}, 'eps: found 0.0, wanted more than 0'),
    ({'eps': EPS, 'norm': 'L2'}, "norm: found 'L2'"),
    ({'eps': EPS, 'seed': -1}, 'seed: found -1'),
  ]:
    with pytest.raises(ValueError, match=problem):
      audit(forwards, None, IMAGES, LABELS, **keywords)
  with pytest.raises(
    ValueError, match='forwards: found .function., wanted a pair'
  ):
    audit(lambda _: sound, None, IMAGES, LABELS, eps=EPS)


def record(**changes):
  return {
    'run': 'ours',
    'stage': 'finetune',
    'selection': 'last',
    'split': 'test',
    'n': 1000,
    'attack': 'autoattack',
    'algorithm': 'ensemble',
    'norm': 'linf',
    'eps': 0.03,
    'clean_top1': 80.0,
    'robust_top1': 44.0,
    'largest_distance': 0.03,
    'largest_outside': 0.0,
    'counted': 1000,
    'disputed': 0,
    'clean_invalid': 0,
    'invalid': 0,
    'stuck': 0,
    'per_class': {'robust_predicted': [750, 250]},
    'members': [
      {'attack': 'apgd-ce', 'algorithm': 'apgd', 'robust_top1': 46.0},
      {'attack': 'fab-t', 'algorithm': 'fab', 'robust_top1': 44.1},
      {'attack': 'square', 'algorithm': 'square', 'robust_top1': 44.0},
    ],
  } | changes


@pytest.mark.parametrize(
  'changes, problem',
  [
    ({}, None),
    ({'clean_top1': 40.0}, 'robust accuracy is not above clean'),
    (
      {'per_class': {'robust_predicted': [750, 249]}},
      'each image is counted once',
    ),
    ({'clean_invalid': 1}, 'no clean image has invalid logits'),
    (
      {'invalid': 1, 'per_class': {'robust_predicted': [749, 250]}},
      'no attacked image has invalid logits',
    ),
    ({'stuck': 1}, 'no image has gradients that are not finite'),
    ({'counted': 999}, 'each image is counted once'),
    (
      {'disputed': 3},
      'the network confirms what fooled its folded form',
    ),
    ({'largest_outside': 1e-3}, 'every adversarial image is in [0, 1]'),
    ({'largest_distance': 0.0301}, 'every adversarial image is in the ball'),
    ({'robust_top1': 43.7}, 'Square finds no more than attacks by gradients'),
  ],
)
def test_what_records_say_is_checked(changes, problem):
  bad = [c.check for c in failed(of_records([record(**changes)]))]
  assert bad == ([] if problem is None else [f'autoattack on test: {problem}'])


def test_one_image_more_is_no_evidence_against_gradients():
  """One of 360 is 0.27777... points, and records round."""
  few = record(n=360, counted=360, robust_top1=89.7222)
  few |= {'per_class': {'robust_predicted': [270, 90]}}
  few |= {'clean_top1': 98.0}
  for member, robust in zip(few['members'], (90.0, 90.0, 89.7222), strict=True):
    member['robust_top1'] = robust
  assert not failed(of_records([few]))


def test_an_ensemble_is_no_weaker_than_any_attack():
  single = {'attack': 'pgd50', 'algorithm': 'pgd', 'members': None}
  fine = [record(), record(**single, robust_top1=44.5)]
  assert not failed(of_records(fine))
  (bad,) = failed(of_records([record(), record(**single, robust_top1=43.0)]))
  assert bad.check == 'autoattack leaves no more than pgd50'
  # Of another radius nothing follows.
  assert not failed(
    of_records([record(), record(**single, robust_top1=43.0, eps=0.06)])
  )


def test_chance_depends_on_the_number_of_images():
  assert chance(100) == 2.0 and chance(256) == pytest.approx(0.78, abs=0.01)
  assert chance(10000) == pytest.approx(0.089, abs=0.001)
  assert white_box('a', 40.0, 39.95, 10000).passed
  assert not white_box('a', 40.0, 39.0, 10000).passed
  assert losses.margin(sound(IMAGES), LABELS).max() < 0
