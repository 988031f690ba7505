"""Clean and robust accuracy, image by image.

  settings = parse(Settings, config['eval'], 'config.eval')
  evaluate = evaluator(model, settings.attacks['pgd10'], mesh, batch_size)
  outcome = evaluate(variables, dataset.test, seed=0)
  outcome.percent('robust_top1')

Every image counts exactly once: the last batch is filled up, and the filling
is cut off. Networks are evaluated with running BatchNorm statistics; the
attack's gradients come from the folded form, its score from the network
itself.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rocl_jax import augment, compiled, losses
from rocl_jax.attacks import worst_of_restarts
from rocl_jax.attacks.settings import AttackSettings
from rocl_jax.data import Split
from rocl_jax.errors import UserError
from rocl_jax.mesh import replicated
from rocl_jax.models import Model
from rocl_jax.settings import FieldError, at_least, one_of, parse
from rocl_jax.types import Variables

Array = jax.Array | np.ndarray

OBJECTIVES = {'cross_entropy': losses.cross_entropy, 'margin': losses.margin}


@dataclass(frozen=True, kw_only=True)
class EvaluationAttack:
  """An attack of a suite: its own keywords, and two of the evaluation's.

  Attributes:
    name: what records call it.
    settings: the attack.
    objective: the loss that it maximises, a name in OBJECTIVES.
    restarts: runs from different starts, of which the worst counts.
  """

  name: str
  settings: AttackSettings
  objective: str
  restarts: int

  def __post_init__(self):
    one_of('objective', self.objective, OBJECTIVES)
    at_least('restarts', self.restarts, 1)


class EvaluationAttacks(dict[str, EvaluationAttack]):
  """The attacks that a suite may name: a section of sections."""

  @classmethod
  def parse(cls, section: Any, where: str) -> 'EvaluationAttacks':
    """Reads a section of attacks by name."""
    if not isinstance(section, Mapping):
      raise UserError(
        f'{where}: found {section!r}, wanted a section of attacks'
      )

    def attack(name, fields):
      fields, there = dict(fields), f'{where}.{name}'
      own = {k: fields.pop(k) for k in ('objective', 'restarts') if k in fields}
      settings = AttackSettings.parse(fields, there)
      defaults = {'objective': 'cross_entropy', 'restarts': 1}
      given = {'name': name, 'settings': settings}
      return parse(EvaluationAttack, defaults | own, there, given)

    return cls({name: attack(name, fields) for name, fields in section.items()})


@dataclass(frozen=True, kw_only=True)
class Settings:
  """The `eval` section.

  Attributes:
    eps: the radius that the attacks' own follow in `configs/eval.py`.
    batch_size: images at a time.
    examples: evaluate the first so many images of a split; 0 for all.
    suite: names of the attacks to run, in this order.
    attacks: the attacks that a suite may name.
  """

  eps: float
  batch_size: int
  examples: int
  suite: tuple[str, ...]
  attacks: EvaluationAttacks

  def __post_init__(self):
    at_least('eps', self.eps, 0)
    at_least('batch_size', self.batch_size, 1)
    at_least('examples', self.examples, 0)
    if not self.suite:
      raise FieldError('suite', self.suite, 'at least one attack')
    for name in self.suite:
      one_of('suite', name, self.attacks)

  @property
  def selected(self) -> tuple[EvaluationAttack, ...]:
    """The attacks of the suite, in its order."""
    return tuple(self.attacks[name] for name in self.suite)


class Outcome(NamedTuple):
  """What happened to each of n images, as NumPy arrays [n].

  Attributes:
    clean_top1, clean_top5: whether the label is first, or among the first
      five, on the clean image.
    robust_top1, robust_top5: the same on the adversarial image.
    clean_prediction, adversarial_prediction: the classes.
  """

  clean_top1: Array
  clean_top5: Array
  robust_top1: Array
  robust_top5: Array
  clean_prediction: Array
  adversarial_prediction: Array

  def percent(self, field: str) -> float:
    """The mean of a field over the images, in percent."""
    return 100.0 * float(np.mean(getattr(self, field)))


class Evaluator(NamedTuple):
  """An attack, compiled for a network and a batch size.

  Attributes:
    attack: what it runs.
    batch_size: images at a time; the random starts depend on it.
    outcome: (variables, split, seed) -> Outcome of all its images.
    examples: (variables, split, seed, count) -> (Outcome, clean images,
      adversarial images) of the first `count`, in [0, 1].
  """

  attack: EvaluationAttack
  batch_size: int
  outcome: Callable[[Variables, Split, int], Outcome]
  examples: Callable[
    [Variables, Split, int, int], tuple[Outcome, np.ndarray, np.ndarray]
  ]


def evaluator(
  model: Model, attack: EvaluationAttack, mesh: Mesh, batch_size: int
) -> Evaluator:
  """Builds the compiled evaluation of one attack."""
  objective = OBJECTIVES[attack.objective]

  def measure(variables, images, labels, key):
    images = augment.to_float(images)
    frozen = model.prepare(variables)
    predict = lambda x: model.predict(variables, x)
    run = attack.settings.attack
    if attack.restarts > 1:
      score = lambda x: losses.margin(predict(x), labels)
      run = worst_of_restarts(run, attack.restarts, score)
    x_adv = run(lambda x: objective(frozen(x), labels), images, key)
    clean, adversarial = predict(images), predict(x_adv)
    outcome = Outcome(
      clean_top1=_in_top(clean, labels, 1),
      clean_top5=_in_top(clean, labels, 5),
      robust_top1=_in_top(adversarial, labels, 1),
      robust_top5=_in_top(adversarial, labels, 5),
      clean_prediction=clean.argmax(-1),
      adversarial_prediction=adversarial.argmax(-1),
    )
    return outcome, x_adv

  everywhere = replicated(mesh)
  batches = NamedSharding(mesh, PartitionSpec('data'))
  compiled_measure = compiled.jit(measure, out_shardings=everywhere)

  def place(variables):
    visible = {k: variables[k] for k in ('params', 'batch_stats')}
    return jax.device_put(visible, everywhere)

  def one_batch(variables, split, seed, start, size):
    rows = np.minimum(np.arange(start, start + size), len(split.labels) - 1)
    images, labels = split.images[rows], split.labels[rows]
    batch = jax.device_put((images, labels), batches)
    key = jax.random.fold_in(jax.random.key(seed), _name_hash(attack.name))
    key = jax.random.fold_in(key, start)
    return compiled_measure(variables, *batch, key)

  def outcome(variables, split, seed):
    n = len(split.labels)
    size = _fitting_size(batch_size, n, mesh.size)
    variables = place(variables)
    # All batches are queued before the first result is fetched.
    parts = [
      one_batch(variables, split, seed, start, size)[0]
      for start in range(0, n, size)
    ]
    parts = jax.device_get(parts)
    return Outcome(
      *(np.concatenate(field)[:n] for field in zip(*parts, strict=True))
    )

  def examples(variables, split, seed, count):
    n = len(split.labels)
    size = _fitting_size(batch_size, n, mesh.size)
    result = one_batch(place(variables), split, seed, 0, size)
    first, x_adv = jax.device_get(result)
    count = min(count, n, size)
    clean = np.asarray(split.images[:count], np.float32) / 255
    return Outcome(*(field[:count] for field in first)), clean, x_adv[:count]

  return Evaluator(attack, batch_size, outcome, examples)


def cut(splits: dict[str, Split], examples: int) -> dict[str, Split]:
  """The splits that are not empty, cut to the first `examples` (0 for all)."""
  count = examples or None
  return {
    name: Split(split.images[:count], split.labels[:count])
    for name, split in splits.items()
    if len(split.labels)
  }


def _in_top(logits, labels, k):
  """Whether fewer than k classes stand before the label; ties stand behind."""
  own = jnp.take_along_axis(logits, labels[:, None], axis=1)
  before = (logits > own).sum(-1)
  is_first = logits.argmax(-1) == labels
  return is_first if k == 1 else (before < k)


def _fitting_size(batch_size, n, devices):
  """The batch size, or all n images if fewer, rounded up to the devices."""
  return -(-min(batch_size, n) // devices) * devices


def _name_hash(name):
  return zlib.crc32(name.encode())
