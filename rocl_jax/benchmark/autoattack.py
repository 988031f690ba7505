"""AutoAttack beside the official implementation: what breaks, and how fast.

Both get the same weights and images and run the standard suite in its order,
each attack on the images that its own predecessors have left. The official
code comes with the extra [peers], as `pyautoattack`.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rocl_jax import convolution, data, saved
from rocl_jax.attacks import robustness
from rocl_jax.attacks.autoattack import members as members_of
from rocl_jax.attacks.robustness import Forwards
from rocl_jax.benchmark.settings import AutoAttack, Settings
from rocl_jax.data import Split
from rocl_jax.errors import UserError
from rocl_jax.evaluation import logits_functions, visible
from rocl_jax.files import place
from rocl_jax.mesh import make_mesh


class Problem(NamedTuple):
  """A network in both frameworks, and images that it was trained for.

  Attributes:
    name: for people.
    dtype: of the network, see `models.Settings`.
    forwards, variables: see `robustness.build`.
    torch_network: () -> a PyTorch module in evaluation mode, images NCHW.
    images: float32 [N, H, W, C] in [0, 1].
    labels: int [N].
    classes: number of logits.
  """

  name: str
  dtype: str
  forwards: Forwards
  variables: Any
  torch_network: Callable[[], Any]
  images: np.ndarray
  labels: np.ndarray
  classes: int


def measure(
  settings: Settings, say: Callable[[str], None]
) -> list[dict[str, Any]]:
  """One record: robust images and seconds after each attack, of both."""
  asked = settings.autoattack
  problem = _saved(asked) if asked.model else _reference(asked)
  say(f'{problem.name}: {len(problem.labels)} images')
  ours = _ours(problem, asked, say)
  first = ours()  # compiles
  warm = ours()
  official = _official(problem, asked, say)
  return [
    {
      'network': problem.name,
      'n': len(problem.labels),
      'dtype': problem.dtype,
      'norm': asked.norm,
      'eps': asked.eps,
      'batch_size': asked.batch_size,
      'clean': warm[0][1],
      'attacks': [
        {
          'attack': name,
          'robust': robust,
          'seconds': seconds,
          'seconds_with_compilation': cold[2],
          'official_robust': theirs[1],
          'official_seconds': theirs[2],
        }
        for (name, robust, seconds), cold, theirs in zip(
          warm[1:], first[1:], official, strict=True
        )
      ],
    }
  ]


Row = tuple[str, int, float]  # attack, images robust after it, seconds


def _ours(problem, asked, say) -> Callable[[], list[Row]]:
  mesh = make_mesh()
  members = members_of(asked.eps, asked.norm, classes=problem.classes)
  programs = [
    robustness.build([m], problem.forwards, mesh, asked.batch_size)
    for m in members
  ]
  clean = robustness.build((), problem.forwards, mesh, asked.batch_size)

  def run():
    began = time.perf_counter()
    split = problem.images, problem.labels
    outcome, _ = clean(problem.variables, *split, 0)
    left = np.flatnonzero(outcome.clean_top1)
    rows: list[Row] = [('clean', len(left), time.perf_counter() - began)]
    for (name, _), program in zip(members, programs, strict=True):
      began = time.perf_counter()
      if len(left):
        chosen = problem.images[left], problem.labels[left]
        outcome, _ = program(problem.variables, *chosen, 0)
        left = left[np.asarray(outcome.robust_top1)]
      rows.append((name, len(left), time.perf_counter() - began))
      say(f'ours, {name}: {rows[-1][1]} robust, {rows[-1][2]:.1f} s')
    return rows

  return run


def _official(problem, asked, say) -> list[Row]:
  import torch
  from pyautoattack import AutoAttack as Official

  from rocl_jax.benchmark import torch_networks

  norm = {'linf': 'Linf', 'l2': 'L2'}[asked.norm]
  device = torch_networks.device()
  torch_networks.set_precision(problem.dtype)
  net = problem.torch_network().to(device)
  # As its documentation says; the weights get no gradients, which is faster.
  net.requires_grad_(False)
  images = torch_networks.images_of(problem.images, False).to(device)
  labels = torch.from_numpy(problem.labels.astype(np.int64)).to(device)
  attack = Official(
    net, norm=norm, eps=asked.eps, seed=0, version='standard', device=device
  )
  rows: list[Row] = []
  for name in ('apgd-ce', 'apgd-t', 'fab-t', 'square'):
    attack.attacks_to_run = [name]
    began = time.perf_counter()
    if len(labels):
      _, taken = attack.run_standard_evaluation(
        images, labels, batch_size=asked.batch_size
      )
      kept = taken == labels  # the selection waits for the device
      images, labels = images[kept], labels[kept]
    rows.append((name, len(labels), time.perf_counter() - began))
    say(f'official, {name}: {rows[-1][1]} robust, {rows[-1][2]:.1f} s')
  return rows


def _saved(asked: AutoAttack) -> Problem:
  """A model folder, on its own test images."""
  from rocl_jax.benchmark import torch_networks

  model = saved.load(asked.model, 'config.autoattack.model')
  trained = model.about['config']['data']
  images = asked.images or trained['dir']
  test = data.load(trained['source'], images, 0).test
  network = model.network

  def in_torch():
    # Encoder and head are all that the attacks see.
    variables = dict(model.variables)
    variables['params'] = {
      'projector': _no_projector(model.variables),
      **model.variables['params'],
    }
    return torch_networks.network(network.settings, network.classes, variables)

  return Problem(
    name=f'{network.settings.name} of width {network.settings.width}, '
    f'{model.name}',
    dtype=network.settings.dtype,
    forwards=logits_functions(saved.network(network)),
    variables=visible(model.variables),
    torch_network=in_torch,
    classes=network.classes,
    **_cut(test, asked.examples),
  )


def _no_projector(variables):
  features = variables['params']['head']['kernel'].shape[0]
  zeros = lambda *shape: np.zeros(shape, np.float32)
  return {
    'hidden': {'kernel': zeros(features, 2048), 'bias': zeros(2048)},
    'output': {'kernel': zeros(2048, 128), 'bias': zeros(128)},
  }


def _reference(asked: AutoAttack) -> Problem:
  """The small network of the reference vectors, on the images they are of."""
  folder = place(asked.images or os.environ.get('ROCL_CIFAR_DIR', ''))
  if not folder:
    raise UserError(
      'config.autoattack.images: missing; wanted the folder of official '
      'CIFAR-10 binary files, or a model folder in config.autoattack.model'
    )
  test = data.load('binary', folder, 0).test
  try:
    with np.load(asked.reference, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
  except (OSError, ValueError) as e:
    raise UserError(f'config.autoattack.reference: {e}') from None
  first = int(arrays['first_test_index'])
  test = Split(test.images[first:], test.labels[first:])
  layers = (('c1', 1), ('c2', 2), ('c3', 2))

  def prepare(variables):
    flipped = {name: convolution.flip(variables[name][0]) for name, _ in layers}

    def forward(x, key=None):
      for name, stride in layers:
        kernel, bias = variables[name]
        x = convolution.frozen_conv(x, kernel, flipped[name], stride)
        x = jax.nn.relu(x + bias)
      weight, bias = variables['fc']
      return jnp.dot(x.mean((1, 2)), weight, precision='highest') + bias

    return forward, forward

  variables = {
    name: (
      jnp.asarray(arrays[f'{name}.weight']).transpose(
        (2, 3, 1, 0) if name != 'fc' else (1, 0)
      ),
      jnp.asarray(arrays[f'{name}.bias']),
    )
    for name in ('c1', 'c2', 'c3', 'fc')
  }
  return Problem(
    name='the small network of the reference vectors',
    dtype='float32',
    forwards=prepare,
    variables=variables,
    torch_network=lambda: _small_torch(arrays, layers),
    classes=len(arrays['fc.bias']),
    **_cut(test, asked.examples),
  )


def _small_torch(arrays: dict[str, np.ndarray], layers: Sequence[Any]):
  import torch
  from torch import nn

  class Mean(nn.Module):
    def forward(self, x):
      return x.mean((2, 3))

  parts: list[nn.Module] = []
  with torch.no_grad():
    for name, stride in layers:
      out, inputs, _, _ = arrays[f'{name}.weight'].shape
      layer = nn.Conv2d(inputs, out, 3, stride, padding=1)
      _copy(layer, arrays, name)
      parts += [layer, nn.ReLU()]
    out, inputs = arrays['fc.weight'].shape
    head = nn.Linear(inputs, out)
    _copy(head, arrays, 'fc')
  return nn.Sequential(*parts, Mean(), head).eval()


def _copy(layer, arrays, name):
  import torch

  layer.weight.copy_(torch.from_numpy(arrays[f'{name}.weight']))
  layer.bias.copy_(torch.from_numpy(arrays[f'{name}.bias']))


def _cut(split: Split, examples: int) -> dict[str, np.ndarray]:
  images = split.images[:examples].astype(np.float32) / np.float32(255)
  return {'images': images, 'labels': split.labels[:examples]}
