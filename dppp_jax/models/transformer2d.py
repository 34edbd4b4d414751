"""The transformers between the convolutions of UNets and ControlNets.

What the text gives to a transformer, the keys and values of its cross
attentions, does not change from one denoising step to the next. It is
therefore a value of its own: `text` makes it, `__call__` takes it, and a
sampler makes it once.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import devices, types
from dppp_jax.models import attention, convolution, layers, resnet2d

# Logits that are more than a core's cache holds.
_LARGE = 2**21

# Keys and values of the attentions that look at the text, of one block:
# {"attn2": (key, value)}, each [B, L, heads, d].
KeysValues = dict[str, tuple[jax.Array, jax.Array]]


class Attention(nn.Module):
  """Multi-head attention of pixels to themselves or to the text.

  Attributes:
    width: D of the pixels.
    heads: number of heads; divides the width.
    bias: queries, keys and values have biases (the VAE's do).
    dtype: of the matrix products.
  """

  width: int
  heads: int
  bias: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):  # noqa: D102
    dense = lambda bias: nn.Dense(self.width, use_bias=bias, dtype=self.dtype)
    self.to_q = dense(self.bias)
    self.to_k = dense(self.bias)
    self.to_v = dense(self.bias)
    self.to_out_0 = dense(True)

  def text(self, context: types.Array) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values [B, L, heads, d] of a text [B, L, C]."""
    return self._split(self.to_k(context)), self._split(self.to_v(context))

  def __call__(
    self,
    x: types.Array,
    text: tuple[types.Array, types.Array] | None = None,
    *,
    chunk: int | None = None,
  ) -> jax.Array:
    """Attends.

    Args:
      x: [B, N, D].
      text: keys and values of `text`; None: those of x itself.
      chunk: see `chunked_attention`.

    Returns:
      [B, N, D], without the residual sum.
    """
    key, value = self.text(x) if text is None else text
    query = self._split(self.to_q(x))
    if chunk is None:
      y = row_by_row(query, key, value)
    else:
      y = chunked_attention(query, key, value, chunk=chunk)
    return self.to_out_0(y.reshape(*y.shape[:-2], self.width))

  def _split(self, x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], self.heads, -1)


class Geglu(nn.Module):
  """A linear layer whose second half gates the first by an exact GELU."""

  features: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [..., features] for x [..., D]."""
    x = nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x)
    hidden, gate = jnp.split(x, 2, axis=-1)
    return hidden * layers.activation("gelu")(gate)


class FeedForward(nn.Module):
  """Gated, four times as wide inside (`net_0`, `net_2`)."""

  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [B, N, D] for x [B, N, D]."""
    width = x.shape[-1]
    x = Geglu(4 * width, self.dtype, name="net_0")(x)
    return nn.Dense(width, dtype=self.dtype, name="net_2")(x)


class TransformerBlock(nn.Module):
  """Self attention, attention to the text, feed forward; norms before each.

  Attributes:
    width: D.
    heads: attention heads.
    cross_only: the first attention looks at the text as well.
    dtype: of the matrix products.
  """

  width: int
  heads: int
  cross_only: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):  # noqa: D102
    self.norm1 = layers.LayerNorm()
    self.attn1 = Attention(self.width, self.heads, dtype=self.dtype)
    self.norm2 = layers.LayerNorm()
    self.attn2 = Attention(self.width, self.heads, dtype=self.dtype)
    self.norm3 = layers.LayerNorm()
    self.ff = FeedForward(self.dtype)

  def text(self, context: types.Array) -> KeysValues:
    """Returns what the block takes from a text [B, L, C]."""
    found = {"attn2": self.attn2.text(context)}
    if self.cross_only:
      found["attn1"] = self.attn1.text(context)
    return found

  def __call__(self, x: types.Array, text: KeysValues) -> jax.Array:
    """Returns [B, N, D] for x [B, N, D]."""
    x = x + self.attn1(self.norm1(x), text.get("attn1"))
    x = x + self.attn2(self.norm2(x), text["attn2"])
    return x + self.ff(self.norm3(x))

  # The two methods in the form that `nn.scan` wants: (carry, x) -> (carry, y).
  def scan_text(self, context: types.Array) -> tuple[jax.Array, KeysValues]:
    """`text` with the context carried along."""
    return context, self.text(context)

  def scan(self, x: types.Array, text: KeysValues) -> tuple[jax.Array, None]:
    """`__call__` with x carried along."""
    return self(x, text), None


class Transformer2D(nn.Module):
  """A stack of transformer blocks over the pixels of a feature map.

  Attributes:
    width: D of the map.
    heads: attention heads.
    depth: number of blocks.
    groups: of the group norm.
    linear: first and last layer are linear, not 1x1 convolutions; the numbers
      are the same, the shapes in a checkpoint are not.
    cross_only: see `TransformerBlock`.
    stacked: the blocks are one `nn.scan` with parameters [depth, ...] under
      `transformer_blocks`, not `transformer_blocks_0` and so on: a program
      that compiles faster.
    remat: recompute each block in the backward pass.
    dtype: of the matrix products.
  """

  width: int
  heads: int
  depth: int
  groups: int
  linear: bool
  cross_only: bool = False
  stacked: bool = False
  remat: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):  # noqa: D102
    # 1e-6 here, where the residual layers of the same network have 1e-5.
    self.norm = resnet2d.GroupNorm(self.groups, epsilon=1e-6)
    if self.linear:
      project = lambda: nn.Dense(self.width, dtype=self.dtype)
    else:
      project = lambda: convolution.Conv(self.width, (1, 1), dtype=self.dtype)
    self.proj_in = project()
    cls = TransformerBlock
    if self.remat:
      cls = nn.remat(cls, methods=["__call__", "scan"])
    args = (self.width, self.heads, self.cross_only, self.dtype)
    if self.stacked:
      cls = nn.scan(
        cls,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=self.depth,
        methods=["scan", "scan_text"],
      )
      self.transformer_blocks = cls(*args)
    else:
      self.transformer_blocks = [cls(*args) for _ in range(self.depth)]
    self.proj_out = project()

  def text(self, context: types.Array) -> Any:
    """Returns `KeysValues` of all blocks for a text [B, L, C]."""
    if self.stacked:
      return self.transformer_blocks.scan_text(context)[1]
    return [block.text(context) for block in self.transformer_blocks]

  def __call__(self, x: types.Array, text: Any) -> jax.Array:
    """Runs the stack and adds its input.

    Args:
      x: [B, H, W, D].
      text: of `text`.

    Returns:
      [B, H, W, D].
    """
    shape = x.shape
    y = self.proj_in(self.norm(x)).reshape(shape[0], -1, self.width)
    if self.stacked:
      y, _ = self.transformer_blocks.scan(y, text)
    else:
      for block, keys_values in zip(self.transformer_blocks, text, strict=True):
        y = block(y, keys_values)
    return x + self.proj_out(y.reshape(shape))


def row_by_row(
  query: types.Array, key: types.Array, value: types.Array
) -> jax.Array:
  """`dot_product`, on a CPU one picture after the other if they are large.

  The logits of one picture stay in the cache, those of a batch do not: at 16
  pictures of 432 pixels that takes half the time, and a sixteenth of the
  memory.

  Args:
    query: [B, N, heads, d].
    key: [B, M, heads, d].
    value: [B, M, heads, d].

  Returns:
    [B, N, heads, d].
  """
  batch, n, heads, _ = query.shape
  logits = batch * heads * n * key.shape[1]
  if devices.platform() != "cpu" or batch == 1 or logits < _LARGE:
    return attention.dot_product(query, key, value)
  one = lambda row: attention.dot_product(*(x[None] for x in row))[0]
  return jax.lax.map(one, (query, key, value))


def chunked_attention(
  query: types.Array, key: types.Array, value: types.Array, *, chunk: int
) -> jax.Array:
  """`dot_product` on at most `chunk` rows at once, to bound the logits.

  The attention of the VAE has one head of 512, which no fused kernel takes,
  over every pixel of the latents: at 896x1536 its float32 logits are 1.7 GiB
  for each image.

  Args:
    query: [B, N, heads, d].
    key: [B, M, heads, d].
    value: [B, M, heads, d].
    chunk: rows of the query at a time.

  Returns:
    [B, N, heads, d].
  """
  batch, n, heads, d = query.shape
  if n <= chunk:
    return attention.dot_product(query, key, value)
  chunks = -(-n // chunk)
  padding = ((0, 0), (0, chunks * chunk - n), (0, 0), (0, 0))
  query = jnp.pad(query, padding).reshape(batch, chunks, chunk, heads, d)
  y = jax.lax.map(
    lambda rows: attention.dot_product(rows, key, value), query.swapaxes(0, 1)
  )
  return y.swapaxes(0, 1).reshape(batch, chunks * chunk, heads, d)[:, :n]
