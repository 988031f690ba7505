"""Pickles read as data: nothing is imported, constructed or called by name.

  content = read(bytes_of_a_file, {'collections.OrderedDict': lambda: {}})

A pickle is a program for a stack machine. This one knows the instructions that
build numbers, text, tuples, lists and dicts, and calls no function but those it
is given, which stand in for what the names mean to Python. Time and memory are
those of the file. `pickle.Unpickler` with an allow-list still runs NumPy's and
PyTorch's own constructors, of which a file of a hundred bytes can ask for any
amount of memory.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_PLAIN = {'BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT'} | {
  *('BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'),
  *('BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'),
}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_MARK = object()
_MOST = 2_000_000  # instructions: a few seconds, some hundred MB at the worst


class Name(NamedTuple):
  """What stands in a pickle for a function or class: its name alone."""

  path: str


class Built:
  """An object that a stand-in returned; the pickle may add a state to it.

  Attributes:
    state: that state, of any form; None if there is none.
  """

  state: Any = None


def read(
  content: bytes,
  functions: Mapping[str, Callable[..., Any]],
  names: frozenset[str] = frozenset(),
  stored: Callable[[Any], Any] | None = None,
) -> Any:
  """Returns what a pickle of protocol 2 to 5 describes.

  Text of Python 2 becomes bytes.

  Args:
    content: the pickle; bytes after its end are ignored.
    functions: what stands in for each function that it may call, by dotted
      name. They get arguments of any number and form: a TypeError of theirs is
      told as a ValueError.
    names: what else it may name; it becomes a `Name`.
    stored: (persistent id) -> what is kept elsewhere under it.

  Raises:
    ValueError: damaged, or it names or does anything else.
  """
  machine = _Machine(functions, names, stored)
  try:
    for count, found in enumerate(pickletools.genops(content)):
      opcode, argument, _ = found
      if opcode.name == 'STOP':
        return machine.pop()
      if count == _MOST:
        raise ValueError(f'a pickle of more than {_MOST} instructions')
      machine.step(opcode.name, argument)
  except (IndexError, KeyError, TypeError) as e:
    raise ValueError(f'a damaged pickle ({type(e).__name__})') from None
  except OverflowError:
    raise ValueError('a damaged pickle (a number out of range)') from None
  raise ValueError('a pickle without an end')


class _Machine:
  def __init__(self, functions, names, stored):
    self._functions, self._names, self._stored = functions, names, stored
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}

  def pop(self) -> Any:
    value = self._stack.pop()
    if value is _MARK:
      raise ValueError('a damaged pickle (a mark for a value)')
    return value

  def _pop_to_mark(self) -> list[Any]:
    values = []
    while (value := self._stack.pop()) is not _MARK:
      values.append(value)
    return values[::-1]

  def _top(self, kind: type) -> Any:
    if type(self._stack[-1]) is not kind:
      raise ValueError(f'a damaged pickle (no {kind.__name__})')
    return self._stack[-1]

  def step(self, name: str, argument: Any) -> None:
    push = self._stack.append
    if name in _PLAIN:
      push(argument)
    elif name in ('BINSTRING', 'SHORT_BINSTRING'):
      push(argument.encode('latin-1'))
    elif name in _CONSTANTS:
      push(_CONSTANTS[name])
    elif name in _TUPLES:
      push(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
    elif name == 'TUPLE':
      push(tuple(self._pop_to_mark()))
    elif name == 'EMPTY_LIST':
      push([])
    elif name == 'EMPTY_DICT':
      push({})
    elif name == 'MARK':
      push(_MARK)
    elif name == 'APPEND':
      value = self.pop()
      self._top(list).append(value)
    elif name == 'APPENDS':
      values = self._pop_to_mark()
      self._top(list).extend(values)
    elif name == 'SETITEM':
      value, key = self.pop(), self.pop()
      self._set(self._top(dict), [key, value])
    elif name == 'SETITEMS':
      values = self._pop_to_mark()
      self._set(self._top(dict), values)
    elif name in ('BINPUT', 'LONG_BINPUT', 'PUT'):
      self._memo[argument] = self._stack[-1]
    elif name == 'MEMOIZE':
      self._memo[len(self._memo)] = self._stack[-1]
    elif name in ('BINGET', 'LONG_BINGET', 'GET'):
      push(self._memo[argument])
    elif name == 'GLOBAL':
      push(self._known('.'.join(argument.split(' '))))
    elif name == 'STACK_GLOBAL':
      last, first = self.pop(), self.pop()
      if type(last) is not str or type(first) is not str:
        raise ValueError('a damaged pickle (a name that is no text)')
      push(self._known(f'{first}.{last}'))
    elif name == 'REDUCE':
      arguments, function = self.pop(), self.pop()
      push(self._call(function, arguments))
    elif name == 'BUILD':
      state = self.pop()
      if isinstance(self._stack[-1], Built):
        self._stack[-1].state = state
      else:
        self._top(dict)  # what is said of one beside its content is not kept
    elif name == 'BINPERSID' and self._stored is not None:
      push(self._stored(self.pop()))
    elif name not in ('PROTO', 'FRAME'):
      raise ValueError(f'the pickle instruction {name} is not allowed')

  def _set(self, target, values):
    for key, value in zip(values[::2], values[1::2], strict=True):
      # The hash of nested tuples can take for ever.
      if type(key) not in (str, bytes, int):
        raise ValueError(f'a dict has a key of type {type(key).__name__}')
      target[key] = value

  def _known(self, path):
    if path not in self._functions and path not in self._names:
      raise ValueError(f'it names {path!r:.80}, which is not allowed')
    return Name(path)

  def _call(self, function, arguments):
    if type(function) is not Name or function.path not in self._functions:
      raise ValueError('it calls what is no function')
    if type(arguments) is not tuple:
      raise ValueError('a damaged pickle (arguments)')
    return self._functions[function.path](*arguments)
