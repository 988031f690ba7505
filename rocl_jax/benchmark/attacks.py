"""Speed of attacks and training steps, beside each other and beside others'."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rocl_jax import compiled, models
from rocl_jax.benchmark import programs, timing
from rocl_jax.benchmark.programs import Bench, Cell, Compiled
from rocl_jax.benchmark.settings import Settings
from rocl_jax.training import Training

Record = dict[str, Any]

PEAKS = ('peak: matrix product', 'peak: convolution')
# Of products, by the dtype of a network: the precision that JAX is asked for,
# and what that is.
PRECISION = {
  'float32': (lax.Precision.HIGHEST, 'float32, IEEE products'),
  'tf32': (lax.Precision.HIGH, 'float32, TF32 products'),
  'bfloat16': (lax.Precision.DEFAULT, 'bfloat16 in the encoder'),
}


def measure(
  settings: Settings, peers: bool, say: Callable[[str], None]
) -> list[Record]:
  """One record a cell: speeds of all programs, and ratios between them."""
  return [_measure_cell(cell, settings, peers, say) for cell in cells(settings)]


def cells(settings: Settings) -> Iterator[Cell]:
  """All combinations of the grid, in its order."""
  name = settings.recipe.model.name
  grid = (settings.width, settings.dtype, settings.batch, settings.steps)
  for width, dtype, batch, steps in itertools.product(*grid):
    model = models.Settings(name=name, width=width, dtype=dtype)
    yield Cell(model, batch, steps, settings.image_size, settings.classes)


def build(
  bench: Bench, settings: Settings, say: Callable[[str], None]
) -> dict[str, Compiled]:
  """Our own programs of a cell, compiled."""
  recipe = settings.recipe
  supervised = programs.with_cell(recipe.supervised, bench.cell)
  pretrain = programs.with_cell(recipe.pretrain, bench.cell)
  natural = programs.natural(supervised)
  eps = supervised.attack.keywords['eps']
  step: Callable[[str, Training], Compiled] = lambda stage, section: (
    programs.training_step(bench, stage, section)
  )
  makers: dict[str, Callable[[], Compiled]] = {
    programs.PGD: lambda: programs.pgd_attack(bench, eps),
    programs.NAIVE: lambda: programs.naive_pgd_attack(bench, eps),
    programs.INSTANCE: lambda: programs.instance_attack(
      bench, eps, pretrain.temperature
    ),
    programs.TRADES: lambda: step('supervised', supervised),
    programs.ROCL: lambda: step('pretrain', pretrain),
    programs.PLAIN: lambda: step('supervised', natural),
    programs.MASKS: lambda: programs.network_masks(bench, settings.masks.keep),
  }
  built = {}
  for name, make in makers.items():
    say(f'compiling {name}')
    built[name] = make()
  return built


def _measure_cell(cell, settings, peers, say):
  say(cell.name)
  # One device: so are the peaks, and PyTorch.
  bench = programs.bench(cell, jax.devices()[:1])
  ours = build(bench, settings, say)
  peak_jobs, peak_work = _peaks(cell)
  jobs = {name: program.job for name, program in ours.items()} | peak_jobs
  precision = {'ours': PRECISION[cell.model.dtype][1]}
  against = {programs.NAIVE: programs.PGD}
  unfair = {
    programs.NAIVE: 'even: the same attack, bit for bit the same numbers or '
    'signs of gradients within rounding of zero.'
  }
  if peers:
    others, precision['peers'] = _peers(bench, settings)
    jobs |= {name: peer.job for name, peer in others.items()}
    against |= {name: peer.against for name, peer in others.items()}
    unfair |= {name: peer.unfair for name, peer in others.items()}
  seconds = timing.interleave(jobs, settings.rounds, say)

  peak = max(peak_work[name] / min(seconds[name]) for name in peak_jobs)
  return {
    'cell': cell._asdict() | {'model': vars(cell.model)},
    'rounds': settings.rounds,
    'calls_in_a_row': timing.in_rows(),
    'precision': precision,
    'device_peak_bytes': _device_peak(),
    'peak_flops_per_second': {
      name: peak_work[name] / min(seconds[name]) for name in peak_jobs
    },
    'programs': {
      name: _row(cell, program, seconds[name], peak)
      for name, program in ours.items()
    },
    'peers': {
      name: timing.summary(seconds[name])._asdict()
      for name in jobs
      if name not in ours and name not in peak_jobs
    },
    'ratios': {
      name: {
        'against': ours_name,
        **timing.ratio(seconds[name], seconds[ours_name])._asdict(),
        'unfair': unfair[name],
      }
      for name, ours_name in against.items()
    },
  }


def _row(cell: Cell, program: Compiled, seconds: list[float], peak: float):
  summary = timing.summary(seconds)
  images = cell.batch / summary.median
  row = {
    **summary._asdict(),
    'compile_seconds': program.compile_seconds,
    'memory_bytes': program.memory,
  }
  if program.work:
    row['images_per_second'] = images
    row['flops_per_image'] = program.work
    row['flops_per_second'] = images * program.work
    row['share_of_peak'] = images * program.work / peak
  if program.attack_steps:
    row['image_steps_per_second'] = images * program.attack_steps
  return row


def _device_peak() -> int | None:
  """Bytes that JAX has held at most on a device, where that is counted."""
  counts = [device.memory_stats() for device in jax.local_devices()]
  found = [c['peak_bytes_in_use'] for c in counts if c]
  return max(found, default=None)


def _peaks(cell):
  """A large matrix product and a large convolution: what the device can do in
  the cell's precision."""
  dtype = cell.model.arrays
  precision, _ = PRECISION[cell.model.dtype]
  on_cpu = jax.default_backend() == 'cpu'
  n, batch, channels, size = (
    (2048, 32, 256, 16) if on_cpu else (8192, 256, 512, 32)
  )
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.random(shape, np.float32), dtype)
  factors = draw(n, n), draw(n, n)
  operands = draw(batch, size, size, channels), draw(3, 3, channels, channels)
  convolve = lambda x, w: lax.conv_general_dilated(
    x,
    w,
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=precision,
  )
  multiply = functools.partial(jnp.matmul, precision=precision)
  product = compiled.jit(multiply)
  convolution = compiled.jit(convolve)
  jobs = {
    PEAKS[0]: timing.Job(lambda: product(*factors)),
    PEAKS[1]: timing.Job(lambda: convolution(*operands)),
  }
  inner = sum(1 for o in range(size) for t in range(3) if 0 <= o + t - 1 < size)
  flops = {
    PEAKS[0]: 2 * n**3,
    PEAKS[1]: 2 * batch * inner**2 * channels**2,
  }
  return jobs, flops


def _peers(bench, settings):
  """All peers, and their precision."""
  from rocl_jax.benchmark import peers, torch_networks

  recipe, cell = settings.recipe, bench.cell
  keywords = recipe.supervised.attack.keywords
  problem = peers.Problem(
    device=torch_networks.device(),
    settings=cell.model,
    num_classes=cell.num_classes,
    variables=jax.device_get(bench.variables),
    images=np.asarray(bench.images),
    second=np.asarray(bench.second),
    labels=np.asarray(bench.labels),
    eps=keywords['eps'],
    step_size=keywords['eps'] / 4,
    steps=cell.steps,
    temperature=recipe.pretrain.temperature,
    beta=recipe.supervised.beta,
  )
  # As its users would: foolbox's loop round a jitted network.
  predict = lambda x: bench.network.predict(bench.variables, x)
  precision = torch_networks.set_precision(cell.model.dtype)
  made = peers.jobs(problem, predict)
  if problem.device != 'cpu':
    made |= peers.rivals(problem)
  return made, precision
