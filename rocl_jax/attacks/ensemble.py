"""Attacks one after another, each on the images that withstood those before.

  members = (('apgd-ce', apgd(eps=8 / 255)), ('square', square(eps=8 / 255)))
  fates = begin(alive, prediction, top5)
  fates = run(members, attempt, labels, fates, sizes=(64, 128))

Between turns the survivors are gathered into full batches, so the cost falls
as images break. All that a run knows is in `Fates`: one that is saved and read
again goes on to the same end, batch by batch. This file is the order of
things, in NumPy; `robustness` has the programs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rocl_jax.attacks.classifier import ClassifierAttack

Member = tuple[str, ClassifierAttack]


class Attempt(NamedTuple):
  """What one turn of an attack did to each image of a batch.

  Attributes:
    images: the adversarial images [N, H, W, C].
    prediction: their classes, `logits.INVALID` for invalid logits [N].
    top5: whether the label is among their first five [N].
    distance: norm of the displacement [N].
    outside: how far a pixel lies outside of [0, 1], or NaN [N].
    disputed: whether the network that was attacked takes it for another class,
      but the one that judges does not [N].
    stuck: gradient entries that were not finite, int32 [N].
  """

  images: Any
  prediction: Any
  top5: Any
  distance: Any
  outside: Any
  disputed: Any
  stuck: Any


class Fates(NamedTuple):
  """What has become of n images so far, as NumPy arrays.

  Attributes:
    robust: whether an image has withstood everything up to here [n].
    prediction, top5, distance, outside, disputed: see Attempt; of the image
      that broke it, or else of the last that was tried [n].
    stuck: see Attempt; over all turns [n].
    tries: how often each image was attacked [n].
    broke: the turn that broke it, or found invalid logits; -1 for none [n].
    after: robust images at the end of each finished member.
    turn: the number of the current turn, over all members.
    waiting: the images of this turn, in its order.
    done: how many of those are done.
  """

  robust: np.ndarray
  prediction: np.ndarray
  top5: np.ndarray
  distance: np.ndarray
  outside: np.ndarray
  disputed: np.ndarray
  stuck: np.ndarray
  tries: np.ndarray
  broke: np.ndarray
  after: np.ndarray
  turn: np.ndarray
  waiting: np.ndarray
  done: np.ndarray


def begin(alive: np.ndarray, prediction: np.ndarray, top5: np.ndarray) -> Fates:
  """Before the first turn: which images take part, and their clean classes."""
  nothing = np.zeros(len(alive), np.float32)
  return Fates(
    robust=np.array(alive, bool),
    prediction=np.array(prediction, np.int32),
    top5=np.array(top5, bool),
    distance=nothing,
    outside=nothing.copy(),
    disputed=np.zeros(len(alive), bool),
    stuck=np.zeros(len(alive), np.int32),
    tries=np.zeros(len(alive), np.int32),
    broke=np.full(len(alive), -1, np.int32),
    after=np.zeros(0, np.int64),
    turn=np.array(0),
    waiting=np.flatnonzero(alive),
    done=np.array(0),
  )


def run(
  members: Sequence[Member],
  attempt: Callable[[int, int, np.ndarray, int], Attempt],
  labels: np.ndarray,
  fates: Fates,
  sizes: Sequence[int],
  settled: Callable[[Fates, np.ndarray, Attempt], None] = lambda *_: None,
) -> Fates:
  """Runs all turns that are left.

  Args:
    members: names and attacks, in order.
    attempt: (member, turn of it, rows, size) -> Attempt, of which the first
      len(rows) entries count. It may return before the device is done.
    labels: int [n].
    fates: from `begin`, or from an earlier, interrupted run.
    sizes: batch sizes; the largest is filled first, and the rest goes into the
      smallest that holds it.
    settled: called with the new state after each batch, the rows it was about
      and what happened to them.

  Returns:
    The state after the last turn.
  """
  turns = [(m, t) for m, (_, a) in enumerate(members) for t in range(a.turns)]
  while int(fates.turn) < len(turns):
    member, turn = turns[int(fates.turn)]
    queue: list[tuple[np.ndarray, Attempt]] = []
    for rows, size in _batches(fates, sizes):
      queue.append((rows, attempt(member, turn, rows, size)))
      if len(queue) > 2:  # the device has work while the host looks
        fates = _settle(fates, labels, *queue.pop(0), settled)
    for rows, attempted in queue:
      fates = _settle(fates, labels, rows, attempted, settled)
    after = fates.after
    if turn == members[member][1].turns - 1:
      after = np.append(after, fates.robust.sum())
    fates = fates._replace(
      after=after,
      turn=fates.turn + 1,
      waiting=np.flatnonzero(fates.robust),
      done=np.array(0),
    )
  return fates


def _batches(fates, sizes) -> Iterator[tuple[np.ndarray, int]]:
  rest = fates.waiting[int(fates.done) :]
  while len(rest):
    size = min((s for s in sizes if s >= len(rest)), default=max(sizes))
    yield rest[:size], size
    rest = rest[size:]


def _settle(fates, labels, rows, attempted, settled):
  seen = Attempt(*(np.asarray(x)[: len(rows)] for x in attempted))
  changed = {}
  for field in ('prediction', 'top5', 'distance', 'outside', 'disputed'):
    new = getattr(fates, field).copy()
    new[rows] = getattr(seen, field)
    changed[field] = new
  robust, tries, broke, stuck = (
    x.copy() for x in (fates.robust, fates.tries, fates.broke, fates.stuck)
  )
  right = seen.prediction == labels[rows]
  robust[rows] = right
  broke[rows[~right]] = fates.turn
  np.add.at(tries, rows, 1)
  np.add.at(stuck, rows, seen.stuck.astype(np.int32))
  fates = fates._replace(
    robust=robust,
    tries=tries,
    broke=broke,
    stuck=stuck,
    done=fates.done + len(rows),
    **changed,
  )
  settled(fates, rows, seen)
  return fates


def counted_once(members: Sequence[Member], alive: Any, fates: Fates) -> int:
  """How many of the images were attacked as often as their fate says.

  That is in every turn up to the one that broke them; never, if they took no
  part.
  """
  turns = sum(attack.turns for _, attack in members)
  wanted = np.where(fates.robust, turns, fates.broke + 1)
  return int((fates.tries == np.where(alive, wanted, 0)).sum())


def passes_left(members: Sequence[Member], fates: Fates) -> int:
  """Forward passes until the end if no further image breaks."""
  costs = [a.passes for _, a in members for _ in range(a.turns)]
  now = int(fates.turn)
  if now >= len(costs):
    return 0
  this = (len(fates.waiting) - int(fates.done)) * costs[now]
  return this + int(fates.robust.sum()) * sum(costs[now + 1 :])


def batch_sizes(batch_size: int, n: int, devices: int) -> tuple[int, ...]:
  """The shapes that programs are compiled for: a batch, and its eighths.

  Few are needed, and only those are compiled. All divide by the number of
  devices, and none is larger than n images need.
  """
  whole = lambda n: -(-n // devices) * devices
  full = whole(min(batch_size, n))
  return tuple(sorted({whole(-(-full * part // 8)) for part in range(1, 9)}))


def filled(rows: np.ndarray, size: int) -> np.ndarray:
  """The rows, and the last of them again until the batch is full."""
  return np.pad(rows, (0, size - len(rows)), mode='edge')
