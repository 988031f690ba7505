"""The training step and the loop round it, the same for every stage."""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax import lax
from jax.sharding import Mesh

from rocl_jax import (
  checkpoint,
  compiled,
  interruption,
  metrics,
  optim,
  processes,
  profile,
  results,
  stream,
)
from rocl_jax.data import Split
from rocl_jax.errors import RunFailed, UserError, shown
from rocl_jax.files import exists
from rocl_jax.interruption import Interrupted
from rocl_jax.mesh import replicated, split
from rocl_jax.progress import Progress, say
from rocl_jax.training import Training
from rocl_jax.types import (
  Batch,
  Skips,
  Stage,
  TrainingSet,
  TrainState,
  Variables,
)

Measure = Callable[[Variables], dict[str, float]]

SKIPPED = 'skipped.jsonl'  # the images of updates that were left out

# Which evaluation split selects a model, by the name of the selection.
SELECTIONS = {'best_validation': 'validation', 'best_test': 'test'}


class Seen(NamedTuple):
  """What the host sees of a step.

  Attributes:
    loss: the mean over the batch.
    skipped_in_row: see `types.Skips`.
  """

  loss: jax.Array
  skipped_in_row: jax.Array


def make_step(
  stage: Stage,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  microbatch: int = 0,
) -> Callable[..., tuple[TrainState, Seen]]:
  """One update: attack and loss are the stage's; this differentiates, applies.

  Args:
    stage: the four functions.
    optimizer: of `trainable`.
    mesh: the devices.
    microbatch: see `training.Training`.

  Returns:
    (state, data, order, key) -> (state, Seen), to be jitted with the state
    donated. `data` is the whole training set, or the step's own examples, and
    `order` [S, B] the epoch's indices; the step takes the row of its own
    number. Where loss, gradient or what comes of them is not finite the state
    stays, but for its counts.
  """

  def step(
    state: TrainState, data: TrainingSet, order: jax.Array, key: jax.Array
  ):
    steps_per_epoch = order.shape[0]
    index = state.step % steps_per_epoch
    key = jax.random.fold_in(key, state.step)
    trainable, frozen, batch_stats = state.trained
    # `gathered` and `spread` ask for it.
    known = lambda: jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    # Once a step: the attack reuses them, and so do all parts of the batch.
    with known(), jax.named_scope('weights'):
      params, to_trainable = jax.vjp(
        lambda trainable: stage.weights(trainable, frozen), trainable
      )

    def part(rows, key):
      with jax.named_scope('views'):
        batch = Batch(*(split(x, mesh) for x in data.rows(rows)))
      objective = lambda params: stage.loss(params, batch_stats, batch, key)
      with known(), jax.named_scope('learn'):
        return jax.value_and_grad(objective, has_aux=True)(params)

    (loss, (batch_stats, values)), grads = _mean_over_parts(
      part, data.numbers(order[index]), key, microbatch
    )
    (grads,) = to_trainable(grads)
    with jax.named_scope('update'):
      updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
      trainable = optax.apply_updates(trainable, updates)

    with jax.named_scope('checks'):
      norm = lax.platform_dependent(
        grads,
        cuda=lambda tree: jnp.linalg.norm(_entries(tree)),
        default=optax.tree.norm,
      )
      sound = lax.platform_dependent(
        (loss, norm, trainable, batch_stats),
        cuda=lambda tree: jnp.isfinite(_entries(tree)).all(),
        default=lambda tree: jnp.stack(
          [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
        ).all(),
      )
    trained = state.trained._replace(
      trainable=trainable, batch_stats=batch_stats
    )
    with jax.named_scope('update'):
      trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old),
        (trained, opt_state),
        (state.trained, state.opt_state),
      )
    values = values | {'loss': loss, 'grad_norm': norm}
    first = index == 0
    sums = {
      k: jnp.where(first, 0, state.sums.get(k, 0)) + jnp.where(sound, v, 0)
      for k, v in values.items()
    }
    skipped = jnp.where(first, False, state.skips.epoch).at[index].set(~sound)
    skips = Skips(skipped, jnp.where(sound, 0, state.skips.in_row + 1))
    new = TrainState(
      step=state.step + 1,
      trained=trained,
      opt_state=opt_state,
      sums=sums,
      skips=skips,
    )
    return new, Seen(loss, skips.in_row)

  return step


def _entries(tree):
  """All entries of a tree as one vector.

  A GPU sums it with two kernels, where it takes one or two for each array.
  Elsewhere arrays would be copied for nothing.
  """
  return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


def _mean_over_parts(part, rows, key, size):
  """part(rows, key), or the mean of it over parts of `size` rows each.

  All that it gives back is a mean over images, or linear in such.
  """
  if not size or size == len(rows):
    return part(rows, key)
  count = len(rows) // size
  rows = rows.reshape(count, size)
  keys = jax.random.split(key, count)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, rows[0], key)
  )

  def add(total, one):
    return jax.tree.map(jnp.add, total, part(*one)), None

  total, _ = lax.scan(add, zeros, (rows, keys))
  return jax.tree.map(lambda x: x / count, total)


def first_state(
  stage: Stage,
  optimizer: optax.GradientTransformation,
  step: Callable[..., tuple[TrainState, Seen]],
  arguments: tuple[Any, ...],
) -> Callable[[Variables, jax.Array], TrainState]:
  """What a stage starts from: (upstream variables, key) -> TrainState.

  `step` and its `arguments` after the state tell which metrics there will be,
  and how many steps an epoch has.
  """
  _, order, _ = arguments

  def first(upstream: Variables, key: jax.Array) -> TrainState:
    trained = stage.start(upstream, key)
    opt_state = optimizer.init(trained.trainable)
    state = TrainState(
      step=jnp.int32(0),
      trained=trained,
      opt_state=opt_state,
      sums={},
      skips=Skips(jnp.zeros(order.shape[0], bool), jnp.int32(0)),
    )
    stepped, _ = jax.eval_shape(step, state, *arguments)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stepped.sums)
    return dataclasses.replace(state, sums=zeros)

  return first


def stage_key(seed: int, name: str) -> jax.Array:
  """The key of a stage: a function of the run's seed and the stage's name."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def epoch_order(
  key: jax.Array, epoch: jax.Array, n: int, batch_size: int
) -> jax.Array:
  """The indices of an epoch, int32 [n // batch_size, batch_size].

  A function of key and epoch alone. The last partial batch is dropped, where
  the published code trains on it.
  """
  order = jax.random.permutation(jax.random.fold_in(key, epoch), n)
  steps = n // batch_size
  return order[: steps * batch_size].reshape(steps, batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRun:
  """All that running one stage takes.

  Attributes:
    name: of the stage.
    label: of the run and stage, for messages.
    stage: the four functions.
    settings: the stage's section.
    upstream: what the stage before handed on.
    train: the training images.
    seed: of the run.
    mesh: the devices.
    directory: where the stage keeps its files.
    measure: variables -> {'validation_robust_top1': ...}, or None where the
      stage has no classifier.
    about: JSON that goes with every model of this stage.
    save_steps: steps between saves; at most this many are lost.
    max_skipped: steps in a row whose loss or gradient may be other than finite.
    tensorboard: whether to write scalars for it, too.
    resident: whether the training set lies on the devices, or is streamed.
    profile: steps to trace, see `profile`.
  """

  name: str
  label: str
  stage: Stage
  settings: Training
  upstream: Variables
  train: Split
  seed: int
  mesh: Mesh
  directory: epath.Path
  measure: Measure | None
  about: dict[str, Any]
  save_steps: int
  max_skipped: int
  tensorboard: bool
  resident: bool = True
  profile: int = 0


def state_form(run: StageRun) -> TrainState:
  """The shapes of a stage's state; `upstream` may be shapes, too."""
  size = run.settings.batch_size
  steps = len(run.train.labels) // size
  optimizer, _ = optim.make(
    run.settings.optimizer,
    run.settings.total_epochs,
    steps,
    run.settings.segments,
  )
  step = make_step(run.stage, optimizer, run.mesh, run.settings.microbatch)
  images, labels = run.train
  data = TrainingSet(
    jax.ShapeDtypeStruct((len(images), images[0].size), images.dtype),
    jax.ShapeDtypeStruct(labels.shape, labels.dtype),
    images.shape[1:],
  )
  order = jax.ShapeDtypeStruct((steps, size), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  first = first_state(run.stage, optimizer, step, (data, order, key))
  return jax.eval_shape(first, run.upstream, key)


def run_stage(run: StageRun) -> Variables:
  """Trains a stage from its last save, or from the start; saves its models.

  Returns:
    The variables of the last epoch, which the next stage starts from. They
    are on disk too, in `model/`, and the selected ones in `best_validation/`
    and `best_test/`.

  Raises:
    RunFailed: the loss is no longer finite, or a save could not be written.
    Interrupted: the process was asked to stop; what was done is saved.
  """
  epochs, batch_size = run.settings.total_epochs, run.settings.batch_size
  n = len(run.train.labels)
  steps = n // batch_size
  total = epochs * steps
  optimizer, rate = optim.make(
    run.settings.optimizer, epochs, steps, run.settings.segments
  )
  everywhere = replicated(run.mesh)
  start_key, order_key, step_key = jax.jit(
    lambda: tuple(jax.random.split(stage_key(run.seed, run.name), 3)),
    out_shardings=everywhere,
  )()
  data, feed = stream.make(run.train, batch_size, run.mesh, run.resident)
  order_of = jax.jit(
    lambda key, epoch: epoch_order(key, epoch, n, batch_size),
    out_shardings=everywhere,
  )
  step = make_step(run.stage, optimizer, run.mesh, run.settings.microbatch)
  step = jax.named_scope(run.name)(step)
  train_step = compiled.jit(step, donate_argnums=0, out_shardings=everywhere)
  finish = jax.jit(
    lambda state: run.stage.finish(state.trained), out_shardings=everywhere
  )

  order = jax.ShapeDtypeStruct((steps, batch_size), jnp.int32)
  first = first_state(run.stage, optimizer, step, (data, order, step_key))
  # Jitted, so that the state owns its arrays: the step donates them.
  state = jax.jit(first, out_shardings=everywhere)(run.upstream, start_key)
  with (
    checkpoint.States(run.directory / 'checkpoints') as states,
    profile.traced(
      train_step, run.profile, run.directory / 'profile', run.label
    ) as train_step,
  ):
    state, rows = states.restore(like=state) or (state, [])
    done = int(state.step)
    if done > total:
      raise UserError(f'{run.label}: {too_far(run.directory, done, total)}')
    _forget_skips(run, done)
    if done:
      say(f'{run.label}: resumed at step {done} of {total}')
    book = _Book(run, rows)
    progress = Progress(run.label, total, batch_size)
    if done < total:
      say(f'{run.label}: compiling')
    compiling_since: float | None = time.monotonic()
    try:
      # A state may stand at the end of an epoch that has no row yet.
      for epoch in range(len(rows), epochs):
        began, began_at = time.monotonic(), done
        order = order_of(order_key, epoch)
        batches = feed(order, done - epoch * steps)
        seen: Seen | None = None
        while done < (epoch + 1) * steps:
          previous = seen
          state, seen = train_step(state, next(batches), order, step_key)
          done += 1
          if compiling_since is not None:
            seen.loss.block_until_ready()
            took = time.monotonic() - compiling_since
            say(f'{run.label}: first step after {took:.1f} s')
            compiling_since = None
          if previous is not None:  # so that no more than one step is queued
            _check_skips(run, states, previous, state, order)
          progress.show(done, f'epoch {epoch + 1}/{epochs}')
          if done % run.save_steps == 0:
            states.save(done, state, rows)
          interruption.check()
        if seen is not None:
          _check_skips(run, states, seen, state, order)
        row: metrics.Row = {'epoch': epoch + 1, 'step': done}
        row |= _means(run, state, order)
        row['learning_rate'] = float(rate(done - 1))
        seconds = time.monotonic() - began
        row['seconds'] = round(seconds, 3)
        speed = (done - began_at) * batch_size / seconds
        row['images_per_second'] = round(speed, 1)
        book.write(row, functools.partial(finish, state))
    except Interrupted:
      jax.block_until_ready(state)  # others need this process for it
      states.save(done, state, rows)
      states.wait()
      say(f'{run.label}: saved at step {done} of {total}')
      raise
    states.save(done, state, rows)
  variables = jax.device_get(finish(state))
  _publish(run, variables, 'last', epochs, run.directory / 'model')
  return variables


def too_far(directory: epath.Path, done: int, total: int) -> str:
  """That a stage has done more steps than it is to do."""
  return (
    f'{shown(directory)} has done {done} steps, and the config asks for '
    f'{total} in all'
  )


def _check_skips(
  run: StageRun,
  states: checkpoint.States,
  seen: Seen,
  state: TrainState,
  order: jax.Array,
) -> None:
  """Ends a run whose loss has stayed other than finite for too long."""
  in_row = int(seen.skipped_in_row)
  if in_row > run.max_skipped:
    _record_skips(run, state, order)
    states.wait()
    newest = checkpoint.steps(run.directory / 'checkpoints')[-1:]
    save = (
      f'the save of step {newest[0]} is intact' if newest else 'no save yet'
    )
    raise RunFailed(
      f'{run.label}: loss or gradient was not finite in {in_row} steps in a '
      f'row, about step {int(state.step)} (config.max_skipped is '
      f'{run.max_skipped}); {save}; their images: '
      f'{shown(run.directory / SKIPPED)}'
    )


def _means(
  run: StageRun, state: TrainState, order: jax.Array
) -> dict[str, float]:
  """The metrics of an epoch, over the steps that counted."""
  skipped = int(state.skips.epoch.sum())
  if skipped:
    _record_skips(run, state, order)
    say(f'{run.label}: {skipped} updates were skipped: not finite')
  counted = order.shape[0] - skipped
  if not counted:
    raise RunFailed(
      f'{run.label}: no step of the epoch up to step {int(state.step)} had a '
      'finite loss and gradient'
    )
  means = {k: float(v) / counted for k, v in sorted(state.sums.items())}
  return means | {'skipped': skipped}


def _forget_skips(run: StageRun, done: int) -> None:
  """Leaves out what steps that are done again have written."""
  path = run.directory / SKIPPED
  if processes.is_first() and exists(path):
    metrics.write(
      path, [r for r in metrics.read_lines(path) if r['step'] <= done]
    )


def _record_skips(run: StageRun, state: TrainState, order: jax.Array) -> None:
  """Writes which images were in the steps that this epoch skipped."""
  if not processes.is_first():
    return
  path, steps = run.directory / SKIPPED, order.shape[0]
  epoch = (int(state.step) - 1) // steps
  rows = [r for r in metrics.read_lines(path) if r['epoch'] <= epoch]
  rows += [
    {
      'epoch': epoch + 1,
      'step': epoch * steps + int(i) + 1,
      'images': np.asarray(order[i]).tolist(),
    }
    for i in np.flatnonzero(state.skips.epoch)
  ]
  metrics.write(path, rows)


class _Book:
  """The metrics of a stage so far, and the models that they select.

  Args:
    run: the stage's.
    rows: those of the epochs so far; the list grows.
  """

  def __init__(self, run: StageRun, rows: list[metrics.Row]):
    self._run, self._path = run, run.directory / 'metrics.jsonl'
    self._rows = rows
    self._tensorboard = None
    if run.tensorboard and processes.is_first():
      self._tensorboard = metrics.tensorboard(run.directory / 'tensorboard')

  def write(self, row: metrics.Row, variables: Callable[[], Variables]) -> None:
    """Evaluates if it is time to, saves what is best so far, adds the row."""
    run, epoch = self._run, row['epoch']
    every, last = run.settings.eval_epochs, run.settings.total_epochs
    due = every and (epoch % every == 0 or epoch == last)
    if due and run.measure is not None:
      current = variables()
      row |= run.measure(current)
      for selection, split_name in SELECTIONS.items():
        criterion = f'{split_name}_robust_top1'
        if metrics.is_best([*self._rows, row], criterion):
          folder = run.directory / selection
          _publish(run, jax.device_get(current), selection, epoch, folder)
    self._rows.append(row)
    if processes.is_first():
      metrics.write(self._path, self._rows)
    if self._tensorboard is not None:
      self._tensorboard(row['step'], row)
    say(_line(run, row))


def _publish(run, variables, selection, epoch, directory):
  if not processes.is_first():
    return
  about = run.about | {'selection': selection, 'epoch': epoch}
  about |= results.identity(variables)
  checkpoint.save_model(directory, variables, about)


def _line(run, row):
  """One line on an epoch: what a person watches."""
  shown = [f'loss {row["loss"]:.3f}']
  for name in ('validation', 'test'):
    accuracies = [row.get(f'{name}_{k}_top1') for k in ('clean', 'robust')]
    if None not in accuracies:
      clean, robust = accuracies
      shown.append(f'{name} {clean:.1f} clean, {robust:.1f} robust')
      break
  rate = f'{row["images_per_second"]:,.0f} images/s'
  epochs = f'{row["epoch"]}/{run.settings.total_epochs}'
  return f'{run.label}  epoch {epochs}  {"  ".join(shown)}  {rate}'
