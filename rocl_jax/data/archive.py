"""The archive of CIFAR-10's official binary version, read where it lies.

`read(path)` returns the training and test set of `cifar-10-binary.tar.gz`.
"""

import tarfile
import zlib
from pathlib import Path

from rocl_jax.data import binary
from rocl_jax.data.records import Split, one_line
from rocl_jax.errors import UserError

NAME = 'cifar-10-binary.tar.gz'


def read(path: Path) -> tuple[Split, Split]:
  """Returns the training and test set of the archive of the binary version.

  Nothing is unpacked to the disk.

  Raises:
    UserError: the archive is damaged, lacks a file, or holds a link, a device
      or a path that leads out of it.
  """
  contents: dict[str, bytes] = {}
  try:
    with tarfile.open(path, 'r:gz') as tar:
      for member in tar:
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
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
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
