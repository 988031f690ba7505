"""Two-dimensional convolutions, and the form of them that an attack sees.

  y = conv(images, kernel, stride=1)                 # training
  y = frozen_conv(images, kernel, flip(kernel), 1)   # inside an attack
  y = plain_conv(images, kernel, stride=1)           # as XLA differentiates it

All three compute the same; on CPUs the first layer and the gradients differ.
Inside a `while` loop XLA's CPU backend computes a convolution's input gradient
with a generic kernel, four to eight times slower than outside, and an attack
is such a loop. Here the gradient is made of ordinary convolutions with the
flipped, transposed kernel; as the weights do not change while an attack runs,
`frozen_conv` takes that kernel as well, made once outside the loop. Strides
and few channels have forms of their own, as has the gradient of a 1x1 kernel.
The choice falls where the program is lowered: GPUs and TPUs keep XLA's own.
There, wide 3x3 layers of attacks are `winograd`'s.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from rocl_jax import winograd

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')
_FEW = 8  # channels, a vector register of the CPU


def plain_conv(
  images: jax.Array,
  kernel: jax.Array,
  stride: int = 1,
  precision: lax.Precision = lax.Precision.HIGHEST,
) -> jax.Array:
  """`conv` with the gradients that XLA makes of it on every device."""
  pad = kernel.shape[0] // 2
  return lax.conv_general_dilated(
    images,
    kernel,
    window_strides=(stride, stride),
    padding=((pad, pad), (pad, pad)),
    dimension_numbers=_LAYOUT,
    precision=precision,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(
  images: jax.Array,
  kernel: jax.Array,
  stride: int = 1,
  precision: lax.Precision = lax.Precision.HIGHEST,
) -> jax.Array:
  """Convolves with symmetric padding k // 2, as PyTorch does.

  `SAME` would pad a stride-2 convolution by (0, 1) and shift the result.

  Args:
    images: [N, H, W, C_in].
    kernel: [k, k, C_in, C_out], k odd.
    stride: step in both directions.
    precision: of the products. HIGHEST computes float32 as float32 on every
      device; with HIGH, GPUs round the factors to TensorFloat-32.

  Returns:
    [N, ceil(H / stride), ceil(W / stride), C_out].
  """
  return plain_conv(images, kernel, stride, precision)


def _conv_forward(images, kernel, stride, precision):
  return plain_conv(images, kernel, stride, precision), (images, kernel)


def _conv_backward(stride, precision, residuals, cotangent):
  return lax.platform_dependent(
    *residuals,
    cotangent,
    cpu=lambda x, w, g: (
      _input_gradient(g, w, flip(w), stride, x.shape),
      _kernel_gradient(x, g, w, stride),
    ),
    default=lambda x, w, g: (
      _native_gradient(g, w, stride, x.shape, precision),
      _native_kernel_gradient(x, g, w, stride, precision),
    ),
  )


conv.defvjp(_conv_forward, _conv_backward)


def _kernel_gradient(images, cotangent, kernel, stride):
  """The gradient [k, k, C_in, C_out]; of a 1x1 kernel as a matrix product."""
  if kernel.shape[0] == 1:
    x = images[:, ::stride, ::stride].reshape(-1, images.shape[-1])
    return jnp.dot(
      x.T,
      cotangent.reshape(-1, cotangent.shape[-1]),
      precision=lax.Precision.HIGHEST,
    ).reshape(kernel.shape)
  highest = lax.Precision.HIGHEST
  return _native_kernel_gradient(images, cotangent, kernel, stride, highest)


def _native_kernel_gradient(images, cotangent, kernel, stride, precision):
  """As XLA makes it, but that a 1x1 kernel is given what it reads alone, or
  GPUs copy almost all of the images to leave out a row and a column."""
  if kernel.shape[0] == 1:
    images, stride = images[:, ::stride, ::stride], 1
  transpose = jax.linear_transpose(
    lambda w: plain_conv(images, w, stride, precision), kernel
  )
  (gradient,) = transpose(cotangent)
  return gradient


def flip(kernel: jax.Array) -> jax.Array:
  """The kernel [k, k, C_out, C_in] of the input gradient of `kernel`."""
  return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _frozen(images, kernel, stride, transformed, precision):
  """`plain_conv`, but for the first layer and the wide ones on CPUs."""
  plain = lambda x, w, *_: plain_conv(x, w, stride, precision)
  if stride == 1 and images.shape[-1] < _FEW:
    return lax.platform_dependent(
      images, kernel, cpu=_from_few_channels, default=plain
    )
  if stride > 1 or transformed is None:
    return plain(images, kernel)
  return lax.platform_dependent(
    images,
    kernel,
    transformed,
    cpu=lambda x, _, t: winograd.convolve(x, t),
    default=plain,
  )


def _from_few_channels(images, kernel):
  """One matrix product with all taps of a pixel beside each other.

  A convolution of the three channels of an image leaves most of a vector
  register idle. XLA computes what it reads anew for each tap, unless that is
  in memory, as the state of a loop is: attacks begin their steps with it.
  """
  size, _, inputs, outputs = kernel.shape
  n, height, width, _ = images.shape
  pad = size // 2
  margin = (pad, pad)
  padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)))
  taps = [
    padded[:, row : row + height, column : column + width]
    for row in range(size)
    for column in range(size)
  ]
  return jnp.dot(
    jnp.concatenate(taps, -1).reshape(-1, size * size * inputs),
    kernel.reshape(-1, outputs),
    precision=lax.Precision.HIGHEST,
  ).reshape(n, height, width, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 5))
def frozen_conv(
  images: jax.Array,
  kernel: jax.Array,
  flipped: jax.Array,
  stride: int,
  transformed: tuple[jax.Array | None, jax.Array | None] = (None, None),
  precision: lax.Precision = lax.Precision.HIGHEST,
) -> jax.Array:
  """`conv` with a constant kernel: only the images get a gradient.

  Args:
    images: [N, H, W, C_in].
    kernel: [k, k, C_in, C_out].
    flipped: `flip(kernel)`, computed outside the loop that calls this.
    stride: 1 or 2.
    transformed: `winograd.transform` of both, computed there as well.
    precision: as `conv`'s.
  """
  del flipped
  return _frozen(images, kernel, stride, transformed[0], precision)


def _forward(images, kernel, flipped, stride, transformed, precision):
  y = _frozen(images, kernel, stride, transformed[0], precision)
  return y, (kernel, flipped, transformed[1], images.shape)


def _backward(stride, precision, residuals, cotangent):
  kernel, flipped, transformed, shape = residuals

  def on_cpu(g, k, f, t):
    if stride == 1 and t is not None:
      return winograd.convolve(g, t)
    return _input_gradient(g, k, f, stride, shape)

  gradient = lax.platform_dependent(
    cotangent,
    kernel,
    flipped,
    transformed,
    cpu=on_cpu,
    default=lambda g, k, *_: _native_gradient(g, k, stride, shape, precision),
  )
  return gradient, None, None, None


def _native_gradient(cotangent, kernel, stride, shape, precision):
  images = jax.ShapeDtypeStruct(shape, cotangent.dtype)
  transpose = jax.linear_transpose(
    lambda x: plain_conv(x, kernel, stride, precision), images
  )
  (gradient,) = transpose(cotangent)
  return gradient


def _input_gradient(cotangent, kernel, flipped, stride, shape):
  """The gradient [N, H, W, C_in] by forward convolutions and products."""
  size, _, inputs, _ = kernel.shape
  if stride == 1 and inputs < _FEW:
    return _to_few_channels(cotangent, kernel)
  if stride == 1:
    return plain_conv(cotangent, flipped)
  if size == 1:  # commutes with the interleaving
    return _interleave(plain_conv(cotangent, flipped), stride, *shape[1:3])
  return _by_phases(cotangent, flipped, stride, *shape[1:3])


def _to_few_channels(cotangent, kernel):
  """All taps' products as one matrix product, then their shifted sum.

  See `_from_few_channels`, whose transpose it is.
  """
  size, _, inputs, outputs = kernel.shape
  n, height, width, _ = cotangent.shape
  pad = size // 2
  products = jnp.dot(
    cotangent.reshape(-1, outputs),
    kernel.reshape(-1, outputs).T,
    precision=lax.Precision.HIGHEST,
  ).reshape(n, height, width, size * size, inputs)
  margin = (pad, pad)
  products = jnp.pad(products, ((0, 0), margin, margin, (0, 0), (0, 0)))
  return sum(
    products[
      :,
      2 * pad - row : 2 * pad - row + height,
      2 * pad - column : 2 * pad - column + width,
      row * size + column,
    ]
    for row in range(size)
    for column in range(size)
  )


def _by_phases(cotangent, flipped, stride, height, width):
  """One convolution for each residue of row and column modulo the stride.

  Each has the taps that meet those rows and columns, so none is spent on the
  zeros between the entries of the cotangent.
  """
  rows, columns = -(-height // stride), -(-width // stride)
  row_phases = _phases(flipped.shape[0], stride, cotangent.shape[1], rows)
  column_phases = _phases(flipped.shape[1], stride, cotangent.shape[2], columns)
  parts = [
    jnp.stack(
      [
        lax.conv_general_dilated(
          cotangent,
          flipped[row::stride, column::stride],
          window_strides=(1, 1),
          padding=(row_padding, column_padding),
          dimension_numbers=_LAYOUT,
          precision=lax.Precision.HIGHEST,
        )
        for column, column_padding in column_phases
      ],
      axis=3,
    )
    for row, row_padding in row_phases
  ]
  n, inputs = cotangent.shape[0], flipped.shape[-1]
  whole = jnp.stack(parts, axis=2).reshape(
    n, rows * stride, columns * stride, inputs
  )
  return whole[:, :height, :width]


def _phases(size, stride, length, wanted):
  """First tap of the flipped kernel and padding for each residue."""
  phases = []
  for residue in range(stride):
    # Tap t of the flipped kernel meets entry
    # position + (residue + t - (size - 1 - size // 2)) / stride.
    start = size - 1 - size // 2 - residue
    first = start % stride
    taps = len(range(first, size, stride))
    low = (start - first) // stride
    high = wanted - length - low + taps - 1
    phases.append((first, (low, high)))
  return phases


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
