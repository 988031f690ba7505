from rocl_jax import command, report


def main(arguments: list[str]) -> None:
  (workdir,) = arguments
  with report.opened(workdir) as folder:
    path = report.write(folder).replace(folder, workdir)
    print(report.summary(folder))
  print(report.terminal(f'\nReport, curves and pictures: {path}'))


if __name__ == '__main__':
  command.run(main, usage=report.__doc__ or '', positional=(1,))
