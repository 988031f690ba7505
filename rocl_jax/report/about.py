"""What a reproduction is, and the commands that make it again."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rocl_jax import published
from rocl_jax.report.records import Record
from rocl_jax.report.reproduction import SURROGATE, Model, Reproduction
from rocl_jax.report.text import (
  Writer,
  code,
  dataset_text,
  md,
  number,
  plain,
  printable,
  table,
)
from rocl_jax.report.training import images_an_epoch

# What the paper's tables are about, and how few images still count as as many.
_WIDTH, _IMAGES, _FEWEST = 64, 50_000, 45_000


def introduction(out: Writer, found: Reproduction) -> None:
  work, main = found.first, found.main_run
  network = found.section(main, 'model')
  records = [
    record
    for stage in found.stages(main)
    for record in found.records(Model(main, stage), 'pgd10').values()
  ]
  parameters = dict.fromkeys(r.get('parameters') for r in records)
  sizes = [f', {size:,} parameters' for size in parameters if size]
  # As counted from the steps of the first seed's main run.
  counted = (
    images_an_epoch(found.section(main, s), work.metrics(main, s))
    for s in found.stages(main)
  )
  trained = next(filter(None, counted), None)
  held_out = found.section(main, 'data').get('validation')
  names = ', '.join(map(dataset_text, work.datasets())) or 'unknown'
  seeds = [
    plain(work.config.get('seed', name.removeprefix('seed')))
    for name, work in found.seeds.items()
  ]
  spread = '; numbers are mean ± standard deviation over them'
  preset = _preset(_words(found))
  lines = [
    f'Data set: {md(names)}; {_count(trained)} training images an epoch, '
    f'{_count(held_out)} held out, {_tested(records)} test images',
    f'Network: {md(plain(network.get("name")))}, width '
    f'{md(plain(network.get("width")))}{"".join(sizes)}',
    f'Seeds: {md(", ".join(seeds))}{spread if len(seeds) > 1 else ""}',
    f'Preset: {code(preset) if preset else "not recorded"}; every field is in '
    'the `config.json` of each seed',
    *(f'Made with: {md(text)}' for text in _versions(found)),
  ]
  out.text(
    '# Reproduction of “Making Neural Networks Robust in Resource Constrained '
    'Settings”',
    'RoCL, adversarial training and HYDRA, run again and set beside the tables '
    'of the paper and the logs published with it.',
    '\n'.join(f'- {line}' for line in lines),
  )
  differs = []
  if network.get('width') != _WIDTH:
    differs.append(f'width {md(plain(network.get("width")))}, not {_WIDTH}')
  if trained is None or trained < _FEWEST:
    differs.append(f'{_count(trained)} training images, not {_IMAGES:,}')
  if work.datasets() != ['cifar10']:
    differs.append('not CIFAR-10')
  if differs:
    out.text(
      "**This is the method at another scale than the paper's "
      f'({"; ".join(differs)}). Levels of accuracy are not comparable with the '
      "paper's; orderings may be.**"
    )
  _runs(out, found)


def _count(found: Any) -> str:
  return f'{found:,}' if isinstance(found, int) else 'unknown'


def _tested(records: Sequence[Record]) -> str:
  found = [r['n'] for r in records if isinstance(r.get('n'), int)]
  return _count(max(found, default=None))


def _versions(found: Reproduction) -> list[str]:
  texts: dict[str, None] = {}
  for work in found.seeds.values():
    for record in work.records:
      versions = record.get('versions')
      if isinstance(versions, dict):
        texts[', '.join(f'{k} {v}' for k, v in versions.items())] = None
  return list(texts)


def _runs(out: Writer, found: Reproduction) -> None:
  rows = []
  for run in found.runs:
    stages = []
    for stage in found.stages(run):
      section = found.section(run, stage)
      what = plain(section.get('total_epochs'))
      if section.get('loss') and stage != 'pretrain':
        what += f' {section["loss"]}'
      stages.append(f'{stage} {what}')
    keep = found.section(run, 'prune').get('keep')
    known = isinstance(keep, int | float) and 'prune' in found.stages(run)
    network = found.section(run, 'model')
    rows.append(
      [
        run,
        str(found.config(run).get('init_from') or 'fresh weights'),
        ', '.join(stages),
        f'{plain(network.get("name"))}, {plain(network.get("width"))}',
        number(100 * keep, 0) if known and keep else '–',
      ]
    )
  header = [
    'run',
    'starts from',
    'stages: epochs and loss',
    'network',
    'kept %',
  ]
  out.text(table(header, rows, 4))


# Commands.


def commands(out: Writer, found: Reproduction) -> None:
  """What was run, if that is recorded, and what does it again."""
  words = _words(found)
  preset = _preset(words) or 'configs/paper.py'
  seeds = ','.join(name.removeprefix('seed') for name in found.seeds)
  first = next(iter(found.seeds))
  parts = ['## Commands']
  if words:
    path = Path(words[0])
    package = path.parent.name if path.stem == '__main__' else path.stem
    start = 'train.py' if package == 'train' else f'-m rocl_jax.{package}'
    made = printable(f'python {start} {shlex.join(words[1:])}'.rstrip())
    parts.append(f'The folder was last written by\n\n```\n{made}\n```')
  overrides = shlex.join(w for w in words if w.startswith('--config.'))
  overrides = f' {overrides}' if overrides else ''
  last = found.last(found.main_run) or Model(found.main_run, 'finetune')
  model = f'W/{first}/{found.first.place(*last)}/model'
  surrogate = f"('W/{first}/{SURROGATE}/1_supervised/model',)"
  evaluate = f'python -m rocl_jax.evaluate --model={model}'
  file, _, argument = preset.partition(':')
  asrun = ',asrun' if 'asrun' in argument.split(',') else ''
  again = [
    f'python -m rocl_jax.reproduce --config={preset} --seeds={seeds} '
    f'--workdir=W{overrides}',
    f'python train.py --config={file}:table2_ours{asrun} --workdir=W/one_row'
    f'{overrides}',
    f'{evaluate} --config=configs/eval.py:paper',
    f'{evaluate} --config=configs/eval.py:autoattack '
    '--config.eval.examples=1000',
    f'{evaluate} --config=configs/eval.py:transfer '
    f'"--config.transfer.surrogates={surrogate}" '
    '--config.transfer.unmasked=true',
    'python -m rocl_jax.report W',
  ]
  others = [f'`{row}`' for row in published.row_names() if row != 'table2_ours']
  out.text(
    *parts,
    "Everything again; one row; one model under the paper's attacks, under "
    'AutoAttack, and under transfer with and without its mask; this report:',
    '\n'.join(['```', *map(printable, again), '```']),
    f'Rows beside `table2_ours`: {", ".join(others)}.',
  )


def _words(found: Reproduction) -> list[str]:
  """The recorded command, the program first."""
  try:
    return shlex.split(found.first.command)
  except ValueError:  # an open quotation mark
    return []


def _preset(words: Sequence[str]) -> str:
  """The config file as it was named, '' where no command is recorded."""
  for word, after in zip(words, [*words[1:], ''], strict=False):
    flag, equals, name = word.partition('=')
    if flag == '--config':
      return name if equals else after
  return 'configs/paper.py' if words else ''
