"""Results as data: one record for each number, with all that it depends on.

`results.json` is a list of records. `run`, `stage`, `selection`, `split`,
`n`, `attack` and `eps` say which number it is; the accuracies are percent.
"""

import hashlib
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from rocl_jax import checkpoint, models
from rocl_jax.data import Split
from rocl_jax.errors import RunFailed, UserError
from rocl_jax.evaluation import Evaluator, Outcome
from rocl_jax.files import read_json, write_json
from rocl_jax.progress import say
from rocl_jax.trees import flatten
from rocl_jax.types import Variables

Record = dict[str, Any]

# A newer record replaces the one that agrees with it in these.
_IDENTITY = ('run', 'stage', 'selection', 'split', 'n', 'attack', 'eps')
_ACCURACIES = ('clean_top1', 'clean_top5', 'robust_top1', 'robust_top5')


def evaluate_model(
  path: epath.Path,
  evaluators: Sequence[Evaluator],
  splits: dict[str, Split],
  seed: int,
  results: epath.Path,
) -> list[Record]:
  """Evaluates a model folder and adds its records to a results.json.

  What stands there already, under the same protocol, is not done again.

  Args:
    path: the model folder.
    evaluators: the attacks.
    splits: the images, by name.
    seed: of the attacks' starts.
    results: the file.

  Returns:
    The records of this model under these attacks, old and new.

  Raises:
    RunFailed: the weights are not those that `model.json` speaks of.
  """
  variables, about = checkpoint.load_model(path)
  for field, value in identity(variables).items():
    if about[field] != value:
      raise RunFailed(
        f'{path}: holds other weights than {checkpoint.ABOUT} says ({field})'
      )
  records = read(results)
  asked = []
  for evaluator in evaluators:
    for name, split in splits.items():
      protocol = _protocol(about, evaluator, name, split, seed)
      found = [r for r in records if protocol.items() <= r.items()]
      if not found:
        new = _twin(records, protocol)
        if new is None:
          say(
            f'{about["run"]}/{about["stage"]}: {evaluator.attack.name} on '
            f'{len(split.labels)} {name} images, {about["selection"]}'
          )
          outcome = evaluator.outcome(variables, split, seed)
          new = protocol | _measured(outcome, variables, about)
        found = [new]
        records = _merge(records, found)
        write_json(results, records)
      asked += found
  return asked


def _protocol(
  about: Record, evaluator: Evaluator, name: str, split: Split, seed: int
) -> Record:
  """What the number is, and how it comes about."""
  model = ('run', 'stage', 'selection', 'epoch', 'dataset', 'fingerprint')
  attack = evaluator.attack
  return (
    {k: about[k] for k in model}
    | {'split': name, 'n': len(split.labels)}
    | {'attack': attack.name, 'algorithm': attack.settings.name}
    | {'objective': attack.objective, 'restarts': attack.restarts}
    | dict(attack.settings.keywords)
    | {'seed': seed, 'eval_batch_size': evaluator.batch_size}
    | {'dtype': about['config']['model']['dtype']}
    | {'matmul_precision': 'highest'}
  )


def _twin(records: list[Record], protocol: Record) -> Record | None:
  """The record of the same weights under another selection, if there is one."""
  same = {k: v for k, v in protocol.items() if k != 'selection'}
  for record in records:
    if same.items() <= record.items():
      return record | {'selection': protocol['selection']}
  return None


def _measured(outcome: Outcome, variables: Variables, about: Record) -> Record:
  """The number itself, and what it was measured on."""
  return (
    {k: round(outcome.percent(k), 4) for k in _ACCURACIES}
    | {'sparsity': about['sparsity']}
    | {'parameters': sum(x.size for x in jax.tree.leaves(variables['params']))}
    | {'versions': versions(), 'config': about['config']}
  )


def identity(variables: Variables) -> Record:
  """What `model.json` says of the weights, so that the two can't part.

  Returns:
    `fingerprint`, of all weights, statistics and masks; `sparsity`, the zero
    fraction of the maskable weights, as counted; and `layers`, {path: {'size':
    ..., 'kept': ...}} of their masks.

  Raises:
    RunFailed: a pruned weight is not zero.
  """
  flat = {k: np.asarray(x) for k, x in flatten(variables).items()}
  digest = hashlib.sha256()
  for path in sorted(flat):
    digest.update(f'{path} {flat[path].dtype} {flat[path].shape}'.encode())
    digest.update(np.ascontiguousarray(flat[path]).tobytes())
  kernels = models.maskable(flatten(variables['params']))
  masks = variables.get('masks', {})
  counts, zeros = {}, 0
  for path, leaf in kernels.items():
    kernel = np.asarray(leaf)
    mask = np.asarray(masks.get(path, np.ones(kernel.shape, bool)))
    if np.any(kernel[~mask]):
      raise RunFailed(f'{path}: weights outside the mask are not zero')
    counts[path] = {'size': kernel.size, 'kept': int(mask.sum())}
    zeros += int((kernel == 0).sum())
  size = sum(layer['size'] for layer in counts.values())
  return {
    'fingerprint': digest.hexdigest()[:16],
    'sparsity': round(zeros / size, 6),
    'layers': counts,
  }


def write_examples(
  path: epath.Path, evaluator: Evaluator, split: Split, seed: int, count: int
) -> None:
  """Writes `examples.json` beside a model: images before and after an attack.

  Values are in [0, 1], to four decimals: enough for a picture.
  """
  variables, about = checkpoint.load_model(path)
  outcome, clean, adversarial = evaluator.examples(
    variables, split, seed, count
  )
  rounded = lambda x: np.round(x.astype(float), 4).tolist()
  images = [
    {
      'label': int(split.labels[i]),
      'clean_prediction': int(outcome.clean_prediction[i]),
      'adversarial_prediction': int(outcome.adversarial_prediction[i]),
      'clean': rounded(clean[i]),
      'adversarial': rounded(adversarial[i]),
    }
    for i in range(len(clean))
  ]
  attack = evaluator.attack
  write_json(
    path.parent / 'examples.json',
    {k: about[k] for k in ('run', 'stage', 'class_names')}
    | {'attack': attack.name, 'eps': attack.settings.keywords.get('eps')}
    | {'images': images},
  )


def read(path: epath.Path) -> list[Record]:
  """The records in a results.json; none where there is no file.

  Raises:
    UserError: the file holds something else.
  """
  if not path.exists():
    return []
  records = read_json(path, list)
  for record in records:
    if not isinstance(record, dict) or not set(_IDENTITY) <= record.keys():
      raise UserError(f'{path}: found {record!r:.40}, wanted a record')
  return records


def _merge(records: list[Record], new: list[Record]) -> list[Record]:
  which = lambda r: tuple(r.get(k) for k in _IDENTITY)
  replaced = {which(r) for r in new}
  return [r for r in records if which(r) not in replaced] + new


def versions() -> dict[str, str]:
  """What a number may depend on beside its config."""
  packages = ('rocl-jax', 'jax', 'jaxlib', 'flax', 'optax')
  found = {p: version_of(p) or 'not installed' for p in packages}
  return found | {'commit': _commit(), 'device': jax.devices()[0].device_kind}


def version_of(package: str) -> str:
  """The version of an installed package, '' where it is not."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return ''


def _commit():
  """The commit of the source tree, if it is one; else ''."""
  here = epath.Path(__file__).resolve().parent.parent
  command = ['git', '-C', str(here), 'describe', '--always', '--dirty']
  try:
    result = subprocess.run(command, capture_output=True, text=True, timeout=5)
  except (OSError, subprocess.TimeoutExpired):
    return ''
  return result.stdout.strip()
