"""What trainings of UNet, ControlNets and LoRAs share: the system around."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from dppp_jax import types
from dppp_jax.data import images as images_lib
from dppp_jax.data import source as source_lib
from dppp_jax.diffusion import components, conditioning
from dppp_jax.diffusion import sampler as sampler_lib
from dppp_jax.methods import denoising
from dppp_jax.paperdoll import canvas_corpus
from dppp_jax.pretraining import corpora, latents
from dppp_jax.train import loop
from dppp_jax.train import stage as stage_lib


@dataclasses.dataclass(frozen=True)
class Stack:
  """A system, its tokenizers, and all parameters that are known.

  Attributes:
    system: in training.
    tokenizers: of both text encoders.
    params: by the names of diffusers' folders; "vae" among them, which no
      training sees.
    vae_folder: where the VAE was read.
  """

  system: denoising.System
  tokenizers: tuple[Any, ...]
  params: types.Params
  vae_folder: pathlib.Path

  @property
  def given(self) -> types.Params:
    """The parameters that the loss sees."""
    return {k: v for k, v in self.params.items() if k != "vae"}

  def sampler(self, dtype: Any) -> sampler_lib.Sampler:
    """Returns a sampler; its parameters are replaced at each call."""
    return sampler_lib.Sampler(self.components(self.params), dtype=dtype)

  def components(self, params: types.Params) -> components.Components:
    """Returns the system with parameters as the sampler takes it."""
    control = self.system.control
    return components.Components(
      unet=self.system.unet,
      vae=self.system.vae,
      texts=self.system.texts,
      tokenizers=self.tokenizers,
      controlnets=() if control is None else (control,),
      scheduler=self.system.schedule,
      params=params,
      zero_negative=self.system.zero_dropped,
    )


def options(config: Mapping[str, Any], **more: Any) -> denoising.Options:
  """Returns the loss' options of a resolved configuration."""
  settings = config["train"]
  return denoising.Options(
    snr_gamma=settings["snr_gamma"],
    drop=settings["drop"],
    dtype=jnp.dtype(config["dtype"]),
    remat=settings.get("remat", False),
    **more,
  )


def examples(
  stack: Stack,
  drawn: canvas_corpus.Corpus,
  data: Mapping[str, Any],
  *,
  transform: latents.Transform | None = None,
  label: str = "",
  control: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Returns what the loss reads of a corpus, see `denoising.extras`.

  Args:
    stack: in training.
    drawn: the corpus.
    data: of the configuration.
    transform: what is done to each picture before it is encoded.
    label: the transform's name.
    control: of `latents.pictures`.
  """
  found = latents.moments(
    drawn.images,
    stack.vae_folder,
    cache=data["cache"],
    label=f"{corpora.name(drawn)} {label}",
    transform=transform,
  )
  height, width = drawn.images.shape[1:3]
  ids = conditioning.time_ids((height, width), conditioning.Sizes())
  return denoising.extras(
    stack.system,
    stack.tokenizers,
    drawn.prompts,
    moments=found,
    time_ids=np.tile(ids, (len(drawn), 1)),
    control=control,
  )


def phases(
  stack: Stack,
  config: Mapping[str, Any],
  *,
  init: stage_lib.Init,
  rules: Callable[[float], tuple[tuple[str, float | None], ...]],
  data: Mapping[str, np.ndarray],
  **more: Any,
) -> list[stage_lib.Stage]:
  """Returns a stage for each phase of a configuration.

  Args:
    stack: in training.
    config: resolved.
    init: of the first phase; the others go on.
    rules: rate -> rules.
    data: of `examples`.
    **more: of `denoising.Options`.
  """
  settings = config["train"]
  keep = lambda params, collections, rng: (params, collections)
  found = []
  for number, phase in enumerate(settings["phases"]):
    window = phase.get("window")
    found.append(
      denoising.stage(
        phase["name"],
        stack.system,
        options(
          config,
          window=None if window is None else tuple(window),
          window_stride=tuple(phase.get("stride", (1, 1))),
          **more,
        ),
        init=keep if number else init,
        rules=rules(phase["lr"]),
        data=data,
        batch_size=phase["batch_size"],
        epochs=phase["epochs"],
        warmup=phase["warmup"],
        final=phase["final"],
        weight_decay=settings["weight_decay"],
        muon=settings["muon"],
        ema=settings["ema"],
        empty=denoising.empty_ids(stack.system, stack.tokenizers),
      )
    )
  return found


def fit(
  stages: Sequence[stage_lib.Stage],
  num: int,
  config: Mapping[str, Any],
  folder: pathlib.Path,
  watcher: loop.Watcher | None,
) -> loop.Outcome:
  """Runs the loop over N examples without pictures."""
  settings = config["train"]
  return loop.fit(
    stages,
    source_lib.Records(num),
    workdir=folder,
    options=loop.Options(
      seed=settings["seed"],
      log_every=settings["log_every"],
      checkpoint_every=settings["checkpoint_every"],
      watch_every=settings["sheet_every"],
      tensorboard=settings["tensorboard"],
    ),
    watcher=watcher,
  )


def held_out_errors(
  stack: Stack,
  states: Sequence[types.Params],
  data: Mapping[str, np.ndarray],
  config: Mapping[str, Any],
  *,
  batch_size: int = 8,
  **more: Any,
) -> list[float]:
  """Returns mean squared errors of the prediction on examples unseen.

  No prompt is dropped, no timestep weighs more, and the noise is the same for
  all states of the networks and at each call, so that they can be compared.

  Args:
    stack: of the training.
    states: parameters that the loss reads, of the same structure each.
    data: of `examples`.
    config: resolved.
    batch_size: of measuring.
    **more: of `denoising.Options`.

  Returns:
    One number for each state.
  """
  plain = dataclasses.replace(options(config, **more), drop=0.0, snr_gamma=None)
  empty = denoising.empty_ids(stack.system, stack.tokenizers)
  loss = jax.jit(denoising.make_loss(stack.system, plain, empty=empty))
  found = []
  for start in range(0, len(data["moments"]) - batch_size + 1, batch_size):
    some = slice(start, start + batch_size)
    batch = {name: np.asarray(x[some]) for name, x in data.items()}
    key = jax.random.fold_in(jax.random.key(0), start)
    found.append([float(loss(state, {}, batch, key)[0]) for state in states])
  return np.mean(found, axis=0).tolist()


def watcher(
  stack: Stack,
  held_out: canvas_corpus.Corpus,
  folder: pathlib.Path,
  sheet: Mapping[str, Any],
  *,
  dtype: Any,
  control: np.ndarray | None = None,
  merged: Callable[[types.Params], types.Params] | None = None,
) -> loop.Watcher:
  """Returns a watcher that draws held-out prompts under their canvases.

  Args:
    stack: in training.
    held_out: the first of its canvases are shown.
    folder: where the sheets go.
    sheet: "num", "steps" and "guidance".
    dtype: of the sampler.
    control: uint8 [N, H, W, 3], shown and given to the ControlNet.
    merged: makes of trained parameters those that are sampled.
  """
  made: list[sampler_lib.Sampler] = []
  num = min(sheet["num"], len(held_out))
  # Places are the last of every eight.
  shown = np.arange(len(held_out) - num, len(held_out))

  def watch(name, step, params):
    if not made:
      made.append(stack.sampler(dtype))
    sampler = made[0]
    params = merged(params) if merged else params
    known = {k: v for k, v in params.items() if k != "lora"}
    rows = [held_out.images[shown]]
    images = ()
    if control is not None:
      images = [np.asarray(control[shown])]
      rows.append(images[0])
    drawn = sampler.sample(
      [held_out.prompts[i] for i in shown],
      seeds=[int(i) for i in shown],
      control_images=images,
      steps=sheet["steps"],
      guidance=sheet["guidance"],
      size=held_out.images.shape[1:3],
      params=sampler.place({**stack.params, **known}),
    )
    rows.append(np.asarray(drawn))
    folder.mkdir(parents=True, exist_ok=True)
    picture = images_lib.contact_sheet(rows, max_height=192)
    PIL.Image.fromarray(picture).save(folder / f"{name}-{step:06d}.png")
    return {}

  return watch
