"""Numbers, attacks and tables as text, and the file they go to."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rocl_jax import figures
from rocl_jax.errors import UserError
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
  return DATASETS.get(name, str(name)) if name else 'unknown'


def short_dataset(name: Any) -> str:
  return SHORT_DATASETS.get(name, str(name))


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
  values = (row.get(key) for row in rows)
  return [float(v) if isinstance(v, int | float) else math.nan for v in values]


def table(
  header: Sequence[str], rows: Iterable[Sequence[str]], left: int
) -> str:
  """A Markdown table; columns after the first `left` are right-aligned."""
  marks = [' --- ' if i < left else ' ---: ' for i in range(len(header))]
  lines = ['| ' + ' | '.join(map(_cell, header)) + ' |']
  lines += ['|' + '|'.join(marks) + '|']
  lines += ['| ' + ' | '.join(map(_cell, row)) + ' |' for row in rows]
  return '\n'.join(lines)


def _cell(text: str) -> str:
  return text.replace('|', '\\|').replace('\n', ' ')


def aligned(rows: Sequence[Sequence[str]], left: set[int]) -> str:
  """Rows as columns of plain text, a rule below the first."""
  widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      cell.ljust(width) if i in left else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append('  '.join(cells).rstrip())
  lines.insert(1, '  '.join('-' * width for width in widths))
  return '\n'.join(lines)


def file_name(text: str) -> str:
  return re.sub(r'[^A-Za-z0-9._-]', '_', text)


class Writer:
  """Collects Markdown and writes the pictures it refers to, then both forms."""

  def __init__(self, folder: Path) -> None:
    self.folder = folder
    self.parts: list[str] = []

  def text(self, *parts: str) -> None:
    self.parts += parts

  def picture(self, name: str, alt: str, figure: Figure) -> None:
    path = self.folder / 'figures' / f'{name}.png'
    _replace(path, lambda tmp: figure.savefig(tmp, dpi=figures.DPI))
    self.text(f'![{alt}](figures/{name}.png)')

  def save(self) -> str:
    path = self.folder / 'report.md'
    content = '\n\n'.join(self.parts) + '\n'
    page = html.page(content, self.folder)
    _replace(path, lambda tmp: tmp.write_text(content, encoding='utf-8'))
    _replace(
      path.with_suffix('.html'),
      lambda tmp: tmp.write_text(page, encoding='utf-8'),
    )
    return str(path)


def _replace(path: Path, write_to: Callable[[Path], object]) -> None:
  """Writes beside `path` and renames: a reader never sees half a file."""
  temporary = path.with_name(f'.{os.getpid()}.{path.name}')
  try:
    path.parent.mkdir(exist_ok=True)
    write_to(temporary)
    os.replace(temporary, path)
  except (FileExistsError, IsADirectoryError, NotADirectoryError) as e:
    raise UserError(
      f'{e.filename}: in the way of the report: {e.strerror}'
    ) from None
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()
