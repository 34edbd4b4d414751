"""models/shapes.py: what is remembered, and for which dtypes."""

import jax
import jax.numpy as jnp

from dppp_jax.models import shapes


def test_is_traced_once_for_each_width_of_numbers():
  calls = []

  @shapes.remembered
  def trace(size, *, name="a"):
    calls.append((size, name))
    return {name: {"x": jax.eval_shape(lambda: jnp.zeros(size, float))}}

  first = trace(3)
  assert first["a"]["x"].dtype == jnp.float32 and first["a"]["x"].shape == (3,)
  with jax.enable_x64(True):
    assert trace(3)["a"]["x"].dtype == jnp.float64
  assert trace(3)["a"]["x"].dtype == jnp.float32
  assert calls == [(3, "a")] * 2
  assert trace(3, name="b")["b"]["x"].shape == (3,)
  # A caller may change the dicts that it was given.
  first["a"].clear()
  assert trace(3)["a"]["x"].shape == (3,)
