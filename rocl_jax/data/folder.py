"""Images in folders: `train/<class>/*.png` and `test/<class>/*.png`.

`read(directory)` decodes JPEG and PNG files to RGB. Labels follow the sorted
class names, so folders with the names of CIFAR-10 get CIFAR-10's labels.
Classes take turns: the first file of every class, then the second, and so on,
so that a prefix of a split holds every class about equally often.

What is transparent is laid on white; EXIF's orientation is applied; of an
animated PNG the first picture counts. Grey of 16 bits and CMYK are refused.
Hidden files and those of file managers (`Thumbs.db`, `desktop.ini`) are passed
over. Class names are the folders' as Python's `os.fsdecode` gives them.
"""

import io
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from rocl_jax.data.records import (
  CIFAR10_CLASSES,
  RawDataset,
  Split,
  folder_path,
)
from rocl_jax.errors import UserError, one_line

_SUFFIXES = ('.jpg', '.jpeg', '.png')
_WANTED = 'a folder with train/<class>/*.jpg|jpeg|png and test/<class>/...'
_EIGHT_BIT_MODES = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA')
# Pillow scales these to 8 bits, but not the one colour that is transparent.
_SCALED = ('L;2', 'L;4', 'RGB;16B')
_NOT_IMAGES = ('thumbs.db', 'desktop.ini')  # what file managers leave
_ORIENTATION = 0x0112  # the EXIF field
# How to turn a picture of that orientation upright.
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_LARGEST = 1 << 24  # pixels: a few bytes of PNG can ask for any number
_CHUNK = 256  # files a task: fewer would spend the time on scheduling


def check(directory: str) -> None:
  """Raises UserError unless train and test hold the same class folders."""
  _classes(folder_path(directory, _WANTED))


def read(directory: str) -> RawDataset:
  """Returns the images of both folders.

  Raises:
    UserError: folders or files are missing, of another kind, undecodable or
      not all of one size; the message names the first one.
  """
  root = folder_path(directory, _WANTED)
  classes = _classes(root)
  train, test = (_list(root / name, classes) for name in ('train', 'test'))
  images = _decode([path for path, _ in train + test])
  labels = np.array([label for _, label in train + test], np.int32)
  count = len(train)
  return RawDataset(
    'cifar10' if classes == CIFAR10_CLASSES else root.resolve().name,
    Split(images[:count], labels[:count]),
    Split(images[count:], labels[count:]),
    classes,
  )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
  """Returns the visible entries of a folder, sorted by name."""
  try:
    with os.scandir(folder) as found:
      entries = [
        entry
        for entry in found
        if not entry.name.startswith('.')
        and entry.name.lower() not in _NOT_IMAGES
      ]
  except OSError as error:
    raise UserError(
      f'config.data.dir: {folder} cannot be read ({error.strerror}); '
      f'wanted {_WANTED}'
    ) from error
  return sorted(entries, key=lambda entry: entry.name)


def _classes(root: Path) -> tuple[str, ...]:
  found = []
  for split in ('train', 'test'):
    names = []
    for entry in _entries(root / split):
      # A link could lead out of the folder, or round in a circle.
      if not entry.is_dir(follow_symlinks=False):
        raise UserError(
          f'config.data.dir: {entry.path} is not a folder; wanted one folder '
          'a class, and no links'
        )
      names.append(entry.name)
    if not names:
      raise UserError(f'config.data.dir: {root / split} is empty; {_WANTED}')
    found.append(tuple(names))
  train, test = found
  if train != test:
    name = min(set(train) ^ set(test))
    has, lacks = ('train', 'test') if name in train else ('test', 'train')
    raise UserError(
      f'config.data.dir: {root} has {has}/{name} but no {lacks}/{name}; '
      'wanted the same classes in both'
    )
  return train


def _list(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
  """Returns (path, label) pairs, the classes taking turns."""
  ranked = []
  for label, name in enumerate(classes):
    entries = _entries(folder / name)
    if not entries:
      raise UserError(
        f'config.data.dir: {folder / name} is empty; wanted at least one image'
      )
    for rank, entry in enumerate(entries):
      regular = entry.is_file(follow_symlinks=False)
      if not regular or not entry.name.lower().endswith(_SUFFIXES):
        raise UserError(
          f'config.data.dir: {entry.path} is not a regular .jpg, .jpeg or .png '
          'file; wanted only those'
        )
      ranked.append((rank, label, entry.path))
  return [(path, label) for _, label, path in sorted(ranked)]


def _decode(paths: Sequence[str]) -> np.ndarray:
  """Returns the images, uint8 [N, H, W, 3]."""
  images = np.empty((0, 0, 0, 3), np.uint8)
  done = 0
  chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
  # Threads hide the latency of the disk. Decoding small images in them too
  # is slower than in one: it mostly waits for the interpreter lock.
  with ThreadPoolExecutor(8) as pool:
    try:
      for chunk, contents in zip(
        chunks, pool.map(_read_files, chunks), strict=True
      ):
        for path, content in zip(chunk, contents, strict=True):
          if done == 0:
            image = _decode_image(path, content, None)
            images = np.empty((len(paths), *image.shape), np.uint8)
          else:
            image = _decode_image(path, content, (paths[0], images.shape[1:]))
          images[done] = image
          done += 1
    finally:
      pool.shutdown(cancel_futures=True)  # after an error, stop at once
  return images


def _read_files(paths: Sequence[str]) -> list[bytes]:
  contents = []
  for path in paths:
    try:
      contents.append(Path(path).read_bytes())
    except OSError as error:
      raise UserError(
        f'config.data.dir: {path} cannot be read ({error.strerror}); '
        'wanted a JPEG or PNG image'
      ) from error
  return contents


def _decode_image(
  path: str, content: bytes, like: tuple[str, tuple[int, ...]] | None
) -> np.ndarray:
  """Returns one image, uint8 [H, W, 3], of the size of the file `like`."""
  try:
    # Only these two decoders, whatever the content pretends to be.
    with Image.open(io.BytesIO(content), formats=('JPEG', 'PNG')) as image:
      # The header is enough for two checks: nothing is decoded in vain.
      height, width, mode = image.height, image.width, image.mode
      if height * width > _LARGEST:
        raise UserError(
          f'config.data.dir: {path} is {width}x{height} pixels; wanted at most '
          f'{_LARGEST}'
        )
      scaled = image.tile[0][3] in _SCALED and 'transparency' in image.info
      if mode not in _EIGHT_BIT_MODES or scaled:
        found = 'a transparent colour of other bits' if scaled else mode
        raise UserError(
          f'config.data.dir: {path} has mode {found}; wanted RGB or grey '
          'with 8 bits a channel'
        )
      image.load()  # EXIF may stand behind the pixels
      orientation = _orientation(image)
      if orientation > 4:
        height, width = width, height
      if like and (height, width) != like[1][:2]:
        raise UserError(
          f'config.data.dir: {path} is {width}x{height} pixels but '
          f'{like[0]} is {like[1][1]}x{like[1][0]}; wanted one size'
        )
      opaque = _on_white(image)
      if orientation > 1:
        opaque = opaque.transpose(_TURNS[orientation])
      return np.asarray(opaque)
  except UserError:
    raise
  # A damaged image raises whatever pillow's parsers raise.
  except Exception as e:
    told = re.sub(r' <_io[^>]*>', '', one_line(e))  # Pillow names our buffer
    raise UserError(
      f'config.data.dir: {path} cannot be decoded ({told}); wanted a JPEG or '
      'PNG image'
    ) from e


def _orientation(image: Image.Image) -> int:
  """EXIF's orientation, 1 to 8; 1, upright, if there is no such number."""
  try:
    found = image.getexif().get(_ORIENTATION)
  except Exception:  # of damaged EXIF, whatever Pillow's parsers raise
    return 1
  return found if type(found) is int and found in _TURNS else 1


def _on_white(image: Image.Image) -> Image.Image:
  """RGB, with white behind what is transparent."""
  if image.mode[-1] != 'A' and 'transparency' not in image.info:
    return image.convert('RGB')
  front = image.convert('RGBA')
  white = Image.new('RGBA', image.size, 'white')
  return Image.alpha_composite(white, front).convert('RGB')
