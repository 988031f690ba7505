"""What attacks do: security curves, confusions, transfers."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from rocl_jax.figures.names import picture, short
from rocl_jax.figures.style import (
  BLUE,
  DASHED,
  FAINT,
  INK,
  MUTED,
  VERMILLION,
  legend,
  line,
  measured,
  note,
  run_colours,
  tidy,
  tint,
)


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


@picture
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
    line(left, *model.by_eps, **styles[-1])
    line(right, *model.by_steps, **styles[-1])
  left.set_ylim(-2, 102)
  left.set_ylabel('accuracy, %', fontsize=10, color=INK)
  left.set_xlabel('radius eps', fontsize=10, color=INK)
  _mark_radii(left, models)
  right.set_xlabel('attack steps', fontsize=10, color=INK)
  tidy(left)
  tidy(right)
  steps = sorted({x for model in models for x in model.by_steps[0] if x > 0})
  if steps:
    right.set_xscale('log')
    apart = (np.log(steps[-1]) - np.log(steps[0])) / 8
    ticks = _thinned(steps, np.log, apart)
    right.set_xticks(ticks, [f'{x:g}' for x in ticks])
    right.set_xticks([], minor=True)
  if not any(measured(model.by_eps[1]) for model in models):
    note(left, 'not measured')
  if not steps:
    right.set_xticks([])
    note(right, 'not measured')
  handles = [Line2D([], [], **style) for style in styles]
  labels = [short(model.label, 44) for model in models]
  legend(figure, handles, labels, 'outside lower center')
  figure.suptitle(short(title, 80), fontsize=11, color=INK)
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
  'Blue: right, orange: wrong; the darker, the larger the share of the row.'
)


@picture
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
    np.where(right[..., None], tint(BLUE, depth), tint(VERMILLION, depth)),
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
    names = [short(name, 16) for name in class_names]
    ax.set_xticks(range(size), names)
    if longest > 3:
      slanted = {'rotation': 45, 'ha': 'right', 'rotation_mode': 'anchor'}
      for label in ax.get_xticklabels():
        label.set(**slanted)
    ax.set_yticks(range(size), names)
  else:
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(10, integer=True))
  tidy(ax, grid='')
  ax.spines[:].set(visible=True, color='#B0B0B0')
  ax.tick_params(length=0 if numbers else 3)
  kind = 'class' if numbers else 'class number'
  ax.set_xlabel(f'predicted {kind}', fontsize=10, color=INK)
  ax.set_ylabel(f'true {kind}', fontsize=10, color=INK)
  title = _wrapped(title, int(13 * figure.get_figwidth()))
  figure.suptitle(title, fontsize=10, color=INK)
  return figure


@picture
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
  names = [_wrapped(name, 16) for name in targets]
  size = (max(2.6 + 1.15 * len(targets), 5.4), 1.8 + 0.5 * len(rows))
  figure = Figure(figsize=size, layout='constrained')
  ax = figure.subplots()
  known = np.isfinite(values)
  depth = np.where(known, values, 0) / 100
  pixels = np.where(known[..., None], tint(BLUE, depth), to_rgb(FAINT))
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
  ax.set_yticks(range(len(rows)), [short(name, 40) for name in rows])
  tidy(ax, grid='')
  ax.spines[:].set_visible(False)
  ax.tick_params(length=0, labelcolor=INK, labelsize=9.5)
  ax.set_xlabel('scored on (framed: white box)', fontsize=10, color=INK)
  ax.set_ylabel('made on', fontsize=10, color=INK)
  figure.suptitle(
    f'Top-1 accuracy, %\n{short(title, 70)}', fontsize=10, color=INK
  )
  return figure


def _wrapped(text: str, width: int) -> str:
  return '\n'.join(textwrap.wrap(short(text, 4 * width), width))
