"""The programs that are measured, compiled for one cell of the grid.

The training steps are those of `loop.make_step` with the recipe's own stages,
data on the device and state donated: what a run executes.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rocl_jax import (
  compiled,
  convolution,
  hlo,
  loop,
  losses,
  masks,
  mesh,
  models,
  optim,
)
from rocl_jax.attacks import pgd
from rocl_jax.benchmark import work
from rocl_jax.benchmark.timing import Job
from rocl_jax.models import Model, Variables
from rocl_jax.stages import STAGES
from rocl_jax.stages.supervised import Settings as Supervised
from rocl_jax.training import Training
from rocl_jax.trees import flatten
from rocl_jax.types import TrainingSet

T = TypeVar('T', bound=Training)

# Names of the programs, in tables and in comparisons.
PGD, NAIVE = 'PGD', 'PGD, naive fori_loop'
INSTANCE = 'instance-wise attack'
TRADES, ROCL, PLAIN = 'TRADES step', 'RoCL step', 'plain step'
MASKS = 'HYDRA masks'


class Cell(NamedTuple):
  """One point of the grid.

  Attributes:
    model: architecture, width, dtype.
    batch: images in a step, over all devices.
    steps: of every attack.
    image_size: height and width.
    num_classes: of the head.
  """

  model: models.Settings
  batch: int
  steps: int
  image_size: int
  num_classes: int

  @property
  def name(self) -> str:
    m = self.model
    return (
      f'{m.name}, width {m.width}, batch {self.batch}, {m.dtype}, '
      f'{self.steps} attack steps'
    )


class Compiled(NamedTuple):
  """A program that is ready to run.

  Attributes:
    job: executes it.
    compile_seconds: tracing and compiling, without a cache of programs.
    memory: bytes that a run holds at most, arguments and results included.
    program: what it does.
    work: FLOPs an image that it needs, by hand count.
    attack_steps: attack steps in a run if it is nothing but an attack, else 0.
  """

  job: Job
  compile_seconds: float
  memory: int
  program: hlo.Program
  work: int
  attack_steps: int

  def run(self) -> Any:
    """Executes it once, and waits."""
    return self.job.run()


def _compile(jitted, arguments, work_per_image, attack_steps=0, carry=False):
  """Compiles ahead of time. With `carry` the first argument is donated and the
  first result takes its place."""
  start = time.perf_counter()
  program = jitted.lower(*arguments).compile()
  seconds = time.perf_counter() - start
  memory = program.memory_analysis()
  held = list(arguments)

  def dispatch():
    result = program(*held)
    if carry:
      held[0] = result[0]
    return result

  return Compiled(
    job=Job(dispatch),
    compile_seconds=seconds,
    memory=(
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes
    ),
    program=hlo.parse(program.as_text()),
    work=work_per_image,
    attack_steps=attack_steps,
  )


class Bench(NamedTuple):
  """A cell's network and random images, and its devices."""

  cell: Cell
  mesh: Mesh
  network: Model
  variables: Variables
  images: jax.Array
  second: jax.Array
  labels: jax.Array


def bench(cell: Cell, devices: Sequence[jax.Device] | None = None) -> Bench:
  """Lays out what all programs of a cell work on."""
  where = Mesh(np.array(devices or jax.devices()), ('data',))
  network = models.build(cell.model, cell.num_classes)
  shape = (cell.image_size, cell.image_size, 3)
  variables = jax.jit(lambda: network.init(jax.random.key(0), shape))()
  random = np.random.default_rng(0)
  draw = lambda: random.random((cell.batch, *shape), np.float32)
  labels = random.integers(0, cell.num_classes, cell.batch).astype(np.int32)
  batches = NamedSharding(where, PartitionSpec('data'))
  images, second, labels = jax.device_put((draw(), draw(), labels), batches)
  variables = jax.device_put(variables, mesh.replicated(where))
  return Bench(cell, where, network, variables, images, second, labels)


def pgd_attack(bench: Bench, eps: float) -> Compiled:
  """PGD on the cross-entropy, as evaluation and `ce_pgd` run it."""

  def attack(variables, images, labels, key):
    frozen = bench.network.prepare(variables)
    objective = lambda x: losses.cross_entropy(frozen(x), labels)
    return pgd(objective, images, key, **_linf(bench, eps))

  return _attack(compiled.jit(attack), bench)


def naive_pgd_attack(bench: Bench, eps: float) -> Compiled:
  """The same attack as one writes it first: the network in a `fori_loop`."""
  cell = bench.cell
  network = models.build(cell.model, cell.num_classes, convolution.plain_conv)

  def attack(variables, images, labels, key):
    predict = lambda x: network.predict(variables, x)
    objective = lambda x: losses.cross_entropy(predict(x), labels)
    return pgd(objective, images, key, **_linf(bench, eps))

  return _attack(jax.jit(attack), bench)


def _attack(jitted, bench):
  count = _forward(bench)
  arguments = (
    bench.variables,
    bench.images,
    bench.labels,
    jax.random.key(0),
  )
  steps = bench.cell.steps
  needed = work.attack(count.encoder + count.head, steps)
  return _compile(jitted, arguments, needed, steps)


def instance_attack(bench: Bench, eps: float, temperature: float) -> Compiled:
  """RoCL's attack of one view against the other."""

  def attack(variables, images, second, key):
    frozen = bench.network.prepare(variables)
    target = frozen(second, 'projection')
    objective = lambda x: losses.nt_xent(
      [frozen(x, 'projection'), target], temperature
    )
    return pgd(
      objective, images, key, start='uniform_clipped', **_linf(bench, eps)
    )

  count = _forward(bench)
  network = count.encoder + count.projector
  steps = bench.cell.steps
  arguments = (bench.variables, bench.images, bench.second, jax.random.key(0))
  needed = network + work.attack(network, steps)
  return _compile(compiled.jit(attack), arguments, needed, steps)


def _linf(bench, eps):
  return {'eps': eps, 'step_size': eps / 4, 'steps': bench.cell.steps}


def _forward(bench):
  cell = bench.cell
  return work.forward(cell.model, cell.image_size, cell.num_classes)


def training_step(bench: Bench, stage: str, settings: Training) -> Compiled:
  """One step of a stage, on images that lie on the device."""
  cell = bench.cell
  built = STAGES[stage].stage(bench.network, settings)
  optimizer, _ = optim.make(settings.optimizer, 1, 2, 1)
  random = np.random.default_rng(1)
  shape = (2 * cell.batch, cell.image_size, cell.image_size, 3)
  data = TrainingSet.of(
    random.integers(0, 256, shape, np.uint8),
    random.integers(0, cell.num_classes, shape[0]).astype(np.int32),
  )
  order = jnp.arange(shape[0], dtype=jnp.int32).reshape(2, cell.batch)
  everywhere = mesh.replicated(bench.mesh)
  data, order = jax.device_put((data, order), everywhere)
  step = loop.make_step(built, optimizer, bench.mesh, settings.microbatch)
  key = jax.random.key(0)
  first = loop.first_state(built, optimizer, step, (data, order, key))
  state = jax.jit(first, out_shardings=everywhere)(bench.variables, key)
  jitted = compiled.jit(step, donate_argnums=0)
  needed = work.step(
    stage, settings, cell.model, cell.image_size, cell.num_classes
  )
  return _compile(jitted, (state, data, order, key), needed, carry=True)


def network_masks(bench: Bench, keep: float) -> Compiled:
  """The exact top-k masks of all layers of the network."""
  params = bench.variables['params']
  kernels = models.maskable(
    flatten({k: params[k] for k in ('encoder', 'head')})
  )
  scores = jax.jit(masks.init_scores)(kernels)
  select = compiled.jit(lambda scores: masks.topk_masks(scores, keep))
  return _compile(select, (scores,), 0)


def with_cell(settings: T, cell: Cell) -> T:
  """The recipe's settings with the cell's batch size and attack steps."""
  changes: dict[str, Any] = {'batch_size': cell.batch}
  attack = getattr(settings, 'attack', None)
  if attack is not None:
    keywords = attack.keywords | {'steps': cell.steps}
    changes['attack'] = dataclasses.replace(attack, keywords=keywords)
  return dataclasses.replace(settings, **changes)


def natural(settings: Supervised) -> Supervised:
  """The same training without an adversary."""
  return dataclasses.replace(settings, loss='natural')
