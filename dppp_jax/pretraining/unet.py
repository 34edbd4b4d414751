"""Trains an SDXL-type UNet and its second text encoder on studio canvases."""

from collections.abc import Mapping
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from dppp_jax import rngs, trees
from dppp_jax.diffusion import schedulers
from dppp_jax.methods import beginnings, denoising
from dppp_jax.models import clip, unet_config
from dppp_jax.pretraining import cards, controlnet, corpora
from dppp_jax.pretraining import stack as stack_lib
from dppp_jax.train import run
from dppp_jax.train import stage as stage_lib
from dppp_jax.weights import diffusers_folder, hub, load, pipeline_folder


def train(config: Mapping[str, Any], workdir: str) -> pathlib.Path | None:
  """Trains, exports and measures a UNet.

  Args:
    config: the resolved configuration as a nested dict.
    workdir: run folder.

  Returns:
    The folder `workdir/sdxl`, a whole pipeline of diffusers; None where a
    signal stopped the training.

  Raises:
    errors.UserError: see `train.run.prepare` and `train.loop.fit`; or there
      is no VAE or CLIP where the configuration looks.
  """
  stack = begin(config)
  folder = run.prepare(workdir, config)
  data, settings = config["data"], config["train"]
  drawn = corpora.draw(data, "train", data["num_canvases"])
  held_out = corpora.draw(data, "held_out", data["num_held_out"])
  kind, images = "", (None, None)
  if config["model"]["control"]:
    kind = config["model"]["control"]["kind"]
    images = [
      controlnet.control_images(one, kind, data) for one in (drawn, held_out)
    ]
  examples = [
    stack_lib.examples(stack, one, data, control=shown)
    for one, shown in zip((drawn, held_out), images, strict=True)
  ]
  outcome = stack_lib.fit(
    stages(stack, config, examples[0]),
    len(drawn),
    config,
    folder,
    stack_lib.watcher(
      stack,
      held_out,
      folder / "sheets",
      settings["sheet"],
      dtype=jnp.dtype(config["dtype"]),
      control=images[1],
    ),
  )
  if not outcome.finished:
    return None
  target = folder / "sdxl"
  if target.exists():
    shutil.rmtree(target)  # Ours, and rebuilt from the checkpoint.
  export(target, stack, outcome.params, config, sides=drawn.images.shape[1:3])
  if kind:
    net = controlnet.export(
      folder, stack, outcome.params, config, kind=kind, data=examples[1]
    )
    error = hub.read_json(net / "metrics.json")["held_out_mse_without"]
  else:
    (error,) = stack_lib.held_out_errors(
      stack, [outcome.params], examples[1], config
    )
  metrics = {
    "held_out_mse": error,
    "num_held_out": len(held_out),
    **cards.cost(folder, settings["phases"]),
    "parameters": {
      name: trees.count(tree) for name, tree in outcome.params.items()
    },
  }
  cards.write(target, card(config, metrics), config=config, metrics=metrics)
  return target


def stages(
  stack: stack_lib.Stack,
  config: Mapping[str, Any],
  data: Mapping[str, Any],
) -> list[stage_lib.Stage]:
  """Returns a stage for each phase of a resolved configuration.

  Args:
    stack: of `begin`.
    config: see `train`.
    data: of `stack.examples`.
  """
  begin_at, more = beginnings.unet_init, {}
  if config["model"]["control"]:
    if not config["begin"]:  # Otherwise all networks are given.
      begin_at = beginnings.joint_init
    more = {"control_drop": config["train"]["control_drop"]}
  return stack_lib.phases(
    stack,
    config,
    init=begin_at(stack.system, stack.given),
    rules=lambda rate: rules(
      rate, config["train"]["text_lr_factor"], has_control=bool(more)
    ),
    data=data,
    **more,
  )


def begin(config: Mapping[str, Any]) -> stack_lib.Stack:
  """Reads the VAE and the CLIP, and makes room for the UNet.

  Or reads all networks of the run that `begin` names, and goes on with them.

  The first text encoder is the CLIP's text tower, and stays as it is. The
  second begins as a copy of it, or at random where the configuration gives it
  sizes of its own, and learns with the UNet.
  """
  data, model = config["data"], config["model"]
  if config["begin"]:
    run_folder, control = pathlib.Path(config["begin"]), model["control"]
    return controlnet.from_pipeline(
      run_folder / "sdxl",
      control=run_folder / f"controlnet-{control['kind']}" if control else None,
    )
  vae_config, vae_params = diffusers_folder.vae(data["vae"])
  text, text_params = load.clip_text(data["clip"])
  tokenizer = load.tokenizer(data["clip"])
  second, second_params = text, text_params
  if model["text_encoder_2"]:
    second = clip.TextConfig(**{**vars(text), **model["text_encoder_2"]})
    key = jax.random.key(config["train"]["seed"])
    second_params = clip.init_params(second, rngs.stream(key, "text_encoder_2"))
  width = model["unet"]["addition_time_embed_dim"]
  net = unet_config.Config(
    **{k: _frozen(v) for k, v in model["unet"].items()},
    in_channels=vae_config.latent_channels,
    out_channels=vae_config.latent_channels,
    use_linear_projection=True,
    addition_embed_type="text_time",
    cross_attention_dim=text.hidden_size + second.hidden_size,
    projection_class_embeddings_input_dim=6 * width + second.projection_dim,
  )
  stack = stack_lib.Stack(
    denoising.System(
      unet=net,
      texts=(text, second),
      vae=vae_config,
      schedule=schedulers.Config.from_hf(config["scheduler"]),
      zero_dropped=config["train"]["zero_dropped"],
    ),
    (tokenizer, tokenizer),
    {
      "vae": vae_params,
      "text_encoder": text_params,
      "text_encoder_2": second_params,
    },
    pathlib.Path(data["vae"]),
  )
  if control := model["control"]:
    return controlnet.beside(
      stack, control["conditioning_embedding_out_channels"]
    )
  return stack


def rules(
  rate: float, text_factor: float, *, has_control: bool = False
) -> tuple[tuple[str, float | None], ...]:
  """Returns what is trained at which rate."""
  return (
    ("unet/.*", rate),
    *([("controlnet/.*", rate)] if has_control else []),
    # The last block and the last norm of an SDXL encoder reach the UNet by
    # the pooled vector only, and so they do here.
    ("text_encoder_2/.*", rate * text_factor if text_factor else None),
    (".*", None),
  )


def export(
  folder: pathlib.Path,
  stack: stack_lib.Stack,
  params: Mapping[str, Any],
  config: Mapping[str, Any],
  *,
  sides: tuple[int, int],
) -> pathlib.Path:
  """Writes the pipeline's folder.

  Args:
    folder: must not exist.
    stack: of the training.
    params: trained.
    config: resolved.
    sides: (H, W) of the pictures.
  """
  system = stack.system
  return pipeline_folder.save_xl(
    folder,
    unet=(system.unet, params["unet"]),
    vae=(system.vae, stack.params["vae"]),
    texts=[
      pipeline_folder.Text(text, params[name], tokenizer)
      for name, text, tokenizer in zip(
        system.text_names, system.texts, stack.tokenizers, strict=True
      )
    ],
    scheduler=config["scheduler"],
    zero_negative=system.zero_dropped,
    sample_size=max(sides) // system.vae.factor,
  )


def card(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
  """Returns the model card; every number in it is measured."""
  data, settings = config["data"], config["train"]
  sizes, gamma = metrics["parameters"], settings["snr_gamma"]
  weights = f"min-SNR gamma {gamma}" if gamma else "all timesteps alike"
  return cards.text(
    "Mini SDXL of the paper-doll world",
    "An SDXL-type text-to-image system trained by `launch/pretrain.py --config"
    " configs/pretrain_unet.py`. It draws one person six times on a canvas of"
    " 2 x 3 cells, or a place. It loads in diffusers as a"
    " StableDiffusionXLPipeline.",
    tags=("text-to-image", "person-re-identification", "synthetic"),
    facts={
      "Data": f"{data['num_canvases']:,} drawn canvases of 192 x 144 pixels,"
      f" world seed {data['seed']}",
      "Parameters": f"UNet {sizes['unet']:,}, second text encoder"
      f" {sizes['text_encoder_2']:,}, stored in float16",
      "Objective": f"{config['scheduler']['prediction_type']}, {weights},"
      f" prompts dropped {settings['drop']:.0%}",
      "Training": f"{metrics['steps']:,} steps in {metrics['seconds']:,}"
      f" seconds, seed {settings['seed']}, averaged with decay"
      f" {settings['ema']}"
      + (
        ", after those of `configs/pretrain_unet.py`"
        if config.get("begin")
        else ""
      ),
    },
    table={
      f"mean squared error ({metrics['num_held_out']} canvases)": (
        f"{metrics['held_out_mse']:.4f}"
      )
    },
  )


def _frozen(value: Any) -> Any:
  return tuple(value) if isinstance(value, list | tuple) else value
