"""The denoiser of Stable Diffusion 1.x, 2.x and XL (diffusers' classes).

The parameter tree has the names of diffusers' UNet2DConditionModel, with "_"
before numbers: `down_blocks_1/attentions_0/transformer_blocks_3/attn2/to_k`.

    net = unet.UNet(config, dtype=jnp.bfloat16)
    noise = net.apply({"params": params}, latents, timesteps, context,
                      pooled=pooled, time_ids=time_ids)

or, with everything that is the same at each step computed once,

    embs = net.apply(variables, steps, pooled=..., method="embed")
    text = net.apply(variables, context, method="text")
    noise = net.apply(variables, latents, emb, text, method="denoise")
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import errors, types
from dppp_jax.models import (
  backbone,
  convolution,
  layers,
  resnet2d,
  shapes,
  unet_blocks,
  unet_config,
)

Config = unet_config.Config
Residuals = backbone.Residuals


class UNet(backbone.Backbone):
  """Diffusers' UNet2DConditionModel in NHWC; attributes as in `Backbone`."""

  def setup(self):  # noqa: D102
    super().setup()
    config = self.config
    if config.encoder_hid_dim is not None:
      self.encoder_hid_proj = nn.Dense(config.text_dim, dtype=self.dtype)
    layer_counts = config.layers[::-1]
    self.up_blocks = [
      self.block(
        unet_blocks.UpBlock,
        kind,
        config.levels - 1 - i,
        config.up_depths[i],
        layer_counts[i] + 1,
      )
      for i, kind in enumerate(config.up_block_types)
    ]
    self.conv_norm_out = resnet2d.GroupNorm(
      config.norm_num_groups, config.norm_eps
    )
    kernel = config.conv_out_kernel
    self.conv_out = convolution.Conv(
      config.out_channels,
      (kernel, kernel),
      padding=(kernel - 1) // 2,
      dtype=self.wide,
    )

  def embed(self, timesteps: types.Array, **conditions: Any) -> jax.Array:
    """Returns [B, E]; see `Backbone.embed`."""
    emb = super().embed(timesteps, **conditions)
    act = self.config.time_embedding_act_fn
    return layers.activation(act)(emb) if act else emb

  def text(self, context: types.Array) -> dict[str, Any]:
    """Returns keys and values of every attention; see `Backbone.text`."""
    if self.config.encoder_hid_dim is not None:
      context = self.encoder_hid_proj(context)
    found = super().text(context)
    return found | {"up": [block.text(context) for block in self.up_blocks]}

  def denoise(
    self,
    sample: types.Array,
    emb: types.Array,
    text: dict[str, Any],
    residuals: Residuals | None = None,
  ) -> jax.Array:
    """Predicts the noise (or the velocity, as the checkpoint was trained).

    Args:
      sample: latents [B, H, W, C], scaled as the schedule wants it.
      emb: [B, E], of `embed`.
      text: of `text`.
      residuals: of ControlNets, summed.

    Returns:
      [B, H, W, C'] in float32 or wider.

    Raises:
      errors.UserError: the residuals are of a ControlNet for another UNet.
    """
    if self.config.center_input_sample:
      sample = 2 * sample - 1
    x, skips = self.descend(self.conv_in(sample), emb, text)
    if residuals is not None:
      if len(residuals.down) != len(skips):
        raise errors.UserError(
          f"the ControlNet gives {len(residuals.down)} residuals and the UNet"
          f" has {len(skips)} skips: it is a ControlNet for another base model"
        )
      skips = [
        skip + more.astype(skip.dtype)
        for skip, more in zip(skips, residuals.down, strict=True)
      ]
      x = x + residuals.mid.astype(x.dtype)
    for block, block_text in zip(self.up_blocks, text["up"], strict=True):
      taken = skips[-block.num_layers :]
      skips = skips[: -block.num_layers]
      size = (skips or taken)[-1].shape[1:3]
      x = block(x, taken, emb, block_text, size)
    act = layers.activation(self.config.act_fn)
    return self.conv_out(act(self.conv_norm_out(x)))

  def __call__(
    self,
    sample: types.Array,
    timesteps: types.Array,
    context: types.Array,
    *,
    residuals: Residuals | None = None,
    **conditions: Any,
  ) -> jax.Array:
    """Predicts in one call.

    Args:
      sample: [B, H, W, C].
      timesteps: [B], or one number for all.
      context: text [B, L, D].
      residuals: of ControlNets.
      **conditions: of `Backbone.embed`.

    Returns:
      [B, H, W, C'].
    """
    timesteps = jnp.broadcast_to(jnp.asarray(timesteps), sample.shape[:1])
    emb = self.embed(timesteps, **conditions)
    return self.denoise(sample, emb, self.text(context), residuals)


def init_params(
  config: Config, rng: jax.Array, *, stack_from: int = 0
) -> types.Params:
  """Returns fresh parameters."""
  net = UNet(config, stack_from=stack_from)
  args, conditions = example(config)
  return jax.jit(net.init)(rng, *args, **conditions)["params"]


@shapes.remembered
def param_shapes(config: Config, *, stack_from: int = 0) -> types.Params:
  """Returns the tree of ShapeDtypeStructs that a checkpoint must fill."""
  net = UNet(config, stack_from=stack_from)
  args, conditions = example(config)
  return jax.eval_shape(net.init, jax.random.key(0), *args, **conditions)[
    "params"
  ]


def example(
  config: unet_config.BackboneConfig,
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
  """Returns the smallest inputs that a network of a configuration takes."""
  side = 2 ** (config.levels - 1)
  args = [
    jnp.zeros((1, side, side, config.in_channels)),
    jnp.zeros((1,)),
    jnp.zeros(
      (1, 1, getattr(config, "encoder_hid_dim", None) or config.text_dim)
    ),
  ]
  conditions = {}
  if config.addition_embed_type == "text_time":
    sizes = 6 * config.addition_time_embed_dim
    pooled = config.projection_class_embeddings_input_dim - sizes
    conditions["pooled"] = jnp.zeros((1, pooled))
    conditions["time_ids"] = jnp.zeros((1, 6))
  if config.class_embed_type == "identity":
    conditions["class_labels"] = jnp.zeros((1, config.time_dim))
  elif config.class_embed_type in ("projection", "simple_projection"):
    width = config.projection_class_embeddings_input_dim
    conditions["class_labels"] = jnp.zeros((1, width))
  elif config.class_embed_type == "timestep":
    conditions["class_labels"] = jnp.zeros((1,))
  elif config.num_class_embeds is not None:
    conditions["class_labels"] = jnp.zeros((1,), jnp.int32)
  return args, conditions
