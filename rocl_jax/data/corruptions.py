"""CIFAR-10-C: the test images under common corruptions, at five severities.

  splits = read('CIFAR-10-C')
  splits['fog-5'].images  # uint8 [10000, 32, 32, 3], the severest

Hendrycks and Dietterich 2019; https://zenodo.org/records/2535967. A folder of
NumPy files: for each corruption `<corruption>.npy`, uint8 [5 * N, 32, 32, 3],
the N test images at severity 1, then the same at 2, up to 5; and `labels.npy`,
integers [5 * N], the N labels five times. N is 10,000, or any other number
that all files agree on. The files are in the given folder or in `CIFAR-10-C`
inside it, as the archive unpacks. The class names are `CIFAR10_CLASSES`.

The 19 official files are 2.9 GB: they are mapped, and only the images that are
used are read. Nothing may write to the files meanwhile.
"""

from pathlib import Path

import numpy as np

from rocl_jax.data.records import CIFAR10_CLASSES, Split, folder_path
from rocl_jax.errors import UserError, one_line

FOLDER = 'CIFAR-10-C'
LABELS = 'labels.npy'
SEVERITIES = 5
BENCHMARK = (
  *('gaussian_noise', 'shot_noise', 'impulse_noise'),
  *('defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur'),
  *('snow', 'frost', 'fog', 'brightness'),
  *('contrast', 'elastic_transform', 'pixelate', 'jpeg_compression'),
)
EXTRA = ('speckle_noise', 'gaussian_blur', 'spatter', 'saturate')
_MAGIC = np.lib.format.MAGIC_PREFIX
_WANTED = 'the folder with labels.npy, gaussian_noise.npy .. of CIFAR-10-C'


def check(directory: str) -> None:
  """Checks all but the images themselves: files, sizes, kinds, labels.

  Raises:
    UserError: the folder, its labels or all corruptions are missing, a file
      is cut short or holds something else, or labels are out of 0..9 or not
      the same at every severity.
  """
  _open(directory)


def read(directory: str) -> dict[str, Split]:
  """Returns the splits 'fog-1' .. 'fog-5' of each corruption that is there.

  The 15 of the benchmark come first, in its order, then the 4 extra ones, then
  unknown names by the alphabet. Images are read-only views of the files.

  Raises:
    UserError: as in `check`.
  """
  labels, files = _open(directory)
  n = len(labels)
  return {
    f'{name}-{i + 1}': Split(images[i * n : (i + 1) * n], labels)
    for name, images in files.items()
    for i in range(SEVERITIES)
  }


def _open(directory: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns the labels of one severity, and the images of each corruption."""
  folder = folder_path(directory, _WANTED)
  inner = folder / FOLDER
  folder = inner if inner.is_dir() else folder
  try:
    # Not glob: it passes over a folder that it may not read.
    found = {path.name for path in folder.iterdir()}
  except OSError as error:
    raise UserError(
      f'config.data.dir: {folder} cannot be read ({error.strerror}); '
      f'wanted {_WANTED}'
    ) from error
  if LABELS not in found:
    raise UserError(
      f'config.data.dir: {folder / LABELS} not found; wanted {_WANTED}'
    )
  names = {
    name.removesuffix('.npy')
    for name in found - {LABELS}
    if name.endswith('.npy') and not name.startswith('.')
  }
  if not names:
    raise UserError(
      f'config.data.dir: {folder} has no corruption beside {LABELS}; '
      f'wanted {_WANTED}'
    )
  known = [name for name in BENCHMARK + EXTRA if name in names]
  labels = _read_labels(folder / LABELS)
  count = SEVERITIES * len(labels)
  return labels, {
    name: _map_images(folder / f'{name}.npy', count)
    for name in (*known, *sorted(names.difference(known)))
  }


def _read_labels(path: Path) -> np.ndarray:
  """Returns the labels of one severity, int32 [N]."""
  values = _map(path)
  count = len(values) if values.ndim == 1 else 0
  if values.dtype.kind not in 'iu' or count == 0 or count % SEVERITIES:
    raise UserError(
      f'config.data.dir: {path} is {values.dtype} {list(values.shape)}; wanted '
      f'integers, one an image, their number a positive multiple of '
      f'{SEVERITIES}'
    )
  last = len(CIFAR10_CLASSES) - 1
  wrong = np.flatnonzero((values < 0) | (values > last))
  if len(wrong):
    raise UserError(
      f'config.data.dir: {path} has label {values[wrong[0]]} at {wrong[0]} '
      f'(from 0); wanted 0..{last}'
    )
  n = count // SEVERITIES
  labels = values[:n].astype(np.int32)
  wrong = np.flatnonzero(values != np.tile(labels, SEVERITIES))
  if len(wrong):
    raise UserError(
      f'config.data.dir: {path} has label {values[wrong[0]]} at {wrong[0]} and '
      f'{labels[wrong[0] % n]} at {wrong[0] % n} (from 0); wanted the same '
      f'{n} labels {SEVERITIES} times'
    )
  return labels


def _map_images(path: Path, count: int) -> np.ndarray:
  images = _map(path)
  wanted = (count, 32, 32, 3)
  if images.dtype != np.uint8 or images.shape != wanted:
    raise UserError(
      f'config.data.dir: {path} is {images.dtype} {list(images.shape)}; wanted '
      f'uint8 {list(wanted)}, as many as {LABELS} has'
    )
  return images


def _map(path: Path) -> np.ndarray:
  """Returns the array of a .npy file, whose content stays on the disk."""
  try:
    with path.open('rb') as file:
      if file.read(len(_MAGIC)) != _MAGIC:
        # np.load would take it for a pickle, and say how to trust it.
        raise ValueError('not a NumPy array')
    array = np.load(path, mmap_mode='r', allow_pickle=False)
  # A damaged header raises whatever NumPy's and Python's parsers raise.
  except Exception as error:
    raise UserError(
      f'config.data.dir: {path} cannot be read ({one_line(error)}); '
      'wanted a whole .npy file of numbers'
    ) from error
  return np.asarray(array)  # a plain array, still on the same mapping
