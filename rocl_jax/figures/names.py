"""Names that others chose, as text that a picture can show."""

import functools
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.figure import Figure

_FONT = 'DejaVu Sans'  # comes with matplotlib
_NO_GLYPHS = (
  'no installed font has all characters of these names: pictures show some by '
  'their codes, such as U+4E2D; a Noto Sans CJK font may help'
)
_Draw = TypeVar('_Draw', bound=Callable[..., Figure])
_JOINERS = '\u200c\u200d'  # between letters, and between the parts of an emoji


def printable(text: Any) -> str:
  """One line without characters that can't be seen or encoded.

  Line breaks, controls, marks of direction, and bytes that were no UTF-8 are
  written as Python would: a\\nb, \\u200f, \\udcff.
  """
  hidden = lambda c: unicodedata.category(c)[0] == 'C' and c not in _JOINERS
  return ''.join(
    c.encode('unicode_escape').decode('ascii')
    if hidden(c) or c in '\u2028\u2029'
    else c
    for c in str(text)
  )


def short(text: str, most: int) -> str:
  """At most so many characters, the middle left out of longer texts."""
  if len(text) <= most:
    return text
  end = (most - 1) // 3
  return f'{text[: most - 1 - end]}…{text[len(text) - end :]}'


class MissingGlyphs(UserWarning):
  """No installed font has all characters of a picture."""


def picture(draw: _Draw) -> _Draw:
  """A picture whose texts are just text: no `$` starts mathematics.

  Fonts are found for what the usual one lacks; what none has is written by
  its letters' plain forms or as U+4E2D.
  """

  @functools.wraps(draw)
  def drawn(*args, **kwargs):
    fonts, lacking = _fonts(frozenset(_characters([args, kwargs])))
    style: dict = {'text.parse_math': False, 'text.usetex': False}
    style['font.family'] = list(fonts)
    table = {ord(c): _spelled(c) for c in lacking}
    if lacking:
      warnings.warn(_NO_GLYPHS, MissingGlyphs, stacklevel=2)
    with mpl.rc_context(style):
      return draw(*_shown(args, table), **_shown(kwargs, table))

  return drawn  # type: ignore[return-value]


def _characters(value: Any) -> set[str]:
  if isinstance(value, str):
    return set(printable(value))
  if isinstance(value, Mapping):
    value = [*value.keys(), *value.values()]
  if isinstance(value, list | tuple):
    return set().union(*map(_characters, value))
  return set()


def _shown(value: Any, table: Mapping[int, str]) -> Any:
  """The same value, every string in it as it is drawn."""
  if isinstance(value, str):
    return printable(value).translate(table)
  if isinstance(value, Mapping):
    return {_shown(k, table): _shown(v, table) for k, v in value.items()}
  if isinstance(value, list):
    return [_shown(x, table) for x in value]
  if isinstance(value, tuple):
    items = [_shown(x, table) for x in value]
    return type(value)(*items) if hasattr(value, '_fields') else tuple(items)
  return value


@functools.lru_cache
def _fonts(characters: frozenset[str]) -> tuple[tuple[str, ...], set[str]]:
  """Families that together have the characters, and those that none has."""
  families, lacking = [_FONT], set(characters) - _usual()
  if lacking:
    bundled = Path(mpl.get_data_path())  # the rest of it is for mathematics
    found = {
      font.name: font.fname
      for font in font_manager.fontManager.ttflist
      if bundled not in Path(font.fname).parents
      and font.style == 'normal'
      and not font.name.startswith('DejaVu')
    }
    for name in sorted(found, key=lambda name: ('Sans' not in name, name)):
      if lacking & _has(found[name]):
        families.append(name)
        lacking -= _has(found[name])
  return tuple(families), lacking


def _usual() -> frozenset[str]:
  return _has(font_manager.findfont(_FONT))


@functools.lru_cache
def _has(path: str) -> frozenset[str]:
  """The characters of a font; none where it can't be drawn with."""
  try:
    font = font_manager.get_font(path)
    if not font.scalable or 'LastResort' in font.postscript_name:
      return frozenset()
    return frozenset(map(chr, font.get_charmap()))
  except Exception:  # whatever is installed as a font
    return frozenset()


def _spelled(character: str) -> str:
  """Its plain form where this is of letters that the font has, or its code."""
  plain = unicodedata.normalize('NFKD', character)
  plain = ''.join(c for c in plain if not unicodedata.combining(c))
  known = plain and set(plain) <= _usual()
  return plain if known else f'U+{ord(character):04X}'
