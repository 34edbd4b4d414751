"""What every transformer here is built of: activations, norms, attention.

Parameters keep torch's names (`q_proj`, `fc1` ...) so that the tables that
convert checkpoints stay short, and torch's epsilons and torch's exact GELU so
that the numbers agree.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import errors, types

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """Returns the function that a Hugging Face `hidden_act` names.

  Raises:
    errors.UserError: no such function is known here.
  """
  if name not in _ACTIVATIONS:
    raise errors.UserError(
      f"hidden_act {name!r} is not known: use one of {', '.join(_ACTIVATIONS)}"
    )
  return _ACTIVATIONS[name]


def stream_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Returns the dtype of residual stream, norms and softmax: float32 at least.

  Only the matrix products run in bfloat16: the class token that leaves a block
  raw (Re-ID reads it) would otherwise carry three digits.
  """
  return jnp.promote_types(dtype, jnp.float32)


def attention(
  query: types.Array,
  key: types.Array,
  value: types.Array,
  *,
  causal: bool = False,
  mask: types.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention, softmax in float32 or wider.

  Args:
    query: [B, N, heads, d].
    key: [B, M, heads, d].
    value: [B, M, heads, d].
    causal: row i sees columns 0..i only.
    mask: bool [B, N, M], True where a row may look; not with `causal`.

  Returns:
    [B, N, heads, d] in the dtype of `value`.
  """
  if _has_flash_kernel(query, mask):
    return jax.nn.dot_product_attention(
      query, key, value, is_causal=causal, implementation="cudnn"
    )
  wide = stream_dtype(value.dtype)
  # Heads before rows: XLA's CPU backend multiplies such stacks of matrices
  # without a detour.
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  logits = jnp.matmul(
    query * query.shape[-1] ** -0.5,
    jnp.swapaxes(key, -1, -2),
    preferred_element_type=wide,
  )
  if causal:
    n, m = logits.shape[-2:]
    mask = jnp.tril(jnp.ones((n, m), bool))[None]
  if mask is not None:
    logits = jnp.where(mask[:, None], logits, jnp.finfo(wide).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.swapaxes(weights @ value, 1, 2)


def _has_flash_kernel(query: types.Array, mask: types.Array | None) -> bool:
  """Decides at trace time whether cuDNN has a kernel for these operands."""
  _, n, _, d = query.shape
  return (
    jax.default_backend() == "gpu"
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and mask is None
    and n > 1  # One row is a matrix-vector product: nothing to gain.
    and d % 8 == 0
    and d <= 128
  )


def bilinear_grid(table: types.Array, grid: tuple[int, int]) -> types.Array:
  """Resizes a grid of vectors as torch's bilinear `F.interpolate` does.

  Half-pixel centres (align_corners=False), borders repeated, and no low-pass
  when shrinking, unlike `jax.image.resize`, whose default antialiases.

  Args:
    table: [h, w, D].
    grid: (H, W) wanted.

  Returns:
    [H, W, D] in the dtype of `table`.
  """
  if table.shape[:2] == tuple(grid):
    return table
  rows = _bilinear_matrix(table.shape[0], grid[0], table.dtype)
  columns = _bilinear_matrix(table.shape[1], grid[1], table.dtype)
  # The default precision is TF32 on an NVIDIA GPU: too coarse for parameters.
  return jnp.einsum(
    "Hh,Ww,hwd->HWd",
    rows,
    columns,
    table,
    precision=jax.lax.Precision.HIGHEST,
  )


def _bilinear_matrix(
  size: int, wanted: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """Returns the [wanted, size] matrix of linear interpolation weights."""
  centres = (jnp.arange(wanted, dtype=dtype) + 0.5) * (size / wanted) - 0.5
  centres = jnp.clip(centres, 0, size - 1)
  distance = jnp.abs(centres[:, None] - jnp.arange(size, dtype=dtype)[None])
  return jnp.maximum(0, 1 - distance)


@jax.custom_vjp
def product(x: types.Array, kernel: types.Array) -> jax.Array:
  """Returns x @ kernel, [..., F] for x [..., D] and kernel [D, F].

  Its gradient of the kernel is written as x^T dy. The derivative that JAX
  finds is (dy^T x)^T, whose transposition costs a CPU up to a third more.
  """
  return x @ kernel


def _product_forward(x, kernel):
  return x @ kernel, (x, kernel)


def _product_backward(saved, dy):
  x, kernel = saved
  rows = lambda y: y.reshape(-1, y.shape[-1])
  return dy @ kernel.T, rows(x).T @ rows(dy)


product.defvjp(_product_forward, _product_backward)


def _dense_product(x, kernel, dimension_numbers, precision=None):
  """`product` as nn.Dense calls it."""
  del dimension_numbers, precision
  return product(x, kernel)


class LayerNorm(nn.Module):
  """torch.nn.LayerNorm over the last axis, in float32 or wider.

  flax's own has another epsilon, and a fast variance that cancels where the
  mean is large against the spread, as in CLIP's residuals.

  Attributes:
    epsilon: added to the variance.
  """

  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Normalises x [..., D]; float32 at least comes out."""
    shape = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    wide = stream_dtype(x.dtype)
    x, scale, bias = (y.astype(wide) for y in (x, scale, bias))
    return _layer_norm(x, scale, bias, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(
  x: types.Array, scale: types.Array, bias: types.Array, epsilon: float
) -> jax.Array:
  return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
  mean = x.mean(-1, keepdims=True)
  centred = x - mean
  variance = jnp.square(centred).mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + epsilon)
  y = centred * inverse * _row(scale, x) + _row(bias, x)
  return y, (x, mean, inverse, scale)


def _layer_norm_backward(epsilon, saved, dy):
  """The gradients in closed form: two sums a row, where autodiff takes five."""
  del epsilon
  x, mean, inverse, scale = saved
  normed = (x - mean) * inverse
  dn = dy * _row(scale, x)
  along = (dn * normed).mean(-1, keepdims=True)
  dx = inverse * (dn - dn.mean(-1, keepdims=True) - normed * along)
  others = tuple(range(x.ndim - 1))
  return dx, (dy * normed).sum(others), dy.sum(others)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _row(vector: types.Array, like: types.Array) -> jax.Array:
  return vector.reshape((1,) * (like.ndim - 1) + (-1,))


class Attention(nn.Module):
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
    self, x: types.Array, rows: types.Array | int | None = None
  ) -> jax.Array:
    """Returns [B, N, D], or [B, 1, D] for the given rows of x [B, N, D]."""
    width = x.shape[-1]
    dense = lambda name, std: nn.Dense(
      width,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(std),
      dot_general=_dense_product,
      name=name,
    )
    split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
    std = width**-0.5
    std_in = std * (2 * self.depth) ** -0.5
    asking = x if rows is None else take_rows(x, rows)
    query = split(dense("q_proj", std_in)(asking))
    key = split(dense("k_proj", std_in)(x))
    value = split(dense("v_proj", std_in)(x))
    if rows is None or not self.causal:
      y = attention(query, key, value, causal=self.causal)
    else:
      last = jnp.broadcast_to(jnp.asarray(rows), x.shape[:1])
      visible = jnp.arange(x.shape[1])[None] <= last[:, None]
      y = attention(query, key, value, mask=visible[:, None])
    return dense("out_proj", std)(y.reshape(*y.shape[:-2], width))


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
    normal = nn.initializers.normal
    x = nn.Dense(
      self.hidden,
      dtype=self.dtype,
      kernel_init=normal((2 * width) ** -0.5),
      dot_general=_dense_product,
      name="fc1",
    )(x)
    x = activation(self.act)(x)
    return nn.Dense(
      width,
      dtype=self.dtype,
      kernel_init=normal((2 * width * self.depth) ** -0.5),
      dot_general=_dense_product,
      name="fc2",
    )(x)


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
    self, x: types.Array, rows: types.Array | int | None = None
  ) -> jax.Array:
    """Runs the block, for all rows or exactly for the one that is needed.

    Args:
      x: [B, N, D] in `stream_dtype`.
      rows: int [B] or one int: the row of each sequence whose output is
        wanted. The others are still looked at, as keys and values.

    Returns:
      [B, N, D], or [B, 1, D] where rows are given.
    """
    y = LayerNorm(epsilon=self.epsilon, name="layer_norm1")(x)
    y = Attention(
      self.heads, self.depth, self.causal, self.dtype, name="self_attn"
    )(y, rows)
    x = (x if rows is None else take_rows(x, rows)) + y
    y = LayerNorm(epsilon=self.epsilon, name="layer_norm2")(x)
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
  ) -> tuple[jax.Array, dict[int, jax.Array]]:
    """Runs all blocks.

    Args:
      x: [B, N, D].
      taps: which states to return whole: 0 is x, i the output of block i.
      rows: as in `Block`, for the last block; not where `taps` asks for it.

    Returns:
      The output of the last block, [B, N, D] or [B, 1, D], and {tap: state}.
    """
    config = self.config
    depth = config.num_hidden_layers
    states = {0: x}
    for i in range(depth):
      is_last = i + 1 == depth
      # The last block comes first in the backward pass: storing it is free.
      block = nn.remat(Block) if self.remat and not is_last else Block
      x = block(
        config.num_attention_heads,
        config.intermediate_size,
        depth,
        config.hidden_act,
        config.layer_norm_eps,
        self.causal,
        self.dtype,
        name=f"layers_{i}",
      )(x, rows if is_last else None)
      states[i + 1] = x
    return x, {tap: states[tap] for tap in taps}


class PatchEmbedding(nn.Module):
  """Linear map of square patches: torch's Conv2d without bias or padding."""

  width: int
  size: int
  stride: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: types.Array) -> jax.Array:
    """Returns [B, P, D] for images [B, H, W, C], patches row by row."""
    size = self.size
    kernel = self.param(
      "kernel",
      nn.initializers.normal(0.02),
      (size, size, images.shape[-1], self.width),
    )
    images, kernel = images.astype(self.dtype), kernel.astype(self.dtype)
    batch, height, width, channels = images.shape
    if self.stride == size:
      # One matrix product; what is left over at the border is cut, as a
      # convolution without padding does.
      rows, columns = height // size, width // size
      x = images[:, : rows * size, : columns * size]
      x = x.reshape(batch, rows, size, columns, size, channels)
      x = jnp.swapaxes(x, 2, 3).reshape(batch, rows * columns, -1)
      return x @ kernel.reshape(-1, self.width)
    x = jax.lax.conv_general_dilated(
      images,
      kernel,
      (self.stride, self.stride),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x.reshape(batch, -1, self.width)


def take_rows(x: types.Array, rows: types.Array | int) -> jax.Array:
  """Returns [B, 1, D]: one row of each sequence of x [B, N, D].

  Args:
    x: [B, N, D].
    rows: int [B], or one int for the whole batch (a slice, not a gather).
  """
  if isinstance(rows, int):
    return x[:, rows : rows + 1]
  return jnp.take_along_axis(x, rows[:, None, None], axis=1)
