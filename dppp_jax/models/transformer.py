"""Transformer blocks under CLIP's parameter names, and stacks of them."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import types
from dppp_jax.models import attention, layers
from dppp_jax.models import packing as packing_lib


class SelfAttention(nn.Module):
  """Multi-head self-attention with biases; optionally for chosen rows only.

  Attributes:
    heads: number of heads; divides the width.
    depth: number of blocks of the tower, for the initialisation.
    causal: row i sees rows 0..i only.
    dtype: of the matrix products.
  """

  heads: int
  depth: int
  causal: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: types.Array,
    rows: types.Array | int | None = None,
    packing: packing_lib.Packing | None = None,
  ) -> jax.Array:
    """Attends; the arguments are those of `Block`."""
    width = x.shape[-1]
    linear = lambda name, std: layers.Linear(
      width,
      width,
      kernel_init=nn.initializers.normal(std),
      dtype=self.dtype,
      name=name,
    )
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
    std = width**-0.5
    std_in = std * (2 * self.depth) ** -0.5
    asking = x if rows is None else layers.take_rows(x, rows)
    query = split(linear("q_proj", std_in)(asking))
    key, value = linear("k_proj", std_in), linear("v_proj", std_in)
    if packing is not None:
      y = packing.attend(query, split(key(x)), split(value(x)))
    elif rows is None or not self.causal:
      y = attention.of_linear(query, x, key, value, causal=self.causal)
    else:
      last = jnp.broadcast_to(jnp.asarray(rows), x.shape[:1])
      visible = jnp.arange(x.shape[1])[None] <= last[:, None]
      y = attention.of_linear(query, x, key, value, mask=visible[:, None])
    return linear("out_proj", std)(y.reshape(*y.shape[:-2], width))


class Mlp(nn.Module):
  """Two linear layers with an activation between (`fc1`, `fc2`)."""

  hidden: int
  depth: int
  act: str
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [..., D] for x [..., D]."""
    width = x.shape[-1]
    linear = lambda given, features, std, name: layers.Linear(
      given,
      features,
      kernel_init=nn.initializers.normal(std),
      dtype=self.dtype,
      name=name,
    )
    fc1 = linear(width, self.hidden, (2 * width) ** -0.5, "fc1")
    x = fc1(x, layers.activation(self.act))
    std = (2 * width * self.depth) ** -0.5
    return linear(self.hidden, width, std, "fc2")(x)


class Block(nn.Module):
  """One pre-norm transformer block, under CLIP's parameter names."""

  heads: int
  hidden: int
  depth: int
  act: str
  epsilon: float
  causal: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: types.Array,
    rows: types.Array | int | None = None,
    packing: packing_lib.Packing | None = None,
  ) -> jax.Array:
    """Runs the block, for all rows or exactly for those that are needed.

    Args:
      x: [B, N, D] in `stream_dtype`; the stack [R, D] of a packing.
      rows: those whose output is wanted: int [B] or one int, the row of each
        sequence; a packing's `last_rows`. The others are still looked at, as
        keys and values.
      packing: what the rows of a stack are.

    Returns:
      x's shape; [B, 1, D], or [B * T, D] of a packing, where rows are given.
    """
    norm = lambda name: layers.LayerNorm(self.epsilon, self.dtype, name=name)
    y = norm("layer_norm1")(x)
    y = SelfAttention(
      self.heads, self.depth, self.causal, self.dtype, name="self_attn"
    )(y, rows, packing)
    x = (x if rows is None else layers.take_rows(x, rows)) + y
    y = norm("layer_norm2")(x)
    return x + Mlp(self.hidden, self.depth, self.act, self.dtype, name="mlp")(y)


class Encoder(nn.Module):
  """A stack of blocks (`layers_0` ...) that returns what was asked for.

  Attributes:
    config: has the fields of Hugging Face's transformer configurations:
      num_hidden_layers, num_attention_heads, intermediate_size, hidden_act,
      layer_norm_eps.
    causal: row i sees rows 0..i only.
    remat: recompute the blocks in the backward pass instead of storing them.
    dtype: of the matrix products.
  """

  config: Any
  causal: bool = False
  remat: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: types.Array,
    *,
    taps: Sequence[int] = (),
    rows: types.Array | int | None = None,
    packing: packing_lib.Packing | None = None,
  ) -> tuple[jax.Array, dict[int, jax.Array]]:
    """Runs all blocks.

    Args:
      x: as in `Block`.
      taps: which states to return whole: 0 is x, i the output of block i.
      rows: as in `Block`, for the last block; not where `taps` asks for it.
      packing: as in `Block`.

    Returns:
      The output of the last block, as in `Block`, and {tap: state}.
    """
    config = self.config
    depth = config.num_hidden_layers
    states = {0: x}
    for i in range(depth):
      is_last = i + 1 == depth
      # The last block comes first in the backward pass: storing it is free.
      remat = self.remat and not is_last
      block = nn.remat(Block, static_argnums=3) if remat else Block
      x = block(
        config.num_attention_heads,
        config.intermediate_size,
        depth,
        config.hidden_act,
        config.layer_norm_eps,
        self.causal,
        self.dtype,
        name=f"layers_{i}",
      )(x, rows if is_last else None, packing)
      states[i + 1] = x
    return x, {tap: states[tap] for tap in taps}
