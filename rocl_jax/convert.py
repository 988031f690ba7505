r"""Turns a checkpoint of the published PyTorch code into a model folder.

  python -m rocl_jax.convert --checkpoint=model_best.pth.tar --name=published

--checkpoint=FILE   what torch.save wrote: RoCL's or HYDRA's ResNet for CIFAR-10
--name=NAME         what records call it; as the file, if not given
--out=FOLDER        the model folder; NAME/model if not given. It must not
                    exist yet; records of its evaluation go beside it
--stage=NAME        what it was trained for: supervised (default), pretrain for
                    an encoder without its classifier, prune, finetune, ...
--state_dict=NAME   which weights, where the file holds several: a key such as
                    ema_state_dict, or what their names begin with: ema_model
--config=FILE       `data`, whose classes and image size it gets; `prune.keep`;
                    configs/cifar10.py if not given

Architecture, width and number of classes are the file's. Classes that are not
ten need --config.data.source=folder --config.data.dir=FOLDER for their names,
or are called by number.

With --stage=prune or finetune the layers' `popup_scores`, if they have any,
become masks, of the kept fraction --config.prune.keep. PyTorch is not needed,
and nothing in the file is executed.
"""

import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rocl_jax import command, data
from rocl_jax.data.records import CIFAR10_CLASSES
from rocl_jax.errors import UserError, shown
from rocl_jax.files import exists, is_remote, place
from rocl_jax.progress import say
from rocl_jax.settings import parse
from rocl_jax.torch_file import some
from rocl_jax.types import Variables

IMAGE_SHAPE = (32, 32, 3)
UNNAMED = 'unnamed'  # images whose classes no file names
_MASKED = ('prune', 'finetune')  # stages whose networks are pruned
_SCORES = 'popup_scores'
_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'
_SUFFIXES = re.compile(r'(\.(tar|pth|pt|ckpt|bin|t7|pkl|zip))+$', re.IGNORECASE)
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
  classes: int,
  stage: str,
  keep: float,
) -> Variables:
  """The published code's tensors as variables of our network.

  Args:
    tensors: a state dict, see `torch_file.read`.
    settings: `models.Settings` of the network.
    classes: how many it tells apart.
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

  model = models.build(settings, classes)
  fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGE_SHAPE))
  # The published code keeps it in its own file.
  del fresh['params']['projector']
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
  _check_names(tensors, wanted, scores, stage, settings.name)
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


def network(
  tensors: Mapping[str, np.ndarray], settings: Any
) -> tuple[Any, int | None]:
  """What the shapes of a state dict say of the network.

  Args:
    tensors: see `torch_file.read`.
    settings: `models.Settings`, for what the file does not say.

  Returns:
    The settings with its architecture and width, unchanged if it is none of
    ARCHITECTURES; and the number of classes, None without a classifier.

  Raises:
    UserError: a width that no network has.
  """
  from rocl_jax import models

  stem, head = (tensors.get(f'{x}.weight') for x in ('conv1', 'linear'))
  blocks = _blocks(tensors)
  name = next((k for k, x in models.ARCHITECTURES.items() if x == blocks), '')
  if name and stem is not None and stem.ndim == 4:
    fields = dataclasses.asdict(settings)
    fields |= {'name': name, 'width': stem.shape[0]}
    settings = parse(models.Settings, fields, '--checkpoint')
  if head is None or head.ndim != 2 or len(head) == 0:
    return settings, None
  return settings, len(head)


def _blocks(tensors):
  """Blocks of each stage: (2, 2, 2, 2) of a ResNet-18."""
  found = {m[0] for k in tensors if (m := re.match(r'layer\d+\.\d+\.', k))}
  stages = [int(block[5:].partition('.')[0]) for block in found]
  return tuple(stages.count(stage) for stage in sorted(set(stages)))


def _check_names(tensors, wanted, scores, stage, name):
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
  if not missing and not extra:
    return
  told = [
    f'{what} {some(names)}'
    for what, names in (('lacks', missing), ('has, besides,', extra))
    if names
  ]
  hint = ''
  if prefixes := _prefixes(tensors, wanted):
    hint = (
      f'; keys begin with {" and ".join(map(repr, prefixes[:3]))}: '
      f'--state_dict={prefixes[0][:-1]} reads those alone'
    )
  elif set(missing) == {'linear.weight', 'linear.bias'}:
    hint = '; an encoder without its classifier is --stage=pretrain'
  blocks = ', '.join(map(str, _blocks(tensors)))
  raise UserError(
    f'--checkpoint: {" and ".join(told)}; wanted the published {stage} '
    f'network that config.model describes, a {name}'
    + (f', and found stages of {blocks} blocks' if blocks else '')
    + hint
  )


def _prefixes(tensors, wanted):
  """What stands, in the file's order, before the names that are wanted."""
  found = {}
  for name in tensors:
    parts = name.split('.')
    ends = range(1, min(len(parts), 10))
    at = next((i for i in ends if '.'.join(parts[i:]) in wanted), 0)
    if name not in wanted and at:
      found['.'.join(parts[:at]) + '.'] = True
  return list(found)


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


def run_name(file: str) -> str:
  """A run's name of a file's: 'model_best.pth.tar' -> 'model_best'."""
  name = _SUFFIXES.sub('', os.path.basename(file))
  name = re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-.')[:100]
  if not name[:1].isalpha() or name == 'figures':
    name = f'model-{name}'.strip('-')
  return name


def _images(settings, classes):
  """(name, class names, image shape) of the images that the model is for."""
  if settings.source == 'tfds':  # may still have to be downloaded
    if classes in (None, len(CIFAR10_CLASSES)):
      return 'cifar10', CIFAR10_CLASSES, IMAGE_SHAPE
    # In the order of their numbers, as folders are sorted by name.
    digits = len(str(classes - 1))
    names = tuple(f'{i:0{digits}}' for i in range(classes))
    return UNNAMED, names, IMAGE_SHAPE
  dataset = data.load(settings.source, settings.dir, 0)
  names = dataset.class_names
  if classes not in (None, len(names)):
    raise UserError(
      f'config.data: {dataset.name} has {len(names)} classes, and the '
      f"checkpoint's linear.weight {classes}; wanted the images that it was "
      'trained on'
    )
  return dataset.name, names, dataset.test.images.shape[1:]


def convert(
  config: ConfigDict,
  checkpoint_file: str,
  out: str,
  stage: str,
  name: str = '',
  part: str = '',
) -> epath.Path:
  """Writes the model folder; returns where it is.

  Args:
    config: see `experiment`.
    checkpoint_file: of the published code.
    out: the folder; '' for `<name>/model`.
    stage: a name in STAGES.
    name: of the run; '' for one of the file's name.
    part: see `torch_file.read`.

  Raises:
    UserError: a mistake in the config, no such checkpoint, one of another
      network or of other classes than the images, or something is at `out`.
    RunFailed: it could not be written.
  """
  from rocl_jax import checkpoint, provenance, results, torch_file
  from rocl_jax.experiment import check_name, parse_experiment
  from rocl_jax.stages import STAGES, prune

  if stage not in STAGES:
    raise UserError(
      f'--stage: found {stage!r}, wanted one of {", ".join(STAGES)}'
    )
  if name:
    check_name('--name', name)
  name = name or run_name(checkpoint_file)
  experiment = parse_experiment(config)
  run = experiment.runs[0]
  if is_remote(out):
    raise UserError(f'--out: found {out}, wanted a folder of this machine')
  path = epath.Path(place(out or f'{name}/model'))
  if exists(path):
    raise UserError(
      f'--out: {shown(path)} is there already, and nothing is overwritten; '
      'wanted another --out or --name'
    )
  tensors = torch_file.read(checkpoint_file, part)
  keep = 1.0
  if stage in _MASKED:
    if 'prune' not in run.config:
      raise UserError('config.prune: missing, and --stage needs its keep')
    section = parse(prune.Settings, run.config['prune'], 'config.prune')
    keep = section.keep
  model, classes = network(tensors, run.model)
  if model != run.model:
    say(
      f'--checkpoint: a {model.name} of width {model.width}; config.model had '
      f'a {run.model.name} of width {run.model.width}'
    )
  if stage == 'pretrain':
    classes = None
  converted = variables(
    *(tensors, model, classes or len(CIFAR10_CLASSES), stage, keep)
  )
  dataset, class_names, image_shape = _images(experiment.data, classes)
  if dataset == UNNAMED:
    say(
      f'The file names no classes; they are called {class_names[0]} to '
      f'{class_names[-1]}. To evaluate, give images in train/NAME and '
      'test/NAME with these names, 32x32; or convert again with '
      '--config.data.source=folder --config.data.dir=FOLDER.'
    )
  about = {
    'run': name,
    'stage': stage,
    'selection': 'last',
    'epoch': 0,  # the file does not say it in one way
    'dataset': dataset,
    'class_names': list(class_names),
    'image_shape': list(image_shape),
    'config': run.config
    | {'name': name, 'stages': (stage,), 'model': dataclasses.asdict(model)},
    'versions': provenance.versions(),
    'converted_from': epath.Path(checkpoint_file).name,
  }
  checkpoint.save_model(path, converted, about | results.identity(converted))
  return path


def next_command(path: epath.Path) -> str:
  """What to call next with a converted model, to be pasted into a shell."""
  from rocl_jax import checkpoint
  from rocl_jax.files import read_json

  about = read_json(path / checkpoint.ABOUT, dict)
  same = shutil.which('python') == sys.executable
  python = 'python' if same else sys.executable
  inside = pathlib.Path.cwd() == _CONFIGS.parent
  here = pathlib.Path() if inside else _CONFIGS.parent
  configs = here / 'configs'
  if about['stage'] == 'pretrain':
    model, images = (about['config'][k] for k in ('model', 'data'))
    words = [python, str(here / 'train.py'), f'--config={configs}/cifar10.py']
    words += [f'--config.name={about["run"]}']
    words += [f'--config.model.{k}={model[k]}' for k in ('name', 'width')]
    words += [f'--config.data.{k}={images[k]}' for k in ('source', 'dir')]
    words += ['--config.stages=supervised,prune,finetune']
    words += [f'--config.init_from={path}', f'--workdir={path.parent}']
  else:
    words = [python, '-m', 'rocl_jax.evaluate', f'--model={path}']
    words += [f'--config={configs}/eval.py:paper']
  if about['dataset'] == UNNAMED:
    words += ['--config.data.source=folder', '--config.data.dir=FOLDER']
  return shlex.join(words)


def main(_: list[str]) -> None:
  from rocl_jax import mesh

  given = flags.FLAGS
  mesh.check_devices()
  path = convert(
    *(given.config, given.checkpoint, given.out, given.stage),
    *(given.name, given.state_dict),
  )
  print(next_command(path))


if __name__ == '__main__':
  command.define_config()
  command.define_path('checkpoint', None, 'File that torch.save wrote.')
  flags.DEFINE_string('name', '', 'Name of the run in records.')
  command.define_path('out', '', 'Model folder to write.')
  flags.DEFINE_string('stage', 'supervised', 'Stage that it was trained for.')
  flags.DEFINE_string('state_dict', '', 'Which weights of several.')
  command.run(
    main,
    usage=__doc__ or '',
    required=('checkpoint',),
    default_config=str(_CONFIGS / 'cifar10.py'),
  )
