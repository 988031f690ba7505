"""Curves of training, alone and over the published ones."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rocl_jax.figures.names import picture, short
from rocl_jax.figures.style import (
  BLUE,
  DASHED,
  INK,
  MUTED,
  ORANGE,
  legend,
  line,
  measured,
  note,
  run_colours,
  tidy,
  whole_epochs,
)


class Curve(NamedTuple):
  """One run's progress through one stage; NaN where nothing was measured."""

  run: str
  x: Sequence[float]
  loss: Sequence[float]
  clean: Sequence[float]
  robust: Sequence[float]


@picture
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
    stage: any(measured([*curve.clean, *curve.robust]) for curve in drawn)
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
      line(top, curve.x, curve.loss, **style)
      if bottom is not None:
        line(bottom, curve.x, curve.clean, markerfacecolor='white', **style)
        line(bottom, curve.x, curve.robust, linestyle=DASHED, **style)
    top.set_title(short(stage, 26), fontsize=11, color=INK, fontweight='bold')
    tidy(top)
    whole_epochs(top)
    if column == 0:
      top.set_ylabel('training loss', fontsize=10, color=INK)
    if bottom is not None and followed[stage]:
      tidy(bottom)
      whole_epochs(bottom)
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
        note(bottom, 'no classifier\nin this stage')
      else:
        note(bottom, 'accuracy not measured\nduring training')
  handles = [
    Line2D([], [], color=colours[run], linewidth=2.2 if i == 0 else 1.4)
    for i, run in enumerate(dict.fromkeys(runs))
  ]
  labels = [short(run, 30) for run in dict.fromkeys(runs)]
  if rows == 2:
    for dashes, face in (('-', 'white'), (DASHED, MUTED)):
      handle = Line2D([], [], color=MUTED, linewidth=1.4)
      handle.set(linestyle=dashes, marker='o', markersize=3.2)
      handle.set_markerfacecolor(face)
      handles.append(handle)
    labels += ['clean', 'robust']
  legend(figure, handles, labels)
  return figure


@picture
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
    line(right, there.x, there.loss, color=ORANGE, linewidth=2, marker='')
    line(top, here.x, here.loss, color=BLUE, linewidth=2)
    # Ours in front: an axis made by twinx is drawn last.
    top.set_zorder(right.get_zorder() + 1)
    top.patch.set_visible(False)
    tidy(top, grid='')
    tidy(right, grid='')
    right.spines['right'].set(visible=True, color='#B0B0B0')
    top.tick_params(axis='y', labelcolor=BLUE)
    right.tick_params(axis='y', labelcolor='#A86F00')
    top.set_title(short(stage, 26), fontsize=11, color=INK, fontweight='bold')
    if column == 0:
      top.set_ylabel('loss, this run', fontsize=10, color=BLUE)
    if column == last:
      right.set_ylabel('loss, published', fontsize=10, color='#A86F00')
    for ax in (top, bottom):
      ax.set_xlim(-0.03, 1.03)
      ax.set_xticks([0, 0.5, 1], ['0', '½', '1'])
    if not any(measured(c.clean) for c in (here, there)):
      bottom.axis('off')
      note(bottom, 'no classifier\nin this stage')
      top.set_xlabel('fraction of the stage', fontsize=10, color=INK)
      continue
    for curve, colour in ((there, ORANGE), (here, BLUE)):
      style = {'color': colour, 'linewidth': 2}
      if curve is there:
        style['marker'] = ''
      line(bottom, curve.x, curve.clean, **style)
      line(bottom, curve.x, curve.robust, linestyle=DASHED, **style)
    tidy(bottom)
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
  legend(figure, handles, labels)
  figure.supxlabel(
    'The runs differ in scale: compare the shape, not the level.',
    fontsize=9.5,
    color=MUTED,
  )
  return figure
