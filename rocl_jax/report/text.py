"""Numbers, attacks and tables as text, and the file they go to."""

import contextlib
import functools
import logging
import math
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rocl_jax import figures
from rocl_jax.errors import RunFailed, UserError, one_line
from rocl_jax.figures import printable, short
from rocl_jax.report import html
from rocl_jax.report.records import ACCURACIES, Record, attacked

DATASETS = {
  'digits': 'scikit-learn digits (handwritten digits, not CIFAR-10)',
  'cifar10': 'CIFAR-10',
}
SHORT_DATASETS = {'digits': 'handwritten digits', 'cifar10': 'CIFAR-10'}


def number(value: Any, digits: int = 2) -> str:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return '–'
  return f'{value:.{digits}f}' if math.isfinite(value) else str(value)


def plain(value: Any) -> str:
  if value is None:
    return '–'
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def sparsity(value: Any) -> str:
  known = isinstance(value, int | float)
  return f'{round(100 * value, 1):g}' if known else '–'


def eps_text(eps: Any) -> str:
  """0.0313725 -> '0.03137 = 8/255'; 0.031, no such fraction -> '0.031'."""
  if isinstance(eps, bool) or not isinstance(eps, int | float):
    return '–'
  if not math.isfinite(eps):
    return str(eps)
  n = round(eps * 255)
  exact = n > 0 and abs(eps * 255 - n) < 1e-3
  return f'{eps:.4g} = {n}/255' if exact else f'{eps:.4g}'


def dataset_text(name: Any) -> str:
  return DATASETS.get(str(name), str(name)) if name else 'unknown'


def short_dataset(name: Any) -> str:
  return SHORT_DATASETS.get(str(name), str(name))


def attack_text(record: Record) -> str:
  dtype = _other_dtype(record)
  if not attacked(record):
    return 'clean (no attack)' + (f', {dtype}' if dtype else '')
  ball = (
    f'{record.get("norm", "unknown norm")}, eps {eps_text(record.get("eps"))}'
  )
  return (
    f'{record.get("attack", "unknown attack")} '
    f'({ball}{f", {dtype}" if dtype else ""})'
  )


def _other_dtype(record: Record) -> Any:
  """The arithmetic of the evaluation, where training used another."""
  network = (record.get('config') or {}).get('model')
  network = network if isinstance(network, dict) else {}
  dtype = record.get('dtype')
  return dtype if dtype != network.get('dtype', dtype) else None


def accuracies(record: Record) -> list[str]:
  """The four accuracies; no robust ones where nothing was attacked."""
  known = ACCURACIES if attacked(record) else ACCURACIES[:2]
  return [number(record.get(k) if k in known else None) for k in ACCURACIES]


def column(rows: Sequence[Record], key: str) -> list[float]:
  """The numbers under a key, NaN where there is none."""
  values: list[Any] = [row.get(key) for row in rows]
  known = lambda v: isinstance(v, float) or (type(v) is int and abs(v) < 2**63)
  return [float(v) if known(v) else math.nan for v in values]


class Markup(str):
  """Text of ours that is Markdown already."""


def md(text: Any) -> str:
  """A name as Markdown that shows it as it is, inside a line."""
  text = re.sub(r'([\\`*\[\]<>&$|~])', r'\\\1', printable(text))
  if re.match(r'(#{1,6}|[-+]|\d{1,9}[.)])(\s|$)|[-=]+\s*$', text):  # a block
    text = re.sub(r'^(\d*)', r'\1\\', text)
  text = re.sub('^ +| +$|  +', lambda m: '&nbsp;' * len(m[0]), text)
  # Between letters it marks nothing, and most names have it there.
  return re.sub(r'(?<![^\W_])_|_(?![^\W_])', r'\\_', text)


def code(text: Any) -> str:
  """A name as a code span, as it is."""
  text = printable(text)
  longest = max(map(len, re.findall('`+', text)), default=0)
  fence = '`' * (longest + 1)
  blank = not text.strip() or text[0] in ' `' or text[-1] in ' `'
  return f'{fence} {text} {fence}' if blank else f'{fence}{text}{fence}'


def terminal(text: str) -> str:
  """Lines that this process's output can show, whatever its encoding."""
  text = '\n'.join(map(printable, text.split('\n')))
  encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
  try:
    text.encode(encoding)
  except UnicodeError:
    text = text.translate(_ASCII)
  return text.encode(encoding, 'backslashreplace').decode(encoding)


_ASCII = str.maketrans({'–': '-', '−': '-', '±': '+-', '×': 'x', '⚠': '!'})


def table(
  header: Sequence[str], rows: Iterable[Sequence[str]], left: int
) -> str:
  """A Markdown table; columns after the first `left` are right-aligned.

  Cells are text, shown as it is, but for `Markup`.
  """
  marks = [' --- ' if i < left else ' ---: ' for i in range(len(header))]
  lines = ['| ' + ' | '.join(map(_cell, header)) + ' |']
  lines += ['|' + '|'.join(marks) + '|']
  lines += ['| ' + ' | '.join(map(_cell, row)) + ' |' for row in rows]
  return '\n'.join(lines)


def _cell(text: str) -> str:
  return text if isinstance(text, Markup) else md(text)


def told(make: Callable[..., str]) -> Callable[..., str]:
  """A table for a terminal, or why there is none: no run ends for it."""

  @functools.wraps(make)
  def made(*args: Any) -> str:
    try:
      return make(*args)
    except Exception as error:
      return terminal(printable(f'No table: {cause(error)}'))

  return made


_WIDEST = 100  # characters of a cell


def aligned(rows: Sequence[Sequence[str]], left: set[int]) -> str:
  """Rows as columns of plain text, a rule below the first."""
  rows = [[terminal(short(printable(x), _WIDEST)) for x in r] for r in rows]
  widths = [max(map(_width, cells)) for cells in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = []
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
      space = ' ' * (width - _width(cell))
      cells.append(cell + space if i in left else space + cell)
    lines.append('  '.join(cells).rstrip())
  lines.insert(1, '  '.join('-' * width for width in widths))
  return '\n'.join(lines)


def _width(text: str) -> int:
  """In columns of a terminal."""
  wide = sum(unicodedata.east_asian_width(c) in 'WF' for c in text)
  return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def file_name(text: str) -> str:
  return re.sub(r'[^A-Za-z0-9._-]', '_', text)[:60]


_WARNED: dict = {}  # one line for several reports is enough
logging.getLogger('matplotlib.font_manager').setLevel(logging.ERROR)


class Writer:
  """Collects Markdown and writes the pictures it refers to, then both forms.

  Attributes:
    folder: where to.
    parts: what was written so far.
  """

  def __init__(self, folder: Path) -> None:
    self.folder = folder
    self.parts: list[str] = []
    self._names: set[str] = set()
    self._spelled = False

  def text(self, *parts: str) -> None:
    self.parts += parts

  def section(self, write: Callable[..., Any], *found: Any) -> Any:
    """What a section returns; None where it fails, and a line says why."""
    try:
      return write(self, *found)
    except Exception as error:  # the other sections are worth having
      title = write.__name__.strip('_').replace('_', ' ')
      self.text(f'**Left out: {md(title)}: {md(cause(error))}**')
      return None

  def picture(
    self, name: str, alt: str, draw: Callable[..., Figure], *args: Any, **more
  ) -> None:
    """Draws and names a picture, or says why there is none.

    Args:
      name: of its file; another picture's gets a number.
      alt: what is to be seen, as text.
      draw: of `figures`, with its arguments.
    """
    name = self._own(name)
    path = self.folder / 'figures' / f'{name}.png'
    try:
      # Matplotlib's warnings say how, ours what for; one is enough.
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        figure = draw(*args, **more)
        _replace(path, lambda tmp: figure.savefig(tmp, dpi=figures.DPI))
    except Exception as error:  # numbers are worth having without it
      self.text(f'**No picture {code(name)}: {md(cause(error))}**')
      return
    spelled = [w for w in caught if w.category is figures.MissingGlyphs]
    if spelled and not self._spelled:
      self._spelled = True
      warnings.warn_explicit(
        str(spelled[0].message),
        figures.MissingGlyphs,
        'rocl_jax.report',
        1,
        registry=_WARNED,
      )
    self.text(f'![{md(alt)}](figures/{name}.png)')

  def _own(self, name: str) -> str:
    """A name that no picture of this report has yet."""
    number, own = 1, name
    while own.lower() in self._names:
      number += 1
      own = f'{name}-{number}'
    self._names.add(own.lower())
    return own

  def save(self, problems: Sequence[str] = ()) -> str:
    """Writes it; `problems` are files that were left out."""
    path = self.folder / 'report.md'
    if problems:
      lines = [f'- {md(problem)}' for problem in dict.fromkeys(problems)]
      for problem in dict.fromkeys(problems):
        left_out = f'warning: left out of the report: {problem}'
        print(terminal(printable(left_out)), file=sys.stderr)
      self.parts[2:2] = [
        '**Left out, as it can not be read:**',
        '\n'.join(lines),
      ]
    content = '\n\n'.join(self.parts) + '\n'
    _replace(path, lambda tmp: tmp.write_text(content, encoding='utf-8'))
    page = html.page(content, self.folder)
    _replace(
      path.with_suffix('.html'),
      lambda tmp: tmp.write_text(page, encoding='utf-8'),
    )
    return str(path)


def cause(error: Exception) -> str:
  """In one line; the kind of error too, unless it is told to users."""
  if isinstance(error, UserError | RunFailed):
    return one_line(error)
  if isinstance(error, OSError) and error.strerror:
    return f'{error.filename or "disk"}: {error.strerror}'
  return f'{type(error).__name__}: {one_line(error)}'


def _replace(path: Path, write_to: Callable[[Path], object]) -> None:
  """Writes beside `path` and renames: a reader never sees half a file."""
  temporary = path.with_name(f'.{os.getpid()}.{path.name}')
  try:
    path.parent.mkdir(exist_ok=True)
    write_to(temporary)
    os.replace(temporary, path)
  except (FileExistsError, IsADirectoryError, NotADirectoryError) as e:
    raise UserError(
      f'{e.filename2 or e.filename}: in the way of the report: {e.strerror}'
    ) from None
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()
