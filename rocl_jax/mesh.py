"""Devices as one line, named `data`: batches are split, all else is copied.

The same code runs on one device and on many. A training step is written for
the whole batch, so NT-Xent's negatives and BatchNorm's statistics are global.
"""

import contextlib
from collections.abc import Collection, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import backend
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rocl_jax.errors import RunFailed, UserError, one_line
from rocl_jax.progress import warn


def check_devices() -> None:
  """To be called before any device work, and after `processes.start`.

  Raises:
    UserError: JAX was told to use devices that are not there.
    RunFailed: it finds none at all.
  """
  try:
    jax.devices()
    return
  except Exception as e:  # whatever a plugin raises
    why = one_line(e) if str(e) else 'no such device, or JAX without support'
  asked = jax.config.values.get('jax_platforms')
  if not asked:
    raise RunFailed(f'JAX finds no device: {why}')
  backend.clear_backends()
  jax.config.update('jax_platforms', None)
  try:
    there = {device.platform for device in jax.devices()}
  except Exception:
    there = {'nothing'}
  finally:
    jax.config.update('jax_platforms', asked)
  raise UserError(
    f'JAX_PLATFORMS: found {asked}, which JAX can not use here ({why}); '
    f'available here: {", ".join(sorted(there))}. Set JAX_PLATFORMS to that, '
    'or unset it'
  )


@contextlib.contextmanager
def counting_in(dtypes: Collection[str], platform: str = '') -> Iterator[None]:
  """Within, JAX's 64-bit mode is off unless the networks count so.

  A network of float32 is the same with JAX_ENABLE_X64 and without.

  Args:
    dtypes: of the networks, see `models.Settings`.
    platform: of the devices, if not JAX's own.

  Raises:
    UserError: some count in 64 bits and some do not, or in TensorFloat-32 and
      not on a GPU.
  """
  if 'tf32' in dtypes and (platform or jax.default_backend()) != 'gpu':
    raise UserError(
      'config.model.dtype: found tf32, which GPUs alone have; wanted float32 '
      'or bfloat16 here (to evaluate, --config.dtype)'
    )
  if not jax.config.values['jax_enable_x64']:
    yield
    return
  if 'float64' in dtypes:
    if others := set(dtypes) - {'float64'}:
      raise UserError(
        f'config.model.dtype: found float64 and {", ".join(sorted(others))}, '
        'wanted networks of one kind where JAX_ENABLE_X64 is set'
      )
    yield
    return
  warn('JAX_ENABLE_X64 is ignored: no network has dtype float64')
  with jax.enable_x64(False):
    yield


def make_mesh() -> Mesh:
  """All devices, in a mesh with the one axis `data`."""
  return Mesh(np.array(jax.devices()), ('data',))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def split(batch: jax.Array, mesh: Mesh) -> jax.Array:
  """Inside jit: lays the leading axis out over the devices."""
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  return jax.lax.with_sharding_constraint(batch, sharding)


def gathered(x: jax.Array) -> jax.Array:
  """Inside a training step: copies to all devices what each has a part of.

  What a loop needs whole is gathered once before it, where not every compiler
  sees that it does not change. Elsewhere this is nothing.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


def spread(x: jax.Array) -> jax.Array:
  """Inside a training step: gives each device a part of what all have whole.

  Zeros at the end make the length of [N] a multiple of the devices' number.
  Elsewhere this is nothing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  padded = jnp.pad(x, (0, -len(x) % mesh.size))
  return jax.lax.with_sharding_constraint(padded, PartitionSpec('data'))


def check_batch(field: str, batch_size: int, devices: int) -> None:
  """Raises UserError unless the devices can share the batch evenly."""
  if batch_size % devices:
    down = max(batch_size // devices, 1) * devices
    near = sorted({down, -(-batch_size // devices) * devices})
    raise UserError(
      f'{field}: found {batch_size}, wanted a multiple of the {devices} '
      f'devices, such as {" or ".join(map(str, near))}'
    )
