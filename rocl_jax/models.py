"""Networks, and the only code that knows Flax.

  settings = Settings(name='resnet18', width=64, dtype='float32')
  model = build(settings, num_classes=10)
  variables = model.init(key, image_shape=(32, 32, 3))
  logits = model.predict(variables, images)         # running BN statistics
  logits, moments = model.train(variables, images)  # statistics of the batch
  statistics = update_statistics(variables['batch_stats'], [moments])
  frozen = model.prepare(variables)                 # what an attack sees
  logits = frozen(images)

Variables are a plain dict {'params': {part: ...}, 'batch_stats': {...}}. The
parts are `encoder`, `projector` (RoCL's, 512-2048-128) and `head` (the linear
classifier); an output is `features` [N, D], `projection` [N, 128] or `logits`
[N, num_classes]. Images are [N, H, W, C] in [0, 1]; nothing normalises them.
Any image size will do: the encoder ends in a global mean. See the paper's
section 3 and, for every detail, `models/resnet_cifar.py` of HYDRA's code.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from rocl_jax import batchnorm, convolution, winograd
from rocl_jax.settings import one_of, within
from rocl_jax.trees import flatten

Params = dict[str, Any]
Variables = dict[str, Any]

_BLOCK = 'block'  # the results of blocks, by which `remat` knows them
BN_MOMENTUM = 0.9  # the weight of the old value; PyTorch calls this 0.1


def uniform_fan_in(fan_in: int) -> Callable[..., jax.Array]:
  """PyTorch's default initialisation, U(-1, 1) / sqrt(fan_in).

  HYDRA asserts `init_type: kaiming_normal` and never applies it.
  """
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class ConvNorm(nn.Module):
  """A convolution without bias, then BatchNorm: the unit of every ResNet.

  In training mode it normalises by the batch and hands out the batch's mean
  and *unbiased* variance in `batch_stats`; `update_statistics` folds them into
  the running averages. Global over all devices, as the batch is one array.
  """

  features: int
  size: int = 3
  stride: int = 1
  train: bool = False
  dtype: Any = jnp.float32
  conv: Callable[..., jax.Array] = convolution.conv

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x.shape[-1], self.features)
    fan_in = self.size * self.size * x.shape[-1]
    kernel = self.param('kernel', uniform_fan_in(fan_in), shape)
    scale = self.param('scale', nn.initializers.ones, (self.features,))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    zeros = lambda: jnp.zeros(self.features)
    ones = lambda: jnp.ones(self.features)
    running_mean = self.variable('batch_stats', 'mean', zeros)
    running_var = self.variable('batch_stats', 'var', ones)

    x = x.astype(self.dtype)
    x = self.conv(x, kernel.astype(self.dtype), self.stride)
    if self.train:
      near = running_mean.value
      y, mean, var = batchnorm.normalise(x, scale, bias, near)
      n = x.size // x.shape[-1]
      running_mean.value, running_var.value = mean, var * (n / max(n - 1, 1))
      return y
    mean, var = running_mean.value, running_var.value
    gain = scale * lax.rsqrt(var + batchnorm.EPSILON)
    return (x * gain + (bias - mean * gain)).astype(self.dtype)


class FrozenConvNorm(nn.Module):
  """`ConvNorm` in evaluation mode with `fold`ed, constant parameters."""

  features: int
  size: int = 3
  stride: int = 1
  dtype: Any = jnp.float32
  precision: lax.Precision = lax.Precision.HIGHEST

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    params = self.variables['params']
    y = convolution.frozen_conv(
      x.astype(self.dtype),
      params['kernel'],
      params['flipped'],
      self.stride,
      params['transformed'],
      self.precision,
    )
    return y + params['bias']


def fold(params: Params, batch_stats: Params, dtype: Any) -> Params:
  """Turns each ConvNorm's parameters into those of a FrozenConvNorm."""
  if 'kernel' not in params:
    return {k: fold(v, batch_stats[k], dtype) for k, v in params.items()}
  gain = params['scale'] * lax.rsqrt(batch_stats['var'] + batchnorm.EPSILON)
  kernel = (params['kernel'] * gain).astype(dtype)
  bias = (params['bias'] - batch_stats['mean'] * gain).astype(dtype)
  flipped = convolution.flip(kernel)
  return {
    'kernel': kernel,
    'flipped': flipped,
    'transformed': tuple(map(winograd.transform, (kernel, flipped))),
    'bias': bias,
  }


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
  """ReLU, with the gradient of `nn.relu`, that keeps its result alone.

  Which form of the same function is fast depends on the compiler. XLA's CPU
  backend fuses a maximum into all that reads it, and with it the additions of
  the blocks before, anew for each reader: fusing an operation with one large
  operand seems free to it. A selection has two, so its result is kept. GPUs
  and TPUs fuse a maximum into the convolution before, but XLA rewrites a
  gradient that asks for `y > 0` to one that asks for `x > 0`, and keeps `x`,
  too; `y == 0` it leaves alone. A NaN stays one.
  """
  return lax.platform_dependent(
    x,
    cpu=lambda x: jnp.where(x <= 0, jnp.zeros((), x.dtype), x),
    default=lambda x: jnp.maximum(x, jnp.zeros((), x.dtype)),
  )


def _relu_forward(x):
  y = relu(x)
  return y, y


def _relu_backward(y, cotangent):
  zero = jnp.zeros((), cotangent.dtype)
  gradient = lax.platform_dependent(
    y,
    cotangent,
    cpu=lambda y, g: jnp.where(y > 0, g, zero),
    cuda=_masked_by_product,
    default=lambda y, g: jnp.where(y == 0, zero, g),
  )
  return (gradient,)


def _masked_by_product(y, gradient):
  """The gradient where y > 0, else 0, in the form that cuDNN's convolutions
  can take in: the factor makes 1 or more of each positive float but subnormal
  ones. Where y is 0, a gradient that is not finite becomes NaN, not 0."""
  factor = 1 / jnp.finfo(y.dtype).tiny
  return gradient * jnp.minimum(y * factor, jnp.ones((), y.dtype))


relu.defvjp(_relu_forward, _relu_backward)


class ResNet(nn.Module):
  """CIFAR ResNet of post-activation basic blocks; returns features [N, D].

  Args:
    blocks: number of blocks in each stage; a stage doubles the width and, but
      for the first, halves the resolution.
    width: channels of the stem and of the first stage.
    layer: `ConvNorm` or `FrozenConvNorm`, with everything but shape bound.
  """

  blocks: Sequence[int]
  width: int
  layer: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = relu(self.layer(self.width, name='stem')(images))
    for stage, count in enumerate(self.blocks):
      features = self.width * 2**stage
      for block in range(count):
        stride = 2 if stage > 0 and block == 0 else 1
        name = f'stage{stage + 1}_block{block + 1}'
        y = relu(self.layer(features, stride=stride, name=f'{name}_conv1')(x))
        y = self.layer(features, name=f'{name}_conv2')(y)
        if y.shape != x.shape:
          shortcut = functools.partial(self.layer, features, size=1)
          x = shortcut(stride=stride, name=f'{name}_shortcut')(x)
        x = checkpoint_name(relu(x + y), _BLOCK)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))


class Linear(nn.Module):
  """Dense layer in float32 with PyTorch's default initialisation."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    init = uniform_fan_in(x.shape[-1])
    kernel = self.param('kernel', init, (x.shape[-1], self.features))
    bias = self.param('bias', init, (self.features,))
    return jnp.dot(x, kernel, precision=lax.Precision.HIGHEST) + bias


class Projector(nn.Module):
  """RoCL's projector: linear, ReLU, linear; biases, no BN, no normalisation."""

  hidden: int = 2048
  features: int = 128

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(Linear(self.hidden, name='hidden')(x))
    return Linear(self.features, name='output')(x)


class Model(NamedTuple):
  """An architecture as functions of its variables.

  Attributes:
    init: (key, image_shape) -> variables with all parts, freshly drawn.
    init_head: (key) -> parameters of a fresh head.
    predict: (variables, images, output='logits') -> output, evaluation mode.
    train: the same in training mode -> (output, moments of the batch).
    prepare: (variables) -> (images, output='logits') -> output: predict with
      BatchNorm folded into the kernels and the kernels flipped for the
      gradient. Call it once a step, outside the attack's loop. Nothing flows
      back into the variables.
  """

  init: Callable[[jax.Array, tuple[int, ...]], Variables]
  init_head: Callable[[jax.Array], Params]
  predict: Callable[..., jax.Array]
  train: Callable[..., tuple[jax.Array, Params]]
  prepare: Callable[[Variables], Callable[..., jax.Array]]


# Blocks of each stage. ResNet-8 is the one of small devices (MLPerf Tiny).
ARCHITECTURES: dict[str, tuple[int, ...]] = {
  'resnet18': (2, 2, 2, 2),
  'resnet20': (3, 3, 3),
  'resnet8': (1, 1, 1),
}


DTYPES = ('float32', 'bfloat16', 'tf32')


@dataclass(frozen=True, kw_only=True)
class Settings:
  """The `model` section.

  Attributes:
    name: one of ARCHITECTURES.
    width: channels of the stem: 64 for the paper's ResNet-18, 16 for the
      usual ResNet-20 and ResNet-8.
    dtype: 'float32', 'bfloat16' or 'tf32', the type of the encoder's
      arithmetic. 'tf32', for GPUs alone, is float32 whose convolutions round
      their factors to TensorFloat-32, ten bits after the first. Parameters,
      BatchNorm statistics, head, projector and all outputs stay float32. With
      JAX_ENABLE_X64 'float64' is for everything.
    remat: whether gradients compute what is inside a block anew, instead of
      keeping it: less memory, more time.
  """

  name: str
  width: int
  dtype: str
  remat: bool = False

  def __post_init__(self):
    one_of('name', self.name, ARCHITECTURES)
    wide = ('float64',) if jax.config.values['jax_enable_x64'] else ()
    one_of('dtype', self.dtype, (*DTYPES, *wide))
    within('width', self.width, 1, 4096)

  @property
  def arrays(self) -> Any:
    """The type of the encoder's arrays."""
    return jnp.dtype('float32' if self.dtype == 'tf32' else self.dtype)


def build(
  settings: Settings,
  num_classes: int,
  conv: Callable[..., jax.Array] = convolution.conv,
) -> Model:
  """Builds the network with a head of `num_classes` outputs.

  `conv` is the convolution of `predict` and `train`: (images, kernel, stride,
  precision) -> images, such as `convolution.conv` or `plain_conv`.
  """
  blocks = ARCHITECTURES[settings.name]
  resnet = functools.partial(ResNet, blocks, settings.width)
  features = settings.width * 2 ** (len(blocks) - 1)
  compute = settings.arrays
  highest = lax.Precision.HIGHEST
  precision = lax.Precision.HIGH if settings.dtype == 'tf32' else highest
  conv = functools.partial(conv, precision=precision)
  head = Linear(num_classes)
  projector = Projector()

  def encoder(train):
    return resnet(
      functools.partial(ConvNorm, train=train, dtype=compute, conv=conv)
    )

  frozen_encoder = resnet(
    functools.partial(FrozenConvNorm, dtype=compute, precision=precision)
  )
  keep_blocks = lambda function: function
  if settings.remat:
    policy = jax.checkpoint_policies.save_only_these_names(_BLOCK)
    keep_blocks = functools.partial(jax.checkpoint, policy=policy)

  def finish(params, features, output):
    if output == 'features':
      return features
    if output == 'projection':
      return projector.apply({'params': params['projector']}, features)
    return head.apply({'params': params['head']}, features)

  def init_part(module, key, features):
    return module.init(key, jnp.zeros((1, features)))['params']

  def init_head(key):
    return init_part(head, key, features)

  def init(key, image_shape):
    encoder_key, projector_key, head_key = jax.random.split(key, 3)
    images = jnp.zeros((1, *image_shape))
    variables = encoder(False).init(encoder_key, images)
    params = {
      'encoder': variables['params'],
      'projector': init_part(projector, projector_key, features),
      'head': init_head(head_key),
    }
    return {'params': params, 'batch_stats': variables['batch_stats']}

  def split(variables):
    params = variables['params']
    return params, {
      'params': params['encoder'],
      'batch_stats': variables['batch_stats'],
    }

  def predict(variables, images, output='logits'):
    params, inner = split(variables)
    return finish(params, encoder(False).apply(inner, images), output)

  def train(variables, images, output='logits'):
    params, inner = split(variables)
    apply = functools.partial(encoder(True).apply, mutable=['batch_stats'])
    features, updated = keep_blocks(apply)(inner, images)
    return finish(params, features, output), updated['batch_stats']

  def prepare(variables):
    params, inner = lax.stop_gradient(split(variables))
    folded = fold(inner['params'], inner['batch_stats'], compute)

    apply = keep_blocks(frozen_encoder.apply)

    def forward(images, output='logits'):
      features = apply({'params': folded}, images)
      return finish(params, features, output)

    return forward

  return Model(init, init_head, predict, train, prepare)


def update_statistics(running: Params, moments: Sequence[Params]) -> Params:
  """Folds the moments of several training-mode passes in, in their order.

  A published training step runs several passes and updates the averages in
  each; the same moments may stand in the list more than once.
  """
  for batch in lax.stop_gradient(list(moments)):
    running = jax.tree.map(
      lambda old, new: BN_MOMENTUM * old + (1 - BN_MOMENTUM) * new,
      running,
      batch,
    )
  return running


def mismatch(found: Variables, wanted: Variables) -> str | None:
  """How variables differ from those of a network, in words; None if not.

  Compares paths and shapes of the parts that `found` has, and all of the
  BatchNorm statistics.
  """
  parts = found['params'].keys()
  inside = {k: v for k, v in wanted['params'].items() if k in parts}
  shape = lambda tree: {p: tuple(x.shape) for p, x in flatten(tree).items()}
  have = shape({'params': found['params'], 'stats': found['batch_stats']})
  want = shape({'params': inside, 'stats': wanted['batch_stats']})
  for path in sorted(have.keys() | want.keys()):
    if have.get(path) != want.get(path):
      return (
        f'{path} is {have.get(path, "missing")}, wanted '
        f'{want.get(path, "no such weight")}'
      )
  return None


def maskable(params: Params) -> dict[str, jax.Array]:
  """The prunable ones of flat params: all convolutions and the head's kernel.

  BatchNorm, biases and the projector are never pruned (HYDRA,
  `models/layers.py`; RoCL's projector does not reach that stage).
  """
  return {p: x for p, x in params.items() if p.endswith('/kernel')}
