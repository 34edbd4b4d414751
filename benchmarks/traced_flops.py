"""Floating-point operations of diffusion networks, counted from their programs.

Matrix products and convolutions as they are written, a multiplication and an
addition each: who gets the same with fewer is faster, not idler.
"""

from collections.abc import Callable
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from dppp_jax.models import controlnet, convolution, unet, vae


def count(fn: Callable[..., Any], *args: Any) -> float:
  """Returns the FLOPs of a call; nothing is computed.

  Args:
    fn: any function.
    *args: arrays or ShapeDtypeStructs.
  """
  with mock.patch.object(convolution, "_MANY", math.inf):  # No Winograd.
    return float(_count(jax.make_jaxpr(fn)(*args).jaxpr))


def _count(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    params = equation.params
    out = equation.outvars[0].aval.shape
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += 2 * math.prod(shape[i] for i in contracted) * math.prod(out)
    elif equation.primitive.name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      spec = params["dimension_numbers"].rhs_spec
      taps = math.prod(kernel[i] for i in spec[1:])
      total += 2 * taps * math.prod(out)
    times = params.get("length", 1)
    is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    for value in jax.tree.leaves(params, is_leaf=is_jaxpr):
      if is_jaxpr(value):
        total += times * _count(getattr(value, "jaxpr", value))
  return total


def diffusion(
  unet_config: Any,
  control_config: Any,
  vae_config: Any,
  *,
  size: tuple[int, int],
  tokens: int,
) -> dict[str, float]:
  """Returns the FLOPs of one forward pass of each network for one picture.

  As spent by whoever computes everything at each step: text and condition
  images are counted with each pass.

  Args:
    unet_config: of the UNet.
    control_config: of a ControlNet, or None.
    vae_config: of the VAE, whose decoder counts.
    size: (h, w) of the latents.
    tokens: length of the prompt.
  """
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
  as_shapes = lambda tree: jax.tree.map(lambda x: shape(*x.shape), tree)

  def conditioned(net, shapes, config, *more):
    _, conditions = unet.example(unet_config)
    dim = unet_config.encoder_hid_dim or unet_config.text_dim
    args = [
      as_shapes(shapes(config)),
      shape(1, *size, unet_config.in_channels),
      shape(1),
      shape(1, tokens, dim),
      *more,
    ]
    call = lambda params, *given: net.apply(
      {"params": params}, *given, **conditions
    )
    return count(call, *args)

  found = {
    "unet": conditioned(unet.UNet(unet_config), unet.param_shapes, unet_config),
    "vae": count(
      lambda params, z: vae.VAE(vae_config).apply(
        {"params": params}, z, method="decode"
      ),
      as_shapes(vae.param_shapes(vae_config)),
      shape(1, *size, vae_config.latent_channels),
    ),
  }
  if control_config is not None:
    factor = controlnet.factor(control_config)
    picture = shape(1, *(factor * side for side in size), 3)
    found["controlnet"] = conditioned(
      controlnet.ControlNet(control_config),
      controlnet.param_shapes,
      control_config,
      picture,
    )
  return found


def canvas(parts: dict[str, float], *, steps: int, controlnets: int) -> float:
  """Returns the FLOPs of a guided canvas: two passes a step, and the VAE."""
  step = parts["unet"] + controlnets * parts.get("controlnet", 0)
  return 2 * steps * step + parts["vae"]
