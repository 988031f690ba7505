"""Transfer attacks: images made on one network, scored on another.

A record is one number: `source` and `target` (run, stage, fingerprint), the
attack's protocol, `clean_top1` and `robust_top1` of the target. The target
keeps its own masks. Paper, section 4.4 and Table 4, whose code scored the
fine-tuned networks without: see `unmasked`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from rocl_jax import audit, checkpoint, evaluation, provenance, results, saved
from rocl_jax.data import Split
from rocl_jax.errors import UserError, shown
from rocl_jax.evaluation import EvaluationAttack
from rocl_jax.files import exists, read_json, write_json
from rocl_jax.saved import Saved
from rocl_jax.types import Variables

Record = dict[str, Any]

# What a number is; the rest of a record says how it came about.
_IDENTITY = (
  *('source', 'target', 'masked', 'attack', 'norm', 'eps', 'split', 'n'),
  *('seed', 'dtype'),
)


def run(
  targets: Sequence[Saved],
  sources: Sequence[Saved],
  attacks: Sequence[EvaluationAttack],
  splits: dict[str, Split],
  mesh: Mesh,
  batch_size: int,
  seed: int,
  unmasked: bool,
  path: epath.Path,
) -> tuple[list[Record], dict[epath.Path, list[audit.Check]]]:
  """Scores every target on every source's adversarial images, and its own.

  Args:
    targets, sources: the networks; one may be both.
    attacks: what makes the images.
    splits: the images, by name.
    mesh: the devices.
    batch_size: images at a time.
    seed: of the attacks' starts.
    unmasked: score targets that have masks without them, too.
    path: the transfer.json that gets the records; what stands there already
      is not done again.

  Returns:
    The records, and for each target's folder the checks that its white box
    beats every transfer.

  Raises:
    UserError: a target without masks where `unmasked` asks for it.
  """
  names = saved.names([*targets, *sources])
  known = read_json(path, list) if exists(path) else []
  asked: list[Record] = []
  checks: dict[epath.Path, list[audit.Check]] = {}
  for target in targets:
    forms = [(True, target.variables)]
    if unmasked:
      forms.append((False, dense_variables(target)))
    around = [target]
    for source in sources:  # each set of weights once
      if _identity(source) not in map(_identity, around):
        around.append(source)
    for attack in attacks:
      for split_name, split in splits.items():
        rows = []
        for masked, variables in forms:
          for source in around:
            record: Record = {
              'source': _identity(source),
              'target': _identity(target),
              'masked': masked,
              'attack': attack.name,
              **attack.protocol,
              'split': split_name,
              'n': len(split.labels),
              'seed': seed,
              'dtype': target.network.settings.dtype,
              'source_dtype': source.network.settings.dtype,
              'images_crc32': results.crc32(split),
            }
            found = [r for r in known if _has(r, record)]
            if found:
              record = dict(found[0])
            else:
              target.say(
                f'{attack.name} from {names[source.folder]}'
                + ('' if masked else ', scored without masks')
              )
              record |= _score(
                target, variables, source, attack, split, mesh, batch_size, seed
              )
            # Names belong to this call, whoever measured the number.
            record |= {
              'source_name': names[source.folder],
              'target_name': names[target.folder],
              'white_box': source is target and masked,
            }
            known = [r for r in known if not _replaced(r, record)] + [record]
            write_json(path, known)
            rows.append(record)
        asked += rows
        checks.setdefault(target.folder, []).extend(_check(rows))
  return asked, checks


def _score(target, variables, source, attack, split, mesh, batch_size, seed):
  """What one target makes of one source's adversarial images."""
  evaluator = evaluation.evaluator(
    saved.network(target.network),
    attack,
    mesh,
    batch_size,
    source=saved.network(source.network),
  )
  outcome = evaluator.outcome((variables, source.variables), split, seed)
  return {
    'clean_top1': round(outcome.percent('clean_top1'), 4),
    'robust_top1': round(outcome.percent('robust_top1'), 4),
    'clean_invalid': int(outcome.clean_invalid.sum()),
    'invalid': int(outcome.invalid.sum()),
    'stuck': int((np.asarray(outcome.stuck) > 0).sum()),
    'largest_distance': float(np.max(outcome.distance)),
    'largest_outside': float(np.max(outcome.outside)),
    'versions': provenance.versions(),
  }


def _check(rows: Sequence[Record]) -> list[audit.Check]:
  """The masked target under attack from itself and from elsewhere."""
  rows = [row for row in rows if row['masked']]
  (own,) = (row for row in rows if row['white_box'])
  checks = []
  for row in rows:
    label = f'{row["attack"]} from {row["source_name"]}'
    checks += audit.valid(label, row) + audit.inside(label, row)
    if row is not own:
      checks.append(
        audit.white_box(
          row['source_name'], own['robust_top1'], row['robust_top1'], row['n']
        )
      )
  return checks


def dense_variables(model: Saved) -> Variables:
  """A fine-tuned model's weights as they are under its masks.

  They are in the train state of the stage, beside the model's folder: weight
  decay shrinks them, and nothing else has changed them since pruning began.

  Raises:
    UserError: the model has no masks, or its train state is gone.
  """
  field = 'config.transfer.unmasked'
  if 'masks' not in model.variables:
    raise UserError(f'{field}: {shown(model.folder)} has no masks to leave out')
  folder = model.folder.parent / 'checkpoints'
  state = checkpoint.read_state(folder) if exists(folder) else None
  trained = (state or {}).get('trained', {})
  weights = trained.get('trainable', {})
  if model.folder.name != 'model' or 'kernel' not in weights.get('head', {}):
    raise UserError(
      f'{field}: wanted the last model of a fine-tuning stage, with its train '
      f'state in {shown(folder)}'
    )
  return {
    'params': weights,
    'batch_stats': trained['batch_stats'],
  }


def _identity(model: Saved) -> Record:
  keys = ('run', 'stage', 'selection', 'fingerprint')
  return {k: model.about[k] for k in keys}


def _has(record: Any, wanted: Record) -> bool:
  """Whether a record on disk was measured just so."""
  measured = {'largest_distance', 'largest_outside', 'invalid'}
  return isinstance(record, dict) and (
    wanted.items() <= record.items() and measured <= record.keys()
  )


def _replaced(old: Any, new: Record) -> bool:
  """Whether they are the same number, however measured."""
  return not isinstance(old, dict) or all(
    old.get(k) == new[k] for k in _IDENTITY
  )
