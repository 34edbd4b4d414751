"""Trains a ControlNet for a UNet that stays as it is."""

from collections.abc import Mapping, Sequence
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
from dppp_jax.pretraining import cards, corpora, latents
from dppp_jax.pretraining import stack as stack_lib
from dppp_jax.train import run
from dppp_jax.train import stage as stage_lib
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
  drawn = corpora.draw(data, "train", data["num_canvases"])
  held_out = corpora.draw(data, "held_out", data["num_held_out"])
  images = [control_images(one, kind, data) for one in (drawn, held_out)]
  examples = stack_lib.examples(stack, drawn, data, control=images[0])
  outcome = stack_lib.fit(
    stages(stack, config, examples),
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
  unseen = stack_lib.examples(stack, held_out, data, control=images[1])
  return export(folder, stack, outcome.params, config, kind=kind, data=unseen)


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
  return stack_lib.phases(
    stack,
    config,
    init=beginnings.controlnet_init(stack.system, stack.given),
    rules=lambda rate: (("controlnet/.*", rate), (".*", None)),
    data=data,
  )


def export(
  folder: pathlib.Path,
  stack: stack_lib.Stack,
  params: Mapping[str, Any],
  config: Mapping[str, Any],
  *,
  kind: str,
  data: Mapping[str, np.ndarray],
) -> pathlib.Path:
  """Writes and measures a ControlNet.

  Args:
    folder: of the run.
    stack: of the training.
    params: trained.
    config: resolved.
    kind: what it is steered by.
    data: of `stack.examples`, of held-out canvases.

  Returns:
    The folder `controlnet-KIND` inside.
  """
  target = folder / f"controlnet-{kind}"
  if target.exists():
    shutil.rmtree(target)  # Ours, and rebuilt from the checkpoint.
  net = params["controlnet"]
  diffusers_folder.save(target, stack.system.control, net, dtype="float16")
  # A ControlNet of zeros is none.
  zeros = beginnings.controlnet_zeros(stack.system.control)
  states = [params, {**params, "controlnet": zeros}]
  found = stack_lib.held_out_errors(stack, states, data, config)
  metrics = {
    "held_out_mse": found[0],
    "held_out_mse_without": found[1],
    "num_held_out": len(data["moments"]),
    **cards.cost(folder, config["train"]["phases"]),
    "parameters": trees.count(net),
  }
  text = card(config, metrics, kind=kind)
  cards.write(target, text, config=config, metrics=metrics)
  return target


def begin(config: Mapping[str, Any]) -> stack_lib.Stack:
  """Reads the pipeline, and makes room for the ControlNet."""
  model = config["model"]
  return beside(
    from_pipeline(config["data"]["base"]),
    model["conditioning_embedding_out_channels"],
    attention=model["attention"],
  )


def beside(
  stack: stack_lib.Stack, widths: Sequence[int], *, attention: bool = True
) -> stack_lib.Stack:
  """Returns a stack with a ControlNet of zeros, which says nothing.

  Args:
    stack: without one.
    widths: conditioning_embedding_out_channels.
    attention: whether it has any.

  Raises:
    errors.UserError: pictures would not shrink to the size of latents.
  """
  system = stack.system
  control = beginnings.control_config(
    system.unet, widths=widths, attention=attention
  )
  if 2 ** (len(widths) - 1) != system.vae.factor:
    raise errors.UserError(
      "config model.conditioning_embedding_out_channels: pictures are"
      f" {system.vae.factor} times as large as latents, so it needs"
      f" {system.vae.factor.bit_length()} numbers"
    )
  # The sampler wants some; the watcher gives it those in training.
  zeros = beginnings.controlnet_zeros(control)
  return dataclasses.replace(
    stack,
    system=dataclasses.replace(system, control=control),
    params={**stack.params, "controlnet": zeros},
  )


def from_pipeline(
  base: str | pathlib.Path, *, control: str | pathlib.Path | None = None
) -> stack_lib.Stack:
  """Reads a pipeline that something is trained for, or that learns on.

  Args:
    base: folder in diffusers' layout.
    control: folder of a ControlNet that learns beside it.

  Raises:
    errors.UserError: see `components.load_components`.
  """
  base = pathlib.Path(base)
  controls = () if control is None else (pathlib.Path(control),)
  parts = components.load_components(base, controlnets=controls)
  system = denoising.System(
    unet=parts.unet,
    texts=parts.texts,
    vae=parts.vae,
    schedule=parts.scheduler,
    zero_dropped=parts.zero_negative and parts.is_xl,
    control=next(iter(parts.controlnets), None),
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

  label = f"{kind} {corpora.name(drawn)}"
  return latents.pictures(draw, len(drawn), cache=data["cache"], label=label)


def card(
  config: Mapping[str, Any], metrics: Mapping[str, Any], *, kind: str
) -> str:
  """Returns the model card; every number in it is measured."""
  data, settings = config["data"], config["train"]
  is_joint = config["method"] == "unet"
  name = "unet" if is_joint else f"controlnet_{kind}"
  return cards.text(
    f"Mini ControlNet ({kind}) of the paper-doll world",
    "A ControlNet trained by `launch/pretrain.py --config"
    f" configs/pretrain_{name}.py` for the mini SDXL beside it. It"
    f" reads {_SAYS[kind]}. It loads in diffusers.",
    tags=("controlnet", "person-re-identification", "synthetic"),
    facts={
      "Data": f"{data['num_canvases']:,} drawn canvases of 192 x 144 pixels,"
      f" world seed {data['seed']}",
      "Parameters": f"{metrics['parameters']:,}, stored in float16",
      "Training": f"{metrics['steps']:,} steps in {metrics['seconds']:,}"
      f" seconds, seed {settings['seed']}; the UNet"
      f" {'learns beside it' if is_joint else 'is frozen'}",
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
