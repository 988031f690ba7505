"""The choice of XLA's options for GPUs, by made-up measurements."""

import json
import sys

import pytest

from rocl_jax import gpu
from rocl_jax.errors import UserError
from rocl_jax.mesh import counting_in

NAMES = list(gpu.CHOICES)


def tried(**seconds_and_strength):
  return [
    {'name': NAMES[int(k[1:])], 'seconds': s, 'strength': v}
    for k, (s, v) in seconds_and_strength.items()
  ]


@pytest.mark.parametrize(
  'found, wanted',
  [
    ([], 0),
    (tried(n1=(1.0, 2.3)), 0),  # nothing to compare with
    (tried(n0=(1.0, 2.3)), 0),
    (tried(n0=(1.0, 2.3), n1=(0.8, 2.3), n2=(0.7, 2.31)), 2),
    (tried(n0=(1.0, 2.3), n1=(0.99, 2.3)), 0),  # not worth it
    (tried(n0=(1.0, 2.3), n3=(0.5, 1.9)), 0),  # a weaker attack
    (tried(n0=(1.0, 2.3), n3=(0.5, float('nan'))), 0),
    (tried(n0=(1.0, float('nan')), n3=(0.5, 2.3)), 0),
  ],
)
def test_the_fastest_that_is_as_strong_is_chosen(found, wanted):
  assert gpu.choice(found) == NAMES[wanted]


@pytest.mark.parametrize('ending', ['import time; time.sleep(60)', 'exit(-9)'])
def test_what_hangs_or_crashes_costs_itself_alone(ending):
  line = json.dumps(tried(n0=(1.0, 2.3))[0])
  script = f'print({line!r}); print("{{", end="", flush=True); {ending}'
  assert gpu._tried([sys.executable, '-c', script], 3) == tried(n0=(1.0, 2.3))


def test_a_choice_is_measured_once(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(gpu, 'cache_folder', lambda: tmp_path / 'new')
  monkeypatch.setattr(
    gpu,
    '_tried',
    lambda *_: calls.append(1) or tried(n0=(1.0, 2.3), n1=(0.5, 2.3)),
  )
  for _ in range(2):
    gpu.options.cache_clear()
    assert gpu.options() == gpu.CHOICES[NAMES[1]]
  assert len(calls) == 1
  (kept,) = (tmp_path / 'new').iterdir()
  kept.write_text('[]')  # damaged: measured again
  gpu.options.cache_clear()
  assert gpu.options() == gpu.CHOICES[NAMES[1]]
  assert len(calls) == 2
  monkeypatch.setenv('XLA_FLAGS', '--xla_gpu_enable_command_buffer=')
  gpu.options.cache_clear()
  assert gpu.options() == {}
  gpu.options.cache_clear()


def test_the_measured_attack_runs():
  record = gpu._try(gpu.PLAIN, width=2, batch=2, rounds=1)
  assert record['seconds'] > 0 and record['strength'] > 1


def test_tf32_is_refused_where_it_does_not_exist():
  told = 'config.model.dtype: found tf32, which GPUs alone have; wanted float32'
  with pytest.raises(UserError, match=told), counting_in(['tf32']):
    pass
  with counting_in(['tf32'], 'gpu'):
    pass
