"""What attacks make of each image: the programs, and what they measure.

  measure = build(members, forwards, mesh, batch_size=128)
  outcome, adversarial = measure(variables, images, labels, seed=0)

A turn of an attack is one compiled program for each batch size, and each
device runs its own part of the batch. Every image counts exactly once: a batch
is filled up, and the filling is cut off. Each image has random numbers of its
own, so neither batch size nor number of devices decides whether it breaks, but
for rounding; which of several images that break it is kept, they may.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rocl_jax import compiled
from rocl_jax.attacks import ensemble
from rocl_jax.attacks.balls import BALLS
from rocl_jax.attacks.classifier import ClassifierAttack, image_keys
from rocl_jax.attacks.ensemble import Attempt, Fates, Member
from rocl_jax.logits import INVALID, in_top, predict

Array = jax.Array | np.ndarray

# (variables) -> the logits function to attack, and the one that says what an
# image is taken for. Both map images [N, H, W, C] to logits [N, K].
Logits = Callable[..., jax.Array]
Forwards = Callable[[Any], tuple[Logits, Logits]]


class Outcome(NamedTuple):
  """What happened to each of n images, as NumPy arrays [n].

  Attributes:
    clean_top1, clean_top5: whether the label is first, or among the first
      five, on the clean image.
    robust_top1: whether the image withstood the attack. One with invalid
      logits, see `logits.invalid`, has neither withstood it nor been broken.
    robust_top5: whether the label is among the first five on the adversarial
      image: the one that broke it, or else the last that was tried.
    clean_prediction, adversarial_prediction: the classes, or INVALID.
    distance: norm of the displacement.
    outside: how far a pixel of it lies outside of [0, 1], 0 or less if none.
    disputed: whether the attacked network takes it for another class, but
      the one that judges does not; attacks stop by the former's word.
    stuck: how many gradient entries were not finite, and moved nothing.
    after: how many images were robust after each member.
    counted: for how many images the verdict rests on each turn that they were
      in, once.
  """

  clean_top1: Array
  clean_top5: Array
  robust_top1: Array
  robust_top5: Array
  clean_prediction: Array
  adversarial_prediction: Array
  distance: Array
  outside: Array
  disputed: Array
  stuck: Array
  after: Array
  counted: int

  def percent(self, field: str) -> float:
    """The mean of a field over the images, in percent."""
    return 100.0 * float(np.mean(getattr(self, field)))

  @property
  def clean_invalid(self) -> np.ndarray:
    """Whether the logits of the clean image are invalid [n]."""
    return np.asarray(self.clean_prediction) == INVALID

  @property
  def invalid(self) -> np.ndarray:
    """The same of the attacked image, the clean one if it was not attacked."""
    return np.asarray(self.adversarial_prediction) == INVALID


def build(
  members: Sequence[Member],
  forwards: Forwards,
  mesh: Mesh,
  batch_size: int,
  everyone: bool = False,
) -> Callable[..., tuple[Outcome, np.ndarray | None]]:
  """Prepares the evaluation of attacks, each on the survivors of those before.

  Args:
    members: names and attacks, in order; none to measure clean accuracy.
    forwards: see Forwards; both functions may depend on the variables.
    mesh: devices, along an axis named `data`.
    batch_size: images at a time, over all devices.
    everyone: attack all images, also those that are wrong without attack,
      which else count as broken at once.

  Returns:
    (variables, images, labels, seed, known=None, watch=..., keep=False) ->
    (Outcome, adversarial images float32 [n, H, W, C] if `keep`). `images` are
    uint8, or float in [0, 1]. `known` is the state of an interrupted run;
    `watch` gets the state after each batch, and the forward passes it took.
  """
  everywhere = NamedSharding(mesh, PartitionSpec())
  batches = NamedSharding(mesh, PartitionSpec('data'))
  clean = compiled.jit(_clean(forwards), out_shardings=everywhere)
  programs = [_attempt(attack, forwards, mesh) for _, attack in members]
  costs = [a.passes for _, a in members for _ in range(a.turns)]

  def measure(
    variables: Any,
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
    known: Fates | None = None,
    watch: Callable[[Fates, int], None] = lambda *_: None,
    keep: bool = False,
  ) -> tuple[Outcome, np.ndarray | None]:
    n = len(labels)
    labels = labels.astype(np.int32)
    sizes = ensemble.batch_sizes(batch_size, n, mesh.size)
    if len(costs) <= 1:
      sizes = sizes[-1:]  # nothing is gained by compiling for more
    variables = jax.device_put(variables, everywhere)

    def place(rows, size):
      rows = ensemble.filled(rows, size)
      return jax.device_put((images[rows], labels[rows], rows), batches)

    # All batches are queued before the first result is fetched.
    starts = range(0, n, sizes[-1])
    parts = [np.arange(i, min(i + sizes[-1], n)) for i in starts]
    seen = [clean(variables, *place(rows, sizes[-1])[:2]) for rows in parts]
    prediction, top1, top5 = (
      np.concatenate(field)[:n]
      for field in zip(*jax.device_get(seen), strict=True)
    )
    found = np.array(as_floats(images)) if keep else None

    def attempt(member, turn, rows, size):
      name = np.uint32(zlib.crc32(members[member][0].encode()))
      which = (np.uint32(seed), name, np.int32(turn))
      return programs[member](variables, *place(rows, size), *which)

    def settled(fates, rows, seen):
      if found is not None:
        found[rows] = seen.images
      watch(fates, len(rows) * costs[int(fates.turn)])

    alive = np.ones(n, bool) if everyone and members else top1
    fates = known or ensemble.begin(alive, prediction, top5)
    fates = ensemble.run(members, attempt, labels, fates, sizes, settled)
    outcome = Outcome(
      clean_top1=top1,
      clean_top5=top5,
      robust_top1=fates.robust,
      robust_top5=fates.top5,
      clean_prediction=prediction,
      adversarial_prediction=fates.prediction,
      distance=fates.distance,
      outside=fates.outside,
      disputed=fates.disputed,
      stuck=fates.stuck,
      after=fates.after,
      counted=ensemble.counted_once(members, alive, fates),
    )
    return outcome, found

  return measure


def _clean(forwards: Forwards) -> Callable[..., tuple[Array, ...]]:
  def clean(variables, images, labels):
    _, judge = forwards(variables)
    logits = judge(as_floats(images))
    prediction = predict(logits, labels)
    return prediction, prediction == labels, in_top(logits, labels, 5)

  return clean


def _attempt(
  attack: ClassifierAttack, forwards: Forwards, mesh: Mesh
) -> Callable[..., Attempt]:
  """One turn of an attack as a program."""
  norm = BALLS[attack.norm].norm

  def part(variables, images, labels, rows, seed, name, turn):
    key = jax.random.fold_in(jax.random.key(seed), name)
    attacked, judge = forwards(variables)
    images = as_floats(images)
    keys = image_keys(key, rows)
    x, stuck = attack.run(attacked, images, labels, keys, turn)
    logits = judge(x)
    prediction = predict(logits, labels)
    disputed = jnp.zeros(labels.shape, bool)
    if attack.stops:
      ended = predict(attacked(x), labels) != labels
      disputed = ended & (prediction == labels)
    return Attempt(
      images=x,
      prediction=prediction,
      top5=in_top(logits, labels, 5),
      distance=norm(x - images),
      outside=jnp.maximum(-x, x - 1).max((1, 2, 3)),
      disputed=disputed,
      stuck=stuck,
    )

  every, split = PartitionSpec(), PartitionSpec('data')
  # No image sees another, so no device need wait for others in its loop.
  mapped = jax.shard_map(
    part,
    mesh=mesh,
    in_specs=(every, split, split, split, every, every, every),
    out_specs=split,
    check_vma=False,
  )
  # Every process sees all results, so that all take the same turns.
  everywhere = NamedSharding(mesh, PartitionSpec())
  return compiled.jit(mapped, out_shardings=everywhere)


def as_floats(images: Any) -> Any:
  """Images [N, H, W, C], uint8 or floats, as float32 in [0, 1]."""
  if images.dtype == np.uint8:
    return images.astype(np.float32) / np.float32(255)
  # Rounding may have moved them out a little.
  return images.astype(np.float32).clip(0, 1)
