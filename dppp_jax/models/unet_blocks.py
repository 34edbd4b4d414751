"""The down, middle and up blocks of UNets and ControlNets."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import types
from dppp_jax.models import resnet2d, transformer2d, unet_config


class Block(nn.Module):
  """What the three kinds of blocks share: residual layers and transformers.

  Attributes:
    config: of the whole network.
    level: index of the block's width, heads and text width.
    depths: transformer blocks after each residual layer; None where the block
      has no transformers (0 is another thing: norm and projections are there).
    stack_from: transformers at least so deep are one `nn.scan`; 0: none.
    remat: recompute residual layers and transformer blocks in the backward
      pass.
    dtype: of matrix products and convolutions.
  """

  config: unet_config.BackboneConfig
  level: int
  depths: tuple[int, ...] | None = None
  stack_from: int = 0
  remat: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  @property
  def width(self) -> int:
    """Channels of the output."""
    return self.config.block_out_channels[self.level]

  def resnet(self, divisor: float = 1.0) -> resnet2d.ResnetBlock:
    """Returns a residual layer of this block."""
    cls = resnet2d.ResnetBlock
    return (nn.remat(cls) if self.remat else cls)(
      self.width,
      self.config.norm_num_groups,
      epsilon=self.config.norm_eps,
      act=self.config.act_fn,
      scale_shift=self.config.resnet_time_scale_shift == "scale_shift",
      divisor=divisor,
      dtype=self.dtype,
    )

  def transformers(self, cross_only: bool) -> list[transformer2d.Transformer2D]:
    """Returns the transformers of this block, none for `depths` None."""
    return [
      transformer2d.Transformer2D(
        self.width,
        self.config.heads[self.level],
        depth=depth,
        groups=self.config.norm_num_groups,
        linear=self.config.use_linear_projection,
        cross_only=cross_only,
        stacked=0 < self.stack_from <= depth,
        remat=self.remat,
        dtype=self.dtype,
      )
      for depth in self.depths or ()
    ]

  def text(self, context: types.Array) -> list[Any]:
    """Returns the keys and values of all transformers for a text."""
    return [attention.text(context) for attention in self.attentions]

  def attend(self, x: types.Array, index: int, text: Sequence[Any]) -> Any:
    """Runs transformer `index`, where there are any."""
    if self.depths is None:
      return x
    return self.attentions[index](x, text[index])


class DownBlock(Block):
  """Residual layers (with transformers) and, but at the end, a downsampling."""

  @property
  def num_layers(self) -> int:
    """Number of residual layers."""
    return self.config.layers[self.level]

  def setup(self):  # noqa: D102
    self.resnets = [self.resnet() for _ in range(self.num_layers)]
    self.attentions = self.transformers(self.config.cross_only[self.level])
    is_last = self.level == self.config.levels - 1
    self.downsamplers = [
      resnet2d.Downsample(
        self.width, self.config.downsample_padding, dtype=self.dtype
      )
      for _ in range(not is_last)
    ]

  def __call__(
    self, x: types.Array, emb: types.Array, text: Sequence[Any]
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Runs the block.

    Args:
      x: [B, H, W, C].
      emb: [B, E].
      text: of `Block.text`.

    Returns:
      The output, and the outputs of all layers for the way up.
    """
    skips = []
    for i, resnet in enumerate(self.resnets):
      x = self.attend(resnet(x, emb), i, text)
      skips.append(x)
    for downsample in self.downsamplers:
      x = downsample(x)
      skips.append(x)
    return x, skips


class MidBlock(Block):
  """A residual layer; with transformers, one of them and another layer."""

  def setup(self):  # noqa: D102
    divisor = self.config.mid_block_scale_factor
    count = 1 + len(self.depths or ())
    self.resnets = [self.resnet(divisor) for _ in range(count)]
    self.attentions = self.transformers(cross_only=False)

  def __call__(
    self, x: types.Array, emb: types.Array, text: Sequence[Any]
  ) -> jax.Array:
    """Returns [B, H, W, C] for x [B, H, W, C]."""
    x = self.resnets[0](x, emb)
    for i, resnet in enumerate(self.resnets[1:]):
      x = resnet(self.attend(x, i, text), emb)
    return x


class UpBlock(Block):
  """Residual layers that each take one skip, and an upsampling but at last."""

  @property
  def num_layers(self) -> int:
    """Number of residual layers, and of the skips that they take."""
    return self.config.layers[self.level] + 1

  def setup(self):  # noqa: D102
    self.resnets = [self.resnet() for _ in range(self.num_layers)]
    self.attentions = self.transformers(self.config.cross_only[self.level])
    self.upsamplers = [
      resnet2d.Upsample(self.width, dtype=self.dtype)
      for _ in range(self.level > 0)
    ]

  def __call__(
    self,
    x: types.Array,
    skips: Sequence[types.Array],
    emb: types.Array,
    text: Sequence[Any],
    size: tuple[int, int],
  ) -> jax.Array:
    """Runs the block.

    Args:
      x: [B, H, W, C].
      skips: as many as there are layers; the last one is taken first.
      emb: [B, E].
      text: of `Block.text`.
      size: height and width of the next block; odd sizes cannot be told from
        the halved ones.

    Returns:
      [B, *size, C'], or [B, H, W, C'] of the last block.
    """
    for i, resnet in enumerate(self.resnets):
      x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
      x = self.attend(resnet(x, emb), i, text)
    for upsample in self.upsamplers:
      x = upsample(x, size)
    return x


def layer_depths(
  kind: str, depth: int | tuple[int, ...], layers: int
) -> tuple[int, ...] | None:
  """Returns the depth of each layer's transformer, or None for no such.

  Args:
    kind: block type; those with transformers have "CrossAttn" in the name.
    depth: one for all layers, or one each.
    layers: number of layers.
  """
  if "CrossAttn" not in kind:
    return None
  return unet_config.spread(depth, layers)[:layers]
