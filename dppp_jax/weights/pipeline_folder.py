"""Whole text-to-image systems as folders that diffusers' pipelines read."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, NamedTuple

from dppp_jax import trees, types
from dppp_jax.models import clip, unet_config, vae
from dppp_jax.weights import convert, diffusers_folder, export, hub, rules
from dppp_jax.weights import tokenizer as tokenizer_lib


class Text(NamedTuple):
  """One text encoder with its tokenizer.

  Attributes:
    config: sizes.
    params: of a `clip.TextTower`.
    tokenizer: a transformers CLIPTokenizer.
  """

  config: clip.TextConfig
  params: types.Params
  tokenizer: Any


def save_xl(
  folder: str | pathlib.Path,
  *,
  unet: tuple[unet_config.Config, types.Params],
  vae: tuple[vae.Config, types.Params],
  texts: Sequence[Text],
  scheduler: Mapping[str, Any],
  zero_negative: bool = True,
  sample_size: int | None = None,
  dtype: str = "float16",
) -> pathlib.Path:
  """Writes a folder of diffusers' StableDiffusionXLPipeline.

  Args:
    folder: must not exist; appears only when all is written.
    unet: configuration and parameters.
    vae: likewise.
    texts: both encoders. The first is written without its projection, which
      SDXL does not use.
    scheduler: the dict of scheduler_config.json, with its _class_name.
    zero_negative: no negative prompt is zeros, not "".
    sample_size: longer side of the latents that the UNet was trained on.
    dtype: of the weights, `float32` or `float16`.

  Returns:
    The folder.

  Raises:
    errors.UserError: the folder exists, parameters do not fit their
      configuration, or a weight is not finite in the dtype.
  """
  name = scheduler["_class_name"]
  first, second = texts
  with export.new_folder(folder) as scratch:
    diffusers_folder.save(scratch / "unet", *unet, dtype=dtype)
    diffusers_folder.save(scratch / "vae", *vae, dtype=dtype)
    if sample_size is not None:
      # diffusers takes its default size from here.
      path = scratch / "unet" / "config.json"
      values = hub.read_json(path)
      export.write_json(path, {**values, "sample_size": sample_size})
    plain = {k: v for k, v in first.params.items() if k != "text_projection"}
    config = dataclasses.replace(first.config, projection_dim=None)
    text(scratch / "text_encoder", config, plain, dtype=dtype)
    text(scratch / "text_encoder_2", second.config, second.params, dtype=dtype)
    for suffix, one in zip(("", "_2"), texts, strict=True):
      _tokenizer(scratch / f"tokenizer{suffix}", one)
    (scratch / "scheduler").mkdir()
    export.write_json(
      scratch / "scheduler" / "scheduler_config.json", scheduler
    )
    export.write_json(
      scratch / "model_index.json",
      {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": zero_negative,
        "scheduler": ["diffusers", name],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
      },
    )
  return pathlib.Path(folder)


def text(
  folder: str | pathlib.Path,
  config: clip.TextConfig,
  params: types.Params,
  *,
  dtype: str = "float32",
) -> pathlib.Path:
  """Writes a CLIPTextModel, with or without projection.

  Args:
    folder: must not exist.
    config: sizes; projection_dim None is a CLIPTextModel.
    params: of a `clip.TextTower`.
    dtype: `float32` or `float16`.

  Raises:
    errors.UserError: see `save_xl`.
  """
  trees.merge(clip.param_shapes(config), params, where="export")
  kind = "CLIPTextModel"
  values = dataclasses.asdict(config)
  if config.projection_dim is None:
    del values["projection_dim"]
  else:
    kind = "CLIPTextModelWithProjection"
  tensors = convert.invert(params, rules.hf_text(), where="export")
  with export.new_folder(folder) as scratch:
    export.write_json(
      scratch / "config.json",
      {
        "architectures": [kind],
        "model_type": "clip_text_model",
        # Otherwise transformers computes in the dtype of the file, and
        # diffusers puts it beside a UNet in float32.
        "dtype": "float32",
        **values,
      },
    )
    export.write_tensors(scratch / "model.safetensors", tensors, dtype=dtype)
  return pathlib.Path(folder)


def _tokenizer(folder: pathlib.Path, one: Text) -> None:
  """Writes a tokenizer that knows the longest prompt: diffusers pads to it."""
  folder.mkdir()
  tokenizer_lib.save(one.tokenizer, folder)
  path = folder / "tokenizer_config.json"
  length = {"model_max_length": one.config.max_position_embeddings}
  export.write_json(path, {**hub.read_json(path), **length})
