"""What every transformer here is built of: activations, norms, products.

Parameters keep torch's names (`q_proj`, `fc1` ...) so that the tables that
convert checkpoints stay short, and torch's epsilons and torch's exact GELU so
that the numbers agree.
"""

from collections.abc import Callable
import functools

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


def activation(
  name: str, *, key: str = "hidden_act"
) -> Callable[[jax.Array], jax.Array]:
  """Returns the function that a Hugging Face `hidden_act` names.

  Args:
    name: of the function.
    key: under which the name was given, for the error.

  Raises:
    errors.UserError: no such function is known here.
  """
  if not isinstance(name, str) or name not in _ACTIVATIONS:
    raise errors.UserError(
      f"{key} {name!r} is not known: use one of {', '.join(_ACTIVATIONS)}"
    )
  return _ACTIVATIONS[name]


def stream_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Returns the dtype of residual stream, norms and softmax: float32 at least.

  Only the matrix products run in bfloat16: the class token that leaves a block
  raw (Re-ID reads it) would otherwise carry three digits.
  """
  return jnp.promote_types(dtype, jnp.float32)


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


class Linear(nn.Module):
  """A linear layer, whose kernel and bias may also be read.

  Attributes:
    given: input width D.
    features: output width F.
    use_bias: whether there is a bias.
    kernel_init: of the kernel [D, F].
    bias_init: of the bias [F].
    dtype: of the matrix product.
  """

  given: int
  features: int
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):  # noqa: D102
    shape = (self.given, self.features)
    self.kernel = self.param("kernel", self.kernel_init, shape)
    self.bias = None
    if self.use_bias:
      self.bias = self.param("bias", self.bias_init, shape[1:])

  def __call__(
    self,
    x: types.Array,
    act: Callable[[jax.Array], jax.Array] | None = None,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: [*b, D].
      act: of what comes out. The backward pass computes it anew from the
        product alone: that is less than to write what it would keep.

    Returns:
      [*b, F].
    """
    x, kernel, bias = nn.dtypes.promote_dtype(
      x, self.kernel, self.bias, dtype=self.dtype
    )
    y = product(x, kernel)
    shift = lambda y, b: y if b is None else y + jnp.broadcast_to(b, y.shape)
    if act is None:
      return shift(y, bias)
    return jax.checkpoint(lambda y, b: act(shift(y, b)))(y, bias)


class LayerNorm(nn.Module):
  """torch.nn.LayerNorm over the last axis, in float32 or wider.

  flax's own has another epsilon, and a fast variance that cancels where the
  mean is large against the spread, as in CLIP's residuals.

  Attributes:
    epsilon: added to the variance.
    dtype: of what comes out, where only products in this dtype read it; None
      for float32 at least. Sums are float32 at least in any case.
  """

  epsilon: float = 1e-5
  dtype: jax.typing.DTypeLike | None = None

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Normalises x [..., D]."""
    shape = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    wide = stream_dtype(x.dtype)
    x, scale, bias = (y.astype(wide) for y in (x, scale, bias))
    dtype = jnp.dtype(wide if self.dtype is None else self.dtype)
    return _layer_norm(x, scale, bias, self.epsilon, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(
  x: types.Array,
  scale: types.Array,
  bias: types.Array,
  epsilon: float,
  dtype: jnp.dtype,
) -> jax.Array:
  return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x, scale, bias, epsilon, dtype):
  mean = x.mean(-1, keepdims=True)
  centred = x - mean
  variance = jnp.square(centred).mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + epsilon)
  y = centred * inverse * _row(scale, x) + _row(bias, x)
  return y.astype(dtype), (x, mean, inverse, scale)


def _layer_norm_backward(epsilon, dtype, saved, dy):
  """The gradients in closed form: two sums a row, where autodiff takes five."""
  del epsilon
  x, mean, inverse, scale = saved
  normed = rough = (x - mean) * inverse
  if dtype != x.dtype:
    # Two arrays of few bytes, each written once. XLA would rather add up the
    # gradients of queries, keys and values for each of three readers, and keep
    # the factors of `scale` in float32.
    dy, rough = jax.lax.optimization_barrier((dy, normed.astype(dtype)))
    dy, rough = dy.astype(x.dtype), rough.astype(x.dtype)
  dn = dy * _row(scale, x)
  along = (dn * normed).mean(-1, keepdims=True)
  dx = inverse * (dn - dn.mean(-1, keepdims=True) - normed * along)
  others = tuple(range(x.ndim - 1))
  return dx, (dy * rough).sum(others), dy.sum(others)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _row(vector: types.Array, like: types.Array) -> jax.Array:
  return vector.reshape((1,) * (like.ndim - 1) + (-1,))


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
  """Returns [B, 1, D], one row of each sequence, or [n, D] of one stack.

  Args:
    x: [B, N, D]; or [R, D].
    rows: int [B], or one int for the whole batch (a slice, not a gather); or
      int [n].
  """
  if x.ndim == 2:
    return x[rows]
  if isinstance(rows, int):
    return x[:, rows : rows + 1]
  return jnp.take_along_axis(x, rows[:, None, None], axis=1)
