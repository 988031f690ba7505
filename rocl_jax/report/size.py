"""How large a network is on disk."""

from collections.abc import Mapping

from rocl_jax.report.reproduction import Model, Reproduction


def packed(found: Reproduction, model: Model) -> int | None:
  """Bytes of a model packed, where its layers and parameters are known."""
  layers = found.layers(model)
  for record in found.records(model, 'pgd10').values():
    names, parameters = record.get('class_names'), record.get('parameters')
    if layers and isinstance(parameters, int) and isinstance(names, list):
      return packed_bytes(layers, parameters, len(names))
  return None


def packed_bytes(
  layers: Mapping[str, tuple[int, int]], parameters: int, classes: int
) -> int:
  """Bytes of a network packed without further compression.

  Two for each number, as float16: kept weights, BatchNorm's scales, biases,
  means and variances, and the classifier's biases. Where it is pruned, a bit
  for each weight says whether it was kept.

  Args:
    layers: {path: (size, kept)} of the weights that can be pruned.
    parameters: all that is trained, pruned weights included.
    classes: of the classifier.
  """
  size = sum(size for size, _ in layers.values())
  kept = sum(kept for _, kept in layers.values())
  rest = parameters - size  # BatchNorm's scales and biases, the head's biases
  statistics = rest - classes  # a mean for each scale, a variance for each bias
  mask = -(-size // 8) if kept < size else 0
  return 2 * (kept + rest + statistics) + mask
