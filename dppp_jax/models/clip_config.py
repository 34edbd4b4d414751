"""The sizes of a CLIP, read from and written as transformers' config.json."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
from typing import Any

from dppp_jax import errors, ranges
from dppp_jax.models import layers


def _check_numbers(config: Any) -> None:
  """Refuses what is no whole number, in the words of config.json."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    least = 0 if field.name.endswith("_id") else 1
    if field.type not in (int, int | None):
      continue
    if value is None and field.type is not int:
      continue
    if not ranges.WHOLE.holds(value) or value < least:
      raise errors.UserError(
        f"{field.name} is {value!r} in the CLIP configuration: it must be a"
        f" whole number of at least {least}"
      )


def _check(config: Any) -> None:
  """Refuses towers that cannot be built, in the words of config.json."""
  _check_numbers(config)
  if config.hidden_size % config.num_attention_heads:
    raise errors.UserError(
      f"hidden_size {config.hidden_size} is not a multiple of"
      f" num_attention_heads {config.num_attention_heads}: mend config.json"
    )
  if not ranges.POSITIVE.holds(config.layer_norm_eps):
    raise errors.UserError(
      f"layer_norm_eps is {config.layer_norm_eps!r} in the CLIP configuration:"
      f" it must be {ranges.POSITIVE.text}"
    )
  layers.activation(config.hidden_act)


_MODEL_TYPES = (None, "clip", "clip_text_model", "clip_vision_model")
# What transformers has ever written into the config.json of a CLIP and its
# towers, and that changes none of their numbers: notes, and the settings of
# training and of text generation.
_NO_EFFECT = frozenset(
  (
    *("add_cross_attention", "architectures", "attention_dropout"),
    *("bad_words_ids", "begin_suppress_tokens", "bos_token_id"),
    *("chunk_size_feed_forward", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "dropout"),
    *("dtype", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("eos_token_id", "exponential_decay_length_penalty", "finetuning_task"),
    *("forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing"),
    *("id2label", "initializer_factor", "initializer_range", "is_decoder"),
    *("is_encoder_decoder", "label2id", "length_penalty"),
    *("logit_scale_init_value", "max_length", "min_length", "model_type"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "output_attentions", "output_hidden_states"),
    *("output_scores", "pad_token_id", "prefix", "problem_type"),
    *("projection_dim", "remove_invalid_values", "repetition_penalty"),
    *("return_dict", "return_dict_in_generate", "sep_token_id"),
    *("suppress_tokens", "task_specific_params", "temperature"),
    *("text_config", "text_config_dict", "tf_legacy_loss"),
    *("tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class"),
    *("top_k", "top_p", "torch_dtype", "torchscript", "transformers_version"),
    *("typical_p", "use_bfloat16", "use_cache", "vision_config"),
    "vision_config_dict",
  )
)


def _pick(cls: type, values: Mapping[str, Any]) -> Any:
  """Builds a config of the fields that it knows.

  Raises:
    errors.UserError: a config.json of another network, or a key that would be
      left aside.
  """
  known = {field.name for field in dataclasses.fields(cls)}
  check_keys(values, known)
  return cls(**{k: v for k, v in values.items() if k in known})


def check_keys(values: Mapping[str, Any], known: Collection[str]) -> None:
  """Refuses a config.json of another network, or with an unknown key set."""
  kind = values.get("model_type")
  if kind not in _MODEL_TYPES:
    raise errors.UserError(
      f"config.json is of a {kind} (model_type), where a CLIP is wanted: give"
      " the folder of a CLIP"
    )
  for key, value in values.items():
    is_known = key.startswith("_") or key in known or key in _NO_EFFECT
    if not is_known and value not in (None, False, {}, []):
      raise errors.UserError(
        f"config.json sets {key} to {value!r}, which is not built here: use a"
        " plain CLIP"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """Hugging Face's `vision_config`, with its defaults (ViT-B/32).

  Attributes:
    hidden_size: width D.
    intermediate_size: width of the MLPs.
    num_hidden_layers: blocks.
    num_attention_heads: heads; divides hidden_size.
    num_channels: C of the images.
    image_size: side of the square images of the position embeddings' grid;
      inputs may have any other size.
    patch_size: side of a patch.
    hidden_act: `quick_gelu` (OpenAI), `gelu` (OpenCLIP) ...
    layer_norm_eps: epsilon of all norms.
    projection_dim: E, or None for a tower without projection.
    stride: step between patches; None for patch_size, less for overlap.
  """

  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  projection_dim: int | None = 512
  stride: int | None = None

  def __post_init__(self):
    _check(self)
    if self.patch_size > self.image_size:
      raise errors.UserError(
        f"patch_size {self.patch_size} exceeds image_size {self.image_size} in"
        " the CLIP configuration: mend config.json"
      )

  @property
  def side(self) -> int:
    """Patches along a side of the checkpoint's position embeddings."""
    return self.image_size // self.patch_size

  def grid(self, height: int, width: int) -> tuple[int, int]:
    """Returns the rows and columns of patches of a height x width image."""
    stride = self.stride or self.patch_size
    if min(height, width) < self.patch_size:
      raise errors.UserError(
        f"image size {height}x{width} is less than one patch of"
        f" {self.patch_size}: use larger images"
      )
    return tuple((s - self.patch_size) // stride + 1 for s in (height, width))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """Hugging Face's `text_config`, with its defaults.

  Attributes:
    vocab_size: V.
    hidden_size: width D.
    intermediate_size: width of the MLPs.
    num_hidden_layers: blocks.
    num_attention_heads: heads; divides hidden_size.
    max_position_embeddings: the longest prompt, with both its end marks.
    hidden_act: as in `VisionConfig`.
    layer_norm_eps: epsilon of all norms.
    projection_dim: E, or None for a tower without projection.
    bos_token_id: start of text.
    eos_token_id: end of text; 2 means the highest id of each prompt.
    pad_token_id: what fills a batch; after the end of text it has no effect.
  """

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  projection_dim: int | None = 512
  bos_token_id: int | None = 49406
  eos_token_id: int = 49407
  pad_token_id: int | None = 1

  def __post_init__(self):
    _check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Both towers; `projection_dim` is the one that both of them project to."""

  vision: VisionConfig = VisionConfig()
  text: TextConfig = TextConfig()
  projection_dim: int = 512
  logit_scale_init_value: float = 2.6592

  def __post_init__(self):
    _check_numbers(self)
    if not ranges.ANY.holds(self.logit_scale_init_value):
      raise errors.UserError(
        f"logit_scale_init_value is {self.logit_scale_init_value!r} in the CLIP"
        f" configuration: it must be {ranges.ANY.text}"
      )
    # As in transformers, the outer number rules over those of the towers.
    for name in ("vision", "text"):
      tower = dataclasses.replace(
        getattr(self, name), projection_dim=self.projection_dim
      )
      object.__setattr__(self, name, tower)

  @classmethod
  def from_hf(cls, values: Mapping[str, Any]) -> "Config":
    """Reads the dict of a `config.json` of transformers' CLIPModel.

    Raises:
      errors.UserError: it is not one of a CLIP.
    """
    towers = {}
    check_keys(values, ())
    for name in ("vision", "text"):
      # Early files hold a second, older spelling, and transformers lets it
      # win with all its defaults.
      tower = values.get(f"{name}_config_dict") or values.get(f"{name}_config")
      if not isinstance(tower, Mapping):
        raise errors.UserError(
          f"config.json has no {name}_config: is it the config.json of a"
          f" CLIP? model_type is {values.get('model_type')!r}"
        )
      towers[name] = tower
    return cls(
      vision=vision_from_hf(towers["vision"]),
      text=text_from_hf(towers["text"]),
      projection_dim=values.get("projection_dim", cls.projection_dim),
      logit_scale_init_value=values.get(
        "logit_scale_init_value", cls.logit_scale_init_value
      ),
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the dict of a `config.json` that transformers reads."""
    vision = dataclasses.asdict(self.vision)
    if vision["stride"] is None:
      del vision["stride"]  # transformers knows no such field.
    return {
      "architectures": ["CLIPModel"],
      "model_type": "clip",
      "projection_dim": self.projection_dim,
      "logit_scale_init_value": self.logit_scale_init_value,
      "vision_config": {"model_type": "clip_vision_model", **vision},
      "text_config": {
        "model_type": "clip_text_model",
        **dataclasses.asdict(self.text),
      },
    }


def vision_from_hf(values: Mapping[str, Any]) -> VisionConfig:
  """Reads a `vision_config`, or the config.json of a CLIPVisionModel."""
  values = dict(values)
  for key in ("image_size", "patch_size"):
    sides = values.get(key)
    if isinstance(sides, Sequence):
      if len(set(sides)) != 1:
        raise errors.UserError(
          f"{key} {list(sides)} in config.json is not square: only square"
          " checkpoints can be read (inputs may have any shape)"
        )
      values[key] = sides[0]
  return _pick(VisionConfig, values)


def text_from_hf(values: Mapping[str, Any]) -> TextConfig:
  """Reads a `text_config`, or the config.json of a CLIPTextModel."""
  return _pick(TextConfig, values)


def _vit(
  name: str,
  *,
  patch: int,
  vision: tuple[int, int, int],
  text: tuple[int, int],
  projection: int,
  act: str = "quick_gelu",
) -> tuple[str, Config]:
  """Returns a named variant; vision is (width, depth, heads)."""
  width, depth, heads = vision
  text_width, text_depth = text
  return name, Config(
    vision=VisionConfig(
      hidden_size=width,
      intermediate_size=4 * width,
      num_hidden_layers=depth,
      num_attention_heads=heads,
      patch_size=patch,
      hidden_act=act,
    ),
    text=TextConfig(
      hidden_size=text_width,
      intermediate_size=4 * text_width,
      num_hidden_layers=text_depth,
      num_attention_heads=text_width // 64,
      hidden_act=act,
    ),
    projection_dim=projection,
  )


VARIANTS = dict(
  [
    _vit(
      "ViT-B/32",
      patch=32,
      vision=(768, 12, 12),
      text=(512, 12),
      projection=512,
    ),
    _vit(
      "ViT-B/16",
      patch=16,
      vision=(768, 12, 12),
      text=(512, 12),
      projection=512,
    ),
    _vit(
      "ViT-L/14",
      patch=14,
      vision=(1024, 24, 16),
      text=(768, 12),
      projection=768,
    ),
    _vit(
      "ViT-H/14",
      patch=14,
      vision=(1280, 32, 16),
      text=(1024, 24),
      projection=1024,
      act="gelu",
    ),
  ]
)
