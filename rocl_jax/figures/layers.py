"""What pruning leaves of each layer."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from rocl_jax.figures.names import picture, short
from rocl_jax.figures.style import (
  BLUE,
  DASHED,
  INK,
  MUTED,
  ORANGE,
  tidy,
)


@picture
def density(layers: Mapping[str, tuple[int, int]], title: str) -> Figure:
  """Weights and kept weights of each layer: `{layer: (size, kept)}`."""
  names = list(layers)
  figure = Figure(figsize=(8, 1.3 + 0.25 * len(names)), layout='constrained')
  left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.2, 1))
  figure.suptitle(short(title, 90), fontsize=11, color=INK)
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
  left.xaxis.set_major_formatter(EngFormatter(sep=''))
  left.set_yticks(y, [short(n.removesuffix('/kernel'), 40) for n in names])
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
    tidy(ax, grid='x')
    ax.tick_params(axis='y', length=0)
  left.tick_params(axis='y', labelcolor=INK, labelsize=8.5)
  return figure


class Histogram(NamedTuple):
  """Counts between edges, under a name."""

  name: str
  edges: Sequence[float]
  counts: Sequence[float]


@picture
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
        label=short(histogram.name, 40),
      )
    ax.set_yscale('log')
    ax.yaxis.set_major_formatter(EngFormatter(sep=''))
    # Room for the legend above the highest bar.
    ax.set_ylim(0.7, 12 * max((max(h.counts) for h in drawn), default=1))
    tidy(ax)
    ax.set_xlabel(short(label, 50), fontsize=10, color=INK)
    ax.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc='upper right')
  axes[0].set_ylabel('weights', fontsize=10, color=INK)
  return figure
