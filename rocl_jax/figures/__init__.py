"""The pictures of a report: numbers in, a matplotlib Figure out.

  figure = figures.results([Result('ours', 'finetune', 0.9, 76.6, 48.6)], '')
  figure.savefig('results.png', dpi=figures.DPI)

Nothing here reads or writes a file, and nothing touches pyplot's global state.
"""

from rocl_jax.figures.accuracy import (
  Point,
  Result,
  StagePoint,
  against,
  by_stage,
  results,
)
from rocl_jax.figures.images import Example, examples
from rocl_jax.figures.layers import Histogram, density, histograms
from rocl_jax.figures.method import overview
from rocl_jax.figures.names import MissingGlyphs, printable, short
from rocl_jax.figures.robustness import (
  CONFUSION_COLOURS,
  SecurityCurve,
  confusion,
  security,
  transfer,
)
from rocl_jax.figures.style import BLUE, DPI, INK, MUTED, run_colours
from rocl_jax.figures.training import Curve, against_published, curves

__all__ = [
  'BLUE',
  'CONFUSION_COLOURS',
  'Curve',
  'DPI',
  'Example',
  'Histogram',
  'INK',
  'MissingGlyphs',
  'MUTED',
  'Point',
  'Result',
  'SecurityCurve',
  'StagePoint',
  'against',
  'against_published',
  'by_stage',
  'confusion',
  'curves',
  'density',
  'examples',
  'histograms',
  'overview',
  'printable',
  'results',
  'run_colours',
  'security',
  'short',
  'transfer',
]
