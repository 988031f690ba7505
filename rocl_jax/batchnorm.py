"""BatchNorm by the statistics of the batch, and its gradient.

Written out, because XLA's CPU backend sums over [N, H, W] column by column,
one strided scalar at a time, when autodiff leaves it five such sums a layer:
together they took as long as the convolutions' gradients. Here there are four,
each vectorised. GPUs and TPUs keep what autodiff makes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

EPSILON = 1e-5


@jax.custom_vjp
def normalise(
  x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises each channel over the batch, then scales and shifts it.

  The sums run over the whole batch, on all devices.

  Args:
    x: [N, H, W, C].
    scale, bias: float32 [C].

  Returns:
    The result, as `x` in shape and type; mean and biased variance, float32
    [C], which hand no gradient back.
  """
  return lax.platform_dependent(
    x,
    scale,
    bias,
    cpu=functools.partial(_normalise, column_sum=_cpu_column_sum),
    default=_normalise,
  )


def _plain_column_sum(x):
  return x.sum((0, 1, 2))


def _cpu_column_sum(x):
  """Adds up to eight neighbouring images first, element by element.

  Neighbours lie on one device, where there are several.
  """
  n = len(x)
  group = max(d for d in range(1, 9) if n % d == 0 and (d == 1 or n // d >= 8))
  summed = x.reshape(n // group, group, -1).sum(1)
  # XLA would merge the two.
  return lax.optimization_barrier(summed).reshape(-1, x.shape[-1]).sum(0)


def _normalise(x, scale, bias, column_sum=_plain_column_sum):
  n = x.size // x.shape[-1]
  x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean = column_sum(x32) / n
  var = column_sum(jnp.square(x32 - mean)) / n
  gain = scale * lax.rsqrt(var + EPSILON)
  y = (x * gain + (bias - mean * gain)).astype(x.dtype)
  return y, mean, var


def _forward(x, scale, bias):
  y, mean, var = normalise(x, scale, bias)
  return (y, mean, var), (x, scale, bias, mean, var)


def _backward(residuals, cotangents):
  return lax.platform_dependent(
    *residuals, cotangents[0], cpu=_cpu_gradient, default=_autodiff_gradient
  )


def _autodiff_gradient(x, scale, bias, mean, var, dy):
  del mean, var  # XLA computes them once: forward and here alike
  _, transpose = jax.vjp(lambda *a: _normalise(*a)[0], x, scale, bias)
  return transpose(dy)


def _cpu_gradient(x, scale, bias, mean, var, dy):
  n = x.size // x.shape[-1]
  dy = dy.astype(var.dtype)
  inverse = lax.rsqrt(var + EPSILON)
  normal = (x.astype(var.dtype) - mean) * inverse
  d_bias = _cpu_column_sum(dy)
  d_scale = _cpu_column_sum(dy * normal)
  dx = scale * inverse * (dy - (d_bias + normal * d_scale) / n)
  return dx.astype(x.dtype), d_scale, d_bias.astype(bias.dtype)


normalise.defvjp(_forward, _backward)
