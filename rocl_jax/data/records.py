"""The records that every data source returns, and their validation.

`validate(raw)` is the last step of every load, whatever the source was.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from rocl_jax.errors import UserError

# In label order, which is also alphabetical order.
CIFAR10_CLASSES = (
  'airplane',
  'automobile',
  'bird',
  'cat',
  'deer',
  'dog',
  'frog',
  'horse',
  'ship',
  'truck',
)


class Split(NamedTuple):
  """Labelled images.

  images: uint8 [N, H, W, 3], RGB, 0..255.
  labels: int32 [N], 0 up to the number of classes less one.
  """

  images: np.ndarray
  labels: np.ndarray


class RawDataset(NamedTuple):
  """What a source reads: the official training and test sets."""

  name: str
  train: Split
  test: Split
  class_names: tuple[str, ...]


class Dataset(NamedTuple):
  """What a run uses: `validation` is held out of the training set."""

  name: str
  train: Split
  validation: Split
  test: Split
  class_names: tuple[str, ...]


def folder_path(directory: str, wanted: str) -> Path:
  """Returns `directory` as a path; UserError unless it is a folder."""
  if not directory:
    raise UserError(f"config.data.dir: '' is empty; wanted {wanted}")
  path = Path(directory).expanduser()
  if not path.is_dir():
    found = 'is not a folder' if path.exists() else 'does not exist'
    raise UserError(f'config.data.dir: {directory} {found}; wanted {wanted}')
  return path


def validate(raw: RawDataset) -> None:
  """Raises UserError unless both splits are well formed and not empty."""
  classes = len(raw.class_names)
  for name, split in (('training', raw.train), ('test', raw.test)):
    where = f'config.data.source: the {name} set of {raw.name}'
    images, labels = split
    if len(images) == 0:
      raise UserError(f'{where} is empty; wanted at least one image')
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
      raise UserError(
        f'{where} has images {images.dtype} {list(images.shape)}; '
        'wanted uint8 [N, H, W, 3]'
      )
    if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
      raise UserError(
        f'{where} has labels {labels.dtype} {list(labels.shape)}; '
        f'wanted int32 [{len(images)}]'
      )
    if labels.min() < 0 or labels.max() >= classes:
      raise UserError(
        f'{where} has labels {labels.min()}..{labels.max()}; '
        f'wanted 0..{classes - 1}'
      )
  sizes = [split.images.shape[1:] for split in (raw.train, raw.test)]
  if sizes[0] != sizes[1]:
    raise UserError(
      f'config.data.source: {raw.name} has training images {list(sizes[0])} '
      f'and test images {list(sizes[1])}; wanted one size'
    )
