"""What a process learns of the others, from flags and from its surroundings."""

import os
import subprocess
import sys

import pytest

from rocl_jax import cluster
from rocl_jax.errors import UserError


@pytest.mark.parametrize(
  'flags, told',
  [
    (('', 2, 0), '--coordinator: found .*wanted HOST:PORT'),
    (('h:65535', 2, 0), '--coordinator: found .*wanted HOST:PORT'),
    (('h:1', 2, 2), '--process: found 2 of 2, wanted 0 to 1'),
    (('h:1', 0, 0), '--processes: found 0, wanted how many'),
    (('', 0, 1), '--processes: found 0, wanted how many'),
    (('', -1, 0), '--processes: found -1'),
    (('::1:8476', 2, 0), r"found '::1:8476', wanted .*\[ADDRESS\]:PORT"),
    (('[::1]:', 2, 0), 'wanted HOST:PORT'),
  ],
)
def test_flags_that_can_not_be(flags, told):
  with pytest.raises(UserError, match=told):
    cluster.find(*flags)


# What srun, GKE and our Kubernetes manifests set, and what follows.
SLURM = {
  'SLURM_JOB_ID': '4096',
  'SLURM_STEP_NODELIST': 'gpu[017-018],old3',
  'SLURM_NTASKS': '12',
  'SLURM_PROCID': '5',
  'SLURM_LOCALID': '1',
}
GKE = {
  'JAX_FORCE_TPU_INIT': '1',  # as if there were chips
  'JAX_PLATFORMS': 'cpu',
  'TPU_WORKER_HOSTNAMES': '127.0.0.1,10.0.0.2',
  'TPU_WORKER_ID': '1',
}
ONE_SLICE = {
  'MEGASCALE_COORDINATOR_ADDRESS': '',
  'MEGASCALE_NUM_SLICES': '',
  'MEGASCALE_SLICE_ID': '',
}
SLICES = {
  'MEGASCALE_COORDINATOR_ADDRESS': '127.0.0.1:9915',
  'MEGASCALE_NUM_SLICES': '3',
  'MEGASCALE_SLICE_ID': '2',
}
PODS = {
  'JAX_COORDINATOR_ADDRESS': 'job-0.pods:8476',
  'JAX_NUM_PROCESSES': '4',
  'JAX_PROCESS_ID': '3',
}
FIND = """
import sys
from rocl_jax import cluster, errors
try:
  m = cluster.find(sys.argv[1], int(sys.argv[2]), 0)
  print(m.address, m.count, m.index, m.devices)
except errors.UserError as e:
  print(e)
"""


def found(environment, address='', count=0):
  """In a process of its own: JAX looks for chips when it is imported."""
  ours = ('SLURM', 'JAX', 'TPU', 'MEGASCALE', 'KUBERNETES', 'OMPI')
  rest = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
  return subprocess.run(
    [sys.executable, '-c', FIND, address, str(count)],
    env=rest | environment,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()


@pytest.mark.parametrize(
  'environment, wanted',
  [
    ({}, '1 0 None'),
    (SLURM, 'gpu017:61444 12 5 [1]'),
    (SLURM | {'JAX_COORDINATOR_PORT': '7777'}, 'gpu017:7777 12 5 [1]'),
    (SLURM | {'SLURM_JOB_ID': '4095'}, 'gpu017:61442 12 5 [1]'),
    (SLURM | {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, '1 0 None'),
    (GKE | ONE_SLICE, '127.0.0.1:8482 2 1 None'),
    (GKE | SLICES, '127.0.0.1:8482 6 5 None'),
    (PODS | SLURM, 'job-0.pods:8476 4 3 None'),
    (PODS | {'JAX_PROCESS_ID': '4'}, 'JAX_PROCESS_ID: found 4 of 4'),
    (
      PODS | {'JAX_NUM_PROCESSES': 'four'},
      'JAX_NUM_PROCESSES: found four, wanted a whole number',
    ),
    (SLURM | {'SLURM_PROCID': 'x'}, 'the cluster does not tell: invalid'),
  ],
)
def test_what_the_surroundings_say(environment, wanted):
  assert wanted in found(environment)


def test_flags_come_first():
  assert found(SLURM | PODS, 'h:1', 2) == 'h:1 2 0 None'
  assert found(SLURM | PODS, '', 1) == '1 0 None'


def test_an_address_of_ipv6():
  member = cluster.find('[::1]:8476', 2, 1)
  assert (member.address, member.host) == ('[::1]:8476', '::1')
