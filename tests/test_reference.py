"""The same mathematics as the published code, on its own numbers.

The vectors were computed by the published PyTorch implementations; see
`tests/reference/README.md`. Another folder of the same layout is compared by
ROCL_REFERENCE_DIR=FOLDER pytest tests/test_reference.py
"""

import json
import os
import pathlib
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rocl_jax import convolution, losses, masks, models, schedules
from rocl_jax.attacks.pgd import GAUSSIAN_START, ascend

DIRECTORY = pathlib.Path(
  os.environ.get(
    'ROCL_REFERENCE_DIR', pathlib.Path(__file__).parent / 'reference'
  )
)


def load(name):
  with np.load(DIRECTORY / f'{name}.npz', allow_pickle=False) as file:
    return {key: file[key] for key in file.files}


def cases(name, suffix):
  """The prefixes in front of `suffix` in a file, for parametrisation."""
  with np.load(DIRECTORY / f'{name}.npz') as file:
    return sorted(k.removesuffix(suffix) for k in file.files if suffix in k)


def nhwc(x):
  return jnp.asarray(x).transpose(0, 2, 3, 1)


def from_torch(weight):
  """OIHW -> HWIO, out x in -> in x out."""
  weight = jnp.asarray(weight)
  return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T


def assert_close(actual, wanted):
  """A relative 1e-4 in norm."""
  actual, wanted = np.asarray(actual), np.asarray(wanted)
  assert actual.shape == wanted.shape
  error = np.linalg.norm(actual - wanted)
  assert error <= 1e-4 * np.linalg.norm(wanted), error


def assert_same_pixels(actual, wanted, share):
  """Sign ascent differs where a gradient is within rounding of zero."""
  equal = np.abs(np.asarray(actual) - np.asarray(nhwc(wanted))) < 1e-6
  assert equal.mean() >= share, equal.mean()


@pytest.mark.parametrize('case', cases('nt_xent', '_loss'))
def test_nt_xent(case):
  data = load('nt_xent')
  count = {'two': 2, 'three': 3}[case.split('_')[-1]]

  def loss(z):
    views = jnp.split(z, count)
    return losses.nt_xent(views, data[f'{case}_tau']).mean()

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(data[f'{case}_z']))
  assert_close(value, data[f'{case}_loss'])
  assert_close(gradient, data[f'{case}_grad'])


class Contrastive:
  """The small encoder and projector of `attacks.npz`."""

  def __init__(self, data):
    self.data = data

  def encode(self, x):
    for name in ('enc.c1', 'enc.c2'):
      kernel = from_torch(self.data[f'{name}.weight'])
      x = convolution.frozen_conv(x, kernel, convolution.flip(kernel), 2)
      x = nn.relu(x + self.data[f'{name}.bias'])
    return x.mean((1, 2))

  def linear(self, name, x):
    weight = from_torch(self.data[f'{name}.weight'])
    return jnp.dot(x, weight, precision='highest') + self.data[f'{name}.bias']

  def embed(self, x):
    hidden = nn.relu(self.linear('proj.l1', self.encode(x)))
    return self.linear('proj.l2', hidden)

  def logits(self, x):
    return self.linear('lin', self.encode(x))


@pytest.mark.parametrize('steps', [1, 3, 10])
def test_instance_wise_attack(steps):
  data = load('attacks')
  net = Contrastive(data)
  view1, view2 = nhwc(data['view1']), nhwc(data['view2'])
  target = net.embed(view2)
  adversarial = ascend(
    lambda x: losses.nt_xent([net.embed(x), target], 0.5),
    view1,
    jnp.clip(view1 + nhwc(data['start_noise']), 0, 1),
    eps=float(data['epsilon']),
    step_size=float(data['alpha']),
    steps=steps,
  )
  assert_same_pixels(adversarial.images, data[f'adv_iters{steps}'], 0.995)

  published = nhwc(data[f'adv_iters{steps}'])
  for pair, other in (('original', view1), ('other', view2)):
    views = [net.embed(published), net.embed(other)]
    regulariser = losses.nt_xent(views, 0.5).mean() / data['weight']
    assert_close(regulariser, data[f'regloss_{pair}_iters{steps}'])
  if steps == 10:
    views = [net.embed(x) for x in (view1, view2, published)]
    loss = losses.nt_xent(views, 0.5).mean()
    assert_close(loss, data['rocl_simloss_iters10'])


def test_pgd_on_cross_entropy():
  data = load('attacks')
  net, labels = Contrastive(data), jnp.asarray(data['labels'])
  view1 = nhwc(data['view1'])
  adversarial = ascend(
    lambda x: losses.cross_entropy(net.logits(x), labels),
    view1,
    jnp.clip(view1 + nhwc(data['start_noise']), 0, 1),
    eps=float(data['epsilon']),
    step_size=float(data['alpha']),
    steps=20,
  )
  assert_same_pixels(adversarial.images, data['pgd20_ce'], 0.995)


def keep_fraction(value):
  """The decimal that the float32 in the file stands for."""
  return float(f'{float(value):.6g}')


@pytest.mark.parametrize('case', cases('hydra_layers', '_stride'))
def test_hydra_convolution(case):
  data = {
    k.removeprefix(f'{case}_'): v
    for k, v in load('hydra_layers').items()
    if k.startswith(f'{case}_')
  }
  weight, scores = from_torch(data['weight']), from_torch(data['scores'])
  keep, stride = keep_fraction(data['keep']), int(data['stride'])

  def forward(scores, x):
    kernel = weight * masks.topk_mask(scores, keep)
    return convolution.conv(x, kernel, stride)

  y, pullback = jax.vjp(forward, scores, nhwc(data['x']))
  grad_scores, grad_x = pullback(nhwc(data['cotangent']))
  assert_close(y, nhwc(data['y']))
  assert_close(grad_scores, from_torch(data['grad_scores']))
  assert_close(grad_x, nhwc(data['grad_x']))
  mask = masks.topk_mask(scores, keep)
  np.testing.assert_array_equal(mask, from_torch(data['mask']))
  initial = masks.init_scores({'w': weight})['w']
  assert_close(initial, from_torch(data['scaled_scores']))


def test_hydra_linear():
  data = load('hydra_layers')
  get = lambda name: from_torch(data[f'linear_{name}'])
  weight, keep = get('weight'), keep_fraction(data['linear_keep'])
  scores = masks.init_scores({'w': weight})['w']
  assert_close(scores, get('scaled_scores'))

  def forward(scores):
    kernel = weight * masks.topk_mask(scores, keep)
    x = jnp.asarray(data['linear_x'])
    return jnp.dot(x, kernel, precision='highest') + data['linear_bias']

  y, pullback = jax.vjp(forward, scores)
  (grad_scores,) = pullback(jnp.asarray(data['linear_cotangent']))
  assert_close(y, data['linear_y'])
  assert_close(grad_scores, get('grad_scores'))
  np.testing.assert_array_equal(
    masks.topk_mask(scores, keep), get('mask').astype(np.float32)
  )


class Small(nn.Module):
  """The net of `trades.npz`: two ConvNorms and a classifier."""

  layer: type

  @nn.compact
  def __call__(self, x):
    x = nn.relu(self.layer(8, name='c1')(x))
    x = nn.relu(self.layer(16, stride=2, name='c2')(x))
    return models.Linear(10, name='fc')(x.mean((1, 2)))


def small_variables(data, prefix):
  """Parameters of Small from the names of the file; also of its gradients."""
  params = {
    f'c{i}': {
      'kernel': from_torch(data[f'{prefix}c{i}.weight']),
      'scale': jnp.asarray(data[f'{prefix}b{i}.weight']),
      'bias': jnp.asarray(data[f'{prefix}b{i}.bias']),
    }
    for i in (1, 2)
  }
  params['fc'] = {
    'kernel': from_torch(data[f'{prefix}fc.weight']),
    'bias': jnp.asarray(data[f'{prefix}fc.bias']),
  }
  return params


def small_statistics(data, prefix):
  return {
    f'c{i}': {
      'mean': jnp.asarray(data[f'{prefix}b{i}.running_mean']),
      'var': jnp.asarray(data[f'{prefix}b{i}.running_var']),
    }
    for i in (1, 2)
  }


def small_train(params, x):
  def layer(*args, **kwargs):
    return models.ConvNorm(*args, train=True, **kwargs)

  logits, updated = Small(layer).apply(
    {'params': params}, x, mutable=['batch_stats']
  )
  return logits, updated['batch_stats']


def small_frozen(params, statistics):
  convs = {k: v for k, v in params.items() if k != 'fc'}
  folded = models.fold(convs, statistics, jnp.float32) | {'fc': params['fc']}
  net = Small(models.FrozenConvNorm)
  return lambda x: net.apply({'params': folded}, x)


def test_trades():
  data = load('trades')
  params = small_variables(data, 'net.')
  statistics = small_statistics(data, 'net.')
  x, labels = nhwc(data['x']), jnp.asarray(data['labels'])
  frozen = small_frozen(params, statistics)
  clean = frozen(x)
  adversarial = ascend(
    lambda z: losses.kl_divergence(clean, frozen(z)),
    x,
    x + GAUSSIAN_START * nhwc(data['trades_start_noise']),
    eps=float(data['trades_epsilon']),
    step_size=float(data['trades_step']),
    steps=10,
  )
  assert_same_pixels(adversarial.images, data['trades_x_adv'], 0.97)

  published = nhwc(data['trades_x_adv'])

  def loss(params):
    logits, clean_moments = small_train(params, x)
    other, adversarial_moments = small_train(params, published)
    value = losses.trades(logits, other, labels, data['trades_beta'])
    return value.mean(), (clean_moments, adversarial_moments)

  value_and_grad = jax.value_and_grad(loss, has_aux=True)
  (value, (first, second)), gradient = value_and_grad(params)
  assert_close(value, data['trades_loss'])
  jax.tree.map(assert_close, gradient, small_variables(data, 'trades_grad.'))

  after = models.update_statistics(statistics, [first, second, first])
  jax.tree.map(assert_close, after, small_statistics(data, 'trades_after.'))
  frozen = small_frozen(params, after)
  assert_close(frozen(x), data['eval_logits_after'])
  evaluated = ascend(
    lambda z: losses.cross_entropy(frozen(z), labels),
    x,
    x + nhwc(data['eval_pgd_start_noise']),
    eps=float(data['trades_epsilon']),
    step_size=float(data['trades_step']),
    steps=20,
  )
  assert_same_pixels(evaluated.images, data['eval_pgd20'], 0.995)


def drawn_parameter(name, shape, seed):
  """`resnet18.npz` stores no parameters: this is how they were drawn."""
  generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
  a = generator.standard_normal(shape).astype(np.float32)
  if name.endswith('running_var'):
    return 1 + 0.2 * np.abs(a)
  if name.endswith('running_mean') or name.endswith('bias'):
    return 0.1 * a
  if a.ndim == 1:
    return 1 + 0.1 * a
  return a * np.float32(np.sqrt(1 / np.prod(shape[1:])))


def torch_name(path):
  """'encoder/stage2_block1_conv1/scale' -> 'layer2.0.bn1.weight'."""
  leaf = path.rsplit('/', 1)[1]
  unit = path.rsplit('/', 2)[-2]
  suffix = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'} | {
    'mean': 'running_mean',
    'var': 'running_var',
  }
  if unit == 'head':
    return f'linear.{suffix[leaf]}'
  if unit == 'stem':
    return ('conv1.' if leaf == 'kernel' else 'bn1.') + suffix[leaf]
  stage, block, role = unit.split('_')
  prefix = f'layer{stage[5:]}.{int(block[5:]) - 1}'
  if role == 'shortcut':
    return f'{prefix}.shortcut.{0 if leaf == "kernel" else 1}.{suffix[leaf]}'
  kind = 'conv' if leaf == 'kernel' else 'bn'
  return f'{prefix}.{kind}{role[4:]}.{suffix[leaf]}'


def test_resnet18():
  data = load('resnet18')
  settings = models.Settings(name='resnet18', width=64, dtype='float32')
  model = models.build(settings, num_classes=10)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), (32, 32, 3)))
  names = set()

  def draw(path, leaf):
    name = torch_name(jax.tree_util.keystr(path, simple=True, separator='/'))
    names.add(name)
    shape = leaf.shape
    if len(shape) > 1:
      shape = (shape[-1], shape[-2], *shape[:-2])
    value = drawn_parameter(name, shape, int(data['seed']))
    return from_torch(value)

  del shapes['params']['projector']
  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  count = sum(x.size for x in jax.tree.leaves(variables['params']))
  assert count == data['parameter_count'] == 11_173_962
  assert names == {
    n for n in data['state_dict_names'] if 'num_batches' not in n
  }

  x, labels = nhwc(data['x']), jnp.asarray(data['labels'])
  assert_close(model.predict(variables, x), data['eval_logits'])
  frozen = model.prepare(variables)
  assert_close(frozen(x), data['eval_logits'])
  gradient = jax.grad(lambda z: losses.cross_entropy(frozen(z), labels).mean())
  assert_close(gradient(x), nhwc(data['eval_input_grad']))

  logits, moments = model.train(variables, x)
  assert_close(logits, data['train_logits'])
  after = models.update_statistics(variables['batch_stats'], [moments])
  assert_close(after['stem']['mean'], data['bn1_running_mean_after'])
  assert_close(after['stem']['var'], data['bn1_running_var_after'])


def schedule_names():
  return sorted(json.loads((DIRECTORY / 'schedules.json').read_text()))


@pytest.mark.parametrize('name', schedule_names())
def test_schedules(name):
  wanted = json.loads((DIRECTORY / 'schedules.json').read_text())[name]
  family, *parts = name.split('_')
  value = lambda word: next(
    float(part.removeprefix(word)) for part in parts if part.startswith(word)
  )
  epochs = int(value('epochs'))
  if family == 'rocl':
    table = schedules.rocl(0.1, epochs)
  else:
    table = schedules.hydra(value('lr'), epochs, int(value('warmup')))
  # PyTorch's chained cosine drifts by up to 3e-4.
  np.testing.assert_allclose(table, wanted, rtol=1e-3)
