"""Numbers of the paper and of the logs published with it."""

import json
import re
from importlib import resources
from typing import Any

# Baselines of ours beside the paper's, as runs of `configs/paper.py`.
BASELINES = (
  *('magnitude_90', 'random_90', 'small_90'),
  *('magnitude_99', 'random_99', 'small_99'),
)


def curves() -> dict[str, Any]:
  """Loss and accuracies by epoch: source, notes, and runs by name."""
  return _read('curves.json')


def tables() -> dict[str, Any]:
  """Tables 1 to 5: source, notes, and rows, percent where a number is."""
  return _read('tables.json')


def runs_of(table: int) -> list[str]:
  """The runs of `configs/paper.py` that a table compares, in its order."""
  rows = tables()['rows']
  return list(dict.fromkeys(r['row'] for r in rows if r['table'] == table))


TABLES = (1, 2, 3, 4, 5)


def row_names() -> dict[str, str]:
  """The run that a name such as `table2_ours` stands for, or its own name."""
  names = {}
  for table in TABLES:
    for run in runs_of(table):
      names[f'table{table}_{re.sub("_[0-9]+$", "", run)}'] = run
  return names | {run: run for run in (*names.values(), *BASELINES)}


def _read(name):
  text = resources.files('rocl_jax') / 'published' / name
  return json.loads(text.read_text(encoding='utf-8'))
