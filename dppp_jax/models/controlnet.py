"""ControlNets: a copy of the UNet's way down that reads an image (diffusers).

net = controlnet.ControlNet(config, dtype=jnp.bfloat16)
hint = net.apply(variables, images, method="hint")       # Once per image.
residuals = net.apply(variables, latents, emb, text, hint, scale=0.8,
                      method="control")                  # At each step.
"""

from collections.abc import Sequence
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import types
from dppp_jax.models import backbone, convolution, shapes, unet, unet_config

Config = unet_config.ControlNetConfig
Residuals = backbone.Residuals

zero_conv = functools.partial(
  convolution.Conv, kernel_init=nn.initializers.zeros
)


class ConditionEmbedding(nn.Module):
  """Takes an image to the size of the latents.

  Attributes:
    features: channels of the output.
    widths: channels on the way; each but the first halves the size.
    dtype: of the convolutions.
  """

  features: int
  widths: Sequence[int]
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, image: types.Array) -> jax.Array:
    """Returns [B, H / 8, W / 8, C] (for four widths) for [B, H, W, 3]."""
    conv = functools.partial(
      convolution.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype
    )
    x = jax.nn.silu(conv(self.widths[0], name="conv_in")(image))
    for i, (width, wider) in enumerate(
      zip(self.widths[:-1], self.widths[1:], strict=True)
    ):
      x = jax.nn.silu(conv(width, name=f"blocks_{2 * i}")(x))
      x = conv(wider, strides=2, name=f"blocks_{2 * i + 1}")(x)
      x = jax.nn.silu(x)
    return zero_conv(
      self.features, (3, 3), padding=1, dtype=self.dtype, name="conv_out"
    )(x)


class ControlNet(backbone.Backbone):
  """Diffusers' ControlNetModel in NHWC; attributes as in `Backbone`."""

  def setup(self):  # noqa: D102
    super().setup()
    config = self.config
    widths = config.block_out_channels
    self.controlnet_cond_embedding = ConditionEmbedding(
      widths[0], config.conditioning_embedding_out_channels, self.dtype
    )
    zero = lambda width: zero_conv(width, (1, 1), dtype=self.dtype)
    # One for the first convolution, each layer and each downsampling.
    skips = [widths[0]]
    for level, (width, count) in enumerate(
      zip(widths, config.layers, strict=True)
    ):
      skips += [width] * (count + (level < config.levels - 1))
    self.controlnet_down_blocks = [zero(width) for width in skips]
    self.controlnet_mid_block = zero(widths[-1])

  def hint(self, image: types.Array) -> jax.Array:
    """Embeds a condition image.

    Args:
      image: [B, H, W, 3] in [0, 1], RGB (what a VAE takes is in [-1, 1]).

    Returns:
      [B, H / 8, W / 8, C].
    """
    if self.config.controlnet_conditioning_channel_order == "bgr":
      image = image[..., ::-1]
    return self.controlnet_cond_embedding(image)

  def control(
    self,
    sample: types.Array,
    emb: types.Array,
    text: dict[str, Any],
    hint: types.Array,
    *,
    scale: types.Array | float = 1.0,
    guess: bool = False,
  ) -> Residuals:
    """Returns what the UNet should add to its skips.

    Args:
      sample: the latents that the UNet gets, [B, H, W, C].
      emb: of this network's `embed`, [B, E].
      text: of this network's `text`.
      hint: of `hint`.
      scale: factor of all residuals.
      guess: finer residuals count less, 0.1 to 1 (diffusers' guess mode; no
        effect where the network pools globally).

    Returns:
      Residuals.
    """
    x = self.conv_in(sample)
    return self._residuals(x + hint, emb, text, scale, guess)

  def _residuals(
    self,
    x: jax.Array,
    emb: types.Array,
    text: dict[str, Any],
    scale: types.Array | float,
    guess: bool,
  ) -> Residuals:
    mid, skips = self.descend(x, emb, text)
    found = [
      conv(skip)
      for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)
    ]
    found.append(self.controlnet_mid_block(mid))
    scales = jnp.full(len(found), scale, self.wide)
    if guess and not self.config.global_pool_conditions:
      scales *= jnp.logspace(-1, 0, len(found), dtype=scales.dtype)
    found = [y * s.astype(y.dtype) for y, s in zip(found, scales, strict=True)]
    if self.config.global_pool_conditions:
      mean = functools.partial(
        jnp.mean, axis=(1, 2), keepdims=True, dtype=self.wide
      )
      found = [mean(y).astype(y.dtype) for y in found]
    return Residuals(tuple(found[:-1]), found[-1])

  def __call__(
    self,
    sample: types.Array,
    timesteps: types.Array,
    context: types.Array,
    image: types.Array,
    *,
    scale: types.Array | float = 1.0,
    guess: bool = False,
    **conditions: Any,
  ) -> Residuals:
    """Computes the residuals in one call.

    Args:
      sample: [B, H, W, C].
      timesteps: [B], or one number for all.
      context: text [B, L, D].
      image: [B, 8 H, 8 W, 3] in [0, 1].
      scale: factor of all residuals.
      guess: see `control`.
      **conditions: of `Backbone.embed`.

    Returns:
      Residuals.
    """
    timesteps = jnp.broadcast_to(jnp.asarray(timesteps), sample.shape[:1])
    return self.control(
      sample,
      self.embed(timesteps, **conditions),
      self.text(context),
      self.hint(image),
      scale=scale,
      guess=guess,
    )


def init_params(
  config: Config, rng: jax.Array, *, stack_from: int = 0
) -> types.Params:
  """Returns fresh parameters; the residuals of a fresh network are zero."""
  net = ControlNet(config, stack_from=stack_from)
  args, conditions = example(config)
  return jax.jit(net.init)(rng, *args, **conditions)["params"]


@shapes.remembered
def param_shapes(config: Config, *, stack_from: int = 0) -> types.Params:
  """Returns the tree of ShapeDtypeStructs that a checkpoint must fill."""
  net = ControlNet(config, stack_from=stack_from)
  args, conditions = example(config)
  return jax.eval_shape(net.init, jax.random.key(0), *args, **conditions)[
    "params"
  ]


def example(config: Config) -> tuple[list[jax.Array], dict[str, jax.Array]]:
  """Returns the smallest inputs that the network of a configuration takes."""
  args, conditions = unet.example(config)
  side = args[0].shape[1] * factor(config)
  image = jnp.zeros((1, side, side, config.conditioning_channels))
  return [*args, image], conditions


def factor(config: Config) -> int:
  """Returns by how much a condition image is larger than the latents."""
  return 2 ** (len(config.conditioning_embedding_out_channels) - 1)
