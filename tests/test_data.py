"""Data sources: values, order, held-out images, and what bad input says."""

import contextlib
import functools
import hashlib
import http.server
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from rocl_jax import data, files
from rocl_jax.data import archive, binary, corruptions, tfds
from rocl_jax.data.records import CIFAR10_CLASSES
from rocl_jax.errors import UserError, nearest

FILES = binary.TRAIN_FILES + binary.TEST_FILES


def records(count, seed):
  """Official records with random content."""
  rng = np.random.default_rng(seed)
  rows = rng.integers(0, 256, (count, binary.RECORD_BYTES), np.uint8)
  rows[:, 0] %= 10
  return rows


@pytest.fixture
def batches(tmp_path):
  """A folder in the official layout, files of unequal length."""
  folder = tmp_path / 'batches'
  folder.mkdir()
  for i, name in enumerate(FILES):
    (folder / name).write_bytes(records(i + 2, i).tobytes())
  return folder


def pack(path, members):
  """Writes a tar.gz of (name or TarInfo, content) pairs."""
  with tarfile.open(path, 'w:gz') as tar:
    for member, content in members:
      info = tarfile.TarInfo(member) if isinstance(member, str) else member
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


def pack_batches(path, folder):
  inside = [
    (f'{binary.FOLDER}/{name}', (folder / name).read_bytes()) for name in FILES
  ]
  pack(path, [(f'{binary.FOLDER}/readme.html', b'<html>'), *inside])


def says(message, call, *args):
  """Asserts that the call raises a one-line UserError matching `message`."""
  with pytest.raises(UserError, match=message) as caught:
    call(*args)
  assert '\n' not in str(caught.value)
  assert re.match(r'config.data\.\w+: ', str(caught.value))


def same(a, b):
  for name in ('train', 'validation', 'test'):
    for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
      np.testing.assert_array_equal(x, y)
      assert x.dtype == y.dtype
  assert a.name == b.name and a.class_names == b.class_names


# ------------------------------------------------------- common to all sources


def test_nearest():
  assert nearest('digit', ['tfds', 'digits']) == " (did you mean 'digits'?)"
  assert nearest('imagenet', ['tfds', 'digits']) == ''


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('digit', '', 0), r"config.data.source: 'digit' is unknown.*'digits'"),
    (('digits', '', -1), r'config.data.validation: -1; wanted 0 or more'),
    (('binary', '', 0), r"config.data.dir: '' is empty; wanted"),
    (('folder', '/no/such', 0), r'/no/such does not exist; wanted'),
    (('binary', __file__, 0), r'is not a folder; wanted'),
    (('tfds', __file__, 0), r'is not a folder; wanted'),
    (('tfds', 'gs://bucket/data', 0), r'is not a folder; wanted'),
  ],
)
def test_check(arguments, message):
  says(message, data.check, *arguments)
  says(message, data.load, *arguments)


def test_validation_is_a_fixed_growing_prefix():
  whole = data.load('digits', '', 0)
  small = data.load('digits', '', 100)
  large = data.load('digits', '', 101)
  assert len(whole.validation.labels) == len(whole.validation.images) == 0
  assert (len(whole.train.labels), len(whole.test.labels)) == (1437, 360)
  # Literal: the held-out images may never change between versions.
  order = np.random.RandomState(19620827).permutation(1437)
  assert order[:5].tolist() == [310, 433, 662, 1253, 513]
  for dataset, count in ((small, 100), (large, 101)):
    np.testing.assert_array_equal(
      dataset.validation.images, whole.train.images[order[:count]]
    )
    np.testing.assert_array_equal(
      dataset.train.images, np.delete(whole.train.images, order[:count], 0)
    )
    np.testing.assert_array_equal(
      dataset.train.labels, np.delete(whole.train.labels, order[:count])
    )
  says('1437 of 1437 training images', data.load, 'digits', '', 1437)
  assert len(data.load('digits', '', 1436).train.labels) == 1


def test_digits():
  from sklearn.datasets import load_digits

  digits = data.load('digits', 'ignored', 0)
  images = np.concatenate([digits.train.images, digits.test.images])
  labels = np.concatenate([digits.train.labels, digits.test.labels])
  assert images.dtype == np.uint8 and labels.dtype == np.int32
  assert images.shape == (1797, 8, 8, 3) and images.max() == 255
  assert (images == images[..., :1]).all()
  # Every digit once: grey levels back to 0..16, as a multiset of rows.
  grey = np.round(images[..., 0].reshape(-1, 64) * (16 / 255)).astype(int)
  official = load_digits()
  mine = np.column_stack([grey, labels])
  theirs = np.column_stack([official.data.astype(int), official.target])
  assert sorted(mine.tolist()) == sorted(theirs.tolist())


# ----------------------------------------------------------------------- binary


def test_binary(batches):
  dataset = data.load('binary', str(batches), 0)
  rows = np.concatenate([records(i + 2, i) for i in range(5)])
  assert dataset.train.images.shape == (20, 32, 32, 3)
  assert dataset.class_names == CIFAR10_CLASSES and dataset.name == 'cifar10'
  np.testing.assert_array_equal(dataset.train.labels, rows[:, 0])
  np.testing.assert_array_equal(dataset.test.labels, records(7, 5)[:, 0])
  n, row, column, channel = 13, 5, 17, 2
  assert (
    dataset.train.images[n, row, column, channel]
    == rows[n, 1 + 1024 * channel + 32 * row + column]
  )
  batches.rename(batches.parent / binary.FOLDER)
  same(dataset, data.load('binary', str(batches.parent), 0))


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, r'data_batch_3.bin not found'),
    (b'', r'data_batch_3.bin has 0 bytes; wanted a positive multiple of 3073'),
    (bytes(3072), r'data_batch_3.bin has 3072 bytes'),
    (
      bytes(3073) + b'\x0a' + bytes(3072),
      r'data_batch_3.bin has label 10 in record 1 \(from 0\); wanted 0..9',
    ),
  ],
)
def test_bad_binary(batches, content, message):
  path = batches / 'data_batch_3.bin'
  path.unlink() if content is None else path.write_bytes(content)
  says(message, data.load, 'binary', str(batches), 0)
  if content is None or len(content) % 3073 or not content:
    says(message, data.check, 'binary', str(batches), 0)


# ----------------------------------------------------------------------- folder


def picture(path, value, size=(4, 4), mode='RGB'):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value).save(path)


@pytest.fixture
def pictures(tmp_path):
  """Classes b (2 training images) and a (3), in grey, palette and RGB."""
  root = tmp_path / 'pictures'
  picture(root / 'train/b/0.png', 10, mode='L')
  picture(root / 'train/b/1.PNG', (20, 21, 22))
  picture(root / 'train/a/x.png', (30, 31, 32))
  picture(root / 'train/a/y.jpeg', (40, 40, 40))
  picture(root / 'train/a/z.png', (50, 51, 52))
  (root / 'test/a').mkdir(parents=True)
  palette = Image.new('RGB', (4, 4), (60, 61, 62)).quantize()
  palette.save(root / 'test/a/0.png')
  picture(root / 'test/b/0.jpg', (70, 70, 70))
  (root / 'train/b/.hidden').write_text('')
  return root


def test_folder(pictures):
  dataset = data.load('folder', str(pictures), 0)
  assert dataset.name == 'pictures' and dataset.class_names == ('a', 'b')
  # Classes take turns until the larger one is alone.
  assert dataset.train.labels.tolist() == [0, 1, 0, 1, 0]
  assert dataset.test.labels.tolist() == [0, 1]
  assert dataset.train.images.shape == (5, 4, 4, 3)
  assert dataset.train.images[:, 1, 2].tolist() == [
    [30, 31, 32],
    [10, 10, 10],
    [40, 40, 40],
    [20, 21, 22],
    [50, 51, 52],
  ]
  assert dataset.test.images[:, 0, 3].tolist() == [[60, 61, 62], [70, 70, 70]]


def test_folder_of_cifar10_keeps_its_labels(tmp_path):
  for label, name in enumerate(CIFAR10_CLASSES):
    for split in ('train', 'test'):
      picture(tmp_path / split / name / '0.png', (label, 0, 0))
  dataset = data.load('folder', str(tmp_path), 0)
  assert dataset.name == 'cifar10'
  assert dataset.test.images[:, 0, 0, 0].tolist() == list(range(10))
  assert dataset.test.labels.tolist() == list(range(10))


def _cut(root):
  noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(noise).save(out, 'PNG')
  (root / 'train/a/y.jpeg').write_bytes(out.getvalue()[:60])


@pytest.mark.parametrize(
  ('break_it', 'message', 'cheap'),
  [
    (lambda r: (r / 'test').rename(r / 'val'), r'test cannot be read', True),
    (
      lambda r: picture(r / 'train/c/0.png', 0, mode='L'),
      r'has train/c but no test/c; wanted the same classes',
      True,
    ),
    (
      lambda r: (r / 'train/c').symlink_to(r / 'train/a'),
      r'train/c is not a folder.*no links',
      True,
    ),
    (
      lambda r: (r / 'train/a/w.png').symlink_to(r / 'train/a/x.png'),
      r'train/a/w.png is not a regular',
      False,
    ),
    (
      lambda r: (r / 'train/a/w.gif').write_bytes(b'GIF89a'),
      r'train/a/w.gif is not a regular .jpg, .jpeg or .png',
      False,
    ),
    (
      lambda r: [p.unlink() for p in (r / 'test/b').iterdir()],
      r'test/b is empty',
      False,
    ),
    (
      lambda r: picture(r / 'train/b/1.PNG', 0, size=(5, 4)),
      r'b/1.PNG is 5x4 pixels but .*a/x.png is 4x4; wanted one size',
      False,
    ),
    (
      lambda r: picture(r / 'train/b/1.PNG', 0, mode='I;16'),
      r'b/1.PNG has mode I;16',
      False,
    ),
    (
      lambda r: picture(r / 'train/a/y.jpeg', 0, mode='CMYK'),
      r'a/y.jpeg has mode CMYK',
      False,
    ),
    (
      lambda r: (r / 'train/a/y.jpeg').write_bytes(b'<html>'),
      r'a/y.jpeg cannot be decoded',
      False,
    ),
    (_cut, r'a/y.jpeg cannot be decoded', False),
  ],
)
def test_bad_folder(pictures, break_it, message, cheap):
  break_it(pictures)
  says(message, data.load, 'folder', str(pictures), 0)
  if cheap:
    says(message, data.check, 'folder', str(pictures), 0)


def _chunk(kind, content):
  checksum = zlib.crc32(kind + content)
  return (
    struct.pack('>I', len(content))
    + kind
    + content
    + struct.pack('>I', checksum)
  )


def png_bytes(bits, color, row, *chunks):
  """A PNG of four pixels in one row, written by hand: (bits, colour type)."""
  header = struct.pack('>IIBBBBB', 4, 1, bits, color, 0, 0, 0)
  inside = [(b'IHDR', header), *chunks]
  inside += [(b'IDAT', zlib.compress(b'\0' + bytes(row))), (b'IEND', b'')]
  return b'\x89PNG\r\n\x1a\n' + b''.join(_chunk(*part) for part in inside)


PLTE = (b'PLTE', bytes([0, 0, 0, 10, 20, 30, 40, 50, 60, 70, 80, 90]))
GREY_ALPHA = [0, 0, 0, 255, 100, 51, 255, 255]
RGBA = [0, 0, 0, 0, 9, 8, 7, 255, 0, 100, 200, 51, 0, 0, 0, 0]


PNGS = [
  (png_bytes(8, 4, GREY_ALPHA), [255, 0, 224, 255]),
  (
    png_bytes(8, 6, RGBA),
    [[255] * 3, [9, 8, 7], [204, 224, 244], [255] * 3],
  ),
  (  # a palette, opaque; with one transparent colour; with half of one
    png_bytes(8, 3, [0, 1, 2, 3], PLTE),
    [[0] * 3, [10, 20, 30], [40, 50, 60], [70, 80, 90]],
  ),
  (
    png_bytes(8, 3, [0, 1, 2, 3], PLTE, (b'tRNS', b'\0')),
    [[255] * 3, [10, 20, 30], [40, 50, 60], [70, 80, 90]],
  ),
  (
    png_bytes(2, 3, [0b00011011], PLTE, (b'tRNS', b'\xff\x33')),
    [[0] * 3, [206, 208, 210], [40, 50, 60], [70, 80, 90]],
  ),
  # Grey and RGB of which one colour is transparent.
  (png_bytes(8, 0, [0, 7, 8, 7], (b'tRNS', b'\0\7')), [0, 255, 8, 255]),
  (
    png_bytes(8, 2, [1, 2, 3] * 3 + [1, 2, 4], (b'tRNS', b'\0\1\0\2\0\3')),
    [[255] * 3] * 3 + [[1, 2, 4]],
  ),
  # One, two and four bits; a transparent one of them.
  (png_bytes(1, 0, [0b10100000]), [255, 0, 255, 0]),
  (png_bytes(1, 0, [0b10100000], (b'tRNS', b'\0\0')), [255] * 4),
  (png_bytes(2, 0, [0b00011011]), [0, 85, 170, 255]),
  (png_bytes(4, 0, [0x0F, 0x71]), [0, 255, 119, 17]),
  (png_bytes(2, 0, [0b00011011], (b'tRNS', b'\0\1')), 'has mode a transp'),
  # 16 bits: colours keep the upper eight, grey is refused.
  (
    png_bytes(16, 2, [1, 255, 2, 0, 3, 0] * 4),
    [[1, 2, 3]] * 4,
  ),
  (png_bytes(16, 0, [1, 255] * 4), 'has mode I;16'),
  (
    png_bytes(16, 2, [1, 255, 2, 0, 3, 0] * 4, (b'tRNS', bytes(6))),
    'has mode a transparent',
  ),
]


@pytest.mark.parametrize('number', range(len(PNGS)))
def test_each_kind_of_png_is_right_or_refused(tmp_path, number):
  content, pixels = PNGS[number]
  for split in ('train', 'test'):
    path = tmp_path / split / 'a/0.png'
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
  if isinstance(pixels, str):
    says(f'a/0.png {pixels}', data.load, 'folder', str(tmp_path), 0)
    return
  found = data.load('folder', str(tmp_path), 0).train.images
  wanted = np.array(pixels).reshape(1, 1, 4, -1) + np.zeros((1, 1, 1, 3))
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_exif_turns_pictures(tmp_path, suffix):
  """Each orientation, as its definition says, of a picture of four corners."""
  corners = np.array([[0, 80, 80], [160, 240, 240]], np.uint8)
  upright = np.kron(corners, np.ones((8, 8), np.uint8))  # 16 x 24
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.T,
    6: np.rot90(upright),
    7: upright[::-1, ::-1].T,
    8: np.rot90(upright, -1),
    9: upright,  # there is no such orientation
  }
  for number, pixels in stored.items():
    path = tmp_path / f'train/a/{number}.{suffix}'
    picture(path, 0, mode='L')
    exif = Image.Exif()
    exif[0x0112] = number
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.save(path, exif=exif, **({'quality': 95} if suffix == 'jpg' else {}))
  path = tmp_path / f'train/a/damaged.{suffix}'
  Image.fromarray(upright).save(path, exif=b'Exif\0\0junk that is no TIFF')
  picture(tmp_path / 'test/a/0.png', 0, (24, 16), mode='L')
  found = data.load('folder', str(tmp_path), 0).train.images
  assert found.shape == (10, 16, 24, 3)
  for image in found:
    assert abs(image - upright[..., None].astype(int)).max() <= 4


def test_the_first_picture_of_an_animation(tmp_path):
  frames = [Image.new('RGB', (4, 4), (shade,) * 3) for shade in (10, 200)]
  for split in ('train', 'test'):
    path = tmp_path / split / 'a/0.png'
    path.parent.mkdir(parents=True)
    frames[0].save(path, save_all=True, append_images=frames[1:])
  assert (data.load('folder', str(tmp_path), 0).train.images == 10).all()
  for kind in ('GIF', 'WEBP'):
    path = tmp_path / 'train/a/0.png'
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    says('a/0.png cannot be decoded', data.load, 'folder', str(tmp_path), 0)


@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
def test_a_truncated_picture_is_named_or_whole(pictures, kind):
  noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(noise).save(out, kind)
  content, path = out.getvalue(), pictures / 'train/a/x.png'
  path.write_bytes(content)
  whole = data.load('folder', str(pictures), 0).train.images
  told = 0
  for size in range(0, len(content), 7):
    path.write_bytes(content[:size])
    try:
      found = data.load('folder', str(pictures), 0).train.images
    except UserError as e:
      assert str(path) in str(e) and '\n' not in str(e)
      told += 1
    else:
      np.testing.assert_array_equal(found, whole)
  assert told > 0.8 * len(content) / 7


def test_what_file_managers_leave_is_passed_over(pictures, monkeypatch):
  clean = data.load('folder', str(pictures), 0)
  for folder in ('train', 'train/a', 'test/b'):
    for name in ('Thumbs.db', 'desktop.ini', '.DS_Store'):
      (pictures / folder / name).write_bytes(b'x')
  same(data.load('folder', str(pictures), 0), clean)
  monkeypatch.setattr(
    Path, 'read_bytes', lambda path: (_ for _ in ()).throw(OSError(5, 'I/O'))
  )
  says(r'a/x.png cannot be read \(I/O\)', data.load, 'folder', str(pictures), 0)


def test_class_folders_of_any_name(tmp_path):
  """Names are what the file system gives, and survive JSON."""
  names = [b'a b', b"it's", b'new\nline', b'\xff\xfe', 'é'.encode(), b'{x}']
  for name in names:
    for split in (b'train', b'test'):
      folder = os.path.join(os.fsencode(tmp_path), split, name)
      try:
        os.makedirs(folder)
      except OSError:
        pytest.skip('this file system wants UTF-8')
      picture(Path(os.fsdecode(folder)) / '0.png', 1, mode='L')
  found = data.load('folder', str(tmp_path), 0).class_names
  assert found == tuple(sorted(map(os.fsdecode, names)))
  path = epath.Path(tmp_path) / 'names.json'
  files.write_json(path, found)
  assert tuple(files.read_json(path, list)) == found
  (tmp_path / 'test' / os.fsdecode(b'\xff\xfe') / '0.png').unlink()
  says('is empty; wanted at', data.load, 'folder', str(tmp_path), 0)


# ------------------------------------------------------------------ corruptions


def corrupted(seed, count=15):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.fixture
def cifar10_c(tmp_path):
  """Three images at five severities, under four corruptions."""
  folder = tmp_path / 'corrupted'
  folder.mkdir()
  np.save(folder / 'labels.npy', np.tile([7, 0, 9], 5))
  for seed, name in enumerate(('zigzag', 'saturate', 'fog', 'shot_noise')):
    np.save(folder / f'{name}.npy', corrupted(seed))
  (folder / '._fog.npy').write_bytes(b'what macOS leaves beside files')
  (folder / 'README.txt').write_text('CIFAR-C Dataset README')
  return folder


def test_corruptions(cifar10_c):
  splits = data.load_corruptions(str(cifar10_c))
  assert list(splits) == [
    *('shot_noise-1', 'shot_noise-2', 'shot_noise-3', 'shot_noise-4'),
    *('shot_noise-5', 'fog-1', 'fog-2', 'fog-3', 'fog-4', 'fog-5'),
    *('saturate-1', 'saturate-2', 'saturate-3', 'saturate-4', 'saturate-5'),
    *('zigzag-1', 'zigzag-2', 'zigzag-3', 'zigzag-4', 'zigzag-5'),
  ]
  for split in splits.values():
    assert split.labels.tolist() == [7, 0, 9]
    assert split.labels.dtype == np.int32 and split.images.dtype == np.uint8
  np.testing.assert_array_equal(splits['fog-1'].images, corrupted(2)[:3])
  np.testing.assert_array_equal(splits['fog-4'].images, corrupted(2)[9:12])
  np.testing.assert_array_equal(splits['zigzag-5'].images, corrupted(0)[12:])
  # As the archive unpacks, and with labels of another kind.
  cifar10_c.rename(cifar10_c.parent / corruptions.FOLDER)
  labels = np.tile(np.array([7, 0, 9], np.uint8), 5)
  np.save(cifar10_c.parent / corruptions.FOLDER / 'labels.npy', labels)
  again = data.load_corruptions(str(cifar10_c.parent))
  assert list(again) == list(splits)
  for name, split in splits.items():
    for x, y in zip(again[name], split, strict=True):
      np.testing.assert_array_equal(x, y)
      assert x.dtype == y.dtype


def test_corruptions_have_their_official_names():
  assert len(set(corruptions.BENCHMARK)) == 15
  assert len(set(corruptions.BENCHMARK + corruptions.EXTRA)) == 19
  assert corruptions.BENCHMARK[::7] == (
    *('gaussian_noise', 'snow', 'jpeg_compression'),
  )


def test_corruptions_stay_on_the_disk(cifar10_c):
  splits = data.load_corruptions(str(cifar10_c))
  one, other = splits['fog-1'].images, splits['fog-2'].images
  assert type(one) is np.ndarray and not one.flags.writeable
  while isinstance(one.base, np.ndarray):
    one = one.base
  while isinstance(other.base, np.ndarray):
    other = other.base
  assert type(one) is np.memmap and one is other


def _save(name, array):
  return lambda folder: np.save(folder / f'{name}.npy', array)


def _labels(**changed):
  """Official-looking labels, but for `changed`: at3=10 sets that at 3."""
  labels = np.tile([7, 0, 9], 5)
  for place, label in changed.items():
    labels[int(place.removeprefix('at'))] = label
  return _save('labels', labels)


def _shorten(name, size):
  def shorten(folder):
    path = folder / f'{name}.npy'
    path.write_bytes(path.read_bytes()[:size])

  return shorten


def _header(text):
  def write(folder):
    header = text.ljust(117).encode() + b'\n'
    start = b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little')
    (folder / 'fog.npy').write_bytes(start + header + bytes(100))

  return write


def _archive(folder):
  with (folder / 'fog.npy').open('wb') as file:
    np.savez(file, fog=corrupted(2))


def _objects(folder):
  # Unpickled, it would run a command.
  class Trap:
    def __reduce__(self):
      return (Path.touch, (folder / 'trapped',))

  np.save(folder / 'fog.npy', np.array([Trap()] * 15), allow_pickle=True)


@pytest.mark.parametrize(
  ('break_it', 'message'),
  [
    (
      lambda f: f.rename(f.parent / 'elsewhere'),
      r'corrupted does not exist; wanted the folder with labels.npy',
    ),
    (
      lambda f: (f / 'labels.npy').unlink(),
      r'labels.npy not found; wanted the folder with labels.npy',
    ),
    (
      lambda f: [p.unlink() for p in f.glob('*[!s].npy')],
      r'corrupted has no corruption beside labels.npy; wanted the folder',
    ),
    (
      _save('labels', np.tile([7.0, 0.0, 9.0], 5)),
      r'labels.npy is float64 \[15\]; wanted integers, one an image',
    ),
    (
      _save('labels', np.zeros((15, 1), int)),
      r'labels.npy is int64 \[15, 1\]; wanted integers, one an image',
    ),
    (
      _save('labels', np.tile([7, 0, 9], 4)),
      r'labels.npy is int64 \[12\]; wanted .* a positive multiple of 5',
    ),
    (
      _labels(at4=10),
      r'labels.npy has label 10 at 4 \(from 0\); wanted 0..9',
    ),
    (_labels(at2=-1), r'labels.npy has label -1 at 2 \(from 0\); wanted 0..9'),
    (
      _labels(at10=3),
      r'labels.npy has label 3 at 10 and 0 at 1 \(from 0\); '
      r'wanted the same 3 labels 5 times',
    ),
    (
      _save('fog', corrupted(2).astype(np.float32)),
      r'fog.npy is float32 \[15, 32, 32, 3\]; wanted uint8 \[15, 32, 32, 3\]',
    ),
    (
      _save('fog', corrupted(2).transpose(0, 3, 1, 2)),
      r'fog.npy is uint8 \[15, 3, 32, 32\]; wanted uint8 \[15, 32, 32, 3\]',
    ),
    (
      _save('zigzag', corrupted(2, 20)),
      r'zigzag.npy is uint8 \[20, 32, 32, 3\]; wanted uint8 '
      r'\[15, 32, 32, 3\], as many as labels.npy has',
    ),
    (
      _shorten('fog', -1),
      r'fog.npy cannot be read \(mmap length is greater than file size\); '
      r'wanted a whole .npy file of numbers',
    ),
    (_shorten('fog', 9), r'fog.npy cannot be read \(EOF: reading array header'),
    (_shorten('fog', 0), r'fog.npy cannot be read \(not a NumPy array\)'),
    (_shorten('labels', 100), r'labels.npy cannot be read \(EOF: reading'),
    (
      lambda f: (f / 'fog.npy').write_bytes(b'<html>Please log in</html>'),
      r'fog.npy cannot be read \(not a NumPy array\); wanted a whole .npy',
    ),
    (
      lambda f: (f / 'fog.npy').unlink() or (f / 'fog.npy').mkdir(),
      r'fog.npy cannot be read \(.*Is a directory',
    ),
    (
      _header("{'descr': '|u1', 'fortran_order': False, 'shape': (-15, 3)}"),
      r'fog.npy cannot be read',
    ),
    (_header('{'), r'fog.npy cannot be read'),
    (_archive, r'fog.npy cannot be read \(not a NumPy array\)'),
    (
      _objects,
      r"fog.npy cannot be read \(Array can't be memory-mapped: Python objects",
    ),
  ],
)
def test_bad_corruptions(cifar10_c, break_it, message):
  break_it(cifar10_c)
  says(message, data.load_corruptions, str(cifar10_c))
  says(message, corruptions.check, str(cifar10_c))
  assert not (cifar10_c / 'trapped').exists()


# ------------------------------------------------------------- tfds and archive


def info(path):
  from tensorflow_datasets.core.download.checksums import compute_url_info

  return compute_url_info(path)


@pytest.fixture
def accept(monkeypatch):
  """accept(path, url): makes `path` the official archive, found at `url`."""

  def accept_(path, url=None):
    cls = tfds.builder_class()
    official = cls.__mro__[1]._cifar_info.fget(
      type('Name', (), {'name': 'cifar10'})()
    )
    fake = official if url is None else official._replace(url=url)
    monkeypatch.setattr(cls, '_cifar_info', fake, raising=False)
    monkeypatch.setattr(cls, 'url_infos', {fake.url: info(path)})

  return accept_


@contextlib.contextmanager
def serve(folder):
  """Serves a folder over HTTP; yields the address of the archive in it."""

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  handler = functools.partial(Quiet, directory=str(folder))
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/{archive.NAME}'
    server.shutdown()


def files_in(folder):
  return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


def test_tfds_equals_binary(batches, tmp_path, accept):
  root = tmp_path / 'tfds'
  (root / 'downloads/manual').mkdir(parents=True)
  path = root / 'downloads/manual' / archive.NAME
  pack_batches(path, batches)
  accept(path)
  expected = data.load('binary', str(batches), 3)
  same(data.load('tfds', str(root), 3), expected)
  path.unlink()  # from now on the prepared files serve
  same(data.load('tfds', str(root), 3), expected)
  assert not [name for name in files_in(root) if 'incomplete' in name]
  assert (root / 'cifar10/3.0.2/dataset_info.json').is_file()
  # TFDS itself reads them, in its own order.
  import tensorflow_datasets

  source = tensorflow_datasets.data_source(
    'cifar10', data_dir=str(root), split='test'
  )
  assert len(source) == 7
  for example in source:
    i = int(example['id'].decode().removeprefix('test_'))
    np.testing.assert_array_equal(example['image'], expected.test.images[i])


def test_tfds_never_imports_tensorflow(batches, tmp_path):
  path = tmp_path / archive.NAME
  pack_batches(path, batches)
  # An installed TensorFlow that must not be touched.
  trap = tmp_path / 'site/tensorflow/__init__.py'
  trap.parent.mkdir(parents=True)
  trap.write_text('raise AssertionError("tensorflow was imported")')
  repository = Path(data.__file__).parents[2]
  code = """if True:
    import sys
    from rocl_jax import data
    from rocl_jax.data import tfds
    from tensorflow_datasets.core.download import checksums
    cls, (root, path) = tfds.builder_class(), sys.argv[1:]
    url = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
    cls.url_infos = {url: checksums.compute_url_info(path)}
    data.check('tfds', root, 0)
    assert data.load('tfds', root, 0).train.images.shape == (20, 32, 32, 3)
    assert 'tensorflow' not in sys.modules
  """
  done = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path), str(path)],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': f'{repository}:{trap.parents[1]}'},
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == done.stderr == ''  # nothing but our own words


def test_tfds_refuses_another_archive(batches, tmp_path):
  path = tmp_path / archive.NAME
  pack_batches(path, batches)
  before = files_in(tmp_path)
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  says(
    rf'{archive.NAME} has SHA-256 {digest}; wanted '
    'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
    *(data.load, 'tfds', str(tmp_path), 0),
  )
  assert files_in(tmp_path) == before


def test_tfds_downloads(batches, tmp_path, accept):
  site, root = tmp_path / 'site', tmp_path / 'tfds'
  site.mkdir()
  pack_batches(site / archive.NAME, batches)
  with serve(site) as url:
    accept(site / archive.NAME, url)
    good = (site / archive.NAME).read_bytes()
    (site / archive.NAME).write_bytes(b'<html>Please log in</html>')
    says(r'has SHA-256 \w+; wanted \w+', data.load, 'tfds', str(root), 0)
    assert files_in(root) == []
    (site / archive.NAME).write_bytes(good)
    expected = data.load('binary', str(batches), 0)
    same(data.load('tfds', str(root), 0), expected)
    (site / archive.NAME).unlink()
    says('HTTP status 404', data.load, 'tfds', str(tmp_path / 'new'), 0)


def test_tfds_offline_fails_fast(batches, tmp_path, accept, monkeypatch):
  path = batches / FILES[0]  # never read
  root = tmp_path / 'tfds'
  message = (
    rf'wanted {root / archive.NAME} or a network; config.data.source=binary\|'
  )
  with socket.socket() as bound:  # not listening: the connection is refused
    bound.bind(('127.0.0.1', 0))
    accept(path, f'http://127.0.0.1:{bound.getsockname()[1]}/a.tar.gz')
    says(message, data.load, 'tfds', str(root), 0)
    bound.listen()  # now it connects, and nothing answers
    monkeypatch.setattr(tfds, '_PROBE_SECONDS', 0.4)
    start = time.monotonic()
    says(message, data.load, 'tfds', str(root), 0)
    assert time.monotonic() - start < 5
  assert not root.exists()


def test_tfds_explains_what_it_cannot_read(batches, tmp_path, accept):
  path = tmp_path / archive.NAME
  pack_batches(path, batches)
  accept(path)
  data.load('tfds', str(tmp_path), 0)
  folder = tmp_path / 'cifar10/3.0.2'
  (records_file,) = folder.glob('*train.array_record*')
  content = bytearray(records_file.read_bytes())
  content[5000] ^= 1  # inside a record
  records_file.write_bytes(content)
  says(
    'train files in .* cannot be read .*remove that folder',
    *(data.load, 'tfds', str(tmp_path), 0),
  )
  # What the ordinary TFDS prepares.
  about = folder / 'dataset_info.json'
  about.write_text(about.read_text().replace('array_record', 'tfrecord'))
  message = 'is in the tfrecord format.*wanted array_record: remove that folder'
  says(message, data.check, 'tfds', str(tmp_path), 0)


def _link(kind, name, target):
  member = tarfile.TarInfo(name)
  member.type, member.linkname = kind, target
  return member


@pytest.mark.parametrize(
  ('extra', 'message'),
  [
    (('../evil.bin', b'x'), r"'../evil.bin', a link, a device or a path out"),
    (('/etc/evil.bin', b'x'), r"'/etc/evil.bin', a link"),
    (
      (_link(tarfile.SYMTYPE, f'{binary.FOLDER}/link', '/etc/passwd'), b''),
      r'link.*wanted plain files only',
    ),
    (
      (_link(tarfile.LNKTYPE, f'{binary.FOLDER}/link', '/etc/passwd'), b''),
      r'link.*wanted plain files only',
    ),
    ((f'{binary.FOLDER}/{FILES[2]}', b'x'), rf'{FILES[2]} has 1 bytes'),
  ],
)
def test_archive_refuses(batches, tmp_path, extra, message):
  path = tmp_path / archive.NAME
  inside = [
    (f'{binary.FOLDER}/{name}', (batches / name).read_bytes()) for name in FILES
  ]
  pack(path, [*inside, extra])
  says(message, archive.read, path)


def test_archive_damaged(batches, tmp_path):
  path = tmp_path / archive.NAME
  pack(path, [(f'{binary.FOLDER}/{FILES[0]}', bytes(3073))])
  says(rf'holds no {binary.FOLDER}/{FILES[1]}', archive.read, path)
  pack_batches(path, batches)
  content = path.read_bytes()
  for bad in (content[: len(content) // 2], b'<html>', b''):
    path.write_bytes(bad)
    says(r'cannot be read', archive.read, path)


@pytest.mark.cifar
@pytest.mark.skipif(
  'ROCL_CIFAR_DIR' not in os.environ, reason='needs ROCL_CIFAR_DIR'
)
def test_real_cifar10(tmp_path, accept):
  folder = Path(os.environ['ROCL_CIFAR_DIR'])
  dataset = data.load('binary', str(folder), 100)
  assert dataset.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
  whole = data.load('binary', str(folder), 0)
  assert whole.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
  assert whole.train.images[0, 0, 0].tolist() == [59, 62, 63]
  path = tmp_path / archive.NAME
  pack_batches(path, folder)
  accept(path)
  same(data.load('tfds', str(tmp_path), 100), dataset)
