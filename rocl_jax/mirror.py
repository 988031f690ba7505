"""A work directory on cloud storage: a folder of this machine, kept the same.

  with mirrored('gs://bucket/run', '--workdir') as folder:
    ...                                  # plain files; a plain path stays one

The storage is the truth: what differs is fetched when a run begins, and what
is not there goes, but for sealed folders that are whole here and damaged there:
those are mended. Only if the last run here ended before all was there, its
folder still says so, and nobody has held the place since, the local folder is
the truth; if somebody has, it is set aside under another name.

While a run goes on its files follow every few seconds, in the order in which
they were written. A manifest goes after all that it seals, in the order of
manifests, and before a sealed folder is overwritten or deleted its manifest
is deleted: whoever fetches at any moment finds a folder whole, or not sealed.
The file of `workdir.claim` goes first, and again and again: it says who holds
the place. Who reads there what another has written pushes nothing any more, and
before each manifest he looks. What is deleted there meanwhile is put there
again. What somebody deletes here meanwhile stays there: where the claim's file
is gone here, so may be all, and the run ends.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import pathlib
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from rocl_jax import interruption, manifest, processes, workdir
from rocl_jax.errors import RunFailed, Unreadable, UserError, of_disk, shown
from rocl_jax.files import cache_folder, exists, is_remote, reading
from rocl_jax.manifest import MANIFEST, Damaged
from rocl_jax.progress import say, warn
from rocl_jax.remote import Remote, told

_TURN = 15.0  # seconds between pushes, and between signs of life
_FIRST = 1.0  # second after which the first sign of life goes
_PAUSES = (1.0, 2.0, 4.0)  # seconds before a failed last push is tried again
_AT_A_TIME = 8  # files that are fetched together
_HALF_MADE = ('.new', '.writing', '.old')

Stats = dict[str, tuple[int, int]]  # bytes and time in ns, by name
Wanted = Callable[[str], bool]


@contextlib.contextmanager
def mirrored(
  place: str,
  field: str,
  claim: str = workdir.RUN,
  begins: bool = True,
  wanted: Wanted = lambda _: True,
) -> Iterator[str]:
  """The folder to work in: of a URL its copy, which the first process keeps.

  Args:
    place: a path, which is given back as it is, or a URL.
    field: where the user named it, for messages.
    claim: the file by which `workdir.claim` will hold the folder.
    begins: whether there may be nothing yet; what is there must then have
      that file. Otherwise something must be there.
    wanted: of a name, whether the file belongs to the copy.

  Raises:
    UserError: the place can not be reached or written, or is held.
    RunFailed: not all could be fetched, or pushed in the end; the message says
      where it is kept.
  """
  if not is_remote(place):
    yield place
    return
  here: list[_Mirror] = []
  folder = ''

  def begin() -> str:
    here.append(_Mirror(place, field, claim, begins, wanted))
    return str(here[0].folder)

  try:
    folder = processes.from_first(begin)
    # Two turns: the others wait for one no longer than `processes.STALL`.
    processes.from_first(lambda: here[0].pull())
    if here:
      with here[0].kept():
        yield folder
    else:
      yield folder
  except Unreadable:
    raise  # of the copy
  except (UserError, RunFailed) as e:
    if not folder or place in str(e):
      raise
    # What there is to be done is done there, not to the copy.
    raise type(e)(str(e).replace(folder, place.rstrip('/'))) from None
  finally:
    for one in here:
      one.close()


@contextlib.contextmanager
def copied(place: str, field: str, wanted: Wanted) -> Iterator[str]:
  """A folder to read now: of a URL a copy that goes, while what is written to
  it stays there. Nothing is claimed. The arguments are those of `mirrored`.

  Raises:
    UserError: nothing can be read, or what was written can not be put there.
  """
  if not is_remote(place):
    yield place
    return
  remote = Remote(place, field)
  with tempfile.TemporaryDirectory(prefix='rocl_jax') as base:
    folder = pathlib.Path(base) / remote.url.rpartition('/')[2]
    with _mistakes(place, field):
      names = [name for name in remote.files() if wanted(name)]
      if not names:
        raise UserError(f'{field}: {place}: there is no work directory')
      _fetch(remote, folder, names)
    before = _stats(folder)
    yield str(folder)
    with _mistakes(place, field):
      for name, stat in _stats(folder).items():
        if before.get(name) != stat:
          remote.put(name, folder / name)


class _Mirror:
  """One place and its copy; see `mirrored`.

  Attributes:
    folder: the copy.
  """

  def __init__(
    self, place: str, field: str, claim: str, begins: bool, wanted: Wanted
  ):
    self._remote = Remote(place, field)
    self._url = url = self._remote.url
    self._field, self._claim, self._wanted = field, claim, wanted
    self._known: dict[str, tuple[int, int] | None] = {}  # what is there
    self._found = b''  # what the claim there said at first
    self._ours: set[bytes] = set()  # what it may say
    self._held = False  # whether it says that this process holds the place
    self._lost: str | None = None  # why this process can't hold it any more
    self._missed = False  # whether files were deleted there meanwhile
    self._gone: set[str] = set()  # what the last push found deleted here
    self._claiming = threading.RLock()  # the claim is read or written
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    tail = re.sub(r'[^\w.-]+', '-', url.partition('://')[2], flags=re.ASCII)
    self.folder = cache_folder() / f'{digest}-{tail[-40:].strip("-.")}'
    self._unpushed = self.folder.with_name(self.folder.name + '.unpushed')
    say(f'{url}: kept in {shown(self.folder)} while it is worked on')
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._lock = self.folder.with_name(self.folder.name + '.lock').open('w')
    except OSError as e:
      raise UserError(f'{field}: {of_disk(e)}') from None
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = workdir.parse(_content(self.folder / claim))
      raise workdir.held(url, field, holder) from None
    except OSError:  # a file system without locks
      pass
    try:
      with _mistakes(url, field):
        self._meet(begins)
    except BaseException:
      self.close()
      raise

  def _meet(self, begins):
    """Looks at the place, and waits until nobody holds it."""
    names = [name for name in self._remote.files() if self._belongs(name)]
    found = self._found = self._remote.read(self._claim) or b''
    if not (begins or names):
      raise UserError(f'{self._field}: {self._url}: nothing is there')
    if begins and names and not found:
      raise UserError(
        f'{self._field}: {self._url} holds files and no {self._claim}; wanted '
        'a new folder, or that of an earlier run'
      )
    probe = f'.{self._claim}.{socket.gethostname()}.{os.getpid()}'
    self._remote.write(probe, b'')
    there = self._remote.modified(probe)
    self._remote.remove(probe)
    self._skew, since = there - time.time(), there - time.monotonic()
    holder = workdir.parse(found)
    if holder.get('status') == 'running' and not self._was_ours():
      workdir.await_silence(
        self._url,
        self._field,
        holder,
        lambda: (time.monotonic() + since, self._remote.modified(self._claim)),
      )

  def _was_ours(self):
    """Whether nobody has held the place since a run here did not push all."""
    claim = _content(self.folder / self._claim)
    if not claim or not exists(self._unpushed):  # without one: deleted
      return False
    return self._found in (claim, _content(self._unpushed))

  def pull(self) -> None:
    """Makes the folder what the storage has; see the head of this file."""
    try:
      files = self._remote.files()
      names = {n for n in files if self._belongs(n)}
      ours = self._was_ours()
      if ours:
        say(
          f'{self._url}: goes on from {shown(self.folder)}, which was not all '
          'there'
        )
      else:
        self._set_aside()
      whole = _whole(self._remote, self.folder, names)
      if not ours:
        keep = names | whole
        _delete(self.folder, lambda n: self._wanted(n) and n not in keep)
        _fetch(self._remote, self.folder, names - whole, self._skew)
      here = self._stats()
      same = whole if ours else names
      sealed = tuple(f'{folder}/' for folder in _sealed([*names, *here]))
      # What others put beside it stays, such as an evaluation's results.
      self._known = {
        name: here.get(name) if name in same else None
        for name in names
        if name in here or name.startswith(sealed)
      }
      for name in whole & here.keys():
        if files.get(name) != here[name][0]:
          warn(f'{self._url}: {name} is damaged there, and whole here')
          self._known[name] = None
    except Unreadable:
      raise
    except Exception as e:
      raise RunFailed(f'{self._url}: could not be fetched: {told(e)}') from None
    self._known.pop(self._claim, None)
    self._before = _stat(self.folder / self._claim)
    self._ours = {self._found}

  def _set_aside(self):
    if not exists(self._unpushed):
      return
    if not exists(self.folder / self._claim):  # somebody deleted it
      self._unpushed.unlink()
      return
    names = (f'{self.folder.name}.{i}' for i in itertools.count(1))
    aside = next(p for p in map(self.folder.with_name, names) if not exists(p))
    self.folder.rename(aside)
    self.folder.mkdir()
    self._unpushed.unlink()
    say(
      f'{self._url}: others went on with it; what a run here did not get there '
      f'is kept in {shown(aside)}'
    )

  @contextlib.contextmanager
  def kept(self) -> Iterator[None]:
    """Pushes what changes while within, and all in the end."""
    ended = threading.Event()
    turns = [
      threading.Thread(target=self._repeat, args=(*turn, ended), daemon=True)
      for turn in ((self.beat, _FIRST), (self.push, _TURN))
    ]
    for thread in turns:
      thread.start()
    failed: BaseException | None = None
    try:
      yield
    except BaseException as e:
      failed = e
      raise
    finally:
      with processes.undisturbed():
        ended.set()
        for thread in turns:
          thread.join()
        self._finish(failed)

  def _repeat(self, function, pause, ended):
    failing = False
    while not ended.wait(pause):
      pause = _TURN
      try:
        function()
        failing = False
      except Exception as e:
        if not (failing or self._lost):  # once: each has a text of its own
          warn(f'{self._url}: {told(e)}; tried again every {_TURN:.0f} s')
        failing = True

  def _finish(self, failed):
    """The last push; `failed` is why the run ends, if it did not succeed."""
    for pause in (*_PAUSES, None):
      try:
        self._missed = True  # a last look at what is there
        for _ in range(2):  # one may find that something was just deleted
          self.beat()
          self.push()
        self.beat()
        break
      except Exception as e:
        if pause is None or self._lost:
          why = self._lost or f'{self._url}: {told(e)}'
          if exists(self.folder / self._claim):
            why += f'; what is not there is kept in {shown(self.folder)}'
          if failed:
            why += f'; the run had ended: {failed}'
          raise RunFailed(why) from None
        time.sleep(pause)
    if self._held:
      self._unpushed.unlink()

  def beat(self) -> None:
    """A sign of life, and a look at who holds the place."""
    self._check()
    path = self.folder / self._claim
    claimed, claim = _stat(path) != self._before, _content(path)
    if not claimed or not workdir.parse(claim):
      return  # not yet, or just being written
    with self._claiming:
      found = self._look()
      if self._lost:
        return
      if _content(self._unpushed) != found or not self._held:
        self._unpushed.write_bytes(found)
      self._ours.add(claim)  # before: a write that seems to fail may not have
      self._remote.write(self._claim, claim)
      self._held = True

  def _look(self) -> bytes:
    """What the claim there says; whether it is another's is kept in mind."""
    with self._claiming:
      found = self._remote.read(self._claim) or b''
    if self._held and not found:
      warn(f'{self._url}: was deleted; what is here is put there again')
      self._held, self._missed = False, True
      self._ours.add(b'')
    elif found not in self._ours and not self._lost:
      who = workdir.parse(found)
      self._lose(
        f'{self._url}: was taken over by process {who.get("process", "?")} on '
        f'{who.get("host", "?")}'
      )
    return found

  def _lose(self, why):
    self._lost = why
    say(f'{why}; stopping')
    interruption.request()

  def push(self) -> None:
    """Makes the storage what the folder is now, for whom the place is held.

    Raises:
      RunFailed: another run holds it, or the folder was deleted.
      Exception: whatever the storage raises; the next push goes on.
    """
    self._check()
    if not self._held:
      return
    if self._missed:
      there = self._remote.files()
      self._missed = False
      self._known = {n: s for n, s in self._known.items() if n in there}
    now = self._snapshot()
    new = [n for n in now if self._known.get(n) != now[n]]
    new.sort(key=lambda name: (now[name][1], name))
    seals = [name for name in new if _is_manifest(name)]
    for name in seals:
      if name in self._known:
        self._remove(name)
    for name in new:
      if not _is_manifest(name):
        self._put(name, now[name])
    for name in seals:
      if not self._seal(name, now[name]):
        return  # what is sealed later may build on it, and waits, too
    gone = {
      name
      for name in self._known
      if not exists(self.folder / name) and not self._torn(name)
    }
    # At the second look: somebody may be deleting all, and the claim's file
    # last.
    old = gone & self._gone
    for name in sorted(old, key=lambda name: (not _is_manifest(name), name)):
      self._remove(name)
    self._gone = gone - old

  def _torn(self, name):
    """Whether a file is missing in a sealed folder: runs delete those whole."""
    for inside in _sealed(self._known):
      folder = self.folder / inside
      if name.startswith(f'{inside}/') and exists(folder):
        try:
          files = manifest.read(epath.Path(folder))['files']
        except Damaged:
          return True
        return name.removeprefix(f'{inside}/') in files
    return False

  def _snapshot(self):
    """All files at one moment: two looks that see the same."""
    now: Stats = {}
    for _ in range(100):
      before, now = now, self._stats()
      if before == now:
        break
    return now

  def _put(self, name, stat):
    self._check()
    try:
      self._remote.put(name, self.folder / name)
    except FileNotFoundError:
      if exists(self.folder / name):
        raise
      return  # it was replaced or deleted meanwhile: next time
    self._known[name] = stat

  def _seal(self, name, stat):
    """Pushes a manifest if all that it seals is there; whether it is."""
    self._look()
    self._check()
    path = self.folder / name
    content = _content(path)
    inside = name.removesuffix(MANIFEST)
    there = all(
      self._known.get(inside + n) == s
      for n, s in _stats(path.parent).items()
      if n != MANIFEST and self._wanted(inside + n)
    )
    # In this order: nothing was put in the folder's place while it was read.
    if not there or _stat(path) != stat:
      return False
    self._remote.write(name, content)
    self._known[name] = stat
    return True

  def _remove(self, name):
    if _is_manifest(name):
      self._look()
    self._check()
    self._remote.remove(name)
    del self._known[name]

  def _check(self):
    here = self.folder / self._claim
    if self._held and not self._lost and not exists(here):
      self._lose(
        f'{shown(self.folder)}: was deleted while in use; {self._url} is left '
        'as it is'
      )
    if self._lost:
      raise RunFailed(self._lost)

  def _stats(self):
    return {
      name: stat
      for name, stat in _stats(self.folder).items()
      if self._belongs(name) and name != self._claim
    }

  def _belongs(self, name):
    """Whether it is wanted, and no probe of a folder or a clock."""
    probe = name.startswith((f'.{self._claim}.', '.writable-'))
    return self._wanted(name) and not probe

  def close(self) -> None:
    """Lets others of this machine have the folder."""
    self._lock.close()


def _fetch(
  remote: Remote, folder: pathlib.Path, names: Iterable[str], skew: float = 0
) -> None:
  """Copies files here, with their times by this machine's clock."""

  def get(name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      remote.get(name, path)
      at = remote.modified(name) - skew
    except FileNotFoundError:  # deleted meanwhile
      path.unlink(missing_ok=True)
    else:
      os.utime(path, (at, at))

  with ThreadPoolExecutor(_AT_A_TIME) as pool:
    list(pool.map(get, names))


def _whole(
  remote: Remote, folder: pathlib.Path, names: Iterable[str]
) -> set[str]:
  """Local files that need not be fetched: whole, under the same manifest."""
  here = _stats(folder)
  whole = set()
  for inside in _sealed(n for n in names if n in here):
    seal = f'{inside}/{MANIFEST}'
    if remote.read(seal) == _content(folder / seal):
      with contextlib.suppress(Damaged):
        manifest.verify(epath.Path(folder / inside))
        whole |= {n for n in here if n.startswith(f'{inside}/')}
  return whole


def _sealed(names: Iterable[str]) -> list[str]:
  return [n.rpartition('/')[0] for n in names if _is_manifest(n)]


def _is_manifest(name: str) -> bool:
  return name.endswith(f'/{MANIFEST}')


def _delete(folder: pathlib.Path, unwanted: Wanted) -> None:
  """Deletes files by name, and the folders that are empty then."""
  for base, _, files in os.walk(folder, topdown=False):
    for file in files:
      path = pathlib.Path(base) / file
      if unwanted(path.relative_to(folder).as_posix()):
        path.unlink()
    if base != str(folder) and not os.listdir(base):
      os.rmdir(base)


def _stats(folder: pathlib.Path) -> Stats:
  """Every file below a folder that is not half-made."""
  found = {}

  def failed(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # deleted meanwhile
      raise error

  for base, folders, files in os.walk(folder, onerror=failed):
    folders[:] = [n for n in folders if not n.endswith(_HALF_MADE)]
    for file in files:
      path = pathlib.Path(base) / file
      stat = _stat(path)
      if stat is not None and not file.endswith(_HALF_MADE):
        found[path.relative_to(folder).as_posix()] = stat
  return found


def _stat(path: pathlib.Path) -> tuple[int, int] | None:
  with reading(path):
    try:
      stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
      return None
  return stat.st_size, stat.st_mtime_ns


def _content(path: pathlib.Path) -> bytes:
  with reading(path):
    try:
      return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
      return b''


@contextlib.contextmanager
def _mistakes(url: str, field: str) -> Iterator[None]:
  """What goes wrong within is told in one line, as the user's mistake."""
  try:
    yield
  except (UserError, RunFailed):
    raise
  except Exception as e:
    raise UserError(f'{field}: {url}: {told(e)}') from None
