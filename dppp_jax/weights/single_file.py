"""Stable Diffusion in one file: SDXL and SD 1.x in the original code's layout.

    checkpoint = single_file.load("some_merge_v9.safetensors")
    unet = checkpoint.params["unet"]

Of every tensor it is known where it belongs, or why it is left out. What such
a file does not say, the configurations, is that of the base models. A VAE alone
in a file is read here as well, a ControlNet by `controlnet_file`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import pathlib
import re

from absl import logging
import numpy as np

from dppp_jax import errors, paths, trees, types
from dppp_jax.models import clip, unet_config
from dppp_jax.models import unet as unet_lib
from dppp_jax.models import vae as vae_lib
from dppp_jax.weights import (
  convert,
  diffusion_rules,
  export,
  hub,
  kinds,
  original,
)
from dppp_jax.weights import rules as text_rules

Path = str | pathlib.Path
Tensors = Mapping[str, np.ndarray]

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Configs:
  """The networks of a base model.

  Attributes:
    unet: of the denoiser.
    vae: of the autoencoder.
    text_encoder: of the first text encoder, with the names of Hugging Face.
    text_encoder_2: of SDXL's second one, with those of OpenCLIP; or None.
  """

  unet: unet_config.Config
  vae: vae_lib.Config
  text_encoder: clip.TextConfig
  text_encoder_2: clip.TextConfig | None = None


# The ids are those of the published config.json; 2 stands for the highest id.
_CLIP_L = clip.TextConfig(
  hidden_size=768,
  intermediate_size=3072,
  num_attention_heads=12,
  projection_dim=None,
  bos_token_id=0,
  eos_token_id=2,
)
_VAE = vae_lib.Config(
  down_block_types=("DownEncoderBlock2D",) * 4,
  up_block_types=("UpDecoderBlock2D",) * 4,
  block_out_channels=(128, 256, 512, 512),
  layers_per_block=2,
)
SD1 = Configs(
  unet=unet_config.Config(cross_attention_dim=768),
  vae=_VAE,
  text_encoder=_CLIP_L,
)
SDXL = Configs(
  unet=unet_config.Config(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
  ),
  vae=dataclasses.replace(_VAE, scaling_factor=0.13025),
  text_encoder=_CLIP_L,
  text_encoder_2=clip.TextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
    bos_token_id=0,
    eos_token_id=2,
  ),
)

_UNET, _FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
_SD1_TEXT = "cond_stage_model.transformer."
_XL_TEXT = "conditioner.embedders.0.transformer."
_XL_TEXT_2 = "conditioner.embedders.1.model."
# What training and merging leave in a file, and sampling has no use for.
_EXTRAS = (
  r"model_ema\..*",
  r"(?:first_stage_model\.)?(?:loss|model_ema)\..*",
  r"betas|lvlb_weights|logvar|denoiser\.sigmas",
  r"(?:sqrt_|log_|sqrt_recip_|sqrt_recipm1_)?(?:one_minus_)?alphas_cumprod.*",
  r"posterior_(?:variance|log_variance_clipped|mean_coef[12])",
  r"v_pred|ztsnr",  # Marks without numbers: read by name.
  r"(?:cond_stage_model|conditioner\.embedders\.[01])\.(?:model\.)?logit_scale",
  # OpenAI's projection of the first encoder, whose pooled text goes unused.
  r"(?:cond_stage_model|conditioner\.embedders\.0)\.(?:transformer\.)?"
  r"text_projection(?:\.weight)?",
  r"conditioner\.embedders\.1\.model\.attn_mask",
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What a file holds.

  Attributes:
    configs: of the networks.
    params: trees by the names of `Configs`' fields, in the file's precision.
    prediction_type: `epsilon`, or `v_prediction` where the file is marked so.
    zero_snr: the file is marked as trained with zero terminal SNR.
  """

  configs: Configs
  params: dict[str, types.Params]
  prediction_type: str = "epsilon"
  zero_snr: bool = False


def load(
  path: Path,
  *,
  configs: Configs | None = None,
  stack_from: int = 0,
  with_vae: bool = True,
  prediction_type: str | None = None,
) -> Checkpoint:
  """Loads SDXL or SD 1.x.

  Args:
    path: a .safetensors file of any name (or .ckpt, never executed).
    configs: of the networks; None: those of the base model that the names of
      the tensors tell.
    stack_from: transformers at least so deep come stacked, as
      `UNet(stack_from=)` wants them.
    with_vae: False leaves the file's VAE out; it need not have one.
    prediction_type: what the network predicts, whatever the file says.

  Raises:
    errors.UserError: no such file, a damaged one, another kind of model, or a
      tensor that is missing, left over or of another shape.
  """
  where = str(path)
  checkpoint, parts, inner = _open(path, configs, with_vae, prediction_type)
  params = {}
  for name, part in parts.items():
    own = part.rename(inner[name])
    flat = part.complete(convert.convert(own, part.rules, where=where))
    params[name] = trees.merge(part.shapes, flat, where=f"{where} ({name})")
  params["unet"] = diffusion_rules.stack_layers(
    params["unet"], stack_from=stack_from
  )
  return dataclasses.replace(checkpoint, params=params)


def peek(
  path: Path,
  *,
  configs: Configs | None = None,
  with_vae: bool = True,
  prediction_type: str | None = None,
) -> Checkpoint:
  """Returns what `load` would, without the parameters.

  Names and shapes stand in the header of a .safetensors file: what is missing,
  left over or of another network is found without reading it.

  Raises:
    errors.UserError: as `load`, but for what only the weights show.
  """
  checkpoint, parts, inner = _open(path, configs, with_vae, prediction_type)
  for name, part in parts.items():
    part.check(inner[name], f"{path} ({name})")
  return checkpoint


def _open(
  path: Path,
  configs: Configs | None,
  with_vae: bool,
  prediction_type: str | None,
) -> tuple[Checkpoint, dict[str, "Part"], dict[str, dict[str, np.ndarray]]]:
  """Returns a checkpoint without parameters, and the tensors for them."""
  where = str(path)
  path = hub.resolve(path)
  tensors = hub.read_tensors(path)
  configs = configs or _base(tensors, where)
  _check_kind(tensors, configs, where)
  parts = _parts(configs)
  inner, extras = _split(tensors, parts, where)
  logging.info("%s: left out %d tensors by rule", where, len(extras))
  if not with_vae:
    parts = {name: part for name, part in parts.items() if name != "vae"}
  for name, part in parts.items():
    if not inner[name]:
      raise errors.UserError(
        f"{where} holds {_MISSING[name]} ({part.prefix}*): {_REMEDIES[name]}"
      )
  prediction, zero_snr = _noise(tensors, hub.metadata(path), where)
  if prediction_type is None and prediction is None:
    raise errors.UserError(
      f"{where} says two things of what it predicts (the mark v_pred and"
      " modelspec.prediction_type): set --config.sampler.prediction_type"
    )
  prediction = prediction_type or prediction or "epsilon"
  return Checkpoint(configs, {}, prediction, zero_snr), parts, inner


_MISSING = {
  "unet": "no UNet",
  "vae": "no VAE",
  "text_encoder": "no first text encoder",
  "text_encoder_2": "no second text encoder",
}
_WHOLE = "give the whole checkpoint"
_REMEDIES = dict.fromkeys(_MISSING, _WHOLE) | {
  "vae": f"name one in --config.models.vae, or {_WHOLE}"
}
# How a header spells what a network predicts.
_PREDICTIONS = {
  "": "epsilon",
  **dict.fromkeys(("eps", "epsilon", "e"), "epsilon"),
  **dict.fromkeys(("v", "v_prediction", "vpred", "v_pred"), "v_prediction"),
}


def _noise(
  tensors: Tensors, texts: Mapping[str, str], where: str
) -> tuple[str | None, bool]:
  """Returns what the network predicts, by marks and header, and zero SNR.

  Both may contradict each other: then what it predicts is None.
  """
  said = str(texts.get("modelspec.prediction_type", "")).strip().lower()
  if said not in _PREDICTIONS:
    raise errors.UserError(
      f"{where} predicts {said!r} by its header (modelspec.prediction_type),"
      " which is not built: use a base of epsilon or v_prediction"
    )
  zero = str(texts.get("ss_zero_terminal_snr", "")).lower() == "true"
  zero_snr = "ztsnr" in tensors or zero
  if "v_pred" not in tensors:
    return _PREDICTIONS[said], zero_snr
  is_same = _PREDICTIONS[said] == "v_prediction" or not said
  return ("v_prediction" if is_same else None), zero_snr


def _check_kind(tensors: Tensors, configs: Configs, where: str) -> None:
  """Refuses networks of a special kind, which have other names or channels."""
  marks = {
    "edm_mean": "is trained with EDM (edm_mean; Playground 2.5)",
    "edm_vpred.sigma_max": "is trained with EDM (edm_vpred.*; CosXL)",
    f"{_UNET}time_embed.cond_proj.weight": "is a consistency model (LCM)",
  }
  for mark, said in marks.items():
    if mark in tensors:
      raise errors.UserError(
        f"{where} {said}, which is not sampled here: give a base of SDXL or"
        " SD 1.x"
      )
  first = tensors.get(f"{_UNET}input_blocks.0.0.weight")
  usual = configs.unet.in_channels
  if first is not None and first.ndim == 4 and first.shape[1] != usual:
    channels = first.shape[1]
    kind = {9: "an inpainting model", 8: "a model that edits (pix2pix)"}
    raise errors.UserError(
      f"{where} is {kind.get(channels, 'a special model')}: its UNet takes"
      f" {channels} channels, where {usual} are sampled here; give the base"
      " without it"
    )


def save(path: Path, checkpoint: Checkpoint, *, dtype: str = "float32") -> None:
  """Writes the original layout, for programs that read only that.

  Args:
    path: must not exist; appears only when all is written.
    checkpoint: transformers stacked or not.
    dtype: `float32` or `float16`.

  Raises:
    errors.UserError: the file exists, the parameters are not those of the
      configurations, or a weight is not finite in the dtype.
  """
  path = paths.expand(path)
  if path.exists():
    raise errors.UserError(
      f"{path} exists already and is not overwritten: give another name"
    )
  tensors: dict[str, np.ndarray] = {}
  for name, part in _parts(checkpoint.configs).items():
    params = diffusion_rules.unstack_layers(checkpoint.params[name])
    trees.merge(part.shapes, params, where=f"export of {name}")
    found = convert.invert(params, part.rules, where="export")
    tensors |= part.restore(found)
  empty = np.zeros(0, np.float32)
  if checkpoint.prediction_type == "v_prediction":
    tensors["v_pred"] = empty
  if checkpoint.zero_snr:
    tensors["ztsnr"] = empty
  scratch = path.with_name(f".{path.name}.part")
  try:
    export.write_tensors(scratch, tensors, dtype=dtype)
    scratch.rename(path)
  finally:
    scratch.unlink(missing_ok=True)


def vae(
  path: Path, *, config: vae_lib.Config = SDXL.vae
) -> tuple[vae_lib.Config, types.Params]:
  """Loads a VAE from a file of its own, in either layout.

  Args:
    path: of the file.
    config: the file cannot tell SDXL's from SD 1.x's (`SD1.vae`), which differ
      in their scaling.

  Raises:
    errors.UserError: as `load`.
  """
  where = str(path)
  tensors, rules = _open_vae(path, config)
  flat = convert.convert(tensors, rules, where=where)
  return config, trees.merge(_vae_part(config).shapes, flat, where=where)


def check_vae(path: Path, config: vae_lib.Config) -> None:
  """Refuses what `vae` refuses by names and shapes.

  Raises:
    errors.UserError: as `vae`.
  """
  tensors, rules = _open_vae(path, config)
  flat = convert.shapes(tensors, rules, where=str(path))
  trees.merge(_vae_part(config).shapes, flat, where=str(path))


def _open_vae(
  path: Path, config: vae_lib.Config
) -> tuple[dict[str, np.ndarray], Sequence[convert.Rule]]:
  """Returns a VAE's tensors, without prefix, and the rules for them."""
  tensors = dict(hub.read_tensors(hub.resolve(path)))
  for prefix in (_FIRST_STAGE, "vae."):
    own = {k: v for k, v in tensors.items() if k.startswith(prefix)}
    if own:  # Of a whole checkpoint its VAE.
      tensors = {k.removeprefix(prefix): v for k, v in own.items()}
  if not any(name.startswith("decoder.") for name in tensors):
    raise errors.UserError(
      f"{path} is {kinds.called(tensors) or 'of another kind'} and holds no"
      " VAE: give a VAE, or a checkpoint that has one"
    )
  if any(name.startswith("encoder.down.") for name in tensors):
    part = _vae_part(config)
    kept = {k: v for k, v in tensors.items() if not _is_extra(k)}
    return part.rename(kept), part.rules
  is_old = any(".query." in name for name in tensors)
  return tensors, diffusion_rules.autoencoder(is_old=is_old)


@dataclasses.dataclass(frozen=True)
class Part:
  """How one network stands in a file.

  Attributes:
    prefix: before all of its names.
    shapes: its tree.
    rules: the table of its tensors, under names that `names` gives.
    names: {that name: original name} by prefixes; None: the same.
    pointwise: regex of original names of matrices that are 1x1 convolutions.
    unused: regex of paths whose numbers are never read, so that files go
      without.
    pooled: regexes of groups of paths that the pooled text alone needs, and
      that merged files drop: zeros take the place of a whole group, and the
      log says so.
  """

  prefix: str
  shapes: types.Params
  rules: Sequence[convert.Rule]
  names: Mapping[str, str] | None = None
  pointwise: str = "(?!)"
  unused: str = "(?!)"
  pooled: tuple[str, ...] = ()

  def check(self, tensors: Tensors, where: str) -> None:
    """Refuses tensors, without prefix, whose names or shapes do not fit."""
    own = self.rename(tensors)
    flat = convert.shapes(own, self.rules, where=where)
    trees.merge(self.shapes, self.complete(flat), where=where)

  def complete(self, flat: Tensors) -> dict[str, np.ndarray]:
    """Returns a flat tree with zeros in the place of what is unused."""
    leaves = trees.flatten(self.shapes)
    zeros = [
      name
      for name in leaves
      if name not in flat and re.fullmatch(self.unused, name)
    ]
    for pattern in self.pooled:
      group = [name for name in leaves if re.fullmatch(pattern, name)]
      if not any(name in flat for name in group):
        zeros += group
        logging.warning(
          "%s* has no %s: zeros take their place, and pictures follow the"
          " pooled text less",
          self.prefix,
          pattern,
        )
    return {
      name: np.zeros(leaves[name].shape, np.float32) for name in zeros
    } | dict(flat)

  def rename(self, tensors: Tensors) -> dict[str, np.ndarray]:
    """Gives tensors, whose prefix is cut off, the names of the rules."""
    if self.names is None:
      return dict(tensors)
    names = original.swap(self.names)
    # A name that is unknown gets its prefix back, and so finds no rule.
    return {
      original.rename(name, names) or f"{self.prefix}{name}": tensor
      for name, tensor in tensors.items()
    }

  def restore(self, tensors: Tensors) -> dict[str, np.ndarray]:
    """Gives tensors with the names of the rules their original ones."""
    found = {}
    for name, tensor in tensors.items():
      if self.names is not None:
        name = str(original.rename(name, self.names))
      if re.fullmatch(self.pointwise, name):
        tensor = tensor[:, :, None, None]
      found[self.prefix + name] = tensor
    return found


@functools.lru_cache(maxsize=4)  # Shapes of large networks take seconds.
def _parts(configs: Configs) -> dict[str, Part]:
  """Returns {network: how it stands in a file}."""
  unet = unet_lib.param_shapes(configs.unet)
  is_xl = configs.text_encoder_2 is not None
  last = configs.text_encoder.num_hidden_layers - 1
  parts = {
    "unet": Part(
      _UNET, unet, diffusion_rules.unet(configs.unet), original.unet(unet)
    ),
    "vae": _vae_part(configs.vae),
    "text_encoder": Part(
      _XL_TEXT if is_xl else _SD1_TEXT,
      clip.param_shapes(configs.text_encoder),
      text_rules.hf_text(),
      # SDXL reads what enters the last layer, and pools the second encoder.
      unused=rf"text_model/(?:encoder/layers_{last}|final_layer_norm)/.*"
      if is_xl
      else "(?!)",
    ),
  }
  if configs.text_encoder_2 is not None:
    shapes = clip.param_shapes(configs.text_encoder_2)
    rules = text_rules.openai_text()
    last = configs.text_encoder_2.num_hidden_layers - 1
    parts["text_encoder_2"] = Part(
      _XL_TEXT_2,
      shapes,
      rules,
      pooled=(
        f"text_model/encoder/layers_{last}/.*",
        "text_model/final_layer_norm/.*",
        "text_projection/.*",
      ),
    )
  return parts


@functools.lru_cache(maxsize=4)
def _vae_part(config: vae_lib.Config) -> Part:
  shapes = vae_lib.param_shapes(config)
  return Part(
    _FIRST_STAGE,
    shapes,
    diffusion_rules.autoencoder(is_old=True),
    original.vae(shapes),
    r".*\.attn_1\.(?:q|k|v|proj_out)\.weight",
  )


def _base(tensors: Tensors, where: str) -> Configs:
  """Tells SDXL and SD 1.x from each other and from what is neither."""
  has = lambda prefix: any(name.startswith(prefix) for name in tensors)
  kind = kinds.called(tensors)
  is_sd = kind == "a checkpoint of Stable Diffusion"
  if kind is not None and not is_sd:
    said = f"is {kind}"
  elif not has(_UNET):
    said = "holds no UNet of Stable Diffusion (model.diffusion_model.*)"
  elif has("conditioner.embedders.0.model."):
    said = "is the refiner of SDXL"
  elif has("conditioner.embedders.0.open_clip."):
    said = "is a Stable Video Diffusion"
  elif has(_XL_TEXT_2) or has(_XL_TEXT):
    return SDXL
  elif has(_SD1_TEXT):
    return SD1
  elif has("cond_stage_model.model."):
    said = "is a Stable Diffusion 2.x"
  elif has("text_encoders."):
    said = "is a Stable Diffusion 3 or another model of three text encoders"
  else:
    said = "has no text encoders of SDXL or SD 1.x"
  raise errors.UserError(
    f"{where} {said}: give a whole checkpoint of SDXL or SD 1.x, or a folder"
    " that diffusers saved"
  )


def _split(
  tensors: Tensors, parts: Mapping[str, Part], where: str
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
  """Returns tensors by network, without prefix, and names of known extras."""
  inner: dict[str, dict[str, np.ndarray]] = {name: {} for name in parts}
  extras, strangers = [], []
  for name, tensor in tensors.items():
    if _is_extra(name):
      extras.append(name)
      continue
    for owner, part in parts.items():
      if name.startswith(part.prefix):
        inner[owner][_without(part, owner, name)] = tensor
        break
    else:
      strangers.append(name)
  if strangers:
    raise errors.UserError(
      f"{where}: {len(strangers)} tensors belong to no part of SDXL or SD 1.x,"
      f" first {', '.join(sorted(strangers)[:_SHOWN])}: is it a checkpoint of"
      " another model?"
    )
  return inner, extras


def _without(part: Part, owner: str, name: str) -> str:
  """Returns a name without the prefix."""
  name = name.removeprefix(part.prefix)
  if owner == "text_encoder" and not name.startswith("text_model."):
    return f"text_model.{name}"  # Some merging programs lost it.
  return name


def _is_extra(name: str) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in _EXTRAS)
