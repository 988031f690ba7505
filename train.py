"""Trains an experiment, or what is left of it, and reports.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart
  python train.py --config=configs/cifar10.py --workdir=W --config.seed=1

--config=FILE[:ARGUMENT]   configs/quickstart.py, configs/cifar10.py, or
                           configs/cifar10.py:asrun, what published logs show;
                           --config.FIELD=VALUE overrides fields
--workdir=FOLDER           where everything goes; the same command resumes
"""

from absl import flags

from rocl_jax import command

command.define_config()
flags.DEFINE_string('workdir', None, 'Folder of everything the run writes.')


def main(_: list[str]) -> None:
  from rocl_jax import compiled, pipeline, report

  compiled.keep_programs()
  workdir = flags.FLAGS.workdir
  records = pipeline.run(flags.FLAGS.config, workdir)
  path = report.write(workdir)
  print(report.terminal_table(records))
  print(f'\nReport, curves and pictures: {path}')


if __name__ == '__main__':
  command.run(main, usage=__doc__ or '', required=('config', 'workdir'))
