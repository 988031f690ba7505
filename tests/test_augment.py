"""Augmentations against independent implementations."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rocl_jax import augment

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.random((12, 12, 3)).astype(np.float32)


def test_hue_turns_as_colorsys_does():
  turned = augment.rotate_hue(jnp.asarray(IMAGE), jnp.float32(0.3))
  wanted = IMAGE.copy()
  for pixel in wanted.reshape(-1, 3):
    h, s, v = colorsys.rgb_to_hsv(*map(float, pixel))
    pixel[:] = colorsys.hsv_to_rgb((h + 0.3) % 1, s, v)
  np.testing.assert_allclose(turned, wanted, atol=1e-5)
  grey = jnp.full((2, 2, 3), 0.4)
  np.testing.assert_allclose(augment.rotate_hue(grey, 0.2), grey, atol=1e-6)


def test_crop_resizes_as_pil_does():
  for start, extent in ((0, 12), (3, 5), (7, 1), (2, 9)):
    weights = augment._bilinear_weights(12, start, extent)
    line = jnp.einsum('oh,hwc->owc', weights, IMAGE)
    for channel in range(3):
      plane = Image.fromarray(IMAGE[start : start + extent, :, channel])
      wanted = plane.resize((12, 12), Image.Resampling.BILINEAR)
      np.testing.assert_allclose(
        line[..., channel], np.asarray(wanted), atol=1e-5
      )


def test_crops_have_the_distribution_of_random_resized_crop():
  """The mean of a left-to-right ramp tells where a crop lay and how wide."""
  ramp = jnp.broadcast_to(jnp.arange(32.0)[None, :, None] / 31, (32, 32, 3))
  keys = jax.random.split(jax.random.key(0), 4000)
  crop = lambda key: augment.random_resized_crop(ramp, key, 0.08)
  lines = jax.jit(jax.vmap(crop))(keys)[:, 0, :, 0]
  width = (lines[:, -1] - lines[:, 0]) * 31 + 1
  centre = lines.mean(1)
  # Drawn from the same law in NumPy, integer steps and rejections included.
  drawn = np.array([reference_width(RANDOM) for _ in range(4000)])
  assert abs(float(width.mean()) - drawn.mean()) < 0.6
  assert abs(float(width.std()) - drawn.std()) < 0.6
  assert float(width.min()) < 8 and float(width.max()) > 31.9
  assert abs(float(centre.mean()) - 0.5) < 0.01


def reference_width(random):
  for _ in range(10):
    area = 1024 * random.uniform(0.08, 1)
    ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    if 0 < w <= 32 and 0 < h <= 32:
      return w
  return 32


def test_supervised_crops_are_shifts_of_the_padded_image():
  images = RANDOM.integers(1, 256, (64, 6, 6, 3)).astype(np.uint8)
  views = augment.crops(images, jax.random.key(0), padding=2, flip=True)
  padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))) / np.float32(255)
  seen = set()
  for view, image in zip(np.asarray(views), padded, strict=True):
    found = [
      (top, left, flip)
      for top in range(5)
      for left in range(5)
      for flip in (False, True)
      if np.allclose(
        view[:, ::-1] if flip else view, image[top : top + 6, left : left + 6]
      )
    ]
    assert len(found) == 1
    seen.update(found)
  assert {flip for *_, flip in seen} == {True, False}
  assert {top for top, *_ in seen} == set(range(5))


def test_no_augmentation_is_the_image_itself():
  images = RANDOM.integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
  same = augment.crops(images, jax.random.key(0), padding=0, flip=False)
  wanted = augment.to_float(jnp.asarray(images))
  np.testing.assert_array_equal(same, wanted)


@pytest.mark.parametrize('padding, flip', [(4, True), (1, False), (0, True)])
def test_crops_are_the_same_on_every_platform(padding, flip, lower_for):
  images = RANDOM.integers(0, 256, (64, 9, 7, 3)).astype(np.uint8)
  key = jax.random.key(0)
  here = augment.crops(images, key, padding, flip)
  lower_for('tpu')
  np.testing.assert_array_equal(augment.crops(images, key, padding, flip), here)


def test_views_are_random_valid_and_independent():
  images = RANDOM.integers(0, 256, (128, 8, 8, 3)).astype(np.uint8)
  first = augment.views(images, jax.random.key(0))
  second = augment.views(images, jax.random.key(1))
  for views in (first, second):
    assert views.shape == images.shape and views.dtype == jnp.float32
    assert float(views.min()) >= 0 and float(views.max()) <= 1 + 1e-6
  assert float((first != second).mean()) > 0.9
  np.testing.assert_array_equal(first, augment.views(images, jax.random.key(0)))
  grey = jnp.ptp(first, axis=-1).max((1, 2)) < 1e-6
  assert 0.08 < float(grey.mean()) < 0.35  # probability 0.2
