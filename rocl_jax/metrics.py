"""Training metrics: JSON lines always, TensorBoard where it is asked for."""

import importlib.util
import json
import math
from collections.abc import Callable
from typing import Any

from etils import epath

from rocl_jax.errors import UserError, one_line, shown
from rocl_jax.files import exists, reading, write_text

Row = dict[str, Any]


def read_lines(path: epath.Path) -> list[Row]:
  """The JSON objects of a file of lines; none where there is no file.

  Raises:
    UserError: the file holds something else.
    Unreadable: it can't be read now.
  """
  if not exists(path):
    return []
  with reading(path):
    content = path.read_bytes()
  try:
    rows = [json.loads(line) for line in content.splitlines()]
    if not all(isinstance(row, dict) for row in rows):
      raise ValueError('a line is no object')
  except (ValueError, RecursionError) as e:
    raise UserError(
      f'{shown(path)}: not lines of JSON: {one_line(e)}'
    ) from None
  return rows


def write(path: epath.Path, rows: list[Row]) -> None:
  """Writes all rows, one JSON object a line."""
  write_text(path, ''.join(json.dumps(row) + '\n' for row in rows))


def is_best(rows: list[Row], name: str) -> bool:
  """Whether the last row has the highest value so far, the first of equals.

  A value that is missing or not finite is never the best.
  """
  values = [row.get(name, math.nan) for row in rows]
  *earlier, last = [v if math.isfinite(v) else -math.inf for v in values]
  return last > max(earlier, default=-math.inf)


def check_tensorboard() -> None:
  """Raises UserError unless what TensorBoard writing needs is installed."""
  for module in ('tensorflow', 'tensorboard'):
    if importlib.util.find_spec(module) is None:
      raise UserError(
        f'config.tensorboard: {module} is not installed; '
        "pip install 'rocl-jax[tensorboard]'"
      )


def tensorboard(directory: epath.Path) -> Callable[[int, Row], None]:
  """A function of step and row that writes the row's numbers as scalars."""
  import tensorflow as tf
  from clu import metric_writers

  tf.config.set_visible_devices([], 'GPU')  # it would take all their memory
  writer = metric_writers.SummaryWriter(str(directory))

  def log(step: int, row: Row) -> None:
    writer.write_scalars(step, {k: float(v) for k, v in row.items()})
    writer.flush()

  return log
