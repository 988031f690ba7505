"""The same networks in PyTorch: weights, precision and device are ours.

Needs the extra [peers]. Nothing but the benchmark and its tests import it.
"""

import contextlib
import copy

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from rocl_jax.errors import UserError
from rocl_jax.models import ARCHITECTURES, Settings, Variables


def device() -> str:
  """PyTorch's name for the kind of device that JAX runs on.

  Raises:
    UserError: PyTorch can't use it; on another, no comparison is fair.
  """
  backend = jax.default_backend()
  if backend == 'cpu':
    return 'cpu'
  if backend == 'gpu' and torch.cuda.is_available():
    return 'cuda'
  raise UserError(
    f'benchmark: JAX runs on a {backend.upper()}, which PyTorch '
    f'{torch.__version__} can not use; wanted both on the same device: '
    'install a PyTorch that can, or set JAX_PLATFORMS=cpu'
  )


def set_precision(dtype: str) -> str:
  """Makes PyTorch's products as precise as ours of `models.Settings.dtype`.

  By default its convolutions of float32 are not: on GPUs they round to TF32.

  Returns:
    What was set, for people.
  """
  tf32 = dtype == 'tf32'
  torch.backends.cudnn.allow_tf32 = tf32
  torch.backends.cuda.matmul.allow_tf32 = tf32
  torch.backends.cudnn.benchmark = True  # as XLA, it tries what is fastest
  if dtype == 'bfloat16':
    return 'bfloat16 in the encoder, by autocast or of bfloat16 weights'
  return f'float32, allow_tf32={tf32}'


class ConvNorm(nn.Module):
  def __init__(self, inputs, features, size=3, stride=1):
    super().__init__()
    self.conv = nn.Conv2d(
      inputs, features, size, stride, padding=size // 2, bias=False
    )
    self.norm = nn.BatchNorm2d(features)

  def forward(self, x):
    return self.norm(self.conv(x))


class Block(nn.Module):
  def __init__(self, inputs, features, stride):
    super().__init__()
    self.conv1 = ConvNorm(inputs, features, stride=stride)
    self.conv2 = ConvNorm(features, features)
    self.shortcut = None
    if stride != 1 or inputs != features:
      self.shortcut = ConvNorm(inputs, features, size=1, stride=stride)

  def forward(self, x):
    y = self.conv2(F.relu(self.conv1(x)))
    return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Network(nn.Module):
  """Encoder, projector and head; images are [N, C, H, W] in [0, 1].

  With dtype 'bfloat16' the encoder's arithmetic is; all else is float32.
  """

  def __init__(self, settings: Settings, num_classes: int):
    super().__init__()
    blocks = ARCHITECTURES[settings.name]
    self.bfloat16 = settings.dtype == 'bfloat16'
    self.stem = ConvNorm(3, settings.width)
    self.blocks = nn.ModuleDict()
    inputs = settings.width
    for stage, count in enumerate(blocks):
      features = settings.width * 2**stage
      for block in range(count):
        stride = 2 if stage > 0 and block == 0 else 1
        name = f'stage{stage + 1}_block{block + 1}'
        self.blocks[name] = Block(inputs, features, stride)
        inputs = features
    self.hidden = nn.Linear(inputs, 2048)
    self.output = nn.Linear(2048, 128)
    self.head = nn.Linear(inputs, num_classes)

  def features(self, images):
    rounded = contextlib.nullcontext()
    if self.bfloat16:
      rounded = torch.autocast(images.device.type, torch.bfloat16)
    with rounded:
      x = F.relu(self.stem(images))
      for block in self.blocks.values():
        x = block(x)
    return x.to(self.head.weight.dtype).mean((2, 3))

  def project(self, images):
    return self.output(F.relu(self.hidden(self.features(images))))

  def forward(self, images):
    return self.head(self.features(images))


def network(
  settings: Settings, num_classes: int, variables: Variables
) -> Network:
  """The network with our variables in it, in evaluation mode."""
  net = Network(settings, num_classes)
  params, stats = variables['params'], variables['batch_stats']

  def convolution(layer, name):
    ours, running = params['encoder'][name], stats[name]
    kernel = np.asarray(ours['kernel']).transpose(3, 2, 0, 1)
    _copy(layer.conv.weight, kernel)
    _copy(layer.norm.weight, ours['scale'])
    _copy(layer.norm.bias, ours['bias'])
    _copy(layer.norm.running_mean, running['mean'])
    _copy(layer.norm.running_var, running['var'])

  def linear(layer, ours):
    _copy(layer.weight, np.asarray(ours['kernel']).T)
    _copy(layer.bias, ours['bias'])

  convolution(net.stem, 'stem')
  for name, block in net.blocks.items():
    convolution(block.conv1, f'{name}_conv1')
    convolution(block.conv2, f'{name}_conv2')
    if block.shortcut is not None:
      convolution(block.shortcut, f'{name}_shortcut')
  linear(net.hidden, params['projector']['hidden'])
  linear(net.output, params['projector']['output'])
  linear(net.head, params['head'])
  return net.eval()


def fold(net: Network) -> Network:
  """A copy for attacks: no BatchNorm, and constant weights of the type that
  the encoder computes in."""
  folded = copy.deepcopy(net)
  for layer in _layers(folded):
    layer.conv = fuse_conv_bn_eval(layer.conv, layer.norm)
    layer.norm = nn.Identity()
    if net.bfloat16:
      layer.conv.to(torch.bfloat16)
  return folded.requires_grad_(False)


@torch.no_grad()
def refold(folded: Network, net: Network) -> None:
  """Brings the weights of `net` into the copy that `fold` made of it."""
  for target, source in zip(_layers(folded), _layers(net), strict=True):
    norm = source.norm
    weight, bias = fuse_conv_bn_weights(
      source.conv.weight,
      None,
      norm.running_mean,
      norm.running_var,
      norm.eps,
      norm.weight,
      norm.bias,
    )
    target.conv.weight.copy_(weight)
    target.conv.bias.copy_(bias)
  folded.head.load_state_dict(net.head.state_dict())


def _layers(net):
  return [m for m in net.modules() if isinstance(m, ConvNorm)]


def _copy(target, source):
  with torch.no_grad():
    target.copy_(torch.from_numpy(np.array(source)))


def layout(channels_last: bool) -> torch.memory_format:
  return torch.channels_last if channels_last else torch.contiguous_format


def images_of(images: np.ndarray, channels_last: bool) -> torch.Tensor:
  """[N, H, W, C] as [N, C, H, W], in the memory layout that is asked for."""
  tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
  return tensor.clone().contiguous(memory_format=layout(channels_last))
