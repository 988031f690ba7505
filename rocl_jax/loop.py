"""The training step and the loop round it, the same for every stage."""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from rocl_jax import checkpoint, compiled, metrics, optim, results
from rocl_jax.data import Split
from rocl_jax.errors import RunFailed
from rocl_jax.mesh import replicated, split
from rocl_jax.progress import Progress, say
from rocl_jax.training import Training
from rocl_jax.types import Batch, Stage, TrainState, Variables

Measure = Callable[[Variables], dict[str, float]]

# Which evaluation split selects a model, by the name of the selection.
SELECTIONS = {'best_validation': 'validation', 'best_test': 'test'}


def make_step(
  stage: Stage, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[..., tuple[TrainState, jax.Array]]:
  """One update: attack and loss are the stage's; this differentiates, applies.

  Returns:
    (state, data, order, key) -> (state, loss), to be jitted with the state
    donated. `data` is the whole training set, `order` [S, B] the epoch's
    indices; the step takes the row of its own number.
  """

  def step(state: TrainState, data: Batch, order: jax.Array, key: jax.Array):
    steps_per_epoch = order.shape[0]
    index = state.step % steps_per_epoch
    rows = order[index]
    batch = Batch(*(split(x[rows], mesh) for x in data))
    key = jax.random.fold_in(key, state.step)
    trainable, frozen, batch_stats = state.trained

    def objective(trainable):
      params = stage.weights(trainable, frozen)  # once: the attack reuses it
      return stage.loss(params, batch_stats, batch, key)

    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    (loss, (batch_stats, values)), grads = value_and_grad(trainable)
    updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)

    values = values | {'loss': loss, 'grad_norm': optax.tree.norm(grads)}
    first = index == 0
    sums = {
      k: jnp.where(first, 0, state.sums.get(k, 0)) + v
      for k, v in values.items()
    }
    new = TrainState(
      step=state.step + 1,
      trained=state.trained._replace(
        trainable=trainable, batch_stats=batch_stats
      ),
      opt_state=opt_state,
      sums=sums,
    )
    return new, loss

  return step


def first_state(
  stage: Stage,
  optimizer: optax.GradientTransformation,
  step: Callable[..., tuple[TrainState, jax.Array]],
  arguments: tuple[Any, ...],
) -> Callable[[Variables, jax.Array], TrainState]:
  """What a stage starts from: (upstream variables, key) -> TrainState.

  `step` and its `arguments` after the state tell which metrics there will be.
  """

  def first(upstream: Variables, key: jax.Array) -> TrainState:
    trained = stage.start(upstream, key)
    opt_state = optimizer.init(trained.trainable)
    state = TrainState(
      step=jnp.int32(0), trained=trained, opt_state=opt_state, sums={}
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
    tensorboard: whether to write scalars for it, too.
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
  tensorboard: bool


def run_stage(run: StageRun) -> Variables:
  """Trains a stage from its last save, or from the start; saves its models.

  Returns:
    The variables of the last epoch, which the next stage starts from. They
    are on disk too, in `model/`, and the selected ones in `best_validation/`
    and `best_test/`.

  Raises:
    RunFailed: the loss is no longer finite.
  """
  epochs, batch_size = run.settings.total_epochs, run.settings.batch_size
  n = len(run.train.labels)
  steps = n // batch_size
  total = epochs * steps
  optimizer, rate = optim.make(
    run.settings.optimizer, epochs, steps, run.settings.segments
  )
  start_key, order_key, step_key = jax.random.split(
    stage_key(run.seed, run.name), 3
  )
  everywhere = replicated(run.mesh)
  data = jax.device_put(Batch(*run.train), everywhere)
  order_of = jax.jit(
    lambda epoch: epoch_order(order_key, epoch, n, batch_size),
    out_shardings=everywhere,
  )
  step = make_step(run.stage, optimizer, run.mesh)
  train_step = compiled.jit(step, donate_argnums=0)
  finish = jax.jit(lambda state: run.stage.finish(state.trained))

  order = jax.ShapeDtypeStruct((steps, batch_size), jnp.int32)
  first = first_state(run.stage, optimizer, step, (data, order, step_key))
  # Jitted, so that the state owns its arrays: the step donates them.
  state = jax.jit(first, out_shardings=everywhere)(run.upstream, start_key)
  with checkpoint.open_states(run.directory / 'checkpoints') as manager:
    state = checkpoint.restore_state(manager, like=state) or state
    done = int(state.step)
    if done:
      say(f'{run.label}: resumed at step {done} of {total}')
    book = _Book(run, done // steps)
    progress = Progress(run.label, total, batch_size)
    if done < total:
      say(f'{run.label}: compiling')
    compiling_since: float | None = time.monotonic()
    for epoch in range(done // steps, epochs):
      began, began_at = time.monotonic(), done
      order = order_of(epoch)
      loss: jax.Array | None = None
      while done < (epoch + 1) * steps:
        previous = loss
        state, loss = train_step(state, data, order, step_key)
        done += 1
        if compiling_since is not None:
          loss.block_until_ready()
          took = time.monotonic() - compiling_since
          say(f'{run.label}: first step after {took:.1f} s')
          compiling_since = None
        if previous is not None:  # so that no more than one step is queued
          previous.block_until_ready()
        progress.show(done, f'epoch {epoch + 1}/{epochs}')
        if done % run.save_steps == 0 and done % steps:
          _check_finite(run, state, manager)
          checkpoint.save_state(manager, done, state)
      row: metrics.Row = {'epoch': epoch + 1, 'step': done}
      row |= {k: float(v) / steps for k, v in sorted(state.sums.items())}
      row['learning_rate'] = float(rate(done - 1))
      seconds = time.monotonic() - began
      row['seconds'] = round(seconds, 3)
      speed = (done - began_at) * batch_size / seconds
      row['images_per_second'] = round(speed, 1)
      _check_finite(run, state, manager)
      book.write(row, functools.partial(finish, state))
      # After the row: a save promises that the rows up to it are there.
      if done % run.save_steps == 0 and done < total:
        checkpoint.save_state(manager, done, state)
    checkpoint.save_state(manager, done, state)
  variables = jax.device_get(finish(state))
  _publish(run, variables, 'last', epochs, run.directory / 'model')
  return variables


def _check_finite(run, state, manager):
  """Before every save: no step of this epoch was other than finite."""
  for name in ('loss', 'grad_norm'):
    if not np.isfinite(state.sums[name]):
      raise RunFailed(
        f'{run.label}: the {name} is not finite before step {state.step}; the '
        f'last save, of step {manager.latest_step()}, is intact'
      )


class _Book:
  """The metrics of a stage so far, and the models that they select."""

  def __init__(self, run: StageRun, last_epoch: int):
    self._run, self._path = run, run.directory / 'metrics.jsonl'
    self._rows = metrics.read(self._path, last_epoch)
    self._tensorboard = None
    if run.tensorboard:
      self._tensorboard = metrics.tensorboard(run.directory / 'tensorboard')

  def write(self, row: metrics.Row, variables: Callable[[], Variables]) -> None:
    """Evaluates if it is time to, saves what is best so far, adds the row."""
    run, epoch = self._run, row['epoch']
    every, last = run.settings.eval_epochs, run.settings.total_epochs
    due = every and (epoch % every == 0 or epoch == last)
    self._rows.append(row)
    if due and run.measure is not None:
      current = variables()
      row |= run.measure(current)
      for selection, split_name in SELECTIONS.items():
        criterion = f'{split_name}_robust_top1'
        if criterion in row and metrics.is_best(self._rows, criterion):
          folder = run.directory / selection
          _publish(run, jax.device_get(current), selection, epoch, folder)
    metrics.write(self._path, self._rows)
    if self._tensorboard is not None:
      self._tensorboard(row['step'], row)
    say(_line(run, row))


def _publish(run, variables, selection, epoch, directory):
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
