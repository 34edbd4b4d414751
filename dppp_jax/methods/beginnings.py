"""How UNets, ControlNets and LoRAs in training begin."""

from collections.abc import Sequence
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import rngs, trees, types
from dppp_jax.methods import adapters, denoising
from dppp_jax.models import clip, controlnet, unet, unet_config
from dppp_jax.train import stage as stage_lib

# A ControlNet's last layers.
_ZERO_CONVOLUTIONS = (
  r"controlnet_(down_blocks_\d+|mid_block|cond_embedding/conv_out)/kernel"
)


def unet_init(system: denoising.System, given: types.Params) -> stage_lib.Init:
  """Returns the beginning of a UNet, and of the text encoders not given.

  Args:
    system: in training.
    given: parameters that are known, e.g. {"text_encoder": ...}; also "unet",
      to tune one that was trained before.
  """

  def init(params, collections, rng):
    del params, collections
    found = dict(given)
    if "unet" not in found:
      shapes = unet.param_shapes(system.unet)
      found["unet"] = fresh(shapes, rngs.stream(rng, "unet"))
    for name, config in zip(system.text_names, system.texts, strict=True):
      if name not in found:
        found[name] = clip.init_params(config, rngs.stream(rng, name))
    return found, {}

  return init


def joint_init(system: denoising.System, given: types.Params) -> stage_lib.Init:
  """Returns the beginning of a UNet and of a ControlNet trained beside it."""

  def init(params, collections, rng):
    found, _ = unet_init(system, given)(params, collections, rng)
    key = rngs.stream(rng, "controlnet")
    net = from_unet(found["unet"], system.control, key)
    # Both learn: no array may stand for a parameter of each.
    return {**found, "controlnet": jax.tree.map(jnp.copy, net)}, {}

  return init


def controlnet_init(
  system: denoising.System, given: types.Params
) -> stage_lib.Init:
  """Returns the beginning of a ControlNet beside the given networks."""

  def init(params, collections, rng):
    del params, collections
    net = from_unet(given["unet"], system.control, rng)
    return {**given, "controlnet": net}, {}

  return init


def lora_init(
  given: types.Params, *, targets: str, rank: int
) -> stage_lib.Init:
  """Returns the beginning of a LoRA beside the given networks.

  Args:
    given: {"unet": ..., "text_encoder": ...}.
    targets: regex of module paths, see `adapters.init_params`.
    rank: of the factors.
  """

  def init(params, collections, rng):
    del params, collections
    lora = adapters.init_params(given["unet"], rng, targets=targets, rank=rank)
    return {**given, "lora": lora}, {}

  return init


def control_config(
  config: unet_config.Config, *, widths: Sequence[int], attention: bool = True
) -> unet_config.ControlNetConfig:
  """Returns the configuration of a ControlNet for a UNet.

  Args:
    config: of the UNet.
    widths: conditioning_embedding_out_channels; each but the first halves the
      picture on its way to the size of the latents.
    attention: False leaves it out, where what steers needs no words.
  """
  shared = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(unet_config.BackboneConfig)
  }
  if not attention:
    levels = len(config.down_block_types)
    shared["down_block_types"] = ("DownBlock2D",) * levels
    shared["mid_block_type"] = "UNetMidBlock2D"
  return unet_config.ControlNetConfig(
    **shared, conditioning_embedding_out_channels=tuple(widths)
  )


def from_unet(
  params: types.Params,
  control: unet_config.ControlNetConfig,
  rng: jax.Array,
) -> types.Params:
  """Returns a ControlNet that begins as a copy of the UNet's way down.

  Its embedding of the picture is fresh and its last layers are zero, so that
  the UNet draws as before until it has learned something (Zhang et al. 2023).

  Args:
    params: of the UNet.
    control: of `control_config`.
    rng: key.
  """
  shapes = controlnet.param_shapes(control)
  begun = trees.flatten(fresh(shapes, rng, zero=_ZERO_CONVOLUTIONS))
  theirs = trees.flatten(params)
  copied = {name: leaf for name, leaf in theirs.items() if name in begun}
  return trees.unflatten({**begun, **copied})


def fresh(
  shapes: types.Params, rng: jax.Array, *, zero: str | None = None
) -> types.Params:
  """Draws the parameters of a network that is not trained yet.

  Kernels have the spread 1 / sqrt(inputs), as flax draws them. All come from
  one stretch of noise: a generator for each is minutes of compilation for a
  network of many small layers.

  Args:
    shapes: tree of ShapeDtypeStructs.
    rng: key.
    zero: regex of kernels that begin at zero.
  """
  flat = trees.flatten(shapes)
  is_drawn = lambda name: (
    name.endswith(("/kernel", "/embedding"))
    and not (zero and re.fullmatch(zero, name))
  )
  sizes = {k: math.prod(x.shape) for k, x in flat.items() if is_drawn(k)}

  def draw(rng):
    noise = jax.random.normal(rng, (sum(sizes.values()),))
    found, start = {}, 0
    for name, leaf in flat.items():
      if name not in sizes:
        value = jnp.full(leaf.shape, float(name.endswith("/scale")))
      else:
        part = noise[start : start + sizes[name]].reshape(leaf.shape)
        value = part / math.sqrt(math.prod(leaf.shape[:-1]))
        start += sizes[name]
      found[name] = value
    return found

  return trees.unflatten(jax.jit(draw)(rng))


def controlnet_zeros(control: unet_config.ControlNetConfig) -> types.Params:
  """Returns a ControlNet of zeros: it adds nothing to any UNet."""
  return jax.tree.map(
    lambda x: np.zeros(x.shape, np.float32), controlnet.param_shapes(control)
  )
