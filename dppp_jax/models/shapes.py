"""Shapes of parameters, found by tracing and remembered."""

from collections.abc import Callable
import functools
from typing import Any

import jax

from dppp_jax import types


def remembered(
  trace: Callable[..., types.Params],
) -> Callable[..., types.Params]:
  """Remembers what a function of configurations traces: it takes seconds.

  JAX traces other dtypes where it has 64 bits, and so these are remembered
  apart. Every call returns dicts of its own.

  Args:
    trace: (config, options) -> tree of ShapeDtypeStructs, all hashable.
  """

  @functools.lru_cache(maxsize=8)
  def known(has_64_bits: bool, *args: Any, **options: Any) -> types.Params:
    del has_64_bits
    return trace(*args, **options)

  @functools.wraps(trace)
  def shapes(*args: Any, **options: Any) -> types.Params:
    tree = known(jax.config.jax_enable_x64, *args, **options)
    return jax.tree.map(lambda leaf: leaf, tree)

  return shapes
