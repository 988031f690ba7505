"""Faults of disks, processes and numbers: nothing lost, nothing silently wrong.

The numbers in brackets are those of the table in `tests/faults/README.md`.
"""

import builtins
import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from test_stages import (
  TRAIN,
  assert_equal_trees,
  rows_without_clocks,
  settings_of,
  stage_run,
  stem_size,
)

from configs import quickstart
from rocl_jax import (
  changes,
  checkpoint,
  convert,
  doctor,
  journal,
  loop,
  manifest,
  mesh,
  metrics,
  models,
  optim,
  pipeline,
  provenance,
  results,
  workdir,
)
from rocl_jax import saved as saved_models
from rocl_jax.attacks.settings import AttackSettings
from rocl_jax.checkpoint import States
from rocl_jax.data import Split, load
from rocl_jax.errors import RunFailed, Unreadable, UserError
from rocl_jax.experiment import parse_experiment
from rocl_jax.files import exists, read_json, write_json
from rocl_jax.manifest import Damaged
from rocl_jax.report import reading as report_reading
from rocl_jax.reproduce import forecast
from rocl_jax.trees import flatten
from rocl_jax.types import TrainingSet

STATE = {
  'step': jnp.int32(0),
  'trained': {'scores': {'encoder/stem/kernel': jnp.ones((3, 3, 3, 4))}},
  'opt_state': ({'count': jnp.int32(7)}, jnp.zeros((300,))),
}


def state_of(step):
  return jax.tree.map(lambda x: x + step, STATE)


@pytest.fixture
def saved(tmp_path):
  """States of steps 1, 2 and 3 were saved; 2 and 3 are kept."""
  with States(epath.Path(tmp_path)) as states:
    for step in (1, 2, 3):
      states.save(step, state_of(step), [{'epoch': step}])
  assert checkpoint.steps(epath.Path(tmp_path)) == [2, 3]
  return tmp_path


def largest_file(folder):
  files = [p for p in folder.rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def array_file(folder):
  """A file of the arrays, not of what describes them."""
  return largest_file(folder / 'state' / 'd')


def truncate(folder):
  path = array_file(folder)
  path.write_bytes(path.read_bytes()[:-1])
  return path


def flip_a_bit(folder):
  return flip_a_bit_of(array_file(folder))


def flip_a_bit_of(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  return path


def remove_a_file(folder):
  path = array_file(folder)
  path.unlink()
  return path


def empty_the_metadata(folder):
  path = folder / 'state' / '_METADATA'
  path.write_text('')
  return path


def garbage_in_the_manifest(folder):
  path = folder / manifest.MANIFEST
  path.write_text('{"about": 3')
  return path


def other_digits_in_the_manifest(folder):
  path = folder / manifest.MANIFEST
  path.write_text(path.read_text().replace('"step": 3', '"step": 4'))
  return path


DAMAGES = [
  truncate,
  flip_a_bit,
  remove_a_file,
  empty_the_metadata,
  garbage_in_the_manifest,
  other_digits_in_the_manifest,
]


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_save_is_named_and_the_one_before_is_used(
  damage, saved, capfd
):
  """[3, 4, 5] Orbax alone restores most of these without a word."""
  path = damage(saved / '3')
  with States(epath.Path(saved)) as states:
    restored, rows = states.restore(like=STATE)
  assert str(path) in capfd.readouterr().err
  assert_equal_trees(restored['trained'], state_of(2)['trained'])
  np.testing.assert_array_equal(restored['opt_state'][1], np.full(300, 2.0))
  assert rows == [{'epoch': 2}]
  assert (saved / 'damaged' / '3').is_dir() and not (saved / '3').exists()


def test_a_save_without_its_manifest_does_not_count(saved):
  """[5] It was interrupted; so was the folder that is still being written."""
  (saved / '3' / manifest.MANIFEST).unlink()
  shutil.copytree(saved / '2', saved / '4.writing')
  with States(epath.Path(saved)) as states:
    restored, _ = states.restore(like=STATE)
    assert restored['step'] == 2
    states.save(3, state_of(3), [])
  assert checkpoint.steps(epath.Path(saved)) == [2, 3]
  assert not (saved / '4.writing').exists()


def test_no_whole_save_is_no_reason_to_start_anew(saved):
  """[3] Days of work may be lost: that is for people to decide."""
  truncate(saved / '2'), flip_a_bit(saved / '3')
  for _ in range(2):  # nor when it is asked again
    with States(epath.Path(saved)) as states:
      with pytest.raises(RunFailed, match='no save is whole'):
        states.restore(like=STATE)


@contextlib.contextmanager
def out_of_reach(path, number):
  """As of an NFS server that is away, or of a wrong mode."""

  def fails(real):
    def function(file, *rest, **more):
      if isinstance(file, str | os.PathLike) and os.fspath(file) == str(path):
        raise OSError(number, os.strerror(number), str(path))
      return real(file, *rest, **more)

    return function

  with pytest.MonkeyPatch.context() as patch:
    opened = fails(builtins.open)
    patch.setattr(builtins, 'open', opened)
    patch.setattr(io, 'open', opened)
    for name in ('stat', 'listdir', 'scandir') if path.is_dir() else ():
      patch.setattr(os, name, fails(getattr(os, name)))
    if path.name == manifest.MANIFEST:
      patch.setattr(os, 'stat', fails(os.stat))
    yield


def everything(folder):
  return {p: p.is_file() and p.read_bytes() for p in folder.rglob('*')}


@pytest.mark.parametrize('number', [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_save_out_of_reach_is_left_and_no_other_is_taken(number, saved):
  before = everything(saved)
  for path in (saved, *(p for p in (saved / '3').rglob('*') if p.is_file())):
    with out_of_reach(path, number):
      with pytest.raises(RunFailed, match='can not be read') as told:
        with States(epath.Path(saved)) as states:
          states.restore(like=STATE)
      assert str(path) in str(told.value)
      assert os.strerror(number) in str(told.value)
    assert everything(saved) == before
  with States(epath.Path(saved)) as states:
    restored, rows = states.restore(like=STATE)
  assert restored['step'] == 3 and rows == [{'epoch': 3}]


@pytest.mark.parametrize('number', [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_model_out_of_reach_is_not_trained_anew(number, tmp_path):
  like, folder = {'params': {'w': np.arange(300.0)}}, tmp_path / 'model'
  checkpoint.save_model(epath.Path(folder), like, ABOUT)
  before = everything(tmp_path)
  for path in (folder, *(p for p in folder.rglob('*') if p.is_file())):
    with out_of_reach(path, number):
      for read in (pipeline._finished, pipeline._selected):
        with pytest.raises(RunFailed, match='can not be read') as told:
          read(epath.Path(folder))
        assert str(path) in str(told.value)
    assert everything(tmp_path) == before
  assert_equal_trees(pipeline._finished(epath.Path(folder)), like)


def test_what_orbax_or_jax_raises_of_whole_bytes_is_no_damage(
  saved, monkeypatch
):
  def fails(*_):
    raise RuntimeError("Unable to initialize backend 'cuda'")

  before = everything(saved)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, '_restore', fails)
    with States(epath.Path(saved)) as states:
      with pytest.raises(Unreadable, match='3/state: can not be read: Unable'):
        states.restore(like=STATE)
  assert everything(saved) == before


@pytest.mark.parametrize('number', [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_small_file_out_of_reach_is_not_called_invalid(number, tmp_path):
  path = epath.Path(tmp_path) / 'results.json'
  write_json(path, [])
  lines = path.with_name('changes.jsonl')
  metrics.write(lines, [{'a': 1}])
  book = journal.Journal(path, {'attack': 'pgd'})
  book._path.write_text('x')
  for file, read in (
    (path, lambda: read_json(path, list)),
    (path, lambda: results.read(path)),
    (lines, lambda: metrics.read_lines(lines)),
    (book._path, book.read),
  ):
    with out_of_reach(tmp_path / file.name, number):
      with pytest.raises(Unreadable, match=f'{file.name}: can not be') as told:
        read()
    assert 'run the same command again once it can be read' in str(told.value)
  with out_of_reach(tmp_path / path.name, number):
    with pytest.raises(UserError, match='can not be read'):
      report_reading.Workdir(tmp_path)  # there is nothing else
  with pytest.raises(UserError, match='no such file'):
    read_json(path.with_name('other.json'), list)


def test_what_can_not_be_known_to_be_there_is_not_called_missing(
  tmp_path, monkeypatch
):
  path, real = tmp_path / 'results.json', os.stat

  def fails(file, *rest, **more):
    if str(file) == str(path):
      raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    return real(file, *rest, **more)

  monkeypatch.setattr(os, 'stat', fails)
  root, config = epath.Path(tmp_path), quickstart.get_config()
  for look in (
    lambda: exists(path),
    lambda: forecast._has_autoattack(root, 10),
    lambda: convert.convert(config, 'x.pt', str(path), 'supervised', 'x'),
  ):
    with pytest.raises(Unreadable, match='results.json: can not be read'):
      look()


def test_no_file_has_a_name_that_none_can_have(tmp_path):
  circle = tmp_path / 'circle'
  circle.symlink_to(circle)
  for path in (circle, tmp_path / ('x' * 300)):
    assert not exists(path)
    with pytest.raises(UserError, match='--model: .*: no such folder'):
      saved_models.load(str(path), '--model')
  with pytest.raises(UserError, match='--workdir: .*is no folder that can be'):
    workdir.make(str(circle), '--workdir')


def test_saves_of_several_threads_do_not_meet(tmp_path):
  """A model may end while a state is written; Orbax mixes up two saves."""
  like = {'params': {f'w{i}': np.full((64, 64), i) for i in range(20)}}

  def save(name):
    for _ in range(5):
      checkpoint.save_model(epath.Path(tmp_path) / name, like, ABOUT)

  threads = [threading.Thread(target=save, args=(n,)) for n in 'abc']
  began = time.monotonic()
  [t.start() for t in threads], [t.join() for t in threads]
  assert time.monotonic() - began < 60  # else one waits for 300 s
  for name in 'abc':
    assert_equal_trees(
      checkpoint.load_model(epath.Path(tmp_path) / name)[0], like
    )


def other_shape(state):
  return state | {'trained': {'scores': {'encoder/stem/kernel': jnp.ones(4)}}}


def other_dtype(state):
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)


def one_more(state):
  return state | {'ema': jnp.zeros(3)}


def one_less(state):
  return {k: v for k, v in state.items() if k != 'opt_state'}


@pytest.mark.parametrize(
  'change, told',
  [
    (
      other_shape,
      r'kernel is float32\[3, 3, 3, 4\], wanted float32\[4\]',
    ),
    (other_dtype, r'step is int32\[\], wanted bfloat16\[\].* and 1 more'),
    (one_more, r'ema is missing, wanted float32\[3\]'),
    (one_less, r'opt_state/0/count is int32\[\], wanted none'),
  ],
)
def test_another_networks_state_is_refused_field_by_field(change, told, saved):
  """[10] Orbax would cast dtypes."""
  with States(epath.Path(saved)) as states:
    with pytest.raises(UserError, match=told):
      states.restore(like=change(STATE))
  assert checkpoint.steps(epath.Path(saved)) == [2, 3]


def test_a_save_counts_when_it_was_read_back(saved, monkeypatch):
  """Nothing goes before its successor is known to be good."""
  monkeypatch.setattr(checkpoint, '_PAUSES', (0.0,))
  monkeypatch.setattr(checkpoint, '_restore', lambda *_: {'step': np.zeros(3)})
  with States(epath.Path(saved)) as states:
    states.save(4, state_of(4), [])
    with pytest.raises(RunFailed, match='read back is not what was written'):
      states.wait()
    states._failure = None
  assert checkpoint.steps(epath.Path(saved)) == [2, 3]
  assert not list(saved.glob('*.writing'))


def test_a_write_error_is_tried_again_and_then_told(
  saved, monkeypatch, tmp_path
):
  """[31] As of a remote disk that is away for a moment, or for good."""
  monkeypatch.setattr(checkpoint, '_PAUSES', (0.0, 0.0))
  fill, failures = checkpoint._fill, [2]

  def flaky(*arguments):
    failures[0] -= 1
    if failures[0] >= 0:
      raise OSError('503 service unavailable')
    fill(*arguments)

  monkeypatch.setattr(checkpoint, '_fill', flaky)
  with States(epath.Path(saved)) as states:
    states.save(4, state_of(4), [])
  assert checkpoint.steps(epath.Path(saved)) == [3, 4]
  failures[0] = 99
  with pytest.raises(RunFailed) as told:
    with States(epath.Path(saved)) as states:
      states.save(5, state_of(5), [])
  message = str(told.value)
  for part in ('step 5', str(saved), '503', 'to write', 'free', 'step 4 is'):
    assert part in message
  assert checkpoint.steps(epath.Path(saved)) == [3, 4]


SAVER = """
import sys, resource, signal
import jax.numpy as jnp
from etils import epath
from rocl_jax import checkpoint, errors
checkpoint._PAUSES = (0.1,)
path = epath.Path(sys.argv[1])
like = {'w': jnp.zeros((256, 1024))}
with checkpoint.States(path) as states:
  states.save(1, like, [])
if sys.argv[2] == 'limit':
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
  with checkpoint.States(path) as states:
    states.save(2, {'w': jnp.asarray(
        __import__('numpy').random.default_rng(0).random((256, 4096)),
        jnp.float32)}, [])
except errors.RunFailed as e:
  print(e)
with checkpoint.States(path) as states:
  assert states.restore(like)[0]['w'].shape == (256, 1024)
  print('whole', checkpoint.steps(path))
"""


def test_a_write_that_fails_outside_of_python_leaves_the_old_save(tmp_path):
  """[6] TensorStore writes in C++: a limit on file sizes reaches it there."""
  result = subprocess.run(
    [sys.executable, '-c', SAVER, tmp_path / 'saves', 'limit'],
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr[-2000:]
  told, after = result.stdout.splitlines()
  assert 'step 2 could not be saved' in told and str(tmp_path) in told
  assert 'step 1 is there' in told and after == 'whole [1]'


def test_a_full_disk_is_told_before_it_is_tried(tmp_path):
  """[6] A real one of four megabytes, where this user may mount it."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', disk],
    capture_output=True,
  )
  if mounted.returncode:
    pytest.skip('mounting a small disk needs root')
  try:
    result = subprocess.run(
      [sys.executable, '-c', SAVER, disk / 'saves', 'none'],
      capture_output=True,
      text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    told, after = result.stdout.splitlines()
    assert 'No space left' in told and '4.2 MB to write' in told
    assert after == 'whole [1]'
  finally:
    subprocess.run(['umount', disk], check=True)


# Models.

ABOUT = {
  **{'run': 'ours', 'stage': 'prune', 'selection': 'last', 'epoch': 1},
  **{'config': {}, 'dataset': 'none', 'class_names': [], 'layers': {}},
  **{'image_shape': [], 'fingerprint': 'f', 'sparsity': 0.9},
}
VARIABLES = {'params': {'w': np.ones((64, 64), np.float32)}}


def test_a_damaged_model_is_named(tmp_path):
  """[4] The weights of a stranger, with one bit flipped on the way."""
  folder = epath.Path(tmp_path) / 'model'
  checkpoint.save_model(folder, VARIABLES, ABOUT)
  checkpoint.load_model(folder)
  for path in (
    array := largest_file(tmp_path / 'model' / 'variables' / 'd'),
    tmp_path / 'model' / 'model.json',
  ):
    before = path.read_bytes()
    path.write_bytes(before[:-2] + bytes([before[-2] ^ 4]) + before[-1:])
    with pytest.raises(UserError, match=path.name):
      checkpoint.load_model(folder)
    path.write_bytes(before)
  checkpoint.load_model(folder)
  assert array.exists()


def test_an_old_model_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
  folder = epath.Path(tmp_path) / 'best_validation'
  checkpoint.save_model(folder, VARIABLES, ABOUT)
  monkeypatch.setattr(checkpoint, '_PAUSES', ())

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoint, '_fill', full)
  with pytest.raises(RunFailed, match='No space left'):
    checkpoint.save_model(folder, VARIABLES, ABOUT | {'epoch': 2})
  assert checkpoint.load_model(folder)[1]['epoch'] == 1


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'secret').write_text('x')
  manifest.seal(epath.Path(tmp_path), {})
  shutil.move(tmp_path / manifest.MANIFEST, tmp_path / 'in')
  content = json.loads((tmp_path / 'in' / manifest.MANIFEST).read_text())
  content['files']['../secret'] = content['files'].pop('secret')
  content.pop('sha256')
  content['sha256'] = manifest._own(content)
  (tmp_path / 'in' / manifest.MANIFEST).write_text(json.dumps(content))
  with pytest.raises(Damaged, match='no manifest of ours'):
    manifest.verify(epath.Path(tmp_path / 'in'))


# Numbers.


def poisoned(run, steps):
  """The stage with a loss that is not a number in these steps."""
  loss = run.stage.loss

  def bad(params, batch_stats, batch, key):
    value, (statistics, values) = loss(params, batch_stats, batch, key)
    # The key tells the step: the loop folds it in.
    keys = jax.vmap(lambda s: jax.random.fold_in(step_key, s))(
      jnp.array(steps, jnp.int32)
    )
    same = jax.vmap(
      lambda k: (jax.random.key_data(k) == jax.random.key_data(key)).all()
    )(keys)
    return jnp.where(same.any(), jnp.nan, value), (statistics, values)

  step_key = jax.random.split(loop.stage_key(run.seed, run.name), 3)[2]
  return run.__class__(**(vars(run) | {'stage': run.stage._replace(loss=bad)}))


def test_an_update_that_is_not_finite_is_left_out(tmp_path):
  """[12] Steps of three epochs of four; the second and the sixth are bad."""
  run = poisoned(stage_run('supervised', tmp_path), [1, 5])
  variables = loop.run_stage(run)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))
  rows = rows_without_clocks(tmp_path)
  assert [r['skipped'] for r in rows] == [1, 1, 0]
  assert all(np.isfinite(r['loss']) for r in rows)
  skipped = metrics.read_lines(epath.Path(tmp_path) / 'skipped.jsonl')
  assert [s['step'] for s in skipped] == [2, 6]
  order_key = jax.random.split(loop.stage_key(run.seed, run.name), 3)[1]
  order = loop.epoch_order(order_key, 1, 36, 8)
  assert skipped[1]['images'] == order[1].tolist()


def test_a_skipped_update_changes_nothing(tmp_path):
  run = poisoned(stage_run('supervised', tmp_path), [0])
  optimizer, _ = optim.make(run.settings.optimizer, 3, 4)
  step = jax.jit(loop.make_step(run.stage, optimizer, run.mesh))
  key = jax.random.split(loop.stage_key(run.seed, run.name), 3)[2]
  order = loop.epoch_order(jax.random.key(1), 0, 36, 8)
  data = jax.device_put(TrainingSet.of(*TRAIN), loop.replicated(run.mesh))
  first = loop.first_state(run.stage, optimizer, step, (data, order, key))
  before = jax.jit(first)(run.upstream, jax.random.key(0))
  for bad in (True, False):
    after, seen = step(before, data, order, key)
    same = [
      np.array_equal(a, b)
      for a, b in zip(
        jax.tree.leaves((before.trained, before.opt_state)),
        jax.tree.leaves((after.trained, after.opt_state)),
        strict=True,
      )
    ]
    assert all(same) == bad and int(after.step) == 1 + (not bad)
    assert int(seen.skipped_in_row) == int(bad)
    assert after.skips.epoch.tolist() == [True, False, False, False]
    assert np.isnan(seen.loss) == bad
    before = after


def test_too_many_in_a_row_stop_the_run_and_keep_the_last_save(tmp_path):
  """[12]"""
  run = poisoned(
    stage_run('supervised', tmp_path, loss='natural'), range(4, 99)
  )
  run = run.__class__(**(vars(run) | {'max_skipped': 2}))
  with pytest.raises(RunFailed) as told:
    loop.run_stage(run)
  assert 'in 3 steps in a row' in str(told.value)
  skipped = metrics.read_lines(epath.Path(tmp_path) / 'skipped.jsonl')
  assert [s['step'] for s in skipped][:3] == [5, 6, 7]
  newest = checkpoint.steps(epath.Path(tmp_path) / 'checkpoints')
  assert newest and f'step {newest[-1]} is intact' in str(told.value)
  # Mended, it goes on from there.
  mended = stage_run('supervised', tmp_path, loss='natural')
  variables = loop.run_stage(mended)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(variables))


@pytest.mark.parametrize('value', [np.nan, np.inf, None])
def test_a_value_that_is_not_finite_is_never_the_best(value):
  """[13]"""
  row = {} if value is None else {'a': value}
  assert not metrics.is_best([{'a': 1.0}, row], 'a')
  assert not metrics.is_best([row], 'a')
  assert metrics.is_best([{'a': 1.0}, row, {'a': 2.0}], 'a')
  assert not metrics.is_best([{'a': 2.0}, row, {'a': 2.0}], 'a')


# Processes.

HOLDER = """
import sys, time
from etils import epath
from rocl_jax.workdir import claim
with claim(epath.Path(sys.argv[1]), '--workdir'):
  print('held', flush=True)
  time.sleep(60)
"""


def test_one_run_a_folder(tmp_path):
  """[8] A second one is refused; a dead holder's place is free."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDER, tmp_path], stdout=subprocess.PIPE
  )
  try:
    assert process.stdout.readline() == b'held\n'
    with pytest.raises(UserError) as told:
      with workdir.claim(epath.Path(tmp_path), '--workdir'):
        pass
    holder = json.loads((tmp_path / workdir.RUN).read_text())
    for part in (f'process {process.pid} ', holder['host'], holder['started']):
      assert part in str(told.value)
    assert workdir.holder(epath.Path(tmp_path))['alive']
  finally:
    process.kill()
    process.wait()
  assert not workdir.holder(epath.Path(tmp_path))['alive']
  with workdir.claim(epath.Path(tmp_path), '--workdir'):
    pass
  assert workdir.holder(epath.Path(tmp_path))['status'] == 'finished'


def test_a_holder_on_another_machine_counts_while_it_gives_signs_of_life(
  tmp_path, monkeypatch
):
  """[8] Of a shared file system, where no kernel knows both."""
  path = tmp_path / workdir.RUN
  path.write_text(json.dumps({'status': 'running', 'host': 'tpu-7'}))
  monkeypatch.setattr(workdir, '_SILENCE', 2.0)
  alive = threading.Event()
  monkeypatch.setattr(workdir, '_BEAT', 0.2)
  beat = threading.Thread(target=workdir._beat, args=(path, alive))
  beat.start()
  try:
    with pytest.raises(UserError, match='on tpu-7'):
      with workdir.claim(epath.Path(tmp_path), '--workdir'):
        pass
  finally:
    alive.set()
    beat.join()
  assert json.loads(path.read_text())['host'] == 'tpu-7'
  # It was killed just now: who comes next waits, and takes over.
  began = time.monotonic()
  with workdir.claim(epath.Path(tmp_path), '--workdir'):
    assert 1 < time.monotonic() - began < 10


LISTENER = """
import sys, time
from rocl_jax import interruption
interruption.PATIENCE, interruption.GRACE = 0.5, 1.5
interruption.install('no time to save')
print('ready', flush=True)
end = time.monotonic() + 20
while time.monotonic() < end:
  {body}
"""


@pytest.mark.parametrize(
  'body, signals, status, said',
  [
    (
      'interruption.check(); time.sleep(0.01)',
      [signal.SIGTERM],
      1,
      'Interrupted: SIGTERM',
    ),
    ('time.sleep(20)', [signal.SIGTERM], 143, 'no time to save'),
    ('time.sleep(20)', [signal.SIGINT], 130, 'no time to save'),
    (
      "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
      [signal.SIGTERM],
      143,
      'no time to save',
    ),
    ('time.sleep(20)', [signal.SIGTERM] * 2, 143, 'once more'),
    ('time.sleep(20)', [signal.SIGTERM, signal.SIGINT], 130, 'once more'),
  ],
)
def test_signals(body, signals, status, said):
  """[2] Also where the main thread can not look, as in a compiler."""
  process = subprocess.Popen(
    [sys.executable, '-c', LISTENER.format(body=body)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'ready\n'
  began = time.monotonic()
  for number in signals:
    process.send_signal(number)
    time.sleep(0.2)
  _, errors = process.communicate(timeout=30)
  assert process.returncode == status and said in errors
  assert time.monotonic() - began < 5


def test_nobody_has_to_listen():
  """[30] With stderr closed a signal still ends it, and a mistake is one."""
  shell = lambda code: subprocess.run(
    ['bash', '-c', f'{sys.executable} -c "$0" 2>&-', code], timeout=30
  )
  sleeper = LISTENER.format(body='time.sleep(20)').replace(
    "print('ready', flush=True)",
    'import os, signal; os.kill(os.getpid(), signal.SIGTERM)',
  )
  assert shell(sleeper).returncode == 143
  mistake = """
import sys
from rocl_jax import command, errors
def main(_):
  raise errors.UserError('this is wrong')
command.run(main, 'usage')
"""
  assert shell(mistake).returncode == 2


def test_a_folder_that_can_not_be_written(tmp_path, monkeypatch):
  """[7] A file, below a file, or on a read-only disk."""
  (tmp_path / 'file').write_text('')
  for path in ('file', 'file/below'):
    with pytest.raises(UserError, match=f'--workdir: .*{path}'):
      workdir.make(str(tmp_path / path), '--workdir')

  def read_only(*_, **__):
    raise OSError(errno.EROFS, 'Read-only file system')

  monkeypatch.setattr(epath.Path(tmp_path).__class__, 'write_text', read_only)
  with pytest.raises(UserError, match='Read-only file system'):
    workdir.make(str(tmp_path / 'new'), '--workdir')


def test_a_kill_between_any_two_operations_leaves_a_whole_save(
  saved, monkeypatch
):
  """[1] Raises at the n-th rename, removal or folder made, for every n."""
  done = []

  class Killed(BaseException):
    pass

  def counted(module, name):
    original = getattr(module, name)

    def operation(*arguments, **keywords):
      # Not within Orbax, whose threads would wait five minutes for each other.
      if checkpoint._ONE_AT_A_TIME.locked():
        return original(*arguments, **keywords)
      done.append(name)
      if len(done) == stop:
        raise Killed
      return original(*arguments, **keywords)

    return lambda patch: patch.setattr(module, name, operation)

  hooks = [counted(os, n) for n in ('rename', 'replace', 'mkdir', 'rmdir')]
  hooks += [counted(shutil, 'rmtree'), counted(manifest, 'seal')]
  for stop in range(1, 60):
    folder = saved.parent / f'{saved.name}-{stop}'
    shutil.copytree(saved, folder)
    done.clear()
    states = States(epath.Path(folder))
    with monkeypatch.context() as patch:
      for hook in hooks:
        hook(patch)
      arrays = checkpoint._named(state_of(4))
      try:
        states._write(4, arrays, {'step': 4, 'rows': []})
      except Killed:
        pass
      killed = len(done) >= stop
    with States(epath.Path(folder)) as states:
      restored, _ = states.restore(like=STATE)
      assert int(restored['step']) in (3, 4)
      states.save(5, state_of(5), [])
    assert checkpoint.steps(epath.Path(folder))[-1] == 5
    left = {p.name for p in folder.iterdir()}
    assert left <= {'3', '4', '5'} and len(left) == 2
    if not killed:
      break
  assert 3 < stop < 59


# The doctor.


def test_the_doctor_finds_what_is_wrong(tmp_path):
  stage = tmp_path / '1_supervised'
  loop.run_stage(stage_run('supervised', stage, measure=stem_size))
  config = {'name': 'ours', 'stages': ['supervised', 'prune']}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  found = doctor.examine(epath.Path(tmp_path))
  text = doctor.text(epath.Path(tmp_path), found)
  assert not found.damage and found.files > 10
  for part in ('finished', 'model, best_validation whole', 'not begun'):
    assert part in text
  path = flip_a_bit(stage / 'checkpoints' / '12')
  found = doctor.examine(epath.Path(tmp_path))
  (problem,) = found.damage
  assert str(path) in problem
  assert 'DAMAGED' in doctor.text(epath.Path(tmp_path), found)
  assert 'are set aside' in doctor.text(epath.Path(tmp_path), found)
  # Where the command alone would stumble, it says what to do first.
  truncate(stage / 'checkpoints' / '9')
  flip_a_bit_of(largest_file(stage / 'model'))
  flip_a_bit_of(largest_file(stage / 'best_validation'))
  (stage / 'request.json').write_text('{')
  found = doctor.examine(epath.Path(tmp_path))
  next_ = doctor.text(epath.Path(tmp_path), found).splitlines()[-1]
  for name in ('request.json', 'best_validation', 'checkpoints'):
    assert f'delete {stage / name}' in next_
  assert 'goes on' not in next_


def test_the_doctor_calls_nothing_damaged_that_it_can_not_read(tmp_path):
  stage = tmp_path / '1_supervised'
  like = {'params': {'w': np.arange(300.0)}}
  checkpoint.save_model(epath.Path(stage / 'model'), like, ABOUT)
  with States(epath.Path(stage / 'checkpoints')) as states:
    states.save(3, STATE, [])
  config = {'name': 'ours', 'stages': ['supervised']}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'run.json').write_text(json.dumps({'status': 'finished'}))
  files = (
    stage / 'model' / 'model.json',
    largest_file(stage / 'model'),
    stage / 'checkpoints' / '3' / manifest.MANIFEST,
    stage / 'checkpoints',
    tmp_path / 'config.json',
    tmp_path / 'run.json',
  )
  for path in files:
    with out_of_reach(path, errno.EIO):
      found = doctor.examine(epath.Path(tmp_path))
      text = doctor.text(epath.Path(tmp_path), found)
      assert found.unreadable and str(path) in ''.join(found.unreadable), path
      assert 'nothing is lost: make these files readable again, then' in text
      assert not found.damage and 'DAMAGED' not in text
      assert 'goes on' not in text.splitlines()[-1].partition('next')[2]
  ended = {'status': 'failed: disk full', 'command': 'train.py --workdir=w'}
  (tmp_path / 'run.json').write_text(json.dumps(ended))
  found = doctor.examine(epath.Path(tmp_path))
  assert not found.unreadable
  assert doctor.text(epath.Path(tmp_path), found).endswith(
    f'fix this first: disk full; then run: python train.py --workdir={tmp_path}'
  )
  with pytest.raises(UserError, match='neither a work directory'):
    doctor.examine(epath.Path(tmp_path) / '1_supervised' / 'checkpoints')


# Configs.


def test_goes_on_with_another_number_of_devices(tmp_path, monkeypatch):
  """[11] One, four, two: the same images in the same order."""
  run = lambda folder, devices: loop.run_stage(
    stage_run('linear_eval', tmp_path / folder, devices)
  )
  show = loop.Progress.show
  for devices, stop in ((1, 5), (4, 9)):

    def stopping(self, done, note, stop=stop):
      if done == stop:
        raise KeyboardInterrupt
      show(self, done, note)

    with monkeypatch.context() as patch:
      patch.setattr(loop.Progress, 'show', stopping)
      with pytest.raises(KeyboardInterrupt):
        run('moved', devices)
  moved, straight = run('moved', 2), run('straight', 1)
  for path, value in flatten(straight).items():
    np.testing.assert_allclose(flatten(moved)[path], value, rtol=1e-4)
  rows = zip(
    rows_without_clocks(tmp_path / 'moved'),
    rows_without_clocks(tmp_path / 'straight'),
    strict=True,
  )
  for row, other in rows:
    assert row == {k: pytest.approx(v, rel=1e-4) for k, v in other.items()}


def test_thin_layers_are_warned_of_by_name(capfd):
  """[17] At width 8 and 99 % the first layer keeps 2 of 216 weights."""
  model = models.build(
    models.Settings(name='resnet18', width=8, dtype='float32'), 10
  )
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), (32, 32, 3)))
  thin = settings_of('prune', keep=0.01)
  pipeline._warn_of_thin_layers('ours/prune', thin, variables)
  told = capfd.readouterr().err
  assert 'keeps 3 of the 216 weights of encoder/stem/kernel' in told
  fine = settings_of('prune', keep=0.1)
  pipeline._warn_of_thin_layers('ours/prune', fine, variables)
  assert not capfd.readouterr().err


def test_a_ball_out_of_reach_is_warned_of():
  """[15]"""
  section = dict(name='pgd', eps='0.3', step_size='2/255', steps=10)
  for steps, told in ((10, '10 steps of 0.00784314 do not'), (40, '')):
    attack = AttackSettings.parse(section | {'steps': steps}, 'attack')
    said = pipeline._reach(SimpleNamespace(attack=attack))
    assert told in said and bool(said) == bool(told)


def test_a_pruned_weight_that_is_not_zero_is_never_evaluated():
  """[19, 20]"""
  kernel = np.array([[0.0, 1.0], [2.0, 0.0]])
  mask = kernel != 0
  variables = {
    'params': {'head': {'kernel': kernel}},
    'batch_stats': {},
    'masks': {'head/kernel': mask},
  }
  results.check_weights(variables)
  for bad in (np.ones((2, 2)), np.full((2, 2), np.nan)):
    variables['params']['head']['kernel'] = bad
    with pytest.raises(RunFailed, match='head/kernel'):
      results.check_weights(variables)


def test_other_training_images_are_told(tmp_path):
  """[9] In the same place, and of the same number."""
  experiment = parse_experiment(quickstart.get_config())
  dataset, root = load('digits', '', 60), epath.Path(tmp_path)
  main, *_ = pipeline._chains(experiment, dataset, root)
  request = pipeline._request(main, 'pretrain')
  write_json(root / 'config.json', main.run.config)
  write_json(root / '1_pretrain' / 'request.json', request)
  pipeline.check(experiment, dataset, root)
  images, labels = dataset.train
  other = dataset._replace(train=Split(255 - images, labels))
  with pytest.raises(UserError, match='config.data.train_crc32: found'):
    pipeline.check(experiment, other, root)
  pipeline.check(experiment, other, root, ['config.data.train_crc32'])
  del request['data']['train_crc32']  # of an earlier version
  write_json(root / '1_pretrain' / 'request.json', request)
  pipeline.check(experiment, other, root)


def test_a_changed_config_is_told_field_by_field(tmp_path, capfd):
  """[9]"""
  root, path = epath.Path(tmp_path), epath.Path(tmp_path) / changes.FILE
  before = {'seed': 0, 'supervised': {'optimizer': {'learning_rate': 0.1}}}
  now = {'seed': 1, 'supervised': {'optimizer': {'learning_rate': 0.2}}}

  def notes():
    found = changes.Changes(root)
    found.compare({'save_steps': 1}, {'save_steps': 2}, 'the run')
    found.compare(before, now, '2_supervised', '/w/2_supervised')
    return found

  rate = 'config.supervised.optimizer.learning_rate'
  for allowed in ((), ('config.seed',)):
    with pytest.raises(UserError) as told:
      notes().settle(allowed)
    assert '/w/2_supervised was made with' in str(told.value)
    assert not path.exists()
  assert rate in str(told.value)
  printed = capfd.readouterr().err
  assert f'2_supervised: {rate} was 0.1, is 0.2' in printed
  assert 'the run: config.save_steps was 1, is 2' in printed
  notes().settle(('config.seed', rate))
  noted = {line['field']: line['to'] for line in metrics.read_lines(path)}
  assert noted == {'config.seed': 1, rate: 0.2, 'config.save_steps': 2}
  # What was gone on with once is no question any more.
  capfd.readouterr()
  notes().settle(())
  assert not capfd.readouterr().err
  assert len(metrics.read_lines(path)) == 3


def test_what_changes_numbers_is_told_of_and_recorded(
  tmp_path, capfd, monkeypatch
):
  """And nothing is refused for it."""
  experiment = parse_experiment(quickstart.get_config())
  dataset, root = load('digits', '', 60), epath.Path(tmp_path)
  for name in list(provenance._variables()):
    monkeypatch.delenv(name)
  chains = pipeline._chains(experiment, dataset, root)
  (directory, *_) = [d for _, _, d in chains[0].stages]
  open_ = lambda: pipeline._open(chains, (), root, dict)
  before = provenance.versions()
  open_()
  pipeline._write_request(chains[0], 'pretrain', directory)
  known = root / 'versions.jsonl'
  harmless = ('JAX_COMPILATION_CACHE_DIR', 'JAX_TRACEBACK_FILTERING')
  for name in (*harmless, 'JAX_LOGGING_LEVEL', 'JAX_PLATFORMS'):
    monkeypatch.setenv(name, 'x')
  monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=/tmp/x')
  # As an edit of the README makes it.
  monkeypatch.setattr(provenance, '_commit', lambda: 'abc-dirty')
  assert provenance.versions()['commit'] == 'abc-dirty'
  open_()
  assert 'versions' not in capfd.readouterr().err
  assert len(metrics.read_lines(known)) == 1
  names = ('XLA_FLAGS', 'NVIDIA_TF32_OVERRIDE', 'OMP_NUM_THREADS')
  for turn in (1, 2):  # there and back: each is a change
    for name in names:
      monkeypatch.setenv(name, '1')
    open_()
    printed = capfd.readouterr().err
    for name in names:
      assert printed.count(f"versions.{name} was None, is '1'") == 1
    assert printed.count('the run continues; its result may now differ') == 1
    for name in names:
      monkeypatch.delenv(name)
    open_()
    assert "versions.XLA_FLAGS was '1', is None" in capfd.readouterr().err
    assert len(metrics.read_lines(known)) == 1 + 2 * turn
  assert not (root / changes.FILE).exists()
  prng = jax.config.values['jax_default_prng_impl']
  jax.config.update('jax_default_prng_impl', 'rbg')
  try:
    assert provenance.changed(before, provenance.versions()) == [
      f"versions.jax_default_prng_impl was {prng!r}, is 'rbg'"
    ]
  finally:
    jax.config.update('jax_default_prng_impl', prng)
  assert doctor.text(root, doctor.examine(root)).count('XLA_FLAGS was') == 4
  earlier = pipeline._earlier_versions(root, directory)
  assert [line['versions'].get('XLA_FLAGS') for line in earlier] == [
    *(None, '1', None, '1')
  ]
  # A stage that begins now was never under the others.
  pipeline._write_request(chains[0], 'pretrain', directory)
  assert pipeline._earlier_versions(root, directory) == []


def small(**changes):
  config = quickstart.get_config()
  config.model.update(name='resnet8', width=4)
  config.update(stages=('pretrain',), compare=())
  config.pretrain.update(total_epochs=2)
  config.update_from_flattened_dict(changes)
  return parse_experiment(config)


@pytest.mark.parametrize('where', ['model', 'checkpoints'])
def test_what_does_not_fit_is_not_offered(where, tmp_path):
  """Not even where it is allowed; and config.json stays what it was."""
  dataset, root = load('digits', '', 60), epath.Path(tmp_path)
  chains = pipeline._chains(small(), dataset, root)
  shapes = pipeline._rehearse(chains)
  pipeline._open(chains, (), root, lambda: shapes)
  ((name, settings, directory),) = chains[0].stages
  pipeline._write_request(chains[0], name, directory)
  upstream, outcome = shapes[directory]
  zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
  if where == 'model':
    checkpoint.save_model(directory / where, zeros(outcome), ABOUT)
  else:
    run = pipeline._stage_run(chains[0], name, settings, upstream, directory)
    with States(directory / where) as states:
      states.save(20, zeros(loop.state_form(run)), [])
  before = (root / 'config.json').read_text()
  unfit = {'model.width': 8}
  if where == 'checkpoints':
    unfit |= {'pretrain.batch_size': 50, 'pretrain.optimizer.momentum': 0.0}
    unfit |= {'pretrain.total_epochs': 1}
  for field, value in unfit.items():
    one = small(**{field: value})
    others = pipeline._chains(one, dataset, root)
    known = pipeline._rehearse(others)
    with pytest.raises(UserError, match='does not fit') as told:
      pipeline._open(others, (f'config.{field}',), root, lambda s=known: s)
    assert f'config.{field}: ' in str(told.value)
    assert 'allow_change' not in str(told.value)
  assert (root / 'config.json').read_text() == before
  one = small(seed=1)
  with pytest.raises(UserError, match='--allow_change=config.seed'):
    pipeline.check(one, dataset, root)
  pipeline.check(one, dataset, root, ('config.seed',))


def test_64_bit_mode_is_left_aside_where_no_network_counts_so(capfd):
  before = jax.config.values['jax_enable_x64']
  jax.config.update('jax_enable_x64', True)
  try:
    for dtypes, wanted in ((['float32'], 'float32'), (['float64'], 'float64')):
      with mesh.counting_in(dtypes):
        assert jnp.zeros(2, float).dtype == wanted
    with pytest.raises(UserError, match='found float64 and bfloat16'):
      with mesh.counting_in(['float64', 'bfloat16']):
        pass
  finally:
    jax.config.update('jax_enable_x64', before)
  assert 'JAX_ENABLE_X64 is ignored' in capfd.readouterr().err


@pytest.mark.parametrize('number', [errno.ESTALE, errno.ENOENT, errno.EMFILE])
def test_trouble_of_a_disk_is_no_bug(number):
  body = f"""
import os, sys
from rocl_jax import command
def main(_):
  raise OSError({number}, os.strerror({number}), '/some where/file')
command.run(main, 'usage')
"""
  done = subprocess.run(
    [sys.executable, '-c', body], capture_output=True, text=True
  )
  assert done.returncode == 3
  assert "'/some where/file'" in done.stderr
  assert os.strerror(number) in done.stderr
  assert 'Traceback' not in done.stderr
