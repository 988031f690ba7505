"""Pictures of a reproduction: sparsity, size, stages, scores and weights."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from etils import epath

from rocl_jax import figures
from rocl_jax.files import write_json
from rocl_jax.report import training
from rocl_jax.report.reading import read_histograms
from rocl_jax.report.reproduction import (
  Model,
  Reproduction,
  rows_of,
  value,
)
from rocl_jax.report.size import packed
from rocl_jax.report.text import Writer, md, number, table

# What each line starts from, unpruned.
_DENSE = {
  'ours': Model('ours_90', 'supervised'),
  'magnitude': Model('ours_90', 'supervised'),
  'random': Model('ours_90', 'supervised'),
  'baseline2': Model('baseline2_90', 'supervised'),
}
_METHODS = ('ours', 'baseline2', 'magnitude', 'random', 'small')
_BINS = 80

_Panels = dict[str, list[figures.Histogram]]  # by what is on their x-axis


def curves(out: Writer, found: Reproduction) -> None:
  """Ours and Baseline 2 over the published curves, of the first seed."""
  if found.first.datasets() != ['cifar10']:
    return
  for run, name in (('ours_90', 'ours'), ('baseline2_90', 'baseline2')):
    training.shape(out, found.first, run, found.config(run), name)


def _models(
  found: Reproduction,
) -> Iterator[tuple[str, int, Model]]:
  """Method, sparsity in percent, and model."""
  for method in _METHODS:
    stage = 'supervised' if method == 'small' else 'finetune'
    pruned = {s: Model(f'{method}_{s}', stage) for s in (90, 99)}
    if any(found.records(model, 'pgd10') for model in pruned.values()):
      if method in _DENSE:
        yield method, 0, _DENSE[method]
      yield from ((method, *item) for item in pruned.items())


def _pair(found: Reproduction, model: Model, key: str) -> tuple[float, float]:
  measured = value(found.records(model, 'pgd10'), key)
  return measured.mean, measured.sd


def against_sparsity(out: Writer, found: Reproduction) -> None:
  """Accuracy against sparsity, and against the bytes of a packed network."""
  places = (0, 90, 99)
  by_sparsity, by_size, rows = [], [], []
  for method, pruned, model in _models(found):
    clean, robust = (
      _pair(found, model, key) for key in ('clean_top1', 'robust_top1')
    )
    if not math.isfinite(clean[0]):
      continue
    mark = 'dense' if method == 'small' or not pruned else f'{pruned} % pruned'
    point = figures.Point(method, places.index(pruned), clean, robust, mark)
    by_sparsity.append(point)
    size = packed(found, model)
    # Magnitude and random start from ours: one dense network, one point.
    if size and not (pruned == 0 and model.run != f'{method}_90'):
      by_size.append(point._replace(x=size))
      row = [method, str(model), f'{size:,}', number(clean[0])]
      rows.append([*row, number(robust[0])])
  if by_sparsity:
    out.text(
      '## Accuracy against sparsity',
      'After the last stage of each method, under PGD-10; `magnitude` and '
      '`random` are pruned from the network of `ours` at 0 %. `small` is a '
      'dense network with about as many weights as are kept at that sparsity. '
      'Methods stand beside each other at each of the three sparsities.',
    )
    out.picture(
      'sparsity',
      'Clean and robust accuracy against sparsity',
      figures.against,
      by_sparsity,
      'weights removed',
      [f'{p} %' for p in places],
    )
  if by_size:
    out.text(
      '## Accuracy against size',
      'Bytes of a packed network without further compression: float16 for each '
      'kept weight, for BatchNorm and for the biases, and where it is pruned a '
      'bit for each weight that says whether it was kept. At 99 % these bits '
      'are most of the file.',
    )
    out.picture(
      'size',
      'Clean and robust accuracy against the size of a file',
      figures.against,
      by_size,
      'bytes, on a logarithmic scale',
    )
    header = ['method', 'model', 'bytes', 'clean', 'PGD-10']
    out.text(table(header, rows, 2))


def by_stage(out: Writer, found: Reproduction) -> None:
  """The paper's Figure 2, as far as it is known: methods by stage."""
  rows = []
  more = [row for row in rows_of(5) if row['row'] == 'ours_natural_90']
  for row in [*rows_of(2), *more]:
    model = found.holder(row['row'], row['stage'])
    here = [_pair(found, model, k)[0] for k in ('clean_top1', 'robust_top1')]
    there = [row['clean_top1'], row['robust_top1']]
    what = (row['row'], row['method'], row['stage'])
    rows.append(figures.StagePoint(*what, *here, *there))
  if not any(math.isfinite(row.clean) for row in rows):
    return
  out.text(
    '## Figure 2: clean and robust accuracy of each method by stage',
    "The content of the paper's Figure 2 is not on record; this is its "
    'subject, drawn from Tables 2 and 5. Dots are measured here (last epoch, '
    'PGD-10), black lines are the published figures.',
  )
  out.picture(
    'figure2',
    'Clean and robust accuracy of each method by stage',
    figures.by_stage,
    rows,
  )


# Scores and weights.


def histograms(out: Writer, found: Reproduction) -> None:
  """Scores before and after pruning, weights before, after and fine-tuned.

  What was counted stays beside the picture, so that a copy of the folder
  without train states and models has it, too.
  """
  out.text('## Scores and weights')
  panels = _panels(found)
  if panels:
    _keep(found, panels)
  else:
    panels = _kept(found)
  if not panels:
    out.text(
      'Left out: their histograms need the last train state of `prune` and the '
      "main run's models, and this folder has numbers alone."
    )
    return
  out.text(
    f'Run {md(found.main_run)} of {found.first.path.name}, all layers '
    'together. Scores are divided by √(6 / fan-in), what the largest of a '
    'layer starts at. Pruning leaves the weights as they are and chooses among '
    'them; fine-tuning moves the chosen. The outermost ten-thousandth at each '
    'end is not shown.',
  )
  out.picture(
    'histograms',
    'Histograms of scores and weights',
    figures.histograms,
    panels,
  )


def _histograms_file(found: Reproduction) -> tuple[Path, str]:
  """Where what was counted is kept, and which model it must be of."""
  model = found.first.model(found.main_run, 'finetune')
  path = found.path / 'figures' / 'histograms.json'
  return path, str(model.get('fingerprint'))


def _keep(found: Reproduction, panels: _Panels) -> None:
  path, model = _histograms_file(found)
  counted = {k: [h._asdict() for h in drawn] for k, drawn in panels.items()}
  write_json(epath.Path(path), {'model': model, 'panels': counted})


def _kept(found: Reproduction) -> _Panels:
  path, model = _histograms_file(found)
  known = found.first.read(path, read_histograms, {})
  if known.get('model') != model:
    return {}
  return {
    title: [figures.Histogram(**h) for h in drawn]
    for title, drawn in known['panels'].items()
  }


def _panels(found: Reproduction) -> _Panels:
  """Empty where train state or model are gone."""
  folders = found.first.folders[found.main_run]
  if not {'prune', 'finetune'} <= folders.keys():
    return {}
  if not (folders['prune'] / 'checkpoints').is_dir():
    return {}
  # They start JAX, which nothing else in a report needs.
  from rocl_jax import checkpoint, masks
  from rocl_jax.trees import flatten

  tuned = epath.Path(folders['finetune'] / 'model')
  state = checkpoint.read_state(epath.Path(folders['prune'] / 'checkpoints'))
  if state is None or not checkpoint.is_model(tuned):
    return {}
  trained = state['trained']
  weights = flatten(trained['frozen']['kernels'])
  learned = flatten(trained['trainable']['scores'])
  variables, _ = checkpoint.load_model(tuned)
  kept, after = variables['masks'], flatten(variables['params'])
  scale = {p: (6 * w.shape[-1] / w.size) ** 0.5 for p, w in weights.items()}
  first = masks.init_scores(weights)

  def scores(found: Mapping) -> np.ndarray:
    return _joined(abs(np.asarray(found[p])) / scale[p] for p in weights)

  return {
    'score, as a part of √(6 / fan-in)': _counted(
      {'before pruning': scores(first), 'after it': scores(learned)}
    ),
    'weight': _counted(
      {
        'before pruning': _joined(weights.values()),
        'kept by it': _joined(weights[p][kept[p]] for p in weights),
        'kept, after fine-tuning': _joined(after[p][kept[p]] for p in weights),
      }
    ),
  }


def _joined(arrays) -> np.ndarray:
  return np.concatenate([np.asarray(x).ravel() for x in arrays])


def _counted(values: Mapping[str, np.ndarray]) -> list[figures.Histogram]:
  """On common edges, without the outermost ten-thousandth at each end."""
  low = min(np.quantile(x, 1e-4) for x in values.values())
  high = max(np.quantile(x, 1 - 1e-4) for x in values.values())
  edges = np.linspace(low, high, _BINS + 1)
  return [
    figures.Histogram(name, edges.tolist(), np.histogram(x, edges)[0].tolist())
    for name, x in values.items()
  ]
