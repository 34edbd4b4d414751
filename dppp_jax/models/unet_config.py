"""The configurations of UNets and ControlNets, read from diffusers' files.

Fields have diffusers' names and defaults, so that a `config.json` is read as
it stands. What this package does not build is refused here, by name: a branch
that is quietly left out makes pictures that are only slightly wrong.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import types as types_lib
from typing import Any, get_args, get_origin, get_type_hints, TypeVar, Union

from dppp_jax import errors, ranges
from dppp_jax.models import layers

_T = TypeVar("_T")

_CLASS_EMBEDDINGS = (None, "timestep", "identity", "projection")
# Written by every version of diffusers, and without effect on the numbers in
# networks of the block types that are built here.
_NO_EFFECT = frozenset(
  (
    "addition_embed_type_num_heads",
    "dropout",
    "mid_block_only_cross_attention",
    "resnet_out_scale_factor",
    "resnet_skip_time_act",
    "sample_size",
    "upcast_attention",  # Logits and softmax are float32 here in any case.
  )
)

# Whole numbers count something, and others are factors, but for these.
_RANGES = {
  "freq_shift": dataclasses.replace(
    ranges.ANY, text="a whole number", whole=True
  ),
  "downsample_padding": ranges.WHOLE,
  "transformer_layers_per_block": ranges.WHOLE,
  "reverse_transformer_layers_per_block": ranges.WHOLE,
  "latents_mean": ranges.ANY,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
  """What UNets and ControlNets have in common.

  Attributes:
    in_channels: channels of the latents.
    flip_sin_to_cos: cosines come first in the sinusoids.
    freq_shift: in the exponent of the sinusoids' frequencies.
    down_block_types: `DownBlock2D` or `CrossAttnDownBlock2D`, finest first.
    mid_block_type: `UNetMidBlock2DCrossAttn`, `UNetMidBlock2D` or None.
    only_cross_attention: the first attention of a transformer block looks at
      the text too; one for all blocks, or one each.
    block_out_channels: width of each block.
    layers_per_block: residual layers of the blocks, up blocks have one more.
    downsample_padding: 1 on all sides, or 0: below and right only.
    mid_block_scale_factor: divides the mid block's residual sums.
    act_fn: of residual layers and time embedding.
    norm_num_groups: of all group norms.
    norm_eps: of all group norms but those of the transformers (1e-6).
    cross_attention_dim: width of the text; where it is one for each block,
      the same.
    transformer_layers_per_block: depth of the transformers: one for all
      blocks, one each, or one for each layer of each.
    attention_head_dim: the *number of heads*, against its name.
    num_attention_heads: the same under its right name, where it is written.
    use_linear_projection: transformers begin and end with a linear layer,
      not a 1x1 convolution.
    class_embed_type: None, `timestep`, `identity` or `projection`.
    num_class_embeds: number of classes of a table; class_embed_type is None.
    addition_embed_type: None, or `text_time` (SDXL: pooled text and sizes).
    addition_time_embed_dim: width of the sinusoid of each size.
    projection_class_embeddings_input_dim: width of pooled text and sinusoids.
    resnet_time_scale_shift: `default` (shift) or `scale_shift`.
  """

  in_channels: int = 4
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  down_block_types: tuple[str, ...] = (
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "DownBlock2D",
  )
  mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
  only_cross_attention: bool | tuple[bool, ...] = False
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int | tuple[int, ...] = 2
  downsample_padding: int = 1
  mid_block_scale_factor: float = 1.0
  act_fn: str = "silu"
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  cross_attention_dim: int | tuple[int, ...] = 1280
  transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
  attention_head_dim: int | tuple[int, ...] = 8
  num_attention_heads: int | tuple[int, ...] | None = None
  use_linear_projection: bool = False
  class_embed_type: str | None = None
  num_class_embeds: int | None = None
  addition_embed_type: str | None = None
  addition_time_embed_dim: int | None = None
  projection_class_embeddings_input_dim: int | None = None
  resnet_time_scale_shift: str = "default"

  def __post_init__(self):
    levels = len(self.block_out_channels)
    for name in (
      "down_block_types",
      "only_cross_attention",
      "layers_per_block",
      "cross_attention_dim",
      "transformer_layers_per_block",
      "attention_head_dim",
      "num_attention_heads",
    ):
      value = getattr(self, name)
      if isinstance(value, tuple) and len(value) != levels:
        raise errors.UserError(
          f"{name} has {len(value)} entries and block_out_channels"
          f" {levels}: mend config.json"
        )
    known = lambda name, *choices: _check(name, getattr(self, name), choices)
    for kind in self.down_block_types:
      _check("down_block_types", kind, ("DownBlock2D", "CrossAttnDownBlock2D"))
    known("mid_block_type", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
    known("downsample_padding", 0, 1)
    known("resnet_time_scale_shift", "default", "scale_shift")
    known("addition_embed_type", None, "text_time")
    for channels, heads in zip(
      self.block_out_channels, self.heads, strict=True
    ):
      if channels % self.norm_num_groups or channels % heads:
        raise errors.UserError(
          f"block_out_channels {channels} must be a multiple of"
          f" norm_num_groups {self.norm_num_groups} and of the"
          f" {heads} heads (attention_head_dim): mend config.json"
        )
    if len(set(spread(self.cross_attention_dim, self.levels))) > 1:
      raise errors.UserError(
        f"cross_attention_dim is {self.cross_attention_dim}: blocks that read"
        " texts of different widths are not built here"
      )
    if self.addition_embed_type and not (
      self.addition_time_embed_dim
      and self.projection_class_embeddings_input_dim
    ):
      raise errors.UserError(
        "addition_embed_type 'text_time' needs addition_time_embed_dim and"
        " projection_class_embeddings_input_dim: mend config.json"
      )

  @property
  def levels(self) -> int:
    """Number of resolutions."""
    return len(self.block_out_channels)

  @property
  def time_dim(self) -> int:
    """Width E of the time embedding."""
    return 4 * self.block_out_channels[0]

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads of each level."""
    heads = self.num_attention_heads or self.attention_head_dim
    return spread(heads, self.levels)

  @property
  def layers(self) -> tuple[int, ...]:
    """Residual layers of each down block."""
    return spread(self.layers_per_block, self.levels)

  @property
  def text_dim(self) -> int:
    """Width of the text that the transformers read."""
    return spread(self.cross_attention_dim, self.levels)[0]

  @property
  def depths(self) -> tuple[Any, ...]:
    """Transformer blocks at each level: one number, or one for each layer."""
    return spread(self.transformer_layers_per_block, self.levels)

  @property
  def cross_only(self) -> tuple[bool, ...]:
    """Whether a level's first attention looks at the text."""
    return spread(self.only_cross_attention, self.levels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BackboneConfig):
  """Diffusers' UNet2DConditionModel.

  Attributes:
    out_channels: channels of the prediction.
    up_block_types: `UpBlock2D` or `CrossAttnUpBlock2D`, coarsest first.
    reverse_transformer_layers_per_block: depths of the up blocks, where they
      are not those of the down blocks in reverse.
    center_input_sample: the input is taken to [-1, 1].
    conv_in_kernel: side of the first convolution's kernel.
    conv_out_kernel: side of the last one's.
    time_embedding_dim: width of the time embedding; None: four times that of
      the first block.
    time_embedding_act_fn: applied to the sum of all embeddings.
    timestep_post_act: applied to the time embedding alone.
    time_cond_proj_dim: width of the embedded guidance scale (LCM).
    class_embeddings_concat: classes stand beside the time, not in its sum.
    encoder_hid_dim: width of the text before a linear layer takes it to
      cross_attention_dim.
    encoder_hid_dim_type: None or `text_proj`.
  """

  out_channels: int = 4
  up_block_types: tuple[str, ...] = (
    "UpBlock2D",
    "CrossAttnUpBlock2D",
    "CrossAttnUpBlock2D",
    "CrossAttnUpBlock2D",
  )
  reverse_transformer_layers_per_block: (
    tuple[int | tuple[int, ...], ...] | None
  ) = None
  center_input_sample: bool = False
  conv_in_kernel: int = 3
  conv_out_kernel: int = 3
  time_embedding_dim: int | None = None
  time_embedding_act_fn: str | None = None
  timestep_post_act: str | None = None
  time_cond_proj_dim: int | None = None
  class_embeddings_concat: bool = False
  encoder_hid_dim: int | None = None
  encoder_hid_dim_type: str | None = None

  def __post_init__(self):
    super().__post_init__()
    _check(
      "class_embed_type",
      self.class_embed_type,
      (*_CLASS_EMBEDDINGS, "simple_projection"),
    )
    _check(
      "encoder_hid_dim_type", self.encoder_hid_dim_type, (None, "text_proj")
    )
    for kind in self.up_block_types:
      _check("up_block_types", kind, ("UpBlock2D", "CrossAttnUpBlock2D"))
    if len(self.up_block_types) != self.levels:
      raise errors.UserError(
        f"up_block_types has {len(self.up_block_types)} entries and"
        f" block_out_channels {self.levels}: mend config.json"
      )
    nested = any(isinstance(depth, tuple) for depth in self.depths)
    if nested and self.reverse_transformer_layers_per_block is None:
      raise errors.UserError(
        "transformer_layers_per_block is nested: config.json must say"
        " reverse_transformer_layers_per_block too"
      )

  @property
  def time_dim(self) -> int:
    """Width E of the time embedding."""
    return self.time_embedding_dim or super().time_dim

  @property
  def up_depths(self) -> tuple[Any, ...]:
    """Transformer blocks of each up block, coarsest first."""
    return self.reverse_transformer_layers_per_block or self.depths[::-1]

  @classmethod
  def from_hf(cls, values: Mapping[str, Any]) -> "Config":
    """Reads the dict of a `unet/config.json`.

    Raises:
      errors.UserError: it is of another network, or asks for a branch that
        is not built here.
    """
    return read(cls, values, "UNet2DConditionModel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetConfig(BackboneConfig):
  """Diffusers' ControlNetModel.

  Attributes:
    conditioning_channels: channels of the condition image.
    controlnet_conditioning_channel_order: `rgb` or `bgr`.
    conditioning_embedding_out_channels: widths of the small network that
      takes the image to the size of the latents, halving between them.
    global_pool_conditions: residuals are means over the picture.
  """

  conditioning_channels: int = 3
  controlnet_conditioning_channel_order: str = "rgb"
  conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
  global_pool_conditions: bool = False

  def __post_init__(self):
    super().__post_init__()
    _check("class_embed_type", self.class_embed_type, _CLASS_EMBEDDINGS)
    _check(
      "controlnet_conditioning_channel_order",
      self.controlnet_conditioning_channel_order,
      ("rgb", "bgr"),
    )

  @classmethod
  def from_hf(cls, values: Mapping[str, Any]) -> "ControlNetConfig":
    """Reads the dict of a `controlnet/config.json`; see `Config.from_hf`."""
    return read(cls, values, "ControlNetModel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnionConfig(ControlNetConfig):
  """Diffusers' ControlNetUnionModel: several kinds of condition in one net.

  Attributes:
    num_control_type: kinds that the network knows.
    num_trans_channel: width of the transformer that fuses them.
    num_trans_head: its heads.
    num_trans_layer: its depth.
    num_proj_channel: width of what it adds to the condition.
  """

  conditioning_embedding_out_channels: tuple[int, ...] = (48, 96, 192, 384)
  num_control_type: int = 6
  num_trans_channel: int = 320
  num_trans_head: int = 8
  num_trans_layer: int = 1
  num_proj_channel: int = 320

  def __post_init__(self):
    super().__post_init__()
    order = self.controlnet_conditioning_channel_order
    _check("controlnet_conditioning_channel_order", order, ("rgb",))
    _check("mid_block_type", self.mid_block_type, ("UNetMidBlock2DCrossAttn",))
    if not self.addition_time_embed_dim:
      raise errors.UserError(
        "a ControlNetUnionModel needs addition_time_embed_dim: mend config.json"
      )

  @classmethod
  def from_hf(cls, values: Mapping[str, Any]) -> "UnionConfig":
    """Reads the dict of a union's `config.json`; see `Config.from_hf`."""
    return read(cls, values, "ControlNetUnionModel")


def spread(value: _T | tuple[_T, ...], times: int) -> tuple[_T, ...]:
  """Returns a tuple as it is, and anything else `times` times."""
  return value if isinstance(value, tuple) else (value,) * times


def read(cls: type[_T], values: Mapping[str, Any], class_name: str) -> _T:
  """Builds a configuration of a diffusers `config.json`, refusing strangers.

  Args:
    cls: a dataclass whose fields have diffusers' names.
    values: the dict of the file.
    class_name: what `_class_name` must be, where it is there.

  Returns:
    An instance of cls; lists become tuples.

  Raises:
    errors.UserError: the file is of another class, a key that cls does not
      know is set to something, or a value is of another type or means nothing.
  """
  given = values.get("_class_name", class_name)
  if given != class_name:
    raise errors.UserError(
      f"config.json is of a {given}, where a {class_name} is wanted: give"
      " the folder of the right network"
    )
  kinds = get_type_hints(cls)
  taken = {}
  for name, value in values.items():
    if name in kinds:
      taken[name] = _frozen(value)
      _check_value(name, taken[name], kinds[name])
    elif name.startswith("_") or name in _NO_EFFECT or _is_unset(value):
      continue
    else:
      raise errors.UserError(
        f"config.json sets {name} to {value!r}, which {cls.__name__} here"
        " does not build: use another checkpoint"
      )
  return cls(**taken)


def _check_value(name: str, value: Any, kind: Any) -> None:
  """Refuses a value of another type than a field's, and empty numbers."""
  if not _is_of(value, kind, name):
    has_number = ranges.COUNT.holds(value) or isinstance(value, float)
    allowed = _range(name, value) if has_number else None
    wanted = allowed.text if allowed else _said(kind)
    raise errors.UserError(
      f"config.json sets {name} to {value!r}, where {wanted} is wanted: fetch"
      " the file again, or mend it"
    )
  if name == "act_fn":
    layers.activation(value, key=name)


def _is_of(value: Any, kind: Any, name: str) -> bool:
  """Tells whether a value, lists as tuples, is of an annotated type."""
  if get_origin(kind) in (Union, types_lib.UnionType):
    return any(_is_of(value, one, name) for one in get_args(kind))
  if get_origin(kind) is tuple:
    inner = get_args(kind)[0]
    return isinstance(value, tuple) and all(
      _is_of(one, inner, name) for one in value
    )
  if kind is float:
    return type(value) in (int, float) and _range(name, value).holds(value)
  if kind is int:
    return type(value) is int and _range(name, value).holds(value)
  return type(value) is kind


def _range(name: str, value: Any) -> ranges.Range:
  usual = ranges.COUNT if type(value) is int else ranges.POSITIVE
  return _RANGES.get(name, usual)


def _said(kind: Any) -> str:
  """Returns a type in the words of JSON."""
  if get_origin(kind) in (Union, types_lib.UnionType):
    return " or ".join(_said(one) for one in get_args(kind))
  if get_origin(kind) is tuple:
    return f"a list of {_said(get_args(kind)[0])}"
  names = {bool: "true or false", str: "a text", type(None): "null"}
  names |= {int: "whole numbers", float: "numbers"}
  return names[kind]


def _is_unset(value: Any) -> bool:
  """Tells values that stand for a branch not taken."""
  return value is None or value is False or value in ("default", "positional")


def _frozen(value: Any) -> Any:
  """Returns lists as tuples, at all depths."""
  if isinstance(value, Sequence) and not isinstance(value, str):
    return tuple(_frozen(v) for v in value)
  return value


def _check(name: str, value: Any, choices: Sequence[Any]) -> None:
  if value not in choices:
    raise errors.UserError(
      f"{name} is {value!r} in config.json; built here are"
      f" {', '.join(str(choice) for choice in choices)}"
    )
