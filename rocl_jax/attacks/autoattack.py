"""AutoAttack (Croce and Hein 2020) on any JAX function of images.

  from rocl_jax.attacks import autoattack

  result = autoattack(logits_fn, images, labels, eps=8 / 255)
  result.robust.mean()      # robust accuracy

`logits_fn` maps images [N, H, W, C] to logits [N, K] and can be traced: of
Flax, Equinox, Haiku or plain JAX, in evaluation mode.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from rocl_jax.attacks import arguments, robustness
from rocl_jax.attacks.apgd import apgd
from rocl_jax.attacks.classifier import ClassifierAttack
from rocl_jax.attacks.ensemble import Member
from rocl_jax.attacks.fab import fab
from rocl_jax.attacks.square import square
from rocl_jax.logits import floats
from rocl_jax.settings import FieldError

VERSIONS = ('standard', 'rand')
_TARGETS = 9
SAMPLES = 20  # gradients to average, of a network that draws random numbers


def members(
  eps: float,
  norm: str = 'linf',
  version: str = 'standard',
  classes: int = 10,
) -> tuple[Member, ...]:
  """The attacks of a version, in its order.

  Args:
    eps: radius.
    norm: 'linf' or 'l2'.
    version: 'standard': APGD-CE, targeted APGD-DLR, FAB-T, Square; 'rand', for
      networks that draw random numbers: APGD-CE and APGD-DLR on the mean of
      20 gradients.
    classes: of the network; there are at most 9 target classes.
  """
  arguments.name('version', version, VERSIONS)
  targets = min(_TARGETS, classes - 1)
  if version == 'rand':
    return (
      ('apgd-ce', apgd(eps=eps, norm=norm, samples=SAMPLES)),
      ('apgd-dlr', apgd(eps=eps, norm=norm, loss='dlr', samples=SAMPLES)),
    )
  return (
    ('apgd-ce', apgd(eps=eps, norm=norm)),
    ('apgd-t', apgd(eps=eps, norm=norm, loss='dlr', targets=targets)),
    ('fab-t', fab(eps=eps, norm=norm, targets=targets)),
    ('square', square(eps=eps, norm=norm)),
  )


class AutoAttackResult(NamedTuple):
  """Attributes:
  images: adversarial images float32 [N, H, W, C]: where the network was
    fooled, by the attack that did; elsewhere the last that was tried.
  robust: whether the image is classified right and withstood all [N].
  clean: whether it is classified right without an attack [N].
  prediction: the class of `images`, -1 where `invalid` [N].
  after: {attack: share of images robust after it}, in the order of attacks.
  invalid: whether the network's logits of the clean or of the attacked image
    are invalid, see `logits.invalid`: neither robust nor broken [N]. With any
    of these, robust accuracy proves nothing.
  stuck: entries of the network's gradient that were not finite, over all
    steps: they moved nothing [N].
  """

  images: np.ndarray
  robust: np.ndarray
  clean: np.ndarray
  prediction: np.ndarray
  after: dict[str, float]
  invalid: np.ndarray
  stuck: np.ndarray


def autoattack(
  logits_fn: Callable[..., jax.Array],
  images: Any,
  labels: Any,
  *,
  eps: float,
  norm: str = 'linf',
  version: str = 'standard',
  attacks: Sequence[Member] | None = None,
  seed: int = 0,
  batch_size: int = 128,
  mesh: Mesh | None = None,
  say: Callable[[str], None] = lambda _: None,
) -> AutoAttackResult:
  """Runs AutoAttack; images that the network gets wrong count as broken.

  On CPUs XLA's gradient of a convolution is slow in a loop, as attacks are:
  `rocl_jax.convolution.conv` in the network is several times faster there.

  Args:
    logits_fn: images float32 [B, H, W, C] -> logits [B, K] of any floating
      type; for `version='rand'` (images, key) -> logits.
    images: float [N, H, W, C] in [0, 1], or uint8.
    labels: int [N].
    eps: radius, in units of the images: 8 / 255 or '8/255'.
    norm: 'linf' or 'l2'.
    version: 'standard' or 'rand', see `members`.
    attacks: (name, attack) pairs instead, of `apgd`, `fab`, `square`; with no
      more targets than there are classes beside the label.
    seed: of all random numbers. Each image has its own, whatever the batch.
    batch_size: images at a time, over all devices.
    mesh: the devices; all of this process if not given.
    say: gets a line after each attack.

  Raises:
    ValueError: images, labels or arguments of the wrong kind.
  """
  arguments.name('version', version, VERSIONS)
  eps = arguments.radius('eps', eps, norm)
  arguments.seed(seed)
  arguments.count('batch_size', batch_size, 1)
  images, labels = arguments.labelled(images, labels)
  mesh = arguments.mesh(mesh, jax.local_devices())
  judge = logits_fn
  if version == 'rand':
    arguments.function('logits_fn', logits_fn)
    judge = functools.partial(_one_draw, logits_fn, jax.random.key(seed))
  classes = arguments.classes(judge, images, labels)
  if attacks is None:
    attacks = members(eps, norm, version, classes)
  attacks = _checked(attacks, eps, norm)
  attacks = list(map(functools.partial(_aimed, classes), attacks))
  forwards = lambda _: (logits_fn, judge)
  measure = robustness.build(attacks, forwards, mesh, batch_size)
  told = 0

  def tell(after):
    nonlocal told
    for name, _ in attacks[told : len(after)]:
      say(f'{name}: {after[told]} of {len(labels)} images are robust')
      told += 1

  watch = lambda fates, _: tell(fates.after)
  with arguments.within(mesh):
    outcome, found = measure(None, images, labels, seed, watch=watch, keep=True)
  assert found is not None
  tell(outcome.after)
  return AutoAttackResult(
    images=found,
    robust=np.asarray(outcome.robust_top1),
    clean=np.asarray(outcome.clean_top1),
    prediction=np.asarray(outcome.adversarial_prediction),
    after={
      name: float(count) / len(labels)
      for (name, _), count in zip(attacks, outcome.after, strict=True)
    },
    invalid=outcome.clean_invalid | outcome.invalid,
    stuck=np.asarray(outcome.stuck),
  )


def _aimed(classes: int, member: Member) -> Member:
  """An attack with no more targets than the network has, and a warning."""
  name, attack = member
  aimed = attack.of_classes(classes)
  if aimed != attack:
    found = f'{name}: found {attack.turns} targets, and {classes} classes'
    warnings.warn(f'{found}; {aimed.turns} are attacked', stacklevel=3)
  return name, aimed


def _checked(attacks: Any, eps: float, norm: str) -> list[Member]:
  """The attacks, if they are pairs of a name and an attack in this ball."""
  wanted = f"pairs such as ('apgd-ce', apgd(eps={eps:g}))"
  if not isinstance(attacks, Iterable):
    raise FieldError('attacks', attacks, wanted)
  attacks, names = list(attacks), set()
  for i, pair in enumerate(attacks):
    field = f'attacks[{i}]'
    if not isinstance(pair, tuple | list) or list(map(type, pair)) != [
      str,
      ClassifierAttack,
    ]:
      raise FieldError(field, pair, wanted)
    name, attack = pair
    if (attack.norm, attack.eps) != (norm, eps):
      found = f'{attack.norm} {attack.eps:g}'
      raise FieldError(field, found, f'the ball of all, {norm} {eps:g}')
    if name in names:
      raise FieldError(field, name, 'another name than those before')
    names.add(name)
  return attacks


def _one_draw(logits_fn, key, images):
  """Logits of a network that draws random numbers, from one draw; NaN where
  any of several has NaN or +inf."""
  draw = lambda i: logits_fn(images, jax.random.fold_in(key, i))
  bad = lambda z: ~(floats(z) < jnp.inf).all(-1, keepdims=True)
  first = logits_fn(images, key)
  any_bad = lax.fori_loop(0, SAMPLES, lambda i, b: b | bad(draw(i)), bad(first))
  return jnp.where(any_bad, jnp.nan, first)
