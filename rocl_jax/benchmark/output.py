"""What was measured, as JSON, Markdown and a picture."""

import os
import platform
from pathlib import Path
from typing import Any

import jax
from etils import epath
from matplotlib.figure import Figure

from rocl_jax import figures, provenance
from rocl_jax.benchmark.autotuning import Kept
from rocl_jax.files import write_json, write_text

Record = dict[str, Any]


def write(
  folder: epath.Path,
  section: str,
  records: list[Record],
  asked: str,
  tuned: Kept | None = None,
) -> epath.Path:
  """Writes SECTION.json, .md and, for attacks, .png; returns the Markdown."""
  machine = describe_machine()
  autotuning = tuned.counts() if tuned else None
  write_json(
    folder / f'{section}.json',
    {
      'command': asked,
      'machine': machine,
      'autotuning': autotuning,
      'records': records,
    },
  )
  lines = [f'# {section}', '', f'`python -m rocl_jax.benchmark {asked}`', '']
  versions = ', '.join(f'{k} {v}' for k, v in machine['versions'].items() if v)
  lines += [f'{machine["name"]}, {machine["cores"]} cores. {versions}.', '']
  if autotuning:
    lines += [
      f'Compiled with {autotuning["kept"]} results of autotuning that earlier '
      f'runs have kept, and {autotuning["new"]} new ones.',
      '',
    ]
  for record in records if section in ('attacks', 'roofline') else ():
    lines += _TABLES[section](record)
  if section not in ('attacks', 'roofline'):
    lines += _TABLES[section](records)
  if section == 'attacks':
    figure = _picture(records)
    figure.savefig(folder / 'attacks.png', dpi=figures.DPI)
    lines += ['', '![Times](attacks.png)']
  path = folder / f'{section}.md'
  write_text(path, '\n'.join(lines) + '\n')
  return path


def describe_machine() -> Record:
  """Device, CPU, cores and versions: what a time depends on."""
  device = jax.devices()[0]
  name = _cpu_name() if device.platform == 'cpu' else device.device_kind
  cores = (
    len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 0
  )
  versions = provenance.software()
  versions.pop('device')
  for package in ('torch', 'torchattacks', 'foolbox'):
    found = provenance.version_of(package)
    if found:
      versions[package] = found
  art = provenance.version_of('adversarial-robustness-toolbox')
  if art:
    versions['ART'] = art
  return {
    'name': name,
    'cores': cores or os.cpu_count(),
    'platform': device.platform,
    'python': platform.python_version(),
    'versions': versions,
  }


def _cpu_name():
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor() or platform.machine()
  names = [x.split(':', 1)[1].strip() for x in lines if x[:10] == 'model name']
  return names[0] if names else platform.machine()


def _cell_name(cell):
  m = cell['model']
  return (
    f'{m["name"]}, width {m["width"]}, batch {cell["batch"]}, {m["dtype"]}, '
    f'{cell["steps"]} attack steps'
  )


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
  rule = ['---', *['---:'] * (len(head) - 1)]
  return ['| ' + ' | '.join(r) + ' |' for r in (head, rule, *rows)]


def _ms(seconds):
  return f'{1e3 * seconds:,.1f}'


def _range(low_high, scale=1.0, form='{:.2f}'):
  return '–'.join(form.format(scale * x) for x in low_high)


def _attacks(record):
  peaks = ', '.join(
    f'{name.removeprefix("peak: ")} {value / 1e9:,.0f}'
    for name, value in record['peak_flops_per_second'].items()
  )
  rows = []
  for name, p in record['programs'].items():
    rate = p.get('image_steps_per_second', p.get('images_per_second'))
    unit = 'images·steps' if 'image_steps_per_second' in p else 'images'
    rows.append(
      [
        name,
        _ms(p['median']),
        _range(p['quartiles'], 1e3, '{:,.1f}'),
        f'{rate:,.0f} {unit}' if rate else '',
        f'{p["flops_per_second"] / 1e9:,.0f}' if rate else '',
        f'{p["share_of_peak"]:.0%}' if rate else '',
        f'{p["memory_bytes"] / 2**20:,.0f}',
        f'{p["compile_seconds"]:.1f}',
      ]
    )
  head = ['program', 'median ms', 'quartiles', 'a second', 'GFLOP/s']
  head += ['of peak', 'memory MiB', 'compile s']
  turn = 'rows of calls' if record['calls_in_a_row'] else 'single calls'
  facts = [f'n = {record["rounds"]} rounds of {turn}']
  precision = record['precision']
  facts += [f'Ours: {precision["ours"]}']
  if 'peers' in precision:
    facts += [f'PyTorch: {precision["peers"]}']
  facts += [f'Peak of the same products, GFLOP/s: {peaks}']
  if record['device_peak_bytes'] is not None:
    held = record['device_peak_bytes'] / 2**20
    facts += [f'Of the device JAX has held {held:,.0f} MiB at most so far']
  lines = [f'## {_cell_name(record["cell"])}', '', '. '.join(facts) + '.', '']
  lines += _table(head, rows)
  head = ['this', 'against our', 'times as long', 'by minimum', 'quartiles']
  head += ['the comparison leans']
  rows = [
    [
      name,
      r['against'],
      f'{r["median"]:.2f}',
      f'{r["minimum"]:.2f}',
      _range(r['quartiles']),
      r['unfair'],
    ]
    for name, r in record['ratios'].items()
  ]
  return [*lines, '', *_table(head, rows), '']


def _roofline(record):
  rows = []
  for name, p in record['programs'].items():
    compiled = p['compiled_flops_per_image']
    hand = p['hand_flops_per_image']
    rows.append(
      [
        name,
        f'{hand / 1e9:.3f}',
        '' if compiled is None else f'{compiled / 1e9:.3f}',
        '' if compiled is None else f'{compiled / hand:.3f}',
        f'{p["bytes_per_image"] / 1e6:,.1f}',
        f'{p["flops_per_byte"]:,.1f}',
        f'{p["memory_bytes"] / 2**20:,.0f}',
      ]
    )
  head = ['program', 'GFLOP an image, by hand', 'compiled', 'ratio']
  head += ['MB an image', 'FLOP a byte', 'memory MiB']
  return [f'## {_cell_name(record["cell"])}', '', *_table(head, rows), '']


def _masks(records):
  names = list(records[0]['seconds'])
  head = ['scores', 'kept', *(f'{n}, ms' for n in names)]
  head += [f'{n}, times as long' for n in records[0]['ratios']]
  rows = [
    [
      f'{r["size"]:,}',
      f'{r["kept"]:,}',
      *(_ms(r['seconds'][n]['median']) for n in names),
      *(
        f'{q["median"]:.1f} (by minimum {q["minimum"]:.1f})'
        for q in r['ratios'].values()
      ),
    ]
    for r in records
  ]
  return _table(head, rows)


def _scaling(records):
  head = ['scaling', 'devices', 'batch', 'median ms', 'quartiles']
  head += ['images/s', 'memory a device, MiB', 'collectives a step', 'their MB']
  rows = []
  for r in records:
    kinds = r['collectives']
    rows.append(
      [
        r['kind'],
        str(r['devices']),
        str(r['batch']),
        _ms(r['median']),
        _range(r['quartiles'], 1e3, '{:,.1f}'),
        f'{r["images_per_second"]:,.0f}',
        f'{r["memory_bytes_per_device"] / 2**20:,.0f}',
        ', '.join(f'{c["times"]} {k}' for k, c in kinds.items()) or 'none',
        f'{sum(c["nbytes"] for c in kinds.values()) / 1e6:.2f}',
      ]
    )
  note = (
    'Simulated devices share the cores of one machine: the times show what '
    'the split costs, not what more devices gain.'
  )
  return [note, '', *_table(head, rows)]


def _drift(records):
  pairs = [
    (devices, steps)
    for devices, found in records[0]['drift'].items()
    for steps in found
  ]
  head = ['stage', *(f'{devices}, {steps}' for devices, steps in pairs)]
  rows = [
    [r['stage'], *(f'{r["drift"][d][s]:.1e}' for d, s in pairs)]
    for r in records
  ]
  r = records[0]
  note = (
    f'Distance between the weights of a run on so many devices and of one on a '
    f'single device, as a share of the way that the latter has gone; '
    f'{r["model"]["name"]}, width {r["model"]["width"]}, float32, digits, '
    f'batch {r["batch"]}, {r["attack_steps"]} attack steps.'
  )
  return [note, '', *_table(head, rows)]


def _autoattack(records):
  head = ['attack', 'robust images', 'official', 'seconds', 'official']
  head += ['times as long', 'seconds with compilation']
  clocks = ('seconds', 'official_seconds', 'seconds_with_compilation')
  lines = []
  for r in records:
    sums = {k: sum(a[k] for a in r['attacks']) for k in clocks}
    rows = [
      [
        a['attack'],
        str(a['robust']),
        str(a['official_robust']),
        f'{a["seconds"]:.1f}',
        f'{a["official_seconds"]:.1f}',
        f'{a["official_seconds"] / a["seconds"]:.2f}',
        f'{a["seconds_with_compilation"]:.1f}',
      ]
      for a in (*r['attacks'], r['attacks'][-1] | sums | {'attack': 'all'})
    ]
    lines += [
      f'## {r["network"]}',
      '',
      f'{r["n"]} images, {r["clean"]} of them right without attack; '
      f'{r["norm"]} {r["eps"]:.5f}; batches of {r["batch_size"]}; both '
      f'{r["dtype"]}.',
      '',
      *_table(head, rows),
    ]
  return lines


def _startup(records):
  head = ['width', 'first start, s', 'second, s', 'times as long']
  head += ['by minimum', 'n']
  rows = [
    [
      str(r['width']),
      f'{r["first"]["median"]:.1f}',
      f'{r["second"]["median"]:.1f}',
      f'{r["ratio"]["median"]:.2f}',
      f'{r["ratio"]["minimum"]:.2f}',
      str(r['first']['n']),
    ]
    for r in records
  ]
  return _table(head, rows)


_TABLES: dict[str, Any] = {
  'attacks': _attacks,
  'roofline': _roofline,
  'masks': _masks,
  'scaling': _scaling,
  'drift': _drift,
  'startup': _startup,
  'autoattack': _autoattack,
}


def _picture(records):
  """Times of everything in each cell, shortest first, ours in blue."""
  tallest = max(len(r['programs']) + len(r['peers']) for r in records)
  size = (9, max(2.0, 0.34 * tallest + 1) * len(records))
  figure = Figure(figsize=size, layout='constrained')
  axes = figure.subplots(len(records), 1, squeeze=False)[:, 0]
  for ax, record in zip(axes, records, strict=True):
    everything = record['programs'] | record['peers']
    order = sorted(everything, key=lambda n: -everything[n]['median'])
    colours = [
      figures.BLUE if name in record['programs'] else figures.MUTED
      for name in order
    ]
    medians = [1e3 * everything[name]['median'] for name in order]
    ax.barh(order, medians, color=colours, height=0.62)
    ax.set_xscale('log')
    ax.set_xlabel('ms, median; ours in blue')
    ax.set_title(_cell_name(record['cell']), loc='left', fontsize=10)
    for spine in ('top', 'right', 'left'):
      ax.spines[spine].set_visible(False)
    ax.tick_params(axis='y', length=0)
    for name, value in zip(order, medians, strict=True):
      ax.annotate(
        f'{value:,.0f}' if value >= 10 else f'{value:.1f}',
        (value, name),
        xytext=(4, 0),
        textcoords='offset points',
        va='center',
        fontsize=8,
        color=figures.INK,
      )
  return figure
