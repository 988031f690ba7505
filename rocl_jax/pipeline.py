"""A whole experiment: every run's stages in order, each model evaluated.

  WORKDIR/config.json                   what was asked for
  WORKDIR/<k>_<stage>/checkpoints/      train states while the stage runs
  WORKDIR/<k>_<stage>/model/            what it hands on; evaluation reads it
  WORKDIR/<k>_<stage>/best_validation/, best_test/     models of other epochs
  WORKDIR/<k>_<stage>/metrics.jsonl     a row an epoch
  WORKDIR/<k>_<stage>/profile/          traces of training steps, if asked for
  WORKDIR/<k>_<stage>/examples.json     a few images, before and after attack
  WORKDIR/<baseline>/<k>_<stage>/       the same for each baseline
  WORKDIR/results.json                  accuracies of all models
  WORKDIR/versions.jsonl                versions, devices and settings over time
  WORKDIR/changes.jsonl                 changes of the config

The same command after an interruption goes on where it stopped: stages with
a model are skipped, an unfinished one resumes from its last save.
"""

import functools
import itertools
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rocl_jax import (
  changes,
  checkpoint,
  evaluation,
  interruption,
  loop,
  masks,
  metrics,
  models,
  processes,
  provenance,
  results,
)
from rocl_jax.data import Dataset, Split, load, prepare
from rocl_jax.errors import RunFailed, UserError, nearest, shown
from rocl_jax.experiment import Experiment, Run, parse_experiment
from rocl_jax.files import exists, read_json, write_json
from rocl_jax.manifest import Damaged
from rocl_jax.mesh import check_batch, counting_in, make_mesh
from rocl_jax.mirror import mirrored
from rocl_jax.progress import say, warn
from rocl_jax.stages import STAGES
from rocl_jax.training import Training
from rocl_jax.trees import flatten
from rocl_jax.types import Variables
from rocl_jax.workdir import claim, make

CONFIG = 'config.json'
VERSIONS = 'versions.jsonl'  # a line for each change, the first as it began
_EXAMPLES = 8  # images in examples.json


def run(
  config: ConfigDict, workdir: str, allowed: Collection[str] = ()
) -> list[results.Record]:
  """Runs an experiment, or what is left of it.

  Args:
    config: see `experiment`; checked before any device work.
    workdir: the folder of everything that is written, or its URL; made if
      missing.
    allowed: fields, as 'config.seed', that may differ from what the folder
      was begun with.

  Returns:
    The records of `results.json`.

  Raises:
    UserError: a mistake in the config, or a workdir that holds another run.
    RunFailed: training or evaluation failed its own checks.
    Interrupted: the process was asked to stop.
  """
  experiment = parse_experiment(config)
  dtypes = [one.model.dtype for one in experiment.runs]
  with counting_in(dtypes), mirrored(workdir, '--workdir') as folder:
    root = processes.from_first(lambda: make(folder, '--workdir'))
    with claim(root, '--workdir'):
      return _run(experiment, root, allowed)


def _run(
  experiment: Experiment, root: epath.Path, allowed: Collection[str]
) -> list[results.Record]:
  settings = experiment.data
  # Hosts that share a folder must not all prepare it.
  processes.from_first(lambda: prepare(settings.source, settings.dir))
  dataset = load(settings.source, settings.dir, settings.validation)
  if len(dataset.class_names) < 2:
    raise UserError('config.data: found one class, wanted two or more')
  _check_sizes(experiment, dataset)
  chains = _chains(experiment, dataset, root)
  _agree(chains)
  shapes = _rehearse(chains)
  processes.from_first(lambda: _open(chains, allowed, root, lambda: shapes))
  for chain in chains:
    run_chain(chain)
  return processes.from_first(lambda: results.read(root / 'results.json'))


def check(
  experiment: Experiment,
  dataset: Dataset,
  root: epath.Path,
  allowed: Collection[str] = (),
) -> None:
  """Looks whether a run may go on in a folder, before anything else is done.

  Raises:
    UserError: the folder was made by another config.
  """
  if exists(root / CONFIG):
    chains = _chains(experiment, dataset, root)
    shapes = functools.partial(_rehearse, chains)
    _check_requests(chains, allowed, root, shapes, keep=False)


@dataclass(frozen=True, kw_only=True)
class Chain:
  """One run, ready to go.

  Attributes:
    run: its stages and settings.
    root: the work directory.
    parent: the run of this experiment, and its stage, that it starts from.
    dataset: the images.
    train_crc32: tells its training images from others.
    mesh: the devices.
    model: the network.
    evaluators: the attacks that every model meets; the first one also selects.
    splits: the evaluation images, by name.
    save_steps: steps between saves.
    max_skipped: steps in a row whose loss or gradient may not be finite.
    tensorboard: whether to write scalars for it.
    profile: steps of each stage to trace.
    resident: whether the devices hold the training set.
  """

  run: Run
  root: epath.Path
  parent: tuple['Chain', str] | None
  dataset: Dataset
  train_crc32: str
  mesh: Mesh
  model: models.Model
  evaluators: tuple[evaluation.Evaluator, ...]
  splits: dict[str, Split]
  save_steps: int
  max_skipped: int
  tensorboard: bool
  profile: int
  resident: bool

  @property
  def stages(self) -> list[tuple[str, Training, epath.Path]]:
    """Name, section and folder of each stage."""
    return [
      (name, settings, self.root / folder)
      for (name, settings), folder in zip(
        self.run.stages, self.run.folders, strict=True
      )
    ]


def _open(
  chains: Sequence[Chain],
  allowed: Collection[str],
  root: epath.Path,
  shapes: Callable[[], 'Shapes'],
) -> None:
  """Reads what a work directory holds before anything is added to it."""
  results.read(root / 'results.json')  # a damaged one is told of now
  _check_requests(chains, allowed, root, shapes)
  write_json(root / CONFIG, chains[0].run.config)
  path, now = root / VERSIONS, provenance.versions()
  lines = metrics.read_lines(path)
  before = lines[-1].get('versions', {}) if lines else {}
  new = provenance.changed(before, now)
  if lines and new:
    for line in new:
      say(f'the run: {line}')
    say(
      'the run continues; its result may now differ from that of an '
      'uninterrupted run'
    )
  if new:
    metrics.write(path, [*lines, {'at': _now(), 'versions': now}])


def _agree(chains: Sequence[Chain]) -> None:
  """Checks that all processes were started with the same things."""
  dataset = chains[0].dataset
  splits = (dataset.train, dataset.validation, dataset.test)
  processes.agree(
    {
      **{f'config of {c.run.name}': c.run.config for c in chains},
      'versions': provenance.deciding(provenance.software()),
      'code': provenance.code_fingerprint(),
      'images': [results.crc32(split) for split in splits],
    }
  )


def _chains(
  experiment: Experiment, dataset: Dataset, root: epath.Path
) -> list[Chain]:
  """All runs with their networks and evaluations; nothing is compiled yet."""
  mesh = make_mesh()

  @functools.cache  # runs of the same network share its compiled evaluation
  def network(settings: models.Settings):
    classes = len(dataset.class_names)
    model = models.build(settings, classes)
    batch_size = experiment.eval.batch_size
    return model, tuple(
      evaluation.evaluator(model, attack.of_classes(classes), mesh, batch_size)
      for attack in experiment.eval.selected
    )

  splits = {'validation': dataset.validation, 'test': dataset.test}
  train_crc32 = results.crc32(dataset.train)
  chains = []
  stages: dict[str, tuple[Chain, str]] = {}  # of the runs before, by folder
  for one in experiment.runs:
    model, evaluators = network(one.model)
    chains.append(
      Chain(
        run=one,
        root=root,
        parent=stages.get(one.init_from),
        dataset=dataset,
        train_crc32=train_crc32,
        mesh=mesh,
        model=model,
        evaluators=evaluators,
        splits=evaluation.cut(splits, experiment.eval.examples),
        save_steps=experiment.save_steps,
        max_skipped=experiment.max_skipped,
        tensorboard=experiment.tensorboard,
        profile=experiment.profile,
        resident=experiment.data.resident,
      )
    )
    for folder, (name, _) in zip(one.folders, one.stages, strict=True):
      stages[folder] = chains[-1], name
  return chains


def run_chain(chain: Chain) -> None:
  """Runs the stages that have no model yet, and evaluates what is new."""
  variables = _first_variables(chain)
  for name, settings, directory in chain.stages:
    finished = processes.from_first(
      functools.partial(_finished, directory / 'model')
    )
    if finished is not None:
      variables = finished
      say(f'{chain.run.name}/{name}: finished before')
    else:
      _write_request(chain, name, directory)
      variables = loop.run_stage(
        _stage_run(chain, name, settings, variables, directory)
      )
    if 'head' in variables['params']:
      _evaluate(chain, directory)


def _write_request(chain, name, directory):
  if processes.is_first():
    path, began = directory / 'request.json', _now()
    if checkpoint.steps(directory / 'checkpoints') and exists(path):
      began = read_json(path, dict).get('began', '')
    write_json(path, _request(chain, name) | {'began': began})


def _now():
  return datetime.now(UTC).isoformat(timespec='microseconds')


def _finished(path: epath.Path) -> Variables | None:
  """A stage's last model; None if there is none, or a damaged one, which the
  stage's last train state can make again.

  Raises:
    Unreadable: it can't be known; nothing was moved.
    UserError: the model is whole, and none of this version.
  """
  if not exists(path):
    return None
  try:
    return checkpoint.load_model(path)[0]
  except Damaged as e:
    say(f'{e}; set aside as {shown(checkpoint.set_aside(path))}')
    return None


def _selected(path: epath.Path) -> bool:
  """Whether a model was selected.

  Raises:
    RunFailed: it was, and is damaged: no train state is kept to make it of.
  """
  there = exists(path)
  whole = _finished(path) is not None
  if there and not whole:
    raise RunFailed(
      f'{shown(path)} was damaged and is set aside; the same command goes on '
      f'without it, and makes it anew if you delete {shown(path.parent)} and '
      'what follows'
    )
  return whole


def _first_variables(chain: Chain) -> Variables:
  """Fresh weights, or those of the model that `init_from` names."""
  start = chain.run.init_from
  if not start:
    return jax.device_get(jax.jit(functools.partial(_fresh, chain))())
  path = chain.root / start / 'model' if chain.parent else epath.Path(start)

  def read():
    try:
      return checkpoint.load_model(path)[0]
    except UserError as e:
      raise UserError(f'config.init_from: {e}') from None

  return processes.from_first(read)


def _fresh(chain: Chain) -> Variables:
  key = loop.stage_key(chain.run.seed, 'init')
  return chain.model.init(key, chain.dataset.train.images.shape[1:])


# By stage folder the shapes of what it starts from and what it hands on.
Shapes = dict[epath.Path, tuple[Variables, Variables]]


def _rehearse(chains: Sequence[Chain]) -> Shapes:
  """Walks all runs on shapes alone: does each stage get what it needs?

  Raises:
    UserError: a stage can't start from what stands before it.
  """
  shapes: Shapes = {}
  short: dict[str, list[str]] = {}  # stages by what their attack lacks
  for chain in chains:
    fresh = jax.eval_shape(functools.partial(_fresh, chain))
    start = chain.run.init_from
    variables = fresh
    if chain.parent:
      _, variables = shapes[chain.root / start]
    elif start:
      variables = _first_variables(chain)
    difference = models.mismatch(variables, fresh)
    if difference:
      raise UserError(
        f'config.init_from: {start} does not fit the network: {difference}'
      )
    upstream = start or 'a fresh network'
    for name, settings, directory in chain.stages:
      before = variables
      try:
        variables = _outcome(chain, name, settings, before)
      except KeyError as e:
        raise UserError(
          f'config.stages: {name} can not start from {upstream}, which has no '
          f'{e.args[0]}'
        ) from None
      upstream = name
      label = f'{chain.run.name}/{name}'
      if problem := _reach(settings):
        short.setdefault(problem, []).append(label)
      _warn_of_thin_layers(label, settings, variables)
      shapes[directory] = before, variables
  for problem, labels in short.items():
    warn(f'{", ".join(labels)}: {problem}')
  return shapes


def _reach(settings) -> str:
  """Why a stage's attack can not use its ball; '' if it can."""
  attack = getattr(settings, 'attack', None)
  if attack is None or attack.reach >= 1 - 1e-6:
    return ''
  eps, steps = attack.keywords['eps'], attack.keywords['steps']
  return (
    f'{steps} steps of {attack.keywords["step_size"]:g} do not reach eps, '
    f'{eps:g}: the attack can not use its ball'
  )


_FEW = 8  # weights of a layer that can hardly carry a signal


def _warn_of_thin_layers(label, settings, variables) -> None:
  """Says which layers pruning leaves with next to nothing."""
  keep = getattr(settings, 'keep', None)
  if keep is None:
    return
  for path, kernel in models.maskable(flatten(variables['params'])).items():
    kept = masks.kept_count(kernel.size, keep)
    if kept < min(_FEW, kernel.size) or kept < kernel.shape[-1] / 8:
      warn(
        f'{label} keeps {kept} of the {kernel.size} weights of '
        f'{path}, which feed {kernel.shape[-1]} channels: the network may be '
        f'dead; a larger keep (it is {keep:g}) or a wider network helps'
      )


def _outcome(chain, name, settings, upstream):
  """The shapes of what a stage hands on."""
  stage = STAGES[name].stage(chain.model, settings)
  trained = jax.eval_shape(stage.start, upstream, jax.random.key(0))
  return jax.eval_shape(stage.finish, trained)


def _stage_run(
  chain: Chain,
  name: str,
  settings: Training,
  upstream: Variables,
  directory: epath.Path,
) -> loop.StageRun:
  has_head = 'head' in _outcome(chain, name, settings, upstream)['params']
  dataset = chain.dataset
  return loop.StageRun(
    name=name,
    label=f'{chain.run.name}/{name}',
    stage=STAGES[name].stage(chain.model, settings),
    settings=settings,
    upstream=upstream,
    train=dataset.train,
    seed=chain.run.seed,
    mesh=chain.mesh,
    directory=directory,
    measure=functools.partial(_measure, chain) if has_head else None,
    about={
      'run': chain.run.name,
      'stage': name,
      'dataset': dataset.name,
      'class_names': list(dataset.class_names),
      'image_shape': list(dataset.train.images.shape[1:]),
      'train_images': len(dataset.train.labels),
      'config': chain.run.config,
      'versions': provenance.versions(),
      'earlier_versions': _earlier_versions(chain.root, directory),
    },
    save_steps=chain.save_steps,
    max_skipped=chain.max_skipped,
    tensorboard=chain.tensorboard,
    profile=chain.profile,
    resident=chain.resident,
  )


def _earlier_versions(
  root: epath.Path, directory: epath.Path
) -> list[dict[str, Any]]:
  """Under what else a stage was trained before it was gone on with; for the
  first process, which alone writes models."""
  if not processes.is_first():
    return []
  path = directory / 'request.json'
  began = read_json(path, dict).get('began', '') if exists(path) else ''
  lines = metrics.read_lines(root / VERSIONS)
  return [
    before for before, after in itertools.pairwise(lines) if after['at'] > began
  ]


def _measure(chain: Chain, variables: Variables) -> dict[str, float]:
  """Accuracies while training, under the first attack of the suite."""
  row = {}
  results.check_weights(jax.device_get(variables))
  for name, split in chain.splits.items():
    outcome = chain.evaluators[0].outcome(
      variables, split, chain.run.seed, watch=lambda *_: interruption.check()
    )
    for field in ('clean_top1', 'robust_top1'):
      row[f'{name}_{field}'] = round(outcome.percent(field), 4)
  return row


def _evaluate(chain: Chain, directory: epath.Path) -> None:
  """Evaluates the models of a stage, last and selected."""
  seed, path = chain.run.seed, chain.root / 'results.json'
  for folder in ('model', *loop.SELECTIONS):
    if processes.from_first(functools.partial(_selected, directory / folder)):
      results.evaluate_model(
        directory / folder, chain.evaluators, chain.splits, seed, path
      )
  first = chain.evaluators[0].attack
  about = {'attack': first.name, **first.ball}
  examples = directory / 'examples.json'

  def drawn():
    done = exists(examples) and read_json(examples, dict)
    return bool(done and about.items() <= done.items())

  if not processes.from_first(drawn):
    results.write_examples(
      directory / 'model',
      chain.evaluators[0],
      chain.dataset.test,
      seed,
      _EXAMPLES,
    )


def _check_sizes(experiment: Experiment, dataset: Dataset) -> None:
  n, devices = len(dataset.train.labels), jax.device_count()
  for one in experiment.runs:
    for name, section in one.stages:
      field = f'config.{name}.batch_size'
      if section.batch_size > n:
        raise UserError(
          f'{field}: found {section.batch_size}, wanted at most the {n} '
          'training images'
        )
      check_batch(field, section.batch_size, devices)
      if section.microbatch:
        field = f'config.{name}.microbatch'
        check_batch(field, section.microbatch, devices)


def _request(chain: Chain, stage: str) -> dict[str, Any]:
  """The part of the config that decides what a stage's model is."""
  config, start = chain.run.config, chain.run.init_from
  request = {k: config[k] for k in ('seed', 'init_from', 'model')}
  # Where the images are and lie does not change what comes of them.
  request['data'] = {k: config['data'][k] for k in ('source', 'validation')}
  request['data']['train_crc32'] = chain.train_crc32
  if chain.parent:  # what the stage before was made of, too
    request = _request(*chain.parent) | request
  elif start:
    about = read_json(epath.Path(start) / checkpoint.ABOUT, dict)
    request['init_from'] = f'{start} {about.get("fingerprint")}'
  names = [name for name, _ in chain.run.stages]
  for name in names[: names.index(stage) + 1]:
    request[name] = config[name]
  # Selected models depend on the evaluation that selects them.
  request['eval'] = {
    'examples': config['eval']['examples'],
    'attack': chain.evaluators[0].attack.protocol,
  }
  return json.loads(json.dumps(request))


def _check_requests(
  chains: Sequence[Chain],
  allowed: Collection[str],
  root: epath.Path,
  shapes: Callable[[], Shapes],
  keep: bool = True,
) -> None:
  """Compares with the configs that made the folders, and notes the changes.

  What decides a stage's model is refused, unless it is allowed by name. A
  finished stage may be evaluated in another way, though.

  Args:
    chains: all runs, the main one first.
    allowed: fields, as 'config.seed', that may have changed.
    root: the work directory.
    shapes: gives those of all stages; called where something has changed.
    keep: whether to write down what changed, and is allowed.

  Raises:
    UserError: a field that was not allowed, or can't be, as what is there
      has other shapes; all changes are printed before.
  """
  now = json.loads(json.dumps(chains[0].run.config))
  notes = changes.Changes(root)
  config_file = root / CONFIG
  if exists(config_file):
    notes.compare(read_json(config_file, dict), now, 'the run')
  for chain in chains:
    for stage, settings, directory in chain.stages:
      path = directory / 'request.json'
      if exists(path):
        before = read_json(path, dict)
        before.pop('began', None)
        request = _request(chain, stage)
        if checkpoint.is_model(directory / 'model'):
          before.pop('eval', None), request.pop('eval', None)
        if 'train_crc32' not in before.get('data', {}):  # of earlier versions
          del request['data']['train_crc32']
        _same_start(before, request)
        where = f'{chain.run.name}/{stage}'
        if notes.compare(before, request, where, str(directory)):
          upstream, outcome = shapes()[directory]
          one = _stage_run(chain, stage, settings, upstream, directory)
          if why := _misfit(one, outcome):
            notes.unfit(str(directory), why)
  fields = {'config.' + field.replace('/', '.') for field in flatten(now)}
  fields |= notes.fields()  # some were allowed once, and are fields no more
  for field in allowed:
    if field not in fields:
      hint = nearest(field, fields) or '; wanted one such as config.seed'
      raise UserError(f'--allow_change: no such field: {field}{hint}')
  notes.settle(allowed, keep)


def _same_start(before: dict[str, Any], request: dict[str, Any]) -> None:
  """A model to start from is the same wherever it lies, or is said to lie."""
  old, new = (str(x.get('init_from', '')) for x in (before, request))
  path, _, fingerprint = new.rpartition(' ')
  if path and old.endswith(f' {fingerprint}'):
    before['init_from'] = new


def _misfit(run: loop.StageRun, outcome: Variables) -> str:
  """Why a stage can't go on with what is in its folder; '' if it can."""
  model = run.directory / 'model'
  if checkpoint.is_model(model):
    return _difference(model, outcome)
  saves = run.directory / 'checkpoints'
  for done in checkpoint.steps(saves)[-1:]:
    n, settings = len(run.train.labels), run.settings
    total = settings.total_epochs * (n // settings.batch_size)
    if done > total:
      return loop.too_far(run.directory, done, total)
    return _difference(saves / str(done), loop.state_form(run))
  return ''


def _difference(folder: epath.Path, wanted: Any) -> str:
  found = checkpoint.forms(folder)
  if found is None:  # damaged: that is told when it is read
    return ''
  return checkpoint.difference(found, checkpoint.forms_of(wanted))
