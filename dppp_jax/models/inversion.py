"""DPPP's inversion networks: features of a picture become pseudo-words.

One content word comes from the global feature (Eq. 1). Style words come from
the patches: learnable tokens gather them in a small transformer (Eq. 2), the
few that agree most with the global feature are kept (Eq. 3, 4) and inverted
one by one (Eq. 5).
"""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import types
from dppp_jax.models import attention, heads, layers

Order = Literal["score", "slot"]


class ContentInversion(nn.Module):
  """f_theta: three linear layers from v_g to the content word (Eq. 1).

  Attributes:
    features: width of a token embedding.
    hidden: width of both hidden layers.
    batch_norm: put a batch normalisation behind the last layer.
    dtype: of the matrix products.
  """

  features: int
  hidden: int = 512
  batch_norm: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array, *, train: bool = False) -> jax.Array:
    """Returns c* [B, features] for v_g [B, E]."""
    linear = functools.partial(_linear, dtype=self.dtype)
    for i in (1, 2):
      x = linear(x, self.hidden, name=f"fc{i}")
      x = jax.nn.relu(x)
    x = linear(x, self.features, name="fc3")
    if self.batch_norm:
      x = heads.BatchNorm(name="norm")(x, train=train)
    return x


class StyleInversion(nn.Module):
  """f_phi: three linear layers, shared by the k style features (Eq. 5).

  Attributes:
    features: width of a token embedding.
    hidden: width of both hidden layers.
    dropout: rate behind both activations; needs the rng "dropout".
    dtype: of the matrix products.
  """

  features: int
  hidden: int = 2048
  dropout: float = 0.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array, *, train: bool = False) -> jax.Array:
    """Returns s* [B, k, features] for V_L [B, k, E]."""
    linear = functools.partial(_linear, dtype=self.dtype)
    for i in (1, 2):
      x = linear(x, self.hidden, name=f"fc{i}")
      x = layers.activation("gelu")(x)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return linear(x, self.features, name="fc3")


class StyleExtractor(nn.Module):
  """Gathers n style features from the patches, and keeps the best k.

  Attributes:
    features: width of a style feature (that of v_g).
    num_tokens: n, the number of learnable tokens.
    num_selected: k; n keeps all of them ("without the filter").
    order: "score" puts the best feature first, "slot" keeps the order of the
      tokens that they come from. It decides their places in the prompt.
    num_layers: transformer layers.
    num_heads: attention heads.
    mlp_ratio: hidden width of the transformer's MLPs, in widths.
    qkv_bias: whether queries, keys and values have a bias.
    sigmoid: squash the projected features to (0, 1).
    init_std: of the learnable tokens.
    dtype: of the matrix products.
  """

  features: int
  num_tokens: int = 24
  num_selected: int = 6
  order: Order = "score"
  num_layers: int = 3
  num_heads: int = 1
  mlp_ratio: int = 2
  qkv_bias: bool = False
  sigmoid: bool = False
  init_std: float = 0.02
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, patches: types.Array, global_feature: types.Array
  ) -> jax.Array:
    """Returns V_L [B, k, features] (Eq. 2 to 4).

    Args:
      patches: V, [B, P, D], raw patch tokens without the class token.
      global_feature: v_g, [B, features].
    """
    batch, _, width = patches.shape
    wide = layers.stream_dtype(self.dtype)
    tokens = self.param(
      "tokens",
      nn.initializers.normal(self.init_std),
      (self.num_tokens, width),
    )
    tokens = jnp.broadcast_to(tokens[None], (batch, *tokens.shape))
    x = jnp.concatenate([tokens.astype(wide), patches.astype(wide)], axis=1)
    # Or XLA would compute the gradient once for the tokens and once more for
    # the patches.
    x = jax.lax.optimization_barrier(x)
    for i in range(self.num_layers):
      # Only the tokens are read out: the last layer asks for no patch.
      is_last = i == self.num_layers - 1
      x = _Layer(
        self.num_heads,
        self.mlp_ratio * width,
        self.qkv_bias,
        self.dtype,
        name=f"layers_{i}",
      )(x, rows=self.num_tokens if is_last else None)
    x = x[:, : self.num_tokens]
    x = heads.linear(width, self.features, dtype=self.dtype, name="fc")(x)
    x = jax.nn.sigmoid(x) if self.sigmoid else x
    return select(x, global_feature, k=self.num_selected, order=self.order)


def select(
  features: types.Array,
  global_feature: types.Array,
  *,
  k: int,
  order: Order = "score",
) -> jax.Array:
  """Keeps the k features that agree most with the global one (Eq. 3, 4).

  The softmax of Eq. 3 only ranks, and it keeps the ranks of the dot products
  inside it. The choice is hard: gradients reach the chosen features, none
  passes through the scores.

  Args:
    features: [B, n, E].
    global_feature: [B, E], compared by the raw dot product.
    k: how many are kept.
    order: "score", descending (equal ones by slot), or "slot".

  Returns:
    [B, k, E].
  """
  # Ranks are decided in float32 at full precision, so that they do not
  # depend on the device.
  wide = layers.stream_dtype(features.dtype)
  scores = jnp.einsum(
    "bne,be->bn",
    features.astype(wide),
    global_feature.astype(wide),
    precision=jax.lax.Precision.HIGHEST,
  )
  _, indices = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
  if order == "slot":
    indices = jnp.sort(indices, axis=-1)
  elif order != "score":
    raise ValueError(f"order {order!r} is neither score nor slot")
  return jnp.take_along_axis(features, indices[:, :, None], axis=1)


class _Layer(nn.Module):
  """A pre-norm transformer layer, torch's TransformerEncoderLayer with ReLU."""

  num_heads: int
  hidden: int
  qkv_bias: bool
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x: types.Array, rows: int | None) -> jax.Array:
    """Returns [B, N, D], or the first `rows` of them, for x [B, N, D]."""
    width = x.shape[-1]
    linear = functools.partial(heads.linear, dtype=self.dtype)
    project = lambda name: linear(
      width, width, use_bias=self.qkv_bias, name=f"{name}_proj"
    )
    norm = lambda name: layers.LayerNorm(dtype=self.dtype, name=name)
    y = norm("layer_norm1")(x)
    query = project("q")(y[:, :rows])
    y = attention.of_linear(
      query.reshape(*query.shape[:2], self.num_heads, -1),
      y,
      project("k"),
      project("v"),
    )
    y = linear(width, width, name="out_proj")(y.reshape(*y.shape[:2], width))
    x = x[:, :rows] + y
    y = norm("layer_norm2")(x)
    y = jax.nn.relu(linear(width, self.hidden, name="fc1")(y))
    return x + linear(self.hidden, width, name="fc2")(y)


def _linear(
  x: types.Array, features: int, *, dtype: jax.typing.DTypeLike, name: str
) -> jax.Array:
  return heads.linear(x.shape[-1], features, dtype=dtype, name=name)(x)
