"""The four stages of the method."""

import textwrap
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from rocl_jax.figures.names import picture, short
from rocl_jax.figures.style import BLUE, GREEN, INK, MUTED


@picture
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
    write(x + 0.22, 0.24, [short(stage[0], 14)], color=INK, **title)
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
