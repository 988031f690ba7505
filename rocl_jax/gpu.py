"""Which of XLA's options make an attack faster on this GPU: by measurement.

XLA has two that are off by default and can change a step a lot: convolutions
that cuDNN fuses with the ReLU, the residual and the ReLU's gradient (an
experiment of XLA's), and CUDA graphs that record convolutions and loops, which
spare a GPU the starts of hundreds of kernels. Either may be slower, or fail, on
some GPU or with some version. So each is tried on a small attack, in a process
of its own, whose crash or endless search costs nothing else; what is faster and
as strong is used, and kept in the user's cache folder for the next time.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from typing import Any

import jax

from rocl_jax.files import cache_folder, write_json
from rocl_jax.progress import say

Options = dict[str, Any]
Record = dict[str, Any]

PLAIN = 'as XLA has it'

_FUSION = {'xla_gpu_experimental_enable_conv_fusion': True}
_GRAPHS = {
  'xla_gpu_enable_command_buffer': 'FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,'
  'DYNAMIC_SLICE_FUSION,CONDITIONAL,CONVOLUTION,WHILE'
}
CHOICES: dict[str, Options] = {
  PLAIN: {},
  'CUDA graphs of convolutions and loops': _GRAPHS,
  'fused convolutions': _FUSION,
  'both': _GRAPHS | _FUSION,
}
_LIMIT = 180  # seconds for all of them
_GAIN = 0.98  # of the time: less is worth another way of rounding


@functools.cache
def options() -> Options:
  """What to compile with on this machine's GPU.

  Nothing but XLA's own where XLA_FLAGS says any of these, and where several
  processes train together, who would have to choose alike.
  """
  said = os.environ.get('XLA_FLAGS', '')
  if jax.process_count() > 1 or any(o in said for o in _GRAPHS | _FUSION):
    return {}
  device = jax.devices()[0]
  about = f'{device.device_kind}, {device.client.platform_version}, '
  about += f'jaxlib {jax.lib.__version__}'
  digest = hashlib.sha256(about.encode()).hexdigest()[:16]
  path = cache_folder() / f'gpu-{digest}.json'
  try:
    return CHOICES[json.loads(path.read_text())['choice']]
  except (OSError, ValueError, KeyError, TypeError):
    pass
  say("measuring which of XLA's options are fast on this GPU, once")
  tried = _tried([sys.executable, '-m', 'rocl_jax.gpu'], _LIMIT)
  name = choice(tried)
  say(f'used from now on: {name}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {'choice': name, 'tried': tried, 'about': about})
  except OSError:
    pass  # measured again the next time
  return CHOICES[name]


def choice(tried: list[Record]) -> str:
  """The fastest of those that attack as XLA's own does, to a hundredth.

  Args:
    tried: `name`, `seconds` and `strength` of each choice that ran.
  """
  plain = next((t for t in tried if t['name'] == PLAIN), None)
  if plain is None:
    return PLAIN
  alike = [
    t
    for t in tried
    if abs(t['strength'] - plain['strength']) <= 0.01 * abs(plain['strength'])
  ]
  best = min(alike, key=lambda t: t['seconds'], default=plain)
  return best['name'] if best['seconds'] < _GAIN * plain['seconds'] else PLAIN


def _tried(command: list[str], limit: float) -> list[Record]:
  """What the process has printed before it ended, or had to be ended."""
  aside = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  try:
    done = subprocess.run(
      command, env=aside, capture_output=True, timeout=limit
    )
    printed = done.stdout
  except subprocess.TimeoutExpired as e:
    printed = e.stdout or b''
  return [
    json.loads(line) for line in printed.splitlines() if line.endswith(b'}')
  ]


def _try(
  name: str, width: int = 64, batch: int = 128, rounds: int = 5
) -> Record:
  """Times PGD on a ResNet-8 in bfloat16, compiled by a choice."""
  from rocl_jax import losses, models
  from rocl_jax.attacks import pgd

  network = models.build(
    models.Settings(name='resnet8', width=width, dtype='bfloat16'),
    num_classes=10,
  )
  key = jax.random.key(0)
  variables = network.init(key, (32, 32, 3))
  images = jax.random.uniform(key, (batch, 32, 32, 3))
  labels = jax.random.randint(key, (batch,), 0, 10)

  def attack(images):
    frozen = network.prepare(variables)
    objective = lambda x: losses.cross_entropy(frozen(x), labels)
    found = pgd(objective, images, key, eps=0.03, step_size=0.01, steps=10)
    return objective(found).mean()

  run = jax.jit(attack, compiler_options=CHOICES[name])
  strength, seconds = float(run(images)), []
  for _ in range(rounds):
    began = time.perf_counter()
    jax.block_until_ready([run(images) for _ in range(10)])
    seconds.append(time.perf_counter() - began)
  return {'name': name, 'seconds': min(seconds), 'strength': strength}


if __name__ == '__main__':
  for name in CHOICES:
    try:
      print(json.dumps(_try(name)), flush=True)
    except jax.errors.JaxRuntimeError as e:
      print(f'{name}: {e}', file=sys.stderr)
