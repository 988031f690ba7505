"""What `python -m rocl_jax.benchmark` measures.

  python -m rocl_jax.benchmark attacks --config.width=16 --config.steps=7,10

A grid: every combination of `width`, `batch`, `dtype` and `steps`, each a
tuple. Losses, radii and optimisers are those of `recipe`, the paper's.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.rounds = 5
  c.image_size = 32
  c.classes = 10
  c.width = (16, 64)
  c.batch = (32,)
  c.dtype = ('float32',)
  c.steps = (10,)

  c.masks = ConfigDict()
  c.masks.sizes = (36864, 147456, 589824, 2359296)  # 3x3 kernels, width 64
  c.masks.keep = 0.1

  c.scaling = ConfigDict()
  c.scaling.devices = (1, 2, 4, 8)
  c.scaling.width = 8
  c.scaling.batch = 64  # of all devices (strong), of each (weak)
  c.scaling.steps = 2

  c.autoattack = ConfigDict()
  c.autoattack.model = ''  # a model folder; '' for the network of `reference`
  c.autoattack.reference = 'tests/reference/autoattack.npz'
  c.autoattack.images = ''
  c.autoattack.examples = 256
  c.autoattack.eps = '8/255'
  c.autoattack.norm = 'linf'
  c.autoattack.batch_size = 64

  c.recipe = cifar10.get_config()
  return c
