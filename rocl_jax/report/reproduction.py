"""A reproduction: a work directory of `configs/paper.py` for each seed."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rocl_jax import published
from rocl_jax.errors import RunFailed, UserError
from rocl_jax.report.reading import Workdir
from rocl_jax.report.records import Record, find_headline, pick
from rocl_jax.report.text import column, number, plain

SEED_FOLDER = re.compile(r'seed(\d+)')
SURROGATE = 'surrogate'
SPLIT = 'test'

# What a row stands on where it has no stage of its own of this name.
_INSTEAD = {'supervised': 'linear_eval'}


class Model(NamedTuple):
  """A model, by the names of its run and of its stage."""

  run: str
  stage: str

  def __str__(self) -> str:
    return f'{self.run}, {self.stage}'


class Value(NamedTuple):
  """A number, for each seed that has it."""

  values: tuple[float, ...] = ()

  @property
  def mean(self) -> float:
    return float(np.mean(self.values)) if self.values else math.nan

  @property
  def sd(self) -> float:
    """Sample standard deviation; NaN for a single seed."""
    return float(np.std(self.values, ddof=1)) if self.values[1:] else math.nan

  def text(self, seeds: int) -> str:
    """'76.66', '76.66 ± 0.31', or '76.66 (1 of 2)' where seeds are missing."""
    if not self.values:
      return '–'
    text = number(self.mean)
    if self.values[1:]:
      text += f' ± {number(self.sd)}'
    if len(self.values) < seeds:
      text += f' ({len(self.values)} of {seeds})'
    return text


def value(records: Mapping[str, Record], key: str) -> Value:
  """A number of records by seed."""
  found = column(list(records.values()), key)
  return Value(tuple(x for x in found if math.isfinite(x)))


def seed_folders(path: Path) -> list[Path]:
  """The work directories of a reproduction; none where it is not one.

  One that was begun and has nothing yet is left out, unless it is alone.
  """
  if not path.is_dir():
    return []
  found = [(SEED_FOLDER.fullmatch(p.name), p) for p in path.iterdir()]
  folders = sorted((int(m[1]), p) for m, p in found if m and p.is_dir())
  begun = [p for _, p in folders if (p / 'config.json').is_file()]
  return begun or [p for _, p in folders]


class Reproduction:
  """What was found below the folder of a reproduction.

  Attributes:
    path: the folder.
    seeds: the work directories, by the names of their folders.
    first: that of the first seed: configs, curves and layers are its own.
    runs: their names, the main one first.
    lost: a line for each seed that has nothing to report.
  """

  def __init__(self, path: Path) -> None:
    self.path = path
    self.seeds: dict[str, Workdir] = {}
    self.lost: list[str] = []
    for folder in seed_folders(path):
      try:
        self.seeds[folder.name] = Workdir(folder)
      except (UserError, RunFailed) as error:
        self.lost.append(str(error))
    if not self.seeds:
      raise UserError(self.lost[0])
    self.first = next(iter(self.seeds.values()))
    self.main_run = self.first.main_run
    runs = [run for work in self.seeds.values() for run in work.runs]
    known = published.row_names().values()
    order = [self.main_run, *(run for run in known if run in runs), *runs]
    self.runs = list(dict.fromkeys(order))
    self._configs: dict[str, Mapping[str, Any]] = {}
    self._attacks: dict[tuple[str, str], tuple[list[Record], Any]] = {}

  def config(self, run: str) -> Mapping[str, Any]:
    """What a run was asked for, or {}."""
    if run not in self._configs:
      said = (work.config_of(run) for work in self.seeds.values())
      self._configs[run] = next(filter(None, said), {})
    return self._configs[run]

  def section(self, run: str, name: str) -> Mapping[str, Any]:
    return _mapping(self.config(run).get(name))

  def stages(self, run: str) -> list[str]:
    """A run's own stages in order, those to come included."""
    planned = self.config(run).get('stages')
    names = planned if isinstance(planned, list | tuple) else []
    names = [name for name in names if isinstance(name, str)]
    found = [s for w in self.seeds.values() for s in w.stages(run)]
    return list(dict.fromkeys([*names, *found]))

  def start(self, run: str) -> Model | None:
    """The model that a run starts from, if it is one of this folder."""
    start = self.config(run).get('init_from')
    if not isinstance(start, str) or not start:
      return None
    parent, _, folder = start.rpartition('/')
    model = Model(parent or self.main_run, folder.partition('_')[2])
    return model if model.stage in self.stages(model.run) else None

  def holder(self, run: str, stage: str) -> Model:
    """The model behind a row of the paper.

    Its own; or that of the run that it starts from, if the stage is one of
    those that it shares with it. Baseline 1 + Baseline 2 has the classifier of
    Baseline 1 in the place of a supervised stage.
    """
    model, allowed = Model(run, stage), self.stages(run)
    seen = set()
    while run not in seen:
      seen.add(run)
      if stage in allowed:
        return Model(run, stage)
      parent = self.start(run)
      if parent is None:
        break
      if parent.stage == _INSTEAD.get(stage):
        return parent
      run, stages = parent.run, self.stages(parent.run)
      allowed = stages[: stages.index(parent.stage) + 1]
    return model

  def last(self, run: str) -> Model | None:
    """The model that a run ends with, if it has classifiers at all."""
    stages = [s for s in self.stages(run) if s != 'pretrain']
    return Model(run, stages[-1]) if stages else None

  def records(
    self, model: Model, attack: str, selection: str = 'last'
  ) -> dict[str, Record]:
    """What an attack left of a model, by the seeds that have it."""
    found = {}
    for seed in self.seeds:
      of_attack, headline = self._of(seed, attack)
      record = pick(of_attack, *model, selection, SPLIT, headline)
      if record:
        found[seed] = record
    return found

  def alongside(
    self, attack: str, records: dict[str, Record]
  ) -> dict[str, Record]:
    """What another attack left of the same models' last epochs, on the same
    images, by the seeds that have it."""
    found = {}
    keys = ('run', 'stage', 'selection', 'split', 'n', 'images_crc32')
    for seed, record in records.items():
      for other in self._of(seed, attack)[0]:
        if all(other.get(k) == record.get(k) for k in keys):
          found[seed] = other
    return found

  def _of(self, seed, attack):
    """The records of an attack, and the protocol of it that most models had."""
    if (seed, attack) not in self._attacks:
      records = [
        r
        for r in self.seeds[seed].records
        if r.get('attack') == attack and r.get('corruption') is None
      ]
      usual = find_headline(records, SPLIT)
      self._attacks[seed, attack] = records, usual
    return self._attacks[seed, attack]

  def transfers(self, run: str, masked: bool) -> dict[str, Record]:
    """What the surrogate's images left of a run's last model, by seed."""
    found = {}
    for seed, work in self.seeds.items():
      known = [
        r
        for r in work.transfers
        if r['source'].get('run') == SURROGATE
        and (r['target'].get('run'), r['target'].get('stage')) == self.last(run)
        and r['target'].get('selection', 'last') == 'last'
        and (r['masked'], r['split']) == (masked, SPLIT)
        and work.counts(r['source'])
        and work.counts(r['target'])
      ]
      # PGD-10 as in the paper's table, where there is a choice.
      if known:
        found[seed] = max(known, key=lambda r: (r['attack'] == 'pgd10', r['n']))
    return found

  @property
  def problems(self) -> list[str]:
    """A line for each file or seed that was left out so far."""
    found = [line for work in self.seeds.values() for line in work.problems]
    return [*self.lost, *found]

  def layers(self, model: Model) -> dict[str, tuple[int, int]]:
    """{path: (size, kept)} of a model's maskable weights, or {}."""
    layers = self.first.model(*model).get('layers', {})
    return {path: (x['size'], x['kept']) for path, x in layers.items()}


def _mapping(found: Any) -> Mapping[str, Any]:
  return found if isinstance(found, Mapping) else {}


def rows_of(table: int) -> list[Record]:
  """The rows of one of the paper's tables."""
  return [row for row in published.tables()['rows'] if row['table'] == table]


def paper_row(model: Model) -> Record:
  """What the paper says of a model, in the first table that has it; or {}."""
  for row in published.tables()['rows']:
    if (row['row'], row['stage']) == model:
      return row
  return {}


def sizes(records: Mapping[str, Record]) -> str:
  """'10000', or all the numbers of images that there are."""
  found = dict.fromkeys(r.get('n') for r in records.values())
  return ', '.join(map(plain, found)) or '–'
