"""A text-to-image system from the folder of a diffusers pipeline."""

from collections.abc import Sequence
import pathlib
from typing import Any

from dppp_jax import errors, types
from dppp_jax.diffusion import components as components_lib
from dppp_jax.diffusion import schedulers
from dppp_jax.weights import diffusers_folder, hub, load, lora, lora_keys

Path = str | pathlib.Path

_METHODS = ("euler_ancestral", "euler", "ddim", "dpmpp_2m")


def load_components(
  folder: Path,
  *,
  controlnets: Sequence[Path] | None = None,
  loras: Sequence[lora.Lora] = (),
  scheduler: str | None = None,
  k_diffusion: bool = False,
  variant: str | None = None,
  stack_from: int = 0,
) -> components_lib.Components:
  """Loads a Stable Diffusion 1.x, 2.x or XL and its ControlNets.

  Args:
    folder: of a diffusers pipeline (model_index.json, unet/, vae/,
      text_encoder/ ...), or a hub id.
    controlnets: folders, files or hub ids; None: those in the folder, if any.
    loras: merged into UNet and text encoders; see also `merge_loras`.
    scheduler: `euler_ancestral`, `euler`, `ddim` or `dpmpp_2m`, on the betas
      of the folder; None: the folder's own.
    k_diffusion: place the steps as k-diffusion (the WebUI) does, not as
      diffusers does.
    variant: which of several precisions to read, e.g. "fp16".
    stack_from: transformers at least so deep are compiled as one loop.

  Returns:
    Components, float32 on the host.

  Raises:
    errors.UserError: a part is missing, damaged, or for another model.
  """
  root = hub.resolve(folder, patterns=diffusers_folder.PATTERNS)
  index = hub.read_json(root / "model_index.json")
  options: dict[str, Any] = {"variant": variant, "stack_from": stack_from}
  # What is quickly found wrong is looked at before gigabytes are read.
  steps = _scheduler(root, scheduler, k_diffusion)
  for path in controlnets or ():
    hub.resolve(path, patterns=diffusers_folder.PATTERNS)
  config, unet = diffusers_folder.unet(root / "unet", **options)
  vae_config, vae = diffusers_folder.vae(root / "vae", variant=variant)
  params = {"unet": unet, "vae": vae}
  texts, tokenizers = [], []
  for suffix in ("", "_2"):
    if not (root / f"text_encoder{suffix}").is_dir():
      continue
    text, tree = load.clip_text(root / f"text_encoder{suffix}")
    texts.append(text)
    tokenizers.append(load.tokenizer(root / f"tokenizer{suffix}"))
    params[f"text_encoder{suffix}"] = tree
  if controlnets is not None:
    nets = [
      diffusers_folder.controlnet(path, **options) for path in controlnets
    ]
  elif (root / "controlnet").is_dir():
    nets = diffusers_folder.controlnets(root, **options)
  else:
    nets = []
  for k, (_, tree) in enumerate(nets):
    params[components_lib.controlnet_name(k)] = tree
  size = hub.read_json(root / "unet" / "config.json").get("sample_size")
  found = components_lib.Components(
    unet=config,
    vae=vae_config,
    texts=tuple(texts),
    tokenizers=tuple(tokenizers),
    controlnets=tuple(net for net, _ in nets),
    scheduler=steps,
    params=merge_loras(params, loras),
    zero_negative=bool(index.get("force_zeros_for_empty_prompt", True)),
    stack_from=stack_from,
    sample_size=size if isinstance(size, int) else None,
  )
  components_lib.check(found)
  return found


def merge_loras(
  params: types.Params, loras: Sequence[lora.Lora]
) -> types.Params:
  """Returns the parameters of Components with LoRAs merged into them.

  Args:
    params: as `Components.params`, without LoRAs; not changed.
    loras: any number; another set is other numbers for the same program.

  Raises:
    errors.UserError: a file that is damaged or for another base model.
  """
  if not loras:
    return params
  some = {name: params[name] for name in lora_keys.COMPONENTS if name in params}
  return params | lora.merge(some, loras)[0]


def _scheduler(
  root: pathlib.Path, method: str | None, k_diffusion: bool
) -> schedulers.Config:
  if method is not None and method not in _METHODS:
    raise errors.UserError(
      f"scheduler {method!r} is not built: choose one of {', '.join(_METHODS)}"
    )
  values = hub.read_json(root / "scheduler" / "scheduler_config.json")
  config = schedulers.Config.from_hf(values, method=method)
  return schedulers.k_diffusion(config) if k_diffusion else config
