"""Tables and pictures of a training run, from the files it left behind.

  python -m rocl_jax.report runs/quickstart

reads `runs/quickstart` and writes `runs/quickstart/report.md` with its
pictures in `runs/quickstart/figures`, and the same as one file, `report.html`.
A run in progress gives a report of what there is, and the same files always
give the same text. gs://bucket/run is read and written there.

A folder with `seed0`, `seed1` and so on is a reproduction of the paper: each of
them gets its own report, and the folder one that sets them beside the paper's
tables.
"""

import contextlib
from pathlib import Path

from rocl_jax import mirror
from rocl_jax.report import (
  about,
  findings,
  orderings,
  paper,
  pictures,
  robustness,
  tables,
  training,
)
from rocl_jax.report.reading import FILES, Workdir, load_results
from rocl_jax.report.reproduction import Reproduction, seed_folders
from rocl_jax.report.tables import (
  evaluation_table,
  terminal_table,
  transfer_table,
)
from rocl_jax.report.text import Writer

__all__ = [
  'evaluation_table',
  'opened',
  'summary',
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
  """Writes `report.md`, `report.html` and pictures; the path of the first."""
  path = Path(workdir)
  folders = seed_folders(path)
  if not folders:
    return _write_run(path)
  found = Reproduction(path)  # a broken file is told before anything is done
  for folder in folders:
    _write_run(folder)
  return _write_reproduction(found)


def summary(workdir: str) -> str:
  """The main numbers in plain text."""
  path = Path(workdir)
  if seed_folders(path):
    return paper.terminal_table(Reproduction(path))
  return terminal_table(load_results(path))


def _write_run(path: Path) -> str:
  work = Workdir(path)
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


def _write_reproduction(found: Reproduction) -> str:
  out = Writer(found.path)
  about.introduction(out, found)
  paper.tables(out, found)
  orderings.section(out, found)
  findings.section(out, found)
  paper.selections(out, found)
  paper.attacks(out, found)
  paper.baselines(out, found)
  pictures.by_stage(out, found)
  pictures.against_sparsity(out, found)
  pictures.curves(out, found)
  training.density(out, found.first)
  pictures.histograms(out, found)
  tables.protocol(out, found.first)
  about.commands(out, found)
  return out.save()
