"""The convolutional pieces of UNets, ControlNets and VAEs, in NHWC."""

from collections.abc import Mapping
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import trees, types
from dppp_jax.models import convolution, layers

# The kernels that are used in the compute dtype, of all the networks.
_CAST = re.compile(
  r"((?:down|up)_blocks_\d+|mid_block|conv_in|encoder_hid_proj|controlnet_\w+"
  r"|(?:encoder|decoder)/(?!conv_out).*?)(/.*)?/kernel"
)


class GroupNorm(nn.Module):
  """torch.nn.GroupNorm over pixels and the channels of a group.

  In float32 or wider, and with the variance of what is centred: the fast one
  cancels where the mean is large against the spread, and the VAE's last layers
  are such a place. Sums run over whole rows of channels, and groups are formed
  of what is left: flax's own sums over groups take a CPU twice as long.

  Attributes:
    groups: number of groups; divides the channels.
    epsilon: added to the variance.
  """

  groups: int
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Normalises x [B, H, W, C]; float32 at least comes out."""
    batch, channels = x.shape[0], x.shape[-1]
    shape = (channels,)
    scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
    wide = layers.stream_dtype(x.dtype)
    rows, scale, bias = (y.astype(wide) for y in (x, scale, bias))
    rows = rows.reshape(batch, -1, channels)
    members = channels // self.groups

    def mean(y: jax.Array) -> jax.Array:
      """Returns the mean of each channel's group, [B, 1, C]."""
      sums = y.sum(1).reshape(batch, self.groups, members).sum(-1)
      means = sums / (y.shape[1] * members)
      return jnp.repeat(means, members, axis=-1)[:, None]

    centred = rows - mean(rows)
    inverse = jax.lax.rsqrt(mean(jnp.square(centred)) + self.epsilon)
    y = centred * (inverse * scale[None, None]) + bias[None, None]
    return y.reshape(x.shape)


def conv3x3(
  features: int, dtype: jax.typing.DTypeLike, *, name: str | None = None
) -> nn.Conv:
  """Returns a 3x3 convolution that keeps the size."""
  return convolution.Conv(features, (3, 3), padding=1, dtype=dtype, name=name)


class ResnetBlock(nn.Module):
  """Two convolutions, each after norm and activation, and a residual sum.

  Attributes:
    features: channels C' of the output.
    groups: of the norms.
    epsilon: of the norms.
    act: name of the activation.
    scale_shift: the time embedding scales and shifts after the second norm;
      otherwise it is added before it.
    divisor: of the residual sum.
    dtype: of the convolutions.
  """

  features: int
  groups: int
  epsilon: float = 1e-5
  act: str = "silu"
  scale_shift: bool = False
  divisor: float = 1.0
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: types.Array, emb: types.Array | None = None
  ) -> jax.Array:
    """Runs the block.

    Args:
      x: [B, H, W, C].
      emb: time embedding [B, E]; None in a VAE, which has no time.

    Returns:
      [B, H, W, C'].
    """
    act = layers.activation(self.act)
    norm = functools.partial(GroupNorm, self.groups, self.epsilon)
    y = act(norm(name="norm1")(x))
    y = conv3x3(self.features, self.dtype, name="conv1")(y)
    if emb is not None:
      width = self.features * (2 if self.scale_shift else 1)
      emb = nn.Dense(width, dtype=self.dtype, name="time_emb_proj")(act(emb))
      emb = emb[:, None, None]
    if emb is not None and not self.scale_shift:
      y = y + emb
    y = norm(name="norm2")(y)
    if emb is not None and self.scale_shift:
      scale, shift = jnp.split(emb, 2, axis=-1)
      y = y * (1 + scale) + shift
    y = conv3x3(self.features, self.dtype, name="conv2")(act(y))
    if x.shape[-1] != self.features:
      shortcut = convolution.Conv(
        self.features, (1, 1), dtype=self.dtype, name="conv_shortcut"
      )
      x = shortcut(x)
    return (x + y) / self.divisor


class Downsample(nn.Module):
  """Halves the resolution by a convolution of stride 2.

  Attributes:
    features: channels C'.
    padding: 1: one pixel on all sides (UNets); 0: one below and one on the
      right (VAEs). XLA's "SAME" is the second on even sizes only.
    dtype: of the convolution.
  """

  features: int
  padding: int = 1
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [B, ceil(H / 2), ceil(W / 2), C'] (floor for padding 0)."""
    edge = (self.padding, 1)
    return convolution.Conv(
      self.features,
      (3, 3),
      strides=2,
      padding=(edge, edge),
      dtype=self.dtype,
      name="conv",
    )(x)


class Upsample(nn.Module):
  """Nearest neighbours, then a convolution."""

  features: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: types.Array, size: tuple[int, int] | None = None
  ) -> jax.Array:
    """Returns [B, *size, C'] for x [B, H, W, C]; size is twice the input's."""
    height, width = x.shape[1:3]
    x = nearest(x, size or (2 * height, 2 * width))
    return conv3x3(self.features, self.dtype, name="conv")(x)


def nearest(x: types.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes as torch does: output i is input floor(i * in / out).

  `jax.image.resize` takes the pixel whose centre is nearest, which is another
  one wherever the size is odd.

  Args:
    x: [B, H, W, C].
    size: (height, width) wanted.

  Returns:
    [B, *size, C].
  """
  for axis, wanted in ((1, size[0]), (2, size[1])):
    have = x.shape[axis]
    if wanted == 2 * have:
      x = jnp.repeat(x, 2, axis=axis)
    elif wanted != have:
      x = jnp.take(x, jnp.arange(wanted) * have // wanted, axis=axis)
  return x


def cast_kernels(
  params: Mapping[str, Any], dtype: jax.typing.DTypeLike
) -> types.Params:
  """Casts what the networks would cast at each step, and nothing else.

  A network of compute dtype bfloat16 gives the same numbers with the result,
  and reads half as much. Norms, embeddings and the last layers, which run in
  float32, keep their parameters as they are, and so do all biases.

  Args:
    params: of a UNet, a ControlNet or a VAE.
    dtype: the network's compute dtype.

  Returns:
    The nested tree.
  """
  return trees.unflatten(
    {
      name: jnp.asarray(leaf, dtype if _CAST.fullmatch(name) else None)
      for name, leaf in trees.flatten(params).items()
    }
  )
