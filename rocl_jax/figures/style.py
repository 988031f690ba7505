"""Colours, axes and legends that all pictures share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

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
      red, green, blue = tint(RUN_COLOURS[method], depth)
      colours[run] = to_hex((red, green, blue))
    else:
      colours[run] = OTHER_COLOURS[others % len(OTHER_COLOURS)]
      others += 1
  return colours


def tidy(ax: Axes, grid: str = 'y') -> None:
  """Light axes; grid lines of one of them, or of neither."""
  ax.spines[['top', 'right']].set_visible(False)
  ax.spines[['left', 'bottom']].set_color('#B0B0B0')
  ax.tick_params(colors=MUTED, labelsize=9, length=3)
  ax.set_axisbelow(True)
  if grid:
    ax.grid(axis=grid, color=FAINT, linewidth=0.8)  # type: ignore[arg-type]


def line(ax: Axes, x: Sequence[float], y: Sequence[float], **style) -> None:
  """A line through the measured points; a lone point needs a marker."""
  points = np.array([x, y], float)
  points = points[:, np.isfinite(points).all(axis=0)]
  if points.shape[1] == 0:
    return
  if points.shape[1] < 12:
    style = {'marker': 'o', 'markersize': 3.2} | style
  ax.plot(*points, **style)


def measured(values: Sequence[float]) -> bool:
  """Whether there is anything to draw."""
  return bool(np.isfinite(np.array(values, float)).any())


def whole_epochs(ax: Axes) -> None:
  """Ticks at whole numbers, around a lone one too."""
  low, high = ax.get_xlim()
  ax.set_xlim(min(low, high - 1), max(high, low + 1))
  ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def note(ax: Axes, text: str) -> None:
  """Says in an empty panel why it is empty."""
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


def legend(
  figure: Figure,
  handles: list,
  labels: list[str],
  loc: Any = 'outside upper center',
) -> None:
  """The figure's legend, in as few full rows as fit its width."""
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


def tint(colour: str, depth: np.ndarray) -> np.ndarray:
  """White at 0, the colour at 1."""
  return 1 - depth[..., None] * (1 - np.array(to_rgb(colour)))


def marker(colour: str, filled: bool) -> Line2D:
  """A dot, for a legend or, with its place set, an axis."""
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
