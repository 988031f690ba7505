from rocl_jax import command, report
from rocl_jax.errors import shown
from rocl_jax.files import place


def main(arguments: list[str]) -> None:
  workdir = place(arguments[0])
  with report.opened(workdir) as folder:
    path = report.write(folder).replace(folder, workdir)
    print(report.summary(folder))
  print(report.terminal(f'\nReport, curves and pictures: {shown(path)}'))


if __name__ == '__main__':
  command.run(main, usage=report.__doc__ or '', positional=(1,))
