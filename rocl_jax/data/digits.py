"""scikit-learn's handwritten digits: real images with no download.

`read('')` returns 1,437 training and 360 test images of 8x8 pixels. It is a
quick check of a whole run, and no substitute for CIFAR-10.
"""

import numpy as np

from rocl_jax.data.records import RawDataset, Split

TEST_SIZE = 360
SPLIT_SEED = 20200613


def check(directory: str) -> None:
  """Nothing can be wrong: the digits come with scikit-learn."""
  del directory


def read(directory: str) -> RawDataset:
  """Returns the digits as RGB images; `directory` is not used."""
  del directory
  from sklearn.datasets import load_digits  # slow to import

  pixels, labels = load_digits(return_X_y=True)  # 0..16, one row an image
  grey = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
  images = np.repeat(grey, 3, axis=3)
  labels = labels.astype(np.int32)
  # RandomState: its streams are frozen, those of Generator may change.
  order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
  test, train = np.sort(order[:TEST_SIZE]), np.sort(order[TEST_SIZE:])
  return RawDataset(
    'digits',
    Split(images[train], labels[train]),
    Split(images[test], labels[test]),
    tuple('0123456789'),
  )
