"""CIFAR-10 through TensorFlow Datasets, without TensorFlow.

`read(data_dir)` reads `cifar10` from a TFDS data directory, after preparing it
there on first use (about 130 MB, in the array_record format). The plain call
`tfds.data_source('cifar10', data_dir=data_dir)` reads the same files.

The archive comes from `<data_dir>/downloads/manual/cifar-10-binary.tar.gz` or
`<data_dir>/cifar-10-binary.tar.gz` where one of them exists, and else from the
network. TFDS checks its size and SHA-256.
"""

import contextlib
import functools
import io
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from rocl_jax.data import archive
from rocl_jax.data.records import CIFAR10_CLASSES, RawDataset, Split
from rocl_jax.errors import UserError, one_line

_OFFLINE = 'config.data.source=binary|folder|digits work offline'
_PROBE_SECONDS = 8  # for the name, the connection and the first answer


def check(directory: str) -> None:
  """Raises UserError if `directory` cannot serve as a TFDS data directory.

  Neither reads the data nor uses the network.
  """
  path = _data_dir(directory)
  if '://' in directory or (path.exists() and not path.is_dir()):
    raise UserError(
      f'config.data.dir: {directory} is not a folder; wanted the data_dir of '
      'TensorFlow Datasets on a local disk'
    )
  builder = _builder(path)
  file_format = builder.info.file_format.value
  if _prepared(builder) and file_format != 'array_record':
    raise UserError(
      f'config.data.dir: {builder.data_dir} is in the {file_format} format, '
      'which only TensorFlow reads; wanted array_record: remove that folder '
      'or set config.data.dir to another one, and it is prepared anew'
    )


def read(directory: str) -> RawDataset:
  """Returns CIFAR-10 in the order of the official files.

  Args:
    directory: TFDS's data_dir; '' stands for $TFDS_DATA_DIR, or
      ~/tensorflow_datasets where that is not set.

  Raises:
    UserError: the archive is neither here nor within reach, is not the
      official one, or the prepared files cannot be read.
  """
  prepare(directory)
  builder = _builder(_data_dir(directory))
  return RawDataset(
    'cifar10',
    _read_split(builder, 'train'),
    _read_split(builder, 'test'),
    CIFAR10_CLASSES,
  )


def prepare(directory: str) -> None:
  """Prepares CIFAR-10 unless that was done before; errors as in `read`."""
  check(directory)
  path = _data_dir(directory)
  builder = _builder(path)
  if not _prepared(builder):
    _prepare(builder, path)


def _data_dir(directory: str) -> Path:
  default = os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return Path(directory or default).expanduser()


def _builder(path: Path) -> Any:
  # Made again after preparation: a builder reads its metadata when created.
  return builder_class()(data_dir=str(path))


def _prepared(builder: Any) -> bool:
  # The file written last. TFDS's own is_prepared() warns where there is none.
  return Path(builder.data_dir, 'dataset_info.json').is_file()


@functools.cache
def builder_class() -> Any:
  """Returns TFDS's Cifar10 builder with only the parts changed that need TF.

  What it prepares is `cifar10` of the official version, example for example.
  """
  import tensorflow_datasets as tfds
  from PIL import Image
  from tensorflow_datasets.core import registered
  from tensorflow_datasets.image_classification.cifar import Cifar10

  with registered.skip_registration():

    class TfFreeCifar10(Cifar10):
      """The official builder, with tarfile and pillow in TensorFlow's place."""

      name = 'cifar10'
      url_infos = Cifar10.url_infos  # the official size and checksum

      def _split_generators(self, dl_manager):
        path = Path(dl_manager.download(self._cifar_info.url))
        train, test = archive.read(path)
        self.info.features['label'].names = list(CIFAR10_CLASSES)
        return {
          tfds.Split.TRAIN: self._generate_examples('train_', train),
          tfds.Split.TEST: self._generate_examples('test_', test),
        }

      def _generate_examples(self, split_prefix, split):
        for i, (image, label) in enumerate(zip(*split, strict=True)):
          yield (
            i,
            {
              'id': f'{split_prefix}{i:05d}',
              'image': Image.fromarray(image),
              'label': int(label),
            },
          )

  return TfFreeCifar10


def _prepare(builder: Any, path: Path) -> None:
  """Writes the data set below `path`, all of it or nothing."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import download_manager, util

  url = builder._cifar_info.url
  places = [path / 'downloads' / 'manual' / archive.NAME, path / archive.NAME]
  local = next((place for place in places if place.is_file()), None)
  if local is None:
    _probe(url, places[1])
  logging.info('Preparing CIFAR-10 in %s from %s', path, local or url)
  tfds.disable_progress_bar()
  try:
    path.mkdir(parents=True, exist_ok=True)
    # A download folder of our own: TFDS leaves a refused download in its.
    with (
      tempfile.TemporaryDirectory(dir=path, prefix='incomplete.') as downloads,
      _quiet(),
    ):
      builder.download_and_prepare(
        download_dir=downloads,
        download_config=tfds.download.DownloadConfig(
          manual_dir=local.parent if local else None
        ),
        file_format='array_record',
      )
  except download_manager.NonMatchingChecksumError as error:
    expected, got = re.findall(r"checksum='(\w+)'", str(error))
    what = str(local) if local else url
    raise UserError(
      f'config.data.dir: {what} has SHA-256 {got}; wanted {expected}: fetch '
      f'{url} again, or: {_OFFLINE}'
    ) from error
  # A full disk is an OSError or, from array_record, a RuntimeError.
  except (OSError, RuntimeError, util.DownloadError) as error:
    if _prepared(builder):
      return  # another process was faster
    raise UserError(
      f'config.data.dir: CIFAR-10 cannot be prepared in {path} '
      f'({one_line(error)}); wanted a writable folder with 500 MB free, and '
      f'{places[1]} or a network; {_OFFLINE}'
    ) from error
  finally:
    with contextlib.suppress(OSError):
      (path / builder.name).rmdir()  # only if empty: nothing was prepared


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps TFDS's announcements off the terminal; errors still show."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)


def _probe(url: str, place: Path) -> None:
  """Raises UserError within seconds if `url` does not answer.

  TFDS itself would try for minutes.
  """
  import requests  # what TFDS downloads with: the same proxies, the same trust

  failure = ['no answer']

  def ask() -> None:
    try:
      with requests.get(url, stream=True, timeout=_PROBE_SECONDS / 2) as answer:
        failure[0] = '' if answer.ok else f'HTTP status {answer.status_code}'
    except requests.RequestException as error:
      failure[0] = type(error).__name__

  # In a thread, as looking up a name has no timeout.
  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(_PROBE_SECONDS)
  if failure[0]:
    raise UserError(
      f'config.data.dir: no CIFAR-10 in {place.parent} and {url} is out of '
      f'reach ({failure[0]}); wanted {place} or a network; {_OFFLINE}'
    )


def _read_split(builder: Any, name: str) -> Split:
  """Returns a split in the order of the ids: TFDS stores it shuffled."""
  try:
    count = builder.info.splits[name].num_examples
    images = np.zeros((count, 32, 32, 3), np.uint8)
    labels = np.full(count, -1, np.int32)
    with _quiet():
      for example in builder.as_data_source(split=name):
        prefix, number = example['id'].decode().rsplit('_', 1)
        i = int(number)
        if prefix != name or not 0 <= i < count or labels[i] >= 0:
          raise ValueError(f'unexpected id {example["id"]!r}')
        images[i] = example['image']
        labels[i] = example['label']
    if count == 0 or labels.min() < 0:
      raise ValueError(f'{np.sum(labels >= 0)} of {count} examples')
  # Damaged files raise whatever the reader, protobuf or pillow raises.
  except Exception as error:
    raise UserError(
      f'config.data.dir: the {name} files in {builder.data_dir} cannot be read '
      f'({one_line(error)}); remove that folder, and it is prepared anew'
    ) from error
  return Split(images, labels)
