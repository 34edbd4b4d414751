"""U2-Net (Qin et al. 2020): what in a picture is the person, softly.

A U of blocks that are themselves small Us (RSU). Modules carry the names of
the published checkpoints (`stage3d`, `rebnconv2d`, `conv_s1`, `bn_s1` ...).
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import types
from dppp_jax.models import convolution, layers, resizing

# Blocks by the number of convolutions on their way down; the last three stages
# are too small to pool and dilate instead ("4F").
ENCODER = ("stage1", "stage2", "stage3", "stage4", "stage5", "stage6")
DECODER = ("stage5d", "stage4d", "stage3d", "stage2d", "stage1d")
_DEPTHS = {"1": 7, "2": 6, "3": 5, "4": 4, "5": 4, "6": 4}
_DILATIONS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Config:
  """Widths of a U2-Net, (inside, out) of every block.

  Attributes:
    encoder: stage1 to stage6.
    decoder: stage5d to stage1d.
  """

  encoder: tuple[tuple[int, int], ...] = (
      (32, 64), (32, 128), (64, 256), (128, 512), (256, 512), (256, 512),
  )  # fmt: skip
  decoder: tuple[tuple[int, int], ...] = (
      (256, 512), (128, 256), (64, 128), (32, 64), (16, 64),
  )  # fmt: skip


FULL = Config()  # 44.0 M parameters.
SMALL = Config(((16, 64),) * 6, ((16, 64),) * 5)  # U2-Net-p, 1.1 M.


class Output(NamedTuple):
  """Logits of the foreground.

  Attributes:
    fused: [B, H, W], the answer.
    sides: [B, H, W, 6], what each level of the decoder says alone, finest
      first (each is trained against the matte as well).
  """

  fused: jax.Array
  sides: jax.Array


class U2Net(nn.Module):
  """The whole network.

  Attributes:
    config: the widths.
    dtype: of the convolutions; norms and logits are float32 or wider.
  """

  config: Config = FULL
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: types.Array, *, train: bool = False) -> Output:
    """Finds the foreground.

    Args:
      images: [B, H, W, 3], divided by their maximum, then normalised by
        ImageNet's mean and std; H and W of any size.
      train: normalise by the batch, and update "batch_stats" where mutable.

    Returns:
      Logits of the size of the images.
    """
    block = lambda name, width: Rsu(
      _DEPTHS[name[5]], *width, name[5] in "56", self.dtype, name=name
    )
    x, skips = images, []
    for name, width in zip(ENCODER, self.config.encoder, strict=True):
      x = block(name, width)(_pool(x) if skips else x, train)
      skips.append(x)
    levels = [skips.pop()]
    for name, width in zip(DECODER, self.config.decoder, strict=True):
      skip = skips.pop()
      x = jnp.concatenate([_upsample(levels[-1], skip), skip], axis=-1)
      levels.append(block(name, width)(x, train))
    wide = layers.stream_dtype(self.dtype)
    side = lambda name, size: convolution.Conv(
      1, size, dtype=self.dtype, name=name
    )
    sides = [
      _upsample(side(f"side{i + 1}", (3, 3))(x).astype(wide), images)
      for i, x in enumerate(reversed(levels))
    ]
    sides = jnp.concatenate(sides, axis=-1)
    # Six channels: nothing is gained by multiplying them in bfloat16.
    fused = convolution.Conv(1, (1, 1), dtype=wide, name="outconv")(sides)
    return Output(fused[..., 0], sides)


class Rsu(nn.Module):
  """A residual U-block: RSU-`depth`, or RSU-4F where `flat`.

  Attributes:
    depth: convolutions on the way down.
    inside: width within.
    out: width of the result.
    flat: dilate instead of pooling.
    dtype: of the convolutions.
  """

  depth: int
  inside: int
  out: int
  flat: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array, train: bool) -> jax.Array:
    """Returns [B, H, W, out] for x [B, H, W, C]."""

    def conv(x, name, width, dilation=1):
      return _ConvNormRelu(width, dilation, self.dtype, name=name)(x, train)

    start = conv(x, "rebnconvin", self.out)
    x, ways = start, []
    for i in range(1, self.depth):
      if ways and not self.flat:
        x = _pool(x)
      dilation = _DILATIONS[i - 1] if self.flat else 1
      x = conv(x, f"rebnconv{i}", self.inside, dilation)
      ways.append(x)
    bottom = _DILATIONS[-1] if self.flat else 2
    x = conv(x, f"rebnconv{self.depth}", self.inside, bottom)
    for i in range(self.depth - 1, 0, -1):
      way = ways.pop()
      x = jnp.concatenate([_upsample(x, way), way], axis=-1)
      dilation = _DILATIONS[i - 1] if self.flat else 1
      x = conv(x, f"rebnconv{i}d", self.inside if i > 1 else self.out, dilation)
    return x + start


class _ConvNormRelu(nn.Module):
  """3x3 convolution, batch norm, ReLU ("rebnconv")."""

  features: int
  dilation: int
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x: types.Array, train: bool) -> jax.Array:
    x = convolution.Conv(
      self.features,
      (3, 3),
      padding=self.dilation,
      kernel_dilation=self.dilation,
      dtype=self.dtype,
      kernel_init=nn.initializers.he_uniform(),
      name="conv_s1",
    )(x)
    x = nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
      use_fast_variance=False,
      name="bn_s1",
    )(x)
    return jax.nn.relu(x)


def _pool(x: types.Array) -> jax.Array:
  """Halves a picture, rounding up (torch's ceil_mode)."""
  _, height, width, _ = x.shape
  odd = ((0, height % 2), (0, width % 2))
  return nn.max_pool(x, (2, 2), strides=(2, 2), padding=odd)


def _upsample(x: types.Array, like: types.Array) -> jax.Array:
  """Enlarges x [B, h, w, C] bilinearly to the size of another picture."""
  return resizing.resize(x, like.shape[1:3], "bilinear", antialias=False)
