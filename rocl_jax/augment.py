"""Random views of images, drawn on the device inside the training step.

All functions take one image [H, W, 3] in [0, 1] and a key, and are applied to
a batch by `jax.vmap`. They compute in float: unlike the published pipeline,
which works on 8-bit PIL images, they do not round after every operation.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

GREY = (0.299, 0.587, 0.114)  # PIL's and torchvision's luma weights


def views(
  images: jax.Array, key: jax.Array, crop_scale: float = 0.08
) -> jax.Array:
  """RoCL's contrastive augmentation (`data_loader.py`), one view an image.

  In its order: color jitter (0.4, 0.4, 0.4, hue 0.1) with probability 0.8,
  grayscale 0.2, horizontal flip 0.5, random resized crop.

  Args:
    images: uint8 [N, H, W, 3].
    key: PRNG key of the batch.
    crop_scale: smallest share of the area that a crop may have.

  Returns:
    float32 [N, H, W, 3] in [0, 1].
  """

  def view(image, key):
    jitter, jittered, grey, flip, crop = jax.random.split(key, 5)
    apply = jax.random.bernoulli(jittered, 0.8)
    image = jnp.where(apply, color_jitter(image, jitter), image)
    to_grey = jax.random.bernoulli(grey, 0.2)
    image = jnp.where(
      to_grey, jnp.broadcast_to(luma(image), image.shape), image
    )
    return random_resized_crop(random_flip(image, flip), crop, crop_scale)

  keys = jax.random.split(key, len(images))
  return jax.vmap(view)(to_float(images), keys)


def crops(
  images: jax.Array, key: jax.Array, padding: int, flip: bool
) -> jax.Array:
  """The supervised stages' augmentation: zero padding, random crop, flip.

  Args:
    images: uint8 [N, H, W, 3].
    key: PRNG key of the batch.
    padding: zeros on each side before the crop; 0 for no crop.
    flip: whether to mirror, with probability 0.5.

  Returns:
    float32 [N, H, W, 3] in [0, 1].
  """

  def crop(image, key):
    offset_key, flip_key = jax.random.split(key)
    offset = jax.random.randint(offset_key, (2,), 0, 2 * padding + 1)
    image = jax.lax.platform_dependent(
      image,
      offset - padding,
      tpu=_shift_by_products,
      default=functools.partial(_shift, padding=padding),
    )
    return random_flip(image, flip_key) if flip else image

  return to_float(jax.vmap(crop)(images, jax.random.split(key, len(images))))


def _shift(image, offset, padding):
  """The image moved by an offset of at most `padding`, zeros where it was."""
  padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  row, column = offset + padding
  return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)


def _shift_by_products(image, offset):
  """`_shift` by matrices of zeros and ones: a TPU takes slices of different
  offsets one after the other. Bfloat16 has all of uint8's values."""

  def choice(size, start):
    places = jnp.arange(size)
    return (places[:, None] + start == places).astype(jnp.bfloat16)

  rows, columns = map(choice, image.shape[:2], offset)
  moved = jnp.einsum(
    'oh,hwc,pw->opc', rows, image.astype(jnp.bfloat16), columns
  )
  return moved.astype(image.dtype)


def to_float(images: jax.Array) -> jax.Array:
  """uint8 -> float32 in [0, 1]; the network sees nothing else."""
  return images.astype(jnp.float32) / 255


def random_flip(image: jax.Array, key: jax.Array) -> jax.Array:
  """Mirrors left and right with probability 0.5."""
  return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def luma(image: jax.Array) -> jax.Array:
  """[H, W, 3] -> grey [H, W, 1]."""
  return (image * jnp.asarray(GREY, image.dtype)).sum(-1, keepdims=True)


def color_jitter(
  image: jax.Array, key: jax.Array, strength: float = 0.4, hue: float = 0.1
) -> jax.Array:
  """torchvision's ColorJitter: four adjustments in random order.

  Brightness, contrast and saturation blend by a factor from
  U[1 - strength, 1 + strength]; the hue turns by U[-hue, hue] of a full turn.
  """
  order_key, factor_key, hue_key = jax.random.split(key, 3)
  low, high = 1 - strength, 1 + strength
  factors = jax.random.uniform(
    factor_key, (3,), jnp.float32, minval=low, maxval=high
  )
  turn = jax.random.uniform(hue_key, (), jnp.float32, minval=-hue, maxval=hue)

  def blend(image, other, factor):
    return jnp.clip(factor * image + (1 - factor) * other, 0, 1)

  adjustments: list[Callable[[jax.Array], jax.Array]] = [
    lambda x: blend(x, jnp.zeros_like(x), factors[0]),
    lambda x: blend(x, luma(x).mean(), factors[1]),
    lambda x: blend(x, luma(x), factors[2]),
    lambda x: rotate_hue(x, turn),
  ]
  order = jax.random.permutation(order_key, len(adjustments))
  for place in range(len(adjustments)):
    image = jax.lax.switch(order[place], adjustments, image)
  return image


def rotate_hue(image: jax.Array, turn: jax.Array) -> jax.Array:
  """Adds `turn` (1 is a full circle) to the hue of the HSV form."""
  r, g, b = image[..., 0], image[..., 1], image[..., 2]
  value, low = image.max(-1), image.min(-1)
  chroma = value - low
  safe = jnp.where(chroma > 0, chroma, 1)
  # Not value == r: a compiler may compute r twice, and round it differently.
  # Where two channels tie, both branches agree.
  sector = jnp.where(
    (r >= g) & (r >= b),
    (g - b) / safe,
    jnp.where(g >= b, 2 + (b - r) / safe, 4 + (r - g) / safe),
  )
  hue = jnp.where(chroma > 0, sector / 6, 0) + turn

  def channel(n):  # the closed form of the conversion back
    k = (n + 6 * hue) % 6
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  return jnp.stack([channel(5), channel(3), channel(1)], -1)


def random_resized_crop(
  image: jax.Array, key: jax.Array, min_scale: float = 0.08
) -> jax.Array:
  """torchvision's RandomResizedCrop to the image's own size, bilinear.

  Area share U[min_scale, 1], aspect ratio log-uniform in [3/4, 4/3]; the first
  of ten tries that fits counts, or else the whole image.
  """
  height, width = image.shape[:2]
  scale_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
  area = (
    height
    * width
    * jax.random.uniform(
      scale_key, (10,), jnp.float32, minval=min_scale, maxval=1.0
    )
  )
  log_ratio = jax.random.uniform(
    *(ratio_key, (10,), jnp.float32),
    minval=jnp.float32(jnp.log(3 / 4)),
    maxval=jnp.float32(jnp.log(4 / 3)),
  )
  ratio = jnp.exp(log_ratio)
  w, h = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
  fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
  first = jnp.argmax(fits)
  w = jnp.where(fits.any(), w[first], width)
  h = jnp.where(fits.any(), h[first], height)
  # A whole offset in [0, size - extent], as torchvision's randint draws it.
  top = jnp.floor(
    jax.random.uniform(top_key, (), jnp.float32) * (height - h + 1)
  )
  left = jnp.floor(
    jax.random.uniform(left_key, (), jnp.float32) * (width - w + 1)
  )
  rows = _bilinear_weights(height, top, h)
  columns = _bilinear_weights(width, left, w)
  highest = jax.lax.Precision.HIGHEST
  return jnp.einsum('oh,hwc,pw->opc', rows, image, columns, precision=highest)


def _bilinear_weights(size, start, extent):
  """[size, size]: row o interpolates the crop's line under output line o."""
  pixel = jnp.arange(size, dtype=jnp.float32)
  line = (pixel + 0.5) * (extent / size) - 0.5 + start
  line = jnp.clip(line, start, start + extent - 1)
  return jnp.maximum(0, 1 - jnp.abs(line[:, None] - pixel))
