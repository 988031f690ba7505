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
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from rocl_jax import pickles
from rocl_jax.errors import UserError
from rocl_jax.progress import say

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
_USUAL = {'state_dict', 'model', 'net', 'model_state_dict'}
_DEEPEST = 3  # of a state dict, in the dicts round it


def read(path: str | os.PathLike, part: str = '') -> dict[str, np.ndarray]:
  """Returns the state dict of a checkpoint.

  That is the file's dict itself if it holds nothing but tensors, or else the
  one in it; of several the one with a usual name. A prefix that all names of
  weights share goes, as DataParallel's 'module.'. What it chose is printed.

  Args:
    path: the file.
    part: which dict, by its key, or which names, by their prefix: 'ema_model',
      'ema.state_dict'. Needed only where the file leaves it open.

  Returns:
    {name: array}, read-only views of the storages, in the file's order.

  Raises:
    UserError: it can't be read, is damaged, holds several state dicts or none
      called `part`, or is anything else; one line.
  """
  try:
    with open(path, 'rb') as file:
      content = _content(file)
    if type(content) is not dict:
      raise ValueError('no dict')
    return _unwrapped(path, _chosen(path, content, part))
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
      'not a zip file, as PyTorch writes since 1.6; load an older checkpoint '
      'with a newer PyTorch and save it again'
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


def _chosen(
  path: str | os.PathLike, content: dict, part: str
) -> dict[str, np.ndarray]:
  found = dict(_state_dicts(content, (), set()))
  if not found:
    raise ValueError('no dict of tensors')
  names = some(key for key in found if key)
  if part:
    inside = {
      key: {k: x for k, x in tensors.items() if k.startswith(f'{part}.')}
      for key, tensors in found.items()
    }
    chosen = [part] if part in found else [k for k, x in inside.items() if x]
    if len(chosen) == 1:
      return found[part] if part in found else inside[chosen[0]]
    raise UserError(
      f'{path}: found {len(chosen) or "no"} parts {part!r:.60}; wanted a dict '
      f'of tensors ({names or "it holds one, without a name"}) or a prefix of '
      'names'
    )
  usual = [key for key in found if _USUAL.issuperset(key.split('.'))]
  chosen = usual or list(found)
  if len(chosen) > 1:
    raise UserError(
      f'{path}: several dicts of tensors: {some(chosen)}; wanted one of them, '
      'named by --state_dict'
    )
  if len(found) > 1:
    say(f'{path}: holds {names}; read: {chosen[0]}')
  return found[chosen[0]]


def _state_dicts(
  value: Any, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
  """The state dicts in nested dicts, each once, by 'outer.inner' keys."""
  if type(value) is not dict or id(value) in seen:
    return
  seen.add(id(value))
  if _is_state_dict(value):
    yield '.'.join(keys), value
  elif len(keys) < _DEEPEST:
    for key, inside in value.items():
      if type(key) is str:
        yield from _state_dicts(inside, (*keys, key), seen)


def _is_state_dict(value: dict) -> bool:
  return len(value) > 0 and all(
    type(k) is str and type(x) is np.ndarray for k, x in value.items()
  )


def some(names: Iterable[str]) -> str:
  """The first three names of a file, for a message."""
  known = list(names)
  shown = ', '.join(f'{name!r:.60}'.strip("'") for name in known[:3])
  return shown + (f' and {len(known) - 3} more' if len(known) > 3 else '')


def _unwrapped(
  path: str | os.PathLike, tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The tensors without the prefix that wrappers gave the names of all weights.

  A wrapper's own counters, such as `n_averaged`, stand beside them and go.
  """
  weights = {
    name for name, x in tensors.items() if x.ndim or x.dtype.kind not in 'biu'
  } or set(tensors)
  first, last = min(weights), max(weights)  # what they share, all share
  prefix, count = '', 0
  for ours, theirs in zip(
    first.split('.')[:-1], last.split('.')[:-1], strict=False
  ):
    # A layer alone is no wrapper: its weights have no dots in their names.
    below = any(name.count('.') > count + 1 for name in weights)
    if ours != theirs or not (below or ours == 'module'):
      break
    prefix, count = f'{prefix}{ours}.', count + 1
  if not prefix:
    return tensors
  rest = [name for name in tensors if not name.startswith(prefix)]
  also = f'; ignored {some(rest)}' if rest else ''
  say(f'{path}: dropped the prefix {prefix!r:.60} of all names{also}')
  return {
    name.removeprefix(prefix): x
    for name, x in tensors.items()
    if name.startswith(prefix)
  }
