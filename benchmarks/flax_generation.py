"""This project drawing the canvases of benchmarks/generation.py."""

import dataclasses
import math
import time
from typing import Any

import common
import generation_setting
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import remote
import traced_flops

from dppp_jax import devices, trees
from dppp_jax.diffusion import components as components_lib
from dppp_jax.diffusion import sampler as sampler_lib
from dppp_jax.diffusion import schedulers
from dppp_jax.geneperson import components, matting
from dppp_jax.models import clip, controlnet, u2net, unet, unet_config, vae
from dppp_jax.weights import load
from dppp_jax.weights import u2net as u2net_weights


def _random(shapes: Any) -> Any:
  """Returns weights of given shapes: cuts of one pool of normal numbers.

  In bfloat16, which is what they become: billions of them are drawn.
  """
  rng = np.random.default_rng(generation_setting.SEED)
  pool = 0.02 * rng.standard_normal(2**22 + 1, np.float32)
  pool = pool.astype(ml_dtypes.bfloat16)
  flat = trees.flatten(shapes)
  for name, leaf in flat.items():
    # `resize` of the whole pool would keep a copy of it for every leaf.
    flat[name] = np.resize(pool[: max(leaf.size, 1)], leaf.shape)
    if name.endswith("scale"):
      flat[name] = np.ones_like(flat[name])
  return trees.unflatten(flat)


def structure(
  setting: generation_setting.Setting,
) -> components_lib.Components:
  """Returns networks of given sizes, whose parameters are shapes alone."""
  given = setting.networks
  net = unet_config.Config.from_hf(given["unet"])
  names = {*given["unet"]} - {"up_block_types", "sample_size"}
  control = unet_config.ControlNetConfig.from_hf(
    {name: given["unet"][name] for name in names}
    | {"conditioning_embedding_out_channels": given["hint"]}
  )
  texts = tuple(
    clip.TextConfig(
      **({"projection_dim": None} | text | generation_setting.TEXT)
    )
    for text in given["texts"]
  )
  decoder = vae.Config.from_hf(given["vae"])
  stack = {"stack_from": setting.stack_from}
  shapes = {
    "unet": unet.param_shapes(net, **stack),
    "vae": vae.param_shapes(decoder),
    "text_encoder": clip.param_shapes(texts[0]),
    "text_encoder_2": clip.param_shapes(texts[1]),
  }
  for k in range(len(setting.controlnets)):
    name = components_lib.controlnet_name(k)
    shapes[name] = controlnet.param_shapes(control, **stack)
  tokenizer = load.tokenizer(generation_setting.MINI / "clip")
  return components_lib.Components(
    unet=net,
    vae=decoder,
    texts=texts,
    tokenizers=(tokenizer, tokenizer),
    controlnets=(control,) * len(setting.controlnets),
    scheduler=schedulers.Config(**given["scheduler"]),
    params=shapes,
    stack_from=setting.stack_from,
  )


class Side:
  """This project's sampler."""

  def __init__(
    self,
    setting: generation_setting.Setting,
    cache: str = "",
    largest: int = 1,
  ):
    """Loads or draws the weights.

    Args:
      setting: what is drawn.
      cache: folder of compiled programs; "" for none.
      largest: batch; those that a CPU's cores can share are shared.
    """
    if cache:
      devices.use_compilation_cache(cache)
    shared = devices.share(0, batch_size=largest)
    self._setting = setting
    if setting.folder:
      self._parts = components.load_components(
        setting.folder,
        controlnets=setting.controlnets,
        stack_from=setting.stack_from,
      )
    else:
      parts = structure(setting)
      self._parts = dataclasses.replace(parts, params=_random(parts.params))
    self._sampler = sampler_lib.Sampler(
      self._parts,
      dtype=jnp.bfloat16 if setting.gpu else jnp.float32,
      devices=shared,
    )

  def draw(self, variant: str, batch: int) -> np.ndarray:
    """Draws uint8 [B, H, W, 3]."""
    del variant
    setting = self._setting
    pictures = self._sampler.sample(
      setting.prompts(batch),
      seeds=range(batch),
      control_images=setting.images(batch),
      size=setting.size,
      steps=setting.steps,
      guidance=setting.guidance,
    )
    return np.asarray(pictures)

  def noise(self, batch: int) -> list[np.ndarray]:
    """Returns what `draw` draws: the first latents', then each step's."""
    keys = jax.random.wrap_key_data(
      np.array([[0, seed] for seed in range(batch)], np.uint32),
      impl="threefry2x32",
    )
    factor = self._parts.vae.factor
    height, width = (side // factor for side in self._setting.size)
    shape = (height, width, self._parts.unet.in_channels)
    return [
      np.asarray(schedulers.draw(keys, i, shape=shape))
      for i in range(-1, self._setting.steps)
    ]

  def time(self, variant: str, batch: int) -> tuple[float, float]:
    """Returns seconds and seconds of processor time of one draw."""
    begin, cpu = time.perf_counter(), time.process_time()
    pictures = self.draw(variant, batch)
    if pictures.shape != (batch, *self._setting.size, 3):
      raise RuntimeError(f"drew {pictures.shape}")
    return time.perf_counter() - begin, time.process_time() - cpu

  def flops(self) -> dict[str, float]:
    """Returns the FLOPs of one forward pass for one canvas, by network."""
    parts, setting = self._parts, self._setting
    height, width = (side // parts.vae.factor for side in setting.size)
    return traced_flops.diffusion(
      parts.unet,
      parts.controlnets[0] if parts.controlnets else None,
      parts.vae,
      size=(height, width),
      tokens=parts.max_tokens,
    )

  def matting(self, rounds: int = 3) -> dict[str, float]:
    """Returns the seconds that U2-Net takes for the cells of a canvas."""
    setting = self._setting
    dtype = jnp.bfloat16 if setting.gpu else jnp.float32
    config = u2net.FULL
    if not setting.gpu:
      config = u2net.Config(**generation_setting.mini_u2net())
    variables = jax.tree.map(
      lambda x: jnp.full(x.shape, 0.01, x.dtype), u2net_weights.shapes(config)
    )
    net = u2net.U2Net(config, dtype)
    network = lambda values, images: net.apply(values, images).fused
    mat = matting.Matting(
      network, variables, size=setting.matting, batch_size=setting.cells
    )
    # Seven columns of six, or a row.
    rows = math.isqrt(setting.cells)
    cell = (setting.size[0] // rows, setting.size[1] * rows // setting.cells)
    rng = np.random.default_rng(generation_setting.SEED)
    cells = rng.integers(0, 256, (setting.cells, *cell, 3), np.uint8)
    mat(cells)
    cpu = []
    for _ in range(rounds):
      begin = time.process_time()
      mat(cells)
      cpu.append(time.process_time() - begin)
    timed = common.measure(lambda: mat(cells), repeats=rounds)
    return {"s": timed["min"], "cpu_s": min(cpu), "cells": setting.cells}

  def matmul_flops(self, size: int = 2048, repeats: int = 5) -> float:
    """Returns FLOP/s of a square float32 product, the best of some."""
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    timed = common.measure(lambda: product(a, a), repeats=repeats)
    return 2 * size**3 / timed["min"]

  def memory(self) -> dict[str, float]:
    """Returns the most bytes, of the process (see `remote`) and on the GPU."""
    found = {"host": remote.resident("VmHWM")}
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
      found["device"] = stats["peak_bytes_in_use"]
    return found
