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
import shlex
import sys
from pathlib import Path

from rocl_jax import mirror
from rocl_jax.figures import printable
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
from rocl_jax.report.reading import FILES, Workdir
from rocl_jax.report.records import Record
from rocl_jax.report.reproduction import Reproduction, seed_folders
from rocl_jax.report.tables import (
  evaluation_table,
  terminal_table,
  transfer_table,
)
from rocl_jax.report.text import Writer, cause, terminal

__all__ = [
  'attempt',
  'evaluation_table',
  'opened',
  'summary',
  'terminal',
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
  """Writes `report.md`, `report.html` and pictures; the path of the first.

  What can't be read, measured or drawn costs its own part, and a line says so.

  Raises:
    UserError: there is nothing to report, or a report can't be put there.
    OSError: it can't be written.
  """
  path = Path(workdir)
  folders = seed_folders(path)
  if not folders:
    return _write_run(Workdir(path))
  found = Reproduction(path)
  for work in found.seeds.values():
    _write_run(work)
  return _write_reproduction(found)


def attempt(workdir: str) -> str:
  """As `write`, for the end of a run, which no report is to cost: a warning,
  and '' for the path, where it fails. A URL is read and written, too."""
  try:
    with opened(workdir) as folder:
      return write(folder).replace(folder, workdir)
  except Exception as error:
    again = f'python -m rocl_jax.report {shlex.quote(workdir)}'
    print(
      printable(f'warning: no report: {cause(error)}; to make it: {again}'),
      file=sys.stderr,
    )
    return ''


def summary(workdir: str) -> str:
  """The main numbers in plain text."""
  path = Path(workdir)
  if seed_folders(path):
    return paper.terminal_table(Reproduction(path))
  return terminal_table(Workdir(path).records)


def _write_run(work: Workdir) -> str:
  out = Writer(work.path)
  shown: list[Record] = []
  for section in (tables.introduction, tables.main_results, tables.selections):
    shown += out.section(section, work) or []
  for section in (
    robustness.ensembles,
    robustness.audit,
    robustness.classes,
    robustness.transfer,
    robustness.corruptions,
    training.recipes,
    training.curves,
    training.against_published,
    training.examples,
    training.density,
  ):
    out.section(section, work)
  out.section(tables.others, work, shown)
  out.section(tables.protocol, work)
  return out.save(work.problems)


def _write_reproduction(found: Reproduction) -> str:
  out = Writer(found.path)
  for section in (
    about.introduction,
    paper.tables,
    orderings.section,
    findings.section,
    paper.selections,
    paper.attacks,
    paper.baselines,
    pictures.by_stage,
    pictures.against_sparsity,
    pictures.curves,
  ):
    out.section(section, found)
  out.section(training.density, found.first)
  out.section(pictures.histograms, found)
  out.section(tables.protocol, found.first)
  out.section(about.commands, found)
  return out.save(found.problems)
