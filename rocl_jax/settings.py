"""From a config section to typed values, checked.

A section holds the keyword arguments of one callable: a record such as
`optim.Settings`, or a function such as `attacks.pgd`. Its signature is the
schema, so there is no second list of fields to keep in step:

  settings = parse(optim.Settings, config['optimizer'], 'pretrain.optimizer')

Numbers may be written as text where a decimal would hide what is meant:
'8/255', or 'eps/4' for a quarter of the section's own `eps`.
"""

import inspect
import math
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, NewType, TypeVar

from rocl_jax.errors import UserError, nearest
from rocl_jax.files import place, places

T = TypeVar('T')
Place = NewType('Place', str)  # a path, made absolute, or a URL

_KINDS = {
  int: 'a whole number',
  str: 'text',
  bool: 'True or False',
  dict: 'a section',
}


class FieldError(UserError, ValueError):
  """A field holds what it can't; `parse` adds where the field stands."""

  def __init__(self, field: str, found: Any, wanted: str):
    seen = ' '.join(repr(found).split())  # arrays have several lines
    super().__init__(f'{field}: found {seen}, wanted {wanted}')
    self.field, self.found, self.wanted = field, found, wanted

  def __reduce__(self):
    return FieldError, (self.field, self.found, self.wanted)


def one_of(field: str, found: str, names: Collection[str]) -> None:
  """Raises FieldError unless `found` is one of `names`."""
  if found not in names:
    wanted = f'one of {", ".join(sorted(names))}{nearest(found, names)}'
    raise FieldError(field, found, wanted)


def at_least(field: str, found: float, low: float) -> None:
  """Raises FieldError unless `found` is a finite number from `low` on."""
  if not (math.isfinite(found) and found >= low):
    raise FieldError(field, found, f'{low} or more')


def within(field: str, found: float, low: float, high: float) -> None:
  """Raises FieldError unless `found` is in [low, high]."""
  if not low <= found <= high:
    raise FieldError(field, found, f'{low} to {high}')


def parse(
  target: Callable[..., T],
  section: Mapping[str, Any],
  where: str,
  given: Mapping[str, Any] = {},
) -> T:
  """Calls `target` with the section's fields, converted and checked.

  Args:
    target: a dataclass or a function with annotated keyword arguments.
    section: field -> value; nested mappings become the annotated records.
    where: path of the section in the config, for messages.
    given: arguments that the caller supplies, not the section.

  Raises:
    UserError: an unknown or missing field, a wrong type or value.
  """
  arguments = bind(target, section, where, given)
  try:
    return target(**given, **arguments)
  except FieldError as e:
    raise UserError(f'{where}.{e}') from None


def bind(
  target: Callable[..., Any],
  section: Any,
  where: str,
  given: Collection[str] = (),
) -> dict[str, Any]:
  """The keyword arguments that `parse` would call `target` with."""
  if not isinstance(section, Mapping):
    raise UserError(f'{where}: found {section!r}, wanted a section of fields')
  parameters = {
    name: p
    for name, p in inspect.signature(target).parameters.items()
    if name not in given
  }
  for name in section:
    if name not in parameters:
      hint = nearest(name, parameters) or f'; it has {", ".join(parameters)}'
      raise UserError(f'{where}.{name}: no such field{hint}')
  for name, parameter in parameters.items():
    if name not in section and parameter.default is parameter.empty:
      raise UserError(f'{where}.{name}: missing')
  types = typing.get_type_hints(target)
  arguments: dict[str, Any] = {}
  # Values that name `eps` come after it.
  order = sorted(section, key=lambda k: 'eps' in str(section[k]))
  for name in order:
    arguments[name] = _convert(
      types.get(name, Any), section[name], f'{where}.{name}', arguments
    )
  return arguments


def with_defaults(
  target: Callable[..., Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
  """The arguments, and the default of each keyword that is not among them.

  Keywords are the parameters that can be given by name alone.
  """
  defaults = {
    name: p.default
    for name, p in inspect.signature(target).parameters.items()
    if p.kind is p.KEYWORD_ONLY and p.default is not p.empty
  }
  return defaults | dict(arguments)


def _convert(kind, value, where, siblings):
  if kind is Any:
    return value
  if typing.get_origin(kind) is tuple:
    if isinstance(value, str) or not isinstance(value, tuple | list):
      raise UserError(f'{where}: found {value!r}, wanted a tuple')
    item = typing.get_args(kind)[0]
    if item is Place and all(isinstance(v, str) for v in value):
      return tuple(path for v in value for path in _place(places, v, where))
    if item is str and all(isinstance(v, str) for v in value):
      # a,b in a shell, and a, for one alone
      value = [word for v in value for word in v.split(',') if word]
    return tuple(_convert(item, v, where, siblings) for v in value)
  if kind is float:
    return amount(value, where, siblings)
  if kind is Place:
    return _place(place, _convert(str, value, where, siblings), where)
  if kind in _KINDS:
    if type(value) is not kind:
      wanted = _KINDS[kind]
      raise UserError(f'{where}: found {value!r}, wanted {wanted}')
    return value
  if hasattr(kind, 'parse'):  # a record with a rule of its own
    return kind.parse(value, where)
  return parse(kind, value, where)


def _place(function, text, where):
  try:
    return function(text)
  except UserError as e:
    raise UserError(f'{where}: {e}') from None


def amount(value: Any, where: str, names: Mapping[str, Any] = {}) -> float:
  """A number, also as text: '0.03', '8/255', 'eps/4' where `names` has eps.

  Raises:
    UserError: neither a finite number nor a quotient of such.
  """
  wanted = "a number, or a quotient such as '8/255'"
  if 'eps' in names:
    wanted += " or 'eps/4'"
  problem = UserError(f'{where}: found {value!r}, wanted {wanted}')
  if isinstance(value, bool) or not isinstance(value, int | float | str):
    raise problem
  parts = value.split('/') if isinstance(value, str) else [value]
  try:
    terms = [float(names.get(str(p).strip(), p)) for p in parts]
    result = terms[0]
    for divisor in terms[1:]:
      result /= divisor
  except (ValueError, ZeroDivisionError):
    raise problem from None
  if not math.isfinite(result):
    raise problem
  return result
