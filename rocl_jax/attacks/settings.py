"""An attack as a config section: a name and that function's own keywords."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rocl_jax.attacks import ATTACKS
from rocl_jax.attacks.arguments import LARGEST
from rocl_jax.attacks.balls import check_ball
from rocl_jax.attacks.pgd import STARTS, Ascent
from rocl_jax.errors import UserError
from rocl_jax.settings import FieldError, bind, one_of, within

_BY_CALLER = ('objective', 'images', 'key', 'counted')


@dataclass(frozen=True)
class AttackSettings:
  """What a section such as {name: 'pgd', eps: '8/255', ...} says.

  Attributes:
    name: a name in ATTACKS.
    keywords: the function's keyword arguments, as numbers.
  """

  name: str
  keywords: Mapping[str, Any]

  @classmethod
  def parse(cls, section: Any, where: str) -> 'AttackSettings':
    """Checks a section against the signature of the attack that it names.

    Raises:
      UserError: an unknown attack or field, a wrong type or value.
    """
    if not isinstance(section, Mapping) or 'name' not in section:
      raise UserError(f'{where}: found {section!r}, wanted a section with name')
    fields = dict(section)
    name = fields.pop('name')
    try:
      one_of('name', name, ATTACKS)
      keywords = bind(ATTACKS[name], fields, where, given=_BY_CALLER)
      _check(keywords)
    except FieldError as e:
      raise UserError(f'{where}.{e}') from None
    return cls(name, keywords)

  @property
  def reach(self) -> float:
    """How far the steps lead from a start, at most; in units of eps."""
    eps, steps = (self.keywords.get(k, 0) for k in ('eps', 'steps'))
    way = steps * self.keywords.get('step_size', 0)
    return way / eps if eps and way else 1.0

  @property
  def attack(self) -> Callable[..., Ascent]:
    """(objective, images, key) -> Ascent."""
    return functools.partial(ATTACKS[self.name], counted=True, **self.keywords)


def _check(keywords: Mapping[str, Any]) -> None:
  """Checks the keywords whose meaning all attacks share."""
  check_ball(keywords.get('eps', 0), keywords.get('norm', 'linf'))
  if 'start' in keywords:
    one_of('start', keywords['start'], STARTS)
  within('step_size', keywords.get('step_size', 0), 0, LARGEST)
  within('steps', keywords.get('steps', 0), 0, 10**6)
