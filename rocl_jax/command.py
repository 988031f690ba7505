"""The front door of every command: parse, check, run, say what went wrong.

Exit status: 0 done; 2 a mistake of the user, told in one line; 3 a run or an
evaluation that failed its own checks; 130 interrupted by SIGINT, 143 by
SIGTERM; anything else is a bug of ours and comes with its stack trace.
"""

import ast
import contextlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NoReturn

from absl import flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from rocl_jax.errors import (
  RunFailed,
  UserError,
  nearest,
  of_disk,
  one_line,
  shown,
)
from rocl_jax.files import place
from rocl_jax.interruption import Interrupted

BUG, USER_ERROR, RUN_FAILED, INTERRUPTED = 1, 2, 3, 130


def define_config() -> None:
  """Defines --config, a config file whose fields --config.FIELD overrides."""
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Config file, with an argument after a colon if it has one.',
    sys_argv=_ARGV,
  )


def define_path(name: str, default: str | None, text: str) -> None:
  """Defines a flag that is a path, or a URL; see `files.place`."""
  flags.DEFINE(_PathParser(), name, default, text)


class _PathParser(flags.ArgumentParser):
  """Makes a path absolute as the flag is read."""

  def parse(self, argument):
    try:
      return place(argument)
    except UserError as e:
      raise ValueError(e) from None

  def flag_type(self):
    return 'path'


def run(
  main: Callable[[list[str]], None],
  usage: str,
  required: Sequence[str] = (),
  positional: Collection[int] = (0,),
  default_config: str | None = None,
) -> None:
  """Runs a command and exits with its status.

  Args:
    main: gets the positional arguments; reads flags from `flags.FLAGS`.
    usage: what --help prints.
    required: names of flags that must be given.
    positional: how many positional arguments there may be.
    default_config: what --config is where it is not given.
  """
  program = _program(sys.argv[0])
  logging.set_verbosity(logging.ERROR)  # Orbax warns of what we tell ourselves
  try:
    if '--help' in sys.argv[1:] or '-h' in sys.argv[1:]:
      print(usage.strip())
      sys.exit(0)
    argv = sys.argv
    if default_config is not None and _config_path(argv) is None:
      argv = [argv[0], f'--config={default_config}', *argv[1:]]
    arguments = _parse(argv)
    for name in required:
      if flags.FLAGS[name].value in (None, ''):
        raise UserError(f'--{name}: missing (--help says more)')
    if len(arguments) not in positional:
      found = ' '.join(arguments) or 'none'
      raise UserError(
        f'found arguments: {found}; wanted '
        f'{" or ".join(map(str, positional))} (--help says more)'
      )
    main(arguments)
  except UserError as e:
    _exit(program, str(e), USER_ERROR)
  except RunFailed as e:
    _exit(program, str(e), RUN_FAILED)
  except Interrupted as e:
    _exit(program, f'{e}: saved; the same command goes on', e.status)
  except KeyboardInterrupt:
    again = 'interrupted; the same command goes on from the last save'
    _exit(program, again, INTERRUPTED)
  except BrokenPipeError:  # who read the table has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except OSError as e:  # of a disk, or a network: full, away, not ours
    if e.errno is None:
      _bug(program, e)
    network = isinstance(e, ConnectionError | TimeoutError)
    gone = _gone() if network else None
    _exit(program, gone or of_disk(e), RUN_FAILED)
  except Exception as e:
    if 'RESOURCE_EXHAUSTED' in str(e):
      reason = str(e).splitlines()[0]
      _exit(
        program,
        'out of memory: a smaller batch_size (of the stage, or of eval), or '
        f'--config.model.dtype=bfloat16, needs less: {reason:.200}',
        RUN_FAILED,
      )
    _bug(program, e)


def _bug(program: str, error: Exception) -> NoReturn:
  """Ends with a stack trace, unless another process is why."""
  if gone := _gone():
    _exit(program, gone, RUN_FAILED)
  group = sys.modules.get('rocl_jax.processes')
  if group and group.count() > 1:
    traceback.print_exception(error)
    group.leave(BUG, f'{type(error).__name__}: {error}')
  raise error


def _gone() -> str | None:
  """Which other process is gone, where that is why something failed."""
  group = sys.modules.get('rocl_jax.processes')
  return group.explain() if group else None


def _program(path):
  """What the user started: of a package's __main__ the package."""
  folder, name = os.path.split(path)
  return os.path.basename(folder) if name == '__main__.py' else name


def _exit(program: str, message: str, status: int) -> NoReturn:
  line = ' '.join(message.split())
  with contextlib.suppress(OSError, ValueError):  # nobody may listen any more
    print(f'\n{program}: {line}'.lstrip(), file=sys.stderr, flush=True)
  group = sys.modules.get('rocl_jax.processes')
  if group:
    group.leave(status, line)
  # Not sys.exit: threads that still save or compile must not hold us up.
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
  if status > 128:
    os._exit(status)
  sys.exit(status)


def _parse(argv):
  """Parses the flags; returns the positional arguments."""
  path = _config_path(argv)
  if path is not None:
    _check_config_file(path.partition(':')[0])
    _find_neighbours(path)
  argv = _ARGV[:] = _normal(argv, path)
  with _tolerant():
    try:
      arguments = flags.FLAGS(argv)[1:]
      if path is not None:
        # config_flags keeps the error of a file that fails until it is used.
        getattr(flags.FLAGS.config, 'lock', None)
      return arguments
    except Exception as e:  # what config_flags raises depends on the mistake
      problem = _explain(argv, path)
      if path is None and any(x.startswith('--config.') for x in argv):
        problem = '--config: missing; --config.FIELD=VALUE overrides its fields'
      if problem is None:
        problem = one_line(e).removeprefix('FATAL Flags parsing error: ')
        if not isinstance(e, flags.Error):
          problem = f'{type(e).__name__}: {problem}'
      raise UserError(problem) from None


# What config_flags looks for overrides in.
_ARGV: list[str] = []


@contextlib.contextmanager
def _tolerant() -> Iterator[None]:
  """As ml_collections uses what is deprecated, and that is nobody's mistake."""
  with warnings.catch_warnings():
    for kind in (DeprecationWarning, PendingDeprecationWarning):
      warnings.simplefilter('ignore', kind)
    yield


def _config_path(argv):
  """What --config says, the file's path absolute; None without one."""
  found = []
  for i, argument in enumerate(argv):
    match = re.fullmatch(r'--?config=(.*)', argument, re.S)
    if match:
      found.append(match.group(1))
    elif argument in ('--config', '-config') and i + 1 < len(argv):
      found.append(argv[i + 1])
  if len(found) > 1:
    for one in found:
      _check_config_file(one.partition(':')[0])
    raise UserError(
      f'--config: found {len(found)} times, {" and ".join(found)}; wanted '
      'once, and --config.FIELD=VALUE for what differs'
    )
  if not found:
    return None
  file, colon, argument = found[0].partition(':')
  with _at('--config'):
    path = place(file)
  # What is before a colon is the file, to ml_collections, too.
  return (file if ':' in path else path) + colon + argument


@contextlib.contextmanager
def _at(field: str) -> Iterator[None]:
  """Puts the field's name before what is wrong with its value."""
  try:
    yield
  except UserError as e:
    raise UserError(f'{field}: {e}') from None


def _normal(argv, path):
  """The arguments as config_flags takes them: the file before the overrides,
  and names that are no words of Python in brackets."""
  rest, given = [], iter(argv[1:])
  for argument in given:
    if argument in ('--config', '-config'):
      next(given, None)
    elif not re.match(r'--?config=', argument):
      rest.append(_bracketed(argument))
  file = [] if path is None else [f'--config={path}']
  return [argv[0], *file, *rest]


def _bracketed(argument):
  """--config.attacks.fab-t.steps=1 as --config.attacks["fab-t"].steps=1."""
  match = re.match(
    r'(--?(?:no)?config)((?:\.[\w-]+|\[[^]=]*\])+)(=|$)', argument
  )
  if not match:
    return argument
  start, name, _ = match.groups()
  name = re.sub(r'\.([\w-]*-[\w-]*)', r'["\1"]', name)
  name = re.sub(r'\.(\d\w*)', r'["\1"]', name)
  return start + name + argument[match.end(2) :]


def _check_config_file(file):
  if not os.path.isfile(file):
    folder = os.path.dirname(file) or '.'
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = sorted(x for x in names if x.endswith('.py'))
    # By the stem: all end alike.
    stem = os.path.basename(file).removesuffix('.py')
    hint = nearest(stem, [name[:-3] for name in names])
    hint = hint.replace("'?)", ".py'?)")
    if not hint and names:
      hint = f'; that folder has {", ".join(names)}'
    raise UserError(f'--config: no such file: {shown(file)}{hint}')


def _find_neighbours(path):
  """Makes `from configs import NAME` mean the neighbours of a config file that
  lies in a folder `configs`, and else ours, whatever else has that name."""
  folder = os.path.dirname(os.path.abspath(path.partition(':')[0]))
  sys.path.insert(0, os.path.dirname(folder))
  ours = os.path.join(os.path.dirname(__file__), os.pardir, 'configs')
  places = [os.path.realpath(ours)] if os.path.isdir(ours) else []
  if os.path.basename(folder) == 'configs':
    places = list(dict.fromkeys([os.path.realpath(folder), *places]))
  there = getattr(sys.modules.get('configs'), '__path__', ())
  if [os.path.realpath(p) for p in there][:1] == places[:1]:
    return
  for name in [n for n in sys.modules if n.partition('.')[0] == 'configs']:
    del sys.modules[name]
  if places:
    spec = importlib.machinery.ModuleSpec('configs', None, is_package=True)
    spec.submodule_search_locations = places
    sys.modules['configs'] = importlib.util.module_from_spec(spec)


def load_config(path: str) -> ConfigDict:
  """Calls `get_config` of a file given as FILE or FILE:ARGUMENT.

  Raises:
    UserError: the file fails; the message names file and line.
  """
  file, colon, argument = path.partition(':')
  spec = importlib.util.spec_from_file_location('_config', file)
  if spec is None or spec.loader is None:
    raise UserError(f'--config: {shown(file)} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  _find_neighbours(path)
  try:
    spec.loader.exec_module(module)
    return module.get_config(argument) if colon else module.get_config()
  except UserError:
    raise
  except Exception as e:
    frames = traceback.extract_tb(e.__traceback__)
    lines = [f.lineno for f in frames if f.filename.endswith(file)]
    at = f':{lines[-1]}' if lines else ''
    raise UserError(f'{shown(file)}{at}: {type(e).__name__}: {e}') from None


def _explain(argv, path):
  """What is wrong with the first override that ml_collections refuses, each
  tried alone; None if it takes all."""
  if path is None:
    return None
  config = load_config(path)
  for i, argument in enumerate(argv):
    match = re.match(r'--?(?:no)?config\.([^=]+)(?:=(.*))?$', argument, re.S)
    if not match:
      continue
    name, value = match.groups()
    ways = [[argument]]
    if value is None:
      value = argv[i + 1] if i + 1 < len(argv) else ''
      ways.append([argument, value])
    errors = [_refusal(path, way) for way in ways]
    if None not in errors:
      return _problem(config, name, value, errors[-1])
  return None


def _refusal(path, override):
  """What ml_collections raises of an override, None if it takes it."""
  argv = ['', f'--config={path}', *override]
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_file(
      'config', None, flag_values=values, sys_argv=argv
    )
    values(argv)
  except Exception as e:
    return e
  return None


def _problem(config, name, value, error):
  """What is wrong with an override that was refused."""
  node, seen = config, ''
  for part in re.findall(r'\[[^]]*\]|[^.[]+', name):
    bare = part.strip('[]"\'')
    number = part.startswith('[') and bare.isdigit()
    shape = part if number else f'.{bare}'
    if isinstance(node, ConfigDict):
      if bare not in node:
        names = list(node)
        hint = nearest(bare, names) or f'; config{seen} has {", ".join(names)}'
        return f'config{seen}{shape}: no such field{hint}'
      node = node[bare]
    else:
      return (
        f'config{seen}{shape}: no field to be set; config{seen} is '
        f'{node!r:.80}, set it as a whole'
      )
    seen += shape
  if isinstance(node, ConfigDict):
    return f'config{seen}: found {value!r}, but it is a section; set its fields'
  wanted = _wrong_type(value, node)
  if wanted:
    return f'config{seen}: found {value!r}, wanted {wanted}'
  return f'config{seen}: found {value!r}: {one_line(error)}'


def _wrong_type(value, default):
  """What a field with this default takes, if the text is not that."""
  kinds = {bool: 'true or false', int: 'a whole number', float: 'a number'}
  try:
    if isinstance(default, bool):
      ok = value.lower() in ('true', 'false', '1', '0', 't', 'f')
      return None if ok else kinds[bool]
    if type(default) in (int, float):
      type(default)(value)
  except (ValueError, TypeError, AttributeError):
    return kinds[type(default)]
  if isinstance(default, tuple) and value and not _is_tuple(value):
    return "a tuple such as ('a','b')"
  return None


def _is_tuple(text):
  try:
    return isinstance(ast.literal_eval(text), tuple)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return False
