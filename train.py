"""Trains an experiment, or what is left of it, and reports.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart
  python train.py --config=configs/cifar10.py --workdir=W --config.seed=1

--config=FILE[:ARGUMENT]   configs/quickstart.py, configs/cifar10.py, or
                           configs/cifar10.py:asrun, what published logs show,
                           or configs/paper.py:table2_ours, a row of the paper;
                           --config.FIELD=VALUE overrides fields
--workdir=FOLDER           where everything goes; the same command resumes. Also
                           gs://bucket/run: pip install 'rocl-jax[gcs]'
--coordinator=HOST:PORT --processes=N --process=I
                           one of N processes that train together; the first,
                           0, is at HOST:PORT and writes the work directory.
                           Cloud TPU, SLURM and Kubernetes say so themselves
--allow_change=FIELD,...   fields, such as config.seed, that may differ from
                           what made the folder
"""

from absl import flags

from rocl_jax import command
from rocl_jax.errors import shown

command.define_config()
command.define_path('workdir', None, 'Folder of everything the run writes.')
flags.DEFINE_string('coordinator', '', 'HOST:PORT of the first process.')
flags.DEFINE_integer('processes', 0, 'How many processes; 0: found out.')
flags.DEFINE_integer('process', 0, 'The number of this one, from 0.')
flags.DEFINE_list('allow_change', [], 'Fields that may have changed.')


def main(_: list[str]) -> None:
  from rocl_jax import (
    cluster,
    compiled,
    interruption,
    mesh,
    pipeline,
    processes,
    report,
  )

  group = flags.FLAGS
  processes.start(
    cluster.find(group.coordinator, group.processes, group.process)
  )
  mesh.check_devices()
  interruption.install('stopped; the same command goes on from the last save')
  compiled.keep_programs()
  workdir, allowed = group.workdir, group.allow_change
  records = pipeline.run(group.config, workdir, allowed)
  if processes.is_first():
    path = report.attempt(workdir)
    print(report.terminal_table(records))
    if path:
      print(report.terminal(f'\nReport, curves and pictures: {shown(path)}'))
  processes.finish()


if __name__ == '__main__':
  command.run(main, usage=__doc__ or '', required=('config', 'workdir'))
