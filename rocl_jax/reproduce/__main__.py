r"""Runs what is missing of the paper's tables, and reports.

  python -m rocl_jax.reproduce --tables=1,2,3,4,5 --workdir=W
  python -m rocl_jax.reproduce --config=configs/paper_small.py \
      --config.data.dir=D --workdir=W

--workdir=FOLDER       W/seed0 and so on: a work directory for each seed; the
                       same command goes on where it was
--tables=1,2,3,4,5     and `baselines`, ours beside the paper's: all by default
--config=FILE          configs/paper.py, :asrun of it, or
                       configs/paper_small.py; --config.FIELD=VALUE overrides
--seeds=0              as 0,1,2: the config's rows once for each
--autoattack=1000      test images that AutoAttack gets, of each last model; 0
                       for none
--audit=64             images of the checks of each of those evaluations; 0
                       checks the records alone
--dry_run              the plan alone: rows, stages, epochs, hours
--allow_change=FIELD,...  fields, such as config.supervised.beta, that may
                       differ from what made the folder

Rows share what they have in common: one pre-training serves them all. Table 4
attacks from `surrogate`, a network of its own. Exit status 3: all was run, but
an audit failed.
"""

from absl import flags
from ml_collections import ConfigDict

from rocl_jax import command, published
from rocl_jax.errors import UserError, shown


def main(_: list[str]) -> None:
  from rocl_jax import compiled, interruption, mesh, report
  from rocl_jax.reproduce import reproduce

  group = flags.FLAGS
  if not isinstance(group.config, ConfigDict) or 'data' not in group.config:
    raise UserError('--config: wanted configs/paper.py or one like it')
  seeds = _whole('--seeds', group.seeds)
  if not seeds:
    raise UserError('--seeds: found none, wanted numbers such as 0,1,2')
  mesh.check_devices()
  interruption.install('stopped; the same command goes on where it was')
  compiled.keep_programs()
  path = reproduce(
    group.config,
    group.workdir,
    list(dict.fromkeys(group.tables)),
    list(dict.fromkeys(seeds)),
    group.autoattack,
    group.audit,
    group.dry_run,
    group.allow_change,
  )
  if path:
    print(report.summary(group.workdir))
    print(f'\nReport, curves and pictures: {shown(path)}')


def _whole(flag, words):
  try:
    return [int(word) for word in words]
  except ValueError:
    raise UserError(
      f'{flag}: found {",".join(words)}, wanted numbers such as 0,1,2'
    ) from None


if __name__ == '__main__':
  command.define_config()
  tables = [*map(str, published.TABLES), 'baselines']
  command.define_path('workdir', None, 'Folder of everything it writes.')
  flags.DEFINE_list('tables', tables, 'Which tables.')
  flags.DEFINE_list('seeds', ['0'], 'A work directory for each.')
  flags.DEFINE_integer('autoattack', 1000, 'Images.', lower_bound=0)
  flags.DEFINE_integer('audit', 64, 'Images.', 0, 256)
  flags.DEFINE_bool('dry_run', False, 'The plan alone.')
  flags.DEFINE_list('allow_change', [], 'Fields that may have changed.')
  command.run(
    main,
    usage=__doc__ or '',
    required=('workdir',),
    default_config='configs/paper.py',
  )
