"""The front door of every command: parse, check, run, say what went wrong.

Exit status: 0 done; 2 a mistake of the user, told in one line; 3 a run or an
evaluation that failed its own checks; 130 interrupted by SIGINT, 143 by
SIGTERM; anything else is a bug of ours and comes with its stack trace.
"""

import ast
import contextlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from absl import flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from rocl_jax.errors import RunFailed, UserError, nearest, of_disk
from rocl_jax.interruption import Interrupted

BUG, USER_ERROR, RUN_FAILED, INTERRUPTED = 1, 2, 3, 130


def define_config() -> None:
  """Defines --config, a config file whose fields --config.FIELD overrides."""
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Config file, with an argument after a colon if it has one.',
  )


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
    _exit(program, _gone() or of_disk(e), RUN_FAILED)
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
    file = path.partition(':')[0]
    _check_config_file(file)
    # Config files import their neighbours as `configs.<name>`, from whatever
    # folder the command is started in.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(file))))
  try:
    return flags.FLAGS(argv)[1:]
  except Exception as e:  # what config_flags raises depends on the mistake
    problem = None if isinstance(e, OSError) else _explain(argv, path)
    if problem is None and isinstance(e, flags.Error):
      problem = str(e).removeprefix('FATAL Flags parsing error: ')
    if problem is None:
      problem = f'{type(e).__name__}: {e}'
    raise UserError(problem) from None


def _config_path(argv):
  """What --config says; of several the last, as with all flags."""
  path = None
  for i, argument in enumerate(argv):
    match = re.fullmatch(r'--?config=(.*)', argument)
    if match:
      path = match.group(1)
    elif argument in ('--config', '-config') and i + 1 < len(argv):
      path = argv[i + 1]
  return path


def _check_config_file(file):
  if not os.path.isfile(file):
    folder = os.path.dirname(file) or '.'
    names = os.listdir(folder) if os.path.isdir(folder) else []
    hint = nearest(os.path.basename(file), names)
    raise UserError(f'--config: no such file: {file}{hint}')


def load_config(path: str) -> ConfigDict:
  """Calls `get_config` of a file given as FILE or FILE:ARGUMENT.

  Raises:
    UserError: the file fails; the message names file and line.
  """
  file, colon, argument = path.partition(':')
  spec = importlib.util.spec_from_file_location('_config', file)
  if spec is None or spec.loader is None:
    raise UserError(f'--config: {file} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    return module.get_config(argument) if colon else module.get_config()
  except UserError:
    raise
  except Exception as e:
    frames = traceback.extract_tb(e.__traceback__)
    lines = [f.lineno for f in frames if f.filename.endswith(file)]
    at = f':{lines[-1]}' if lines else ''
    raise UserError(f'{file}{at}: {type(e).__name__}: {e}') from None


def _explain(argv, path):
  """What is wrong with the overrides, or None if they are not at fault."""
  if path is None:
    return None
  config = load_config(path)
  for i, argument in enumerate(argv):
    match = re.match(r'--?(?:no)?(config\.[^=]+)(?:=(.*))?$', argument, re.S)
    if not match:
      continue
    name, value = match.groups()
    if value is None and i + 1 < len(argv):
      value = argv[i + 1]
    node, seen = config, 'config'
    for part in name.split('.')[1:]:
      if not isinstance(node, ConfigDict) or part not in node:
        names = list(node) if isinstance(node, ConfigDict) else []
        hint = nearest(part, names)
        if not hint and names:
          hint = f'; {seen} has {", ".join(names)}'
        return f'{seen}.{part}: no such field{hint}'
      node, seen = node[part], f'{seen}.{part}'
    if isinstance(node, ConfigDict):
      return f'{seen}: found {value!r}, but it is a section; set its fields'
    problem = _wrong_type(value, node)
    if problem:
      return f'{seen}: found {value!r}, wanted {problem}'
  return None


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
