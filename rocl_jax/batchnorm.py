"""BatchNorm by the statistics of the batch, and its gradient.

Written out, because compilers make more passes over the images than these
formulas need. What is fast differs: XLA's CPU backend sums over [N, H, W]
column by column, one strided scalar at a time, unless neighbouring images are
added first; GPUs and TPUs are bound by memory, and there both moments come
from one pass, and from one exchange between devices.
"""

import jax
import jax.numpy as jnp
from jax import lax

EPSILON = 1e-5


@jax.custom_vjp
def normalise(
  x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises each channel over the batch, then scales and shifts it.

  The sums run over the whole batch, on all devices.

  Args:
    x: [N, H, W, C].
    scale, bias: float32 [C].
    near: float32 [C], a guess of the mean, such as the running one. GPUs and
      TPUs sum the squares of x - near: the closer, the better they round.

  Returns:
    The result, as `x` in shape and type; mean and biased variance, float32
    [C], which hand no gradient back.
  """
  x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean, var = lax.platform_dependent(
    x32, near, cpu=_two_passes, default=_one_pass
  )
  gain = scale * lax.rsqrt(var + EPSILON)
  y = (x * gain + (bias - mean * gain)).astype(x.dtype)
  return y, mean, var


def _two_passes(x, near):
  del near
  n = x.size // x.shape[-1]
  mean = _neighbours_first(x) / n
  return mean, _neighbours_first(jnp.square(x - mean)) / n


def _one_pass(x, near):
  n = x.size // x.shape[-1]
  x = x - near
  total, squares = _column_sums(x, jnp.square(x))
  mean = total / n
  return near + mean, jnp.maximum(squares / n - jnp.square(mean), 0)


def _column_sums(a, b):
  """The sums of two arrays [N, H, W, C] over all but C."""
  return lax.platform_dependent(
    a,
    b,
    cpu=lambda a, b: (_neighbours_first(a), _neighbours_first(b)),
    cuda=_sums_together,
    default=lambda a, b: (a.sum((0, 1, 2)), b.sum((0, 1, 2))),
  )


def _sums_together(a, b):
  """In one kernel, which XLA would not always make of two sums."""
  zero = jnp.zeros((), a.dtype)
  add = lambda x, y: (x[0] + y[0], x[1] + y[1])
  return lax.reduce((a, b), (zero, zero), add, (0, 1, 2))


def _neighbours_first(x):
  """Adds up to eight neighbouring images first, element by element.

  Neighbours lie on one device, where there are several.
  """
  n = len(x)
  group = max(d for d in range(1, 9) if n % d == 0 and (d == 1 or n // d >= 8))
  summed = x.reshape(n // group, group, -1).sum(1)
  # XLA would merge the two.
  return lax.optimization_barrier(summed).reshape(-1, x.shape[-1]).sum(0)


def _forward(x, scale, bias, near):
  y, mean, var = normalise(x, scale, bias, near)
  return (y, mean, var), (x, scale, bias, mean, var)


def _backward(residuals, cotangents):
  x, scale, bias, mean, var = residuals
  n = x.size // x.shape[-1]
  dy = cotangents[0].astype(var.dtype)
  inverse = lax.rsqrt(var + EPSILON)
  normal = (x.astype(var.dtype) - mean) * inverse
  d_bias, d_scale = _column_sums(dy, dy * normal)
  dx = scale * inverse * (dy - (d_bias + normal * d_scale) / n)
  return dx.astype(x.dtype), d_scale, d_bias.astype(bias.dtype), None


normalise.defvjp(_forward, _backward)
