"""Results as data: one record for each number, with all that it depends on.

`results.json` is a list of records. `run`, `stage`, `selection`, `split`,
`n`, `attack` and `eps` say which number it is; the accuracies are percent.
"""

import json
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
from rocl_jax.evaluation import EvaluationAttack, Evaluator, Outcome
from rocl_jax.files import write_json
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
    RunFailed: pruned weights are not what `model.json` says.
  """
  variables, about = checkpoint.load_model(path)
  records = read(results)
  asked = []
  for evaluator in evaluators:
    for name, split in splits.items():
      protocol = _protocol(about, evaluator.attack, name, split, seed)
      found = [r for r in records if protocol.items() <= r.items()]
      if not found:
        say(
          f'{about["run"]}/{about["stage"]}: {evaluator.attack.name} on '
          f'{len(split.labels)} {name} images, {about["selection"]}'
        )
        outcome = evaluator.outcome(variables, split, seed)
        found = [protocol | _measured(outcome, variables, about)]
        records = _merge(records, found)
        write_json(results, records)
      asked += found
  return asked


def _protocol(
  about: Record, attack: EvaluationAttack, name: str, split: Split, seed: int
) -> Record:
  """What the number is, and how it comes about."""
  model = ('run', 'stage', 'selection', 'epoch', 'dataset')
  return (
    {k: about[k] for k in model}
    | {'split': name, 'n': len(split.labels)}
    | {'attack': attack.name, 'algorithm': attack.settings.name}
    | {'objective': attack.objective, 'restarts': attack.restarts}
    | dict(attack.settings.keywords)
    | {'seed': seed, 'dtype': about['config']['model']['dtype']}
    | {'matmul_precision': 'highest'}
  )


def _measured(outcome: Outcome, variables: Variables, about: Record) -> Record:
  """The number itself, and what it was measured on."""
  return (
    {k: round(outcome.percent(k), 4) for k in _ACCURACIES}
    | {'sparsity': round(sparsity(variables), 6)}
    | {'parameters': sum(x.size for x in jax.tree.leaves(variables['params']))}
    | {'versions': versions(), 'config': about['config']}
  )


def sparsity(variables: Variables) -> float:
  """The zero fraction of the maskable weights, as counted.

  Raises:
    RunFailed: a pruned weight is not zero.
  """
  kernels = models.maskable(flatten(variables['params']))
  for path, mask in variables.get('masks', {}).items():
    if np.any(np.asarray(kernels[path])[~np.asarray(mask)]):
      raise RunFailed(f'{path}: weights outside the mask are not zero')
  zeros = sum(int((np.asarray(w) == 0).sum()) for w in kernels.values())
  return zeros / sum(w.size for w in kernels.values())


def layers(variables: Variables) -> dict[str, dict[str, int]]:
  """{path: {'size': ..., 'kept': ...}} of the maskable weights."""
  kernels = models.maskable(flatten(variables['params']))
  masks = variables.get('masks', {})
  return {
    path: {
      'size': w.size,
      'kept': int(np.sum(masks.get(path, np.ones(w.shape)))),
    }
    for path, w in kernels.items()
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
    UserError: the file is not JSON.
  """
  if not path.exists():
    return []
  try:
    return json.loads(path.read_text())
  except ValueError as e:
    raise UserError(f'{path}: not valid JSON: {e}') from None


def _merge(records: list[Record], new: list[Record]) -> list[Record]:
  identity = lambda r: tuple(r.get(k) for k in _IDENTITY)
  replaced = {identity(r) for r in new}
  return [r for r in records if identity(r) not in replaced] + new


def versions() -> dict[str, str]:
  """What a number may depend on beside its config."""
  packages = ('rocl-jax', 'jax', 'jaxlib', 'flax', 'optax')
  found = {}
  for package in packages:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      found[package] = 'not installed'
  return found | {'commit': _commit(), 'device': jax.devices()[0].device_kind}


def _commit():
  """The commit of the source tree, if it is one; else ''."""
  here = epath.Path(__file__).resolve().parent.parent
  command = ['git', '-C', str(here), 'describe', '--always', '--dirty']
  try:
    result = subprocess.run(command, capture_output=True, text=True, timeout=5)
  except (OSError, subprocess.TimeoutExpired):
    return ''
  return result.stdout.strip()
