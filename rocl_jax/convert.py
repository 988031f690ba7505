r"""Turns a checkpoint of the published PyTorch code into a model folder.

  python -m rocl_jax.convert --checkpoint=model_best.pth.tar \
      --out=published/model --config=configs/cifar10.py

--checkpoint=FILE  what torch.save wrote: RoCL's or HYDRA's ResNet for CIFAR-10
--out=FOLDER       the model folder; it may not be there yet
--config=FILE      its network (`model`), images (`data`) and `prune.keep`
--stage=NAME       what it was trained for: supervised (default), pretrain for
                   an encoder without its classifier, prune, finetune, ...

With --stage=prune or finetune the layers' `popup_scores`, if they have any,
become masks, of the kept fraction --config.prune.keep. PyTorch is not needed,
and nothing in the file is executed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rocl_jax import command
from rocl_jax.data.records import CIFAR10_CLASSES
from rocl_jax.errors import UserError, shown
from rocl_jax.files import is_remote
from rocl_jax.progress import say
from rocl_jax.settings import parse
from rocl_jax.types import Variables

IMAGE_SHAPE = (32, 32, 3)
_MASKED = ('prune', 'finetune')  # stages whose networks are pruned
_SCORES = 'popup_scores'
# PyTorch counts batches, and nothing here does.
_IGNORED = 'num_batches_tracked'
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'} | {
  'mean': 'running_mean',
  'var': 'running_var',
}


def torch_name(path: str) -> str:
  """The published code's name of a weight or statistic.

  'encoder/stage2_block1_conv1/scale' -> 'layer2.0.bn1.weight'.
  """
  *_, unit, leaf = path.split('/')
  suffix = _LEAVES[leaf]
  if unit == 'head':
    return f'linear.{suffix}'
  if unit == 'stem':
    return ('conv1.' if leaf == 'kernel' else 'bn1.') + suffix
  stage, block, role = unit.split('_')
  prefix = f'layer{stage[5:]}.{int(block[5:]) - 1}'
  if role == 'shortcut':
    return f'{prefix}.shortcut.{0 if leaf == "kernel" else 1}.{suffix}'
  kind = 'conv' if leaf == 'kernel' else 'bn'
  return f'{prefix}.{kind}{role[4:]}.{suffix}'


def variables(
  tensors: Mapping[str, np.ndarray],
  settings: Any,
  stage: str,
  keep: float,
) -> Variables:
  """The published code's tensors as variables of our network.

  Args:
    tensors: a state dict, see `torch_file.read`.
    settings: `models.Settings` of the network.
    stage: 'pretrain' for an encoder alone; 'prune' and 'finetune' have masks
      where there are scores.
    keep: kept fraction of each layer that has scores.

  Returns:
    See `types.Variables`.

  Raises:
    UserError: a tensor is missing, left over, of another shape or type, or
      not finite; the message names the first ones.
  """
  from rocl_jax import masks, models
  from rocl_jax.trees import flatten, unflatten

  model = models.build(settings, len(CIFAR10_CLASSES))
  fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGE_SHAPE))
  del fresh['params'][
    'projector'
  ]  # the published code keeps it in its own file
  if stage == 'pretrain':
    del fresh['params']['head']
  wanted = {torch_name(p): (p, x.shape) for p, x in flatten(fresh).items()}
  scored = {
    name.rpartition('.')[0]
    for name in tensors
    if name.rpartition('.')[2] == _SCORES
  }
  scores = {
    f'{layer}.{_SCORES}': wanted[f'{layer}.weight']
    for layer in scored
    if f'{layer}.weight' in wanted
  }
  _check_names(tensors, wanted, scores, stage)
  found = {
    path: _array(tensors, name, shape) for name, (path, shape) in wanted.items()
  }
  for path, x in found.items():
    if path.endswith('/var') and (x < 0).any():
      raise UserError(f'--checkpoint: {torch_name(path)} is negative')
  result = unflatten(found)
  if not scores:
    return result
  if stage not in _MASKED:
    say(f'{_SCORES}: left out, as --stage={stage} is of a dense network')
    return result
  params = flatten(result['params'])
  found_scores = {
    path.removeprefix('params/'): _array(tensors, name, shape)
    for name, (path, shape) in scores.items()
  }
  topk = jax.jit(lambda x: masks.topk_masks(x, keep))
  kept = {p: np.asarray(m, bool) for p, m in topk(found_scores).items()}
  dropped = {p: np.where(m, np.float32(0), params[p]) for p, m in kept.items()}
  params |= {p: np.where(m, params[p], np.float32(0)) for p, m in kept.items()}
  result |= {'params': unflatten(params), 'masks': kept}
  # As `stages.prune` hands on, and `stages.finetune` does not.
  return result | ({'dropped': dropped} if stage == 'prune' else {})


def _check_names(tensors, wanted, scores, stage):
  """Raises UserError unless the file has all that is wanted and no more."""
  missing = [name for name in wanted if name not in tensors]
  known = {*wanted, *scores}
  if stage == 'pretrain':
    known |= {'linear.weight', 'linear.bias', f'linear.{_SCORES}'}
  extra = [
    name
    for name in tensors
    if name not in known and name.rpartition('.')[2] != _IGNORED
  ]
  if missing or extra:
    told = [
      f'{what} {_some(names)}'
      for what, names in (('lacks', missing), ('has, besides,', extra))
      if names
    ]
    raise UserError(
      f'--checkpoint: {" and ".join(told)}; wanted the published {stage} '
      'network that config.model describes'
    )


def _some(names):
  shown = ', '.join(f'{name!r:.60}'.strip("'") for name in names[:3])
  return shown + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _array(tensors, name, shape):
  """float32 in our layout: HWIO of OIHW, in x out of out x in."""
  x = tensors[name]
  order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(shape), (0,))
  theirs = tuple(shape[order.index(axis)] for axis in range(len(shape)))
  if x.shape != theirs:
    raise UserError(
      f'--checkpoint: {name} is {list(x.shape)}, wanted {list(theirs)}'
    )
  if x.dtype.kind in 'biu':
    raise UserError(f'--checkpoint: {name} is {x.dtype}, wanted floats')
  with np.errstate(over='ignore'):  # told below
    x = np.ascontiguousarray(x.transpose(order)).astype(np.float32)
  if not np.isfinite(x).all():
    raise UserError(f'--checkpoint: {name} is not finite')
  return x


def convert(
  config: ConfigDict, checkpoint_file: str, out: str, stage: str
) -> epath.Path:
  """Writes the model folder; returns where it is.

  Args:
    config: see `experiment`.
    checkpoint_file: of the published code.
    out: the folder.
    stage: a name in STAGES.

  Raises:
    UserError: a mistake in the config, no such checkpoint, one of another
      network, or something is at `out`.
    RunFailed: it could not be written.
  """
  from rocl_jax import checkpoint, provenance, results, torch_file
  from rocl_jax.experiment import parse_experiment
  from rocl_jax.stages import STAGES, prune

  if stage not in STAGES:
    raise UserError(
      f'--stage: found {stage!r}, wanted one of {", ".join(STAGES)}'
    )
  run = parse_experiment(config).runs[0]
  if is_remote(out):
    raise UserError(f'--out: found {out}, wanted a folder of this machine')
  path = epath.Path(out).expanduser().resolve()
  if path.exists():
    raise UserError(
      f'--out: {shown(path)} is there already; nothing is overwritten'
    )
  tensors = torch_file.read(checkpoint_file)
  keep = 1.0
  if stage in _MASKED:
    if 'prune' not in run.config:
      raise UserError('config.prune: missing, and --stage needs its keep')
    section = parse(prune.Settings, run.config['prune'], 'config.prune')
    keep = section.keep
  converted = variables(tensors, run.model, stage, keep)
  about = {
    'run': 'published',
    'stage': stage,
    'selection': 'last',
    'epoch': 0,  # the file does not say it in one way
    'dataset': 'cifar10',
    'class_names': list(CIFAR10_CLASSES),
    'image_shape': list(IMAGE_SHAPE),
    'config': run.config | {'name': 'published', 'stages': (stage,)},
    'versions': provenance.versions(),
    'converted_from': epath.Path(checkpoint_file).name,
  }
  checkpoint.save_model(path, converted, about | results.identity(converted))
  return path


def main(_: list[str]) -> None:
  from rocl_jax import mesh

  given = flags.FLAGS
  mesh.check_devices()
  path = convert(given.config, given.checkpoint, given.out, given.stage)
  print(f'{shown(path)}: python -m rocl_jax.evaluate --model={shown(path)}')


if __name__ == '__main__':
  command.define_config()
  command.define_path('checkpoint', None, 'File that torch.save wrote.')
  command.define_path('out', None, 'Model folder to write.')
  flags.DEFINE_string('stage', 'supervised', 'Stage that it was trained for.')
  command.run(
    main, usage=__doc__ or '', required=('config', 'checkpoint', 'out')
  )
