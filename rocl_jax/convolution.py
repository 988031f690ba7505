"""Two-dimensional convolutions, and the form of them that an attack sees.

  y = conv(images, kernel, stride=1)                 # training
  y = frozen_conv(images, kernel, flip(kernel), 1)   # inside an attack

Inside a `while` loop XLA's CPU backend computes the input gradient of a
convolution with a generic kernel, four to eight times slower than outside. An
attack is such a loop, and its weights do not change while it runs. So
`frozen_conv` takes the flipped, transposed kernel as well, made once outside
the loop, and its backward pass is an ordinary convolution with it. The cure is
chosen where the program is lowered: GPUs and TPUs keep XLA's own gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def conv(images: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Convolves with symmetric padding k // 2, as PyTorch does.

  `SAME` would pad a stride-2 convolution by (0, 1) and shift the result.

  Args:
    images: [N, H, W, C_in].
    kernel: [k, k, C_in, C_out], k odd.
    stride: step in both directions.

  Returns:
    [N, ceil(H / stride), ceil(W / stride), C_out]. Float32 is computed as
    float32 on every device: accelerators would otherwise round the factors.
  """
  pad = kernel.shape[0] // 2
  return lax.conv_general_dilated(
    images,
    kernel,
    window_strides=(stride, stride),
    padding=((pad, pad), (pad, pad)),
    dimension_numbers=_LAYOUT,
    precision=lax.Precision.HIGHEST,
  )


def flip(kernel: jax.Array) -> jax.Array:
  """The kernel [k, k, C_out, C_in] of the input gradient of `kernel`."""
  return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_conv(
  images: jax.Array, kernel: jax.Array, flipped: jax.Array, stride: int
) -> jax.Array:
  """`conv` with a constant kernel: only the images get a gradient.

  Args:
    images: [N, H, W, C_in].
    kernel: [k, k, C_in, C_out].
    flipped: `flip(kernel)`, computed outside the loop that calls this.
    stride: 1 or 2.
  """
  del flipped
  return conv(images, kernel, stride)


def _forward(images, kernel, flipped, stride):
  return conv(images, kernel, stride), (kernel, flipped, images.shape)


def _backward(stride, residuals, cotangent):
  kernel, flipped, shape = residuals
  gradient = lax.platform_dependent(
    cotangent,
    kernel,
    flipped,
    cpu=lambda g, _, f: _ordinary_gradient(g, f, stride, shape),
    default=lambda g, k, _: _native_gradient(g, k, stride, shape),
  )
  return gradient, None, None


def _native_gradient(cotangent, kernel, stride, shape):
  images = jax.ShapeDtypeStruct(shape, cotangent.dtype)
  transpose = jax.linear_transpose(lambda x: conv(x, kernel, stride), images)
  (gradient,) = transpose(cotangent)
  return gradient


def _ordinary_gradient(cotangent, flipped, stride, shape):
  """The same as an ordinary convolution of the zero-interleaved cotangent."""
  height, width = shape[1:3]
  if flipped.shape[0] == 1 and stride > 1:
    # A 1x1 convolution commutes with the interleaving: convolve the small map.
    return _interleave(conv(cotangent, flipped), stride, height, width)
  if stride > 1:
    cotangent = _interleave(cotangent, stride, height, width)
  return conv(cotangent, flipped)


def _interleave(x, stride, height, width):
  """Puts stride - 1 zeros between neighbours, up to [N, height, width, C]."""
  tail = lambda size, n: size - ((n - 1) * stride + 1)
  padding = (
    (0, 0, 0),
    (0, tail(height, x.shape[1]), stride - 1),
    (0, tail(width, x.shape[2]), stride - 1),
    (0, 0, 0),
  )
  return lax.pad(x, jnp.zeros((), x.dtype), padding)


frozen_conv.defvjp(_forward, _backward)
