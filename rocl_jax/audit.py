"""Checks that an evaluation must pass before anybody believes its numbers.

  checks, curves = audit(forwards, variables, images, labels, eps=8 / 255)
  checks += of_records(records)
  failed(checks)

An attack that fails makes a network look robust. So these look for what makes
attacks fail (Carlini et al. 2019, 'On evaluating adversarial robustness'; the
flags of AutoAttack): gradients that vanish, networks that draw random numbers
or look at the rest of the batch, a budget that buys nothing, a search without
gradients that finds more than one with them. Any logits functions will do.

Where a check compares two accuracies, chance may decide a few images: with b
images that only the weaker attack broke and c that only the stronger one did,
b - c above 2 * sqrt(b + c) fails (McNemar's test, at two standard deviations).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rocl_jax import compiled, losses
from rocl_jax.attacks import arguments, ensemble
from rocl_jax.attacks.classifier import fold, image_keys
from rocl_jax.attacks.pgd import ascend, start_noise
from rocl_jax.attacks.robustness import Forwards, as_floats
from rocl_jax.logits import INVALID, floats, predict
from rocl_jax.settings import FieldError

VERSION = 2  # of the checks: what passed fewer is looked at again
MOST_IMAGES = 256
EPS_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
STEPS = (1, 2, 5, 10, 20, 50)
RESTARTS = 4
USUAL_STEPS = 10

Record = dict[str, Any]


class Check(NamedTuple):
  """One check: what was looked at, what was found, what is wanted."""

  check: str
  passed: bool
  found: str
  wanted: str


def audit(
  forwards: Forwards,
  variables: Any,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  eps: float,
  norm: str = 'linf',
  mesh: Mesh | None = None,
  seed: int = 0,
) -> tuple[list[Check], dict[str, list[dict[str, float]]]]:
  """Checks a network, and what PGD can do to it.

  Args:
    forwards: (variables) -> the logits function to attack, and the one that
      judges; often the same.
    variables: what `forwards` takes; None for functions that need nothing.
    images: uint8, or float in [0, 1], [N, H, W, C]; 256 are enough.
    labels: int [N].
    eps: the radius of the evaluation, more than 0; also as text, '8/255'.
    norm: 'linf' or 'l2'.
    mesh: the devices; one of them if not given.
    seed: of the attacks' starts.

  Returns:
    The checks, and security curves: 'eps', 'steps' and 'restarts', each a list
    of {'eps': ..., 'robust_top1': percent}.

  Raises:
    ValueError: images, labels or arguments of the wrong kind.
  """
  eps = arguments.radius('eps', eps, norm)
  if not eps > 0:
    raise FieldError('eps', eps, 'more than 0: without a ball no attack moves')
  arguments.seed(seed)
  images, labels = arguments.labelled(images, labels)
  mesh = arguments.mesh(mesh, jax.local_devices()[:1])
  arguments.function('forwards', forwards)
  functions = forwards(variables)
  if not isinstance(functions, tuple | list) or len(functions) != 2:
    wanted = 'a pair: what is attacked, what judges'
    raise FieldError('forwards', type(functions).__name__, wanted)
  classes = [arguments.classes(f, images, labels) for f in functions]
  if classes[0] != classes[1]:
    found = f'{classes[0]} and {classes[1]} logits'
    raise FieldError('forwards', found, 'networks of the same classes')
  with arguments.within(mesh):
    checks = _network(forwards, variables, images, labels)
    more, curves = _attacks(
      forwards, variables, images, labels, eps, norm, mesh, seed
    )
  return checks + more, curves


def failed(checks: Iterable[Check]) -> list[Check]:
  """The checks that failed."""
  return [check for check in checks if not check.passed]


def _network(forwards, variables, images, labels) -> list[Check]:
  """Checks that cost a few passes."""
  n = len(labels)
  images = jnp.asarray(as_floats(images))

  def passes(variables, images):
    attacked, judge = forwards(variables)
    return floats(attacked(images)), floats(judge(images))

  def gradients(variables, images, labels):
    attacked, _ = forwards(variables)
    climbed = lambda x: losses.margin(attacked(x), labels).sum()
    return jax.grad(climbed)(images)

  passes = compiled.jit(passes)
  look = lambda x: [np.asarray(y) for y in passes(variables, x)]
  attacked, judged = look(images)
  again = look(images)[1]
  order = np.random.default_rng(0).permutation(n)
  permuted = look(images[order])[1]
  half = n // 2
  other = np.where(np.arange(n) < n - half, np.arange(n), np.arange(n) - half)
  beside_others = look(images[other])[1][: n - half]
  gradient = np.asarray(
    compiled.jit(gradients)(variables, images, labels), np.float64
  ).reshape(n, -1)

  # Of each class, whose logits may be far below all others; of one that is
  # always near 0, as of the winners.
  size = np.where(np.isfinite(judged), np.abs(judged), 0)
  won = np.take_along_axis(size, judged.argmax(-1)[:, None], 1).max()
  scale = np.maximum(size.max(0), max(0.01 * won, 1e-12))
  known = np.where(judged > -1e3, judged, 0)  # the others are ruled out
  low, high = known.min(), known.max()
  probable = -1e-6 <= low <= high <= 1 + 1e-3 and (
    high >= 0.5 or np.abs(known.sum(-1) - 1).max() < 1e-3
  )
  one, other = (
    np.asarray(predict(jnp.asarray(x), labels)) for x in (attacked, judged)
  )
  agree = float((one == other).mean())
  usable = np.isfinite(gradient)
  vanish = int((~(usable & (gradient != 0)).any(-1)).sum())

  def apart(a, b):
    same = (a == b) | (np.isnan(a) & np.isnan(b))  # -inf, too
    with np.errstate(invalid='ignore'):
      difference = np.where(same, 0, np.abs(a - b) / scale).max()
    return np.inf if np.isnan(difference) else float(difference)

  def close(name, difference):
    return Check(
      name,
      difference <= _SAME,
      f'{difference:.1e} of the largest logit',
      f'at most {_SAME:.0e}',
    )

  return [
    _valid('clean', (one == INVALID) | (other == INVALID)),
    Check(
      'logits, not probabilities',
      not probable,
      f'values from {low:.4g} to {high:.4g}',
      'logits: a softmax or sigmoid hides the margin, and its gradients vanish',
    ),
    close('two passes give the same logits', apart(judged, again)),
    close(
      'a permuted batch gives permuted logits', apart(judged[order], permuted)
    ),
    close(
      'an image has the same logits beside other images',
      apart(judged[: n - half], beside_others),
    ),
    Check(
      'the attacked network is the judged one',
      n * (1 - agree) <= max(1, 0.02 * n),
      f'the same class for {agree:.1%} of the images',
      'at least 98 %, or all but one',
    ),
    Check(
      'gradients are finite',
      bool(usable.all()),
      f'{int((~usable).any(-1).sum())} of {n} images have others',
      'none: an attack can not follow them',
    ),
    Check(
      'no gradient of the margin vanishes',
      vanish == 0,
      f'{vanish} of {n} images have none',
      'none: attacks by gradients can not move them',
    ),
  ]


_SAME = 1e-3  # logits are equal within this share of the largest


def _valid(which: str, without: np.ndarray) -> Check:
  """Whether the logits of all images are valid, see `logits.invalid`."""
  return Check(
    f'no {which} image has invalid logits',
    not without.any(),
    f'{int(without.sum())} of {len(without)} images have NaN or +inf, or -inf '
    'for the label',
    '0',
  )


def _attacks(forwards, variables, images, labels, eps, norm, mesh, seed):
  """Checks that cost attacks: PGD with more and more of everything."""
  predict_ = _pgd(forwards, variables, images, labels, norm, mesh, seed)
  step_size = eps / 4
  right = predict_(0.0, 0.0, 0) == labels
  without = np.zeros(len(labels), bool)  # valid logits, somewhere in the ball

  def break_(factor, *rest):
    found = predict_(factor * eps, factor * step_size, *rest)
    if factor <= 1:
      without[found == INVALID] = True
    return right & (found == labels)

  by_eps = [break_(f, USUAL_STEPS) for f in EPS_FACTORS]
  by_steps = [break_(1.0, steps) for steps in STEPS]
  runs = [break_(1.0, USUAL_STEPS, turn) for turn in range(RESTARTS)]
  by_restarts = [np.logical_and.reduce(runs[: i + 1]) for i in range(RESTARTS)]
  # No ball: in L2 the box's own diagonal. Small steps alone would be one.
  most = 1.0 if norm == 'linf' else math.sqrt(images[0].size)
  left = right.copy()
  for step in (max(step_size, most * 2 / 255), most / 10):
    unbounded = predict_(most, step, 50)
    # Invalid logits do not break an image.
    left &= (unbounded == labels) | (unbounded == INVALID)

  curve = lambda name, values, flags: [
    {name: value, 'robust_top1': round(100 * float(f.mean()), 4)}
    for value, f in zip(values, flags, strict=True)
  ]
  radii = [0.0, *(f * eps for f in EPS_FACTORS)]
  curves = {
    'eps': curve('eps', radii, [right, *by_eps]),
    'steps': curve('steps', STEPS, by_steps),
    'restarts': curve('restarts', range(1, RESTARTS + 1), by_restarts),
  }
  return [
    _valid('attacked', without),
    _non_increasing('eps', ['0', *EPS_FACTORS], [right, *by_eps]),
    _non_increasing('steps', STEPS, by_steps),
    _non_increasing('restarts', range(1, RESTARTS + 1), by_restarts),
    _alike(runs),
    Check(
      'an unbounded attack breaks every image',
      not left.any(),
      f'{left.sum()} of {len(labels)} images withstand 50 steps without a ball',
      '0',
    ),
  ], curves


def _pgd(forwards, variables, images, labels, norm, mesh, seed):
  """(eps, step_size, steps, turn=0) -> the class of each attacked image, or
  INVALID; one program for all."""
  n = len(labels)
  size = -(-n // mesh.size) * mesh.size
  rows = ensemble.filled(np.arange(n), size)
  split = PartitionSpec('data')
  batch = jax.device_put(
    (as_floats(images)[rows], labels[rows], rows),
    NamedSharding(mesh, split),
  )
  variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
  key = jax.random.key(seed)

  def part(variables, images, labels, rows, key, eps, step_size, steps, turn):
    attacked, judge = forwards(variables)
    keys = fold(image_keys(key, rows), turn)
    noise = start_noise(keys, images.shape, eps, norm, 'uniform')
    x, _ = ascend(
      lambda x: losses.cross_entropy(attacked(x), labels),
      images,
      images + noise,
      eps=eps,
      step_size=step_size,
      steps=steps,
      norm=norm,
    )
    return predict(judge(x), labels)

  every = PartitionSpec()
  program = compiled.jit(
    jax.shard_map(
      part,
      mesh=mesh,
      in_specs=(every, split, split, split, *[every] * 5),
      out_specs=split,
      check_vma=False,
    )
  )

  def predictions(eps, step_size, steps, turn=0):
    return np.asarray(
      program(variables, *batch, key, eps, step_size, steps, turn)
    )[:n]

  return predictions


def _non_increasing(
  name: str, values: Iterable[Any], flags: Sequence[np.ndarray]
) -> Check:
  """Whether no stronger attack leaves more images than a weaker one."""
  values = [f'{v:g}' if isinstance(v, float) else str(v) for v in values]
  worst = ''
  for i, weak in enumerate(flags):
    for j in range(i + 1, len(flags)):
      regained = int((flags[j] & ~weak).sum())
      lost = int((weak & ~flags[j]).sum())
      if regained - lost > 2 * math.sqrt(regained + lost):
        worst = (
          f'{regained} images withstand {name} {values[j]} but not '
          f'{values[i]}, and {lost} the other way round'
        )
  shares = ', '.join(f'{100 * f.mean():.1f}' for f in flags)
  unit = ' times' if name == 'eps' else ''
  return Check(
    f'robust accuracy does not grow with {name}',
    not worst,
    worst or f'{shares} % at{unit} {", ".join(values)}',
    'no growth beyond chance',
  )


def _alike(runs: Sequence[np.ndarray]) -> Check:
  """Whether attacks that differ in their start alone find equally many."""
  apart = [
    (int((a & ~b).sum()), int((b & ~a).sum()))
    for i, a in enumerate(runs)
    for b in runs[i + 1 :]
  ]
  # Three standard deviations: there are several pairs.
  odd = [(a, b) for a, b in apart if abs(a - b) > 3 * math.sqrt(a + b)]
  shares = ', '.join(f'{100 * run.mean():.1f}' for run in runs)
  return Check(
    'random starts leave equally many images',
    not odd,
    f'{shares} %',
    'no difference beyond chance',
  )


def of_records(records: Sequence[Record]) -> list[Check]:
  """Checks what records say, each by itself and beside each other.

  Args:
    records: of one evaluation; those of `results.json`.
  """
  checks = []
  for record in records:
    checks += _one_record(record)
  groups: dict[tuple[Any, ...], list[Record]] = {}
  for record in records:
    same = ('run', 'stage', 'selection', 'split', 'n', 'norm', 'eps')
    groups.setdefault(tuple(record.get(k) for k in same), []).append(record)
  for group in groups.values():
    for record in group:
      if record.get('members'):
        checks += [_no_weaker(record, r) for r in group if r is not record]
  return checks


def _one_record(record: Record) -> list[Check]:
  name, n = f'{record["attack"]} on {record["split"]}', record['n']
  clean, robust = record['clean_top1'], record['robust_top1']
  classified = sum(record['per_class']['robust_predicted'])
  counted = min(classified + record['invalid'], record['counted'])
  checks = [
    *valid(name, record),
    Check(
      f'{name}: robust accuracy is not above clean',
      robust <= clean + chance(n),
      f'{robust:.2f} and {clean:.2f} %',
      f'at most {chance(n):.2f} points above',
    ),
    Check(
      f'{name}: each image is counted once',
      counted == n,
      f'{counted} of {n}',
      str(n),
    ),
    Check(
      f'{name}: the network confirms what fooled its folded form',
      100 * record['disputed'] / n <= chance(n),
      f'{record["disputed"]} of {n} images are disputed',
      f'at most {chance(n):.2f} %',
    ),
    *inside(name, record),
  ]
  members = record.get('members') or []
  by_gradients = [m for m in members if m['algorithm'] != 'square']
  if by_gradients and len(by_gradients) < len(members):
    gap = min(m['robust_top1'] for m in by_gradients) - robust
    allowed = max(0.2, 100 / n)
    checks.append(
      Check(
        f'{name}: Square finds no more than attacks by gradients',
        gap <= allowed + 1e-3,  # records round to four decimals
        f'{gap:.2f} points more',
        f'at most {allowed:.2f}',
      )
    )
  return checks


def valid(name: str, record: Record) -> list[Check]:
  """Whether logits and gradients were numbers wherever an attack looked."""
  found = {
    'no clean image has invalid logits': 'clean_invalid',
    'no attacked image has invalid logits': 'invalid',
    'no image has gradients that are not finite': 'stuck',
  }
  return [
    Check(
      f'{name}: {text}',
      not record[key],
      f'{record[key]} of {record["n"]} images',
      '0',
    )
    for text, key in found.items()
  ]


def inside(name: str, record: Record) -> list[Check]:
  """Whether all adversarial images are where they may be, as measured."""
  eps = record['eps'] or 0.0  # none without an attack
  return [
    Check(
      f'{name}: every adversarial image is in [0, 1]',
      record['largest_outside'] <= 0,
      f'{max(record["largest_outside"], 0):.1e} outside',
      '0',
    ),
    Check(
      f'{name}: every adversarial image is in the ball',
      record['largest_distance'] <= eps * (1 + 1e-5) + 1e-6,
      f'{record["largest_distance"]:.6f}',
      f'at most eps, {eps:.6f}',
    ),
  ]


def _no_weaker(ensemble: Record, other: Record) -> Check:
  allowed = chance(ensemble['n'])
  found = f'{ensemble["robust_top1"]:.2f} and {other["robust_top1"]:.2f} %'
  return Check(
    f'{ensemble["attack"]} leaves no more than {other["attack"]}',
    ensemble['robust_top1'] <= other['robust_top1'] + allowed,
    found,
    f'at most {allowed:.2f} points more',
  )


def chance(n: int) -> float:
  """Points of accuracy that chance may decide: two standard deviations if
  0.2 % of n images, or one of them, could fall either way."""
  return 100 * 2 * math.sqrt(max(0.002 * n, 1)) / n


def white_box(name: str, own: float, transferred: float, n: int) -> Check:
  """A transfer attack must not beat the attack on the network itself.

  Args:
    name: the surrogate's.
    own, transferred: robust accuracies in percent.
    n: images.
  """
  return Check(
    f'the white box is no weaker than the transfer from {name}',
    own <= transferred + chance(n),
    f'{own:.2f} and {transferred:.2f} %',
    f'at most {chance(n):.2f} points above',
  )
