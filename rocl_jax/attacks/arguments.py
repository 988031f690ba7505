"""What the library's functions are called with, checked as commands check it.

Values that JAX traces, inside `jit`, can not be looked at: there the caller
has checked them. All raise FieldError, a ValueError of one line.
"""

import contextlib
import operator
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rocl_jax import settings
from rocl_jax.attacks.balls import check_ball
from rocl_jax.errors import UserError
from rocl_jax.logits import floats
from rocl_jax.settings import FieldError

_ROUNDING = 1e-3  # what it may add to a pixel: two units of float16
LARGEST = 10**6  # of any length


def _traced(*values: Any) -> bool:
  return any(isinstance(value, jax.core.Tracer) for value in values)


def amount(
  field: str, found: Any, low: float = 0, high: float = LARGEST
) -> Any:
  """A number in [low, high], also as text: '8/255'."""
  if _traced(found):
    return found
  try:
    if not isinstance(found, str):
      found = np.asarray(found).item()  # NumPy's and JAX's numbers, too
    number = settings.amount(found, field)
  except (UserError, TypeError, ValueError):
    wanted = "a number, or a quotient such as '8/255'"
    raise FieldError(field, found, wanted) from None
  settings.within(field, number, low, high)
  return number


def radius(field: str, found: Any, norm: str) -> Any:
  """The radius of a ball of this norm."""
  name('norm', norm, ('linf', 'l2'))
  found = amount(field, found)
  if not _traced(found):
    check_ball(found, norm)
  return found


def count(field: str, found: Any, low: int = 0, high: int = 10**6) -> None:
  """A whole number in [low, high]."""
  if _traced(found):
    return
  try:
    number = operator.index(found)
  except TypeError:
    raise FieldError(field, found, 'a whole number') from None
  settings.within(field, number, low, high)


def seed(found: Any) -> None:
  """A number that keys are made of."""
  count('seed', found, 0, 2**32 - 1)


def name(field: str, found: Any, names: Collection[str]) -> None:
  """One of these names."""
  settings.one_of(field, str(found), names)


def array(field: str, found: Any) -> Any:
  """An array of NumPy or JAX, of a type that both have."""
  if isinstance(found, jax.Array):
    return found
  if isinstance(found, np.ma.MaskedArray):
    raise FieldError(field, 'a masked array', 'one without a mask')
  try:
    found = np.asarray(found)
  except ValueError:
    raise FieldError(field, 'rows of different lengths', 'an array') from None
  if found.dtype.kind == 'f':  # other byte orders, and more than 64 bits
    found = found.astype(np.float64 if found.itemsize > 4 else np.float32)
  return found


def check_images(found: Any) -> None:
  """An array of images [N, H, W, C], uint8 or floats in [0, 1] but for
  rounding."""
  kind = found.dtype
  floating = jnp.issubdtype(kind, np.floating)
  if found.ndim != 4 or not found.size or not (floating or kind == np.uint8):
    seen = f'{kind} {list(found.shape)}'
    wanted = 'floats in [0, 1] [N, H, W, C], or uint8, at least one image'
    raise FieldError('images', seen, wanted)
  if not floating or _traced(found):
    return
  with jax.ensure_compile_time_eval():  # the caller may be under `jit`
    low, high = float(found.min()), float(found.max())
  if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN too
    wanted = 'values in [0, 1]'
    if low >= 0 and 2 < high <= 255:
      wanted += '; divide by 255'
    elif low < 0:
      wanted += '; normalisation belongs into the network'
    raise FieldError('images', f'{low:g} to {high:g}', wanted)


def images(found: Any) -> jax.Array:
  """Images as floats in [0, 1], of float32 at least; see `check_images`."""
  found = array('images', found)
  check_images(found)
  found = jnp.asarray(found)
  if found.dtype == np.uint8:
    return found.astype(jnp.float32) / jnp.float32(255)
  found = found.astype(jnp.promote_types(found.dtype, jnp.float32))
  return found if _traced(found) else jnp.clip(found, 0, 1)


def labelled(images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
  """Images, see `check_images`, and the label of each, as int32 [N]."""
  images = np.asarray(array('images', images))
  check_images(images)
  labels = np.asarray(array('labels', labels))
  if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
    seen = f'{labels.dtype} {list(labels.shape)}'
    raise FieldError('labels', seen, f'integers [{len(images)}]')
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or high >= 2**31:
    raise FieldError('labels', f'{low} to {high}', 'classes from 0')
  return images, labels.astype(np.int32)


def keys(found: Any, n: int) -> jax.Array:
  """A PRNG key, or n of them; also of the old style, uint32 [2] or [n, 2]."""
  kind, shape = getattr(found, 'dtype', None), np.shape(found)
  if kind == np.uint32 and shape[-1:] == (2,):
    found, shape = jax.random.wrap_key_data(jnp.asarray(found)), shape[:-1]
  elif kind is None or not jnp.issubdtype(kind, jax.dtypes.prng_key):
    wanted = 'a key, such as jax.random.key(0)'
    raise FieldError('key', str(kind or found), wanted)
  if shape not in ((), (n,)):
    raise FieldError('key', list(shape), f'one key, or one for each of {n}')
  return found


def function(field: str, found: Any) -> None:
  """Something to call."""
  if not callable(found):
    raise FieldError(field, found, 'a function of images [N, H, W, C]')


@contextlib.contextmanager
def traceable(field: str) -> Iterator[None]:
  """Within, JAX traces a function of the user's."""
  try:
    yield
  except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as e:
    seen = f'a function that JAX can not trace ({type(e).__name__})'
    raise FieldError(field, seen, 'one of jax.numpy alone') from e


def values(found: Any, x: jax.Array) -> jax.Array:
  """What an objective makes of images x: a number for each of them."""
  if _shape(found) != (len(x),):
    wanted = f'a number for each image, floats [{len(x)}]'
    raise FieldError('objective', _seen(found), wanted)
  return floats(found)


def mesh(found: Mesh | None, devices: list[Any]) -> Mesh:
  """The devices in one line named `data`; `devices` if none are given."""
  if found is None:
    return Mesh(np.array(devices), ('data',))
  if not isinstance(found, Mesh):
    raise FieldError('mesh', type(found).__name__, 'a jax.sharding.Mesh')
  return Mesh(found.devices.reshape(-1), ('data',))


def within(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
  """Makes the mesh that of the context, where the caller has set another."""
  if jax.sharding.get_abstract_mesh().empty:
    return contextlib.nullcontext()
  return jax.set_mesh(mesh)


def classes(logits_fn: Any, images: Any, labels: np.ndarray) -> int:
  """The number of classes of a network, from shapes alone."""
  function('logits_fn', logits_fn)
  one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
  with traceable('logits_fn'):
    found = jax.eval_shape(logits_fn, one)
  shape = _shape(found)
  if len(shape) != 2 or shape[0] != 1 or shape[-1] < 2:
    wanted = 'logits [N, K] of images [N, ...], floats of two classes or more'
    raise FieldError('logits_fn', _seen(found), wanted)
  classes = shape[-1]
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or high >= classes:
    wanted = f'0 to {classes - 1}: there are {classes} logits'
    raise FieldError('labels', f'{low} to {high}', wanted)
  return classes


def _shape(found: Any) -> tuple[int, ...]:
  """Of an array of floats; () of anything else."""
  kind = getattr(found, 'dtype', np.dtype(bool))
  return found.shape if jnp.issubdtype(kind, np.floating) else ()


def _seen(found: Any) -> str:
  if not hasattr(found, 'shape'):
    return type(found).__name__
  return f'{found.dtype} {list(found.shape)}'
