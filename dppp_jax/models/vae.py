"""The autoencoder between pictures and latents (diffusers' AutoencoderKL).

    net = vae.VAE(config, dtype=jnp.bfloat16)
    moments = net.apply(variables, images, method="encode")   # in [-1, 1]
    latents = vae.normalize(moments.mean, config)     # what the UNet works on
    images = net.apply(variables, vae.denormalize(latents, config),
                       method="decode")

bfloat16 has float32's range, so the checkpoints that overflow float16 and ask
for float32 (`force_upcast`) may be run in it; statistics of the norms, softmax
and the last layer are float32 in any case.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import errors, types
from dppp_jax.models import (
  convolution,
  layers,
  resnet2d,
  shapes,
  transformer2d,
  unet_config,
)

_EPSILON = 1e-6  # Of all norms; the UNet's residual layers have 1e-5.
_CHUNK = 2048  # Rows of attention logits at a time.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Diffusers' names and defaults.

  Attributes:
    in_channels: of the images.
    out_channels: of the images that come out.
    down_block_types: `DownEncoderBlock2D` for each level.
    up_block_types: `UpDecoderBlock2D` for each level.
    block_out_channels: width of each level, finest first.
    layers_per_block: residual layers of the encoder; the decoder has one more.
    act_fn: activation of the residual layers.
    latent_channels: of the latents.
    norm_num_groups: of all norms.
    scaling_factor: makes the latents' variance one.
    latents_mean: mean of each latent channel, or None for 0.
    latents_std: spread of each latent channel, or None for 1.
    force_upcast: the checkpoint overflows float16.
    use_quant_conv: a 1x1 convolution follows the encoder.
    use_post_quant_conv: one precedes the decoder.
    mid_block_add_attention: the middle has an attention layer.
  """

  in_channels: int = 3
  out_channels: int = 3
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  act_fn: str = "silu"
  latent_channels: int = 4
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  latents_mean: tuple[float, ...] | None = None
  latents_std: tuple[float, ...] | None = None
  force_upcast: bool = True
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True

  def __post_init__(self):
    for name, kind in (
      ("down_block_types", "DownEncoderBlock2D"),
      ("up_block_types", "UpDecoderBlock2D"),
    ):
      value = getattr(self, name)
      if value != (kind,) * len(self.block_out_channels):
        raise errors.UserError(
          f"{name} is {value} in the VAE's config.json; built here are"
          f" {len(self.block_out_channels)} times {kind}"
        )
    for name in ("latents_mean", "latents_std"):
      value = getattr(self, name)
      if value is not None and len(value) != self.latent_channels:
        raise errors.UserError(
          f"{name} has {len(value)} entries in the VAE's config.json, and there"
          f" are {self.latent_channels} latent channels"
        )
    for width in self.block_out_channels:
      if width % self.norm_num_groups:
        raise errors.UserError(
          f"block_out_channels {width} is not a multiple of norm_num_groups"
          f" {self.norm_num_groups}: mend the VAE's config.json"
        )

  @property
  def factor(self) -> int:
    """By how much images are larger than latents."""
    return 2 ** (len(self.block_out_channels) - 1)

  @classmethod
  def from_hf(cls, values: Mapping[str, Any]) -> "Config":
    """Reads the dict of a `vae/config.json`.

    Raises:
      errors.UserError: it is of another network, or asks for a branch that
        is not built here.
    """
    return unet_config.read(cls, values, "AutoencoderKL")


class Moments(NamedTuple):
  """The posterior of the latents.

  Attributes:
    mean: [B, h, w, C].
    logvar: logarithm of the variance, in [-30, 20].
  """

  mean: jax.Array
  logvar: jax.Array

  def sample(self, rng: jax.Array) -> jax.Array:
    """Draws latents [B, h, w, C]."""
    noise = jax.random.normal(rng, self.mean.shape, self.mean.dtype)
    return self.mean + jnp.exp(0.5 * self.logvar) * noise


def normalize(latents: types.Array, config: Config) -> jax.Array:
  """Returns what a UNet works on, for latents [B, h, w, C] of the encoder."""
  if config.latents_mean is None or config.latents_std is None:
    return latents * config.scaling_factor
  mean, std = _statistics(latents, config)
  return (latents - mean) * config.scaling_factor / std


def denormalize(latents: types.Array, config: Config) -> jax.Array:
  """Returns what the decoder takes, for a UNet's latents [B, h, w, C]."""
  if config.latents_mean is None or config.latents_std is None:
    return latents / config.scaling_factor
  mean, std = _statistics(latents, config)
  return latents * std / config.scaling_factor + mean


class Attention(nn.Module):
  """One head over all pixels, with its norm and residual sum."""

  groups: int
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [B, H, W, C] for x [B, H, W, C]."""
    batch, height, width, channels = x.shape
    norm = resnet2d.GroupNorm(self.groups, _EPSILON, name="group_norm")
    y = norm(x).reshape(batch, height * width, channels)
    attend = transformer2d.Attention(
      channels, heads=1, bias=True, dtype=self.dtype
    )
    nn.share_scope(self, attend)
    return x + attend(y, chunk=_CHUNK).reshape(x.shape)


class _Part(nn.Module):
  """What encoder and decoder share."""

  config: Config
  dtype: jax.typing.DTypeLike = jnp.float32

  def resnet(self, features: int) -> resnet2d.ResnetBlock:
    return resnet2d.ResnetBlock(
      features,
      self.config.norm_num_groups,
      epsilon=_EPSILON,
      act=self.config.act_fn,
      dtype=self.dtype,
    )

  def last(self, features: int) -> None:
    """Makes the last norm and convolution."""
    wide = layers.stream_dtype(self.dtype)
    groups = self.config.norm_num_groups
    self.conv_norm_out = resnet2d.GroupNorm(groups, _EPSILON)
    self.conv_out = resnet2d.conv3x3(features, wide)

  def finish(self, x: jax.Array) -> jax.Array:
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class MidBlock(_Part):
  """Residual layer, attention, residual layer."""

  def setup(self):  # noqa: D102
    config = self.config
    width = config.block_out_channels[-1]
    self.resnets = [self.resnet(width) for _ in range(2)]
    self.attentions = [
      Attention(config.norm_num_groups, self.dtype)
      for _ in range(config.mid_block_add_attention)
    ]

  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [B, H, W, C] for x [B, H, W, C]."""
    x = self.resnets[0](x)
    for attend in self.attentions:
      x = attend(x)
    return self.resnets[1](x)


class DownBlock(_Part):
  """Residual layers and, but at the coarsest level, a downsampling."""

  level: int = 0

  def setup(self):  # noqa: D102
    config = self.config
    width = config.block_out_channels[self.level]
    self.resnets = [self.resnet(width) for _ in range(config.layers_per_block)]
    self.downsamplers = [
      resnet2d.Downsample(width, padding=0, dtype=self.dtype)
      for _ in range(self.level < len(config.block_out_channels) - 1)
    ]

  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [B, H / 2, W / 2, C'] for x [B, H, W, C]."""
    for layer in (*self.resnets, *self.downsamplers):
      x = layer(x)
    return x


class UpBlock(_Part):
  """Residual layers and, but at the finest level, an upsampling."""

  level: int = 0

  def setup(self):  # noqa: D102
    config = self.config
    width = config.block_out_channels[self.level]
    count = config.layers_per_block + 1
    self.resnets = [self.resnet(width) for _ in range(count)]
    self.upsamplers = [
      resnet2d.Upsample(width, dtype=self.dtype) for _ in range(self.level > 0)
    ]

  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [B, 2 H, 2 W, C'] for x [B, H, W, C]."""
    for layer in (*self.resnets, *self.upsamplers):
      x = layer(x)
    return x


class Encoder(_Part):
  """Images to the moments of the latents, before `quant_conv`."""

  def setup(self):  # noqa: D102
    config = self.config
    widths = config.block_out_channels
    self.conv_in = resnet2d.conv3x3(widths[0], self.dtype)
    self.down_blocks = [
      DownBlock(config, self.dtype, level) for level in range(len(widths))
    ]
    self.mid_block = MidBlock(config, self.dtype)
    self.last(2 * config.latent_channels)

  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [B, H / f, W / f, 2 C] for images [B, H, W, 3]."""
    x = self.conv_in(x)
    for block in self.down_blocks:
      x = block(x)
    return self.finish(self.mid_block(x))


class Decoder(_Part):
  """Latents, after `post_quant_conv`, to images."""

  def setup(self):  # noqa: D102
    config = self.config
    widths = config.block_out_channels
    self.conv_in = resnet2d.conv3x3(widths[-1], self.dtype)
    self.mid_block = MidBlock(config, self.dtype)
    self.up_blocks = [
      UpBlock(config, self.dtype, level)
      for level in reversed(range(len(widths)))
    ]
    self.last(config.out_channels)

  def __call__(self, z: types.Array) -> jax.Array:
    """Returns [B, f h, f w, 3] for latents [B, h, w, C]."""
    x = self.mid_block(self.conv_in(z))
    for block in self.up_blocks:
      x = block(x)
    return self.finish(x)


class VAE(nn.Module):
  """Diffusers' AutoencoderKL in NHWC.

  Attributes:
    config: sizes.
    dtype: of the convolutions; never float16 where config.force_upcast.
  """

  config: Config
  dtype: jax.typing.DTypeLike = jnp.float32

  def setup(self):  # noqa: D102
    config = self.config
    if self.dtype == jnp.float16 and config.force_upcast:
      raise errors.UserError(
        "this VAE overflows float16 (force_upcast in its config.json): use"
        " bfloat16 or float32"
      )
    wide = layers.stream_dtype(self.dtype)
    self.encoder = Encoder(config, self.dtype)
    self.decoder = Decoder(config, self.dtype)
    if config.use_quant_conv:
      self.quant_conv = convolution.Conv(
        2 * config.latent_channels, (1, 1), dtype=wide
      )
    if config.use_post_quant_conv:
      self.post_quant_conv = convolution.Conv(
        config.latent_channels, (1, 1), dtype=wide
      )

  def encode(self, images: types.Array) -> Moments:
    """Encodes.

    Args:
      images: [B, H, W, 3] in [-1, 1]; H and W multiples of `Config.factor`.

    Returns:
      Moments of the latents [B, H / f, W / f, C], not normalised.
    """
    x = self.encoder(images)
    if self.config.use_quant_conv:
      x = self.quant_conv(x)
    mean, logvar = jnp.split(x, 2, axis=-1)
    return Moments(mean, jnp.clip(logvar, -30, 20))

  def decode(self, latents: types.Array) -> jax.Array:
    """Decodes.

    Args:
      latents: [B, h, w, C], after `denormalize`.

    Returns:
      Images [B, f h, f w, 3] in about [-1, 1], float32 or wider.
    """
    if self.config.use_post_quant_conv:
      latents = self.post_quant_conv(latents)
    return self.decoder(latents)

  def __call__(self, images: types.Array) -> jax.Array:
    """Encodes to the mean and decodes; [B, H, W, 3] to the same."""
    return self.decode(self.encode(images).mean)


def init_params(config: Config, rng: jax.Array) -> types.Params:
  """Returns fresh parameters."""
  return jax.jit(VAE(config).init)(rng, _example(config))["params"]


@shapes.remembered
def param_shapes(config: Config) -> types.Params:
  """Returns the tree of ShapeDtypeStructs that a checkpoint must fill."""
  init = VAE(config).init
  return jax.eval_shape(init, jax.random.key(0), _example(config))["params"]


def _example(config: Config) -> jax.Array:
  return jnp.zeros((1, config.factor, config.factor, config.in_channels))


def _statistics(
  latents: types.Array, config: Config
) -> tuple[jax.Array, jax.Array]:
  """Returns mean and spread of the channels, [1, 1, 1, C]."""
  shape = (1, 1, 1, config.latent_channels)
  dtype = jnp.asarray(latents).dtype
  return tuple(
    jnp.asarray(values, dtype).reshape(shape)
    for values in (config.latents_mean, config.latents_std)
  )
