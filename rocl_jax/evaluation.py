"""Clean and robust accuracy, image by image.

  settings = parse(Settings, config['eval'], 'config.eval')
  evaluate = evaluator(model, settings.selected[0], mesh, batch_size)
  outcome = evaluate.outcome(variables, dataset.test, seed=0)
  outcome.percent('robust_top1')

Networks are evaluated with running BatchNorm statistics; the attack's
gradients come from the folded form, the verdict from the network itself. What
a number is made of is in `attacks.robustness`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from rocl_jax.attacks import ATTACKS, CLASSIFIER_ATTACKS, robustness
from rocl_jax.attacks.balls import check_ball
from rocl_jax.attacks.classifier import OBJECTIVES, on_objective
from rocl_jax.attacks.ensemble import Member
from rocl_jax.attacks.robustness import Forwards, Outcome
from rocl_jax.attacks.settings import AttackSettings
from rocl_jax.data import Split
from rocl_jax.errors import UserError
from rocl_jax.models import Model
from rocl_jax.progress import warn
from rocl_jax.settings import (
  FieldError,
  at_least,
  bind,
  one_of,
  parse,
  with_defaults,
)
from rocl_jax.types import Variables


@dataclass(frozen=True, kw_only=True)
class EvaluationAttack:
  """An entry of a suite: one attack, or an ensemble of several.

  Attributes:
    name: what records call it.
    members: names and attacks, in order; none to measure clean accuracy.
    everyone: whether it is run on all images, as published evaluations with
      PGD do. Else images that are wrong without attack count as broken at
      once, as AutoAttack does.
    protocol: all that the attack's number depends on, as JSON values.
  """

  name: str
  members: tuple[Member, ...]
  everyone: bool
  protocol: dict[str, Any]

  @property
  def ball(self) -> dict[str, Any]:
    """`norm` and `eps`; None without an attack."""
    return {k: self.protocol[k] for k in ('norm', 'eps')}

  def of_classes(self, count: int) -> 'EvaluationAttack':
    """With no more targets than a network of so many classes has, and a
    warning where that is fewer than were asked for."""

    def fewer(protocol):
      targets = protocol.get('targets')
      aims = {'targets': min(targets, count - 1)} if targets else {}
      return protocol | aims

    protocol = fewer(self.protocol)
    if 'members' in protocol:
      protocol['members'] = [fewer(member) for member in protocol['members']]
    if protocol == self.protocol:
      return self
    warn(
      f'{self.name}: the network has {count} classes: {count - 1} targets are '
      'attacked'
    )
    members = tuple((name, a.of_classes(count)) for name, a in self.members)
    return dataclasses.replace(self, members=members, protocol=protocol)


class EvaluationAttacks(dict[str, EvaluationAttack]):
  """The attacks that a suite may name: a section of sections."""

  @classmethod
  def parse(cls, section: Any, where: str) -> 'EvaluationAttacks':
    """Reads a section of attacks by name.

    Raises:
      UserError: an unknown attack or field, a wrong type or value.
    """
    if not isinstance(section, Mapping):
      raise UserError(
        f'{where}: found {section!r}, wanted a section of attacks'
      )
    return cls(
      {
        name: _parse_attack(name, fields, f'{where}.{name}')
        for name, fields in section.items()
      }
    )


def _parse_attack(name: str, section: Any, where: str) -> EvaluationAttack:
  if not isinstance(section, Mapping) or 'name' not in section:
    raise UserError(f'{where}: found {section!r}, wanted a section with name')
  fields = dict(section)
  try:
    one_of('name', str(fields['name']), [*ATTACKS, *CLASSIFIER_ATTACKS])
    if fields['name'] in ATTACKS:
      objective = fields.pop('objective', 'cross_entropy')
      restarts = fields.pop('restarts', 1)
      settings = AttackSettings.parse(fields, where)
      one_of('objective', objective, OBJECTIVES)
      if type(restarts) is not int:
        raise FieldError('restarts', restarts, 'a whole number')
      at_least('restarts', restarts, 1)
      function = ATTACKS[settings.name]
      keywords = with_defaults(function, settings.keywords)
      attack = on_objective(function, keywords, objective, restarts)
      protocol = {'algorithm': settings.name, **keywords}
      protocol |= {'objective': objective, 'restarts': restarts}
    else:
      factory = CLASSIFIER_ATTACKS[fields.pop('name')]
      keywords = with_defaults(factory, bind(factory, fields, where))
      attack = factory(**keywords)
      protocol = {'algorithm': section['name'], **keywords}
  except FieldError as e:
    raise UserError(f'{where}.{e}') from None
  everyone = section['name'] in ATTACKS
  return EvaluationAttack(
    name=name,
    members=((name, attack),),
    everyone=everyone,
    protocol=protocol | {'everyone': everyone},
  )


@dataclass(frozen=True, kw_only=True)
class Settings:
  """The `eval` section.

  Attributes:
    eps, norm: the ball that the attacks' own follow in `configs/eval.py`.
    batch_size: images at a time.
    examples: evaluate the first so many images of a split; 0 for all.
    suite: names of attacks or ensembles to run, in this order.
    attacks: the attacks that a suite may name.
    ensembles: name -> names of attacks, each of which sees the survivors of
      those before; of none for clean accuracy.
  """

  eps: float
  norm: str
  batch_size: int
  examples: int
  suite: tuple[str, ...]
  attacks: EvaluationAttacks
  ensembles: dict

  @classmethod
  def parse(cls, section: Any, where: str) -> 'Settings':
    """Reads the section: the ball first, which the attacks follow.

    Raises:
      UserError: an unknown or missing field, a wrong type or value.
    """
    ball = {k: v for k, v in dict(section).items() if k in ('eps', 'norm')}
    parse(check_ball, ball, where)
    return parse(cls, section, where)

  def __post_init__(self):
    check_ball(self.eps, self.norm)
    at_least('batch_size', self.batch_size, 1)
    at_least('examples', self.examples, 0)
    if not self.suite:
      raise FieldError('suite', self.suite, 'at least one attack')
    for name in self.suite:
      one_of('suite', name, [*self.attacks, *self.ensembles])
    for name, members in self.ensembles.items():
      field = f'ensembles.{name}'
      if name in self.attacks:
        raise FieldError(field, name, 'another name than that of an attack')
      if not isinstance(members, tuple | list):
        raise FieldError(field, members, 'a tuple of attacks')
      for member in members:
        one_of(field, member, self.attacks)
      balls = {self._ball(member) for member in members}
      if len(balls) > 1:
        found = ', '.join(f'{norm} {eps:g}' for norm, eps in sorted(balls))
        raise FieldError(field, found, 'attacks of one norm and one eps')

  def _ball(self, attack):
    protocol = self.attacks[attack].protocol
    return protocol['norm'], protocol['eps']

  @property
  def selected(self) -> tuple[EvaluationAttack, ...]:
    """The entries of the suite, in its order."""
    return tuple(self.named(name) for name in self.suite)

  def named(self, name: str) -> EvaluationAttack:
    """The attack or the ensemble of this name."""
    if name in self.attacks:
      return self.attacks[name]
    attacks = [self.attacks[member] for member in self.ensembles[name]]
    norm, eps = self._ball(attacks[0].name) if attacks else (None, None)
    return EvaluationAttack(
      name=name,
      members=tuple(m for attack in attacks for m in attack.members),
      everyone=False,
      protocol={
        'algorithm': 'ensemble',
        'norm': norm,
        'eps': eps,
        'everyone': False,
        'members': [{'attack': a.name, **a.protocol} for a in attacks],
      },
    )


class Evaluator(NamedTuple):
  """An entry of a suite, compiled for a network and a batch size.

  Attributes:
    attack: what it runs.
    batch_size: images at a time.
    outcome: (variables, split, seed, known=None, watch=...) -> Outcome of all
      its images; for `known` and `watch` see `robustness.build`.
    images: (variables, split, seed) -> (Outcome, adversarial images float32
      [n, H, W, C]).
  """

  attack: EvaluationAttack
  batch_size: int
  outcome: Callable[..., Outcome]
  images: Callable[[Variables, Split, int], tuple[Outcome, np.ndarray]]


def evaluator(
  model: Model,
  attack: EvaluationAttack,
  mesh: Mesh,
  batch_size: int,
  source: Model | None = None,
) -> Evaluator:
  """Builds the compiled evaluation of one attack.

  Args:
    model: the network whose accuracy is measured.
    attack: the attack, `of_classes` of the model.
    mesh: the devices.
    batch_size: images at a time.
    source: another network, which is attacked in the model's place: a transfer
      attack. `variables` are then a pair, the model's and the source's.
  """

  measure = robustness.build(
    attack.members,
    logits_functions(model, source),
    mesh,
    batch_size,
    attack.everyone,
  )
  seen = visible if source is None else lambda two: tuple(map(visible, two))

  def outcome(variables, split, seed, **keywords):
    return measure(seen(variables), *split, seed, **keywords)[0]

  def images(variables, split, seed):
    return measure(seen(variables), *split, seed, keep=True)

  return Evaluator(attack, batch_size, outcome, images)


def logits_functions(model: Model, source: Model | None = None) -> Forwards:
  """What of a model is attacked, and what judges; see `evaluator`."""

  def forwards(variables):
    own, attacked = variables if source else (variables, variables)
    frozen = (source or model).prepare(attacked)
    # A key may come, for networks that draw random numbers; these do not.
    climbed = lambda x, key=None: frozen(x)
    return climbed, lambda x: model.predict(own, x)

  return forwards


def visible(variables: Variables) -> Variables:
  """The part of the variables that a forward pass reads."""
  return {k: variables[k] for k in ('params', 'batch_stats')}


def cut(splits: dict[str, Split], examples: int) -> dict[str, Split]:
  """The splits that are not empty, cut to the first `examples` (0 for all)."""
  count = examples or None
  return {
    name: Split(split.images[:count], split.labels[:count])
    for name, split in splits.items()
    if len(split.labels)
  }
