r"""Measures speed and memory on this machine.

  python -m rocl_jax.benchmark
  python -m rocl_jax.benchmark attacks --peers --config.width=64,

attacks    PGD, the instance-wise attack, training steps and masks (default)
masks      exact top-k selection against a sort, by layer size
roofline   FLOPs and bytes per image, by hand and from the compiled program
scaling    the TRADES step over simulated CPU devices, with its collectives
drift      how far float32 runs on several devices part from one on one
autoattack the standard suite beside the official implementation, with [peers]
startup    from process start to first step, without and with the cache

--peers          beside published loops and attack libraries, in PyTorch:
                 pip install 'rocl-jax[peers]'; for attacks and masks
--config=FILE    what to measure: configs/benchmark.py if not given;
                 --config.FIELD=VALUE overrides, --config.width=16,64
--out=FOLDER     where NAME.json, NAME.md and NAME.png go: runs/benchmark
--json           prints what is in NAME.json instead, and nothing else

On a GPU or TPU a time is that of a call in a row that keeps the queue full, and
PyTorch is on the same GPU, in the same precision.
"""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

from absl import flags
from etils import epath

from rocl_jax import command
from rocl_jax.errors import UserError, shown
from rocl_jax.settings import FieldError, one_of

SECTIONS = (
  *('attacks', 'masks', 'roofline', 'scaling', 'drift', 'startup'),
  'autoattack',
)
SIMULATED = ('scaling', 'drift')  # on devices that share this CPU
WITH_PEERS = ('attacks', 'masks')
CONFIG = Path(__file__).resolve().parents[2] / 'configs' / 'benchmark.py'


def main(arguments: list[str]) -> None:
  section = arguments[0] if arguments else 'attacks'
  try:
    one_of('benchmark', section, SECTIONS)
  except FieldError as e:
    raise UserError(str(e)) from None
  peers = flags.FLAGS.peers
  if peers or section == 'autoattack':
    _check_peers(section)

  # PyTorch on the same GPU, or a process that is started, needs memory, too.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  import jax

  if section in SIMULATED:
    jax.config.update('jax_platforms', 'cpu')
  from rocl_jax import mesh
  from rocl_jax.benchmark import autotuning, output
  from rocl_jax.benchmark.settings import parse_settings
  from rocl_jax.progress import say

  settings = parse_settings(flags.FLAGS.config)
  if section in SIMULATED:
    jax.config.update('jax_num_cpu_devices', max(settings.scaling.devices))
  mesh.check_devices()
  if peers or section == 'autoattack':
    from rocl_jax.benchmark import torch_networks

    torch_networks.device()
  tuned = autotuning.keep()
  folder = epath.Path(flags.FLAGS.out)
  # Some peers print.
  with (
    mesh.counting_in(settings.dtype),
    contextlib.redirect_stdout(sys.stderr),
  ):
    measured = _measure(section, settings, peers, say)
  asked = ' '.join(sys.argv[1:])
  path = output.write(folder, section, measured, asked, tuned)
  if flags.FLAGS.json:
    print(path.with_suffix('.json').read_text(), end='')
    return
  print(path.read_text())
  print(f'Written: {shown(path)}, and the numbers as JSON beside it')


def _measure(section, settings, peers, say):
  if section == 'attacks':
    from rocl_jax.benchmark import attacks

    return attacks.measure(settings, peers, say)
  if section == 'masks':
    from rocl_jax.benchmark import masks

    return masks.measure(settings, peers, say)
  if section == 'roofline':
    from rocl_jax.benchmark import roofline

    return roofline.measure(settings, say)
  if section == 'scaling':
    from rocl_jax.benchmark import scaling

    return scaling.measure(settings, say)
  if section == 'drift':
    from rocl_jax.benchmark import drift

    return drift.measure(settings, say)
  if section == 'autoattack':
    from rocl_jax.benchmark import autoattack

    return autoattack.measure(settings, say)
  from rocl_jax.benchmark import startup

  return startup.measure(settings, say)


def _check_peers(section):
  if section not in (*WITH_PEERS, 'autoattack'):
    raise UserError(
      f'--peers: found with {section}, wanted {" or ".join(WITH_PEERS)}'
    )
  for module in ('torch', 'torchattacks', 'foolbox', 'art', 'pyautoattack'):
    if importlib.util.find_spec(module) is None:
      raise UserError(
        f"benchmark: {module} is not installed; pip install 'rocl-jax[peers]'"
      )


if __name__ == '__main__':
  command.define_config()
  flags.DEFINE_bool('peers', False, 'Measure others, too.')
  flags.DEFINE_bool('json', False, 'Print JSON.')
  command.define_path('out', 'runs/benchmark', 'Folder of what is written.')
  command.run(
    main,
    usage=__doc__ or '',
    positional=(0, 1),
    default_config=str(CONFIG),
  )
