"""The weights in a PyTorch checkpoint, without PyTorch and without running it.

  tensors = read('model_best.pth.tar')
  tensors['conv1.weight']  # float32 [64, 3, 3, 3]

`torch.save` writes a zip file: `data.pkl`, a pickle that `pickles` reads as
data, and one uncompressed member for the bytes of each storage. Nothing else
is understood: neither the format before PyTorch 1.6, nor TorchScript, nor
objects other than tensors in dicts and lists of plain values.
"""

import math
import os
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from rocl_jax import pickles
from rocl_jax.errors import UserError

LARGEST = 4 << 30  # bytes of a file
_LARGEST_PICKLE = 64 << 20
_MOST_MEMBERS = 100_000
_MOST_DIMENSIONS = 8
_WANTED = 'a checkpoint of torch.save (its zip format) with plain tensors'

_DTYPES = {
  'FloatStorage': np.dtype('<f4'),
  'DoubleStorage': np.dtype('<f8'),
  'HalfStorage': np.dtype('<f2'),
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'LongStorage': np.dtype('<i8'),
  'IntStorage': np.dtype('<i4'),
  'ShortStorage': np.dtype('<i2'),
  'CharStorage': np.dtype('i1'),
  'ByteStorage': np.dtype('u1'),
  'BoolStorage': np.dtype('?'),
}
# Where the published code, and most other, keeps the weights in a checkpoint.
_USUAL = ('state_dict', 'model', 'net', 'model_state_dict')


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the state dict of a checkpoint.

  That is the file's dict itself if it holds nothing but tensors, or else the
  one in it. A prefix 'module.' of every name, as DataParallel leaves it, goes.

  Args:
    path: the file.

  Returns:
    {name: array}, read-only views of the storages, in the file's order.

  Raises:
    UserError: it can't be read, is damaged, or is anything else; one line.
  """
  try:
    with open(path, 'rb') as file:
      return _named(_state_dict(_content(file)))
  except UserError:
    raise
  # A damaged zip raises whatever zipfile and struct raise.
  except Exception as error:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    raise UserError(
      f'{path}: can not be read ({reason:.200}); wanted {_WANTED}'
    ) from None


def _content(file: Any) -> Any:
  """What the pickle describes, tensors in their places."""
  size = file.seek(0, os.SEEK_END)
  if size > LARGEST:
    raise ValueError(f'{size} bytes, more than {LARGEST}')
  file.seek(0)
  if file.read(4) != b'PK\x03\x04':
    raise ValueError(
      'no zip file: neither is the format before PyTorch 1.6 read; load and '
      'save it with a newer one'
    )
  with zipfile.ZipFile(file) as archive:
    members = _members(archive, size)

    def content(name: str) -> bytes:
      if name not in members:
        raise ValueError(f'{name!r:.80} is missing')
      return archive.read(members[name])

    if 'constants.pkl' in members:
      raise ValueError('a TorchScript program')
    if 'byteorder' in members and members['byteorder'].file_size > 16:
      raise ValueError('an unknown byte order')
    if 'byteorder' in members and content('byteorder') != b'little':
      raise ValueError('the byte order is not little')
    if 'data.pkl' in members:
      if members['data.pkl'].file_size > _LARGEST_PICKLE:
        raise ValueError(f'data.pkl has more than {_LARGEST_PICKLE} bytes')
    storages = _Storages(content)
    return pickles.read(
      content('data.pkl'),
      {'torch._utils._rebuild_tensor_v2': _tensor}
      | {'collections.OrderedDict': _ordered_dict},
      frozenset(f'torch.{name}' for name in _DTYPES),
      storages.get,
    )


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
  """The members by name, less the folder that all of torch.save's are in."""
  infos = archive.infolist()
  if len(infos) > _MOST_MEMBERS:
    raise ValueError(f'{len(infos)} members, more than {_MOST_MEMBERS}')
  for info in infos:
    stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    if not stored or info.compress_size != info.file_size:
      raise ValueError(f'{info.filename!r:.80} is compressed or encrypted')
  # More than the file has only where members overlap, as in a zip bomb.
  if sum(info.file_size for info in infos) > size:
    raise ValueError('its members are larger than the file')
  names = [info.filename.partition('/')[2] for info in infos]
  if len(set(names)) < len(names):
    raise ValueError('two members have the same name')
  return dict(zip(names, infos, strict=True))


class _Storages:
  """The storages of a file, each read once.

  Args:
    content: (name of a member) -> its bytes.
  """

  def __init__(self, content: Callable[[str], bytes]):
    self._content = content
    self._bytes: dict[str, bytes] = {}
    self._arrays: dict[tuple[str, str], np.ndarray] = {}

  def get(self, reference: Any) -> np.ndarray:
    """The elements [N] of ('storage', type, key, device, N)."""
    if type(reference) is not tuple or len(reference) != 5:
      raise ValueError('a damaged reference to a storage')
    tag, kind, key, _, count = reference
    if tag != 'storage' or type(kind) is not pickles.Name:
      raise ValueError('a damaged reference to a storage')
    name = kind.path.removeprefix('torch.')
    if name not in _DTYPES or type(key) is not str or type(count) is not int:
      raise ValueError('a damaged reference to a storage')
    if (key, name) not in self._arrays:
      if key not in self._bytes:
        self._bytes[key] = self._content(f'data/{key}')
      self._arrays[key, name] = _elements(self._bytes[key], _DTYPES[name])
    array = self._arrays[key, name]
    if len(array) != count:
      raise ValueError(f'storage {key!r:.40} has {len(array)}, wanted {count}')
    return array


def _elements(content: bytes, dtype: np.dtype) -> np.ndarray:
  if dtype.kind == 'b':  # any other byte than 0 and 1 is neither true nor false
    return np.frombuffer(content, np.uint8) != 0
  return np.frombuffer(content, dtype)


def _ordered_dict(*arguments: Any) -> dict:
  if arguments:
    raise ValueError('an OrderedDict of an unknown form')
  return {}


def _tensor(
  storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> np.ndarray:
  """A view of a storage; ValueError if it leads out of it.

  Nor may it have more elements than the storage: a stride of 0 would make a
  few bytes an array of any size.
  """
  if type(storage) is not np.ndarray or type(size) is not tuple:
    raise ValueError('a damaged tensor')
  if type(stride) is not tuple or not len(size) == len(stride) <= (
    _MOST_DIMENSIONS
  ):
    raise ValueError('a damaged tensor')
  if not all(
    type(x) is int and 0 <= x <= LARGEST for x in (offset, *size, *stride)
  ):
    raise ValueError('a damaged tensor')
  count = math.prod(size)
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if count == 0:
    return np.zeros(size, storage.dtype)
  if count > len(storage) or last >= len(storage):
    raise ValueError(
      f'a tensor of shape {list(size)} leads out of its storage of '
      f'{len(storage)}'
    )
  return np.lib.stride_tricks.as_strided(
    storage[offset:],
    size,
    [s * storage.itemsize for s in stride],
    writeable=False,
  )


def _state_dict(content: Any) -> dict[str, np.ndarray]:
  if type(content) is not dict:
    raise ValueError('no dict')
  if _is_state_dict(content):
    return content
  found = [key for key, value in content.items() if _is_state_dict(value)]
  usual = [key for key in _USUAL if key in found]
  if not usual and len(found) != 1:
    raise ValueError(
      'no dict of tensors' if not found else 'several dicts of tensors'
    )
  return content[(usual or found)[0]]


def _is_state_dict(value: Any) -> bool:
  return (
    type(value) is dict
    and len(value) > 0
    and all(type(k) is str and type(x) is np.ndarray for k, x in value.items())
  )


def _named(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  prefix = 'module.'
  if all(name.startswith(prefix) for name in tensors):
    tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
  return tensors
