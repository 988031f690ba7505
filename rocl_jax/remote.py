"""A folder of cloud storage, by fsspec: gs:// with gcsfs, s3:// with s3fs.

  bucket = Remote('gs://bucket/run', '--workdir')
  bucket.write('config.json', b'{}')
  bucket.files()                        # {'config.json': 2}

Names are paths below the folder. On object stores a file is there whole or not
at all; nothing is remembered of what was there before.
"""

import contextlib
import os
import posixpath
from typing import Any

from rocl_jax import manifest
from rocl_jax.errors import UserError, one_line

_INSTALL = {
  **dict.fromkeys(('gs', 'gcs'), "'rocl-jax[gcs]'"),
  **dict.fromkeys(('s3', 's3a'), 's3fs'),
}
# Of fsspec, and gone with the process.
_FLEETING = ('memory', 'data')


class Remote:
  """The folder; what its methods raise is up to the protocol.

  Args:
    url: protocol://bucket/folder.
    field: where the user named it, for messages.

  Attributes:
    url: without a slash at its end.

  Raises:
    UserError: a protocol that nobody knows, or whose package is not there.
  """

  def __init__(self, url: str, field: str):
    import fsspec  # which takes a while, and only few need it

    protocol, _, rest = url.partition('://')
    if protocol in _FLEETING:
      wanted = 'wanted a folder of this machine, or gs://'
      raise UserError(f'{field}: found {url}, which keeps nothing; {wanted}')
    if not rest.strip('/'):
      raise UserError(f'{field}: found {url}, wanted a bucket after ://')
    self.url = url.rstrip('/')
    options: dict[str, Any] = {'use_listings_cache': False}
    if protocol in ('file', 'local'):
      options['auto_mkdir'] = True
    if protocol in ('gs', 'gcs'):
      options['consistency'] = 'md5'  # what came is compared with what went
    try:
      self._fs, self._root = fsspec.url_to_fs(url, **options)
    except ImportError as e:
      package = _INSTALL.get(protocol)
      hint = f'wants pip install {package}' if package else one_line(e)
      raise UserError(f'{field}: found {url}: {hint}') from None
    except ValueError as e:
      raise UserError(
        f'{field}: found {url}, wanted a folder of this machine, gs://, or '
        f'another protocol of fsspec: {one_line(e)}'
      ) from None
    except Exception as e:  # of credentials, say
      raise UserError(f'{field}: {url}: {told(e)}') from None

  def files(self) -> dict[str, int]:
    """Every file and its bytes; none where there is no folder."""
    self._fs.invalidate_cache()
    prefix = self._root.rstrip('/') + '/'
    try:
      found = self._fs.find(self._root, detail=True)
    except FileNotFoundError:
      return {}
    files = {}
    for path, info in found.items():
      name = path.removeprefix(prefix)
      if name == path or info['type'] != 'file' or name.endswith('/'):
        continue
      if not manifest.is_inside(name):
        raise OSError(f'{path!r} is no name of a file')
      files[name] = int(info.get('size') or 0)
    return files

  def read(self, name: str) -> bytes | None:
    """The file's content; None where there is none."""
    self._fs.invalidate_cache()
    try:
      return self._fs.cat_file(self._path(name))
    except FileNotFoundError:
      return None

  def write(self, name: str, content: bytes) -> None:
    """Puts a small file there, in place of an old one."""
    self._fs.pipe_file(self._path(name), content)

  def put(self, name: str, path: os.PathLike) -> None:
    """Puts a local file there, in place of an old one."""
    self._fs.put_file(os.fspath(path), self._path(name))

  def get(self, name: str, path: os.PathLike) -> None:
    """Copies a file to a local path, whose folder is there."""
    self._fs.get_file(self._path(name), os.fspath(path))

  def remove(self, name: str) -> None:
    """Deletes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
      self._fs.rm_file(self._path(name))

  def modified(self, name: str) -> float:
    """When it was written, in seconds of the storage's own clock."""
    self._fs.invalidate_cache()
    return self._fs.modified(self._path(name)).timestamp()

  def _path(self, name):
    return posixpath.join(self._root, name)


def told(error: Exception) -> str:
  """An error of cloud storage in one line; some have nothing but a kind."""
  kind, line = type(error).__name__, one_line(error)
  return line if line == kind else f'{kind}: {line}'
