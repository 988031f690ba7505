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

import json
import subprocess
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rocl_jax import checkpoint, evaluation, loop, models
from rocl_jax.data import Dataset, Split, load
from rocl_jax.errors import UserError
from rocl_jax.experiment import (
  Experiment,
  Run,
  parse_experiment,
  stage_folder,
)
from rocl_jax.files import write_json
from rocl_jax.mesh import check_batch, make_mesh
from rocl_jax.progress import say
from rocl_jax.stages import STAGES
from rocl_jax.trees import flatten
from rocl_jax.types import Variables

Record = dict[str, Any]

_EXAMPLES = 8  # images in examples.json
# What identifies a record; a newer one with the same values replaces it.
_IDENTITY = ('run', 'stage', 'selection', 'split', 'attack', 'eps', 'n')


def run(config: ConfigDict, workdir: str) -> list[Record]:
  """Runs an experiment, or what is left of it.

  Args:
    config: see `experiment`; checked before any device work.
    workdir: the folder of all results; made if it is missing.

  Returns:
    The records of `results.json`.

  Raises:
    UserError: a mistake in the config, or a workdir that holds another run.
    RunFailed: training failed its own checks.
  """
  experiment = parse_experiment(config)
  root = epath.Path(workdir).resolve()
  _check_workdir(root)
  settings = experiment.data
  dataset = load(settings.source, settings.dir, settings.validation)
  _check_sizes(experiment, dataset)
  write_json(root / 'config.json', config.copy_and_resolve_references().to_dict())
  mesh = make_mesh()
  for one in experiment.runs:
    _Runner(experiment, one, dataset, mesh, root).run_stages()
  return read_results(root / 'results.json')


def _check_workdir(root):
  try:
    root.mkdir(parents=True, exist_ok=True)
    probe = root / '.writable'
    probe.write_text('')
    probe.unlink()
  except OSError as e:
    raise UserError(
      f'--workdir: {root} is no folder that can be written: {e.strerror}'
    ) from None


def _check_sizes(experiment, dataset):
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


class _Runner:
  """One run: what its stages share, so that they can be told apart."""

  def __init__(
    self,
    experiment: Experiment,
    run: Run,
    dataset: Dataset,
    mesh: Mesh,
    root: epath.Path,
  ):
    self.experiment, self.run, self.dataset = experiment, run, dataset
    self.mesh, self.root = mesh, root
    is_main = run is experiment.runs[0]
    self.directory = root if is_main else root / run.name
    self.model = models.build(run.model, len(dataset.class_names))
    settings = experiment.eval
    self.evaluators = [
      evaluation.evaluator(self.model, attack, mesh, settings.batch_size)
      for attack in settings.selected
    ]

  def run_stages(self) -> None:
    folders = [
      self.directory / stage_folder(i, name)
      for i, (name, _) in enumerate(self.run.stages)
    ]
    variables = self.first_variables()
    self.rehearse(variables)
    for (name, settings), directory in zip(self.run.stages, folders):
      self.check_same_request(directory, name)
      label = f'{self.run.name}/{name}'
      if checkpoint.is_model(directory / 'model'):
        variables, _ = checkpoint.load_model(directory / 'model')
        say(f'{label}: finished before')
      else:
        variables = self.train(name, settings, variables, directory, label)
      self.evaluate(name, directory, label)

  def first_variables(self) -> Variables:
    """Fresh weights, or those of the model that `init_from` names."""
    shape = self.dataset.train.images.shape[1:]
    key = loop.stage_key(self.run.seed, 'init')
    fresh = jax.jit(self.model.init, static_argnums=1)(key, shape)
    start = self.run.init_from
    if not start:
      return fresh
    in_workdir = self.root / start / 'model'
    is_stage = checkpoint.is_model(in_workdir)
    path = in_workdir if is_stage else epath.Path(start)
    variables, _ = checkpoint.load_model(path)
    wanted, found = flatten(fresh['params']), flatten(variables['params'])
    for name in found:
      if name not in wanted or wanted[name].shape != found[name].shape:
        raise UserError(
          f'config.init_from: {path} does not fit the network: its {name} is '
          f'{found[name].shape}, wanted '
          f'{wanted[name].shape if name in wanted else "no such weight"}'
        )
    return variables

  def rehearse(self, variables: Variables) -> None:
    """Walks the chain on shapes alone, to find stages that do not fit."""
    key, upstream = jax.random.key(0), 'a fresh network'
    for name, settings in self.run.stages:
      stage = STAGES[name].stage(self.model, settings)
      try:
        trained = jax.eval_shape(stage.start, variables, key)
        variables = jax.eval_shape(stage.finish, trained)
      except KeyError as e:
        raise UserError(
          f'config.stages: {name} can not start from {upstream}, which has no '
          f'{e.args[0]}'
        ) from None
      if 'head' not in variables['params'] and 'projector' not in (
        variables['params']
      ):
        raise AssertionError(f'{name} hands on neither head nor projector')
      upstream = name

  def check_same_request(self, directory: epath.Path, name: str) -> None:
    """Refuses to go on with a folder that another config made."""
    config = self.run.config
    request = {k: config[k] for k in ('seed', 'init_from', 'data', 'model')}
    request |= {'stages': list(config['stages'])}
    for stage in config['stages'][: config['stages'].index(name) + 1]:
      request[stage] = config[stage]
    request = json.loads(json.dumps(request))
    path = directory / 'request.json'
    if not path.exists():
      write_json(path, request)
      return
    before, now = flatten(json.loads(path.read_text())), flatten(request)
    for field in sorted(before.keys() | now.keys()):
      old, new = before.get(field), now.get(field)
      if old != new:
        raise UserError(
          f'config.{field.replace("/", ".")}: found {new!r}, but {directory} '
          f'was made with {old!r}; take another --workdir, or delete that '
          'folder and those after it'
        )

  def train(
    self,
    name: str,
    settings: Any,
    upstream: Variables,
    directory: epath.Path,
    label: str,
  ) -> Variables:
    stage = STAGES[name].stage(self.model, settings)
    trained = jax.eval_shape(stage.start, upstream, jax.random.key(0))
    has_head = 'head' in jax.eval_shape(stage.finish, trained)['params']
    return loop.run_stage(
      loop.StageRun(
        name=name,
        label=label,
        stage=stage,
        settings=settings,
        upstream=upstream,
        train=self.dataset.train,
        seed=self.run.seed,
        mesh=self.mesh,
        directory=directory,
        measure=self.measure if has_head else None,
        about=self.about(name),
        save_steps=self.experiment.save_steps,
        tensorboard=self.experiment.tensorboard,
      )
    )

  def about(self, stage: str) -> Record:
    """What goes with every model: enough to rebuild and to judge it."""
    dataset = self.dataset
    return {
      'run': self.run.name,
      'stage': stage,
      'dataset': dataset.name,
      'class_names': list(dataset.class_names),
      'image_shape': list(dataset.train.images.shape[1:]),
      'config': self.run.config,
      'versions': versions(),
    }

  def splits(self) -> dict[str, Split]:
    """The evaluation splits that are not empty, cut to `eval.examples`."""
    count = self.experiment.eval.examples or None
    splits = {'validation': self.dataset.validation, 'test': self.dataset.test}
    return {
      name: Split(split.images[:count], split.labels[:count])
      for name, split in splits.items()
      if len(split.labels)
    }

  def measure(self, variables: Variables) -> dict[str, float]:
    """Accuracies while training, under the first attack of the suite."""
    row = {}
    for split_name, split in self.splits().items():
      outcome = self.evaluators[0].outcome(variables, split, self.run.seed)
      for field in ('clean_top1', 'robust_top1'):
        row[f'{split_name}_{field}'] = outcome.percent(field)
    return row

  def evaluate(self, stage: str, directory: epath.Path, label: str) -> None:
    """Adds a finished stage's records to results.json, if they are missing."""
    path = self.root / 'results.json'
    records = read_results(path)
    mine = lambda r: (r['run'], r['stage']) == (self.run.name, stage)
    folders = {s: directory / s for s in loop.SELECTIONS}
    folders = {'last': directory / 'model'} | folders
    if any(mine(r) for r in records):
      return
    for selection, folder in folders.items():
      if not checkpoint.is_model(folder):
        continue
      variables, about = checkpoint.load_model(folder)
      if 'head' not in variables['params']:
        return
      say(f'{label}: evaluating {selection}')
      for evaluator in self.evaluators:
        for split_name, split in self.splits().items():
          outcome = evaluator.outcome(variables, split, self.run.seed)
          records.append(
            record(
              about | {'split': split_name},
              outcome,
              evaluator.attack,
              variables,
              self.run.seed,
            )
          )
      if selection == 'last':
        self.write_examples(variables, directory, about)
    write_json(path, records)

  def write_examples(self, variables, directory, about) -> None:
    evaluator = self.evaluators[0]
    outcome, clean, adversarial = evaluator.examples(
      variables, self.dataset.test, self.run.seed, _EXAMPLES
    )
    images = [
      {
        'label': int(self.dataset.test.labels[i]),
        'clean_prediction': int(outcome.clean_prediction[i]),
        'adversarial_prediction': int(outcome.adversarial_prediction[i]),
        'clean': np.round(clean[i].astype(float), 4).tolist(),
        'adversarial': np.round(adversarial[i].astype(float), 4).tolist(),
      }
      for i in range(len(clean))
    ]
    attack = evaluator.attack
    examples = {
      'run': about['run'],
      'stage': about['stage'],
      'attack': attack.name,
      'eps': attack.settings.keywords.get('eps'),
      'class_names': about['class_names'],
      'images': images,
    }
    write_json(directory / 'examples.json', examples)


def record(
  about: Record,
  outcome: evaluation.Outcome,
  attack: evaluation.EvaluationAttack,
  variables: Variables,
  seed: int,
) -> Record:
  """One line of results.json: an accuracy with all that it depends on."""
  keywords = dict(attack.settings.keywords)
  named = ('run', 'stage', 'selection', 'epoch', 'split', 'dataset')
  accuracies = ('clean_top1', 'clean_top5', 'robust_top1', 'robust_top5')
  kernels = models.maskable(flatten(variables['params']))
  size = sum(w.size for w in kernels.values())
  zeros = sum(int((np.asarray(w) == 0).sum()) for w in kernels.values())
  return (
    {k: about[k] for k in named}
    | {'n': len(outcome.clean_top1), 'attack': attack.name}
    | {'algorithm': attack.settings.name, 'objective': attack.objective}
    | {'restarts': attack.restarts, 'seed': seed}
    | keywords
    | {k: round(outcome.percent(k), 4) for k in accuracies}
    | {'sparsity': round(zeros / size, 6)}
    | {'parameters': sum(x.size for x in jax.tree.leaves(variables['params']))}
    | {'dtype': about['config']['model']['dtype']}
    | {'matmul_precision': 'highest', 'versions': versions()}
    | {'config': about['config']}
  )


def read_results(path: epath.Path) -> list[Record]:
  """The records in a results.json; none where there is no file."""
  return json.loads(path.read_text()) if path.exists() else []


def merge_results(records: list[Record], new: list[Record]) -> list[Record]:
  """The records with the new ones in place of their predecessors."""
  identity = lambda r: tuple(r[k] for k in _IDENTITY)
  replaced = {identity(r) for r in new}
  return [r for r in records if identity(r) not in replaced] + new


def versions() -> dict[str, str]:
  """What a number may depend on beside the config."""
  packages = ('rocl-jax', 'jax', 'jaxlib', 'flax', 'optax')
  found = {}
  for package in packages:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      found[package] = 'not installed'
  return found | {'commit': _commit(), 'device': jax.devices()[0].device_kind}


def _commit():
  here = epath.Path(__file__).parent
  command = ['git', '-C', str(here), 'describe', '--always', '--dirty']
  try:
    result = subprocess.run(command, capture_output=True, text=True, timeout=5)
  except (OSError, subprocess.TimeoutExpired):
    return ''
  return result.stdout.strip()
