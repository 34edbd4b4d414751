"""ControlNetUnion: one network for several kinds of condition (diffusers).

A small transformer looks at the mean of each condition and of the latents,
and says what to add to each. Both that transformer's peculiarities are those
of diffusers 0.42: a scale multiplies what goes in and what is added, and
attention runs over the *batch* (see `mix_batch`).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import types
from dppp_jax.models import (
  attention,
  backbone,
  controlnet,
  layers,
  shapes,
  unet_config,
)

Config = unet_config.UnionConfig
Residuals = backbone.Residuals


class FusionAttention(nn.Module):
  """Self-attention over the batch, with torch's fused names.

  In torch the module is given [B, N, D] where it reads [N, B, D]: each
  condition attends to the same condition in the other samples. For a batch of
  equal samples, as is the pair of classifier-free guidance, the softmax
  averages equal values and the attention is its value projection.

  Attributes:
    heads: attention heads.
    mix_batch: attend over the batch, as torch does; otherwise each sample is
      computed as if it were alone, and does not depend on its neighbours.
    dtype: of the matrix products.
  """

  heads: int
  mix_batch: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [B, N, D] for x [B, N, D]."""
    width = x.shape[-1]
    dense = lambda name: nn.Dense(width, dtype=self.dtype, name=name)
    split = lambda y: y.swapaxes(0, 1).reshape(
      y.shape[1], y.shape[0], self.heads, -1
    )
    query, key, value = dense("q_proj"), dense("k_proj"), dense("v_proj")
    if self.mix_batch or self.is_initializing():
      y = attention.dot_product(split(query(x)), split(key(x)), split(value(x)))
      y = y.reshape(*y.shape[:2], width).swapaxes(0, 1)
    else:
      y = value(x)
    return dense("out_proj")(y)


class FusionBlock(nn.Module):
  """A pre-norm transformer block under the names of OpenAI's CLIP."""

  heads: int
  mix_batch: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: types.Array) -> jax.Array:
    """Returns [B, N, D] for x [B, N, D]."""
    width = x.shape[-1]
    attend = FusionAttention(
      self.heads, self.mix_batch, self.dtype, name="attn"
    )
    x = x + attend(layers.LayerNorm(name="ln_1")(x))
    y = layers.LayerNorm(name="ln_2")(x)
    y = nn.Dense(4 * width, dtype=self.dtype, name="mlp_c_fc")(y)
    y = layers.activation("quick_gelu")(y)
    return x + nn.Dense(width, dtype=self.dtype, name="mlp_c_proj")(y)


class ControlNetUnion(controlnet.ControlNet):
  """Diffusers' ControlNetUnionModel in NHWC.

  Attributes:
    mix_batch: see `FusionAttention`; True is diffusers to the digit for
      batches of different samples.
  """

  mix_batch: bool = False

  def setup(self):  # noqa: D102
    super().setup()
    config = self.config
    self.task_embedding = self.param(
      "task_embedding",
      nn.initializers.normal(config.num_trans_channel**0.5),
      (config.num_control_type, config.num_trans_channel),
    )
    # The spelling is that of the checkpoints.
    self.transformer_layes = [
      FusionBlock(config.num_trans_head, self.mix_batch, self.wide)
      for _ in range(config.num_trans_layer)
    ]
    self.spatial_ch_projs = nn.Dense(
      config.num_proj_channel,
      dtype=self.wide,
      kernel_init=nn.initializers.zeros,
    )
    self.control_add_embedding = self.time_mlp()

  def embed(
    self,
    timesteps: types.Array,
    *,
    control_type: types.Array,
    **conditions: Any,
  ) -> jax.Array:
    """Embeds time, sizes, and which kinds of condition are used.

    Args:
      timesteps: [B].
      control_type: [B, K], 1 for a kind that is used and 0 for the others.
      **conditions: of `Backbone.embed`.

    Returns:
      [B, E].
    """
    emb = super().embed(timesteps, **conditions)
    kinds = self.sinusoid(
      control_type.reshape(-1), self.config.addition_time_embed_dim
    )
    kinds = kinds.reshape(control_type.shape[0], -1)
    return emb + self.control_add_embedding(kinds)

  def hint(self, image: Sequence[types.Array]) -> list[jax.Array]:
    """Embeds condition images, one [B, H, W, 3] in [0, 1] for each kind."""
    return [self.controlnet_cond_embedding(one) for one in image]

  def control(
    self,
    sample: types.Array,
    emb: types.Array,
    text: dict[str, Any],
    hint: Sequence[types.Array],
    *,
    kinds: Sequence[int],
    scale: types.Array | float = 1.0,
    guess: bool = False,
  ) -> Residuals:
    """Returns what the UNet should add to its skips.

    Args:
      sample: the latents that the UNet gets, [B, H, W, C].
      emb: of this network's `embed`, [B, E].
      text: of this network's `text`.
      hint: of `hint`.
      kinds: the index of each condition's kind.
      scale: one factor, or one for each condition. With one condition it
        multiplies the residuals, with several what is fused.
      guess: see `ControlNet.control`.

    Returns:
      Residuals.
    """
    scales = jnp.broadcast_to(jnp.asarray(scale, self.wide), (len(kinds),))
    is_alone = len(kinds) == 1
    x = self.conv_in(sample)
    mean = lambda y: jnp.mean(y, axis=(1, 2), dtype=self.wide)
    tokens = []
    for y, kind, factor in zip(hint, kinds, scales, strict=True):
      token = mean(y) + self.task_embedding[kind][None]
      tokens.append(token if is_alone else token * factor)
    tokens = jnp.stack([*tokens, mean(x)], axis=1)
    for block in self.transformer_layes:
      tokens = block(tokens)
    added = self.spatial_ch_projs(tokens)[:, :, None, None]
    for i, (y, factor) in enumerate(zip(hint, scales, strict=True)):
      fused = y + added[:, i]
      x = x + (fused if is_alone else fused * factor).astype(x.dtype)
    factor = scales[0] if is_alone else 1.0
    return self._residuals(x, emb, text, factor, guess)

  def __call__(
    self,
    sample: types.Array,
    timesteps: types.Array,
    context: types.Array,
    image: Sequence[types.Array],
    *,
    kinds: Sequence[int],
    control_type: types.Array | None = None,
    scale: types.Array | float = 1.0,
    guess: bool = False,
    **conditions: Any,
  ) -> Residuals:
    """Computes the residuals in one call.

    Args:
      sample: [B, H, W, C].
      timesteps: [B], or one number for all.
      context: text [B, L, D].
      image: one [B, 8 H, 8 W, 3] in [0, 1] for each kind.
      kinds: the index of each condition's kind.
      control_type: [B, K]; None: 1 for the kinds, 0 for the others.
      scale: see `control`.
      guess: see `ControlNet.control`.
      **conditions: of `Backbone.embed`.

    Returns:
      Residuals.
    """
    batch = sample.shape[0]
    if control_type is None:
      used = jnp.zeros(self.config.num_control_type, self.wide)
      used = used.at[jnp.asarray(tuple(kinds))].set(1)
      control_type = jnp.tile(used[None], (batch, 1))
    timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
    emb = self.embed(timesteps, control_type=control_type, **conditions)
    return self.control(
      sample,
      emb,
      self.text(context),
      self.hint(image),
      kinds=kinds,
      scale=scale,
      guess=guess,
    )


def build(config: controlnet.Config, **options: Any) -> controlnet.ControlNet:
  """Returns the network of a configuration, a union or a plain ControlNet.

  Args:
    config: of either kind.
    **options: attributes of `Backbone`.
  """
  is_union = isinstance(config, Config)
  return (ControlNetUnion if is_union else controlnet.ControlNet)(
    config, **options
  )


@shapes.remembered
def param_shapes(config: Config, *, stack_from: int = 0) -> types.Params:
  """Returns the tree of ShapeDtypeStructs that a checkpoint must fill."""
  net = ControlNetUnion(config, stack_from=stack_from)
  args, conditions = controlnet.example(config)
  args[-1] = [args[-1]]
  init = lambda rng: net.init(rng, *args, kinds=(0,), **conditions)
  return jax.eval_shape(init, jax.random.key(0))["params"]
