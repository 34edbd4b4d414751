"""The half that UNets and ControlNets share: embeddings and the way down."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import types
from dppp_jax.models import (
  convolution,
  embeddings,
  layers,
  unet_blocks,
  unet_config,
)


class Residuals(NamedTuple):
  """What a ControlNet adds to a UNet; several nets' are summed leaf by leaf.

  Attributes:
    down: one [B, h, w, C] for each skip of the UNet, finest first; h and w
      are 1 where the ControlNet pools globally.
    mid: [B, h, w, C], for the output of the mid block.
  """

  down: tuple[jax.Array, ...]
  mid: jax.Array


class Backbone(nn.Module):
  """Embeddings, first convolution, down blocks and mid block.

  A step of denoising takes three things that a sampler need not compute at
  each step, so each has a method: `embed` (all steps at once), `text` (once
  for a prompt), and a ControlNet's `hint` (once for a condition image).

  Attributes:
    config: sizes.
    dtype: of matrix products and convolutions. Norms, softmax, embeddings and
      the last convolution run in float32 at least.
    stack_from: transformers of at least so many blocks are compiled as one
      `nn.scan`, with stacked parameters; 0: none.
    remat: recompute layers in the backward pass to save memory.
  """

  config: unet_config.BackboneConfig
  dtype: jax.typing.DTypeLike = jnp.float32
  stack_from: int = 0
  remat: bool = False

  def setup(self):  # noqa: D102
    config = self.config
    option = lambda name, default=None: getattr(config, name, default)
    kernel = option("conv_in_kernel", 3)
    self.conv_in = convolution.Conv(
      config.block_out_channels[0],
      (kernel, kernel),
      padding=(kernel - 1) // 2,
      dtype=self.dtype,
    )
    self.time_embedding = self.time_mlp(
      act=config.act_fn,
      post_act=option("timestep_post_act"),
      condition_dim=option("time_cond_proj_dim"),
    )
    if config.addition_embed_type == "text_time":
      self.add_embedding = self.time_mlp()
    if config.class_embed_type == "timestep":
      act = config.act_fn if isinstance(config, unet_config.Config) else "silu"
      self.class_embedding = self.time_mlp(act=act)
    elif config.class_embed_type == "projection":
      self.class_embedding = self.time_mlp()
    elif config.class_embed_type == "simple_projection":
      self.class_embedding = nn.Dense(config.time_dim, dtype=self.wide)
    elif config.num_class_embeds is not None:
      self.class_embedding = nn.Embed(
        config.num_class_embeds, config.time_dim, dtype=self.wide
      )
    self.down_blocks = [
      self.block(unet_blocks.DownBlock, kind, level, depth, layers_)
      for level, (kind, depth, layers_) in enumerate(
        zip(config.down_block_types, config.depths, config.layers, strict=True)
      )
    ]
    self.mid_block = None
    if config.mid_block_type is not None:
      self.mid_block = self.block(
        unet_blocks.MidBlock,
        config.mid_block_type,
        config.levels - 1,
        config.depths[-1],
        1,
      )

  @property
  def wide(self) -> jnp.dtype:
    """Dtype of what is small and must be exact: float32 at least."""
    return layers.stream_dtype(self.dtype)

  def time_mlp(self, **options: Any) -> embeddings.TimestepEmbedding:
    """Returns one of the small networks that embed times and sizes."""
    return embeddings.TimestepEmbedding(
      self.config.time_dim, dtype=self.wide, **options
    )

  def block(
    self,
    cls: type[unet_blocks.Block],
    kind: str,
    level: int,
    depth: int | tuple[int, ...],
    num_layers: int,
  ) -> unet_blocks.Block:
    """Returns a block of a kind at a level."""
    return cls(
      self.config,
      level,
      unet_blocks.layer_depths(kind, depth, num_layers),
      self.stack_from,
      self.remat,
      self.dtype,
    )

  def sinusoid(self, positions: types.Array, dim: int) -> jax.Array:
    """Returns [B, dim] for positions [B], by the configuration's rule."""
    return embeddings.sinusoid(
      positions,
      dim,
      flip_sin_to_cos=self.config.flip_sin_to_cos,
      freq_shift=self.config.freq_shift,
    )

  def embed(
    self,
    timesteps: types.Array,
    *,
    pooled: types.Array | None = None,
    time_ids: types.Array | None = None,
    class_labels: types.Array | None = None,
    timestep_cond: types.Array | None = None,
  ) -> jax.Array:
    """Embeds time and all that is not the picture or the text's tokens.

    Args:
      timesteps: [B], real.
      pooled: pooled text [B, P] (`text_time`).
      time_ids: original height and width, top and left of the crop, target
        height and width [B, 6] (`text_time`).
      class_labels: int [B] for a table, real [B] for `timestep`, else [B, D].
      timestep_cond: embedded guidance scale [B, C] (LCM).

    Returns:
      [B, E], float32 or wider.
    """
    config = self.config
    first = config.block_out_channels[0]
    emb = self.time_embedding(self.sinusoid(timesteps, first), timestep_cond)
    classes = self._embed_classes(class_labels)
    if classes is not None and getattr(config, "class_embeddings_concat", 0):
      emb = jnp.concatenate([emb, classes], axis=-1)
    elif classes is not None:
      emb = emb + classes
    if config.addition_embed_type == "text_time":
      if pooled is None or time_ids is None:
        raise ValueError("addition_embed_type text_time: pooled and time_ids")
      sizes = self.sinusoid(
        time_ids.reshape(-1), config.addition_time_embed_dim
      ).reshape(time_ids.shape[0], -1)
      joined = jnp.concatenate([pooled.astype(sizes.dtype), sizes], axis=-1)
      emb = emb + self.add_embedding(joined)
    return emb

  def _embed_classes(self, labels: types.Array | None) -> jax.Array | None:
    """Returns [B, E], or None for a network without classes."""
    config = self.config
    if config.class_embed_type is None and config.num_class_embeds is None:
      return None
    if labels is None:
      raise ValueError("this network needs class_labels")
    if config.class_embed_type == "identity":
      return labels.astype(self.wide)
    if config.class_embed_type == "timestep":
      labels = self.sinusoid(labels, config.block_out_channels[0])
    return self.class_embedding(labels)

  def text(self, context: types.Array) -> dict[str, Any]:
    """Returns keys and values of every attention to the text.

    Args:
      context: [B, L, C], the text encoders' states.

    Returns:
      A tree of arrays [B, L, heads, d] ([depth, B, L, heads, d] in stacks).
    """
    found = {"down": [block.text(context) for block in self.down_blocks]}
    if self.mid_block is not None:
      found["mid"] = self.mid_block.text(context)
    return found

  def descend(
    self, x: types.Array, emb: types.Array, text: dict[str, Any]
  ) -> tuple[jax.Array, list[jax.Array]]:
    """Runs down blocks and mid block.

    Args:
      x: output of the first convolution, [B, H, W, C].
      emb: of `embed`.
      text: of `text`.

    Returns:
      The output of the mid block, and all skips, finest first.
    """
    skips = [x]
    for block, block_text in zip(self.down_blocks, text["down"], strict=True):
      x, more = block(x, emb, block_text)
      skips += more
    if self.mid_block is not None:
      x = self.mid_block(x, emb, text["mid"])
    return x, skips
