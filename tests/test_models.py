"""Networks, and the form of them that attacks see."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rocl_jax import batchnorm, compiled, convolution, models, winograd
from rocl_jax.trees import flatten


def build(
  name='resnet8',
  width=8,
  dtype='float32',
  classes=10,
  conv=convolution.conv,
):
  settings = models.Settings(name=name, width=width, dtype=dtype)
  return models.build(settings, classes, conv)


def random_variables(model, shape=(16, 16, 3)):
  """Fresh weights with BatchNorm statistics that are not the identity."""
  variables = jax.jit(lambda key: model.init(key, shape))(jax.random.key(0))
  images = jax.random.uniform(jax.random.key(1), (32, *shape))
  _, moments = jax.jit(model.train)(variables, images)
  variables['batch_stats'] = moments
  return variables


@pytest.mark.parametrize('size', [1, 3, 5])
@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize(
  'inputs', [3, 9]
)  # few channels have a way of their own
def test_convolutions_have_the_gradients_of_a_plain_one(
  size, stride, inputs, lower_for
):
  kernel = jax.random.normal(jax.random.key(1), (size, size, inputs, 5))
  for extent in (7, 8):
    shape = (2, extent, extent + 1, inputs)
    images = jax.random.normal(jax.random.key(0), shape)

    @jax.jit
    def gradients(images, kernel):
      plain, pullback = jax.vjp(
        lambda x, w: convolution.plain_conv(x, w, stride), images, kernel
      )
      cotangent = jax.random.normal(jax.random.key(2), plain.shape)
      frozen = lambda x: convolution.frozen_conv(
        x, kernel, convolution.flip(kernel), stride
      )
      trained = lambda x, w: convolution.conv(x, w, stride)
      found = {}
      for platform in ('cpu', 'cuda'):
        lower_for(platform)
        _, trained_pullback = jax.vjp(trained, images, kernel)
        _, frozen_pullback = jax.vjp(frozen, images)
        found[f'trained on {platform}'] = trained_pullback(cotangent)
        found[f'frozen on {platform}'] = frozen_pullback(cotangent)
      return pullback(cotangent), found

    wanted, found = gradients(images, kernel)
    for name, gradient in found.items():
      for actual, plain in zip(gradient, wanted, strict=False):
        np.testing.assert_allclose(actual, plain, atol=1e-4, err_msg=name)


@pytest.mark.parametrize('extents', [(8, 6), (7, 4), (5, 7), (1, 2)])
@pytest.mark.parametrize('channels', [(128, 128), (128, 160)])
def test_winograd_computes_what_a_plain_convolution_does(extents, channels):
  keys = jax.random.split(jax.random.key(0), 3)
  images = jax.random.normal(keys[0], (2, *extents, channels[0]))
  kernel = jax.random.normal(keys[1], (3, 3, *channels)) / 30
  cotangent = jax.random.normal(keys[2], (2, *extents, channels[1]))
  flipped = convolution.flip(kernel)
  transformed = tuple(map(winograd.transform, (kernel, flipped)))
  assert transformed[0].shape == (16, *channels)

  @functools.partial(jax.jit, static_argnums=0)
  def run(conv, x):
    y, pullback = jax.vjp(conv, x)
    return y, pullback(cotangent)[0]

  frozen = lambda x: convolution.frozen_conv(x, kernel, flipped, 1, transformed)
  plain = lambda x: convolution.plain_conv(x, kernel)
  if jax.default_backend() == 'cpu':  # a product, and no convolution
    assert 'convolution' not in run.lower(frozen, images).as_text()
  for found, wanted in zip(
    run(frozen, images), run(plain, images), strict=True
  ):
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_winograd_is_for_float32_and_many_channels():
  kernel = jnp.zeros((3, 3, 128, 128))
  assert winograd.transform(kernel.astype(jnp.bfloat16)) is None
  assert winograd.transform(kernel[:, :, :127]) is None
  assert winograd.transform(kernel[..., :127]) is None
  assert winograd.transform(kernel[:1, :1]) is None


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_relu_is_the_same_to_the_bit_on_every_platform(
  dtype, platform, lower_for
):
  tiny = float(jnp.finfo(dtype).tiny)
  special = [0.0, -0.0, tiny, -tiny, 1e30, jnp.inf, -jnp.inf, jnp.nan]
  x = jnp.asarray([*special, *np.random.default_rng(0).normal(size=99)], dtype)
  cotangent = jnp.asarray(np.arange(len(x)) - 50.0, dtype)
  y, pullback = jax.vjp(models.relu, x)
  (gradient,) = pullback(cotangent)
  lower_for(platform)
  other, pullback = jax.vjp(models.relu, x)
  np.testing.assert_array_equal(other.astype('float32'), y.astype('float32'))
  found = jnp.where(jnp.isnan(x), 0, pullback(cotangent)[0])
  np.testing.assert_array_equal(found, gradient)


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
@pytest.mark.parametrize('shape', [(8, 6, 6, 5), (3, 5, 7, 2)])
def test_batchnorm_has_the_gradient_that_autodiff_finds(
  shape, platform, lower_for
):
  lower_for(platform)
  near = jnp.full(shape[-1], 2.0)
  keys = jax.random.split(jax.random.key(0), 4)
  x = 3 + 2 * jax.random.normal(keys[0], shape)
  scale, bias = jax.random.normal(keys[1], (2, shape[-1]))
  cotangent = jax.random.normal(keys[2], shape)

  def plain(x, scale, bias):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / jnp.sqrt(var + batchnorm.EPSILON) * scale + bias

  y, pullback = jax.vjp(plain, x, scale, bias)
  ours = lambda *a: batchnorm.normalise(*a, near)[0]
  our_y, our_pullback = jax.vjp(ours, x, scale, bias)
  np.testing.assert_allclose(our_y, y, atol=1e-5)
  for actual, wanted in zip(
    our_pullback(cotangent), pullback(cotangent), strict=True
  ):
    np.testing.assert_allclose(actual, wanted, atol=1e-4)
  _, mean, var = batchnorm.normalise(x, scale, bias, near)
  np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-5)
  np.testing.assert_allclose(var, x.var((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_a_large_mean_does_not_cancel_the_variance(platform, lower_for):
  x = 1e4 + jax.random.normal(jax.random.key(0), (32, 8, 8, 3))
  lower_for(platform)
  one = jnp.ones(3)
  _, mean, var = batchnorm.normalise(x, one, one, 1e4 - 1 * one)
  exact = np.asarray(x, np.float64)
  np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=pytest.mark.slow if n == 'resnet18' else ())
    for n in models.ARCHITECTURES
  ],
)
def test_prepared_network_computes_the_same_and_its_gradient(name):
  model = build(name)
  variables = random_variables(model)
  images = jax.random.uniform(jax.random.key(2), (4, 16, 16, 3))
  frozen = model.prepare(variables)
  plain_model = build(name, conv=convolution.plain_conv)
  for output in ('features', 'projection', 'logits'):
    plain = jax.jit(lambda v, x, o=output: plain_model.predict(v, x, o))
    np.testing.assert_allclose(
      jax.jit(frozen, static_argnums=1)(images, output),
      plain(variables, images),
      atol=2e-5,
    )
  gradient = lambda f: jax.jit(jax.grad(lambda x: jnp.square(f(x)).sum()))
  wanted = gradient(lambda x: plain_model.predict(variables, x))(images)
  for predict in (frozen, lambda x: model.predict(variables, x)):
    np.testing.assert_allclose(
      gradient(predict)(images), wanted, atol=1e-3 * jnp.abs(wanted).max()
    )


def test_nothing_flows_back_from_an_attack_into_the_weights():
  model = build()
  variables = random_variables(model)
  images = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3))
  loss = lambda variables: model.prepare(variables)(images).sum()
  gradient = jax.jit(jax.grad(loss))(variables)
  assert all(not x.any() for x in jax.tree.leaves(gradient))


def test_parameter_counts():
  """ResNet-20's is that of pytorchcv's `resnet20_cifar10`."""
  for name, width, count in (
    ('resnet18', 64, 11_173_962),
    ('resnet20', 16, 272_474),
  ):
    model = build(name, width)
    init = lambda model=model: model.init(jax.random.key(0), (32, 32, 3))
    params = jax.eval_shape(init)['params']
    del params['projector']
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    kernels = models.maskable(flatten(params))
    if name == 'resnet18':
      assert len(kernels) == 21
      assert sum(x.size for x in kernels.values()) == 11_164_352


def test_initialisation_is_that_of_pytorch():
  model = build('resnet18', 16)
  params = flatten(model.init(jax.random.key(0), (32, 32, 3))['params'])
  for path, leaf in params.items():
    if path.endswith('kernel'):
      bound = (leaf.size // leaf.shape[-1]) ** -0.5
      assert float(jnp.abs(leaf).max()) <= bound
      if leaf.size > 2000:
        assert float(leaf.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
  assert params['projector/hidden/kernel'].shape == (128, 2048)
  assert params['projector/output/kernel'].shape == (2048, 128)


def test_statistics_keep_the_unbiased_variance():
  model = build(width=4)
  variables = model.init(jax.random.key(0), (4, 4, 3))
  images = jax.random.uniform(jax.random.key(1), (2, 4, 4, 3))
  _, moments = model.train(variables, images)
  kernel = variables['params']['encoder']['stem']['kernel']
  y = np.asarray(convolution.conv(images, kernel)).reshape(-1, 4)
  np.testing.assert_allclose(
    moments['stem']['var'], y.var(0, ddof=1), rtol=1e-4
  )
  updated = models.update_statistics(
    {'x': jnp.array(1.0)}, [{'x': jnp.array(2.0)}, {'x': jnp.array(3.0)}]
  )
  assert float(updated['x']) == pytest.approx(0.9 * 1.1 + 0.3)


def test_bfloat16_changes_the_arithmetic_and_nothing_else():
  model, exact = build(dtype='bfloat16'), build()
  variables = random_variables(exact)
  images = jax.random.uniform(jax.random.key(2), (4, 16, 16, 3))
  logits, wanted = (m.predict(variables, images) for m in (model, exact))
  assert logits.dtype == jnp.float32
  difference = float(jnp.abs(logits - wanted).max())
  assert 0 < difference < 0.1 * float(jnp.abs(wanted).max())
  _, moments = model.train(variables, images)
  leaves = jax.tree.leaves((moments, model.init(jax.random.key(0), (8, 8, 3))))
  assert all(x.dtype == jnp.float32 for x in leaves)


def test_any_image_size():
  for extent in (8, 20, 32):
    model = build()
    variables = model.init(jax.random.key(0), (extent, extent, 3))
    images = jnp.zeros((2, extent, extent, 3))
    assert model.predict(variables, images).shape == (2, 10)


def test_relu_is_that_of_flax_and_keeps_nan():
  x = jnp.array([-jnp.inf, -1.5, -0.0, 0.0, 2.0, jnp.inf, jnp.nan])
  np.testing.assert_array_equal(models.relu(x), nn.relu(x))
  gradient = lambda f: jax.grad(lambda x: (f(x) * jnp.arange(7.0)).sum())(x)
  np.testing.assert_array_equal(gradient(models.relu), gradient(nn.relu))


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason="of XLA's for CPUs")
def test_no_layer_is_computed_anew_for_the_gradient_of_the_weights():
  model = build(width=8)
  variables = random_variables(model)

  def loss(params, images):
    inner = {'params': params, 'batch_stats': variables['batch_stats']}
    return model.train(inner, images)[0].sum()

  images = jnp.zeros((4, 16, 16, 3))
  program = compiled.jit(jax.grad(loss)).lower(variables['params'], images)
  text = program.compile().as_text()
  fusions = [x for x in text.splitlines() if ' fusion(' in x]
  # A block's output needs one convolution's, or two with a shortcut.
  most = max(x.split(', kind=')[0].count('%conv_general') for x in fusions)
  assert most <= 4  # the parts of a gradient by phases
