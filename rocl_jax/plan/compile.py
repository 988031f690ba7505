"""Compiles a step for chips that are not there, and reads what it will do."""

import contextlib
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from rocl_jax import hlo
from rocl_jax.benchmark import work
from rocl_jax.errors import one_line
from rocl_jax.mesh import replicated
from rocl_jax.plan import operations, steps, targets
from rocl_jax.plan.chips import Slice
from rocl_jax.plan.estimate import Memory, Step

# XLA's own name; -1 is its quickest compilation.
_EFFORT = 'exec_time_optimization_effort'


def missing(where: Slice) -> str:
  """What to install to compile for a slice; '' if it is there."""
  if where.layout:
    module, extra = 'libtpu', 'tpu'
    compiler = 'TPU programs are compiled by libtpu'
  else:
    module, extra = 'jax_plugins.xla_cuda13', 'cuda-compiler'
    compiler = 'GPU programs are compiled by jax-cuda13-plugin'
  try:
    if importlib.util.find_spec(module):
      return ''
  except ModuleNotFoundError:  # nor the package that it would be in
    pass
  return f"{compiler}, which is not installed: pip install -e '.[{extra}]'"


def mesh(where: Slice) -> Mesh:
  """The devices of a slice, in a mesh with the one axis `data`."""
  with _quiet():
    topology = topologies.get_topology_desc(
      **(_tpu(where) if where.layout else _gpu(where))
    )
  return Mesh(np.array(topology.devices), ('data',))


def _tpu(where: Slice) -> dict[str, Any]:
  options: dict[str, Any] = {}
  if where.kind == 'v4':  # both cores of a chip as one device, as on real ones
    options['chip_config_name'] = 'megacore'
  if where.chips == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  name = f'{where.kind}:{where.layout}'
  return dict(platform='tpu', topology_name=name, **options)


def _gpu(where: Slice) -> dict[str, Any]:
  return dict(
    platform='cuda',
    topology_name=where.kind,
    topology=f'1x1x{where.chips}',  # in one machine
    target_config=targets.target_config(where.kind),
  )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps compilers from telling that they find no chip: that is the point."""
  names = {
    'TPU_SKIP_MDS_QUERY': '1',  # do not ask the cloud which machine this is
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # it owns no chip that two could want
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_MIN_LOG_LEVEL': '3',
  }
  before = {name: os.environ.get(name) for name in names}
  os.environ.update(names)
  stderr = os.dup(2)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)
    os.close(nowhere)
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def step(
  planned: steps.Planned,
  batch_size: int,
  where: Slice,
  devices: Mesh,
  effort: float,
) -> Step:
  """Compiles a stage's step and reads what it takes on each device.

  A program that does not fit has neither counts nor memory, but a `refused`.
  """
  began = time.perf_counter()
  jitted, arguments = steps.program(planned, batch_size, devices)
  lowered = jitted.lower(*arguments)
  hand = batch_size * work.step(
    planned.name,
    planned.settings,
    planned.model,
    planned.images.size,
    planned.images.classes,
  )
  about = Step(
    stage=planned.name,
    batch=batch_size,
    devices=devices.size,
    hand_flops=hand / devices.size,
  )
  try:
    with _quiet():
      compiled = _compile(lowered, effort)
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    found = re.search(r'Ran out of memory[^\n]*', str(e))
    return about._replace(refused=found[0] if found else one_line(e))
  seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  program = hlo.parse(text)
  return about._replace(
    compile_seconds=seconds,
    memory=Memory(
      arguments=memory.argument_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      code=memory.generated_code_size_in_bytes,
    ),
    flops=hlo.flops(program),
    traffic=hlo.traffic(program),
    collectives=hlo.collectives(program),
    in_attack=hlo.collectives(program, in_loops=True),
    operations=operations.read(text, where.chip, planned.model.dtype),
  )


def _compile(lowered, effort):
  if not effort:
    return lowered.compile()
  try:
    return lowered.compile(compiler_options={_EFFORT: effort})
  except jax.errors.JaxRuntimeError as e:
    if _EFFORT not in str(e):
      raise
    return lowered.compile()  # a version that does not know the option


class Calibration(NamedTuple):
  """What a compiler's estimates make of what is known, as shares of the peak.

  Attributes:
    product: of an 8192^3 bfloat16 product's FLOP/s.
    float32, bfloat16: of the bandwidth, where a large array has one added.
  """

  product: float
  float32: float
  bfloat16: float


def calibrate(where: Slice, devices: Mesh, effort: float) -> Calibration:
  """Compiles a product and two streams, and reads their estimates."""
  chip = where.chip

  def read(function, dtype, *shape):
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(devices))
    with _quiet():
      compiled = _compile(jax.jit(function).lower(x), effort)
    program = compiled.as_text()
    found = operations.read(program, chip, 'bfloat16')
    return sum(o.flops for o in found), operations.total(found)

  def stream(dtype):
    _, found = read(lambda x: x + 1, dtype, 2**14, 2**13)
    return found.nbytes / found.seconds / chip.bytes_per_second

  flops, found = read(lambda x: x @ x, jnp.bfloat16, 8192, 8192)
  share = flops / found.seconds / chip.peak('bfloat16')
  return Calibration(share, stream(jnp.float32), stream(jnp.bfloat16))
