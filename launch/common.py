"""What the launchers share: flags, commands that can be shown, questions.

Nothing but the standard library, so that a laptop without JAX can launch.
"""

import difflib
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parent.parent
USER_ERROR, RUN_FAILED, INTERRUPTED = 2, 3, 130


class Mistake(Exception):
  """What the user must change, in one line; exit status 2."""


class Failed(Exception):
  """What went wrong elsewhere, in one line; exit status 3."""


@dataclass(frozen=True)
class Flag:
  """A flag: what it is without being given, and what it may be.

  Attributes:
    default: False makes it a switch, a tuple lets it be given several times.
    wanted: what a value must be, in words.
    accepts: whether a text is that.
    make: the value of a text.
  """

  default: Any = ''
  wanted: str = 'a value'
  accepts: Callable[[str], bool] = bool
  make: Callable[[str], Any] = str


def count(default: int) -> Flag:
  at_least_one = lambda text: text.isdigit() and int(text) > 0
  return Flag(default, 'a whole number, 1 or more', at_least_one, int)


def whole(default: int) -> Flag:
  return Flag(default, 'a whole number, 0 or more', str.isdigit, int)


def amount(default: float) -> Flag:
  def accepts(text: str) -> bool:
    return text.replace('.', '', 1).isdigit()

  return Flag(default, 'a number, 0 or more', accepts, float)


def choice(*values: str) -> Flag:
  return Flag(values[0], ' or '.join(values), values.__contains__)


def parse(
  argv: Sequence[str], flags: Mapping[str, Flag]
) -> tuple[list[str], SimpleNamespace, list[str]]:
  """(positional arguments, flags, what came after `--`, untouched)."""
  values = {name: flag.default for name, flag in flags.items()}
  own, rest = list(argv), []
  if '--' in own:
    cut = own.index('--')
    own, rest = own[:cut], own[cut + 1 :]
  positional = []
  while own:
    argument = own.pop(0)
    if not argument.startswith('-'):
      positional.append(argument)
      continue
    name, equals, text = argument.lstrip('-').partition('=')
    if name not in flags:
      near = difflib.get_close_matches(name, flags, 1)
      hint = f'; did you mean --{near[0]}?' if near else ''
      if name.startswith('config') or name in ('workdir', 'allow_change'):
        hint = "; arguments of train.py come after '--'"
      raise Mistake(f'--{name}: no such flag{hint}')
    flag = flags[name]
    if flag.default is False:
      if equals and text not in ('true', 'false'):
        raise Mistake(f'--{name}: found {text!r}, wanted true or false')
      values[name] = text != 'false'
      continue
    if not equals:
      if not own or own[0].startswith('--'):
        raise Mistake(f'--{name}: found nothing, wanted {flag.wanted}')
      text = own.pop(0)
    if not flag.accepts(text):
      raise Mistake(f'--{name}: found {text!r}, wanted {flag.wanted}')
    value = flag.make(text)
    several = isinstance(flag.default, tuple)
    values[name] = (*values[name], value) if several else value
  return positional, SimpleNamespace(**values), rest


def verb_of(positional: Sequence[str], verbs: Sequence[str]) -> str:
  found = ' '.join(positional) or 'nothing'
  if len(positional) != 1 or positional[0] not in verbs:
    raise Mistake(f'verb: found {found}, wanted one of {", ".join(verbs)}')
  return positional[0]


def say(text: str) -> None:
  """A word of the launcher's own; standard output is for commands and logs."""
  print(f'# {text}', file=sys.stderr, flush=True)


class Shell:
  """Runs commands, or only shows them."""

  def __init__(self, dry: bool):
    self.dry = dry

  def run(self, *command: str) -> int:
    """Exit status of a command whose output the user sees."""
    if self.dry:
      print(shlex.join(command), flush=True)
      return 0
    return subprocess.run(self._found(command), check=False).returncode

  def ask(self, *command: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command."""
    if self.dry:
      print(shlex.join(command), flush=True)
      return 0, '', ''
    done = subprocess.run(
      self._found(command), capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()

  def must(self, *command: str) -> None:
    status = self.run(*command)
    if status:
      raise Failed(f'exit status {status} of: {shlex.join(command)}')

  def _found(self, command: Sequence[str]) -> Sequence[str]:
    import shutil

    if not shutil.which(command[0]):
      raise Mistake(f'{command[0]}: no such command here; install it first')
    return command


def confirm(question: str, yes: bool) -> None:
  """Raises Mistake unless the user agrees; without a terminal --yes must."""
  if yes:
    return
  if not sys.stdin.isatty():
    raise Mistake(f'--yes: missing; nobody can be asked here: {question}')
  if not agreed(question):
    raise Mistake(f'{question} Answered no; nothing was done')


def check_training(arguments: Sequence[str]) -> str:
  """Raises Mistake where train.py would not get far; the work directory.

  What it needs is seen here, before anything is paid for; the fields of the
  config are looked at where there is JAX.
  """
  said = dict(x.lstrip('-').partition('=')[::2] for x in arguments)
  flags = [x.lstrip('-') for x in arguments]
  bare = dict(zip(flags, arguments[1:], strict=False))
  for name in ('workdir', 'config'):
    if not (said.get(name) or bare.get(name)):
      raise Mistake(f"--{name}: missing; it comes after '--', as for train.py")
  file = (said.get('config') or bare['config']).partition(':')[0]
  if not os.path.isfile(ROOT / file):
    folder = (ROOT / file).parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(pathlib.Path(file).name, names, n=1)
    hint = f' (did you mean {close[0]!r}?)' if close else ''
    raise Mistake(f'--config: no such file in {ROOT}: {file}{hint}')
  return said.get('workdir') or bare['workdir']


def agreed(question: str) -> bool:
  print(f'{question} [y/N] ', end='', file=sys.stderr, flush=True)
  return sys.stdin.readline().strip().lower() in ('y', 'yes')


def start(main: Callable[[list[str]], int], usage: str) -> NoReturn:
  """Runs a launcher; mistakes are told in one line, as train.py does."""
  program = pathlib.Path(sys.argv[0]).name
  own = sys.argv[1:]
  own = own[: own.index('--')] if '--' in own else own
  if not own and len(sys.argv) == 1 or {'-h', '--help', 'help'} & set(own):
    print(usage.strip())
    sys.exit(0)
  try:
    sys.exit(main(sys.argv[1:]))
  except Mistake as e:
    print(f'{program}: {e}', file=sys.stderr)
    sys.exit(USER_ERROR)
  except Failed as e:
    print(f'{program}: {e}', file=sys.stderr)
    sys.exit(RUN_FAILED)
  except KeyboardInterrupt:
    print(f'{program}: interrupted', file=sys.stderr)
    sys.exit(INTERRUPTED)
