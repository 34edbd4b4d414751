"""Times, sizes and classes as vectors."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import types
from dppp_jax.models import layers


def sinusoid(
  positions: types.Array,
  dim: int,
  *,
  flip_sin_to_cos: bool = True,
  freq_shift: float = 0,
) -> jax.Array:
  """Returns sines and cosines of real numbers.

  sin(p * 10000 ** (-i / (dim / 2 - shift))) for i in 0 .. dim / 2 - 1. Time
  steps need not be whole (some schedules have 964.55 between 965 and 964).

  Args:
    positions: [B], any real type. float32 inside: in bfloat16 a size of 1250
      would be 1248.
    dim: even.
    flip_sin_to_cos: the cosines come first.
    freq_shift: in the exponent.

  Returns:
    [B, dim] in float32, or in float64 for float64 positions.
  """
  positions = jnp.asarray(positions)
  wide = jnp.promote_types(positions.dtype, jnp.float32)
  half = dim // 2
  # Rounded at each step as torch does it: at 1000 steps a last digit of the
  # frequency is the fifth digit of the sine.
  numpy_type = np.dtype(wide).type
  exponents = numpy_type(-math.log(10000)) * np.arange(half, dtype=wide)
  frequencies = np.exp(exponents / numpy_type(half - freq_shift))
  angles = positions.astype(wide)[:, None] * frequencies[None]
  parts = [jnp.sin(angles), jnp.cos(angles)]
  return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class TimestepEmbedding(nn.Module):
  """Two linear layers (`linear_1`, `linear_2`) over a sinusoid.

  Attributes:
    features: E.
    act: activation between the layers.
    post_act: after them, or None.
    condition_dim: width C of a condition (`cond_proj`), or None for none.
    dtype: of the matrix products.
  """

  features: int
  act: str = "silu"
  post_act: str | None = None
  condition_dim: int | None = None
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: types.Array, condition: types.Array | None = None
  ) -> jax.Array:
    """Returns [B, E] for x [B, D] and a condition [B, C]; None is zero."""
    if self.condition_dim is not None:
      if condition is None:
        condition = jnp.zeros((x.shape[0], self.condition_dim), x.dtype)
      project = nn.Dense(
        x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj"
      )
      x = x + project(condition)
    x = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x)
    x = layers.activation(self.act)(x)
    x = nn.Dense(self.features, dtype=self.dtype, name="linear_2")(x)
    return layers.activation(self.post_act)(x) if self.post_act else x
