"""Checkpoints of CLIP, and their tokenisers, by one call each."""

from collections.abc import Iterable, Mapping
import math
import pathlib
import re
from typing import Any

import numpy as np

from dppp_jax import errors, trees, types
from dppp_jax.models import clip as clip_lib
from dppp_jax.weights import convert, hub, rules
from dppp_jax.weights import tokenizer as tokenizer_lib

# OpenAI's heads are 64 wide in every one of its models; no tensor says so.
_HEAD = 64


def clip(
  path: str | pathlib.Path, *, hidden_act: str | None = None
) -> tuple[clip_lib.Config, types.Params]:
  """Loads both towers of a CLIP.

  Args:
    path: a Hugging Face folder, a hub id, or a file or folder with the tensor
      names of OpenAI or OpenCLIP.
    hidden_act: `quick_gelu` or `gelu`, for files that do not say it (OpenCLIP
      weights without open_clip_config.json).

  Returns:
    The configuration and the parameters, views of the file in its precision
    (`trees.to_float32` makes them float32).

  Raises:
    errors.UserError: nothing to load there, or it does not fit: every tensor
      is accounted for.
  """
  path = _open_clip(hub.resolve(path))
  tensors = hub.read_tensors(path)
  if "visual.conv1.weight" in tensors:
    prefix = "" if "token_embedding.weight" in tensors else "text."
    config = _openai_config(path, tensors, prefix, hidden_act)
    table = rules.openai_clip(prefix)
  else:
    file = _beside(path)
    config = _config(file, hub.read_json(file), clip_lib.Config.from_hf)
    table = rules.hf_clip()
  return config, _fill(config, tensors, table, path)


def clip_text(
  path: str | pathlib.Path,
) -> tuple[clip_lib.TextConfig, types.Params]:
  """Loads a text tower: a CLIPTextModel, with or without projection.

  Args:
    path: a Hugging Face folder or hub id, e.g. `text_encoder_2` of SDXL, or
      one of a whole CLIP, of which the text tower is taken.

  Returns:
    The configuration, whose projection_dim is None where the checkpoint has
    no projection, and the tree of a `TextTower`.

  Raises:
    errors.UserError: as `clip`.
  """
  return _tower(path, "text", rules.hf_text, clip_lib.text_from_hf)


def clip_vision(
  path: str | pathlib.Path,
) -> tuple[clip_lib.VisionConfig, types.Params]:
  """Loads a vision tower, as `clip_text` does a text tower."""
  return _tower(path, "vision", rules.hf_vision, clip_lib.vision_from_hf)


def text_config(path: str | pathlib.Path) -> clip_lib.TextConfig:
  """Returns the configuration that `clip_text` would, without the weights."""
  return _open_tower(path, "text", clip_lib.text_from_hf)[1]


def tokenizer(path: str | pathlib.Path, *, pad: str | None = None) -> Any:
  """Loads a `transformers.CLIPTokenizer`.

  Args:
    path: a folder (or hub id) with tokenizer.json, or with vocab.json and
      merges.txt, or a file that lies beside them.
    pad: the token that fills up, where it is not the folder's: "!" for the
      second encoder of SDXL.

  Raises:
    errors.UserError: the files are missing or cannot be read.
  """
  folder = _beside(hub.resolve(path)).parent
  has = lambda *names: all((folder / name).is_file() for name in names)
  if not has("tokenizer.json") and not has("vocab.json", "merges.txt"):
    raise errors.UserError(
      f"{folder} holds no tokenizer: tokenizer.json, or vocab.json and"
      " merges.txt, must lie there"
    )
  transformers = tokenizer_lib.library()
  try:
    options = {} if pad is None else {"pad_token": pad}
    return transformers.CLIPTokenizer.from_pretrained(folder, **options)
  except Exception as error:  # The Rust library raises plain Exceptions.
    raise errors.UserError(
      f"{folder} holds a tokenizer that cannot be read"
      f" ({(str(error).splitlines() or ['?'])[0]}): fetch its files again"
    ) from error


def _tower(path: Any, name: str, table: Any, from_hf: Any) -> Any:
  """Loads one tower of whatever Hugging Face checkpoint holds it."""
  path, config, tensors = _open_tower(path, name, from_hf)
  inner = f"{name}_model."
  prefix = inner if any(key.startswith(inner) for key in tensors) else ""
  return config, _fill(config, tensors, table(prefix), path)


def _open_tower(path: Any, name: str, from_hf: Any) -> Any:
  """Returns where a tower lies, its configuration and its tensors."""
  path = hub.resolve(path)
  tensors = hub.read_tensors(path)
  file = _beside(path)
  values = hub.read_json(file)
  is_whole = "vision_config" in values or "text_config" in values
  other = "vision_model." if name == "text" else "text_model."
  outer = {"text": "text_projection", "vision": "visual_projection"}
  if is_whole:
    config = getattr(_config(file, values, clip_lib.Config.from_hf), name)
    kept = (f"{name}_model.", outer[name])
    dropped = (other, *outer.values(), "logit_scale")
    tensors = {
      key: value
      for key, value in tensors.items()
      if key.startswith(kept) or not key.startswith(dropped)
    }
  else:
    config = _config(file, values, from_hf)
  if f"{outer[name]}.weight" not in tensors:
    # config.json has a projection_dim even where there is no projection.
    config = _without_projection(config)
  return path, config, tensors


def _config(file: pathlib.Path, values: Any, from_hf: Any) -> Any:
  """Makes a configuration; its file's name stands before what is wrong."""
  try:
    return from_hf(values)
  except errors.UserError as error:
    raise errors.UserError(f"{file}: {error}") from error


def _without_projection(config: Any) -> Any:
  return type(config)(**{**vars(config), "projection_dim": None})


def _fill(
  config: Any,
  tensors: Mapping[str, np.ndarray],
  table: list[convert.Rule],
  path: pathlib.Path,
) -> types.Params:
  given = convert.convert(tensors, table, where=str(path))
  return trees.merge(clip_lib.param_shapes(config), given, where=str(path))


def _beside(path: pathlib.Path) -> pathlib.Path:
  """Returns where the config.json of a folder or of a file in it lies."""
  return (path if path.is_dir() else path.parent) / "config.json"


def _open_clip(path: pathlib.Path) -> pathlib.Path:
  """Returns OpenCLIP's file where the folder's usual one is timm's.

  timm's repositories hold its own vision tower beside OpenCLIP's CLIP.
  """
  file = path / "open_clip_model.safetensors"
  told = (path / "open_clip_config.json").is_file() and file.is_file()
  return file if told and _hf_config(path) is None else path


def _hf_config(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the config.json of a folder where it is one of a whole CLIP."""
  path = folder / "config.json"
  values = hub.read_json(path) if path.is_file() else {}
  return values if "vision_config" in values else None


def _openai_config(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  prefix: str,
  hidden_act: str | None,
) -> clip_lib.Config:
  """Reads off the tensors what they tell, and elsewhere what they do not."""
  folder = _beside(path).parent
  extra: dict[str, Any] = {}
  if (values := _hf_config(folder)) is not None:
    return clip_lib.Config.from_hf(values)
  if (folder / "open_clip_config.json").is_file():
    extra = hub.read_json(folder / "open_clip_config.json")
    extra = extra.get("model_cfg", extra)
    _check_open_clip(extra, str(folder / "open_clip_config.json"))
  try:
    config = _from_shapes(tensors, prefix, extra, hidden_act, path)
  except (KeyError, ValueError, IndexError) as error:
    raise errors.UserError(
      f"{path}: the tensors have OpenAI's names but are not those of a CLIP"
      f" with a vision transformer ({error}): use such a checkpoint"
    ) from error
  _check_sizes(config, extra, folder / "open_clip_config.json")
  return config


# What an OpenCLIP may be told and only one answer is built, by group of keys.
_TOWER = {
  "ls_init_value": None,
  "final_ln_after_pool": False,
  "act_kwargs": None,
  "norm_kwargs": None,
}
_ONLY: dict[str, dict[str, Any]] = {
  "": {
    "multimodal_cfg": None,
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
  },
  "vision_cfg": _TOWER
  | {
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "global_average_pool": False,
    "input_patchnorm": False,
    "timm_model_name": None,
  },
  "text_cfg": _TOWER
  | {
    "embed_cls": False,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
    "hf_model_name": None,
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,
    "bert_tokenizer": False,
  },
}
# Read, or told by the tensors, or without effect on their product.
_KNOWN = {
  "": "embed_dim quick_gelu custom_text init_logit_scale cast_dtype"
  " output_dict vision_cfg text_cfg",
  "vision_cfg": "layers width patch_size image_size mlp_ratio head_width"
  " patch_dropout output_tokens attn_pooler_queries attn_pooler_heads"
  " timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop"
  " timm_drop_path",
  "text_cfg": "context_length vocab_size width heads layers mlp_ratio"
  " output_tokens pad_id eos_id hf_model_pretrained hf_proj_type"
  " hf_pooler_type",
}


def _check_open_clip(extra: Mapping[str, Any], where: str) -> None:
  """Refuses keys of a model_cfg that would be left aside."""
  for group, only in _ONLY.items():
    values = extra.get(group, {}) if group else extra
    if not isinstance(values, Mapping):
      raise errors.UserError(f"{where}: {group} is no object: fetch it again")
    for key, value in values.items():
      if key in _KNOWN[group].split() or value in (only.get(key), None, False):
        continue
      if value == {}:
        continue
      raise errors.UserError(
        f"{where}: {f'{group}.' if group else ''}{key} is {value!r}, which is"
        " not built here: use an OpenCLIP with OpenAI's towers"
      )


def _check_sizes(
  config: clip_lib.Config, extra: Mapping[str, Any], file: pathlib.Path
) -> None:
  """Refuses an open_clip_config.json of another model than the tensors."""
  vision, text = extra.get("vision_cfg", {}), extra.get("text_cfg", {})
  pairs = (
    ("embed_dim", extra.get("embed_dim"), config.projection_dim),
    (
      "vision_cfg.layers",
      vision.get("layers"),
      config.vision.num_hidden_layers,
    ),
    ("vision_cfg.width", vision.get("width"), config.vision.hidden_size),
    (
      "vision_cfg.patch_size",
      vision.get("patch_size"),
      config.vision.patch_size,
    ),
    (
      "vision_cfg.image_size",
      vision.get("image_size"),
      config.vision.image_size,
    ),
    ("text_cfg.layers", text.get("layers"), config.text.num_hidden_layers),
    ("text_cfg.width", text.get("width"), config.text.hidden_size),
    ("text_cfg.vocab_size", text.get("vocab_size"), config.text.vocab_size),
  )
  for key, said, held in pairs:
    if said not in (None, held, [held, held]):
      raise errors.UserError(
        f"{file}: {key} is {said!r}, and the tensors have {held}: it is of"
        " another model; fetch the one of these weights"
      )


def _from_shapes(
  tensors: Mapping[str, np.ndarray],
  prefix: str,
  extra: Mapping[str, Any],
  hidden_act: str | None,
  path: pathlib.Path,
) -> clip_lib.Config:
  if hidden_act is None:
    if extra:
      hidden_act = "quick_gelu" if extra.get("quick_gelu") else "gelu"
    elif "input_resolution" in tensors:  # Only OpenAI's own files have it.
      hidden_act = "quick_gelu"
    else:
      raise errors.UserError(
        f"{path} does not say whether it was trained with quick_gelu (OpenAI)"
        " or gelu (most of OpenCLIP): put open_clip_config.json or config.json"
        " beside it, or give hidden_act"
      )
  vision_cfg = extra.get("vision_cfg", {})
  text_cfg = extra.get("text_cfg", {})
  width, _, _, patch = tensors["visual.conv1.weight"].shape
  positions = tensors["visual.positional_embedding"].shape[0]
  vocab, text_width = tensors[prefix + "token_embedding.weight"].shape
  mlp = "transformer.resblocks.0.mlp.c_fc.weight"
  return clip_lib.Config(
    vision=clip_lib.VisionConfig(
      hidden_size=width,
      intermediate_size=tensors[f"visual.{mlp}"].shape[0],
      num_hidden_layers=_depth(tensors, "visual."),
      num_attention_heads=width // vision_cfg.get("head_width", _HEAD),
      image_size=math.isqrt(positions - 1) * patch,
      patch_size=patch,
      hidden_act=hidden_act,
    ),
    text=clip_lib.TextConfig(
      vocab_size=vocab,
      hidden_size=text_width,
      intermediate_size=tensors[f"{prefix}{mlp}"].shape[0],
      num_hidden_layers=_depth(tensors, prefix),
      num_attention_heads=text_cfg.get("heads", text_width // _HEAD),
      max_position_embeddings=tensors[prefix + "positional_embedding"].shape[0],
      hidden_act=hidden_act,
      # OpenAI's vocabulary ends with both marks.
      bos_token_id=vocab - 2,
      eos_token_id=vocab - 1,
    ),
    projection_dim=tensors["visual.proj"].shape[1],
  )


def _depth(names: Iterable[str], prefix: str) -> int:
  pattern = re.compile(
    re.escape(f"{prefix}transformer.resblocks.") + r"(\d+)\."
  )
  # Counted: a number in a damaged name may be of any size.
  found = {m[1] for name in names if (m := pattern.match(name))}
  if not found:
    raise ValueError(f"no {prefix}transformer.resblocks")
  return len(found)
