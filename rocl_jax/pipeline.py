"""A whole experiment: every run's stages in order, each model evaluated.

  WORKDIR/config.json                   what was asked for
  WORKDIR/<k>_<stage>/checkpoints/      train states while the stage runs
  WORKDIR/<k>_<stage>/model/            what it hands on; evaluation reads it
  WORKDIR/<k>_<stage>/best_validation/, best_test/     models of other epochs
  WORKDIR/<k>_<stage>/metrics.jsonl     a row an epoch
  WORKDIR/<k>_<stage>/examples.json     a few images, before and after attack
  WORKDIR/<baseline>/<k>_<stage>/       the same for each baseline
  WORKDIR/results.json                  accuracies of all models

The same command after an interruption goes on where it stopped: stages with
a model are skipped, an unfinished one resumes from its last save.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rocl_jax import checkpoint, evaluation, loop, metrics, models, results
from rocl_jax.data import Dataset, Split, load
from rocl_jax.errors import UserError
from rocl_jax.experiment import Experiment, Run, parse_experiment, stage_folder
from rocl_jax.files import read_json, write_json
from rocl_jax.mesh import check_batch, make_mesh
from rocl_jax.progress import say
from rocl_jax.stages import STAGES
from rocl_jax.training import Training
from rocl_jax.trees import flatten
from rocl_jax.types import Variables

_EXAMPLES = 8  # images in examples.json


def run(config: ConfigDict, workdir: str) -> list[results.Record]:
  """Runs an experiment, or what is left of it.

  Args:
    config: see `experiment`; checked before any device work.
    workdir: the folder of everything that is written; made if missing.

  Returns:
    The records of `results.json`.

  Raises:
    UserError: a mistake in the config, or a workdir that holds another run.
    RunFailed: training or evaluation failed its own checks.
  """
  experiment = parse_experiment(config)
  root = _workdir(workdir)
  settings = experiment.data
  dataset = load(settings.source, settings.dir, settings.validation)
  _check_sizes(experiment, dataset)
  chains = _chains(experiment, dataset, root)
  _rehearse(chains)
  for chain in chains:
    _check_requests(chain, chains[0])
  results.read(root / 'results.json')  # a damaged one is told of now
  write_json(root / 'config.json', experiment.runs[0].config)
  for chain in chains:
    run_chain(chain, chains[0])
  return results.read(root / 'results.json')


@dataclass(frozen=True, kw_only=True)
class Chain:
  """One run, ready to go.

  Attributes:
    run: its stages and settings.
    root: the work directory.
    directory: the folder of its stages.
    dataset: the images.
    mesh: the devices.
    model: the network.
    evaluators: the attacks that every model meets; the first one also selects.
    splits: the evaluation images, by name.
    save_steps: steps between saves.
    tensorboard: whether to write scalars for it.
  """

  run: Run
  root: epath.Path
  directory: epath.Path
  dataset: Dataset
  mesh: Mesh
  model: models.Model
  evaluators: tuple[evaluation.Evaluator, ...]
  splits: dict[str, Split]
  save_steps: int
  tensorboard: bool

  @property
  def stages(self) -> list[tuple[str, Training, epath.Path]]:
    """Name, section and folder of each stage."""
    return [
      (name, settings, self.directory / stage_folder(i, name))
      for i, (name, settings) in enumerate(self.run.stages)
    ]


def _chains(
  experiment: Experiment, dataset: Dataset, root: epath.Path
) -> list[Chain]:
  """All runs with their networks and evaluations; nothing is compiled yet."""
  mesh = make_mesh()

  @functools.cache  # runs of the same network share its compiled evaluation
  def network(settings: models.Settings):
    model = models.build(settings, len(dataset.class_names))
    batch_size = experiment.eval.batch_size
    return model, tuple(
      evaluation.evaluator(model, attack, mesh, batch_size)
      for attack in experiment.eval.selected
    )

  splits = {'validation': dataset.validation, 'test': dataset.test}
  chains = []
  for one in experiment.runs:
    model, evaluators = network(one.model)
    is_main = one is experiment.runs[0]
    chains.append(
      Chain(
        run=one,
        root=root,
        directory=root if is_main else root / one.name,
        dataset=dataset,
        mesh=mesh,
        model=model,
        evaluators=evaluators,
        splits=evaluation.cut(splits, experiment.eval.examples),
        save_steps=experiment.save_steps,
        tensorboard=experiment.tensorboard,
      )
    )
  return chains


def run_chain(chain: Chain, main: Chain) -> None:
  """Runs the stages that have no model yet, and evaluates what is new."""
  variables = _first_variables(chain)
  for name, settings, directory in chain.stages:
    if checkpoint.is_model(directory / 'model'):
      variables, _ = checkpoint.load_model(directory / 'model')
      say(f'{chain.run.name}/{name}: finished before')
    else:
      request = _request(chain, name, main)
      write_json(directory / 'request.json', request)
      variables = _train(chain, name, settings, variables, directory)
    if 'head' in variables['params']:
      _evaluate(chain, directory)


def _first_variables(chain: Chain) -> Variables:
  """Fresh weights, or those of the model that `init_from` names."""
  start = chain.run.init_from
  if not start:
    return jax.jit(functools.partial(_fresh, chain))()
  stage = chain.root / start / 'model'
  path = stage if checkpoint.is_model(stage) else epath.Path(start)
  variables, _ = checkpoint.load_model(path)
  return variables


def _fresh(chain: Chain) -> Variables:
  key = loop.stage_key(chain.run.seed, 'init')
  return chain.model.init(key, chain.dataset.train.images.shape[1:])


def _rehearse(chains: Sequence[Chain]) -> None:
  """Walks all runs on shapes alone: does each stage get what it needs?

  Raises:
    UserError: a stage can't start from what stands before it.
  """
  handed_on: dict[str, Variables] = {}  # by the main run, by stage folder
  for chain in chains:
    fresh = jax.eval_shape(functools.partial(_fresh, chain))
    start = chain.run.init_from
    variables = handed_on.get(start) or (
      _first_variables(chain) if start else fresh
    )
    difference = models.mismatch(variables, fresh)
    if difference:
      raise UserError(
        f'config.init_from: {start} does not fit the network: {difference}'
      )
    upstream = start or 'a fresh network'
    for name, settings, directory in chain.stages:
      try:
        variables = _outcome(chain, name, settings, variables)
      except KeyError as e:
        raise UserError(
          f'config.stages: {name} can not start from {upstream}, which has no '
          f'{e.args[0]}'
        ) from None
      upstream = name
      if chain is chains[0]:
        handed_on[directory.name] = variables


def _outcome(chain, name, settings, upstream):
  """The shapes of what a stage hands on."""
  stage = STAGES[name].stage(chain.model, settings)
  trained = jax.eval_shape(stage.start, upstream, jax.random.key(0))
  return jax.eval_shape(stage.finish, trained)


def _train(
  chain: Chain,
  name: str,
  settings: Training,
  upstream: Variables,
  directory: epath.Path,
) -> Variables:
  has_head = 'head' in _outcome(chain, name, settings, upstream)['params']
  dataset = chain.dataset
  return loop.run_stage(
    loop.StageRun(
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
        'config': chain.run.config,
        'versions': results.versions(),
      },
      save_steps=chain.save_steps,
      tensorboard=chain.tensorboard,
    )
  )


def _measure(chain: Chain, variables: Variables) -> dict[str, float]:
  """Accuracies while training, under the first attack of the suite."""
  row = {}
  for name, split in chain.splits.items():
    outcome = chain.evaluators[0].outcome(variables, split, chain.run.seed)
    for field in ('clean_top1', 'robust_top1'):
      row[f'{name}_{field}'] = round(outcome.percent(field), 4)
  return row


def _evaluate(chain: Chain, directory: epath.Path) -> None:
  """Evaluates the models of a stage, last and selected."""
  seed, path = chain.run.seed, chain.root / 'results.json'
  for folder in ('model', *loop.SELECTIONS):
    if checkpoint.is_model(directory / folder):
      results.evaluate_model(
        directory / folder, chain.evaluators, chain.splits, seed, path
      )
  first = chain.evaluators[0].attack
  about = {'attack': first.name, **first.ball}
  examples = directory / 'examples.json'
  done = examples.exists() and read_json(examples, dict)
  if not (done and about.items() <= done.items()):
    results.write_examples(
      directory / 'model',
      chain.evaluators[0],
      chain.dataset.test,
      seed,
      _EXAMPLES,
    )


def _workdir(path: str) -> epath.Path:
  """The folder, made if missing.

  Raises:
    UserError: it can't be written.
  """
  if '://' in path:
    raise UserError(f'--workdir: found {path}, wanted a folder of this machine')
  root = epath.Path(path).expanduser().resolve()
  try:
    root.mkdir(parents=True, exist_ok=True)
    probe = root / '.writable'
    probe.write_text('')
    probe.unlink()
  except OSError as e:
    raise UserError(
      f'--workdir: {root} is no folder that can be written: {e.strerror}'
    ) from None
  return root


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


def _request(chain: Chain, stage: str, main: Chain) -> dict[str, Any]:
  """The part of the config that decides what a stage's model is."""
  config, start = chain.run.config, chain.run.init_from
  request = {k: config[k] for k in ('seed', 'init_from', 'model')}
  request['data'] = {k: v for k, v in config['data'].items() if k != 'dir'}
  if start:  # what the stage before was made of, too
    folders = {folder.name: name for name, _, folder in main.stages}
    if start in folders and chain is not main:
      request = _request(main, folders[start], main) | request
    else:
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


def _check_requests(chain: Chain, main: Chain) -> None:
  """Refuses to go on with a folder that another config made.

  A finished stage may be evaluated in another way, though.
  """
  for stage, _, directory in chain.stages:
    path = directory / 'request.json'
    if not path.exists():
      continue
    finished = checkpoint.is_model(directory / 'model')
    before = flatten(read_json(path, dict))
    now = flatten(_request(chain, stage, main))
    for field in sorted(before.keys() | now.keys()):
      if finished and field.startswith('eval/'):
        continue
      if before.get(field) != now.get(field):
        raise UserError(
          f'config.{field.replace("/", ".")}: found {now.get(field)!r}, but '
          f'{directory} was made with {before.get(field)!r}; take another '
          '--workdir, or delete that folder and those after it'
        )
    metrics.read(directory / 'metrics.jsonl', 0)  # damage is told of now
