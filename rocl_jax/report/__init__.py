"""Tables and pictures of a training run, from the files it left behind.

  python -m rocl_jax.report runs/quickstart

reads `runs/quickstart` and writes `runs/quickstart/report.md` with its
pictures in `runs/quickstart/figures`. A run in progress gives a report of what
there is, and the same files always give the same text. gs://bucket/run is read
and written there.
"""

import contextlib
from pathlib import Path

from rocl_jax import mirror
from rocl_jax.report import robustness, tables, training
from rocl_jax.report.reading import FILES, Workdir
from rocl_jax.report.tables import (
  evaluation_table,
  terminal_table,
  transfer_table,
)
from rocl_jax.report.text import Writer

__all__ = [
  'evaluation_table',
  'opened',
  'terminal_table',
  'transfer_table',
  'write',
]


def opened(workdir: str) -> contextlib.AbstractContextManager[str]:
  """The folder to read and to write a report in: of a URL a short-lived copy
  of what a report is made of."""
  wanted = lambda name: name.rpartition('/')[2] in FILES
  return mirror.copied(workdir, 'WORKDIR', wanted)


def write(workdir: str) -> str:
  """Writes `report.md` and its pictures; the path of the report."""
  work = Workdir(Path(workdir))
  out = Writer(work.path)
  tables.introduction(out, work)
  shown = tables.main_results(out, work)
  shown += tables.selections(out, work)
  robustness.ensembles(out, work)
  robustness.audit(out, work)
  robustness.classes(out, work)
  robustness.transfer(out, work)
  robustness.corruptions(out, work)
  training.curves(out, work)
  training.against_published(out, work)
  training.examples(out, work)
  training.density(out, work)
  tables.others(out, work, shown)
  tables.protocol(out, work)
  return out.save()
