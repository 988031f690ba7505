"""CIFAR-10 from the files of its official Python version, never unpickled.

`read(directory)` reads `data_batch_1` to `data_batch_5`, `test_batch` and
`batches.meta` from `directory` or from `cifar-10-batches-py` inside it. Each is
a pickle, which could run any program; `pickles` reads it as data. A file may
hold any number of records.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rocl_jax import pickles
from rocl_jax.data import binary
from rocl_jax.data.records import (
  CIFAR10_CLASSES,
  RawDataset,
  Split,
  folder_path,
)
from rocl_jax.errors import UserError, one_line

FOLDER = 'cifar-10-batches-py'
TRAIN_FILES = tuple(f'data_batch_{i}' for i in range(1, 6))
TEST_FILES = ('test_batch',)
META = 'batches.meta'
LARGEST = 64 << 20  # bytes of a file; the official ones have half of it
_PIXELS = 3 * 32 * 32
_WANTED = f'the folder with data_batch_1 .. data_batch_5, test_batch, {META}'
_FORM = "the official pickle of b'data' and b'labels'"


def check(directory: str) -> None:
  """Raises UserError unless all files are there and of a possible size."""
  folder = _folder(directory)
  for name in (*TRAIN_FILES, *TEST_FILES, META):
    path = folder / name
    if not path.is_file():
      raise UserError(f'config.data.dir: {path} not found; wanted {_WANTED}')
    size = path.stat().st_size
    if not 0 < size <= LARGEST:
      raise UserError(
        f'config.data.dir: {path} has {size} bytes; wanted 1 to {LARGEST}'
      )


def read(directory: str) -> RawDataset:
  """Returns CIFAR-10 in the order of the files.

  Raises:
    UserError: a file is missing, too large, unreadable, not the pickle of
      such records, or has a label out of 0..9; or the classes are others.
  """
  check(directory)
  folder = _folder(directory)
  _check_classes(folder / META)

  def split(names: Sequence[str]) -> Split:
    return binary.join([_read_batch(folder / name) for name in names])

  return RawDataset(
    'cifar10', split(TRAIN_FILES), split(TEST_FILES), CIFAR10_CLASSES
  )


def _folder(directory: str) -> Path:
  folder = folder_path(directory, _WANTED)
  inner = folder / FOLDER
  return inner if inner.is_dir() else folder


def _read_batch(path: Path) -> Split:
  content = _read_dict(path, _FORM)
  try:
    pixels, labels = _array(content.get('data')), content.get('labels')
    if len(pixels) == 0:
      raise ValueError('no records')
    if type(labels) is not list or len(labels) != len(pixels):
      raise ValueError(f'no list of {len(pixels)} labels')
    for i, label in enumerate(labels):
      if type(label) is not int or not 0 <= label <= 9:
        found = label if type(label) is int else f'of {type(label).__name__}'
        raise ValueError(f'label {found!s:.40} in record {i} (from 0)')
  except ValueError as error:
    raise UserError(
      f"config.data.dir: {path} has {one_line(error)}; wanted b'data', uint8 "
      f"[N, {_PIXELS}], and b'labels', N of 0..9"
    ) from None
  planes = pixels.reshape(-1, 3, 32, 32)
  images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
  return Split(images, np.array(labels, np.int32))


def _check_classes(path: Path) -> None:
  wanted = f"b'label_names': {', '.join(CIFAR10_CLASSES)}"
  names = _read_dict(path, wanted).get('label_names')
  if type(names) is not list or [_text(x) for x in names] != [*CIFAR10_CLASSES]:
    raise UserError(
      f'config.data.dir: {path} names other classes; wanted {wanted}'
    )


def _read_dict(path: Path, wanted: str) -> dict[Any, Any]:
  """Returns the dict that a file holds, its keys as text."""
  try:
    with path.open('rb') as file:
      content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
      raise ValueError(f'more than {LARGEST} bytes')
    functions = _STAND_INS | {'_codecs.encode': _Encoder(len(content))}
    value = pickles.read(content, functions, frozenset({'numpy.ndarray'}))
    if type(value) is not dict:
      raise ValueError(f'a {type(value).__name__} for a dict')
  except (OSError, ValueError) as error:
    raise UserError(
      f'config.data.dir: {path} cannot be read ({one_line(error)}); '
      f'wanted {wanted}'
    ) from None
  return {_text(key): x for key, x in value.items()}


def _text(value: Any) -> Any:
  """Python 2's text is bytes here."""
  return value.decode('latin-1') if type(value) is bytes else value


# What stands in for NumPy's functions: records of what they were asked for.


class _Dtype(pickles.Built):
  def __init__(self, code: Any, *_: Any):
    if _text(code) not in ('u1', '|u1', 'uint8'):
      found = code if type(code) in (str, bytes) else type(code)
      raise ValueError(f'an array of type {found!r:.40}, not uint8')


class _Array(pickles.Built):
  def __init__(self, *_: Any):
    pass


class _Encoder:
  """Python 3's way of writing bytes in protocol 2: `_codecs.encode`.

  Args:
    room: bytes that it may return in all. An honest file has them in it; a
      hostile one has the same text encoded time and again.
  """

  def __init__(self, room: int):
    self._room = room

  def __call__(self, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != 'latin1':
      raise ValueError('text in another encoding than latin1')
    self._room -= len(text)
    if self._room < 0:
      raise ValueError('more bytes than the file has')
    return text.encode('latin-1')


_STAND_INS = {
  'numpy.core.multiarray._reconstruct': _Array,
  'numpy._core.multiarray._reconstruct': _Array,
  'numpy.dtype': _Dtype,
}


def _array(value: Any) -> np.ndarray:
  """Returns uint8 [N, 3072] of an array's pickled state, or ValueError."""
  if type(value) is not _Array:
    raise ValueError('no array of pixels')
  if type(value.state) is not tuple or len(value.state) != 5:
    raise ValueError('a damaged array of pixels')
  _, shape, dtype, by_column, content = value.state
  sizes = type(shape) is tuple and all(type(x) is int and x >= 0 for x in shape)
  kinds = (type(dtype), type(by_column), type(content))
  if not sizes or kinds != (_Dtype, bool, bytes):
    raise ValueError('a damaged array of pixels')
  if len(shape) != 2 or shape[1] != _PIXELS or math.prod(shape) != len(content):
    raise ValueError(f'{len(content)} bytes of pixels in shape {shape!r:.40}')
  flat = np.frombuffer(content, np.uint8)
  n = shape[0]
  return flat.reshape(_PIXELS, n).T if by_column else flat.reshape(n, _PIXELS)
