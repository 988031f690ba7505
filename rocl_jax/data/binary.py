"""CIFAR-10 from the files of its official binary version.

`read(directory)` reads `data_batch_1.bin` to `data_batch_5.bin` and
`test_batch.bin` from `directory` or from `cifar-10-batches-bin` inside it. A
record is one label byte and 3,072 pixel bytes: the red, green and blue planes,
each row by row. A file may hold any number of whole records.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rocl_jax.data.records import (
  CIFAR10_CLASSES,
  RawDataset,
  Split,
  folder_path,
)
from rocl_jax.errors import UserError

FOLDER = 'cifar-10-batches-bin'
TRAIN_FILES = tuple(f'data_batch_{i}.bin' for i in range(1, 6))
TEST_FILES = ('test_batch.bin',)
RECORD_BYTES = 1 + 3 * 32 * 32
_WANTED = 'the folder with data_batch_1.bin .. data_batch_5.bin, test_batch.bin'


def check(directory: str) -> None:
  """Raises UserError unless all files are there and hold whole records."""
  folder = _folder(directory)
  for name in TRAIN_FILES + TEST_FILES:
    path = folder / name
    if not path.is_file():
      raise UserError(f'config.data.dir: {path} not found; wanted {_WANTED}')
    _check_size(path.stat().st_size, str(path))


def read(directory: str) -> RawDataset:
  """Returns CIFAR-10 in the order of the files.

  Raises:
    UserError: a file is missing, empty, cut short, unreadable or has a label
      above 9.
  """
  check(directory)
  folder = _folder(directory)

  def split(names: Sequence[str]) -> Split:
    return join([_read_file(folder / name) for name in names])

  return RawDataset(
    'cifar10', split(TRAIN_FILES), split(TEST_FILES), CIFAR10_CLASSES
  )


def parse(content: bytes, where: str) -> Split:
  """Returns the records in `content`; UserError naming `where` if malformed."""
  _check_size(len(content), where)
  records = np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
  labels = records[:, 0]
  wrong = np.flatnonzero(labels > 9)
  if len(wrong):
    raise UserError(
      f'config.data.dir: {where} has label {labels[wrong[0]]} in record '
      f'{wrong[0]} (from 0); wanted 0..9'
    )
  planes = records[:, 1:].reshape(-1, 3, 32, 32)
  images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
  return Split(images, labels.astype(np.int32))


def join(splits: Sequence[Split]) -> Split:
  """Returns the splits one after the other."""
  images, labels = zip(*splits, strict=True)
  return Split(np.concatenate(images), np.concatenate(labels))


def _folder(directory: str) -> Path:
  folder = folder_path(directory, _WANTED)
  inner = folder / FOLDER
  return inner if inner.is_dir() else folder


def _check_size(size: int, where: str) -> None:
  if size == 0 or size % RECORD_BYTES:
    raise UserError(
      f'config.data.dir: {where} has {size} bytes; wanted a positive multiple '
      f'of {RECORD_BYTES} (one record)'
    )


def _read_file(path: Path) -> Split:
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UserError(
      f'config.data.dir: {path} cannot be read ({error.strerror}); '
      f'wanted {_WANTED}'
    ) from error
  return parse(content, str(path))
