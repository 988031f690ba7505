"""Clean and robust accuracy of runs, stages and sizes."""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from rocl_jax.figures.names import picture, short
from rocl_jax.figures.style import (
  INK,
  MUTED,
  legend,
  marker,
  measured,
  run_colours,
  tidy,
)


class Result(NamedTuple):
  """Accuracy in percent of one evaluated model."""

  run: str
  stage: str
  sparsity: float
  clean: float
  robust: float
  note: str = ''  # how it was measured, where that differs from the rest


@picture
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
      short(run, 28),
      transform=margin,
      fontsize=13,
      fontweight='bold',
      color=colours[run],
      va='center',
    )
  for row, height in heights:
    name = short(row.stage.replace('_', ' '), 24)
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
  tidy(ax, grid='x')
  ax.spines[:].set_visible(False)
  ax.tick_params(length=0, labelsize=11)
  ax.set_xlabel('top-1 accuracy, %', fontsize=11, color=MUTED)
  ax.set_title(
    short(title, 70),
    fontsize=14,
    fontweight='bold',
    color=INK,
    x=far,
    ha='left',
    pad=30 if subtitle else 9,
  )
  ax.annotate(
    short(subtitle, 75),
    (far, 1),
    xycoords='axes fraction',
    xytext=(0, 10),
    textcoords='offset points',
    fontsize=11,
    color=MUTED,
  )
  ax.legend(
    [marker(MUTED, True), marker(MUTED, False)],
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


def _pair(ax: Axes, row: Result, height: float, colour: str) -> None:
  """A model's two accuracies, each number on the outer side of its dot."""
  ax.hlines(
    height, row.robust, row.clean, color=colour, linewidth=4.5, alpha=0.28
  )
  low, high = sorted((row.robust, row.clean))
  if high - low > 25:  # room below the line
    place: dict[str, Any] = {'xy': ((low + high) / 2, height), 'ha': 'center'}
    place['xytext'] = (0, -11)
  elif high < 55:  # outside of the two numbers
    place = {'xy': (high, height), 'xytext': (44, 0), 'ha': 'left'}
  else:
    place = {'xy': (low, height), 'xytext': (-44, 0), 'ha': 'right'}
  ax.annotate(
    short(row.note, 60),
    **place,
    textcoords='offset points',
    va='center',
    fontsize=8.5,
    color=MUTED,
  )
  side = 1 if row.clean >= row.robust else -1
  for value, filled, outward in (
    (row.robust, True, -side),
    (row.clean, False, side),
  ):
    dot = marker(colour, filled)
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


@picture
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
      drawn = [p for p in drawn if measured(getattr(p, key)[:1])]
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
    tidy(ax)
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
    more = max(0.0, 10 - (high - low)) / 2  # noise is not to look like much
    ax.set_ylim(low - more, high + more)
  panels[0].set_ylabel('accuracy, %', fontsize=10, color=INK)
  handles = [Line2D([], [], color=colours[m], linewidth=2) for m in methods]
  labels = [short(method, 30) for method in methods]
  if not ticks:
    handles += [
      Line2D([], [], color=MUTED, marker=shape, linestyle='', markersize=6)
      for shape in shapes.values()
    ]
    labels += list(shapes)
  legend(figure, handles, labels)
  return figure


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


@picture
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
        dot = marker(colour, filled)
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
  tidy(ax)
  ax.tick_params(axis='x', labelcolor=INK)
  ax.set_ylabel('accuracy, %', fontsize=10, color=INK)
  handles = [marker(MUTED, False), marker(MUTED, True)]
  handles.append(Line2D([], [], color=INK, linewidth=1.4))
  legend(figure, handles, ['clean', 'robust', 'published'])
  return figure
