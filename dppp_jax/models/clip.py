"""CLIP: the vision and the text tower, as Re-ID and SDXL need them.

The parameter tree has the names of transformers' CLIPModel: `vision_model`,
`visual_projection`, `text_model`, `text_projection`, `logit_scale`. Each tower
alone reads its own part and leaves the rest unread, so the tree of a whole
CLIP may be handed to any of the three modules:

    tower = clip.VisionTower(config.vision, dtype=jnp.bfloat16)
    output = tower.apply({"params": params}, images)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, types
from dppp_jax.models import clip_config, layers, shapes, transformer
from dppp_jax.models import packing as packing_lib

Config = clip_config.Config
VisionConfig = clip_config.VisionConfig
TextConfig = clip_config.TextConfig
VARIANTS = clip_config.VARIANTS
vision_from_hf = clip_config.vision_from_hf
text_from_hf = clip_config.text_from_hf

# Before 2023 Hugging Face wrote this id into every CLIP configuration, SDXL's
# included. No CLIP vocabulary has its end of text there: it means "the highest
# id of the prompt", which is what OpenAI's code takes.
_LEGACY_EOS = 2


class VisionOutput(NamedTuple):
  """What Re-ID reads of an image.

  Attributes:
    penultimate_cls: [B, D], class token after the last but one block, raw.
    cls: [B, D], class token after the last block and the post layer norm.
    projected: [B, E], `cls` through the visual projection, not normalised;
      None for a tower without projection.
    patches: {block: [B, P, D]}, raw patch tokens after that many blocks.
  """

  penultimate_cls: jax.Array
  cls: jax.Array
  projected: jax.Array | None
  patches: dict[int, jax.Array]


class TextOutput(NamedTuple):
  """What Re-ID and diffusion read of a prompt.

  Attributes:
    projected: [B, E], `pooled` through the text projection, not normalised;
      None for a tower without projection.
    pooled: [B, D], the end-of-text token after the final layer norm.
    hidden: the states [B, N, D] asked for, in the order asked.
  """

  projected: jax.Array | None
  pooled: jax.Array
  hidden: tuple[jax.Array, ...]


class _VisionEmbeddings(nn.Module):
  config: VisionConfig
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(
    self, images: types.Array, class_offset: types.Array | None
  ) -> jax.Array:
    config = self.config
    grid = config.grid(*images.shape[1:3])
    patches = layers.PatchEmbedding(
      config.hidden_size,
      config.patch_size,
      config.stride or config.patch_size,
      self.dtype,
      name="patch_embedding",
    )(images)
    width = config.hidden_size
    cls = self.param(
      "class_embedding", nn.initializers.normal(width**-0.5), (width,)
    )
    positions = nn.Embed(
      config.side**2 + 1,
      width,
      embedding_init=nn.initializers.normal(0.02),
      name="position_embedding",
    ).embedding
    wide = layers.stream_dtype(self.dtype)
    positions = positions.astype(wide)
    cls = jnp.broadcast_to(cls.astype(wide), (images.shape[0], 1, width))
    if class_offset is not None:
      cls = cls + class_offset[:, None].astype(wide)
    square = positions[1:].reshape(config.side, config.side, width)
    square = layers.bilinear_grid(square, grid)
    x = jnp.concatenate([cls, patches.astype(wide)], axis=1)
    positions = jnp.concatenate([positions[:1], square.reshape(-1, width)])
    return x + positions[None]


class _VisionModel(nn.Module):
  config: VisionConfig
  remat: bool
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(
    self,
    images: types.Array,
    patch_blocks: Sequence[int],
    class_offset: types.Array | None,
  ) -> tuple[jax.Array, jax.Array, dict[int, jax.Array]]:
    config = self.config
    norm = lambda name: layers.LayerNorm(
      epsilon=config.layer_norm_eps, name=name
    )
    x = _VisionEmbeddings(config, self.dtype, name="embeddings")(
      images, class_offset
    )
    x = norm("pre_layrnorm")(x)  # The spelling of all checkpoints.
    depth = config.num_hidden_layers
    x, states = transformer.Encoder(
      config, False, self.remat, self.dtype, name="encoder"
    )(
      x,
      taps=sorted({depth - 1, *patch_blocks}),
      # Of the last block Re-ID reads the class token alone: the other rows
      # then need no query and no MLP.
      rows=None if depth in patch_blocks else 0,
    )
    patches = {block: states[block][:, 1:] for block in patch_blocks}
    return states[depth - 1][:, 0], norm("post_layernorm")(x[:, 0]), patches


class VisionTower(nn.Module):
  """The vision transformer with its projection.

  Attributes:
    config: sizes.
    dtype: of the matrix products; norms, softmax and the residual stream are
      at least float32.
    remat: recompute blocks in the backward pass to save memory.
  """

  config: VisionConfig
  dtype: jax.typing.DTypeLike = jnp.float32
  remat: bool = False

  def setup(self):  # noqa: D102
    self.vision_model = _VisionModel(self.config, self.remat, self.dtype)
    if self.config.projection_dim is not None:
      self.visual_projection = _projection(self.config, self.dtype)

  def __call__(
    self,
    images: types.Array,
    *,
    patch_blocks: Sequence[int] = (),
    class_offset: types.Array | None = None,
  ) -> VisionOutput:
    """Encodes images.

    Args:
      images: [B, H, W, C], normalised; any size of at least one patch. The
        position embeddings are resized to its grid (torch's bilinear, no
        antialias), the parameter keeps the checkpoint's size.
      patch_blocks: block counts whose patch tokens are wanted, e.g. (11,).
      class_offset: [B, D], added to the class token before the position
        embeddings (CLIP-ReID's camera embedding).

    Returns:
      VisionOutput, in `stream_dtype` of dtype.
    """
    depth = self.config.num_hidden_layers
    for block in patch_blocks:
      if not 0 <= block <= depth:
        raise errors.UserError(
          f"patch_blocks {tuple(patch_blocks)} must lie in 0..{depth}, the"
          " blocks of this vision tower"
        )
    penultimate, cls, patches = self.vision_model(
      images, tuple(patch_blocks), class_offset
    )
    projected = None
    if self.config.projection_dim is not None:
      projected = self.visual_projection(cls).astype(cls.dtype)
    return VisionOutput(penultimate, cls, projected, patches)


class _TextEmbeddings(nn.Module):
  config: TextConfig
  dtype: jax.typing.DTypeLike

  def setup(self):
    config = self.config
    init = nn.initializers.normal(0.02)
    table = lambda rows: nn.Embed(rows, config.hidden_size, embedding_init=init)
    self.token_embedding = table(config.vocab_size)
    self.position_embedding = table(config.max_position_embeddings)

  def tokens(self, ids: types.Array) -> jax.Array:
    return self.token_embedding(ids).astype(layers.stream_dtype(self.dtype))

  def __call__(
    self, tokens: types.Array, places: np.ndarray | None = None
  ) -> jax.Array:
    """Adds positions to tokens [B, N, D]: 0 to N - 1, or those of places."""
    length = tokens.shape[1] if places is None else places.max() + 1
    longest = self.config.max_position_embeddings
    if length > longest:
      raise errors.UserError(
        f"a prompt of {length} tokens is longer than the {longest} that this"
        " text encoder has positions for: shorten it"
      )
    wide = layers.stream_dtype(self.dtype)
    positions = self.position_embedding.embedding[:length].astype(wide)
    positions = positions if places is None else positions[places]
    return tokens.astype(wide) + positions[None]


class _TextModel(nn.Module):
  config: TextConfig
  remat: bool
  dtype: jax.typing.DTypeLike

  def setup(self):
    self.embeddings = _TextEmbeddings(self.config, self.dtype)
    self.encoder = transformer.Encoder(
      self.config, True, self.remat, self.dtype
    )
    self.final_layer_norm = layers.LayerNorm(epsilon=self.config.layer_norm_eps)

  def __call__(
    self, tokens: types.Array, eot: types.Array | int, taps: Sequence[int]
  ) -> tuple[jax.Array, dict[int, jax.Array]]:
    depth = self.config.num_hidden_layers
    whole = depth in taps
    x, states = self.encoder(
      self.embeddings(tokens), taps=taps, rows=None if whole else eot
    )
    x = layers.take_rows(x, eot) if whole else x
    return self.final_layer_norm(x[:, 0]), states

  def read(
    self,
    packing: packing_lib.Packing,
    shared: types.Array,
    own: types.Array,
  ) -> jax.Array:
    shared = self.embeddings(shared[None], packing.shared_positions)[0]
    own = self.embeddings(own, packing.own_positions)
    x, _ = self.encoder(
      packing.stack(shared, own),
      rows=packing.last_rows(len(own)),
      packing=packing,
    )
    return self.final_layer_norm(x)


class TextTower(nn.Module):
  """The causal text transformer with its projection.

  Attributes:
    config: sizes.
    dtype: of the matrix products, as in `VisionTower`.
    remat: recompute blocks in the backward pass to save memory.
  """

  config: TextConfig
  dtype: jax.typing.DTypeLike = jnp.float32
  remat: bool = False

  def setup(self):  # noqa: D102
    self.text_model = _TextModel(self.config, self.remat, self.dtype)
    if self.config.projection_dim is not None:
      self.text_projection = _projection(self.config, self.dtype)

  def embed(self, ids: types.Array) -> jax.Array:
    """Returns the token embeddings [B, N, D] of ids [B, N], no positions."""
    return self.text_model.embeddings.tokens(ids)

  def __call__(
    self,
    ids: types.Array | None = None,
    *,
    embeddings: types.Array | None = None,
    eot: types.Array | int | None = None,
    hidden: Sequence[int] = (),
    final_norm: bool = False,
  ) -> TextOutput:
    """Encodes prompts of one length N, their own: nothing after EOT counts.

    Args:
      ids: int [B, N]; may be left out where embeddings and eot are given.
      embeddings: [B, N, D], instead of those of ids: token embeddings in
        which pseudo-words took the place of some (`packing.put_words`).
      eot: position of the end of text, int [B] or one int; found in ids
        where it is not given.
      hidden: which states to return whole, counted as transformers does: 0
        the embeddings, i the output of block i, -1 that of the last block,
        -2 the one that SDXL reads.
      final_norm: run the returned states through the final layer norm.

    Returns:
      TextOutput, in `stream_dtype` of dtype.
    """
    if eot is None:
      if ids is None:
        raise ValueError("eot must be given where ids are not")
      eot = eot_positions(ids, self.config.eos_token_id)
    if embeddings is None:
      embeddings = self.embed(ids)
    states = self.config.num_hidden_layers + 1
    for index in hidden:
      if not -states <= index < states:
        raise errors.UserError(
          f"hidden state {index} was asked of a text encoder that has"
          f" {states}: clip_skip is too large"
        )
    taps = [index % states for index in hidden]
    pooled, found = self.text_model(embeddings, eot, taps)
    norm = self.text_model.final_layer_norm if final_norm else lambda x: x
    projected = None
    if self.config.projection_dim is not None:
      projected = self.text_projection(pooled).astype(pooled.dtype)
    return TextOutput(projected, pooled, tuple(norm(found[t]) for t in taps))

  def read(
    self,
    packing: packing_lib.Packing,
    shared: types.Array,
    own: types.Array,
  ) -> jax.Array:
    """Encodes several prompts of each example in one pass.

    What `__call__` gives for each prompt alone, without computing for each
    example anew what all of them share.

    Args:
      packing: of T prompts with S shared and M own tokens.
      shared: [S, D], embeddings of the shared tokens, of `embed`.
      own: [B, M, D], embeddings of the others, with pseudo-words in place.

    Returns:
      [B, T, E], each prompt's end-of-text token through the projection.
    """
    x = self.text_model.read(packing, shared, own)
    projected = self.text_projection(x).astype(x.dtype)
    return projected.reshape(len(own), len(packing.lengths), -1)


class CLIPOutput(NamedTuple):
  """Features of length 1 and the factor of their products.

  Attributes:
    image: [B, E].
    text: [B, E].
    scale: scalar, the exponential of `logit_scale`.
  """

  image: jax.Array
  text: jax.Array
  scale: jax.Array


class CLIP(nn.Module):
  """Both towers and the logit scale, for contrastive training."""

  config: Config
  dtype: jax.typing.DTypeLike = jnp.float32
  remat: bool = False

  def setup(self):  # noqa: D102
    self.vision = VisionTower(self.config.vision, self.dtype, self.remat)
    self.text = TextTower(self.config.text, self.dtype, self.remat)
    # The towers' parameters stand beside each other, without a level for each.
    nn.share_scope(self, self.vision)
    nn.share_scope(self, self.text)
    self.logit_scale = self.param(
      "logit_scale",
      nn.initializers.constant(self.config.logit_scale_init_value),
      (),
    )

  def __call__(self, images: types.Array, ids: types.Array) -> CLIPOutput:
    """Encodes images [B, H, W, C], normalised, and prompts int [B, N]."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return CLIPOutput(
      unit(self.vision(images).projected),
      unit(self.text(ids).projected),
      jnp.exp(self.logit_scale),
    )


def eot_positions(ids: types.Array, eos_token_id: int) -> jax.Array:
  """Returns where each prompt ends, int [B], by transformers' two rules.

  Args:
    ids: int [B, N].
    eos_token_id: of the configuration; 2 stands for the highest id.
  """
  if eos_token_id == _LEGACY_EOS:
    return jnp.argmax(ids, axis=-1)
  return jnp.argmax(ids == eos_token_id, axis=-1)


def init_params(
  config: Config | VisionConfig | TextConfig, rng: jax.Array
) -> types.Params:
  """Returns fresh parameters with the spread of transformers' CLIP."""
  module, inputs = _example(config)
  return jax.jit(module.init)(rng, *inputs)["params"]


@shapes.remembered
def param_shapes(config: Config | VisionConfig | TextConfig) -> types.Params:
  """Returns the tree of ShapeDtypeStructs that a checkpoint must fill."""
  module, inputs = _example(config)
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def _example(config: Any) -> tuple[nn.Module, list[types.Array]]:
  """Returns the module of a config and the smallest inputs it can take."""
  ids = jnp.zeros((1, 1), jnp.int32)
  if isinstance(config, TextConfig):
    return TextTower(config), [ids]
  vision = getattr(config, "vision", config)
  size = vision.patch_size
  images = jnp.zeros((1, size, size, vision.num_channels))
  if isinstance(config, VisionConfig):
    return VisionTower(config), [images]
  return CLIP(config), [images, ids]


def _projection(
  config: VisionConfig | TextConfig, dtype: jax.typing.DTypeLike
) -> nn.Dense:
  return nn.Dense(
    config.projection_dim,
    use_bias=False,
    dtype=dtype,
    kernel_init=nn.initializers.normal(config.hidden_size**-0.5),
  )
