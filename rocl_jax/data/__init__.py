"""Image data sets in memory.

    dataset = load('digits', '', validation=100)
    dataset.train.images  # uint8 [1337, 8, 8, 3]

| source | directory |
|---|---|
| `tfds` | TensorFlow Datasets' data_dir; '' is its default. CIFAR-10 |
| `binary` | the folder of CIFAR-10's official binary version |
| `python` | the folder of its official Python version, never unpickled |
| `folder` | a folder with train/<class>/ and test/<class>/ images, see there |
| `digits` | not used: scikit-learn's digits, 8x8 pixels |

Images to evaluate on, and not to train on:

    splits = load_corruptions('CIFAR-10-C')
    splits['fog-5'].images  # uint8 [10000, 32, 32, 3]

| function | directory |
|---|---|
| `load_corruptions` | the folder of CIFAR-10-C: labels.npy, fog.npy, ... |
"""

from collections.abc import Callable

import numpy as np

from rocl_jax.data import (
  binary,
  corruptions,
  digits,
  folder,
  python_version,
  tfds,
)
from rocl_jax.data.records import Dataset, RawDataset, Split, validate
from rocl_jax.errors import UserError, nearest

__all__ = [
  'SOURCES',
  'Dataset',
  'RawDataset',
  'Split',
  'check',
  'load',
  'prepare',
  'load_corruptions',
]

SOURCES: dict[str, Callable[[str], RawDataset]] = {
  'tfds': tfds.read,
  'binary': binary.read,
  'python': python_version.read,
  'folder': folder.read,
  'digits': digits.read,
}
_CHECKS: dict[str, Callable[[str], None]] = {
  'tfds': tfds.check,
  'binary': binary.check,
  'python': python_version.check,
  'folder': folder.check,
  'digits': digits.check,
}

# Not the seed of the run: runs are compared on the same held-out images.
VALIDATION_SEED = 19620827


def check(source: str, directory: str, validation: int) -> None:
  """Checks what can be checked without reading images or using a network.

  Args:
    source: a name in SOURCES.
    directory: where the source finds its files.
    validation: number of training images to hold out.

  Raises:
    UserError: the source is unknown, its files are missing or of the wrong
      kind, or `validation` is negative.
  """
  if source not in SOURCES:
    raise UserError(
      f'config.data.source: {source!r} is unknown{nearest(source, SOURCES)}; '
      f'wanted one of {", ".join(SOURCES)}'
    )
  if validation < 0:
    raise UserError(
      f'config.data.validation: {validation}; wanted 0 or more images'
    )
  _CHECKS[source](directory)


def prepare(source: str, directory: str) -> None:
  """Makes what `load` reads, where that takes more than reading.

  Of hosts that share a folder one does this, and the others wait for it.
  Arguments and errors as in `load`.
  """
  if source == 'tfds':
    tfds.prepare(directory)


def load(source: str, directory: str, validation: int) -> Dataset:
  """Returns the data set with `validation` training images held out.

  The held-out images are the first `validation` of a fixed permutation of the
  training set, so that a larger number only adds to a smaller one. The rest
  stays in the order of the source.

  Args:
    source: a name in SOURCES.
    directory: where the source finds its files.
    validation: number of training images to hold out, below their number.

  Raises:
    UserError: as in `check`, or a file is damaged, or `validation` leaves no
      training image.
  """
  check(source, directory, validation)
  raw = SOURCES[source](directory)
  validate(raw)
  train, held_out = _hold_out(raw.train, validation)
  return Dataset(raw.name, train, held_out, raw.test, raw.class_names)


def load_corruptions(directory: str) -> dict[str, Split]:
  """Returns CIFAR-10-C as splits 'gaussian_noise-1' .. 'jpeg_compression-5'.

  Args:
    directory: the folder with `labels.npy` and `<corruption>.npy` files; see
      `rocl_jax.data.corruptions`.

  Raises:
    UserError: a file is missing, damaged or of the wrong kind, or the labels
      are not those of five severities of the same images.
  """
  return corruptions.read(directory)


def _hold_out(train: Split, validation: int) -> tuple[Split, Split]:
  images, labels = train
  if validation >= len(labels):
    raise UserError(
      f'config.data.validation: {validation} of {len(labels)} training images; '
      f'wanted at most {len(labels) - 1}'
    )
  # RandomState: its streams are frozen, those of Generator may change.
  order = np.random.RandomState(VALIDATION_SEED).permutation(len(labels))
  chosen = order[:validation]
  held_out = Split(images[chosen], labels[chosen])
  if validation == 0:
    return train, held_out  # no copy
  keep = np.sort(order[validation:])
  return Split(images[keep], labels[keep]), held_out
