r"""Evaluates saved models, and audits what it finds.

  python -m rocl_jax.evaluate --model=W/4_finetune/model \
      --config=configs/eval.py:standard

--model=FOLDER[,FOLDER]    model folders, with their own masks; also
                           gs://bucket/run/4_finetune/model. May be given
                           several times; a folder that is there may have
                           commas in its name
--config=FILE[:SUITE]      attacks and images: configs/eval.py:paper, :quick,
                           :standard, :transfer and others, see there, or any
                           one attack; --config.FIELD=VALUE overrides

The radius is the config's, 8/255, whatever the model was trained with: add
--config.eval.eps=0.1 for the quickstart's. An interrupted evaluation goes on
where it was. The records go to results.json beside the model's folder, the
checks to audit.json, transfer attacks to transfer.json; there `python -m
rocl_jax.report` finds them. Exit status 3: a check failed.
"""

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from rocl_jax import command, data, evaluation
from rocl_jax.data.records import CIFAR10_CLASSES
from rocl_jax.errors import RunFailed, UserError, shown
from rocl_jax.files import exists, is_remote, places
from rocl_jax.models import DTYPES
from rocl_jax.settings import FieldError, Place, one_of, parse, within

CORRUPTIONS = 'cifar10c'
CLAIM = 'evaluation.json'  # who writes beside a model, see `workdir`


@dataclass(frozen=True, kw_only=True)
class DataOverride:
  """The `data` section of an evaluation; empty fields are the model's own.

  Attributes:
    source: see `rocl_jax.data`; 'cifar10c' for common corruptions.
    dir: where the source finds its files.
  """

  source: str
  dir: Place

  def __post_init__(self):
    if self.source:
      one_of('source', self.source, [*data.SOURCES, CORRUPTIONS])


@dataclass(frozen=True, kw_only=True)
class Audit:
  """The `audit` section.

  Attributes:
    examples: images of the checks of network and attacks; 0 leaves those out
      and checks the records alone.
  """

  examples: int

  def __post_init__(self):
    within('examples', self.examples, 0, 256)


@dataclass(frozen=True, kw_only=True)
class Transfer:
  """The `transfer` section.

  Attributes:
    surrogates: model folders whose adversarial images the models are scored
      on.
    matrix: whether the models are surrogates of each other, too.
    unmasked: whether fine-tuned models are scored without their masks, too,
      as the published Table 4 did.
  """

  surrogates: tuple[Place, ...]
  matrix: bool
  unmasked: bool


@dataclass(frozen=True, kw_only=True)
class Settings:
  """What an evaluation config says.

  Attributes:
    seed: of the attacks' starts.
    split: 'test' or 'validation'.
    dtype: of the networks' arithmetic, see `models.Settings`; '' for what they
      were trained in.
    data: where the images are, if not where the model was trained.
    eval: the suite.
    audit: the checks.
    transfer: attacks from other networks.
  """

  seed: int
  split: str
  dtype: str
  data: DataOverride
  eval: evaluation.Settings
  audit: Audit
  transfer: Transfer

  def __post_init__(self):
    within('seed', self.seed, 0, 2**32 - 1)
    one_of('split', self.split, ('test', 'validation'))
    one_of('dtype', self.dtype, ('', *DTYPES))
    transfer = self.transfer
    if transfer.matrix and self.data.source == CORRUPTIONS:
      raise FieldError('transfer.matrix', True, f'False with {CORRUPTIONS}')
    if transfer.unmasked and not (transfer.surrogates or transfer.matrix):
      wanted = 'False, or transfer.surrogates to attack from'
      raise FieldError('transfer.unmasked', True, wanted)


class Evaluation(NamedTuple):
  """What an evaluation found.

  Attributes:
    records: of the suite, see `results`.
    transfers: of transfer attacks, see `transfer`.
    checks: all checks, by name of the model.
  """

  records: list[dict[str, Any]]
  transfers: list[dict[str, Any]]
  checks: dict[str, list[Any]]


def evaluate(config: ConfigDict, model_folders: list[str]) -> Evaluation:
  """Evaluates model folders under a suite.

  Args:
    config: see `configs/eval.py`.
    model_folders: folders with `model.json`, or their URLs.

  Raises:
    UserError: a mistake in the config, or no model in a folder.
    RunFailed: a model's weights are not those that its record speaks of.
    Interrupted: the process was asked to stop.
  """
  if not isinstance(config, ConfigDict):
    raise UserError(
      f'--config: get_config gives {config!r:.40}, wanted a ConfigDict'
    )
  if not model_folders:
    raise UserError('--model: names no folder')
  values = config.copy_and_resolve_references().to_dict()
  settings = parse(Settings, values, 'config')
  with contextlib.ExitStack() as mirrors:
    folders = _local_folders(model_folders, settings, mirrors)
    return _evaluate_folders(settings, folders)


def _local_folders(
  places: list[str], settings: Settings, mirrors: contextlib.ExitStack
) -> list[str]:
  """Model folders of this machine; of URLs copies, with what is beside them."""
  from rocl_jax.mirror import mirrored

  split = [place.rstrip('/').rpartition('/') for place in places]
  copies: dict[str, str] = {}
  for place, (parent, _, _) in zip(places, split, strict=True):
    if not is_remote(place) or parent in copies:
      continue
    inside = {name for other, _, name in split if other == parent}
    if settings.transfer.unmasked:
      inside.add('checkpoints')

    def wanted(name: str, inside: set[str] = inside) -> bool:
      first, below, _ = name.partition('/')
      return first in inside if below else name.endswith(('.json', '.npz'))

    copies[parent] = mirrors.enter_context(
      mirrored(parent, '--model', CLAIM, begins=False, wanted=wanted)
    )
  return [
    f'{copies[parent]}/{name}' if is_remote(place) else place
    for place, (parent, _, name) in zip(places, split, strict=True)
  ]


def _evaluate_folders(settings: Settings, folders: list[str]) -> Evaluation:
  from rocl_jax import mesh, saved, transfer, workdir

  load = functools.partial(saved.load, dtype=settings.dtype)
  loaded = [load(folder, '--model') for folder in folders]
  models = list({one.folder: one for one in loaded}.values())
  surrogates = [
    load(folder, 'config.transfer.surrogates')
    for folder in settings.transfer.surrogates
  ]
  if settings.audit.examples and not settings.eval.eps:
    wanted = 'more than 0, or --config.audit.examples=0'
    raise UserError(f'config.eval.eps: found 0, wanted {wanted}')
  splits, about_splits = _images(settings, models[0])
  for one in (*models, *surrogates):
    one.check_images(models[0])
  for one in models:
    _check_folder(one.folder.parent)
    if settings.transfer.unmasked:
      transfer.dense_variables(one)
  dtypes = [one.network.settings.dtype for one in (*models, *surrogates)]
  with contextlib.ExitStack() as held:  # one evaluation a folder at a time
    held.enter_context(mesh.counting_in(dtypes))
    for folder in sorted({one.folder.parent for one in models}):
      held.enter_context(workdir.claim(folder, '--model', CLAIM))
    return _evaluate(settings, models, surrogates, splits, about_splits)


def _evaluate(
  settings: Settings,
  models: Sequence[Any],
  surrogates: Sequence[Any],
  splits: dict[str, data.Split],
  about_splits: dict[str, dict[str, Any]],
) -> Evaluation:
  from rocl_jax import audit_file, mesh, results, saved, transfer

  devices = mesh.make_mesh()

  @functools.cache  # models of one architecture share what is compiled
  def evaluators(network):
    return [
      evaluation.evaluator(
        saved.network(network),
        attack.of_classes(network.classes),
        devices,
        settings.eval.batch_size,
      )
      for attack in settings.eval.selected
    ]

  found = Evaluation([], [], {})
  names = saved.names(models)
  for one in models:
    records = results.evaluate_model(
      one.folder,
      evaluators(one.network),
      splits,
      settings.seed,
      one.folder.parent / 'results.json',
      about_splits,
      settings.dtype,
    )
    (name, split), *_ = splits.items()
    checks = audit_file.audit_model(
      one,
      *(name, split, records),
      settings.eval,
      settings.audit.examples,
      devices,
      settings.seed,
    )
    found.records.extend(records)
    found.checks[names[one.folder]] = checks
  if surrogates or settings.transfer.matrix:
    transfers, by_target = transfer.run(
      models,
      [*surrogates, *(models if settings.transfer.matrix else [])],
      [a.of_classes(models[0].network.classes) for a in settings.eval.selected],
      splits,
      devices,
      settings.eval.batch_size,
      settings.seed,
      settings.transfer.unmasked,
      models[0].folder.parent / 'transfer.json',
    )
    found.transfers.extend(transfers)
    for folder, more in by_target.items():
      found.checks[names[folder]].extend(more)
  return found


def _images(
  settings: Settings, model: Any
) -> tuple[dict[str, data.Split], dict[str, dict[str, Any]]]:
  """The splits, and what records say of them beside their names."""
  trained = model.about['config']['data']
  if settings.data.source == CORRUPTIONS:
    splits = data.load_corruptions(settings.data.dir)
    class_names: tuple[str, ...] = CIFAR10_CLASSES
    about = {
      name: {
        'corruption': name.rpartition('-')[0],
        'severity': int(name.rpartition('-')[2]),
      }
      for name in splits
    }
  else:
    dataset = data.load(
      settings.data.source or trained['source'],
      settings.data.dir or trained['dir'],
      trained['validation'] if settings.split == 'validation' else 0,
    )
    class_names = dataset.class_names
    splits = {settings.split: getattr(dataset, settings.split)}
    about = {}
  if list(class_names) != model.class_names:
    raise UserError(
      f'config.data: its classes are {", ".join(class_names)}, the '
      f"model's are {', '.join(model.class_names)}"
    )
  for name, split in splits.items():
    shape = list(split.images.shape[1:])
    if len(split.labels) and shape != model.about['image_shape']:
      raise UserError(
        f'config.data: {name} images are {shape}, the model is for '
        f'{model.about["image_shape"]}'
      )
  splits = evaluation.cut(splits, settings.eval.examples)
  if not splits:
    raise UserError(
      f'config.split: the model was trained without {settings.split} images'
    )
  return splits, about


def _check_folder(folder):
  """Raises UserError unless results can be read and written beside a model."""
  from rocl_jax.files import read_json

  for name in ('results.json', 'audit.json', 'transfer.json'):
    if exists(folder / name):
      read_json(folder / name, list)
  probe = folder / f'.writable-{os.getpid()}'
  try:
    probe.write_text('')
    probe.unlink(missing_ok=True)
  except OSError as e:
    raise UserError(
      f'--model: results go to {shown(folder)}, which can not be written: '
      f'{e.strerror}'
    ) from None


def _folders(text: str) -> list[str]:
  """The folders of a --model, which separates them by commas."""
  found = places(text)
  for folder in found:
    if len(found) > 1 and not is_remote(folder) and not exists(Path(folder)):
      raise UserError(
        f'--model: found {text}, and there is no folder {shown(folder)}; '
        'commas separate folders, except in the name of an existing one'
      )
  return found


def main(_: list[str]) -> None:
  from rocl_jax import compiled, interruption, mesh, report
  from rocl_jax.audit import failed

  mesh.check_devices()
  interruption.install('stopped; the same command goes on where it was')
  compiled.keep_programs()
  folders = [x for text in flags.FLAGS.model for x in _folders(text)]
  found = evaluate(flags.FLAGS.config, folders)
  print(report.evaluation_table(found.records))
  if found.transfers:
    print(f'\n{report.transfer_table(found.transfers)}')
  problems = []
  for name, checks in found.checks.items():
    bad = failed(checks)
    print(f'\n{name}: {len(checks) - len(bad)} of {len(checks)} checks passed')
    for check in bad:
      print(f'  FAILED {check.check}: {check.found}; wanted {check.wanted}')
      problems.append(f'{name}: {check.check}: {check.found}')
  if problems:
    raise RunFailed(
      f'the audit failed, so these accuracies prove nothing: {problems[0]}'
      + (f' and {len(problems) - 1} more' if len(problems) > 1 else '')
    )


if __name__ == '__main__':
  command.define_config()
  flags.DEFINE_multi_string('model', None, 'Model folders.')
  command.run(main, usage=__doc__ or '', required=('config', 'model'))
