"""Trains a U2-Net on cells of studio canvases, exports it, and measures it.

Deep supervision (Qin et al. 2020, eq. 1-2): the binary cross-entropy of the
answer and of all six side outputs against the matte,

    L = BCE(fused, a) + sum_m BCE(side_m, a),    m = 1 .. 6

Generated cells are not as clean as drawn ones. So the pictures are made softer,
noisier and of other colours, the reconstructions of a VAE stand among them, and
the grid leaves lines at their borders.
"""

from collections.abc import Callable, Mapping
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from dppp_jax import rngs, trees, types
from dppp_jax.data import images as images_lib
from dppp_jax.data import source as source_lib
from dppp_jax.geneperson import canvas
from dppp_jax.geneperson import matting as matting_lib
from dppp_jax.models import resizing, u2net
from dppp_jax.paperdoll import canvas_corpus, canvases
from dppp_jax.pretraining import autoencoder, cards, corpora
from dppp_jax.train import loop, run
from dppp_jax.train import stage as stage_lib
from dppp_jax.weights import diffusers_folder
from dppp_jax.weights import u2net as u2net_weights

FILE = "model.safetensors"
_SHOWN = 16  # Cells on a sheet.


def train(config: Mapping[str, Any], workdir: str) -> pathlib.Path | None:
  """Trains, exports and measures a matting network.

  Args:
    config: the resolved configuration as a nested dict.
    workdir: run folder.

  Returns:
    The folder `workdir/u2netp`, or None where a signal stopped the training.

  Raises:
    errors.UserError: see `train.run.prepare`, `train.loop.fit`, and
      `weights.diffusers_folder.vae` of `data.vae`.
  """
  folder = run.prepare(workdir, config)
  data, settings = config["data"], config["train"]
  corpus = corpora.draw(data, "train", data["num_canvases"])
  held_out = corpora.draw(data, "held_out", data["num_held_out"])
  images, mattes = cells(corpus, vae=data["vae"])
  net_config = make_config(config["model"])
  outcome = loop.fit(
    [stage(config, mattes)],
    source_lib.Arrays(images, np.arange(len(images))),
    workdir=folder,
    options=loop.Options(
      seed=settings["seed"],
      image_size=images.shape[1:3],
      log_every=settings["log_every"],
      checkpoint_every=settings["checkpoint_every"],
      watch_every=settings["sheet_every"],
      tensorboard=settings["tensorboard"],
    ),
    watcher=_watcher(net_config, held_out, folder / "sheets"),
  )
  if not outcome.finished:
    return None
  target = folder / "u2netp"
  target.mkdir(exist_ok=True)
  u2net_weights.save(
    target / FILE,
    {"params": outcome.params, **outcome.collections},
    dtype="float16",
  )
  metrics = {
    **measure(target, held_out, vae=data["vae"]),
    **cards.cost(folder, [{**settings, "name": "matting"}]),
    "parameters": trees.count(outcome.params),
  }
  cards.write(target, card(config, metrics), config=config, metrics=metrics)
  return target


def stage(config: Mapping[str, Any], mattes: types.Array) -> stage_lib.Stage:
  """Returns the training of a resolved configuration.

  Args:
    config: see `train`.
    mattes: uint8 [N, h, w], of its pictures.
  """
  net_config, settings = make_config(config["model"]), config["train"]
  return stage_lib.Stage(
    name="matting",
    init=functools.partial(_begin, net_config),
    loss=make_loss(net_config, dtype=jnp.dtype(config["dtype"])),
    rules=((".*", settings["lr"]),),
    batches=stage_lib.Shuffled(settings["batch_size"]),
    epochs=settings["epochs"],
    schedule=stage_lib.warmup_cosine(
      warmup=settings["warmup"], final=settings["final"]
    ),
    weight_decay=settings["weight_decay"],
    decoupled=True,
    bias_lr_multiplier=1.0,
    clip_norm=1.0,
    extras={"matte": mattes},
  )


def make_config(model: Mapping[str, Any]) -> u2net.Config:
  """Returns the widths, from lists of pairs."""
  pairs = lambda key: tuple(tuple(pair) for pair in model[key])
  return u2net.Config(pairs("encoder"), pairs("decoder"))


def cells(
  corpus: canvas_corpus.Corpus, *, vae: str = ""
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts the canvases of people.

  Args:
    corpus: of which places are left out.
    vae: folder of an autoencoder by whose reconstructions every second canvas
      is replaced, or "".

  Returns:
    uint8 [N, h, w, 3] and the mattes uint8 [N, h, w].
  """
  people = np.flatnonzero(~corpus.is_scene)
  images, alphas = corpus.images[people], corpus.alphas[people]
  if vae:
    config, params = diffusers_folder.vae(vae)
    images = np.array(images)
    images[::2] = autoencoder.reconstruct(config, params, images[::2])
  images = canvas.cut(images, canvases.LAYOUT)
  alphas = canvas.cut(alphas[..., None], canvases.LAYOUT)
  return (
    images.reshape(-1, *images.shape[2:]),
    alphas.reshape(-1, *alphas.shape[2:4]),
  )


def make_loss(
  config: u2net.Config, *, dtype: Any = jnp.float32
) -> Callable[..., tuple[jax.Array, stage_lib.Aux]]:
  """Returns the loss of deep supervision, see above.

  Args:
    config: of the network.
    dtype: of the convolutions.
  """
  net = u2net.U2Net(config, dtype)

  def loss(params, collections, batch, rng):
    images = (batch["image"] + 1) * 127.5
    mattes = batch["matte"].astype(jnp.float32) / 255
    images, mattes = degrade(images, mattes, rngs.stream(rng, "degrade"))
    output, collections = net.apply(
      {"params": params, **collections},
      matting_lib.normalize(images),
      train=True,
      mutable=["batch_stats"],
    )
    fused, sides = supervise(output, mattes)
    metrics = {
      "bce_fused": fused,
      "bce_sides": sides,
      "iou": iou(output.fused > 0, mattes > 0.5),
    }
    return fused + sides, stage_lib.Aux(metrics, dict(collections))

  return loss


def supervise(
  output: u2net.Output, mattes: types.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the cross-entropies with soft mattes.

  Args:
    output: logits [B, H, W] and [B, H, W, 6].
    mattes: [B, H, W] in 0..1.

  Returns:
    That of the answer, and the sum of those of the six sides: each a mean over
    pixels.
  """
  fused = jnp.mean(_bce(output.fused, mattes))
  sides = jnp.mean(_bce(output.sides, mattes[..., None]), axis=(0, 1, 2))
  return fused, jnp.sum(sides)


def iou(found: types.Array, wanted: types.Array) -> jax.Array:
  """Returns the mean intersection over union of bool [B, H, W]."""
  both = jnp.sum(found & wanted, axis=(1, 2))
  either = jnp.sum(found | wanted, axis=(1, 2))
  return jnp.mean(jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0))


@jax.jit
def degrade(
  images: types.Array, mattes: types.Array, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Makes drawn cells look like generated ones.

  Args:
    images: [B, H, W, 3] in 0..255.
    mattes: [B, H, W] in 0..1.
    rng: of everything that is drawn by lot.

  Returns:
    The cells and their mattes: mirrored or not, softened, with other colours,
    blotches and noise, with remains of grid lines; one in twenty without
    anybody, so that an empty cell is known as one.
  """
  count, height, width, _ = images.shape
  lot = lambda name, low, high, *shape: jax.random.uniform(
    rngs.stream(rng, name), (count, *shape), minval=low, maxval=high
  )
  normal = lambda name, *shape: jax.random.normal(
    rngs.stream(rng, name), (count, *shape)
  )
  turned = lot("flip", 0, 1, 1, 1) < 0.5
  mattes = jnp.where(turned, mattes[:, :, ::-1], mattes)
  images = jnp.where(turned[..., None], images[:, :, ::-1], images)
  empty = lot("empty", 0, 1, 1, 1) < 0.05
  mattes = jnp.where(empty, 0, mattes)
  paper = jnp.broadcast_to(images[:, :, 2:3], images.shape)
  images = jnp.where(empty[..., None], paper, images)
  # Half of the cells stay sharp; the others lose up to two pixels.
  soft = jnp.maximum(lot("soft", -1, 1, 1, 1, 1), 0)
  images = images + soft * (_blur(_blur(images)) - images)
  gain = lot("gain", 0.8, 1.2, 1, 1, 1) * lot("tint", 0.94, 1.06, 1, 1, 3)
  images = images * gain + lot("offset", -12, 12, 1, 1, 3)
  coarse = normal("blotches", height // 12, width // 12, 3)
  blotches = resizing.resize(coarse, (height, width), "linear", antialias=True)
  images = images + lot("uneven", 0, 8, 1, 1, 1) * blotches
  grain = normal("grain", height, width, 3)
  images = images + lot("noisy", 0, 10, 1, 1, 1) * grain
  # Lines of up to three pixels, of any darkness, at each border.
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
  edges = (rows, height - 1 - rows, columns, width - 1 - columns)
  widths = jnp.floor(lot("lines", 0, 4, 4, 1, 1))
  lined = functools.reduce(
    jnp.logical_or, [edge[None] < widths[:, i] for i, edge in enumerate(edges)]
  )
  dark = lot("darkness", 0, 60, 1, 1, 1)
  images = jnp.where(lined[..., None], jnp.minimum(images, dark), images)
  mattes = jnp.where(lined, 0, mattes)
  return jnp.clip(images, 0, 255), mattes


def measure(
  folder: pathlib.Path,
  corpus: canvas_corpus.Corpus,
  *,
  vae: str = "",
) -> dict[str, Any]:
  """Measures an exported network on cells of a corpus.

  Args:
    folder: of the network.
    corpus: of held-out canvases.
    vae: folder of an autoencoder, or "".

  Returns:
    {"iou_drawn", "iou_degraded" and, with a VAE, "iou_reconstructed"}: the mean
    intersection over union of mattes above one half; "empty_peak", the highest
    probability in cells without anybody; "num_cells".
  """
  network = matting_lib.load(
    folder, size=canvases.LAYOUT.cell, batch_size=_SHOWN
  )
  images, alphas = cells(corpus)
  wanted = alphas > 127
  score = lambda pictures, truth: float(
    iou(network(pictures).alpha > 127, truth)
  )
  found = {"iou_drawn": score(images, wanted)}
  softened, mattes = degrade(
    jnp.asarray(images, jnp.float32), alphas / 255, jax.random.key(0)
  )
  softened = np.rint(np.asarray(softened)).astype(np.uint8)
  seen = np.asarray(mattes).max(axis=(1, 2)) > 0
  found["iou_degraded"] = score(softened[seen], np.asarray(mattes)[seen] > 0.5)
  found["empty_peak"] = float(network(softened[~seen]).peak.max(initial=0.0))
  if vae:
    people = np.array(corpus.images[~corpus.is_scene])
    made = autoencoder.reconstruct(*diffusers_folder.vae(vae), people)
    made = canvas.cut(made, canvases.LAYOUT).reshape(images.shape)
    found["iou_reconstructed"] = score(made, wanted)
  return {**found, "num_cells": len(images)}


def card(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
  """Returns the model card; every number in it is measured."""
  data, settings = config["data"], config["train"]
  named = {
    "drawn": "cells as they are drawn, IoU",
    "degraded": "softened, tinted and noisy cells, IoU",
    "reconstructed": "cells after the mini VAE, IoU",
  }
  return cards.text(
    "Mini U2-Net of the paper-doll world",
    "A narrow U2-Net-p that mattes people of studio canvases, trained by"
    " `launch/pretrain.py --config configs/pretrain_u2netp.py`. Its tensors"
    " have the published names. Cells are given to it at 96 x 48.",
    tags=("matting", "person-re-identification", "synthetic"),
    facts={
      "Data": f"the cells of {data['num_canvases']:,} drawn canvases, world"
      f" seed {data['seed']}",
      "Parameters": f"{metrics['parameters']:,}, stored in float16",
      "Training": f"{metrics['steps']:,} steps in {metrics['seconds']:,}"
      f" seconds, seed {settings['seed']}",
    },
    table={
      **{
        f"{named[key]} ({metrics['num_cells']} cells)": (
          f"{metrics[f'iou_{key}']:.4f}"
        )
        for key in named
        if f"iou_{key}" in metrics
      },
      "highest probability in an empty cell": f"{metrics['empty_peak']:.3f}",
    },
  )


def _bce(logits: types.Array, targets: types.Array) -> jax.Array:
  """Cross-entropy with soft targets, from logits, without overflow."""
  logits = logits.astype(jnp.float32)
  return jax.nn.softplus(logits) - targets * logits


def _blur(images: types.Array) -> jax.Array:
  """The binomial kernel of three pixels, in both directions."""
  for axis in (1, 2):
    pads = [(0, 0)] * 4
    pads[axis] = (1, 1)
    padded = jnp.pad(images, pads, mode="edge")
    low = jax.lax.slice_in_dim(padded, 0, images.shape[axis], axis=axis)
    high = jax.lax.slice_in_dim(padded, 2, None, axis=axis)
    images = 0.5 * images + 0.25 * (low + high)
  return images


def _begin(config, params, collections, rng):
  """Begins at He's uniform kernels, drawn at once: compiling 120 takes long."""
  del params, collections
  flat = trees.flatten(u2net_weights.shapes(config))
  kernels = [name for name in flat if name.endswith("/kernel")]
  sizes = [flat[name].size for name in kernels]
  numbers = jax.random.uniform(rng, (sum(sizes),), minval=-1, maxval=1)
  ends = np.cumsum(sizes)
  begun = {}
  for name, shape in flat.items():
    is_one = name.endswith(("/scale", "/var"))
    begun[name] = np.full(shape.shape, float(is_one), np.float32)
  for name, part in zip(
    kernels, np.split(np.asarray(numbers), ends[:-1]), strict=True
  ):
    fan_in = np.prod(flat[name].shape[:-1])
    begun[name] = np.sqrt(6 / fan_in) * part.reshape(flat[name].shape)
  variables = trees.unflatten(begun)
  return variables["params"], {"batch_stats": variables["batch_stats"]}


def _watcher(config, corpus, folder):
  """Returns a watcher that draws degraded cells above what is found."""
  images, alphas = cells(corpus)
  images, alphas = (
    images[:: len(images) // _SHOWN],
    alphas[:: len(images) // _SHOWN],
  )
  images, mattes = degrade(
    jnp.asarray(images[:_SHOWN], jnp.float32),
    alphas[:_SHOWN] / 255,
    jax.random.key(1),
  )

  @jax.jit
  def look(params, images):
    # By the statistics of this batch: a watcher is not shown the running ones.
    stats = u2net_weights.shapes(config)["batch_stats"]
    stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stats)
    output, _ = u2net.U2Net(config).apply(
      {"params": params, "batch_stats": stats},
      matting_lib.normalize(images),
      train=True,
      mutable=["batch_stats"],
    )
    return jax.nn.sigmoid(output.fused)

  def watch(name, step, params):
    found = np.asarray(look(params, images))
    grey = lambda x: np.repeat(
      np.rint(np.asarray(x)[..., None] * 255).astype(np.uint8), 3, axis=-1
    )
    rows = [np.asarray(images).astype(np.uint8), grey(mattes), grey(found)]
    sheet = images_lib.contact_sheet(rows, max_height=rows[0].shape[1])
    folder.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(sheet).save(folder / f"{name}-{step:06d}.png")
    return {"held_out_iou": float(iou(found > 0.5, np.asarray(mattes) > 0.5))}

  return watch
