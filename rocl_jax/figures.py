"""The pictures of a report: numbers in, a matplotlib Figure out.

  figure = figures.results([Result('ours', 'finetune', 0.9, 76.6, 48.6)], '')
  figure.savefig('results.png', dpi=figures.DPI)

Nothing here reads or writes a file, and nothing touches pyplot's global state.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

DPI = 150

# Okabe-Ito: told apart under the common colour deficiencies.
BLUE, VERMILLION, GREEN = '#0072B2', '#D55E00', '#009E73'
PURPLE, ORANGE, SKY = '#CC79A7', '#E69F00', '#56B4E9'
INK, MUTED, FAINT = '#222222', '#6B6B6B', '#E4E4E4'
DASHED = (0.0, (4.0, 1.6))

RUN_COLOURS = {
  'ours': BLUE,
  'natural': VERMILLION,
  'magnitude': GREEN,
  'rocl': PURPLE,
  # Those of configs/paper.py, without their sparsity.
  'baseline1': PURPLE,
  'baseline2': ORANGE,
  'baseline12': '#5E3C99',
  'baseline2_natural': VERMILLION,
  'ours_natural': '#882255',
  'random': '#8A7A00',
  'small': INK,
  'surrogate': '#9A9A9A',
}
OTHER_COLOURS = (ORANGE, SKY, INK)


class Curve(NamedTuple):
  """One run's progress through one stage; NaN where nothing was measured."""

  run: str
  x: Sequence[float]
  loss: Sequence[float]
  clean: Sequence[float]
  robust: Sequence[float]


class Result(NamedTuple):
  """Accuracy in percent of one evaluated model."""

  run: str
  stage: str
  sparsity: float
  clean: float
  robust: float
  note: str = ''  # how it was measured, where that differs from the rest


class Example(NamedTuple):
  """One image before and after the attack, H x W x 3 in [0, 1]."""

  label: int
  clean_prediction: int
  adversarial_prediction: int
  clean: ArrayLike
  adversarial: ArrayLike


class SecurityCurve(NamedTuple):
  """One model under ever stronger attacks; accuracy in percent.

  Attributes:
    run: decides the colour.
    label: which model of the run.
    eps: radius of the evaluation that the curves are about, or None.
    eps_text: that radius in words.
    by_eps: radii, accuracies.
    by_steps: numbers of steps, accuracies.
  """

  run: str
  label: str
  eps: float | None
  eps_text: str
  by_eps: tuple[Sequence[float], Sequence[float]]
  by_steps: tuple[Sequence[float], Sequence[float]]


class Point(NamedTuple):
  """One model in a picture of accuracy against something; percent.

  Attributes:
    method: its line.
    x: what it is set against.
    clean, robust: accuracies, each with its standard deviation or NaN.
    mark: what else sets it apart from others of its line, such as '90 %'.
  """

  method: str
  x: float
  clean: tuple[float, float]
  robust: tuple[float, float]
  mark: str


class StagePoint(NamedTuple):
  """One model and its published figures, in percent; NaN where unknown.

  Attributes:
    run: decides the colour.
    method: the title of its group.
  """

  run: str
  method: str
  stage: str
  clean: float
  robust: float
  published_clean: float
  published_robust: float


class Histogram(NamedTuple):
  """Counts between edges, under a name."""

  name: str
  edges: Sequence[float]
  counts: Sequence[float]


def run_colours(runs: Sequence[str]) -> dict[str, str]:
  """A colour for each run: the same one in every picture of a report.

  `ours_90` has that of `ours`, and `ours_99` a lighter one.
  """
  colours: dict[str, Any] = dict(RUN_COLOURS)
  others = 0
  for run in dict.fromkeys(runs):
    method, _, sparsity = run.rpartition('_')
    if run in colours:
      continue
    if method in RUN_COLOURS and sparsity.isdigit():
      depth = np.array(0.5 if sparsity == '99' else 1.0)
      red, green, blue = _tint(RUN_COLOURS[method], depth)
      colours[run] = to_hex((red, green, blue))
    else:
      colours[run] = OTHER_COLOURS[others % len(OTHER_COLOURS)]
      others += 1
  return colours


def _tidy(ax: Axes, grid: str = 'y') -> None:
  ax.spines[['top', 'right']].set_visible(False)
  ax.spines[['left', 'bottom']].set_color('#B0B0B0')
  ax.tick_params(colors=MUTED, labelsize=9, length=3)
  ax.set_axisbelow(True)
  if grid:
    ax.grid(axis=grid, color=FAINT, linewidth=0.8)  # type: ignore[arg-type]


def _line(ax: Axes, x: Sequence[float], y: Sequence[float], **style) -> None:
  """A line through the measured points; a lone point needs a marker."""
  points = np.array([x, y], float)
  points = points[:, np.isfinite(points).all(axis=0)]
  if points.shape[1] == 0:
    return
  if points.shape[1] < 12:
    style = {'marker': 'o', 'markersize': 3.2} | style
  ax.plot(*points, **style)


def _measured(values: Sequence[float]) -> bool:
  return bool(np.isfinite(np.array(values, float)).any())


def _whole_epochs(ax: Axes) -> None:
  low, high = ax.get_xlim()
  ax.set_xlim(min(low, high - 1), max(high, low + 1))
  ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def curves(
  stages: Mapping[str, Sequence[Curve]], split: str = 'validation'
) -> Figure:
  """Loss above, accuracy below, a column for each stage.

  The first curve of a stage is the main run's and is drawn heavier. `split`
  says which images the accuracy was measured on.
  """
  runs = [curve.run for drawn in stages.values() for curve in drawn]
  colours = run_colours(runs)
  columns = max(len(stages), 1)
  followed = {
    stage: any(_measured([*curve.clean, *curve.robust]) for curve in drawn)
    for stage, drawn in stages.items()
  }
  # A run still in pre-training has no accuracy to show: losses only.
  rows = 2 if any(followed.values()) else 1
  size = (max(2.7 * columns, 5.4), 0.4 + 2.4 * rows)
  figure = Figure(figsize=size, layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False)
  first = True
  for column, (stage, drawn) in enumerate(stages.items()):
    top = axes[0, column]
    bottom = axes[1, column] if rows == 2 else None
    for i, curve in reversed(list(enumerate(drawn))):
      style = {
        'color': colours[curve.run],
        'linewidth': 1.1 if i else 2.2,
        'zorder': 2 if i else 3,
      }
      _line(top, curve.x, curve.loss, **style)
      if bottom is not None:
        _line(bottom, curve.x, curve.clean, markerfacecolor='white', **style)
        _line(bottom, curve.x, curve.robust, linestyle=DASHED, **style)
    top.set_title(stage, fontsize=11, color=INK, fontweight='bold')
    _tidy(top)
    _whole_epochs(top)
    if column == 0:
      top.set_ylabel('training loss', fontsize=10, color=INK)
    if bottom is not None and followed[stage]:
      _tidy(bottom)
      _whole_epochs(bottom)
      bottom.set_ylim(-2, 102)
      bottom.set_xlabel('epoch', fontsize=10, color=INK)
      if first:
        first = False
        bottom.set_ylabel(f'{split} accuracy, %', fontsize=10, color=INK)
      continue
    top.set_xlabel('epoch', fontsize=10, color=INK)
    if bottom is not None:
      bottom.axis('off')
      if stage == 'pretrain':
        _note(bottom, 'no classifier\nin this stage')
      else:
        _note(bottom, 'accuracy not measured\nduring training')
  handles = [
    Line2D([], [], color=colours[run], linewidth=2.2 if i == 0 else 1.4)
    for i, run in enumerate(dict.fromkeys(runs))
  ]
  labels = list(dict.fromkeys(runs))
  if rows == 2:
    for dashes, face in (('-', 'white'), (DASHED, MUTED)):
      handle = Line2D([], [], color=MUTED, linewidth=1.4)
      handle.set(linestyle=dashes, marker='o', markersize=3.2)
      handle.set_markerfacecolor(face)
      handles.append(handle)
    labels += ['clean', 'robust']
  _legend(figure, handles, labels)
  return figure


def _note(ax: Axes, text: str) -> None:
  ax.text(
    0.5,
    0.5,
    text,
    ha='center',
    va='center',
    fontsize=9,
    color=MUTED,
    transform=ax.transAxes,
  )


def _legend(
  figure: Figure,
  handles: list,
  labels: list[str],
  loc: Any = 'outside upper center',
) -> None:
  figure.legend(
    handles,
    labels,
    loc=loc,
    ncols=_columns(figure, labels),
    frameon=False,
    fontsize=9.5,
    labelcolor=INK,
  )


def _columns(figure: Figure, labels: list[str]) -> int:
  """How many entries of a legend to a row, six at most, in rows as full."""
  widest = 0.6 + 0.08 * max(map(len, labels), default=0)
  fitting = max(1, min(len(labels), 6, int(figure.get_figwidth() / widest)))
  rows = max(1, -(-len(labels) // fitting))
  return max(1, -(-len(labels) // rows))


def against_published(
  stages: Mapping[str, tuple[Curve, Curve]], split: str, published_title: str
) -> Figure:
  """Each stage's curve with the published one behind it.

  x is the completed fraction of the stage. The losses have an axis each (left
  and right), since batch and network decide their level; accuracies share one.
  """
  columns = max(len(stages), 1)
  figure = Figure(figsize=(max(2.9 * columns, 5.4), 5.2), layout='constrained')
  axes = figure.subplots(2, columns, squeeze=False)
  last = len(stages) - 1
  first = True
  for column, (stage, (here, there)) in enumerate(stages.items()):
    top, bottom = axes[:, column]
    right = top.twinx()
    _line(right, there.x, there.loss, color=ORANGE, linewidth=2, marker='')
    _line(top, here.x, here.loss, color=BLUE, linewidth=2)
    # Ours in front: an axis made by twinx is drawn last.
    top.set_zorder(right.get_zorder() + 1)
    top.patch.set_visible(False)
    _tidy(top, grid='')
    _tidy(right, grid='')
    right.spines['right'].set(visible=True, color='#B0B0B0')
    top.tick_params(axis='y', labelcolor=BLUE)
    right.tick_params(axis='y', labelcolor='#A86F00')
    top.set_title(stage, fontsize=11, color=INK, fontweight='bold')
    if column == 0:
      top.set_ylabel('loss, this run', fontsize=10, color=BLUE)
    if column == last:
      right.set_ylabel('loss, published', fontsize=10, color='#A86F00')
    for ax in (top, bottom):
      ax.set_xlim(-0.03, 1.03)
      ax.set_xticks([0, 0.5, 1], ['0', '½', '1'])
    if not any(_measured(c.clean) for c in (here, there)):
      bottom.axis('off')
      _note(bottom, 'no classifier\nin this stage')
      top.set_xlabel('fraction of the stage', fontsize=10, color=INK)
      continue
    for curve, colour in ((there, ORANGE), (here, BLUE)):
      style = {'color': colour, 'linewidth': 2}
      if curve is there:
        style['marker'] = ''
      _line(bottom, curve.x, curve.clean, **style)
      _line(bottom, curve.x, curve.robust, linestyle=DASHED, **style)
    _tidy(bottom)
    bottom.set_ylim(-2, 102)
    bottom.set_xlabel('fraction of the stage', fontsize=10, color=INK)
    if first:
      first = False
      bottom.set_ylabel('accuracy, %', fontsize=10, color=INK)
  handles = [
    Line2D([], [], color=BLUE, linewidth=2),
    Line2D([], [], color=ORANGE, linewidth=2),
    Line2D([], [], color=MUTED),
    Line2D([], [], color=MUTED, linestyle=DASHED),
  ]
  labels = [
    f'this run ({split} images)',
    f'published: {published_title} (test images)',
    'clean',
    'robust',
  ]
  _legend(figure, handles, labels)
  figure.supxlabel(
    'The runs differ in scale: compare the shape, not the level.',
    fontsize=9.5,
    color=MUTED,
  )
  return figure


def examples(
  images: Sequence[Example],
  class_names: Sequence[str],
  title: str,
  eps: float | None = None,
) -> Figure:
  """Clean images, adversarial ones with predictions, what was added.

  The perturbation is centred on mid grey and magnified so that plus or minus
  `eps` are black and white, or the largest displacement where the images leave
  the L-infinity ball of that radius, as those of other norms do.
  """
  images = list(images)[:8]
  columns = max(len(images), 1)
  pairs = [(_pixels(i.clean), _pixels(i.adversarial)) for i in images]
  largest = max((np.abs(b - a).max() for a, b in pairs), default=0.0)
  # Files hold pixels to four decimals.
  linf = eps is not None and 0 < largest <= eps + 1e-3
  span = eps if linf else largest
  factor = 0.5 / span if span else 1.0
  figure = Figure(figsize=(1.3 * max(columns, 4), 5.0), layout='constrained')
  axes = figure.subplots(3, columns, squeeze=False)
  magnified = f'perturbation × {factor:.3g}'
  figure.suptitle(f'{title}\nbottom row: {magnified}', fontsize=11, color=INK)

  def name(index: int) -> str:
    known = 0 <= index < len(class_names)
    return str(class_names[index]) if known else str(index)

  for column, (image, (clean, adversarial)) in enumerate(
    zip(images, pairs, strict=True)
  ):
    rows = (
      (clean, image.clean_prediction),
      (adversarial, image.adversarial_prediction),
    )
    for ax, (pixels, prediction) in zip(axes[:2, column], rows, strict=True):
      right = prediction == image.label
      colour = GREEN if right else VERMILLION
      ax.imshow(pixels, interpolation='nearest')
      ax.spines[:].set(color=colour, linewidth=2.2)
      ax.set_title(
        f'true: {name(image.label)}\n{"✓" if right else "✗"} '
        f'{name(prediction)}',
        fontsize=8.5,
        color=colour,
        linespacing=1.25,
      )
    added = np.clip(0.5 + factor * (adversarial - clean), 0, 1)
    axes[2, column].imshow(added, interpolation='nearest')
    axes[2, column].spines[:].set(color='#B0B0B0')
  for ax in axes.flat:
    ax.set_xticks([])
    ax.set_yticks([])
  labels = ('clean', 'adversarial', 'perturbation')
  for ax, text in zip(axes[:, 0], labels, strict=True):
    ax.set_ylabel(text, fontsize=10, color=INK)
  return figure


def _pixels(image: ArrayLike) -> np.ndarray:
  return np.clip(np.array(image, float), 0, 1)


def security(models: Sequence[SecurityCurve], title: str) -> Figure:
  """Accuracy against the radius, and against the number of steps."""
  colours = run_colours([model.run for model in models])
  figure = Figure(figsize=(8.4, 3.9), layout='constrained')
  left, right = figure.subplots(1, 2, sharey=True)
  seen: dict[str, int] = {}
  styles: list[dict[str, Any]] = []
  for model in models:
    # Models of one run share its colour: dashes and marks tell them apart.
    i = seen[model.run] = seen.get(model.run, -1) + 1
    styles.append(
      {
        'color': colours[model.run],
        'linestyle': ('-', DASHED, ':', '-.')[i % 4],
        'marker': 'os^D'[i % 4],
        'linewidth': 1.8,
        'markersize': 4.5,
      }
    )
    _line(left, *model.by_eps, **styles[-1])
    _line(right, *model.by_steps, **styles[-1])
  left.set_ylim(-2, 102)
  left.set_ylabel('accuracy, %', fontsize=10, color=INK)
  left.set_xlabel('radius eps', fontsize=10, color=INK)
  _mark_radii(left, models)
  right.set_xlabel('attack steps', fontsize=10, color=INK)
  _tidy(left)
  _tidy(right)
  steps = sorted({x for model in models for x in model.by_steps[0] if x > 0})
  if steps:
    right.set_xscale('log')
    apart = (np.log(steps[-1]) - np.log(steps[0])) / 8
    ticks = _thinned(steps, np.log, apart)
    right.set_xticks(ticks, [f'{x:g}' for x in ticks])
    right.set_xticks([], minor=True)
  if not any(_measured(model.by_eps[1]) for model in models):
    _note(left, 'not measured')
  if not steps:
    right.set_xticks([])
    _note(right, 'not measured')
  handles = [Line2D([], [], **style) for style in styles]
  labels = [model.label for model in models]
  _legend(figure, handles, labels, 'outside lower center')
  figure.suptitle(title, fontsize=11, color=INK)
  return figure


def _thinned(values: Sequence[float], scale: Any, apart: float) -> list[float]:
  """Those that are far enough from the one before, on a scale, for a label."""
  kept: list[float] = []
  for value in values:
    if not kept or scale(value) - scale(kept[-1]) >= apart:
      kept.append(value)
  return kept


def _mark_radii(ax: Axes, models: Sequence[SecurityCurve]) -> None:
  """Marks the evaluations' own radii and makes room for them on the axis."""
  own = dict(sorted((m.eps, m.eps_text) for m in models if m.eps))
  radii = [x for model in models for x in model.by_eps[0]]
  for i, (eps, text) in enumerate(own.items()):
    ax.axvline(eps, color=MUTED, linewidth=1, linestyle=DASHED, zorder=1)
    ax.annotate(
      f'eps {text}',
      (eps, 1),
      xycoords=('data', 'axes fraction'),
      xytext=(4, -2 - 11 * i),
      textcoords='offset points',
      fontsize=8.5,
      color=MUTED,
      va='top',
      bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.8},
    )
  largest = max(radii, default=0)
  if own and largest > 8 * max(own):
    # A ball large enough for everything would squeeze all else to the left.
    ax.set_xscale('symlog', linthresh=max(own), linscale=1.5)
    ax.set_xlim(-0.05 * max(own), 1.25 * largest)
    ticks = _thinned(sorted([0, *own, largest]), float, 0.2 * max(own))
    ax.set_xticks(ticks, [f'{x:.3g}' for x in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(
      f'radius eps, logarithmic above {max(own):.3g}', fontsize=10, color=INK
    )


CONFUSION_COLOURS = (
  'Blue: right, red: wrong; the darker, the larger the share of the row.'
)


def confusion(
  counts: np.ndarray,
  class_names: Sequence[str],
  title: str,
  numbers: bool = True,
) -> Figure:
  """Counts by true class (row) and predicted class (column)."""
  size = len(counts)
  side = min(max(0.42 * size, 3.6), 7.5)
  longest = max(map(len, class_names), default=0)
  room = 0.075 * min(longest, 16) if numbers else 0.3
  figure = Figure(figsize=(side + 1.2 + room, side + 1.2), layout='constrained')
  ax = figure.subplots()
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  # By the root: the few per cent that tell two classes' likeness are visible.
  depth = np.sqrt(share)
  right = np.eye(size, dtype=bool)
  ax.imshow(
    np.where(right[..., None], _tint(BLUE, depth), _tint(VERMILLION, depth)),
    interpolation='nearest',
    aspect='auto',
  )
  if numbers:
    for (i, j), value in np.ndenumerate(counts):
      if value:
        ax.text(
          j,
          i,
          f'{value:.0f}',
          ha='center',
          va='center',
          fontsize=8.5 if counts.max() < 1000 else 7,
          color='white' if depth[i, j] > 0.75 else INK,
        )
    names = [x if len(x) <= 16 else f'{x[:15]}…' for x in class_names]
    ax.set_xticks(range(size), names)
    if longest > 3:
      slanted = {'rotation': 45, 'ha': 'right', 'rotation_mode': 'anchor'}
      for label in ax.get_xticklabels():
        label.set(**slanted)
    ax.set_yticks(range(size), names)
  else:
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(10, integer=True))
  _tidy(ax, grid='')
  ax.spines[:].set(visible=True, color='#B0B0B0')
  ax.tick_params(length=0 if numbers else 3)
  kind = 'class' if numbers else 'class number'
  ax.set_xlabel(f'predicted {kind}', fontsize=10, color=INK)
  ax.set_ylabel(f'true {kind}', fontsize=10, color=INK)
  figure.suptitle(title, fontsize=10, color=INK)
  return figure


def _tint(colour: str, depth: np.ndarray) -> np.ndarray:
  """White at 0, the colour at 1."""
  return 1 - depth[..., None] * (1 - np.array(to_rgb(colour)))


def transfer(
  sources: Sequence[str],
  targets: Sequence[str],
  cells: Mapping[tuple[str, str], tuple[float, bool]],
  clean: Mapping[str, float],
  title: str,
) -> Figure:
  """Accuracy of each target on the images made on each source.

  Args:
    sources: names of the rows.
    targets: names of the columns.
    cells: {(source, target): (accuracy in percent, whether a white box)}.
    clean: {target: its accuracy without attack}, the first row.
    title: the heading.
  """
  rows = ['no attack', *sources]
  values = np.full((len(rows), len(targets)), np.nan)
  for j, target in enumerate(targets):
    values[0, j] = clean.get(target, np.nan)
    for i, source in enumerate(sources, 1):
      values[i, j] = cells.get((source, target), (np.nan, False))[0]
  names = ['\n'.join(textwrap.wrap(name, 16)) for name in targets]
  size = (max(2.6 + 1.15 * len(targets), 5.4), 1.8 + 0.5 * len(rows))
  figure = Figure(figsize=size, layout='constrained')
  ax = figure.subplots()
  known = np.isfinite(values)
  depth = np.where(known, values, 0) / 100
  pixels = np.where(known[..., None], _tint(BLUE, depth), to_rgb(FAINT))
  ax.imshow(pixels, interpolation='nearest', aspect='auto')
  for (i, j), value in np.ndenumerate(values):
    white_box = i > 0 and cells.get((rows[i], targets[j]), (0, False))[1]
    ax.text(
      j,
      i,
      f'{value:.1f}' if known[i, j] else '–',
      ha='center',
      va='center',
      fontsize=10.5,
      fontweight='bold' if white_box else 'normal',
      color='white' if depth[i, j] > 0.6 else INK,
    )
    if white_box:
      frame = Rectangle(
        (j - 0.46, i - 0.44), 0.92, 0.88, fill=False, edgecolor=INK, lw=1.6
      )
      ax.add_patch(frame)
  ax.axhline(0.5, color='white', linewidth=4)
  ax.set_xticks(range(len(targets)), names)
  ax.set_yticks(range(len(rows)), rows)
  _tidy(ax, grid='')
  ax.spines[:].set_visible(False)
  ax.tick_params(length=0, labelcolor=INK, labelsize=9.5)
  ax.set_xlabel('scored on (framed: white box)', fontsize=10, color=INK)
  ax.set_ylabel('made on', fontsize=10, color=INK)
  figure.suptitle(f'Top-1 accuracy, %\n{title}', fontsize=10, color=INK)
  return figure


def results(rows: Sequence[Result], title: str, subtitle: str = '') -> Figure:
  """Robust and clean accuracy of every model, joined by a line."""
  colours = run_colours([row.run for row in rows])
  # From the top: a heading line for each run, its rows, a little space.
  heights, headings, y = [], {}, 0.0
  for run in dict.fromkeys(row.run for row in rows):
    headings[run] = y
    y += 0.95
    for row in rows:
      if row.run == run:
        heights.append((row, y))
        y += 1.0
    y += 0.3
  figure = Figure(figsize=(8, 1.5 + 0.3 * y), layout='constrained')
  ax = figure.subplots()
  margin = ax.get_yaxis_transform()  # x in widths of the plot, y in rows
  far, near = -0.29, -0.015
  for run, height in headings.items():
    ax.text(
      far,
      height,
      run,
      transform=margin,
      fontsize=13,
      fontweight='bold',
      color=colours[run],
      va='center',
    )
  for row, height in heights:
    name = row.stage.replace('_', ' ')
    style: dict[str, Any] = {'transform': margin, 'va': 'center'}
    size = 12 if len(name) < 12 else 9
    ax.text(far + 0.02, height, name, fontsize=size, color=INK, **style)
    if row.sparsity > 0 and size == 12:  # beside a short name only
      kept = f'{100 * (1 - row.sparsity):.3g} % kept'
      ax.text(near, height, kept, fontsize=9, color=MUTED, ha='right', **style)
    _pair(ax, row, height, colours[row.run])
  ax.set_ylim(y - 0.5, -0.6)
  ax.set_xlim(-9, 109)
  ax.set_xticks(range(0, 101, 20))
  ax.set_yticks([])
  _tidy(ax, grid='x')
  ax.spines[:].set_visible(False)
  ax.tick_params(length=0, labelsize=11)
  ax.set_xlabel('top-1 accuracy, %', fontsize=11, color=MUTED)
  ax.set_title(
    title,
    fontsize=14,
    fontweight='bold',
    color=INK,
    x=far,
    ha='left',
    pad=30 if subtitle else 9,
  )
  ax.annotate(
    subtitle,
    (far, 1),
    xycoords='axes fraction',
    xytext=(0, 10),
    textcoords='offset points',
    fontsize=11,
    color=MUTED,
  )
  ax.legend(
    [_dot(MUTED, True), _dot(MUTED, False)],
    ['under attack', 'clean'],
    loc='lower right',
    bbox_to_anchor=(1.0, 1.0),
    ncols=2,
    frameon=False,
    fontsize=11,
    labelcolor=INK,
    borderaxespad=0.1,
    handletextpad=0.1,
  )
  return figure


def _dot(colour: str, filled: bool) -> Line2D:
  return Line2D(
    [],
    [],
    linestyle='',
    marker='o',
    markersize=10,
    markerfacecolor=colour if filled else 'white',
    markeredgecolor=colour,
    markeredgewidth=2.2,
  )


def _pair(ax: Axes, row: Result, height: float, colour: str) -> None:
  """A model's two accuracies, each number on the outer side of its dot."""
  ax.hlines(
    height, row.robust, row.clean, color=colour, linewidth=4.5, alpha=0.28
  )
  ax.annotate(
    row.note,
    ((row.robust + row.clean) / 2, height),
    xytext=(0, -11),
    textcoords='offset points',
    ha='center',
    va='center',
    fontsize=8.5,
    color=MUTED,
  )
  side = 1 if row.clean >= row.robust else -1
  for value, filled, outward in (
    (row.robust, True, -side),
    (row.clean, False, side),
  ):
    dot = _dot(colour, filled)
    dot.set_data([value], [height])
    dot.set_zorder(3)
    ax.add_line(dot)
    ax.annotate(
      f'{value:.1f}',
      (value, height),
      xytext=(10 * outward, -0.5),
      textcoords='offset points',
      ha='left' if outward > 0 else 'right',
      va='center',
      fontsize=11,
      fontweight='bold' if filled else 'normal',
      color=INK,
    )


def density(layers: Mapping[str, tuple[int, int]], title: str) -> Figure:
  """Weights and kept weights of each layer: `{layer: (size, kept)}`."""
  names = list(layers)
  figure = Figure(figsize=(8, 1.3 + 0.25 * len(names)), layout='constrained')
  left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
  figure.suptitle(title, fontsize=11, color=INK)
  y = np.arange(len(names))
  size = np.array([layers[name][0] for name in names], float)
  kept = np.array([layers[name][1] for name in names], float)
  # An empty layer has no place on a logarithmic axis; its bar says 0 %.
  shown = np.where(kept > 0, kept, np.nan)
  left.hlines(y, shown, size, color=BLUE, alpha=0.28, linewidth=3)
  left.plot(
    size, y, 'o', markersize=6, color='white', markeredgecolor=BLUE, mew=1.5
  )
  left.plot(shown, y, 'o', markersize=6, color=BLUE)
  left.set_xscale('log')
  left.set_yticks(y, [name.removesuffix('/kernel') for name in names])
  left.set_ylim(len(names) - 0.4, -0.6)
  left.set_xlabel('weights: kept ●, before pruning ○', fontsize=10, color=INK)
  percent = 100 * kept / np.maximum(size, 1)
  right.barh(y, percent, color=BLUE, height=0.62)
  for height, value in zip(y, percent, strict=True):
    right.text(
      value + 0.02 * max(percent.max(), 1),
      height,
      f'{value:.1f}',
      va='center',
      fontsize=8.5,
      color=MUTED,
    )
  right.set_xlim(0, 1.25 * max(percent.max(), 1))
  right.set_xlabel('kept, %', fontsize=10, color=INK)
  for ax in (left, right):
    _tidy(ax, grid='x')
    ax.tick_params(axis='y', length=0)
  left.tick_params(axis='y', labelcolor=INK, labelsize=8.5)
  return figure


def against(
  points: Sequence[Point], x_label: str, ticks: Sequence[str] = ()
) -> Figure:
  """Clean and robust accuracy, a line for each method.

  Args:
    points: x is a place among the ticks, or a number on a logarithmic axis.
    x_label: what x is.
    ticks: names of the places 0, 1, ...; methods stand beside each other there.
  """
  methods = list(dict.fromkeys(point.method for point in points))
  marks = dict.fromkeys(point.mark for point in points)
  shapes = dict(zip(marks, 'osD^v*', strict=False))
  colours = run_colours(methods)
  figure = Figure(figsize=(8.4, 4.2), layout='constrained')
  panels = figure.subplots(1, 2)
  for ax, key in zip(panels, ('clean', 'robust'), strict=True):
    for i, method in enumerate(methods):
      aside = 0.09 * (i - (len(methods) - 1) / 2) if ticks else 0.0
      drawn = sorted(p for p in points if p.method == method)
      drawn = [p for p in drawn if _measured(getattr(p, key)[:1])]
      x = [p.x + aside for p in drawn]
      y = [getattr(p, key)[0] for p in drawn]
      colour = colours[method]
      ax.plot(x, y, color=colour, linewidth=1.3, alpha=0.55)
      for point, at in zip(drawn, x, strict=True):
        height, spread = getattr(point, key)
        ax.errorbar(
          at,
          height,
          yerr=spread if np.isfinite(spread) else None,
          color=colour,
          marker=shapes.get(point.mark, 'o'),
          markersize=6,
          capsize=2,
        )
    _tidy(ax)
    ax.set_title(key, fontsize=11, color=INK, fontweight='bold')
    ax.set_xlabel(x_label, fontsize=10, color=INK)
    if ticks:
      ax.set_xticks(range(len(ticks)), ticks)
      ax.set_xlim(-0.4, len(ticks) - 0.6)
    else:
      ax.set_xscale('log')
      ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      ax.xaxis.set_major_formatter(EngFormatter())
      ax.xaxis.set_minor_locator(NullLocator())
    low, high = ax.get_ylim()
    short = max(0.0, 10 - (high - low)) / 2  # noise is not to look like much
    ax.set_ylim(low - short, high + short)
  panels[0].set_ylabel('accuracy, %', fontsize=10, color=INK)
  handles = [Line2D([], [], color=colours[m], linewidth=2) for m in methods]
  labels = list(methods)
  if not ticks:
    handles += [
      Line2D([], [], color=MUTED, marker=shape, linestyle='', markersize=6)
      for shape in shapes.values()
    ]
    labels += list(shapes)
  _legend(figure, handles, labels)
  return figure


def by_stage(rows: Sequence[StagePoint]) -> Figure:
  """Every method's stages side by side, with the published figures."""
  methods = list(dict.fromkeys(row.method for row in rows))
  by_run = run_colours([row.run for row in rows])
  colours = {row.method: by_run[row.run] for row in rows}
  size = (max(1.4 + 0.55 * len(rows), 6), 4.6)
  figure = Figure(figsize=size, layout='constrained')
  ax = figure.subplots()
  x, places, middles = 0.0, [], []
  for method in methods:
    own = [row for row in rows if row.method == method]
    middles.append(x + (len(own) - 1) / 2)
    for row in own:
      colour = colours[method]
      ax.vlines(x, row.robust, row.clean, color=colour, linewidth=4, alpha=0.25)
      for height, there, filled in (
        (row.clean, row.published_clean, False),
        (row.robust, row.published_robust, True),
      ):
        ax.hlines(there, x - 0.32, x + 0.32, color=INK, linewidth=1.4)
        dot = _dot(colour, filled)
        dot.set_data([x], [height])
        dot.set_markersize(8)
        ax.add_line(dot)
      places.append(x)
      x += 1
    x += 0.7
  ax.set_xticks(places, [row.stage for row in rows])
  for label in ax.get_xticklabels():
    label.set(rotation=40, ha='right', rotation_mode='anchor')
  for method, middle in zip(methods, middles, strict=True):
    ax.annotate(
      '\n'.join(textwrap.wrap(method, 15)),
      (middle, 1),
      xycoords=('data', 'axes fraction'),
      xytext=(0, 4),
      textcoords='offset points',
      ha='center',
      va='bottom',
      fontsize=9.5,
      fontweight='bold',
      color=colours[method],
    )
  ax.set_ylim(-3, 103)
  ax.set_xlim(-0.8, x - 0.9)
  _tidy(ax)
  ax.tick_params(axis='x', labelcolor=INK)
  ax.set_ylabel('accuracy, %', fontsize=10, color=INK)
  handles = [_dot(MUTED, False), _dot(MUTED, True)]
  handles.append(Line2D([], [], color=INK, linewidth=1.4))
  _legend(figure, handles, ['clean', 'robust', 'published'])
  return figure


def histograms(panels: Mapping[str, Sequence[Histogram]]) -> Figure:
  """Counts on a logarithmic axis, a panel for each quantity."""
  size = (4.4 * max(len(panels), 1), 3.8)
  figure = Figure(figsize=size, layout='constrained')
  axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
  for ax, (label, drawn) in zip(axes, panels.items(), strict=True):
    # The later the thinner: lines that agree are seen all the same.
    styles = ((ORANGE, 3.6, '-'), (BLUE, 1.8, '-'), (INK, 1.2, DASHED))
    for histogram, (colour, width, dashes) in zip(drawn, styles, strict=False):
      ax.stairs(
        histogram.counts,
        histogram.edges,
        color=colour,
        linewidth=width,
        linestyle=dashes,
        label=histogram.name,
      )
    ax.set_yscale('log')
    # Room for the legend above the highest bar.
    ax.set_ylim(0.7, 12 * max((max(h.counts) for h in drawn), default=1))
    _tidy(ax)
    ax.set_xlabel(label, fontsize=10, color=INK)
    ax.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc='upper right')
  axes[0].set_ylabel('weights', fontsize=10, color=INK)
  return figure


def overview(stages: Sequence[tuple[str, str, str, str]]) -> Figure:
  """The method at a glance: a box for each stage, left to right.

  A stage is (name, what happens in a line, what it trains, what it freezes);
  either of the last two may be empty.
  """
  count = max(len(stages), 1)
  width, gap, pitch = 2.3, 0.38, 0.205
  # A slot for each kind of text, as high as its longest entry needs.
  texts = [
    (textwrap.wrap(what, 24), textwrap.wrap(on, 18), textwrap.wrap(off, 18))
    for _, what, on, off in stages
  ]
  slots = [max((len(text[i]) for text in texts), default=0) for i in range(3)]
  tops = [0.6 + pitch * sum(slots[:i]) + 0.13 * i for i in range(3)]
  height = tops[2] + pitch * slots[2] + 0.16
  total = count * width + (count - 1) * gap
  figure = Figure(figsize=(total + 0.1, height + 0.1))
  ax = figure.add_axes((0, 0, 1, 1))
  ax.set_xlim(-0.05, total + 0.05)
  ax.set_ylim(height + 0.05, -0.05)
  ax.axis('off')

  def write(x: float, y: float, lines: Sequence[str], **style) -> None:
    # Line by line: neighbours of another size or weight share the baseline.
    for i, line in enumerate(lines):
      ax.text(x, y + 0.14 + pitch * i, line, va='baseline', **style)

  for i, (stage, text) in enumerate(zip(stages, texts, strict=True)):
    left = i * (width + gap)
    box = FancyBboxPatch(
      (left + 0.06, 0.06),
      width - 0.12,
      height - 0.12,
      boxstyle='round,pad=0.05,rounding_size=0.12',
      facecolor='#F4F8FB',
      edgecolor=BLUE,
      linewidth=1.4,
    )
    ax.add_patch(box)
    x = left + 0.16
    title = {'fontsize': 14, 'fontweight': 'bold'}
    write(x, 0.24, [f'{i + 1}'], color=BLUE, **title)
    write(x + 0.22, 0.24, [stage[0]], color=INK, **title)
    write(x, tops[0], text[0], fontsize=11, color=INK)
    rows = (('trains', GREEN), ('fixed', MUTED))
    for (label, colour), lines, y in zip(rows, text[1:], tops[1:], strict=True):
      if lines:
        write(x, y, [label], fontsize=10.5, fontweight='bold', color=colour)
        write(x + 0.57, y, lines, fontsize=10.5, color=colour)
    if i + 1 < count:
      arrow = FancyArrowPatch(
        (left + width + 0.02, height / 2),
        (left + width + gap - 0.02, height / 2),
        arrowstyle='-|>',
        mutation_scale=16,
        linewidth=1.8,
        color=INK,
        shrinkA=0,
        shrinkB=0,
      )
      ax.add_patch(arrow)
  return figure
