"""A work directory on cloud storage, for which file:// stands here.

Another machine is another cache folder. The last test is a whole run.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath
from test_commands import assert_equal_trees, clockless
from test_processes import SMALL

from configs import eval as eval_config
from configs import quickstart
from rocl_jax import (
  checkpoint,
  evaluate,
  interruption,
  manifest,
  mirror,
  report,
  saved,
  workdir,
)
from rocl_jax.errors import RunFailed, UserError
from rocl_jax.experiment import parse_experiment
from rocl_jax.files import write_json
from rocl_jax.remote import Remote
from rocl_jax.settings import parse

SHORT = '--config.supervised.eval_epochs=0'  # no models but the last
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def bucket(tmp_path):
  """The place as a folder; `url` is what names it."""
  return tmp_path / 'bucket' / 'run'


@pytest.fixture
def url(bucket):
  return f'file://{bucket}'


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """Makes this process one of another machine."""

  def move(name):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / name))

  monkeypatch.setattr(mirror, '_PAUSES', (0.0,))
  move('one')
  return move


@pytest.fixture
def quick(monkeypatch):
  """Pushes all the time."""
  monkeypatch.setattr(mirror, '_FIRST', 0.01)
  monkeypatch.setattr(mirror, '_TURN', 0.05)


@contextlib.contextmanager
def running(url):
  """A run as `pipeline.run` has it."""
  with mirror.mirrored(url, '--workdir') as folder:
    root = workdir.make(folder, '--workdir')
    with workdir.claim(root, '--workdir'):
      yield pathlib.Path(folder)


def seal(folder, content):
  """A folder as `checkpoint` makes them: one of its names is always new."""
  new = folder.with_name(folder.name + '.writing')
  (new / 'state' / 'd').mkdir(parents=True)
  (new / 'state' / '_METADATA').write_text(content)
  (new / 'state' / 'd' / os.urandom(8).hex()).write_text(content * 50)
  (new / 'model.json').write_text(json.dumps(content))
  manifest.seal(epath.Path(new), {'content': content})
  shutil.rmtree(folder, ignore_errors=True)
  new.rename(folder)


def sealed_content(folder):
  """What a folder holds; None if it is not sealed. Raises if it is damaged."""
  folder = epath.Path(folder)
  return manifest.verify(folder)['content'] if folder.exists() else None


def files(folder):
  """Content by name, without claims."""
  return {
    p.relative_to(folder).as_posix(): p.read_bytes()
    for p in folder.rglob('*')
    if p.is_file() and p.name != workdir.RUN
  }


def until(condition):
  deadline = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def status(bucket):
  """What the claim says there; None if it is just being written."""
  claim = (bucket / workdir.RUN).read_bytes()
  return workdir.parse(claim).get('status')


def test_a_path_stays_what_it_is():
  with mirror.mirrored('~/some/run', '--workdir') as folder:
    assert folder == '~/some/run'


def test_what_is_written_gets_there_and_to_another_machine(
  url, bucket, machine, capfd
):
  with running(url) as folder:
    for name in ('b', 'a', 'c'):  # the report takes the newest of equals
      write_json(folder / name / 'results.json', [name])
      time.sleep(0.01)
    seal(folder / '1_a' / 'checkpoints' / '4', 'four')
    (folder / '1_a' / 'x.new').write_text('')
    (folder / '1_a' / 'y.writing').mkdir()
    (folder / '1_a' / 'y.writing' / 'z').write_text('')
  assert f'{url}: kept in {folder}' in capfd.readouterr().err
  written = files(folder)
  del written['1_a/x.new'], written['1_a/y.writing/z']
  assert files(bucket) == written and len(written) == 7
  assert status(bucket) == 'finished'

  machine('two')
  with running(url) as other:
    assert other != folder and files(other) == written
    found = sorted(other.rglob('results.json'), key=os.path.getmtime)
    assert [p.parent.name for p in found] == ['b', 'a', 'c']
    seal(other / '1_a' / 'checkpoints' / '8', 'eight')
    shutil.rmtree(other / '1_a' / 'checkpoints' / '4')
    (other / 'a' / 'results.json').unlink()

  machine('one')
  with running(url) as folder:
    assert files(folder) == files(bucket) == files(other)
    assert not (folder / 'a').exists()  # an empty one may mean something
    assert sealed_content(folder / '1_a' / 'checkpoints' / '8') == 'eight'


def test_a_sealed_folder_is_fetched_once(url, machine, monkeypatch):
  with running(url) as folder:
    seal(folder / 'model', 'network')
    write_json(folder / 'results.json', [])
  got, get = [], Remote.get

  def noted(self, name, path):
    got.append(name)
    get(self, name, path)

  monkeypatch.setattr(Remote, 'get', noted)
  with running(url):
    pass
  assert sorted(got) == ['results.json', 'run.json']
  (folder / 'model' / 'state' / '_METADATA').write_text('netwOrk')
  with running(url):
    pass
  assert 'model/state/_METADATA' in got and len(got) == 2 + 2 + 4
  assert sealed_content(folder / 'model') == 'network'


def test_changes_follow_while_a_run_goes_on(url, bucket, machine, quick):
  with running(url) as folder:
    until(lambda: (bucket / workdir.RUN).exists())
    until(lambda: status(bucket) == 'running')
    write_json(folder / 'results.json', [1])
    until((bucket / 'results.json').exists)
    last = (bucket / workdir.RUN).stat().st_mtime_ns
    until(lambda: (bucket / workdir.RUN).stat().st_mtime_ns > last)
    with pytest.raises(UserError, match='WORKDIR: .*no work directory'):
      with mirror.copied(url, 'WORKDIR', lambda name: name == 'nothing'):
        pass


class Killed(BaseException):
  pass


@pytest.fixture
def kill_at(monkeypatch):
  """Makes the n-th operation that changes the storage the last one."""
  state = {'done': 0, 'stop': 0}

  def counted(name):
    original = getattr(Remote, name)

    def operation(self, *arguments):
      state['done'] += 1
      if state['stop'] and state['done'] >= state['stop']:
        raise Killed
      return original(self, *arguments)

    monkeypatch.setattr(Remote, name, operation)

  for name in ('write', 'put', 'remove'):
    counted(name)

  def arm(stop):
    state.update(done=0, stop=stop)

  return arm


def begun(url):
  """A mirror whose turns are those of the test."""
  one = mirror._Mirror(url, '--workdir', workdir.RUN, True, lambda _: True)
  one.pull()
  claim = {'status': 'running', 'host': 'here', 'process': time.monotonic_ns()}
  write_json(one.folder / workdir.RUN, claim)
  one.beat()
  return one


def an_epoch(folder):
  """What a run may do between two pushes, in its order."""
  write_json(folder / 'metrics.jsonl', [2])
  seal(folder / 'best', 'second')
  seal(folder / 'checkpoints' / '12', 'twelve')
  for step in ('4', '8'):
    shutil.rmtree(folder / 'checkpoints' / step)
  write_json(folder / 'results.json', ['second'])
  seal(folder / 'model', 'last')


def test_a_push_may_end_anywhere(url, bucket, machine, kill_at, monkeypatch):
  """[35] Who goes on elsewhere finds folders whole or not sealed, and nothing
  sealed before what it builds on; who goes on here loses nothing."""
  monkeypatch.setattr(workdir, '_SILENCE', 0.0)  # the dead are known to be
  for stop in range(1, 60):
    machine(f'one-{stop}')
    shutil.rmtree(bucket, ignore_errors=True)
    kill_at(0)
    one = begun(url)
    write_json(one.folder / 'metrics.jsonl', [1])
    seal(one.folder / 'best', 'first')
    for step in ('4', '8'):
      seal(one.folder / 'checkpoints' / step, step)
    one.push()
    before = files(bucket)
    an_epoch(one.folder)
    kill_at(stop)
    killed = False
    try:
      one.push()
      one.push()  # what is deleted here goes there at the second look
    except Killed:
      killed = True
    one.close()
    kill_at(0)
    wanted = files(one.folder)
    left = bucket.parent / f'left-{stop}'
    shutil.copytree(bucket, left)

    machine(f'two-{stop}')
    elsewhere = begun(url)
    folder = elsewhere.folder
    assert files(folder) == files(left)
    found = {}
    for name in ('best', 'model', 'checkpoints/8', 'checkpoints/12'):
      if manifest.is_sealed(epath.Path(folder / name)):
        found[name] = sealed_content(folder / name)
    assert 'checkpoints/8' in found or 'checkpoints/12' in found
    assert found.get('best', 'second') in ('first', 'second')
    if 'checkpoints/12' in found:
      assert found['best'] == 'second'
    if 'model' in found:
      assert 'checkpoints/12' in found
    for name in ('metrics.jsonl', 'results.json'):
      if (folder / name).exists():
        json.loads((folder / name).read_text())
    elsewhere.close()

    if killed:
      machine(f'one-{stop}')
      shutil.rmtree(bucket)
      shutil.copytree(left, bucket)
      again = begun(url)
      assert files(again.folder) == wanted
      again.push()
      again.push()
      again.close()
    assert wanted.items() <= files(bucket).items() and wanted != before
    more = files(bucket).keys() - wanted.keys()  # of what was being deleted
    assert all(re.match('checkpoints/[48]/', name) for name in more)
    assert not any(name.endswith(manifest.MANIFEST) for name in more)
    if not killed:
      break
  assert stop == 25


def test_a_folder_that_is_replaced_meanwhile_is_not_sealed(
  url, bucket, machine, monkeypatch
):
  one = begun(url)
  seal(one.folder / 'best', 'first')
  put = Remote.put

  def and_then(self, name, path):
    put(self, name, path)
    if name == 'best/model.json':
      monkeypatch.setattr(Remote, 'put', put)
      seal(one.folder / 'best', 'second')
      seal(one.folder / 'checkpoints' / '8', 'eight')

  monkeypatch.setattr(Remote, 'put', and_then)
  one.push()
  assert not (bucket / 'best' / manifest.MANIFEST).exists()
  one.push()
  one.push()
  one.close()
  assert sealed_content(bucket / 'best') == 'second'
  assert files(bucket) == files(one.folder)


@pytest.fixture
def away(monkeypatch):
  """Switches the storage off and on."""
  switch = threading.Event()

  def flaky(original):
    def operation(*arguments):
      if switch.is_set():
        raise OSError(f'503 service unavailable {time.monotonic_ns()}')
      return original(*arguments)

    return operation

  for name in ('write', 'put', 'remove'):
    monkeypatch.setattr(Remote, name, flaky(getattr(Remote, name)))
  return switch


def test_storage_that_is_away_for_a_while(
  url, bucket, machine, quick, away, capfd
):
  with running(url) as folder:
    until((bucket / workdir.RUN).exists)
    away.set()
    write_json(folder / 'results.json', [1])
    time.sleep(0.5)
    away.clear()
    until((bucket / 'results.json').exists)
  told = capfd.readouterr().err.count('warning: ')
  assert 1 <= told <= 2  # by each of the two that have tried


def test_what_did_not_get_there_is_kept(
  url, bucket, machine, quick, away, capfd
):
  def fails(message):
    with pytest.raises(RunFailed, match='503') as failed:
      with running(url) as folder:
        until((bucket / workdir.RUN).exists)
        until(lambda: status(bucket) == 'running')
        away.set()
        write_json(folder / 'results.json', [message])
        raise UserError('a mistake')
    away.clear()
    assert str(folder) in str(failed.value)
    assert 'the run had ended: a mistake' in str(failed.value)
    assert not (bucket / 'results.json').exists()
    return folder

  folder = fails('first')
  bucket.joinpath('beside').mkdir()
  bucket.joinpath('beside', 'results.json').write_text('[0]')
  with running(url):
    assert json.loads((folder / 'results.json').read_text()) == ['first']
  assert 'goes on from' in capfd.readouterr().err
  assert json.loads((bucket / 'results.json').read_text()) == ['first']
  assert (bucket / 'beside' / 'results.json').exists()

  (bucket / 'results.json').unlink()
  folder = fails('second')
  machine('two')
  write_json(bucket / workdir.RUN, {'status': 'finished', 'host': 'other'})
  with running(url) as other:
    assert not (other / 'results.json').exists()
    write_json(other / 'results.json', ['third'])
  machine('one')
  with running(url):
    assert json.loads((folder / 'results.json').read_text()) == ['third']
  said = capfd.readouterr().err
  aside = folder.with_name(f'{folder.name}.1')
  assert f'kept in {aside}' in said
  assert json.loads((aside / 'results.json').read_text()) == ['second']


def test_one_run_a_place(url, bucket, machine, quick, monkeypatch):
  """[36] On this machine at once; of another while it gives signs of life."""
  with running(url):
    with pytest.raises(UserError, match='--workdir: .*is in use by process'):
      with running(url):
        pass
    until(lambda: (bucket / workdir.RUN).exists() and status(bucket))
    machine('two')
    monkeypatch.setattr(workdir, '_SILENCE', 4.0)
    with pytest.raises(UserError, match=socket.gethostname()):
      with running(url):
        pass
  write_json(bucket / workdir.RUN, {'status': 'running', 'host': 'tpu-7'})
  monkeypatch.setattr(workdir, '_SILENCE', 2.0)
  began = time.monotonic()
  with running(url):
    assert 1 < time.monotonic() - began < 10
  assert status(bucket) == 'finished'


def test_who_waits_for_the_dead_can_be_stopped(
  url, bucket, machine, monkeypatch
):
  write_json(bucket / workdir.RUN, {'status': 'running', 'host': 'tpu-7'})
  monkeypatch.setattr(interruption._State, 'number', signal.SIGTERM)
  with pytest.raises(interruption.Interrupted):
    with running(url):
      pass


def test_who_was_taken_for_dead_stops(
  url, bucket, machine, quick, monkeypatch, capfd
):
  monkeypatch.setattr(interruption._State, 'number', None)
  other = {'status': 'running', 'host': 'tpu-7', 'process': 3}
  with pytest.raises(RunFailed, match='taken over by process 3 on tpu-7'):
    with running(url) as folder:
      until((bucket / workdir.RUN).exists)
      write_json(bucket / workdir.RUN, other)
      until(interruption.requested)
      write_json(folder / 'results.json', [1])
      interruption.check()
  assert json.loads((bucket / workdir.RUN).read_text()) == other
  assert not (bucket / 'results.json').exists()
  assert (folder / 'results.json').exists()


def test_a_copy_that_was_deleted_is_no_truth(
  url, bucket, machine, quick, monkeypatch
):
  with running(url) as folder:
    seal(folder / '1_a' / 'model', 'a')
    until((bucket / '1_a' / 'model' / manifest.MANIFEST).exists)
    killed = json.loads((bucket / workdir.RUN).read_text())
  write_json(bucket / workdir.RUN, killed)
  unpushed = folder.with_name(folder.name + '.unpushed')
  unpushed.write_bytes((bucket / workdir.RUN).read_bytes())
  shutil.rmtree(folder)
  monkeypatch.setattr(workdir, '_SILENCE', 0.0)
  with running(url) as folder:
    assert sealed_content(folder / '1_a' / 'model') == 'a'
  assert sealed_content(bucket / '1_a' / 'model') == 'a'
  assert not unpushed.exists()


def test_a_copy_deleted_meanwhile_empties_nothing(
  url, bucket, machine, quick, monkeypatch
):
  monkeypatch.setattr(interruption._State, 'number', None)
  with pytest.raises(RunFailed) as failed, running(url) as folder:
    seal(folder / '1_a' / 'model', 'a')
    until((bucket / '1_a' / 'model' / manifest.MANIFEST).exists)
    shutil.rmtree(folder)
    until(interruption.requested)
    interruption.check()
  assert str(failed.value).startswith(
    f'{folder}: was deleted while in use; {url} is left as it is; the run had '
  )
  assert sealed_content(bucket / '1_a' / 'model') == 'a'
  monkeypatch.setattr(interruption._State, 'number', None)
  monkeypatch.setattr(workdir, '_SILENCE', 0.0)
  with running(url) as folder:
    assert sealed_content(folder / '1_a' / 'model') == 'a'


def test_a_copy_being_deleted_empties_nothing(url, bucket, machine):
  """The claim's file may be the last that goes."""
  one = begun(url)
  seal(one.folder / 'model', 'a')
  one.push()
  shutil.rmtree(one.folder / 'model')
  one.push()
  (one.folder / workdir.RUN).unlink()
  with pytest.raises(RunFailed, match='was deleted while in use'):
    one.push()
  one.close()
  assert sealed_content(bucket / 'model') == 'a'


@pytest.mark.parametrize('all_of_it', [False, True])
def test_a_cleaner_of_caches_empties_no_model(url, bucket, machine, all_of_it):
  one = begun(url)
  seal(one.folder / 'model', 'a')
  one.push()
  for path in (one.folder / 'model').rglob('*'):
    if path.is_file() and (all_of_it or path.name == '_METADATA'):
      path.unlink()
  one.push()
  one.push()
  assert sealed_content(bucket / 'model') == 'a'
  shutil.rmtree(one.folder / 'model')  # as the run itself would
  one.push()
  one.push()
  one.close()
  assert not (bucket / 'model').exists() or not files(bucket / 'model')


@pytest.mark.parametrize(
  'harm', [lambda p: p.write_text(''), pathlib.Path.unlink]
)
def test_what_is_damaged_there_is_mended(url, bucket, machine, harm, capfd):
  with running(url) as folder:
    seal(folder / '1_a' / 'model', 'a')
  harm(bucket / '1_a' / 'model' / 'state' / '_METADATA')
  with running(url) as folder:
    assert sealed_content(folder / '1_a' / 'model') == 'a'
  assert sealed_content(bucket / '1_a' / 'model') == 'a'
  assert '_METADATA is damaged there, and whole here' in capfd.readouterr().err


def test_what_is_deleted_meanwhile_is_put_there_again(
  url, bucket, machine, quick
):
  with running(url) as folder:
    seal(folder / '1_a' / 'model', 'a')
    write_json(folder / 'config.json', {})
    until((bucket / '1_a' / 'model' / manifest.MANIFEST).exists)
    shutil.rmtree(bucket)
    until((bucket / '1_a' / 'model' / manifest.MANIFEST).exists)
    until((bucket / workdir.RUN).exists)
    (bucket / 'config.json').unlink()  # seen in the end
  assert sealed_content(bucket / '1_a' / 'model') == 'a'
  assert (bucket / 'config.json').exists()


def test_whoever_was_taken_over_while_it_slept_seals_nothing(
  url, bucket, machine, monkeypatch
):
  monkeypatch.setattr(interruption._State, 'number', None)
  with pytest.raises(RunFailed, match='taken over'), running(url) as folder:
    until((bucket / workdir.RUN).exists)
    seal(folder / '1_a' / 'model', 'a')
    write_json(bucket / workdir.RUN, {'status': 'running', 'host': 'tpu-7'})
    # No sign of life has looked since.
    monkeypatch.setattr(mirror._Mirror, 'beat', lambda self: None)
  assert not (bucket / '1_a' / 'model' / manifest.MANIFEST).exists()


def test_mistakes_name_the_place_not_its_copy(url, machine):
  with pytest.raises(UserError, match=re.escape(f'delete {url}/1_a')):
    with running(url) as folder:
      raise UserError(f'delete {folder}/1_a')


def test_a_place_that_can_not_be(url, bucket, machine, monkeypatch):
  def refused(place, wanted, **keywords):
    with pytest.raises(UserError, match=wanted) as told:
      with mirror.mirrored(place, '--workdir', **keywords):
        pass
    assert str(told.value).startswith('--workdir: ')
    assert '\n' not in str(told.value) and place in str(told.value)

  refused('memory://bucket/run', 'keeps nothing')
  refused('nope://bucket/run', 'wanted a folder of this machine, gs://')
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  refused('gs://bucket/run', r"wants pip install 'rocl-jax\[gcs\]'")
  refused('file://', 'wanted a bucket')
  refused(url, 'nothing is there', begins=False)
  bucket.mkdir(parents=True)
  (bucket / 'photo.jpg').write_text('')
  refused(url, 'holds files and no run.json')
  refused(f'{url}/photo.jpg/run', 'Error: ')  # as a missing bucket
  (bucket / 'photo.jpg').unlink()

  def forbidden(*_):
    raise PermissionError('403 Forbidden')

  with monkeypatch.context() as patch:
    patch.setattr(Remote, 'write', forbidden)
    refused(url, '403 Forbidden')

  def strange(self, *_, **__):
    return {f'{bucket}/../../etc': {'type': 'file', 'size': 3}}

  monkeypatch.setattr(
    'fsspec.implementations.local.LocalFileSystem.find', strange
  )
  refused(url, 'is no name of a file')


def test_only_local_folders_to_start_from():
  config = quickstart.get_config()
  config.init_from = 'gs://bucket/run/1_pretrain/model'
  with pytest.raises(UserError, match='config.init_from: .*gs://bucket'):
    parse_experiment(config)
  with pytest.raises(UserError, match='surrogates: .*of this machine'):
    saved.load('gs://bucket/model', 'config.transfer.surrogates')


def test_an_evaluation_takes_what_it_needs(url, bucket, machine):
  stage = bucket / '4_finetune'
  for name in ('model', 'best_test', 'checkpoints/8', 'damaged/4'):
    seal(stage / name, name)
  write_json(stage / 'results.json', [])
  (stage / 'metrics.jsonl').write_text('')
  config = eval_config.get_config('quick')
  values = config.copy_and_resolve_references().to_dict()
  settings = parse(evaluate.Settings, values, 'config')
  place = f'{url}/4_finetune'
  with contextlib.ExitStack() as mirrors:
    one, other, local = evaluate._local_folders(
      [f'{place}/model', f'{place}/best_test/', 'here/model'], settings, mirrors
    )
    folder = pathlib.Path(one).parent
    assert local == 'here/model' and other == f'{folder}/best_test'
    assert {p.name for p in folder.iterdir()} == {
      *('model', 'best_test', 'results.json'),
    }
    with workdir.claim(epath.Path(folder), '--model', evaluate.CLAIM):
      write_json(folder / 'results.json', [1])
  assert json.loads((stage / 'results.json').read_text()) == [1]
  assert len(files(stage)) == 4 * 4 + 3
  with pytest.raises(UserError, match='--model: .*nothing is there'):
    with contextlib.ExitStack() as mirrors:
      evaluate._local_folders([f'{url}/5_none/model'], settings, mirrors)


@pytest.mark.slow  # a story of minutes
def test_a_run_goes_on_on_another_machine(tmp_path, url, bucket):
  """Stopped by SIGTERM, it ends as one that was never stopped, to the bit."""
  environment = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'programs'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
    'JAX_PLATFORMS': 'cpu',
  }

  def start(place, cache):
    return subprocess.Popen(
      [sys.executable, 'train.py', *SMALL, SHORT, f'--workdir={place}'],
      cwd=ROOT,
      env=environment | {'XDG_CACHE_HOME': str(tmp_path / cache)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def ended(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return output, errors

  stopped = start(url, 'one')
  for line in stopped.stderr:
    if 'epoch 2/4' in line:
      stopped.send_signal(signal.SIGTERM)
  assert stopped.wait(timeout=60) == 143
  assert status(bucket) == 'interrupted by SIGTERM'
  assert checkpoint.steps(epath.Path(bucket / '1_supervised/checkpoints'))
  output, errors = ended(start(url, 'two'))
  assert 'resumed at step' in errors and f'{url}/report.md' in output
  assert (bucket / 'report.md').read_text().startswith('# ')
  assert list((bucket / 'figures').glob('*.png'))

  straight = tmp_path / 'straight'
  ended(start(straight, 'three'))
  models = (
    checkpoint.load_model(epath.Path(root / '1_supervised' / 'model'))[0]
    for root in (bucket, straight)
  )
  assert_equal_trees(*models)
  states = (
    checkpoint.read_state(epath.Path(root / '1_supervised' / 'checkpoints'))
    for root in (bucket, straight)
  )
  assert_equal_trees(*states)
  rows = [
    [clockless(json.loads(line)) for line in path.read_text().splitlines()]
    for root in (bucket, straight)
    for path in [root / '1_supervised' / 'metrics.jsonl']
  ]
  assert rows[0] == rows[1]
  results = [
    [r['robust_top1'] for r in json.loads((root / 'results.json').read_text())]
    for root in (bucket, straight)
  ]
  assert results[0] == results[1]
  with report.opened(url) as folder:
    assert len(list(pathlib.Path(folder).rglob('model.json'))) == 1
