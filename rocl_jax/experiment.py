"""What a config file asks for, checked as a whole before any device work.

A config is one section for each part of the project, a section for each
stage, and `baselines`: overlays of the same config, of which `compare` names
those to run beside the main run on the same data. An overlay names only what
it changes.
"""

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from rocl_jax import data, evaluation, metrics, models, stream
from rocl_jax.errors import UserError, nearest
from rocl_jax.files import is_remote, place
from rocl_jax.settings import Place, at_least, one_of, parse, within
from rocl_jax.stages import STAGES
from rocl_jax.training import Training

# Fields that a baseline shares with the main run.
_SHARED = (
  *('name', 'data', 'eval', 'save_steps', 'max_skipped', 'tensorboard'),
  *('profile', 'baselines', 'compare'),
)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
  """The `data` section; see `rocl_jax.data`.

  Attributes:
    source: a name in `data.SOURCES`.
    dir: where the source finds its files.
    validation: training images held out for model selection.
    resident: whether every device holds the training set, or it is streamed.
  """

  source: str
  dir: Place
  validation: int
  resident: bool = True

  def __post_init__(self):
    data.check(self.source, self.dir, self.validation)
    if not self.resident:
      stream.check()


@dataclass(frozen=True, kw_only=True)
class Run:
  """A chain of stages.

  Attributes:
    name: what records call it.
    seed: of all its random numbers.
    stages: the stages in order, with their sections.
    init_from: '' for fresh weights; a stage folder of a run before this one,
      such as '1_pretrain' of the main run or 'rocl/1_linear_eval' of another;
      or the path of a model folder.
    model: the network.
    config: the resolved config, as JSON values.
    directory: where its stages are in the work directory, '' for the main run.
  """

  name: str
  seed: int
  stages: tuple[tuple[str, Training], ...]
  init_from: str
  model: models.Settings
  config: dict[str, Any]
  directory: str

  @property
  def folders(self) -> list[str]:
    """Each stage's folder in the work directory: '1_pretrain', 'rocl/1_...'."""
    prefix = f'{self.directory}/' if self.directory else ''
    return [f'{prefix}{i}_{name}' for i, (name, _) in enumerate(self.stages, 1)]


@dataclass(frozen=True, kw_only=True)
class Experiment:
  """The main run, its baselines, and what they share.

  Attributes:
    runs: the main run first.
    data: the data set.
    eval: the evaluation that every model gets.
    save_steps: steps between saves of the train state.
    max_skipped: steps in a row whose loss or gradient may be other than finite
      before the run stops; each is left out, and recorded.
    tensorboard: whether to write scalars for it.
    profile: steps of each stage to trace.
  """

  runs: tuple[Run, ...]
  data: DataSettings
  eval: evaluation.Settings
  save_steps: int
  max_skipped: int
  tensorboard: bool
  profile: int


@dataclass(frozen=True, kw_only=True)
class _TopLevel:
  """The fields of a config beside the stages' sections."""

  name: str
  seed: int
  stages: tuple[str, ...]
  init_from: str
  baselines: dict
  compare: tuple[str, ...]
  data: DataSettings
  model: models.Settings
  eval: evaluation.Settings
  save_steps: int
  max_skipped: int
  tensorboard: bool
  profile: int = 0

  def __post_init__(self):
    within('seed', self.seed, 0, 2**32 - 1)
    at_least('save_steps', self.save_steps, 1)
    at_least('max_skipped', self.max_skipped, 0)
    at_least('profile', self.profile, 0)
    for stage in self.stages:
      one_of('stages', stage, STAGES)
    for name in self.compare:
      one_of('compare', name, self.baselines)
    if self.tensorboard:
      metrics.check_tensorboard()


def parse_experiment(config: ConfigDict) -> Experiment:
  """Checks a config and turns it into records.

  Raises:
    UserError: an unknown or missing field, a wrong type or value, an unknown
      stage, attack or source, a missing data folder.
  """
  if not isinstance(config, ConfigDict):
    raise UserError(
      f'--config: get_config gives {config!r:.40}, wanted a ConfigDict'
    )
  top, main = _parse_run(config, name='', where='config')
  runs = [main]
  check_name('config.name', main.name)
  for name in top.compare:
    where = f'config.baselines.{name}'
    check_name(where, name)
    if name in [run.name for run in runs]:
      raise UserError(f'{where}: there is a run of this name already')
    overlay = config.baselines[name]
    if not isinstance(overlay, ConfigDict):
      raise UserError(f'{where}: found {overlay!r}, wanted a section')
    for field in _SHARED:
      if field in overlay:
        raise UserError(
          f'{where}.{field}: a baseline shares this field with the main run'
        )
    changed = copy.deepcopy(config)
    with changed.unlocked():
      _overlay(changed, overlay, where)
    runs.append(_parse_run(changed, name, where)[1])
  _check_starts(runs)
  return Experiment(
    runs=tuple(runs),
    data=top.data,
    eval=top.eval,
    save_steps=top.save_steps,
    max_skipped=top.max_skipped,
    tensorboard=top.tensorboard,
    profile=top.profile,
  )


def check_name(where: str, name: str) -> None:
  """Raises UserError unless it is one for a run: that of a folder, too."""
  if not re.fullmatch(r'[A-Za-z][\w.-]*', name) or name == 'figures':
    raise UserError(
      f'{where}: found {name!r}, wanted a name of letters, digits, ".", "_" '
      'and "-" that starts with a letter'
    )


def _overlay(config, overlay, where):
  """Sets the overlay's leaves in the config, where references follow them."""
  for field, value in overlay.items():
    if field not in config:
      hint = nearest(field, config)
      raise UserError(f'{where}.{field}: no such field{hint}')
    if isinstance(value, Mapping | ConfigDict):
      if not isinstance(config[field], ConfigDict):
        raise UserError(f'{where}.{field}: not a section')
      _overlay(config[field], value, f'{where}.{field}')
      continue
    try:
      config[field] = value
    except (TypeError, ValueError):
      wanted = type(config[field]).__name__
      raise UserError(
        f'{where}.{field}: found {value!r}, wanted a {wanted}'
      ) from None


def _parse_run(config, name, where):
  values = config.copy_and_resolve_references().to_dict()
  fields = {k: v for k, v in values.items() if k not in STAGES}
  for field in fields:
    known = [*_TopLevel.__annotations__, *STAGES]
    if field not in known:
      raise UserError(f'{where}.{field}: no such field{nearest(field, known)}')
  top = parse(_TopLevel, fields, where)
  start = top.init_from
  if not _is_stage_folder(start, (top.name, *top.compare)):
    try:
      start = place(start)
    except UserError as e:
      raise UserError(f'{where}.init_from: {e}') from None
  values['data'] |= {'dir': top.data.dir}
  # The stages of this run first: a mistake shows where it was made.
  sections = {
    stage: parse(STAGES[stage].Settings, values[stage], f'{where}.{stage}')
    for stage in dict.fromkeys((*top.stages, *STAGES))
    if stage in values
  }
  if len(set(top.stages)) < len(top.stages) or not top.stages:
    raise UserError(
      f'{where}.stages: found {top.stages}, wanted at least one stage, each '
      'at most once'
    )
  for stage in top.stages:
    if stage not in sections:
      raise UserError(f'{where}.{stage}: missing, and the stages name it')
  directory, name = name, name or top.name
  run = Run(
    name=name,
    directory=directory,
    seed=top.seed,
    stages=tuple((stage, sections[stage]) for stage in top.stages),
    init_from=start,
    model=top.model,
    config={k: v for k, v in values.items() if k != 'baselines'}
    | {'name': name, 'stages': top.stages, 'init_from': start},
  )
  return top, run


def _is_stage_folder(start: str, names: Collection[str]) -> bool:
  """Whether `init_from` names one of a run before, and is no path."""
  name, _, folder = start.rpartition('/')
  return name in ('', *names) and folder[:1].isdigit()


def _check_starts(runs):
  """Checks `init_from` where it names a stage of a run before."""
  folders: list[str] = []
  for run in runs:
    start = run.init_from
    ours = _is_stage_folder(start, [one.name for one in runs])
    where = 'config' if run is runs[0] else f'config.baselines.{run.name}'
    if is_remote(start):
      raise UserError(
        f'{where}.init_from: found {start}, wanted a folder of this machine, '
        'or a stage folder of a run before'
      )
    if ours and start not in folders:
      raise UserError(
        f'{where}.init_from: no run before this one has a stage folder '
        f'{start!r} to start from{nearest(start, folders)}'
      )
    folders += run.folders
