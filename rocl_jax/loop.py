"""The training step and the loop round it, the same for every stage."""

import dataclasses
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

    values = values | {'loss': loss, 'grad_norm': optax.global_norm(grads)}
    first = index == 0
    sums = {
      k: jnp.where(first, 0, state.sums[k]) + v if state.sums else v
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
  settings, stage = run.settings, run.stage
  n, batch_size = len(run.train.labels), settings.batch_size
  steps_per_epoch = n // batch_size
  total = settings.total_epochs * steps_per_epoch
  optimizer, rate = optim.make(
    settings.optimizer,
    settings.total_epochs,
    steps_per_epoch,
    settings.segments,
  )
  everywhere = replicated(run.mesh)
  start_key, order_key, step_key = jax.random.split(
    stage_key(run.seed, run.name), 3
  )
  data = jax.device_put(Batch(*run.train), everywhere)
  one_step = make_step(stage, optimizer, run.mesh)
  order_of = jax.jit(
    lambda epoch: epoch_order(order_key, epoch, n, batch_size),
    out_shardings=everywhere,
  )

  def first_state(upstream):
    trained = stage.start(upstream, start_key)
    return TrainState(
      step=jnp.int32(0),
      trained=trained,
      opt_state=optimizer.init(trained.trainable),
      sums={},
    )

  def with_sums(state):
    """Gives the fresh state the zero sums that its structure needs."""
    if not total:
      return state
    shaped, _ = jax.eval_shape(one_step, state, data, order_of(0), step_key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shaped.sums)
    return dataclasses.replace(state, sums=zeros)

  # Jitted, so that the state owns its arrays: the step donates them.
  state = with_sums(
    jax.jit(first_state, out_shardings=everywhere)(run.upstream)
  )
  state = jax.device_put(state, everywhere)
  finish = jax.jit(lambda state: stage.finish(state.trained))
  manager = checkpoint.open_states(run.directory / 'checkpoints')
  restored = checkpoint.restore_state(manager, state)
  if restored is not None:
    state = restored
    say(f'{run.label}: resumed at step {int(state.step)} of {total}')

  train_step = compiled.jit(one_step, donate_argnums=0)
  done = int(state.step)
  epoch = done // max(steps_per_epoch, 1)
  rows_path = run.directory / 'metrics.jsonl'
  rows = metrics.read(rows_path, last_epoch=epoch)
  log = None
  if run.tensorboard:
    log = metrics.tensorboard(run.directory / 'tensorboard')
  progress = Progress(run.label, total, batch_size, done)

  while done < total:
    order = order_of(epoch)
    began, began_at = time.monotonic(), done
    loss: jax.Array | None = None
    while done < (epoch + 1) * steps_per_epoch:
      previous = loss
      state, loss = train_step(state, data, order, step_key)
      done += 1
      if previous is not None:  # one step in flight, while this one is queued
        previous.block_until_ready()
      progress.show(done, f'epoch {epoch + 1}/{settings.total_epochs}')
      if done % run.save_steps == 0 and done % steps_per_epoch:
        checkpoint.save_state(manager, done, state)
    epoch += 1
    row = {k: float(v) / steps_per_epoch for k, v in state.sums.items()}
    seconds = time.monotonic() - began
    row = {'epoch': epoch, 'step': done} | dict(sorted(row.items()))
    row['learning_rate'] = float(rate(done - 1))
    row['seconds'] = round(seconds, 3)
    row['images_per_second'] = round(
      (done - began_at) * batch_size / seconds, 1
    )
    if not np.isfinite(row['loss']):
      raise RunFailed(
        f'{run.label}: the loss is {row["loss"]} in epoch {epoch}; the last '
        f'save, of step {manager.latest_step()}, is intact'
      )
    due = settings.eval_epochs and (
      epoch % settings.eval_epochs == 0 or epoch == settings.total_epochs
    )
    if due and run.measure is not None:
      variables = finish(state)
      row |= run.measure(variables)
      rows.append(row)
      for selection, name in SELECTIONS.items():
        criterion = f'{name}_robust_top1'
        if criterion in row and metrics.is_best(rows, criterion):
          _publish(run, variables, selection, epoch, run.directory / selection)
    else:
      rows.append(row)
    metrics.write(rows_path, rows)
    if log is not None:
      log(done, row)
    say(_line(run, row))
    if done % run.save_steps == 0 or done == total:
      checkpoint.save_state(manager, done, state)

  if not total:
    checkpoint.save_state(manager, 0, state)
  manager.wait_until_finished()
  manager.close()
  variables = finish(state)
  _publish(run, variables, 'last', epoch, run.directory / 'model')
  return variables


def _publish(run, variables, selection, epoch, directory):
  variables = jax.device_get(variables)
  about = run.about | {
    'selection': selection,
    'epoch': epoch,
    'layers': results.layers(variables),
    'sparsity': results.sparsity(variables) if 'masks' in variables else 0.0,
  }
  checkpoint.save_model(directory, variables, about)


def _line(run, row):
  """One line on an epoch: what a person watches."""
  shown = [f'loss {row["loss"]:.3f}']
  for split_name in ('validation', 'test'):
    if f'{split_name}_robust_top1' in row:
      clean = row[f'{split_name}_clean_top1']
      robust = row[f'{split_name}_robust_top1']
      shown.append(f'{split_name} {clean:.1f}/{robust:.1f}')
      break
  rate = f'{row["images_per_second"]:,.0f} images/s'
  epochs = f'{row["epoch"]}/{run.settings.total_epochs}'
  return f'{run.label}  epoch {epochs}  {"  ".join(shown)}  {rate}'
