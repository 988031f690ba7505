"""audit.json beside a model: what its audits found, and go on from."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from rocl_jax import audit, evaluation, saved
from rocl_jax.audit import Check
from rocl_jax.data import Split
from rocl_jax.files import exists, read_json, write_json
from rocl_jax.results import Record, crc32

FILE = 'audit.json'
# Which audit an entry is. Its curves are PGD's; the checks of records speak of
# the suite's own attacks.
_MODEL = ('run', 'stage', 'selection', 'fingerprint')
_IDENTITY = (*_MODEL, 'split', 'attack', 'seed', 'norm', 'eps', 'dtype')


def audit_model(
  model: saved.Saved,
  name: str,
  split: Split,
  records: Sequence[Record],
  suite: evaluation.Settings,
  examples: int,
  mesh: Mesh,
  seed: int,
) -> list[Check]:
  """Checks a model and its records, and adds both to the file beside it.

  What an audit of as many images found before is not looked for again.

  Args:
    model: the model.
    name: of the split.
    split: the images that the records are of.
    records: what was measured of it.
    suite: the radius and norm.
    examples: images of the checks of network and attacks; 0 for none.
    mesh: the devices.
    seed: of the attacks' starts.

  Raises:
    UserError: the file holds something else.
  """
  path = model.folder.parent / FILE
  new: dict[str, Any] = {k: model.about[k] for k in _MODEL}
  new |= {'split': name, 'attack': 'pgd', 'seed': seed}
  new |= {'norm': suite.norm, 'eps': suite.eps}
  new |= {'dtype': model.network.settings.dtype}
  new |= {'n': 0, 'steps': 0, 'images_crc32': '', 'checks': [], 'curves': {}}
  new['version'] = audit.VERSION
  entry = _last(path, new, split)
  count = min(examples, len(split.labels))
  if entry['n'] >= count > 0:
    model.say(f'audit on {entry["n"]} {name} images: done before')
  if entry['n'] < count:
    model.say(f'audit on {count} {name} images')
    first = _first(split, count)
    checks, curves = audit.audit(
      evaluation.logits_functions(saved.network(model.network)),
      evaluation.visible(model.variables),
      first.images,
      first.labels,
      eps=suite.eps,
      norm=suite.norm,
      mesh=mesh,
      seed=seed,
    )
    entry |= {'n': count, 'steps': audit.USUAL_STEPS, 'curves': curves}
    entry['images_crc32'] = crc32(first)
    entry['checks'] = _updated(entry['checks'], checks)
  entry['checks'] = _updated(entry['checks'], audit.of_records(records))
  kept = [e for e in _entries(path) if _identity(e) != _identity(entry)]
  write_json(path, [*kept, entry])
  return [Check(**check) for check in entry['checks']]


def _entries(path: epath.Path) -> list[Any]:
  return read_json(path, list) if exists(path) else []


def _last(path: epath.Path, new: dict[str, Any], split: Split):
  """The entry to go on from; `new` if there is none of these images."""
  for entry in _entries(path):
    if _identity(entry) == _identity(new) and _whole(entry):
      if entry['images_crc32'] == crc32(_first(split, entry['n'])):
        return entry
  return new


def _first(split: Split, n: int) -> Split:
  return Split(split.images[:n], split.labels[:n])


def _identity(entry: Any) -> list[Any] | None:
  if not isinstance(entry, Mapping):
    return None
  return [entry.get(key) for key in _IDENTITY]


def _whole(entry: Mapping[str, Any]) -> bool:
  """Whether an entry has all that this version looks for."""
  checks, n = entry.get('checks'), entry.get('n')
  return (
    entry.get('version') == audit.VERSION
    and isinstance(entry.get('images_crc32'), str)
    and isinstance(entry.get('curves'), dict)
    and isinstance(n, int)
    and n > 0
    and isinstance(checks, list)
    and all(
      isinstance(c, dict) and c.keys() == {*Check._fields} for c in checks
    )
  )


def _updated(before: list[dict], checks: Sequence[Check]) -> list[dict]:
  """Checks as JSON, those of the same name replaced."""
  names = {check.check for check in checks}
  kept = [check for check in before if check['check'] not in names]
  return kept + [check._asdict() for check in checks]
