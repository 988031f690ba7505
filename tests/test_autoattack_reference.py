"""AutoAttack against what the official implementation gives, image by image.

`tests/reference/autoattack.npz` holds a small trained network and the fates of
256 real test images under official AutoAttack 2022, which are read from
ROCL_CIFAR_DIR (official binary files). ROCL_REFERENCE_DIR=FOLDER compares with
another file of the same layout.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from rocl_jax import convolution
from rocl_jax.attacks import autoattack
from rocl_jax.attacks.apgd import apgd
from rocl_jax.attacks.fab import fab
from rocl_jax.attacks.square import square
from rocl_jax.data import binary

pytestmark = [
  pytest.mark.cifar,
  pytest.mark.skipif(
    'ROCL_CIFAR_DIR' not in os.environ,
    reason='ROCL_CIFAR_DIR names no folder of official CIFAR-10 files',
  ),
]

# Simulated devices share the cores; one works faster on them than four.
ONE_DEVICE = Mesh(np.array(jax.devices()[:1]), ('data',))

FOLDER = pathlib.Path(
  os.environ.get(
    'ROCL_REFERENCE_DIR', pathlib.Path(__file__).parent / 'reference'
  )
)


@pytest.fixture(scope='module')
def reference():
  with np.load(FOLDER / 'autoattack.npz', allow_pickle=False) as file:
    return {name: file[name] for name in file.files}


@pytest.fixture(scope='module')
def images(reference):
  test = binary.read(os.environ['ROCL_CIFAR_DIR']).test
  first, n = int(reference['first_test_index']), len(reference['labels'])
  labels = test.labels[first : first + n]
  np.testing.assert_array_equal(labels, reference['labels'])
  return test.images[first : first + n].astype(np.float32) / 255


@pytest.fixture(scope='module')
def logits_fn(reference):
  """The small network, with the convolutions that are fast in a loop."""
  layers = []
  for name, stride in (('c1', 1), ('c2', 2), ('c3', 2)):
    kernel = jnp.asarray(reference[f'{name}.weight']).transpose(2, 3, 1, 0)
    bias = jnp.asarray(reference[f'{name}.bias'])
    layers.append((kernel, convolution.flip(kernel), bias, stride))
  weight = jnp.asarray(reference['fc.weight']).T
  bias = jnp.asarray(reference['fc.bias'])

  def forward(x):
    for kernel, flipped, offset, stride in layers:
      x = convolution.frozen_conv(x, kernel, flipped, stride)
      x = jax.nn.relu(x + offset)
    return jnp.dot(x.mean((1, 2)), weight, precision='highest') + bias

  return forward


def test_it_is_the_same_network(reference, images, logits_fn):
  np.testing.assert_allclose(logits_fn(images), reference['logits'], atol=1e-4)


# Which attack, and how many of the images may end otherwise.
ATTACKS = {
  'eps8_apgd-ce_robust': (8, lambda eps: apgd(eps=eps), 0.01),
  'eps8_apgd-t_robust': (8, lambda eps: targeted(eps), 0.01),
  'eps8_fab-t_robust': (8, lambda eps: fab(eps=eps), 0.01),
  'eps8_square_robust': (8, lambda eps: square(eps=eps), 0.02),
  'eps4_apgd-ce_robust': (4, lambda eps: apgd(eps=eps), 0.01),
  'eps4_apgd-t_robust': (4, lambda eps: targeted(eps), 0.01),
}
# Half a minute and more each; the suite has these attacks, too.
SLOW = [name for name in ATTACKS if 'apgd-ce' not in name]


def targeted(eps):
  return apgd(eps=eps, loss='dlr', targets=9)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(n, marks=pytest.mark.slow if n in SLOW else ())
    for n in ATTACKS
  ],
)
def test_an_attack_alone_breaks_as_many(name, reference, images, logits_fn):
  radius, make, allowed = ATTACKS[name]
  attacks = [(name, make(radius / 255))]
  result = autoattack(
    *(logits_fn, images, reference['labels']),
    eps=radius / 255,
    attacks=attacks,
    batch_size=64,
    mesh=ONE_DEVICE,
  )
  official = reference[name]
  assert abs(result.robust.mean() - official.mean()) <= allowed
  # Nor do other images break: an attack that misses some can not hide.
  assert (result.robust != official).mean() <= 2 * allowed


@pytest.mark.parametrize('n', [16, pytest.param(256, marks=pytest.mark.slow)])
def test_the_standard_suite_breaks_as_many(n, reference, images, logits_fn):
  """Fates are those of each image alone: the first of them tell as well."""
  result = autoattack(
    *(logits_fn, images[:n], reference['labels'][:n]),
    eps=8 / 255,
    batch_size=64,
    mesh=ONE_DEVICE,
  )
  np.testing.assert_array_equal(result.clean, reference['clean_correct'][:n])
  official = reference['eps8_standard_robust'][:n]
  assert abs(result.robust.mean() - official.mean()) <= 0.005
  assert (result.robust != official).mean() <= 0.01
  assert list(result.after) == ['apgd-ce', 'apgd-t', 'fab-t', 'square']
