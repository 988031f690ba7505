"""Images before and after an attack."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from rocl_jax.figures.names import picture, short
from rocl_jax.figures.style import GREEN, INK, VERMILLION


class Example(NamedTuple):
  """One image before and after the attack, H x W x 3 in [0, 1]."""

  label: int
  clean_prediction: int
  adversarial_prediction: int
  clean: ArrayLike
  adversarial: ArrayLike


@picture
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
  title = f'{short(title, 22 * max(columns, 4) // 2)}\nbottom row: {magnified}'
  figure.suptitle(title, fontsize=11, color=INK)

  def name(index: int) -> str:
    if index < 0:  # see `logits.INVALID`
      return 'invalid'
    known = index < len(class_names)
    return short(str(class_names[index]), 14) if known else str(index)

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
