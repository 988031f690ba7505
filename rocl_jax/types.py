"""The records that everything else passes round. The page to read first.

A run is a chain of stages. A stage is four small functions, and one training
step (`loop.make_step`) serves them all:

| stage | trained | held fixed | the network sees | handed on |
|---|---|---|---|---|
| pretrain | encoder, projector | | what is trained | encoder, projector |
| linear_eval | head | encoder | both | encoder, head |
| supervised | encoder, head | | what is trained | encoder, head |
| prune | scores, BatchNorm | weights | weights * top-k | masked net, masks |
| finetune | weights, BatchNorm | masks | weights * masks | masked net, masks |
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# Nested dict of arrays.
Tree = dict[str, Any]

# What stages hand over and what is published: a dict with `params` and
# `batch_stats`; after pruning also `masks`, a flat dict by path, and, for the
# next stage alone, `dropped`, the weights under the masks. In `params` pruned
# weights are exactly zero.
Variables = dict[str, Any]

# name -> scalar, a mean over the batch.
Metrics = dict[str, jax.Array]


class Batch(NamedTuple):
  """Training examples as they are stored.

  Attributes:
    images: uint8 [B, H, W, 3].
    labels: int32 [B].
  """

  images: Any
  labels: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingSet:
  """All training examples, as they lie on every device; or those of one step.

  An image is one row: TPUs lay [N, H, W, C] out with the images innermost, and
  to gather some of them they would copy the whole set in each step.

  Attributes:
    images: uint8 [N, H * W * C].
    labels: int32 [N].
    shape: of an image, (H, W, C).
    one_batch: whether these are a step's own, N = B, split over the devices.
  """

  images: Any
  labels: Any
  shape: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  one_batch: bool = dataclasses.field(default=False, metadata={'static': True})

  @classmethod
  def of(cls, images: Any, labels: Any) -> 'TrainingSet':
    """Of images uint8 [N, H, W, C] and their labels."""
    return cls(images.reshape(len(images), -1), labels, images.shape[1:])

  def numbers(self, index: jax.Array) -> jax.Array:
    """Where the examples are that have these numbers in the training set."""
    return jax.numpy.arange(len(self.labels)) if self.one_batch else index

  def rows(self, index: jax.Array) -> Batch:
    """The examples at these places."""
    images, labels = self.images, self.labels
    if not (self.one_batch and len(index) == len(labels)):  # else all of them
      images, labels = images[index], labels[index]
    return Batch(images.reshape(*index.shape, *self.shape), labels)


class Trained(NamedTuple):
  """What a stage starts from, and what it has become.

  Attributes:
    trainable: what the optimiser updates.
    frozen: what the stage needs besides.
    batch_stats: BatchNorm's running statistics.
  """

  trainable: Tree
  frozen: Tree
  batch_stats: Tree


class Stage(NamedTuple):
  """A stage of the method: four functions, and nothing else.

  Attributes:
    start: (upstream variables, key) -> Trained. It copies what it keeps.
    weights: (trainable, frozen) -> params that the network sees.
    loss: (params, batch_stats, batch, key) -> (loss, (batch_stats, metrics)).
      Draws its own views of the uint8 batch and attacks them.
    finish: (Trained) -> variables for evaluation and the next stage.
  """

  start: Callable[[Variables, jax.Array], Trained]
  weights: Callable[[Tree, Tree], Tree]
  loss: Callable[..., tuple[jax.Array, tuple[Tree, Metrics]]]
  finish: Callable[[Trained], Variables]


class Skips(NamedTuple):
  """Updates left out, as their loss or gradient was not finite.

  Attributes:
    epoch: bool [S], the steps of this epoch so far that were.
    in_row: int32, how many of the last steps, without one in between.
  """

  epoch: jax.Array
  in_row: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """Arrays only: all that a checkpoint must hold for a resume that is bit-equal
  on the same versions, devices and settings.

  Random numbers are a function of (seed, stage, step), so no key is stored.

  Attributes:
    step: updates done.
    trained: see Trained.
    opt_state: the optimiser's.
    sums: this epoch's metrics, summed over its steps so far that counted.
    skips: the steps that did not.
  """

  step: jax.Array
  trained: Trained
  opt_state: Any
  sums: Metrics
  skips: Skips
