"""Trains a ControlNet for a UNet that stays as it is."""

from collections.abc import Mapping
import dataclasses
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, trees
from dppp_jax.geneperson import canvas, components
from dppp_jax.methods import beginnings, denoising
from dppp_jax.paperdoll import canvas_corpus
from dppp_jax.pretraining import cards, latents
from dppp_jax.pretraining import stack as stack_lib
from dppp_jax.train import run
from dppp_jax.weights import diffusers_folder

_SAYS = {
  "openpose": "skeletons as `geneperson.poses` draws them, one in each cell",
  "canny": "Canny's edges: of the grid between the cells, of a place's picture",
}


def train(config: Mapping[str, Any], workdir: str) -> pathlib.Path | None:
  """Trains, exports and measures a ControlNet.

  Args:
    config: the resolved configuration as a nested dict; `data.kind` is a key
      of what there is to steer by: "openpose" or "canny".
    workdir: run folder.

  Returns:
    The folder `workdir/controlnet-KIND` in diffusers' layout, or None where a
    signal stopped the training.

  Raises:
    errors.UserError: see `train.run.prepare` and `train.loop.fit`; no such
      kind; or no pipeline where the configuration looks.
  """
  data, settings = config["data"], config["train"]
  kind = data["kind"]
  if kind not in _SAYS:
    raise errors.UserError(
      f"config data.kind {kind!r}: choose {' or '.join(_SAYS)}"
    )
  stack = begin(config)
  folder = run.prepare(workdir, config)
  drawn = stack_lib.corpus(data, "train", data["num_canvases"])
  held_out = stack_lib.corpus(data, "held_out", data["num_held_out"])
  images = [control_images(one, kind, data) for one in (drawn, held_out)]
  stages = stack_lib.phases(
    stack,
    config,
    init=beginnings.controlnet_init(stack.system, stack.given),
    rules=lambda rate: (("controlnet/.*", rate), (".*", None)),
    data=stack_lib.examples(stack, drawn, data, control=images[0]),
  )
  outcome = stack_lib.fit(
    stages,
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
  target = folder / f"controlnet-{kind}"
  if target.exists():
    shutil.rmtree(target)  # Ours, and rebuilt from the checkpoint.
  net = outcome.params["controlnet"]
  diffusers_folder.save(target, stack.system.control, net, dtype="float16")
  metrics = measure(stack, outcome.params, held_out, images[1], config)
  sizes = {phase["name"]: phase["batch_size"] for phase in settings["phases"]}
  metrics |= {**cards.cost(folder, sizes), "parameters": trees.count(net)}
  cards.write(target, card(config, metrics), config=config, metrics=metrics)
  return target


def begin(config: Mapping[str, Any]) -> stack_lib.Stack:
  """Reads the pipeline, and makes room for the ControlNet."""
  found = from_pipeline(config)
  system = found.system
  control = beginnings.control_config(
    system.unet, widths=config["model"]["conditioning_embedding_out_channels"]
  )
  if 2 ** (len(control.conditioning_embedding_out_channels) - 1) != (
    system.vae.factor
  ):
    raise errors.UserError(
      "config model.conditioning_embedding_out_channels: pictures are"
      f" {system.vae.factor} times as large as latents, so it needs"
      f" {system.vae.factor.bit_length()} numbers"
    )
  system = dataclasses.replace(system, control=control)
  # The sampler wants some; the watcher gives it those in training.
  shapes = beginnings.controlnet_zeros(control)
  return dataclasses.replace(
    found, system=system, params={**found.params, "controlnet": shapes}
  )


def from_pipeline(config: Mapping[str, Any]) -> stack_lib.Stack:
  """Reads the pipeline that a ControlNet or a LoRA is trained for."""
  base = pathlib.Path(config["data"]["base"])
  parts = components.load_components(base, controlnets=())
  system = denoising.System(
    unet=parts.unet,
    texts=parts.texts,
    vae=parts.vae,
    schedule=parts.scheduler,
    zero_dropped=parts.zero_negative and parts.is_xl,
  )
  return stack_lib.Stack(
    system, parts.tokenizers, dict(parts.params), base / "vae"
  )


def control_images(
  drawn: canvas_corpus.Corpus, kind: str, data: Mapping[str, Any]
) -> np.ndarray:
  """Returns uint8 [N, H, W, 3], mapped: what steers each canvas."""

  def draw(i: int) -> np.ndarray:
    if kind == "openpose":
      return drawn.skeleton(i)
    if drawn.records[i]["is_scene"]:
      return canvas.line_map(np.asarray(drawn.images[i]))
    return drawn.lines(i)

  label = f"{kind} {stack_lib.name(drawn)}"
  return latents.pictures(draw, len(drawn), cache=data["cache"], label=label)


def measure(
  stack: stack_lib.Stack,
  params: Mapping[str, Any],
  held_out: canvas_corpus.Corpus,
  control: np.ndarray,
  config: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the error on held-out canvases with and without the network."""
  data = stack_lib.examples(stack, held_out, config["data"], control=control)
  # A ControlNet of zeros is none.
  states = [params, {**params, "controlnet": stack.params["controlnet"]}]
  errors_of = stack_lib.held_out_errors(stack, states, data, config)
  return {
    "held_out_mse": errors_of[0],
    "held_out_mse_without": errors_of[1],
    "num_held_out": len(held_out),
  }


def card(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
  """Returns the model card; every number in it is measured."""
  data, settings = config["data"], config["train"]
  kind = data["kind"]
  return cards.text(
    f"Mini ControlNet ({kind}) of the paper-doll world",
    "A ControlNet trained by `launch/pretrain.py --config"
    f" configs/pretrain_controlnet_{kind}.py` for the mini SDXL beside it. It"
    f" reads {_SAYS[kind]}. It loads in diffusers.",
    tags=("controlnet", "person-re-identification", "synthetic"),
    facts={
      "Data": f"{data['num_canvases']:,} drawn canvases of 192 x 144 pixels,"
      f" world seed {data['seed']}",
      "Parameters": f"{metrics['parameters']:,}, stored in float16",
      "Training": f"{metrics['steps']:,} steps in {metrics['seconds']:,}"
      f" seconds, seed {settings['seed']}; the UNet is frozen",
    },
    table={
      f"mean squared error ({metrics['num_held_out']} canvases)": (
        f"{metrics['held_out_mse']:.4f}"
      ),
      "the same without the ControlNet": (
        f"{metrics['held_out_mse_without']:.4f}"
      ),
    },
  )
