"""Results as data: one record for each number, with all that it depends on.

`results.json` is a list of records. `run`, `stage`, `selection`, `split`,
`n`, `attack`, `norm` and `eps` say which number it is; the accuracies are
percent.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rocl_jax import (
  checkpoint,
  interruption,
  journal,
  models,
  processes,
  provenance,
)
from rocl_jax.attacks.ensemble import passes_left
from rocl_jax.attacks.robustness import Outcome
from rocl_jax.data import Split
from rocl_jax.errors import RunFailed, UserError, shown
from rocl_jax.evaluation import Evaluator
from rocl_jax.files import (
  check_record,
  checksum,
  exists,
  read_json,
  write_json,
)
from rocl_jax.progress import Countdown, say
from rocl_jax.trees import flatten
from rocl_jax.types import Variables

Record = dict[str, Any]

# A newer record replaces the one that agrees with it in these, and all that
# are of weights that have gone, see `_merge`.
_IDENTITY = (
  *('run', 'stage', 'selection', 'fingerprint', 'split', 'n'),
  *('attack', 'norm', 'eps', 'dtype', 'images_crc32'),
)
# Which number a record is, at the least.
_NAMES = ('run', 'stage', 'selection', 'split', 'n', 'attack', 'eps')
# What an audit reads; an earlier version's record may not have it.
_AUDITED = {'per_class', 'largest_outside', 'counted', 'disputed'}
_AUDITED |= {'clean_invalid', 'invalid', 'stuck'}
# With more classes the table of all confusions would be most of a record.
_MANY_CLASSES = 20
_ACCURACIES = ('clean_top1', 'clean_top5', 'robust_top1', 'robust_top5')


def evaluate_model(
  path: epath.Path,
  evaluators: Sequence[Evaluator],
  splits: dict[str, Split],
  seed: int,
  results: epath.Path,
  about_splits: Mapping[str, Record] = {},
  dtype: str = '',
) -> list[Record]:
  """Evaluates a model folder and adds its records to a results.json.

  What stands there already, under the same protocol, is not done again.

  Args:
    path: the model folder.
    evaluators: the attacks.
    splits: the images, by name.
    seed: of the attacks' starts.
    results: the file.
    about_splits: what records say of a split beside its name.
    dtype: of the arithmetic, if not as the model was trained.

  Returns:
    The records of this model under these attacks, old and new.

  Raises:
    RunFailed: the weights are not those that `model.json` speaks of.
  """
  variables, about = processes.from_first(lambda: checkpoint.load_model(path))
  for field, value in identity(variables).items():
    if about[field] != value:
      raise RunFailed(
        f'{shown(path)}: holds other weights than {checkpoint.ABOUT} says '
        f'({field})'
      )
  records = processes.from_first(lambda: read(results))
  asked = []
  for evaluator in evaluators:
    for name, split in splits.items():
      protocol = _protocol(about, evaluator, name, split, seed)
      protocol |= about_splits.get(name, {})
      protocol['dtype'] = dtype or protocol['dtype']
      found = [r for r in records if _answers(r, protocol)]
      if not found:
        book = journal.Journal(results, protocol)
        new = _twin(records, protocol)
        if new is None:
          outcome = _attack(evaluator, variables, split, protocol, book)
          new = protocol | _measured(
            outcome, evaluator, split, variables, about
          )
          new['earlier_versions'] = book.earlier
        # Which model of this work directory it is of, whatever its weights.
        new['folder'] = str(path.relative_to(results.parent))
        found = [_stamped(new)]
        records = _merge(records, found)
        if processes.is_first():
          write_json(results, records)
          book.remove()
      asked += found
  return asked


def _attack(
  evaluator: Evaluator,
  variables: Variables,
  split: Split,
  protocol: Record,
  book: journal.Journal,
) -> Outcome:
  """Runs an attack, or what an interruption has left of it."""
  members, n = evaluator.attack.members, len(split.labels)
  label = f'{protocol["run"]}/{protocol["stage"]}: {evaluator.attack.name}'
  place = f'{n} {protocol["split"]} images, {protocol["selection"]}'
  say(f'{label} on {place}')
  known = book.read()
  if known is not None:
    say(f'{label}: goes on where it was interrupted')
  turns = [
    f'{name} {turn + 1}/{attack.turns}'
    for name, attack in members
    for turn in range(attack.turns)
  ]
  countdown = Countdown(label)

  def watch(fates, passes):
    book.write(fates, now=interruption.requested())
    interruption.check()
    turn, robust = turns[int(fates.turn)], int(fates.robust.sum())
    note = f'{turn}, {robust} of {n} images robust'
    countdown.show(passes, passes_left(members, fates), note)

  outcome = evaluator.outcome(
    variables, split, protocol['seed'], known=known, watch=watch
  )
  return outcome


def _protocol(
  about: Record, evaluator: Evaluator, name: str, split: Split, seed: int
) -> Record:
  """What the number is, and how it comes about."""
  model = ('run', 'stage', 'selection', 'epoch', 'dataset', 'fingerprint')
  attack = evaluator.attack
  return (
    {k: about[k] for k in model}
    | {'split': name, 'n': len(split.labels)}
    | {'images_crc32': crc32(split)}
    | {'attack': attack.name}
    | attack.protocol
    | {'seed': seed, 'eval_batch_size': evaluator.batch_size}
    | {'dtype': about['config']['model']['dtype']}
    | {'matmul_precision': 'highest'}
  )


def crc32(split: Split) -> str:
  """Tells the images and labels of one data set from those of another."""
  value = zlib.crc32(np.ascontiguousarray(split.images).data)
  return f'{zlib.crc32(np.ascontiguousarray(split.labels).data, value):08x}'


def _answers(record: Record, protocol: Record) -> bool:
  """Whether a record is of this protocol, and has all that an audit reads."""
  said, members = dict(record), record.get('members')
  if isinstance(members, list):  # each with what had withstood all up to it
    said['members'] = [
      {k: v for k, v in m.items() if k != 'robust_top1'}
      for m in members
      if isinstance(m, dict)
    ]
  return protocol.items() <= said.items() and _AUDITED <= record.keys()


def _twin(records: list[Record], protocol: Record) -> Record | None:
  """The record of the same weights under another selection, if there is one."""
  same = {k: v for k, v in protocol.items() if k != 'selection'}
  for record in records:
    if _answers(record, same):
      return record | {'selection': protocol['selection']}
  return None


def _measured(
  outcome: Outcome,
  evaluator: Evaluator,
  split: Split,
  variables: Variables,
  about: Record,
) -> Record:
  """The number itself, and what it was measured on."""
  percent: Record = {k: round(outcome.percent(k), 4) for k in _ACCURACIES}
  attack = evaluator.attack
  if not attack.everyone:  # an image that breaks at once has no worst top-5
    percent['robust_top5'] = None
  n = len(split.labels)
  members = [
    member | {'robust_top1': round(100 * int(count) / n, 4)}
    for member, count in zip(
      attack.protocol.get('members', ()), outcome.after, strict=False
    )
  ]
  return (
    percent
    | ({'members': members} if members else {})
    | {'largest_distance': float(np.max(outcome.distance))}
    | {'largest_outside': float(np.max(outcome.outside))}
    | {'counted': outcome.counted, 'disputed': int(outcome.disputed.sum())}
    | {'clean_invalid': int(outcome.clean_invalid.sum())}
    | {'invalid': int(outcome.invalid.sum())}
    | {'stuck': int((np.asarray(outcome.stuck) > 0).sum())}
    | by_class(outcome, split.labels, about['class_names'])
    | {'sparsity': about['sparsity']}
    | {'parameters': sum(x.size for x in jax.tree.leaves(variables['params']))}
    | {'versions': provenance.versions(), 'config': about['config']}
  )


def by_class(
  outcome: Outcome, labels: np.ndarray, class_names: Sequence[str]
) -> Record:
  """Accuracy of each class, and what its images are taken for under attack.

  Returns:
    `class_names`. `per_class`, lists by class: 'n' images, 'clean_top1' and
    'robust_top1' in percent, None for a class without images, and how many
    images are taken for the class, 'clean_predicted' and 'robust_predicted'.
    `confusion`, counts by label and class of the adversarial image; of more
    than 20 classes instead `confused`, [label, class, count] of the most
    frequent ones where these differ, as many as there are classes. Images
    with invalid logits are in none of these counts.
  """
  count = len(class_names)
  n = np.bincount(labels, minlength=count)

  def percent(hits):
    hit = np.bincount(labels[np.asarray(hits)], minlength=count)
    return [
      round(100 * int(h) / int(m), 4) if m else None
      for h, m in zip(hit, n, strict=True)
    ]

  def predicted(classes):
    classes = np.asarray(classes)
    return np.bincount(classes[classes >= 0], minlength=count).tolist()

  taken = np.asarray(outcome.adversarial_prediction)
  pairs = np.stack([labels, taken], 1)[taken >= 0]
  kinds, counts = np.unique(pairs, axis=0, return_counts=True)
  if count <= _MANY_CLASSES:
    confusion = np.zeros((count, count), int)
    confusion[tuple(kinds.T)] = counts
    table = {'confusion': confusion.tolist()}
  else:
    rows = [(*kind, n) for kind, n in zip(kinds, counts, strict=True)]
    rows = sorted((r for r in rows if r[0] != r[1]), key=lambda r: -r[2])
    table = {'confused': [[int(x) for x in row] for row in rows[:count]]}
  return {
    'class_names': list(class_names),
    'per_class': {
      'n': n.tolist(),
      'clean_top1': percent(outcome.clean_top1),
      'robust_top1': percent(outcome.robust_top1),
      'clean_predicted': predicted(outcome.clean_prediction),
      'robust_predicted': predicted(taken),
    },
    **table,
  }


def identity(variables: Variables) -> Record:
  """What `model.json` says of the weights, so that the two can't part.

  Returns:
    `fingerprint`, of all weights, statistics and masks; `sparsity`, the zero
    fraction of the maskable weights, as counted; and `layers`, {path: {'size':
    ..., 'kept': ...}} of their masks.

  Raises:
    RunFailed: see `check_weights`.
  """
  check_weights(variables)
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
    counts[path] = {'size': kernel.size, 'kept': int(mask.sum())}
    zeros += int((kernel == 0).sum())
  size = sum(layer['size'] for layer in counts.values())
  return {
    'fingerprint': digest.hexdigest()[:16],
    'sparsity': round(zeros / size, 6),
    'layers': counts,
  }


def check_weights(variables: Variables) -> None:
  """Raises RunFailed if a pruned weight is not zero, or one is not finite."""
  flat = flatten({k: variables[k] for k in ('params', 'batch_stats')})
  for path, x in flat.items():
    if not np.isfinite(x).all():
      raise RunFailed(f'{path}: there are weights that are not finite')
  for path, mask in variables.get('masks', {}).items():
    kernel = np.asarray(flat['params/' + path])
    if np.any(kernel[~np.asarray(mask, bool)]):
      raise RunFailed(f'{path}: weights outside the mask are not zero')


def write_examples(
  path: epath.Path, evaluator: Evaluator, split: Split, seed: int, count: int
) -> None:
  """Writes `examples.json` beside a model: images before and after an attack.

  Values are in [0, 1], to four decimals: enough for a picture.
  """
  variables, about = processes.from_first(lambda: checkpoint.load_model(path))
  split = Split(split.images[:count], split.labels[:count])
  outcome, adversarial = evaluator.images(variables, split, seed)
  if not processes.is_first():
    return
  clean = split.images / 255
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
    | {'attack': attack.name, **attack.ball}
    | {'images': images},
  )


def read(path: epath.Path) -> list[Record]:
  """The records in a results.json; none where there is no file.

  Raises:
    UserError: the file holds something else.
  """
  if not exists(path):
    return []
  records = read_json(path, list)
  for i, record in enumerate(records):
    if not isinstance(record, dict) or not set(_NAMES) <= record.keys():
      raise UserError(f'{shown(path)}: found {record!r:.40}, wanted a record')
    check_record(path, i, record)
  return records


def _stamped(record: Record) -> Record:
  return record | {'checksum': checksum(record)}


def _merge(records: list[Record], new: list[Record]) -> list[Record]:
  """Adds records; those that they replace go.

  So do those of other weights that lay in a folder where the new ones lie.
  """
  which = lambda r: tuple(r.get(k) for k in _IDENTITY)
  replaced = {which(r) for r in new}
  weights = {r['folder']: r['fingerprint'] for r in new}

  def stays(r):
    there = weights.get(r.get('folder'), r.get('fingerprint'))
    return which(r) not in replaced and r.get('fingerprint') == there

  return [r for r in records if stays(r)] + new
