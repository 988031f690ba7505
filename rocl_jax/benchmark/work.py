"""Floating-point operations that a step needs, counted by hand.

A multiplication and an addition are two. Convolutions and matrix products
alone count: BatchNorm, losses and optimisers are a few operations a number.
`hlo.flops` counts what a compiled program does.
"""

from typing import NamedTuple

from rocl_jax.models import ARCHITECTURES, Settings


class Forward(NamedTuple):
  """Of one image through the network.

  Attributes:
    stem: the first convolution, whose input gradient training does not need.
    encoder: all convolutions, the stem's included.
    head, projector: what stands on the encoder.
  """

  stem: int
  encoder: int
  head: int
  projector: int


def forward(settings: Settings, image_size: int, num_classes: int) -> Forward:
  """Counts the network of `models.ResNet`."""
  product = lambda size, taps, inputs, outputs: (
    2 * size**2 * taps * inputs * outputs
  )
  size, inputs = image_size, settings.width
  stem = total = product(size, 9, 3, inputs)
  for stage, blocks in enumerate(ARCHITECTURES[settings.name]):
    outputs = settings.width * 2**stage
    for block in range(blocks):
      if stage > 0 and block == 0:
        size = -(-size // 2)
        total += product(size, 1, inputs, outputs)
      total += product(size, 9, inputs, outputs)
      total += product(size, 9, outputs, outputs)
      inputs = outputs
  projector = 2 * (inputs * 2048 + 2048 * 128)
  return Forward(stem, total, 2 * inputs * num_classes, projector)


def attack(network: int, steps: int) -> int:
  """A forward pass and the gradient of the image, each step."""
  return 2 * steps * network


def training_pass(network: int, stem: int) -> int:
  """A forward pass and the gradients of weights and of activations."""
  return 3 * network - stem
