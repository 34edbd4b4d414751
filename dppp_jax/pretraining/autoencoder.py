"""Trains an AutoencoderKL on studio canvases, exports it, and measures it.

The loss has no network in it, so that nothing has to be downloaded: with the
error e = reconstruction - picture,

    L = mean |e| + a mean e^2 + b mean (e - grey(e))^2 + c mean |grad e|
        + d mean |laplace e| + f KL(q(z|x), N(0, 1))

Colours vary a tenth as much as brightness, and are learned last unless they
are weighed apart. The two edge terms weigh fine patterns, which are few pixels,
against flat paper. They must not be large at the beginning: while edges are
wrong anyway, they reward having none.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from dppp_jax import rngs, trees, types
from dppp_jax.data import images as images_lib
from dppp_jax.data import source as source_lib
from dppp_jax.models import vae
from dppp_jax.paperdoll import canvas_corpus
from dppp_jax.pretraining import cards, corpora
from dppp_jax.train import loop, run
from dppp_jax.train import stage as stage_lib
from dppp_jax.weights import diffusers_folder

_SHOWN = 6  # Canvases on a sheet.
_BATCH = 8  # Of measuring.
_COLOUR = 3.0  # Gain of colour over brightness at the beginning.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """What the parts of the loss count beside mean |e|.

  Attributes:
    square: of the mean squared error, by which PSNR is reckoned.
    chroma: of the mean squared error of the colour, without its grey.
    gradient: of the differences of neighbours, right and below.
    laplacian: of the difference to the mean of the four neighbours.
    kl: of the divergence from the unit normal, per entry of the latents.
  """

  square: float = 2.0
  chroma: float = 5.0
  gradient: float = 0.2
  laplacian: float = 0.2
  kl: float = 1e-4


def train(config: Mapping[str, Any], workdir: str) -> pathlib.Path | None:
  """Trains, exports and measures an autoencoder.

  Args:
    config: the resolved configuration as a nested dict.
    workdir: run folder.

  Returns:
    The folder `workdir/vae`, or None where a signal stopped the training.

  Raises:
    errors.UserError: see `train.run.prepare` and `train.loop.fit`.
  """
  folder = run.prepare(workdir, config)
  data, settings = config["data"], config["train"]
  corpus = corpora.draw(data, "train", data["num_canvases"])
  held_out = corpora.draw(data, "held_out", data["num_held_out"])
  net_config = make_config(config["model"])
  outcome = loop.fit(
    stages(config),
    source_lib.Arrays(corpus.images, np.arange(len(corpus))),
    workdir=folder,
    options=loop.Options(
      seed=settings["seed"],
      image_size=corpus.images.shape[1:3],
      log_every=settings["log_every"],
      checkpoint_every=settings["checkpoint_every"],
      watch_every=settings["sheet_every"],
      tensorboard=settings["tensorboard"],
    ),
    watcher=_watcher(net_config, held_out, folder / "sheets"),
  )
  if not outcome.finished:
    return None
  # A UNet sees latents of variance one.
  factor = 1.0 / spread(net_config, outcome.params, corpus.images[:256])
  net_config = dataclasses.replace(net_config, scaling_factor=factor)
  target = folder / "vae"
  if target.exists():
    shutil.rmtree(target)  # Ours, and rebuilt from the checkpoint.
  diffusers_folder.save(target, net_config, outcome.params, dtype="float16")
  metrics = {
    **measure(target, held_out),
    **cards.cost(folder, settings["phases"]),
    "parameters": trees.count(outcome.params),
  }
  cards.write(target, card(config, metrics), config=config, metrics=metrics)
  return target


def stages(config: Mapping[str, Any]) -> list[stage_lib.Stage]:
  """Returns a stage for each phase of a resolved configuration."""
  net_config, settings = make_config(config["model"]), config["train"]
  return [
    stage_lib.Stage(
      name=phase["name"],
      init=functools.partial(_begin, net_config, is_first=number == 0),
      loss=make_loss(
        net_config,
        Weights(**phase["weights"]),
        crop=phase["crop"],
        dtype=jnp.dtype(config["dtype"]),
      ),
      rules=((".*", phase["lr"]),),
      batches=stage_lib.Shuffled(phase["batch_size"]),
      epochs=phase["epochs"],
      schedule=stage_lib.warmup_cosine(
        warmup=phase["warmup"], final=phase["final"]
      ),
      weight_decay=settings["weight_decay"],
      decoupled=True,
      muon=settings["muon"],
      bias_lr_multiplier=1.0,
      clip_norm=1.0,
    )
    for number, phase in enumerate(settings["phases"])
  ]


def make_config(model: Mapping[str, Any]) -> vae.Config:
  """Returns the network's configuration, with as many levels as widths."""
  levels = len(model["block_out_channels"])
  return vae.Config(
    down_block_types=("DownEncoderBlock2D",) * levels,
    up_block_types=("UpDecoderBlock2D",) * levels,
    force_upcast=False,
    **{**model, "block_out_channels": tuple(model["block_out_channels"])},
  )


def make_loss(
  config: vae.Config,
  weights: Weights,
  *,
  crop: tuple[int, int] | None = None,
  dtype: Any = jnp.float32,
) -> Callable[..., tuple[jax.Array, stage_lib.Aux]]:
  """Returns the loss of a stage.

  Args:
    config: of the network.
    weights: of the parts.
    crop: (height, width) of the window that a step looks at, the same for all
      its pictures, or None for whole pictures.
    dtype: of the convolutions.
  """
  net = vae.VAE(config, dtype)

  def loss(params, collections, batch, rng):
    images = batch["image"]
    if crop is not None:
      images = _window(images, tuple(crop), rngs.stream(rng, "crop"))
    moments = net.apply({"params": params}, images, method="encode")
    latents = moments.sample(rngs.stream(rng, "latents"))
    made = net.apply({"params": params}, latents, method="decode")
    parts = errors_of(made.astype(jnp.float32) - images)
    divergence = kl(moments)
    total = (
      parts["l1"]
      + weights.square * parts["l2"]
      + weights.chroma * parts["chroma"]
      + weights.gradient * parts["gradient"]
      + weights.laplacian * parts["laplacian"]
      + weights.kl * divergence
    )
    metrics = {
      **parts,
      "kl": divergence,
      "latent_std": jnp.std(latents.astype(jnp.float32)),
    }
    return total, stage_lib.Aux(metrics, collections)

  return loss


def errors_of(error: types.Array) -> dict[str, jax.Array]:
  """Returns the parts of the loss for an error.

  Args:
    error: [B, H, W, C], reconstruction - picture, in units of [-1, 1].

  Returns:
    "l1", "l2", "chroma", "gradient", "laplacian" and "psnr" (dB), scalars.
  """
  down = error[:, 1:] - error[:, :-1]
  right = error[:, :, 1:] - error[:, :, :-1]
  around = (
    error[:, :-2, 1:-1]
    + error[:, 2:, 1:-1]
    + error[:, 1:-1, :-2]
    + error[:, 1:-1, 2:]
  )
  size = lambda x: jnp.mean(jnp.abs(x))
  square = jnp.mean(error**2)
  return {
    "l1": size(error),
    "l2": square,
    "chroma": jnp.mean((error - error.mean(-1, keepdims=True)) ** 2),
    "gradient": 0.5 * (size(down) + size(right)),
    "laplacian": size(error[:, 1:-1, 1:-1] - around / 4),
    # The range of [-1, 1] is 2.
    "psnr": 10 * jnp.log10(4 / jnp.maximum(square, 1e-10)),
  }


def kl(moments: vae.Moments) -> jax.Array:
  """Returns KL(q(z | x) || N(0, 1)) per entry of the latents, in nats."""
  mean = moments.mean.astype(jnp.float32)
  logvar = moments.logvar.astype(jnp.float32)
  return 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)


def spread(
  config: vae.Config, params: types.Params, images: np.ndarray
) -> float:
  """Returns the standard deviation of the latents of uint8 [N, H, W, 3]."""
  net = vae.VAE(config)

  @jax.jit
  def encode(images):
    x = images.astype(jnp.float32) / 127.5 - 1
    return net.apply({"params": params}, x, method="encode").mean

  return float(np.std(_batched(encode, images).astype(np.float64)))


def reconstruct(
  config: vae.Config, params: types.Params, images: np.ndarray
) -> np.ndarray:
  """Encodes and decodes uint8 [N, H, W, 3] by the mean of the latents."""
  params = trees.to_float32(params)  # Files hold less.
  return _batched(functools.partial(_reconstruct, config, params), images)


def measure(
  folder: pathlib.Path, corpus: canvas_corpus.Corpus
) -> dict[str, Any]:
  """Measures an exported autoencoder on canvases of a corpus.

  Returns:
    "psnr_canvases", "psnr_people" (inside the mattes, where paper does not
    flatter) and "psnr_places", means over pictures in dB; "num_canvases".
  """
  config, params = diffusers_folder.vae(folder)
  made = reconstruct(config, params, corpus.images)
  squares = np.mean((made.astype(np.float64) - corpus.images) ** 2, axis=-1)
  decibel = lambda mse: 10 * math.log10(255**2 / max(mse, 1e-6))
  found = {"canvases": [], "people": [], "places": []}
  for square, alpha, place in zip(
    squares, corpus.alphas, corpus.is_scene, strict=True
  ):
    found["places" if place else "canvases"].append(decibel(square.mean()))
    if not place:
      found["people"].append(decibel(square[alpha > 127].mean()))
  means = {f"psnr_{k}": float(np.mean(v)) for k, v in found.items() if v}
  return {**means, "num_canvases": len(corpus)}


def card(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
  """Returns the model card; every number in it is measured."""
  data, settings = config["data"], config["train"]
  widths = config["model"]["block_out_channels"]
  named = {
    "canvases": "canvases of people, PSNR",
    "people": "the same within the mattes, PSNR",
    "places": "places, PSNR",
  }
  return cards.text(
    "Mini VAE of the paper-doll world",
    "A small AutoencoderKL trained by `launch/pretrain.py --config"
    " configs/pretrain_vae.py`. It loads in diffusers.",
    tags=("autoencoder", "person-re-identification", "synthetic"),
    facts={
      "Data": f"{data['num_canvases']:,} drawn canvases of 192 x 144 pixels,"
      f" world seed {data['seed']}",
      "Latents": f"{config['model']['latent_channels']} channels, smaller by"
      f" {2 ** (len(widths) - 1)}",
      "Parameters": f"{metrics['parameters']:,}, stored in float16",
      "Training": f"{metrics['steps']:,} steps in {metrics['seconds']:,}"
      f" seconds, seed {settings['seed']}",
    },
    table={
      f"{named[key]} ({metrics['num_canvases']} pictures in all)": (
        f"{metrics[f'psnr_{key}']:.2f} dB"
      )
      for key in named
      if f"psnr_{key}" in metrics
    },
  )


def _begin(config, params, collections, rng, *, is_first):
  """Begins where colours pass: they are learned last otherwise."""
  if not is_first:
    return params, collections
  flat = trees.flatten(vae.init_params(config, rng))
  for name, x in flat.items():
    if name.endswith("conv2/kernel"):
      # Of a residual branch: without it the network is shorter at first.
      flat[name] = jnp.zeros_like(x)
    elif x.shape[:2] == (3, 3):
      # Each pixel mostly as it is, and a little of its neighbours.
      key = rngs.stream(rng, name)
      tap = jax.random.normal(key, x.shape[2:]) / math.sqrt(x.shape[2])
      flat[name] = (0.3 * x).at[1, 1].add(tap)
  # Between channels lies the colour: three times as much of it comes in.
  kernel = flat["encoder/conv_in/kernel"]
  grey = kernel.mean(axis=2, keepdims=True)
  flat["encoder/conv_in/kernel"] = grey + _COLOUR * (kernel - grey)
  if config.use_quant_conv:
    # Little noise at first: at a variance of one the decoder sees nothing of
    # the picture, and for hundreds of steps learns its mean colours only.
    bias = flat["quant_conv/bias"]
    flat["quant_conv/bias"] = bias.at[config.latent_channels :].set(-6.0)
  return trees.unflatten(flat), {}


def _window(images, crop, rng):
  """Cuts one window [B, h, w, C], somewhere, out of all pictures."""
  free = jnp.array(images.shape[1:3]) - jnp.array(crop) + 1
  y, x = jax.random.randint(rng, (2,), 0, free)
  shape = (images.shape[0], *crop, images.shape[3])
  return jax.lax.dynamic_slice(images, (0, y, x, 0), shape)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(config, params, images):
  x = images.astype(jnp.float32) / 127.5 - 1
  made = vae.VAE(config).apply({"params": params}, x)
  return jnp.rint(jnp.clip((made + 1) * 127.5, 0, 255)).astype(jnp.uint8)


def _batched(function, images: np.ndarray) -> np.ndarray:
  """Runs a function over pictures in batches of one size."""
  parts = []
  for start in range(0, len(images), _BATCH):
    part = np.asarray(images[start : start + _BATCH])
    missing = ((0, _BATCH - len(part)), *((0, 0),) * (part.ndim - 1))
    parts.append(np.asarray(function(np.pad(part, missing)))[: len(part)])
  return np.concatenate(parts)


def _watcher(config, corpus, folder):
  """Returns a watcher that draws pictures above their reconstructions."""

  def watch(name, step, params):
    shown = np.asarray(corpus.images[:_BATCH])
    made = reconstruct(config, params, shown)
    sheet = images_lib.contact_sheet(
      [shown[-_SHOWN:], made[-_SHOWN:]], max_height=shown.shape[1]
    )
    folder.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(sheet).save(folder / f"{name}-{step:06d}.png")
    error = (made.astype(np.float32) - shown) / 127.5
    return {"held_out_psnr": float(errors_of(error)["psnr"])}

  return watch
