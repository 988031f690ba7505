"""Floating-point operations that a step needs, counted by hand.

A multiplication and an addition are two. Convolutions and matrix products
alone count: BatchNorm, losses and optimisers are a few operations a number.
`hlo.flops` counts what a compiled program does.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

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
  stem, *rest = (
    2 * size**2 * taps * inputs * outputs
    for size, taps, inputs, outputs in convolutions(settings, image_size)
  )
  features = settings.width * 2 ** (len(ARCHITECTURES[settings.name]) - 1)
  projector = 2 * (features * 2048 + 2048 * 128)
  return Forward(stem, stem + sum(rest), 2 * features * num_classes, projector)


def convolutions(
  settings: Settings, image_size: int
) -> Iterator[tuple[int, int, int, int]]:
  """(size of the output, taps, channels in, channels out), the stem's first."""
  size, inputs = image_size, settings.width
  yield size, 9, 3, inputs
  for stage, blocks in enumerate(ARCHITECTURES[settings.name]):
    outputs = settings.width * 2**stage
    for block in range(blocks):
      if stage > 0 and block == 0:
        size = -(-size // 2)
        yield size, 1, inputs, outputs
      yield size, 9, inputs, outputs
      yield size, 9, outputs, outputs
      inputs = outputs


def attack(network: int, steps: int) -> int:
  """A forward pass and the gradient of the image, each step."""
  return 2 * steps * network


def training_pass(network: int, stem: int) -> int:
  """A forward pass and the gradients of weights and of activations."""
  return 3 * network - stem


class Passes(NamedTuple):
  """What a step does with the network, for each image of the batch.

  Attributes:
    network: FLOPs of a forward pass through the parts that it uses.
    forward: forward passes with constant weights, once a step.
    attack_steps: forward passes with the gradient of the image.
    train: forward passes with the gradient of the weights.
  """

  network: int
  forward: int
  attack_steps: int
  train: int


def passes(stage: str, settings: Any, count: Forward) -> Passes:
  """Of a stage with its section."""
  steps = settings.attack.keywords.get('steps', 0)
  if stage == 'pretrain':  # {adversary, view 2}, {view 1, view 2, adversary}
    return Passes(count.encoder + count.projector, 1, steps, 5)
  network = count.encoder + count.head
  if settings.loss == 'natural':
    steps = 0
  if stage == 'linear_eval':  # the head alone is trained
    return Passes(network, 1, steps, 0)
  if settings.loss == 'trades':  # the clean logits
    return Passes(network, 1, steps, 2)
  return Passes(network, 0, steps, 1 if settings.loss == 'natural' else 2)


def step(
  stage: str, settings: Any, model: Settings, image_size: int, num_classes: int
) -> int:
  """FLOPs that an update of a stage needs for each image of the batch."""
  count = forward(model, image_size, num_classes)
  p = passes(stage, settings, count)
  return (
    p.forward * p.network
    + attack(p.network, p.attack_steps)
    + p.train * training_pass(p.network, count.stem)
  )
