"""The archive of CIFAR-10's official binary version, read where it lies.

`read(path)` returns the training and test set of `cifar-10-binary.tar.gz`.
"""

import gzip
import tarfile
from pathlib import Path
from typing import Any, cast

from rocl_jax.data import binary
from rocl_jax.data.records import Split
from rocl_jax.errors import UserError, one_line

NAME = 'cifar-10-binary.tar.gz'
_LARGEST = 64 << 20  # bytes of a member; the official ones have half of it
_MOST = 1 << 30  # bytes of all; the official archive has 184 MB


class _Bounded:
  """What tarfile needs of a file, of one that may be a bomb.

  Args:
    file: unpacks what it reads.
  """

  def __init__(self, file: Any):
    self._file = file
    self.tell = file.tell

  def read(self, size: int) -> bytes:
    # tarfile reads a long name or a header at once, however large it is said
    # to be; negative is to the end.
    if not 0 <= size <= _LARGEST:
      raise ValueError(f'a part of {size} bytes')
    return self._file.read(size)

  def seek(self, position: int) -> int:
    if not 0 <= position <= _MOST:
      raise ValueError(f'more than {_MOST} bytes')
    return self._file.seek(position)


def read(path: Path) -> tuple[Split, Split]:
  """Returns the training and test set of the archive of the binary version.

  Nothing is unpacked to the disk.

  Raises:
    UserError: the archive is damaged, lacks a file, or holds a link, a device
      or a path that leads out of it.
  """
  contents: dict[str, bytes] = {}
  try:
    with (
      gzip.open(path) as unpacked,
      tarfile.open(fileobj=cast(Any, _Bounded(unpacked)), mode='r:') as tar,
    ):
      for member in tar:
        if not 0 <= member.size <= _LARGEST:
          raise UserError(
            f'config.data.dir: {path} holds {member.name!r} of {member.size} '
            f'bytes; wanted at most {_LARGEST}'
          )
        parts = Path(member.name).parts
        regular = member.isfile() or member.isdir()
        if not regular or '..' in parts or member.name.startswith('/'):
          raise UserError(
            f'config.data.dir: {path} holds {member.name!r}, a link, a '
            'device or a path out of the archive; wanted plain files only'
          )
        if parts[:-1] == (binary.FOLDER,) and member.isfile():
          name = parts[-1]
          if name in binary.TRAIN_FILES + binary.TEST_FILES:
            file = tar.extractfile(member)
            assert file is not None  # it is a regular file
            contents[name] = file.read()
  except UserError:
    raise
  # A damaged archive raises whatever tarfile, gzip and zlib raise.
  except Exception as error:
    raise UserError(
      f'config.data.dir: {path} cannot be read ({one_line(error)}); '
      f'wanted the official {NAME}'
    ) from error

  def split(names: tuple[str, ...]) -> Split:
    for name in names:
      if name not in contents:
        raise UserError(
          f'config.data.dir: {path} holds no {binary.FOLDER}/{name}; '
          f'wanted the official {NAME}'
        )
    return binary.join(
      [binary.parse(contents[name], f'{path}: {name}') for name in names]
    )

  return split(binary.TRAIN_FILES), split(binary.TEST_FILES)
