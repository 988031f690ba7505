from rocl_jax import command, report


def main(arguments: list[str]) -> None:
  (workdir,) = arguments
  path = report.write(workdir)
  print(report.summary(workdir))
  print(f'\nReport, curves and pictures: {path}')


if __name__ == '__main__':
  command.run(main, usage=report.__doc__ or '', positional=(1,))
