r"""Says what training would take on accelerators that are not there.

  python -m rocl_jax.plan --config=configs/cifar10.py --topology=v5e-256
  python -m rocl_jax.plan --config=configs/cifar10.py --compare=v4-8,v6e-8

Compiles the training step of every stage ahead of time for a TPU slice or for
GPUs, on any machine: memory, FLOPs, bytes, collectives, a lower bound of time,
an estimate, and the operations that take most of it, with their source lines.
Images and weights are not needed.

--config=FILE        as for train.py; --config.FIELD=VALUE overrides fields,
                     such as --config.supervised.batch_size=1024
--topology=NAME      v5e-16 or v5e:4x4; v4-8 (it counts TensorCores, two a
                     chip, as v2, v3 and v5p do), v6e-8; h100x8, a100x4, l4
--compare=NAME,...   several side by side
--stages=NAME,...    these alone; all of the config's if not given
--diff=COMMIT        the same steps of that commit of this checkout, and beside
                     them what this code makes of them; no largest batch
--images=N --image_size=S --classes=K
                     of the training set, where the config's source does not
                     tell without its files
--nolargest_batch    compile once a stage: no estimate of the largest batch
--effort=-1          XLA's effort, -1 to 1: -1 compiles about twice as fast,
                     and 0, the default, what a run runs
--output=FOLDER      writes plan.md and plan.json, too

The compilers need neither chip nor driver: pip install -e '.[tpu]' for TPUs,
'.[cuda-compiler]' or '.[cuda]' for GPUs, which are counted by arithmetic else.
"""

import os
import shlex
import sys

from absl import flags
from etils import epath

from rocl_jax import command
from rocl_jax.errors import UserError
from rocl_jax.settings import FieldError, at_least, one_of, within


def main(_: list[str]) -> None:
  import jax

  jax.config.update('jax_platforms', 'cpu')  # what is here does not matter
  from rocl_jax import mesh
  from rocl_jax.plan import chips

  given = flags.FLAGS
  names = [('--topology', n) for n in [given.topology] if n]
  names += [('--compare', n) for n in given.compare]
  if not names:
    raise UserError('--topology: missing (--help says more)')
  slices = [chips.slice_of(name, flag) for flag, name in names]
  _check_numbers(given)

  from rocl_jax.plan import compile as ahead
  from rocl_jax.plan import diff, output, steps
  from rocl_jax.progress import say

  run, images = steps.read(
    given.config, given.images, given.image_size, given.classes
  )
  stages = list(steps.plan(run, images))
  if given.stages:
    for name in given.stages:
      _check(one_of, '--stages', name, [s.name for s in stages])
    stages = [s for s in stages if s.name in given.stages]
  for (flag, _), where in zip(names, slices, strict=True):
    for stage in stages:
      steps.check(stage, where.devices)
    if gap := ahead.missing(where):
      if where.layout or given.diff:
        raise UserError(f'{flag}: {gap}')
      say(f'{where.name}: by arithmetic. {gap}')

  asked = shlex.join(['python', '-m', 'rocl_jax.plan', *sys.argv[1:]])
  planned, before, path = [], None, None
  if given.diff:
    before = diff.plan_of(given.diff, slices, [s.name for s in stages])
  for where in slices:
    platform = 'tpu' if where.layout else 'gpu'
    with mesh.counting_in([run.model.dtype], platform):
      planned.append(_plan(where, stages))
    text = _text(asked, run.model, images, planned, before)
    if given.output:
      folder = epath.Path(given.output)
      path = output.write(folder, text, planned, asked, run.config, before)
  print('\n'.join(text))
  if path:
    print(f'\nWritten: {path}, and the numbers as JSON beside it')


def _text(asked, m, images, planned, before):
  from rocl_jax.plan import diff, output

  text = ['# Plan', '', f'`{asked}`', '']
  text += [
    f'{m.name}, width {m.width}, {m.dtype}; {images.number:,} images of '
    f'{images.size}×{images.size}, {images.classes} classes. '
    + ', '.join(f'{k} {v}' for k, v in output.versions().items())
    + '.',
    '',
  ]
  for sheet in planned:
    where = sheet.where
    text += [f'## {where.name}', '', output.heading(where, m.dtype), '']
    if before:
      text += [*diff.tables(before, sheet), '']
    else:
      text += [*output.tables(sheet, m.dtype), '']
  if len(planned) > 1 and not before:
    text += ['## Side by side', '', *output.comparison(planned), '']
  return text + output.notes(planned, flags.FLAGS.effort, not before)


def _plan(where, stages):
  from rocl_jax.plan import arithmetic, estimate, output
  from rocl_jax.plan import compile as ahead
  from rocl_jax.progress import say

  devices = None if ahead.missing(where) else ahead.mesh(where)

  def step(stage, batch, effort):
    if devices is None:
      return arithmetic.step(stage, batch, where.devices)
    say(f'{where.name}/{stage.name}: compiling for a batch of {batch:,}')
    made = ahead.step(stage, batch, where, devices, effort)
    done = made.refused or f'{made.compile_seconds:.0f} s'
    say(f'{where.name}/{stage.name}: {done}')
    return made

  rows, given = [], flags.FLAGS
  for stage in stages:
    batch, count = stage.settings.batch_size, stage.images.number
    one, two, largest = step(stage, batch, given.effort), None, None
    other = estimate.second_batch(batch, where.devices, count)
    wanted = given.largest_batch and not given.diff
    if wanted and other and not one.refused:
      two = step(stage, other, -1.0)  # its memory is all we want to know
      largest = estimate.largest_batch(one, two, where, count)
    rows.append(output.row(stage, one, two, largest, where))
  calibration = None
  if devices is not None and where.chip.clock:
    calibration = ahead.calibrate(where, devices, given.effort)
  return output.Sheet(where, rows, calibration)


def _check_numbers(given):
  for name in ('images', 'image_size', 'classes'):
    _check(at_least, f'--{name}', given[name].value, 0)
  _check(within, '--effort', given.effort, -1, 1)


def _check(rule, *arguments):
  try:
    rule(*arguments)
  except FieldError as e:
    raise UserError(str(e)) from None


if __name__ == '__main__':
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # JAX asks as soon as it is imported
  command.define_config()
  flags.DEFINE_string('topology', '', 'A slice, such as v5e-16.')
  flags.DEFINE_list('compare', [], 'Several slices.')
  flags.DEFINE_list('stages', [], 'Stages to plan, if not all.')
  flags.DEFINE_integer('images', 0, 'Training images.')
  flags.DEFINE_integer('image_size', 0, 'Their height and width.')
  flags.DEFINE_integer('classes', 0, 'Their classes.')
  flags.DEFINE_string('diff', '', 'A commit to set beside this code.')
  flags.DEFINE_bool('largest_batch', True, 'Compile a second batch.')
  flags.DEFINE_float('effort', 0.0, "XLA's effort.")
  command.define_path('output', '', 'Folder of what is written.')
  command.run(main, usage=__doc__ or '', required=('config',))
