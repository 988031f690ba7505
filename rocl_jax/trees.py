"""Nested dicts of parameters as flat dicts by path, and back."""

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[str, Any]


def flatten(tree: Tree) -> Tree:
  """{'encoder': {'stem': {'kernel': x}}} -> {'encoder/stem/kernel': x}."""
  return flatten_dict(tree, sep='/')


def unflatten(flat: Tree) -> Tree:
  """The inverse of `flatten`."""
  return unflatten_dict(flat, sep='/')
