"""Others' ways to do the same: published loops and attack libraries.

Every peer gets the same network with the same weights (`torch_networks`), the
same images, radius, step size and number of steps, and is called as its own
documentation does, in the same precision and on the same device; `jobs` says
which way each comparison leans. Needs the extra [peers].
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional as F

from rocl_jax.benchmark import programs, torch_networks
from rocl_jax.benchmark.timing import Job
from rocl_jax.models import Settings, Variables


class Problem(NamedTuple):
  """What every job of a cell works on.

  Attributes:
    device: PyTorch's, see `torch_networks.device`.
    settings: the network's.
    num_classes: of the head.
    variables: its weights.
    images, second: two views, [N, H, W, C] float32 in [0, 1].
    labels: int [N].
    eps, step_size, steps: of every attack, L-infinity.
    temperature, beta: of NT-Xent and of TRADES.
  """

  device: str
  settings: Settings
  num_classes: int
  variables: Variables
  images: np.ndarray
  second: np.ndarray
  labels: np.ndarray
  eps: float
  step_size: float
  steps: int
  temperature: float
  beta: float


class Peer(NamedTuple):
  """One comparison.

  Attributes:
    job: runs the peer once.
    against: the program of ours that does the same.
    unfair: which way the comparison leans, and why.
  """

  job: Job
  against: str
  unfair: str


Run = Callable[[], Any]  # starts a peer's work once


def wait(result: Any) -> Any:
  """For what PyTorch or JAX have queued."""
  if torch.cuda.is_initialized():
    torch.cuda.synchronize()
  return jax.block_until_ready(result)


def _peers(runs: dict[str, tuple[Run, str, str]]) -> dict[str, Peer]:
  return {
    name: Peer(Job(run, wait), against, unfair)
    for name, (run, against, unfair) in runs.items()
  }


def jobs(problem: Problem, predict: Callable) -> dict[str, Peer]:
  """Others' code; `predict` is our network as a JAX function of images."""
  frozen = 'its loop was written for this comparison, with frozen weights'
  weights = 'it computes gradients of the weights too'
  attack = {
    'lean PyTorch': (lean(problem), f'for it: {frozen}'),
    'torchattacks': (
      torchattacks_pgd(problem),
      'even: as its documentation says, NCHW',
    ),
    'torchattacks, channels_last': (
      torchattacks_pgd(problem, channels_last=True),
      'for it: a layout that its documentation does not mention',
    ),
    'foolbox, PyTorch': (foolbox_torch(problem), f'against it: {weights}'),
    'foolbox, JAX': (
      foolbox_jax(problem, predict),
      'against it: its loop runs in Python, op by op round a jitted network',
    ),
    'ART': (art(problem), f'against it: {weights}; NumPy in and out'),
    "HYDRA's loop": (
      hydra_loop(problem),
      f'against it: {weights}, as published',
    ),
  }
  anew = 'against it: embeds the constant view in each step, as published'
  return _peers(
    {
      name: (run, programs.PGD, unfair)
      for name, (run, unfair) in attack.items()
    }
    | {
      "RoCL's loop": (rocl_loop(problem), programs.INSTANCE, anew),
      'published RoCL step': (
        rocl_step(problem),
        programs.ROCL,
        f'{anew}; {_FIXED}',
      ),
      'published TRADES step': (
        trades_step(problem),
        programs.TRADES,
        'against it: clean logits in each attack step, and four training '
        f'passes where two differ, as published; {_FIXED}',
      ),
    }
    | {
      f'plain PyTorch step, {layout}': (
        plain_step(problem, layout == 'channels_last'),
        programs.PLAIN,
        _FIXED,
      )
      for layout in ('NCHW', 'channels_last')
    }
  )


_FIXED = 'for it: no augmentation'


def rivals(problem: Problem) -> dict[str, Peer]:
  """The fastest PyTorch that we can write for a GPU."""
  torch.compiler.reset()  # what was compiled before counts against its limit
  runs: dict[str, tuple[Run, str, str]] = {}
  for how, mode in _MODES.items():
    make = functools.partial(torch.compile, mode=mode) if mode else _eager
    runs |= {
      f'lean PyTorch, folded, {how}': (
        lean(problem, folded=True, make=make),
        programs.PGD,
        'even: BatchNorm folded, as in ours',
      ),
      f'lean TRADES step, {how}': (
        lean_trades_step(problem, make),
        programs.TRADES,
        _FIXED,
      ),
      f'plain PyTorch step, {how}': (
        plain_step(problem, channels_last=True, make=make),
        programs.PLAIN,
        _FIXED,
      ),
    }
  del runs['plain PyTorch step, eager']  # one of `jobs`
  return _peers(runs)


# Modes of `torch.compile`.
_MODES = {
  'eager': None,
  'torch.compile': 'default',
  'CUDA graphs': 'reduce-overhead',
}


def _eager(function):
  return function


def _network(problem: Problem, channels_last: bool, frozen: bool = False):
  net = torch_networks.network(
    problem.settings, problem.num_classes, problem.variables
  )
  layout = torch_networks.layout(channels_last)
  net = net.to(problem.device, memory_format=layout)
  return net.requires_grad_(not frozen)


def _tensors(problem: Problem, channels_last: bool):
  view = lambda images: torch_networks.images_of(images, channels_last).to(
    problem.device
  )
  labels = torch.from_numpy(np.array(problem.labels)).long().to(problem.device)
  return view(problem.images), view(problem.second), labels


def _uniform_start(images, eps):
  return images + torch.empty_like(images).uniform_(-eps, eps)


def _ascend(images, start, gradient, problem, clip_first=False):
  """Sign steps, back into the ball and into [0, 1]."""
  x = start
  for _ in range(problem.steps):
    x = x.detach() + problem.step_size * gradient(x.detach()).sign()
    if clip_first:
      x = x.clamp(0, 1)
    x = images + (x - images).clamp(-problem.eps, problem.eps)
    x = x.clamp(0, 1)
  return x.detach()


def lean(
  problem: Problem, folded: bool = False, make: Callable = _eager
) -> Run:
  """The leanest loop that we can write; `make` compiles what it repeats."""
  net = _network(problem, channels_last=True, frozen=True)
  net = torch_networks.fold(net) if folded else net
  images, _, labels = _tensors(problem, channels_last=True)
  loss = make(lambda x: F.cross_entropy(net(x), labels))
  gradient = functools.partial(_gradient, loss)

  start = functools.partial(_uniform_start, images, problem.eps)
  return lambda: _ascend(images, start(), gradient, problem)


def _gradient(loss, x):
  x.requires_grad_(True)
  return torch.autograd.grad(loss(x), x)[0]


def hydra_loop(problem: Problem) -> Run:
  """HYDRA's evaluation attack: `backward()`, weights and all."""
  net = _network(problem, channels_last=False)
  images, _, labels = _tensors(problem, channels_last=False)

  def gradient(x):
    x.requires_grad_(True)
    net.zero_grad()
    F.cross_entropy(net(x), labels).backward()
    return x.grad

  start = functools.partial(_uniform_start, images, problem.eps)
  return lambda: _ascend(images, start(), gradient, problem)


def torchattacks_pgd(problem: Problem, channels_last: bool = False) -> Run:
  import torchattacks

  net = _network(problem, channels_last)
  images, _, labels = _tensors(problem, channels_last)
  attack = torchattacks.PGD(
    net, eps=problem.eps, alpha=problem.step_size, steps=problem.steps
  )
  return lambda: attack(images, labels)


def foolbox_torch(problem: Problem) -> Run:
  import foolbox

  net = _network(problem, channels_last=False)
  images, _, labels = _tensors(problem, channels_last=False)
  model = foolbox.PyTorchModel(net, bounds=(0, 1), device=problem.device)
  return lambda: _foolbox(problem)(model, images, labels, epsilons=problem.eps)


def foolbox_jax(problem: Problem, logits: Callable) -> Run:
  """With a jitted model, as users of foolbox's JAX backend write."""
  import foolbox

  images, labels = jnp.asarray(problem.images), jnp.asarray(problem.labels)
  model = foolbox.JAXModel(jax.jit(logits), bounds=(0, 1))

  return lambda: _foolbox(problem)(model, images, labels, epsilons=problem.eps)


def _foolbox(problem):
  import foolbox

  return foolbox.attacks.LinfPGD(
    steps=problem.steps, abs_stepsize=problem.step_size, random_start=True
  )


def art(problem: Problem) -> Run:
  """The adversarial-robustness-toolbox: NumPy in, NumPy out."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

  net = _network(problem, channels_last=False)
  images, _, labels = _tensors(problem, channels_last=False)
  classifier = PyTorchClassifier(
    model=net,
    loss=torch.nn.CrossEntropyLoss(),
    input_shape=tuple(images.shape[1:]),
    nb_classes=problem.num_classes,
    clip_values=(0, 1),
    device_type='cpu' if problem.device == 'cpu' else 'gpu',
  )
  attack = ProjectedGradientDescent(
    classifier,
    norm=np.inf,
    eps=problem.eps,
    eps_step=problem.step_size,
    max_iter=problem.steps,
    num_random_init=1,
    batch_size=len(images),
    verbose=False,
  )
  x, y = images.cpu().numpy(), labels.cpu().numpy()
  return lambda: attack.generate(x, y)


def _nt_xent(views, temperature):
  """RoCL's loss: the key side of the similarities is detached."""
  z = torch.cat(views)
  z = z / (z.norm(dim=1, keepdim=True) + 1e-8)
  exps = torch.exp(z @ z.detach().T / temperature)
  exps = exps * (1 - torch.eye(len(z), device=z.device))
  n, ratios = len(views[0]), exps / (exps.sum(1, keepdim=True) + 1e-8)
  losses = [
    -torch.log(ratios[a * n : (a + 1) * n, k * n : (k + 1) * n].diag() + 1e-8)
    for a in range(len(views))
    for k in range(len(views))
    if a != k
  ]
  return torch.stack(losses).sum() / (len(views) * n)


def _rocl_attack(net, first, second, problem):
  """RoCL's instance-wise attack: both views pass in each step."""

  def gradient(x):
    x.requires_grad_(True)
    z = net.project(torch.cat([x, second]))
    loss = _nt_xent(z.chunk(2), problem.temperature)
    return torch.autograd.grad(loss, x)[0]

  net.eval()
  start = _uniform_start(first, problem.eps).clamp(0, 1)
  return _ascend(first, start, gradient, problem, clip_first=True)


def rocl_loop(problem: Problem) -> Run:
  net = _network(problem, channels_last=False)
  first, second, _ = _tensors(problem, channels_last=False)
  return lambda: _rocl_attack(net, first, second, problem)


def rocl_step(problem: Problem) -> Run:
  """Attack, two training-mode passes (pair, triple), SGD."""
  net = _network(problem, channels_last=False)
  first, second, _ = _tensors(problem, channels_last=False)
  optimizer = _sgd(net)

  def run():
    x_adv = _rocl_attack(net, first, second, problem)
    net.train()
    optimizer.zero_grad()
    pair = net.project(torch.cat([x_adv, second])).chunk(2)
    triple = net.project(torch.cat([first, second, x_adv])).chunk(3)
    loss = _nt_xent(triple, problem.temperature)
    loss = loss + _nt_xent(pair, problem.temperature) / 256
    loss.backward()
    optimizer.step()

  return run


def trades_step(problem: Problem) -> Run:
  """HYDRA's TRADES step: four training-mode passes, three with gradients."""
  net = _network(problem, channels_last=False)
  images, _, labels = _tensors(problem, channels_last=False)
  optimizer = _sgd(net)
  divergence = functools.partial(F.kl_div, reduction='sum')

  def gradient(x):
    x.requires_grad_(True)
    log_q = F.log_softmax(net(x), dim=1)
    loss = divergence(log_q, F.softmax(net(images), dim=1))
    return torch.autograd.grad(loss, x)[0]

  def run():
    net.train()
    net(images)  # for the accuracy meter
    net.eval()
    start = images + 0.001 * torch.randn_like(images)
    x_adv = _ascend(images, start, gradient, problem)
    net.train()
    optimizer.zero_grad()
    natural = F.cross_entropy(net(images), labels)
    log_q = F.log_softmax(net(x_adv), dim=1)
    robust = divergence(log_q, F.softmax(net(images), dim=1)) / len(images)
    (natural + problem.beta * robust).backward()
    optimizer.step()

  return run


def lean_trades_step(problem: Problem, make: Callable = _eager) -> Run:
  """What ours does: BatchNorm folded for the attack and the clean logits, once
  a step, and two training-mode passes."""
  net = _network(problem, channels_last=True)
  frozen = torch_networks.fold(net)
  net.train()
  images, _, labels = _tensors(problem, channels_last=True)
  optimizer = _sgd(net)

  def divergence(logits, target):
    log_q = F.log_softmax(logits, dim=1)
    return F.kl_div(log_q, target, reduction='sum')

  def trades(x_adv):
    logits = net(images)
    robust = divergence(net(x_adv), F.softmax(logits, dim=1)) / len(images)
    return F.cross_entropy(logits, labels) + problem.beta * robust

  predict, loss = make(frozen), make(trades)
  attacked = make(lambda x, clean: divergence(frozen(x), clean))

  def run():
    torch_networks.refold(frozen, net)
    with torch.no_grad():
      clean = F.softmax(predict(images), dim=1)
    gradient = functools.partial(_gradient, lambda x: attacked(x, clean))
    start = images + 0.001 * torch.randn_like(images)
    x_adv = _ascend(images, start, gradient, problem)
    optimizer.zero_grad()
    loss(x_adv).backward()
    optimizer.step()

  return run


def plain_step(
  problem: Problem, channels_last: bool, make: Callable = _eager
) -> Run:
  net = _network(problem, channels_last).train()
  images, _, labels = _tensors(problem, channels_last)
  optimizer = _sgd(net)
  loss = make(lambda x: F.cross_entropy(net(x), labels))

  def run():
    optimizer.zero_grad()
    loss(images).backward()
    optimizer.step()

  return run


def _sgd(net):
  # A rate that leaves the weights as they are; the arithmetic is the same.
  return torch.optim.SGD(
    net.parameters(), lr=1e-9, momentum=0.9, weight_decay=1e-4
  )


def mask_by_sort(scores: np.ndarray, keep: float, device: str) -> Job:
  """HYDRA's `GetSubnet`: sort, then write zeros and ones."""
  tensor = torch.from_numpy(np.asarray(scores)).to(device)

  def run():
    out = tensor.abs()
    _, order = out.flatten().sort()
    dropped = int((1 - keep) * out.numel())
    flat = out.flatten()
    flat[order[:dropped]] = 0
    flat[order[dropped:]] = 1
    return flat

  return Job(run, wait)
