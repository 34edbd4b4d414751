"""Which module trains what: the table that launch/pretrain.py dispatches by."""

from collections.abc import Callable, Mapping
import pathlib
from typing import Any

from dppp_jax import errors, paths, ranges
from dppp_jax.data import transforms
from dppp_jax.evals import extractor
from dppp_jax.pretraining import (
  autoencoder,
  clip,
  controlnet,
  lora,
  matting,
  unet,
)

# (resolved configuration, run folder) -> the folder with the network, or None
# where a signal stopped the training.
Train = Callable[[Mapping[str, Any], str], pathlib.Path | None]

METHODS: dict[str, Train] = {
  "autoencoder": autoencoder.train,
  "clip_pretrain": clip.train,
  "controlnet": controlnet.train,
  "lora": lora.train,
  "matting": matting.train,
  "unet": unet.train,
}

# What the numbers of configs/pretrain_*.py may be, by the ends of their keys.
RANGES = {
  **transforms.RANGES,
  **dict.fromkeys(("lr", "weight_decay", "text_lr_factor", "weights"),
    ranges.NON_NEGATIVE),
  "warmup": ranges.SHARE,
  "ema": ranges.or_none(ranges.SHARE),
  **dict.fromkeys(("final", "drop", "control_drop"), ranges.UNIT),
  "caption_share": ranges.FACTOR,
  "snr_gamma": ranges.or_none(ranges.POSITIVE),
  **dict.fromkeys(("alpha", "beta_start", "beta_end"), ranges.POSITIVE),
  "guidance": ranges.NON_NEGATIVE,
  **dict.fromkeys(("seed", "processes", "sheet_every", "steps_offset"),
    ranges.WHOLE),
  **dict.fromkeys((
    "epochs", "batch_size", "log_every", "checkpoint_every", "sheet.num",
    "steps", "num_canvases", "num_held_out", "num_held_out_canvases",
    "num_images", "num_measured", "rank", "vocab_size", "projection_dim",
    "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "vision.image_size", "patch_size",
    "max_position_embeddings", "layers_per_block", "latent_channels",
    "norm_num_groups", "addition_time_embed_dim",
    "transformer_layers_per_block", "num_train_timesteps",
  ), ranges.COUNT),
  **dict.fromkeys(("image_size", "stride"), ranges.PAIR),
  **dict.fromkeys(("window", "crop"), ranges.or_none(ranges.PAIR)),
  **dict.fromkeys((
    "block_out_channels", "conditioning_embedding_out_channels",
    "attention_head_dim",
  ), ranges.COUNTS),
}  # fmt: skip
_TEXTS = ("method", "begin", "dtype", "base", "cache", "vae", "clip", "kind")
_WORDS = ("kinds", "down_block_types", "up_block_types")
_GROUPS = ("data", "model", "train", "scheduler", "text_encoder_2")
_DTYPES = extractor.DTYPES


def train(config: Mapping[str, Any], workdir: str) -> pathlib.Path | None:
  """Trains what `config["method"]` names.

  Args:
    config: the resolved configuration as a nested dict.
    workdir: run folder.

  Returns:
    The folder with the network, its card in README.md; None where a signal
    stopped the training.

  Raises:
    errors.UserError: no such method, or see the method.
  """
  _check_kinds(config)
  method = METHODS.get(config.get("method"))
  if method is None:
    raise errors.UserError(
      f"config method {config.get('method')!r}: choose"
      f" {', '.join(sorted(METHODS))}"
    )
  ranges.check(config, RANGES, where="config ")
  if config["dtype"] not in _DTYPES:
    raise errors.UserError(
      f"config dtype {config['dtype']!r}: choose one of {', '.join(_DTYPES)}"
    )
  if "augment" in config:
    transforms.Augment(**config["augment"])
  return method(_expanded(config), str(paths.expand(workdir)))


def _check_kinds(config: Mapping[str, Any], where: str = "config ") -> None:
  """Refuses a value of another kind, below any key, by the ends of keys."""
  for key, value in config.items():
    name = f"{where}{key}"
    is_several = isinstance(value, (tuple, list))
    if key in _TEXTS:
      ranges.kind(name, value, str)
    elif key in _WORDS and not (
      is_several and value and all(isinstance(word, str) for word in value)
    ):
      raise errors.UserError(f"{name}={value!r}: give one word or more")
    elif key in _GROUPS and not isinstance(value, Mapping):
      raise errors.UserError(f"{name}={value!r}: give keys and values")
    elif value == {} and key not in _GROUPS:
      raise errors.UserError(f"{name}={value!r}: give a value")
    if isinstance(value, Mapping):
      _check_kinds(value, f"{name}.")


def idle(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns what a pre-training does not read, for `cli.refuse_idle`."""
  if config["method"] != "unet":
    return {}
  found = {}
  if not config["model"]["control"]:
    found["config.train.control_drop"] = "no ControlNet learns beside the UNet"
  if config["begin"]:
    why = "all networks are those of config.begin"
    keys = ("data.vae", "data.clip", "model.unet", "model.text_encoder_2")
    keys = (*keys, "scheduler", "train.zero_dropped")
    found |= {f"config.{key}": why for key in keys}
  return found


def _expanded(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a configuration with "~" of its paths as the home folder."""
  found = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      found[key] = _expanded(value)
    elif isinstance(value, str) and value.startswith("~"):
      found[key] = str(paths.expand(value))
    else:
      found[key] = value
  return found
