"""Bytes of others: read, or refused in one line, whatever they are.

Every reader of files that we did not write, or that may have been damaged
since, is in `READERS` and gets mutations of a small valid file. Half of them
are made inside of what protects it: a member of a zip file is changed and its
checksum made anew, a folder is sealed again. `pytest -m slow` tries thousands.
"""

import copy
import dataclasses
import functools
import gzip
import io
import json
import os
import pickle
import resource
import shlex
import signal
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from hypothesis import strategies as st
from PIL import Image

from rocl_jax import (
  checkpoint,
  command,
  convert,
  experiment,
  files,
  journal,
  manifest,
  masks,
  metrics,
  models,
  pickles,
  results,
  saved,
  torch_file,
)
from rocl_jax.attacks import ensemble
from rocl_jax.data import (
  archive,
  binary,
  corruptions,
  folder,
  load,
  python_version,
)
from rocl_jax.data.records import CIFAR10_CLASSES
from rocl_jax.errors import RunFailed, UserError
from rocl_jax.manifest import Damaged
from rocl_jax.report import reading
from rocl_jax.trees import flatten

ROOT = Path(__file__).parent.parent
REFUSALS = (UserError, RunFailed, Damaged)
SECONDS = 20  # for one file; they are of a few kilobytes
MEGABYTES = 400  # that all mutations of a reader may add to this process


# ------------------------------------------------------------ valid small files


def records(count, seed=0):
  rng = np.random.default_rng(seed)
  rows = rng.integers(0, 256, (count, binary.RECORD_BYTES), np.uint8)
  rows[:, 0] %= 10
  return rows


def write_batches(root):
  for i, name in enumerate(binary.TRAIN_FILES + binary.TEST_FILES):
    (root / name).write_bytes(records(i + 1, i).tobytes())


def tar_bytes(extra=()):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w', format=tarfile.PAX_FORMAT) as tar:
    for i, name in enumerate(binary.TRAIN_FILES + binary.TEST_FILES):
      content = records(1, i).tobytes()
      member = tarfile.TarInfo(f'{binary.FOLDER}/{name}')
      member.size = len(content)
      member.pax_headers = {'comment': 'a header of two blocks ' * 10}
      tar.addfile(member, io.BytesIO(content))
    for member in extra:
      tar.addfile(member)
  return out.getvalue()


def batch(count, seed=0, protocol=2):
  rows = records(count, seed)
  content = {
    b'batch_label': b'training batch 1 of 5',
    b'labels': rows[:, 0].tolist(),
    b'data': rows[:, 1:].copy(),
    b'filenames': [b'%d.png' % i for i in range(count)],
  }
  return pickle.dumps(content, protocol)


def meta(protocol=2):
  names = [name.encode() for name in CIFAR10_CLASSES]
  content = {b'label_names': names, b'num_vis': 3072}
  return pickle.dumps(content, protocol)


def write_python_version(root, protocol=2):
  names = python_version.TRAIN_FILES + python_version.TEST_FILES
  for i, name in enumerate(names):
    (root / name).write_bytes(batch(i + 1, i, protocol))
  (root / python_version.META).write_bytes(meta(protocol))


def image_bytes(kind):
  noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(noise).save(out, kind)
  return out.getvalue()


def npy_bytes(array):
  out = io.BytesIO()
  np.save(out, array)
  return out.getvalue()


class Global:
  """A name in a pickle that we write, of a module that need not be there."""

  def __init__(self, path):
    self.module, _, self.name = path.rpartition('.')


class TorchPickler(pickle._Pickler):
  """Writes what torch.save writes, without torch."""

  def persistent_id(self, value):
    return value.reference if isinstance(value, Storage) else None

  def save_named(self, value):
    self.write(f'c{value.module}\n{value.name}\n'.encode())

  def save_tensor(self, value):
    self.save_named(Global('torch._utils._rebuild_tensor_v2'))
    self.save(value.arguments)
    self.write(pickle.REDUCE)

  dispatch = pickle._Pickler.dispatch.copy()
  dispatch[Global] = save_named


class Storage:
  def __init__(self, kind, key, count):
    self.reference = ('storage', Global(f'torch.{kind}'), key, 'cpu', count)


class Tensor:
  def __init__(self, *arguments):
    self.arguments = arguments


TorchPickler.dispatch[Tensor] = TorchPickler.save_tensor
KINDS = {
  np.dtype(np.float32): 'FloatStorage',
  np.dtype(np.float64): 'DoubleStorage',
  np.dtype(np.int64): 'LongStorage',
  np.dtype(np.bool_): 'BoolStorage',
  np.dtype(ml_dtypes.bfloat16): 'BFloat16Storage',
}


def torch_pickle(content):
  out = io.BytesIO()
  TorchPickler(out, 2).dump(content)
  return out.getvalue()


def zip_bytes(members, compression=zipfile.ZIP_STORED):
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', compression) as file:
    for name, content in members.items():
      file.writestr(name, content)
  return out.getvalue()


def torch_members(content):
  """The members of a checkpoint; its arrays become tensors."""
  storages = {}

  def converted(value):
    if isinstance(value, dict):
      return {k: converted(x) for k, x in value.items()}
    if not isinstance(value, np.ndarray):
      return value
    key = str(len(storages))
    storages[f'archive/data/{key}'] = value.tobytes()
    strides = tuple(s // value.itemsize for s in value.strides)
    if not value.flags.c_contiguous:
      raise ValueError
    storage = Storage(KINDS[value.dtype], key, value.size)
    return Tensor(storage, 0, value.shape, strides, False, {})

  about = {'archive/data.pkl': torch_pickle(converted(content))}
  return about | {'archive/byteorder': b'little'} | storages


def torch_bytes(content):
  return zip_bytes(torch_members(content))


STATE = {
  'epoch': 3,
  'state_dict': {
    'module.conv1.weight': np.ones((2, 3, 1, 1), np.float32),
    'module.bn1.num_batches_tracked': np.array(7),
    'module.half': np.arange(3).astype(ml_dtypes.bfloat16),
  },
}


def fates():
  alive = np.array([True, True, False])
  return ensemble.begin(alive, np.arange(3), alive)


PROTOCOL = {'attack': 'pgd', 'eps': 0.1}
RECORD = {
  'run': 'ours',
  'stage': 'prune',
  'selection': 'last',
  'split': 'test',
  'n': 2,
  'attack': 'pgd',
  'eps': 0.1,
  'norm': 'linf',
  'robust_top1': 50.0,
  'members': [{'attack': 'square', 'robust_top1': 1.5}],
  'class_names': ['a', 'b'],
  'confusion': [[1, 0], [0, 1]],
}
AUDIT = {k: RECORD[k] for k in ('run', 'stage', 'selection', 'split', 'n')} | {
  'attack': 'pgd',
  'checks': [{'check': 'radius', 'passed': True}],
  'curves': {'eps': [{'eps': 0.1, 'robust_top1': 5.0}]},
}
EXAMPLE = {
  'label': 1,
  'clean_prediction': 1,
  'adversarial_prediction': 0,
  'clean': [[[0.0, 1.0, 0.5]]],
  'adversarial': [[[0.0, 1.0, 0.5]]],
}
HISTOGRAM = {'name': 'kept', 'edges': [0.0, 0.5, 1.0], 'counts': [2, 3]}
ROWS = ''.join(json.dumps({'epoch': i, 'loss': 0.5}) + '\n' for i in (1, 2))


def write_model(path):
  about = {name: name for name in checkpoint._ABOUT_FIELDS}
  kernel = {'kernel': np.ones((2, 3), np.float32)}
  variables = {'params': {'head': kernel}, 'batch_stats': {}}
  checkpoint.save_model(epath.Path(path), variables, about)


# ------------------------------------------------------------------- mutations

# Numbers and text that parsers of headers, pickles and JSON stumble over.
SPLICES = (
  *(b'\x00', b'\xff' * 4, b'\xff' * 8, b'\x00' * 512, b'\x7f\xff\xff\xff'),
  *(b'-1', b'99999999999999999999', b'1e999', b'NaN', b'null', b'{}', b'\n'),
  *(b'[' * 3000, b'"\\ud800"', b'true', b"'descr': '|O'", b'(' * 200),
  *(
    b'cos\nsystem\n',
    b'R',
    b'b',
    b'.',
    b'\x8c\x02os\x94',
    b'r\xff\xff\xff\xff',
  ),
)


@st.composite
def mutations(draw, content):
  """The content after one to four changes."""
  place = lambda: draw(st.integers(0, max(len(content), 1)))
  for _ in range(draw(st.integers(1, 4))):
    kind = draw(st.integers(0, 7))
    at, other = sorted((place(), place()))
    if kind == 0:
      content = content[:at]
    elif kind <= 2 and at < len(content):  # one byte; the most telling
      byte = draw(st.integers(0, 255))
      content = content[:at] + bytes([byte]) + content[at + 1 :]
    elif kind == 3:
      content = content[:at] + content[other:]
    elif kind == 4:
      content = content[:other] + content[at:]
    elif kind == 5:
      content = content[:at] + draw(st.sampled_from(SPLICES)) + content[at:]
    elif kind == 6:
      splice = draw(st.sampled_from(SPLICES))
      content = content[:at] + splice + content[at + len(splice) :]
    else:
      content = draw(st.binary(max_size=64))
  return content


VALUES = (
  *(None, True, 0, -1, 1.5, float('inf'), float('nan'), 10**400, '', 'a'),
  *('two\nlines', '\ud800', '../a', '/etc/passwd', [], {}, [[]], {'a': {}}),
  *([1, 'a', None], {'two\nlines': 1}, 'x' * 5000),
)


@st.composite
def json_mutations(draw, content):
  """Other bytes, or other values in their places: still JSON."""
  if draw(st.integers(0, 3)) == 0:
    return draw(mutations(content))
  lines = content.decode().splitlines()
  whole = len(lines) != 2  # of two lines, each is a document
  at = 0 if whole else draw(st.integers(0, 1))
  value = json.loads(content if whole else lines[at])
  for _ in range(draw(st.integers(1, 3))):
    value = draw(_changed(value))
  text = json.dumps(value)
  return '\n'.join([text] if whole else [*lines[:at], text]).encode()


@st.composite
def _changed(draw, value):
  """The value, with another one somewhere in it, or something left out."""
  if not isinstance(value, dict | list) or not value or draw(st.booleans()):
    return draw(st.sampled_from(VALUES))
  keys = list(value) if isinstance(value, dict) else range(len(value))
  key = draw(st.sampled_from(keys))
  value = value.copy()
  if draw(st.integers(0, 5)) == 0:
    del value[key]
  else:
    value[key] = draw(_changed(value[key]))
  return value


# --------------------------------------------------------------------- readers


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader of the bytes of others.

  Attributes:
    prepare: (folder) -> the valid content of the file that is mutated; it
      makes all that stands beside it.
    name: of that file in the folder, or a pattern of it.
    read: (folder) -> what the reader makes of it.
    wrap: (mutated content) -> bytes of the file round it.
    seal: (folder) -> None, what an attacker does after changing the file.
    share: of the mutations; a reader that takes long gets fewer.
    mutate: (content) -> a strategy of other contents.
  """

  prepare: Callable[[Path], bytes]
  name: str
  read: Callable[[Path], Any]
  wrap: Callable[[bytes], bytes] = lambda content: content
  seal: Callable[[Path], Any] = lambda root: None
  share: float = 1.0
  mutate: Callable[[bytes], Any] = mutations


def simple(content, name, read, **more):
  return Reader(lambda root: content, name, read, **more)


def _batches(root):
  write_batches(root)
  return (root / 'data_batch_2.bin').read_bytes()


def _python_version(name, protocol):
  def prepare(root):
    write_python_version(root, protocol)
    return (root / name).read_bytes()

  return Reader(prepare, name, lambda root: load('python', str(root), 0))


def _pictures(kind):
  suffix = kind.lower()

  def prepare(root):
    for split in ('train', 'test'):
      path = root / split / 'a' / f'1.{suffix}'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(image_bytes(kind))
    return image_bytes(kind)

  return Reader(
    prepare, f'train/a/1.{suffix}', lambda root: folder.read(str(root))
  )


def _corruptions(name):
  images = npy_bytes(np.zeros((5, 32, 32, 3), np.uint8))
  labels = npy_bytes(np.zeros(5, int))

  def prepare(root):
    (root / 'fog.npy').write_bytes(images)
    (root / 'labels.npy').write_bytes(labels)
    return {'fog.npy': images, 'labels.npy': labels}[name]

  return Reader(prepare, name, lambda root: corruptions.read(str(root)))


def _member(members, name, compression=zipfile.ZIP_STORED):
  """The content of one member, and how the whole is packed round another."""
  return members[name], lambda x: zip_bytes(members | {name: x}, compression)


def _torch(name=None):
  members = torch_members(STATE)
  content, wrap = zip_bytes(members), lambda x: x
  if name:
    content, wrap = _member(members, name)
  read = lambda root: torch_file.read(root / 'x.pt')
  return simple(content, 'x.pt', read, wrap=wrap)


def _journal(name=None):
  where = journal.Journal(epath.Path('results.json'), PROTOCOL)._path.name

  def read(root):
    found = journal.Journal(epath.Path(root) / 'results.json', PROTOCOL).read()
    assert found is None or isinstance(found, ensemble.Fates)

  out = io.BytesIO()
  np.savez_compressed(out, **fates()._asdict(), versions='[{}]')
  content, wrap = out.getvalue(), lambda x: x
  if name:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
      members = {n: file.read(n) for n in file.namelist()}
    content, wrap = _member(members, f'{name}.npy', zipfile.ZIP_DEFLATED)
  return simple(content, where, read, wrap=wrap)


def _model(name, sealed=False):
  """A file of a model folder; `sealed`: its checksums are made anew."""

  def prepare(root):
    write_model(root / 'model')
    return next((root / 'model').glob(name)).read_bytes()

  def seal(root):
    if sealed:
      manifest.seal(epath.Path(root) / 'model', {'leaves': {}})

  def read(root):
    return checkpoint.load_model(epath.Path(root) / 'model')

  share = 0.3 if sealed else 1.0  # Orbax takes its time
  mutate = json_mutations if name == 'model.json' else mutations
  return Reader(
    prepare, f'model/{name}', read, seal=seal, share=share, mutate=mutate
  )


def _json(content, name, read):
  text = content if isinstance(content, str) else json.dumps(content)
  reader = lambda root: read(root / name)
  return simple(text.encode(), name, reader, mutate=json_mutations)


def _epath(read, *arguments):
  return lambda path: read(epath.Path(path), *arguments)


def _manifest(signed=False):
  def prepare(root):
    (root / 'a').write_text('a')
    manifest.seal(epath.Path(root), {'step': 3})
    return (root / manifest.MANIFEST).read_bytes()

  def sign(content):
    try:
      value = json.loads(content)
      value.pop('sha256', None)
      return json.dumps(value | {'sha256': manifest._own(value)}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
      return content

  read = lambda root: manifest.verify(epath.Path(root))
  wrap = sign if signed else lambda content: content
  return Reader(
    prepare, manifest.MANIFEST, read, wrap=wrap, mutate=json_mutations
  )


def _archive(packed):
  tar = tar_bytes()
  read = lambda root: archive.read(root / archive.NAME)
  pack = functools.partial(gzip.compress, compresslevel=1, mtime=0)
  if packed:
    return simple(pack(tar), archive.NAME, read)
  return simple(tar, archive.NAME, read, wrap=pack)


READERS = {
  'binary': Reader(
    _batches, 'data_batch_2.bin', lambda root: binary.read(str(root))
  ),
  'archive': _archive(packed=True),
  'tar in the archive': _archive(packed=False),
  'python version': _python_version('data_batch_2', 2),
  'python version, protocol 4': _python_version('data_batch_2', 4),
  'python version, classes': _python_version(python_version.META, 2),
  'jpeg': _pictures('JPEG'),
  'png': _pictures('PNG'),
  'cifar-10-c images': _corruptions('fog.npy'),
  'cifar-10-c labels': _corruptions('labels.npy'),
  'torch': _torch(),
  'torch, pickle': _torch('archive/data.pkl'),
  'torch, storage': _torch('archive/data/0'),
  'journal': _journal(),
  'journal, member': _journal('waiting'),
  'journal, flags': _journal('robust'),
  'model, manifest': _model('manifest.json'),
  'model, about': _model('model.json'),
  'model, about, sealed': _model('model.json', sealed=True),
  'model, arrays': _model('variables/d/*'),
  'model, arrays, sealed': _model('variables/d/*', sealed=True),
  'model, index, sealed': _model('variables/manifest.ocdbt', sealed=True),
  'model, Orbax, sealed': _model('variables/_METADATA', sealed=True),
  'manifest': _manifest(),
  'manifest, signed anew': _manifest(signed=True),
  'results.json': _json(
    [results._stamped(RECORD)], 'results.json', _epath(results.read)
  ),
  'results.json, report': _json(
    [RECORD], 'results.json', lambda path: reading.Workdir(path.parent)
  ),
  'audit.json': _json([AUDIT], 'audit.json', _epath(files.read_json, list)),
  'audit.json, report': _json([AUDIT], 'audit.json', reading._read_audit),
  'examples.json, report': _json(
    {'images': [EXAMPLE]}, 'examples.json', reading._read_examples
  ),
  'histograms.json, report': _json(
    {'model': 'abc', 'panels': {'weight': [HISTOGRAM]}},
    'histograms.json',
    reading.read_histograms,
  ),
  'metrics.jsonl': _json(ROWS, 'metrics.jsonl', _epath(metrics.read_lines)),
  'metrics.jsonl, report': _json(ROWS, 'metrics.jsonl', reading._read_metrics),
}


# ------------------------------------------------------------------ the search


class Hang(BaseException):
  """No reader catches it."""


def _hang(*_):
  raise Hang


def place(root, reader):
  """The file to mutate; it need not be there yet."""
  return next(root.glob(reader.name), root / reader.name)


def files_in(root):
  return sorted(str(p) for p in root.rglob('*'))


def fuzz(reader, root, count):
  """Tries `count` mutations in a folder; fails on the first that gets out."""
  folder_ = root / 'inside'
  folder_.mkdir()
  content = reader.prepare(folder_)
  path = place(folder_, reader)
  path.write_bytes(reader.wrap(content))
  reader.read(folder_)  # the valid one
  before, tried = files_in(root), [0, 0]

  @hypothesis.settings(
    max_examples=max(10, round(count * reader.share)),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(reader.mutate(content))
  def attempt(mutated):
    path.write_bytes(reader.wrap(mutated))
    reader.seal(folder_)
    tried[0] += 1
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
      reader.read(folder_)
    except REFUSALS as error:
      tried[1] += 1
      message = str(error)
      assert message and '\n' not in message and len(message) < 1000, message
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)

  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  handler = signal.signal(signal.SIGALRM, _hang)
  try:
    attempt()
  finally:
    signal.signal(signal.SIGALRM, handler)
  assert files_in(root) == before
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
  assert grown < MEGABYTES << 10
  return tried


NAMES = list(READERS)


@pytest.mark.parametrize('name', NAMES)
def test_mutations(name, tmp_path, record_property):
  tried, refused = fuzz(READERS[name], tmp_path, 300)
  record_property('tried', tried)
  record_property('refused', refused)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_thousands_of_mutations(name, tmp_path):
  fuzz(READERS[name], tmp_path, 3000)


def refused(message, call, *arguments):
  with pytest.raises(REFUSALS, match=message) as caught:
    call(*arguments)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 1000


# ------------------------------------------------------------------- execution


class Trap:
  """Unpickled, it runs a command."""

  def __init__(self, canary):
    self.canary = canary

  def __reduce__(self):
    return (os.system, (f'touch {self.canary}',))


def _copy_reduce(function, *arguments):
  """A pickle that calls a function by its name."""

  class Call:
    def __reduce__(self):
      return (function, arguments)

  return Call()


@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
def test_pickles_do_not_execute(protocol, tmp_path):
  canary = tmp_path / 'canary'
  trap = pickle.dumps({b'data': Trap(canary), b'labels': []}, protocol)
  pickle.loads(trap)
  assert canary.exists()  # it would
  canary.unlink()
  root = tmp_path / 'batches'
  root.mkdir()
  write_python_version(root)
  (root / 'data_batch_1').write_bytes(trap)
  refused('data_batch_1 cannot be read', load, 'python', str(root), 0)
  path = tmp_path / 'x.pt'
  path.write_bytes(zip_bytes({'a/data.pkl': trap}))
  refused('can not be read', torch_file.read, path)
  path.write_bytes(trap)
  refused('not a zip file', torch_file.read, path)
  assert not canary.exists()


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (_copy_reduce(eval, '1'), "names '__builtin__.eval'"),
    (_copy_reduce(getattr, 1, 'real'), "names '__builtin__.getattr'"),
    (np.array([object], object), "type 'O8', not uint8"),
    (np.zeros((1, 3072), 'V1'), "type 'V1', not uint8"),
    (np.zeros((1, 3072), np.float32), "type 'f4', not uint8"),
    (np.zeros((1, 3071), np.uint8), r'3071 bytes of pixels in shape \(1, 3071'),
    (frozenset({1}), 'not allowed'),
    ([1], 'no array of pixels'),
  ],
)
def test_pickled_pixels(content, message, tmp_path):
  write_python_version(tmp_path)
  path = tmp_path / 'test_batch'
  path.write_bytes(pickle.dumps({b'data': content, b'labels': [1]}, 2))
  refused(message, load, 'python', str(tmp_path), 0)
  path.write_bytes(b'\x80\x02F' + b'x' * 5000 + b'\n.')  # it would be quoted
  refused('could not convert string', load, 'python', str(tmp_path), 0)


@pytest.mark.parametrize(
  ('labels', 'message'),
  [
    ([10], r'has label 10 in record 0'),
    ([-1], r'has label -1 in record 0'),
    ([True], r'has label of bool in record 0'),
    ([1, 2], r'no list of 1 labels'),
    ('1', r'no list of 1 labels'),
  ],
)
def test_pickled_labels(labels, message, tmp_path):
  write_python_version(tmp_path)
  content = {b'data': np.zeros((1, 3072), np.uint8), b'labels': labels}
  (tmp_path / 'test_batch').write_bytes(pickle.dumps(content, 2))
  refused(message, load, 'python', str(tmp_path), 0)


def test_pickle_bombs():
  """Files of a few bytes that ask for much memory or time."""
  text = b'X\x00\x10\x00\x00' + b'a' * 4096 + b'q\x00'
  encode = b'c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R'
  bombs = {
    'memo of 4 billion': b'\x80\x02}r\xff\xff\xff\xff.',
    'encoded again and again': b'\x80\x02]' + text + b'0' + encode * 1000,
    'a hash that never ends': b'\x80\x02}))' + b'\x86q\x01h\x01' * 60 + b'Ns.',
    'bytes that are not there': b'\x80\x04\x8e' + b'\xff' * 7 + b'\x7f.',
  }
  functions = {'_codecs.encode': python_version._Encoder(5000)}
  for name, bomb in bombs.items():
    if name == 'memo of 4 billion':
      assert pickles.read(bomb, {}) == {}
    else:
      with pytest.raises(ValueError):
        pickles.read(bomb, functions)
  with pytest.raises(ValueError, match='more than 2000000 instructions'):
    pickles.read(b'\x80\x02' + b'N' * 2_000_001 + b'.', {})


def python_2_batch(rows):
  """An official file, instruction by instruction: Python 2 wrote them."""
  text = lambda x: b'U' + bytes([len(x)]) + x
  reconstruct = b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n'
  dtype = b'cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN'
  pixels = rows[:, 1:].tobytes()
  return b''.join(
    [
      *(b'\x80\x02}q\x01(', text(b'batch_label'), b'q\x02'),
      *(text(b'training batch 1 of 5'), b'q\x03', text(b'labels'), b']('),
      *(b'K' + bytes([label]) for label in rows[:, 0]),
      *(b'e', text(b'data'), reconstruct, b'K\x00\x85U\x01b\x87R(K\x01K'),
      *(bytes([len(rows)]), b'M\x00\x0c\x86', dtype),
      b'J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89',
      *(b'T', len(pixels).to_bytes(4, 'little'), pixels, b'tb'),
      *(text(b'filenames'), b'](', text(b'leptodactylus_s_000004.png'), b'eu.'),
    ]
  )


def test_what_python_2_wrote(tmp_path):
  write_python_version(tmp_path)
  content = python_2_batch(records(6, 5))
  unpickled = pickle.loads(content, encoding='bytes')  # our own bytes
  np.testing.assert_array_equal(unpickled[b'data'], records(6, 5)[:, 1:])
  before = load('python', str(tmp_path), 0).test
  (tmp_path / 'test_batch').write_bytes(content)
  after = load('python', str(tmp_path), 0).test
  np.testing.assert_array_equal(before.images, after.images)
  np.testing.assert_array_equal(before.labels, after.labels)


@pytest.mark.parametrize('protocol', [2, 4])
def test_python_version_equals_binary(protocol, tmp_path):
  (tmp_path / 'b').mkdir()
  (tmp_path / python_version.FOLDER).mkdir()
  write_batches(tmp_path / 'b')
  write_python_version(tmp_path / python_version.FOLDER, protocol)
  a = load('binary', str(tmp_path / 'b'), 3)
  b = load('python', str(tmp_path), 3)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)
  by_column = np.asfortranarray(records(6, 5)[:, 1:])
  content = {b'data': by_column, b'labels': records(6, 5)[:, 0].tolist()}
  path = tmp_path / python_version.FOLDER / 'test_batch'
  path.write_bytes(pickle.dumps(content, protocol))
  c = load('python', str(tmp_path), 3)
  np.testing.assert_array_equal(c.test.images, a.test.images)
  path.unlink()
  refused('test_batch not found', load, 'python', str(tmp_path), 3)
  with path.open('wb') as file:
    file.truncate(python_version.LARGEST + 1)
  refused('has 67108865 bytes', load, 'python', str(tmp_path), 3)
  path.write_bytes(pickle.dumps(content, protocol))
  (path.parent / 'batches.meta').write_bytes(pickle.dumps({}, protocol))
  refused('names other classes', load, 'python', str(tmp_path), 3)


def test_archive_bombs(tmp_path):
  path = tmp_path / archive.NAME
  large = tarfile.TarInfo(f'{binary.FOLDER}/readme')
  large.size = archive._LARGEST + 1
  negative = tarfile.TarInfo(f'{binary.FOLDER}/readme')
  negative.size = -1024
  for member in (large, negative):
    path.write_bytes(gzip.compress(tar_bytes([member])))
    refused(f'of {member.size} bytes; wanted', archive.read, path)
  header = tarfile.TarInfo('long')  # a name of 8 GB, as zeros pack well
  header.type, header.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
  content = header.tobuf(tarfile.GNU_FORMAT) + tar_bytes()
  path.write_bytes(gzip.compress(content))
  refused('a part of 8589934592 bytes', archive.read, path)


def test_a_picture_that_asks_for_memory(tmp_path):
  READERS['png'].prepare(tmp_path)
  content = bytearray(image_bytes('PNG'))
  content[16:24] = (7000).to_bytes(4, 'big') * 2
  content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, 'big')
  (tmp_path / 'train/a/1.png').write_bytes(content)
  refused('7000x7000 pixels; wanted', folder.read, str(tmp_path))


def test_journals_of_objects_and_bombs(tmp_path, capfd):
  where = epath.Path(tmp_path) / 'results.json'
  book = journal.Journal(where, PROTOCOL)
  canary = tmp_path / 'canary'
  good = {k: np.asarray(v) for k, v in fates()._asdict().items()}
  good['versions'] = np.array('[{}]')
  trap = np.array([Trap(canary)] * 3, object)
  bad = [
    {'robust': trap},
    {'waiting': np.array([5])},
    {'done': np.array(9)},
    {'tries': np.zeros(2, int)},
    {'versions': np.array('[]')},
    {'versions': np.array('[1]')},
    {'versions': np.array('[1, {}]')},
    {'robust': np.zeros(journal._LARGEST, bool)},
  ]
  for change in bad:
    np.savez_compressed(book._path, allow_pickle=True, **(good | change))
    assert book.read() is None
    assert 'is damaged' in capfd.readouterr().err
  np.savez_compressed(book._path, **good)
  assert book.read() is not None
  assert not canary.exists()


# ------------------------------------------------------------ torch checkpoints


def test_torch_file(tmp_path):
  path = tmp_path / 'x.pt'
  path.write_bytes(torch_bytes(STATE))
  found = torch_file.read(path)
  assert list(found) == ['conv1.weight', 'bn1.num_batches_tracked', 'half']
  for name, x in STATE['state_dict'].items():
    ours = found[name.removeprefix('module.')]
    np.testing.assert_array_equal(ours, x)
    assert ours.dtype == x.dtype
  path.write_bytes(torch_bytes(STATE['state_dict']))
  assert torch_file.read(path).keys() == found.keys()


def _view(*arguments):
  """A checkpoint of one tensor on a storage of six float32."""
  storage = Storage('FloatStorage', '0', 6)
  pickled = torch_pickle({'x': Tensor(storage, *arguments, False, {})})
  return {
    'a/data.pkl': pickled,
    'a/data/0': np.arange(6, dtype=np.float32).tobytes(),
  }


def test_views_of_a_storage(tmp_path):
  path = tmp_path / 'x.pt'
  path.write_bytes(zip_bytes(_view(0, (3, 2), (1, 3))))
  x = torch_file.read(path)['x']
  np.testing.assert_array_equal(x, np.arange(6.0).reshape(2, 3).T)
  path.write_bytes(zip_bytes(_view(1, (2,), (4,))))
  np.testing.assert_array_equal(torch_file.read(path)['x'], [1, 5])
  with pytest.raises(ValueError):
    torch_file.read(path)['x'][0] = 0
  for arguments in (
    (0, (7,), (1,)),
    (1, (6,), (1,)),
    (0, (2,), (6,)),
    (0, (2,), (-1,)),
    (-1, (2,), (1,)),
    (0, (1 << 20, 1 << 20), (0, 0)),
    (0, (2, 2), (1,)),
    (0, (True,), (1,)),
    (0, (2.0,), (1,)),
    (0, (1,) * 9, (1,) * 9),
    (1 << 62, (1,), (1,)),
    (0, [2], [1]),
  ):
    path.write_bytes(zip_bytes(_view(*arguments)))
    refused('tensor', torch_file.read, path)


def _with(**changed):
  """The members of STATE's file, some changed or, where None, left out."""
  members = torch_members(STATE)
  members |= {f'archive/{k}': x for k, x in changed.items()}
  return {k: x for k, x in members.items() if x is not None}


@pytest.mark.parametrize(
  ('members', 'message'),
  [
    (_with(byteorder=b'big'), 'byte order'),
    (_with(**{'data/0': b'1234'}), "storage '0' has 1, wanted 6"),
    (_with(**{'data/0': None}), "'data/0' is missing"),
    (_with(**{'data.pkl': None}), "'data.pkl' is missing"),
    (_with(**{'constants.pkl': b''}), 'TorchScript'),
    (_with(**{'data.pkl': torch_pickle({'epoch': 3})}), 'no dict of tensors'),
    (_with(**{'data.pkl': torch_pickle([1])}), 'no dict'),
    (
      _with(**{'data.pkl': torch_pickle(Global('torch.nn.Module'))}),
      "names 'torch.nn.Module'",
    ),
  ],
)
def test_other_torch_files(members, message, tmp_path):
  path = tmp_path / 'x.pt'
  path.write_bytes(zip_bytes(members))
  refused(message, torch_file.read, path)


def test_compressed_and_overlapping_members(tmp_path):
  path = tmp_path / 'x.pt'
  path.write_bytes(zip_bytes(torch_members(STATE), zipfile.ZIP_DEFLATED))
  refused('compressed', torch_file.read, path)
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr('a/data.pkl', b'x' * 1000)
    for i in range(100):  # all of them the same bytes of the file
      info = zipfile.ZipInfo(f'a/data/{i}')
      info.file_size = info.compress_size = 1000
      file.filelist.append(info)
      file.NameToInfo[info.filename] = info
    file._didModify = True
    for info in file.filelist[1:]:
      info.header_offset, info.CRC = 0, file.filelist[0].CRC
  refused('larger than the file', torch_file.read, path)
  refused('No such file', torch_file.read, tmp_path / 'none.pt')


SMALL = models.Settings(name='resnet8', width=4, dtype='float32')


def published(scores=False, classes=10, settings=SMALL):
  """A state dict of the published code, of random tensors."""
  model = models.build(settings, classes)
  fresh = jax.eval_shape(
    lambda: model.init(jax.random.key(0), convert.IMAGE_SHAPE)
  )
  del fresh['params']['projector']
  rng, tensors = np.random.default_rng(0), {}
  for path, leaf in flatten(fresh).items():
    shape = leaf.shape
    if len(shape) > 1:
      shape = (shape[-1], shape[-2], *shape[:-2])
    name = convert.torch_name(path)
    x = rng.standard_normal(shape).astype(np.float32)
    tensors[name] = np.abs(x) if name.endswith('var') else x / 3
    if name.endswith('running_var'):
      counter = name.replace('running_var', 'num_batches_tracked')
      tensors[counter] = np.array(7)
    if scores and len(shape) > 1:
      x = rng.standard_normal(shape).astype(np.float32)
      tensors[name.replace('weight', 'popup_scores')] = x
  return tensors


@functools.cache
def config():
  path = str(ROOT / 'configs/cifar10.py')
  sys.path.insert(0, str(ROOT))
  c = command.load_config(path)
  c.model.name, c.model.width, c.prune.keep = SMALL.name, SMALL.width, 0.3
  return c


def converted(tmp_path, tensors, stage):
  path = tmp_path / 'x.pt'
  wrapped = {
    'epoch': 3,
    'model': {f'module.{k}': x for k, x in tensors.items()},
  }
  path.write_bytes(torch_bytes(wrapped))
  return convert.convert(config(), str(path), str(tmp_path / 'model'), stage)


def test_convert(tmp_path):
  tensors = published()
  path = converted(tmp_path, tensors, 'supervised')
  one = saved.load(str(path), '--model')
  assert one.name == 'x/supervised'
  variables = one.variables
  kernel = variables['params']['encoder']['stage2_block1_shortcut']['kernel']
  np.testing.assert_array_equal(
    kernel, tensors['layer2.0.shortcut.0.weight'].transpose(2, 3, 1, 0)
  )
  torch = pytest.importorskip('torch')
  images = np.random.default_rng(1).random((4, 32, 32, 3), np.float32)
  net = torch_network(torch, tensors)
  with torch.no_grad():
    wanted = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
  logits = models.build(SMALL, 10).predict(variables, images)
  np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def torch_network(torch, tensors):
  """The published ResNet, written again in a few lines of PyTorch."""
  f = torch.nn.functional
  t = {k: torch.from_numpy(np.array(x)) for k, x in tensors.items()}

  def unit(x, conv, norm, stride):
    weight = t[f'{conv}.weight']
    x = f.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    names = ('running_mean', 'running_var', 'weight', 'bias')
    return f.batch_norm(x, *(t[f'{norm}.{n}'] for n in names))

  def forward(x):
    x = torch.relu(unit(x, 'conv1', 'bn1', 1))
    for stage in (1, 2, 3):
      prefix, stride = f'layer{stage}.0', 1 if stage == 1 else 2
      y = torch.relu(unit(x, f'{prefix}.conv1', f'{prefix}.bn1', stride))
      y = unit(y, f'{prefix}.conv2', f'{prefix}.bn2', 1)
      if f'{prefix}.shortcut.0.weight' in t:
        x = unit(x, f'{prefix}.shortcut.0', f'{prefix}.shortcut.1', stride)
      x = torch.relu(x + y)
    return f.linear(x.mean((2, 3)), t['linear.weight'], t['linear.bias'])

  return forward


def test_torch_saves_what_we_read(tmp_path):
  torch = pytest.importorskip('torch')
  tensors = {
    'a': torch.arange(12.0).reshape(3, 4).T[1:],
    'half': torch.arange(4).to(torch.bfloat16),
    'float16': torch.ones(2).half(),
    'flags': torch.tensor([True, False]),
    'nothing': torch.zeros(0, 3),
    'number': torch.tensor(3),
  }
  path = tmp_path / 'x.pt'
  torch.save({'net': tensors, 'acc': 93.5, 'rng': torch.get_rng_state()}, path)
  found = torch_file.read(path)
  assert found.keys() == tensors.keys()
  for name, x in tensors.items():
    assert found[name].shape == tuple(x.shape)
    np.testing.assert_array_equal(
      found[name].astype(np.float64), x.double().numpy()
    )
  net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
  torch.save(torch.nn.DataParallel(net).state_dict(), path)
  assert torch_file.read(path).keys() == net.state_dict().keys()
  torch.save(net, path)
  refused('which is not allowed', torch_file.read, path)
  old = {'_use_new_zipfile_serialization': False}
  torch.save(net.state_dict(), path, **old)
  refused('not a zip file, as PyTorch writes since 1.6', torch_file.read, path)


def test_convert_masks(tmp_path):
  tensors = published(scores=True)
  path = converted(tmp_path, tensors, 'prune')
  variables, about = checkpoint.load_model(path)
  kernels = models.maskable(flatten(variables['params']))
  assert variables['masks'].keys() == kernels.keys()
  assert variables['dropped'].keys() == kernels.keys()
  for name, kernel in kernels.items():
    mask = variables['masks'][name]
    assert mask.sum() == masks.kept_count(mask.size, 0.3)
    whole = kernel + variables['dropped'][name]
    theirs = tensors[convert.torch_name(name)]
    order = (2, 3, 1, 0) if theirs.ndim == 4 else (1, 0)
    np.testing.assert_array_equal(whole, theirs.transpose(order))
    scores = tensors[convert.torch_name(name).replace('weight', 'popup_scores')]
    magnitudes = np.abs(scores.transpose(order))
    assert magnitudes[mask].min() > magnitudes[~mask].max()
  assert 0.65 < about['sparsity'] < 0.72
  refused('is there already', converted, tmp_path, tensors, 'prune')
  other = tmp_path / 'other'
  other.mkdir()
  dense, _ = checkpoint.load_model(converted(other, tensors, 'supervised'))
  assert 'masks' not in dense


def _change(name, x):
  return lambda tensors: tensors | {name: x}


def _without(tensors):
  return {k: x for k, x in tensors.items() if not k.startswith('linear')}


@pytest.mark.parametrize(
  ('change', 'stage', 'message'),
  [
    (_without, 'supervised', 'lacks linear.bias, linear.weight; wanted'),
    (_without, 'supervised', 'classifier is --stage=pretrain'),
    (_without, 'pretrain', None),
    (
      _change('layer4.0.conv1.weight', np.ones((1, 1), np.float32)),
      'supervised',
      'has, besides, layer4.0.conv1.weight; wanted the published supervised '
      '.*, a resnet8, and found stages of 1, 1, 1, 1 blocks',
    ),
    (
      _change('conv1.weight', np.ones((5000, 3, 3, 3), np.float32)),
      'supervised',
      '--checkpoint.width: found 5000, wanted 1 to 4096',
    ),
    (
      _change('linear.weight', np.ones((100, 16), np.float32)),
      'supervised',
      r'linear.bias is \[10\], wanted \[100\]',
    ),
    (
      _change('linear.bias', np.ones(10, np.int64)),
      'supervised',
      'linear.bias is int64, wanted floats',
    ),
    (
      _change('bn1.bias', np.full(4, np.nan, np.float32)),
      'supervised',
      'bn1.bias is not finite',
    ),
    (
      _change('bn1.running_var', np.full(4, -1, np.float32)),
      'supervised',
      'bn1.running_var is negative',
    ),
    (_without, 'pretrian', "--stage: found 'pretrian', wanted one of"),
  ],
)
def test_convert_refuses(change, stage, message, tmp_path):
  tensors = change(published())
  if message is None:
    path = converted(tmp_path, tensors, stage)
    variables, _ = checkpoint.load_model(path)
    assert variables['params'].keys() == {'encoder'}
    words = shlex.split(convert.next_command(path))  # trains from it
    assert {f'--config.init_from={path}', '--config.name=x'} < set(words)
    return
  refused(message, converted, tmp_path, tensors, stage)
  assert not (tmp_path / 'model').exists()


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(torch_bytes(content))
  return str(path)


@pytest.mark.parametrize(
  ('name', 'width', 'classes'),
  [('resnet8', 3, 10), ('resnet20', 2, 7), ('resnet18', 1, 12)],
)
def test_convert_infers_the_network(name, width, classes, tmp_path, capsys):
  """Of whatever config: that of a resnet8 of width 4 here."""
  settings = models.Settings(name=name, width=width, dtype='float32')
  tensors = published(classes=classes, settings=settings)
  path = write(tmp_path / 'x.pt', {'state_dict': tensors})
  out = str(tmp_path / 'model')
  one = saved.load(str(convert.convert(config(), path, out, 'finetune')), '')
  assert one.network == (settings, classes)
  told = capsys.readouterr().err
  assert f'a {name} of width {width}; config.model had a resnet8' in told
  # Names that are sorted as their numbers are, as those of folders are.
  numbers = [f'{i:02}' if classes == 12 else str(i) for i in range(classes)]
  wanted = list(CIFAR10_CLASSES) if classes == 10 else numbers
  assert one.class_names == wanted == sorted(wanted)
  command_line = convert.next_command(one.folder)
  assert ('source=folder' in command_line) == (classes != 10)
  assert ('names no classes; they are called 0' in told) == (classes != 10)


def test_convert_takes_classes_of_the_images(tmp_path):
  tensors = published(classes=2)
  for split in ('train', 'test'):
    for number in range(2):
      path = tmp_path / 'images' / split / os.fsdecode(b'\xff%d' % number)
      path.mkdir(parents=True)
      (path / '0.png').write_bytes(image_bytes('PNG'))
  mine = copy.deepcopy(config())
  mine.data.source, mine.data.dir = 'folder', str(tmp_path / 'images')
  path = write(tmp_path / 'x.pt', tensors)
  found = convert.convert(mine, path, str(tmp_path / 'model'), 'supervised')
  about = saved.load(str(found), '').about
  assert about['class_names'] == ['\udcff0', '\udcff1']
  assert about['image_shape'] == [6, 6, 3] and about['dataset'] == 'images'
  path = write(tmp_path / 'y.pt', published(classes=3))
  refused(
    "config.data: images has 2 classes, and the checkpoint's linear.weight 3",
    *(convert.convert, mine, path, str(tmp_path / 'other'), 'supervised'),
  )


@pytest.mark.parametrize(
  ('file', 'name'),
  [
    ('model_best.pth.tar', 'model_best'),
    ('ckpt.t7Rep_attack_ep_0.0314', 'ckpt.t7Rep_attack_ep_0.0314'),
    ('ours (2), final.PT', 'ours-2-final'),
    ('99 %.pt', 'model-99'),
    ('Größe.pth', 'Gr-e'),
    ('\udcff.pt', 'model'),
    ('figures.pt', 'model-figures'),
    ('.pt', 'model'),
  ],
)
def test_a_run_is_called_as_its_file(file, name):
  assert convert.run_name(f'/some where/{file}') == name
  experiment.check_name('--name', name)


def test_conversions_do_not_share_a_folder(tmp_path, monkeypatch):
  """Records lie beside a model's folder: each has a parent of its own."""
  monkeypatch.chdir(tmp_path)
  sources = [write(tmp_path / f"a'b c/{x}.pt", published()) for x in 'xy']
  paths = [convert.convert(config(), x, '', 'supervised') for x in sources]
  paths.append(convert.convert(config(), sources[0], '', 'supervised', 'third'))
  assert [str(p.relative_to(tmp_path)) for p in map(Path, paths)] == [
    *('x/model', 'y/model', 'third/model')
  ]
  assert saved.load(str(paths[2]), '').name == 'third/supervised'
  again = (convert.convert, config(), sources[0], '', 'supervised')
  refused('x/model is there already', *again)
  refused("--name: found '1/x', wanted a name of letters", *again, '1/x')
  odd = convert.convert(config(), sources[0], "it's odd $x/model", 'supervised')
  words = shlex.split(convert.next_command(odd))
  assert words[1:] == [
    *('-m', 'rocl_jax.evaluate', f'--model={odd}'),
    f'--config={ROOT}/configs/eval.py:paper',
  ]


def _prefixed(prefix, tensors):
  return {prefix + k: x for k, x in tensors.items()}


@pytest.mark.parametrize(
  ('prefix', 'beside'),
  [
    *((x, {}) for x in ('ema_model.', 'model.', '_orig_mod.', 'net.')),
    *((x, {}) for x in ('encoder.', 'module.model.', 'a.b.c.d.')),
    ('module.', {'n_averaged': np.array(5)}),
    ('ema_model.', {'initted': np.array(True), 'step': np.array(5)}),
  ],
)
def test_a_prefix_of_all_names_is_left_out(prefix, beside, tmp_path, capsys):
  tensors = published()
  path = write(tmp_path / 'x.pt', beside | _prefixed(prefix, tensors))
  found = torch_file.read(path)
  assert found.keys() == tensors.keys()
  told = capsys.readouterr().err
  assert f'dropped the prefix {prefix!r} of all names' in told
  assert told.count('\n') == 1
  assert all(name in told for name in beside)


def test_names_of_layers_are_no_prefix(tmp_path):
  for names in (['conv1.weight'], ['linear.weight', 'linear.bias'], ['x']):
    path = write(tmp_path / 'x.pt', {k: np.ones(2, np.float32) for k in names})
    assert list(torch_file.read(path)) == names


def test_one_of_several_state_dicts(tmp_path, capsys):
  one, other = published(), published(classes=3)
  path = tmp_path / 'x.pt'
  for key in ('state_dict', 'model', 'net', 'model_state_dict'):
    for beside in ({}, {f'ema_{key}': other}, {'ema': {'model': other}}):
      write(path, {'epoch': 3, key: one, 'best': {'acc': 0.5}} | beside)
      found = torch_file.read(path)
      assert found['linear.bias'].shape == (10,)
      told = capsys.readouterr().err
      assert not beside or (f'read: {key}' in told and 'ema' in told)
      if beside:
        part = 'ema.model' if 'ema' in beside else f'ema_{key}'
        assert torch_file.read(path, part)['linear.bias'].shape == (3,)
  write(path, {'weights': {'inner': one}})
  assert torch_file.read(path).keys() == one.keys()
  for content in ({'model': one, 'net': other}, {'ema': one, 'raw': other}):
    write(path, content)
    refused(
      f'several dicts of tensors: {", ".join(content)}; wanted one',
      *(torch_file.read, path),
    )
    for key, wanted in content.items():
      assert torch_file.read(path, key)['linear.bias'].shape == (
        wanted['linear.bias'].shape
      )
  refused("found no parts 'none'; wanted a dict", torch_file.read, path, 'none')


def test_one_of_several_prefixes(tmp_path):
  online = published()
  ema = {k: np.asarray(x + 1) for k, x in online.items()}
  tensors = _prefixed('online_model.', online) | _prefixed('ema_model.', ema)
  path = write(tmp_path / 'x.pt', {'state_dict': tensors})
  arguments = (config(), path, str(tmp_path / 'model'), 'supervised')
  refused(
    "keys begin with 'online_model.' and 'ema_model.': "
    '--state_dict=online_model reads',
    *(convert.convert, *arguments),
  )
  found = saved.load(str(convert.convert(*arguments, 'ema', 'ema_model')), '')
  np.testing.assert_array_equal(
    found.variables['params']['head']['bias'], ema['linear.bias']
  )
  path = write(
    tmp_path / 'y.pt',
    _prefixed('model.', online) | {'mean': np.ones((3, 1, 1), np.float32)},
  )
  refused(
    "has, besides, .*keys begin with 'model.': --state_dict=model reads",
    *(convert.convert, config(), path, str(tmp_path / 'other'), 'supervised'),
  )


@pytest.mark.slow
def test_what_convert_prints_can_be_pasted(tmp_path):
  """Two digits' networks of width 2, each evaluated by the printed command."""
  settings = models.Settings(name='resnet8', width=2, dtype='float32')
  for name in ('a b', 'c'):
    write(tmp_path / f'{name}.pt', {'net': published(settings=settings)})
    done = subprocess.run(
      [sys.executable, '-m', 'rocl_jax.convert']
      + [f'--checkpoint={name}.pt', '--config.data.source=digits'],
      capture_output=True,
      text=True,
      cwd=tmp_path,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    more = ' --config.eval.examples=8 --config.audit.examples=0'
    done = subprocess.run(
      line + more,
      shell=True,
      capture_output=True,
      text=True,
      cwd=tmp_path,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode in (0, 3), done.stderr  # 3: an untrained network
    folder = name.replace(' ', '-')
    records = json.loads((tmp_path / folder / 'results.json').read_text())
    assert {record['run'] for record in records} == {folder}


def test_convert_command(tmp_path):
  path = tmp_path / 'x.pt'
  path.write_bytes(b'<html>Please log in</html>')
  done = subprocess.run(
    [sys.executable, '-m', 'rocl_jax.convert', f'--checkpoint={path}']
    + [f'--out={tmp_path / "model"}', '--config=configs/cifar10.py'],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 2, done.stderr
  assert 'not a zip file' in done.stderr and done.stderr.count('\n') == 1
  assert files_in(tmp_path) == [str(path)]


# --------------------------------------------------------------------- configs


def test_a_config_that_fails_names_file_and_line(tmp_path):
  path = tmp_path / 'broken.py'
  path.write_text('def get_config():\n  x = 1\n  return x / 0\n')
  refused(
    rf'{path}:3: ZeroDivisionError: division', command.load_config, str(path)
  )
  path.write_text('def get_config():\n  return (\n')
  refused(r'SyntaxError: .*broken.py, line 2', command.load_config, str(path))
