"""Which process this is, and where the first one is.

  member = find(coordinator='', count=0, index=0)    # before any device work
  processes.start(member)

Said by flags, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID, or found by JAX's own means on Cloud TPU, GKE, SLURM, Open MPI
and, with the package `kubernetes`, Kubernetes. Else the process is alone.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from jax._src import clusters  # what `jax.distributed.initialize` asks

from rocl_jax.errors import UserError, one_line

_VARIABLES = {
  'coordinator': 'JAX_COORDINATOR_ADDRESS',
  'processes': 'JAX_NUM_PROCESSES',
  'process': 'JAX_PROCESS_ID',
}
# Pods and nodes of a cluster start minutes apart.
_JOIN_BY_HAND, _JOIN = 60, 300


@dataclass(frozen=True)
class Member:
  """One of the processes of a run.

  Attributes:
    address: host and port of the first process; of IPv6 '[::1]:8476'.
    count: of all processes.
    index: of this one.
    devices: the local devices that are its own; None for all.
    join: seconds to wait for the others.
    source: who says so.
  """

  address: str
  count: int
  index: int
  devices: Sequence[int] | None = None
  join: int = _JOIN_BY_HAND
  source: str = 'flags'

  @property
  def by_hand(self) -> bool:
    """Whether flags say so."""
    return self.source == 'flags'

  @property
  def host(self) -> str:
    """Of `address`, without brackets."""
    return self.address.rpartition(':')[0].strip('[]')


ALONE = Member('', 1, 0)


def find(coordinator: str, count: int, index: int) -> Member:
  """What the flags say, or else the environment.

  Args:
    coordinator: HOST:PORT of the first process, or ''.
    count: of all processes; 0 for whatever the environment says.
    index: of this one.

  Raises:
    UserError: numbers or an address that can not be.
  """
  if count or coordinator or index:
    return _checked(Member(coordinator, count, index))
  told = {k: os.environ.get(name, '') for k, name in _VARIABLES.items()}
  if not all(told.values()):
    return _of_jax()
  for name in ('processes', 'process'):
    if not told[name].isdigit():
      raise UserError(
        f'{_VARIABLES[name]}: found {told[name]}, wanted a whole number'
      )
  count, index = int(told['processes']), int(told['process'])
  member = Member(told['coordinator'], count, index, None, _JOIN, 'JAX_*')
  return _checked(member, by_flags=False)


def _checked(member: Member, by_flags: bool = True) -> Member:
  field = lambda name: f'--{name}' if by_flags else _VARIABLES[name]
  if member.count < 1:
    raise UserError(
      f'{field("processes")}: found {member.count}, wanted how many processes '
      'there are'
    )
  if not 0 <= member.index < member.count:
    raise UserError(
      f'{field("process")}: found {member.index} of {member.count}, wanted 0 '
      f'to {member.count - 1}'
    )
  if member.count == 1:
    return member
  host, colon, port = member.address.rpartition(':')
  # The port after it serves to find out who has not come.
  bracketed = host.startswith('[') and host.endswith(']')
  right = colon and host and (bracketed or ':' not in host)
  if not (right and port.isdecimal() and 0 < int(port) < 65535):
    raise UserError(
      f'{field("coordinator")}: found {member.address!r}, wanted HOST:PORT, or '
      '[ADDRESS]:PORT for IPv6; the port after it must be free, too'
    )
  return member


def _of_jax() -> Member:
  try:
    with warnings.catch_warnings():
      # A pod without the package `kubernetes` is not a mistake.
      warnings.simplefilter('ignore')
      kinds = clusters.ClusterEnv._cluster_types
      kind = next(
        (k for k in kinds if not k.opt_in_only_method and k.is_env_present()),
        None,
      )
      if kind is None:
        return ALONE
      found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, kind.name, _JOIN
      )
  except Exception as e:  # whatever a cluster may answer
    raise UserError(
      f'--processes: the cluster does not tell: {one_line(e)}; give '
      '--coordinator, --processes and --process, or --processes=1'
    ) from None
  address, count, index, devices = found
  if kind.name == 'slurm' and not os.environ.get('JAX_COORDINATOR_PORT'):
    # JAX takes one port a job, but the one after it must be free, too.
    host = str(address).rpartition(':')[0]
    job = int(os.environ['SLURM_JOB_ID'])
    address = f'{host}:{61440 + 2 * job % 4094}'
  if address is None or count is None or index is None or count == 1:
    return ALONE
  return _checked(Member(address, count, index, devices, _JOIN, kind.name))
