"""The same networks in PyTorch, with the same weights.

Needs the extra [peers]. Nothing but the benchmark and its tests import it.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rocl_jax.models import ARCHITECTURES, Settings, Variables


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
  """Encoder, projector and head; images are [N, C, H, W] in [0, 1]."""

  def __init__(self, settings: Settings, num_classes: int):
    super().__init__()
    blocks = ARCHITECTURES[settings.name]
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
    x = F.relu(self.stem(images))
    for block in self.blocks.values():
      x = block(x)
    return x.mean((2, 3))

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


def _copy(target, source):
  with torch.no_grad():
    target.copy_(torch.from_numpy(np.array(source)))


def images_of(images: np.ndarray, channels_last: bool) -> torch.Tensor:
  """[N, H, W, C] as [N, C, H, W], in the memory layout that is asked for."""
  layout = torch.channels_last if channels_last else torch.contiguous_format
  tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
  return tensor.clone().contiguous(memory_format=layout)
