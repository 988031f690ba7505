from pathlib import Path

from rocl_jax import command, report
from rocl_jax.report.reading import load_results


def main(arguments: list[str]) -> None:
  (workdir,) = arguments
  with report.opened(workdir) as folder:
    path = report.write(folder).replace(folder, workdir)
    print(report.terminal_table(load_results(Path(folder))))
  print(f'\nReport, curves and pictures: {path}')


if __name__ == '__main__':
  command.run(main, usage=report.__doc__ or '', positional=(1,))
