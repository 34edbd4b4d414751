"""LoRA in training: low-rank factors beside frozen kernels (Hu et al. 2022).

The factors are a tree of their own, {path of the module: {"down", "up"}}, and
are merged into the kernels within the loss:

    W' = W + scale * down up,    scale = alpha / rank.

So every network of the package is trained as it stands, and what is trained is
what `weights.lora.merge` makes of the exported file.
"""

import math
import re

import jax
import jax.numpy as jnp

from dppp_jax import errors, rngs, trees, types

_KERNEL = "/kernel"


def init_params(
  params: types.Params, rng: jax.Array, *, targets: str, rank: int
) -> types.Params:
  """Returns fresh factors: `down` uniform, `up` zero, so that W' = W.

  Args:
    params: of the frozen network.
    rng: key.
    targets: regex; modules with a kernel whose whole path it matches, e.g.
      ".*/attn[12]/to_(q|k|v|out_0)".
    rank: r of all factors; less where a kernel is narrower.

  Returns:
    {module: {"down": [..., D, r], "up": [r, F]}}, nested by the path; `down`
    has the window of a convolution.

  Raises:
    errors.UserError: no module matches, a rank below 1, or stacked layers.
  """
  if rank < 1:
    raise errors.UserError(f"lora rank {rank}: must be 1 or more")
  kernels = {
    name.removesuffix(_KERNEL): leaf
    for name, leaf in trees.flatten(params).items()
    if name.endswith(_KERNEL)
  }
  chosen = {k: x for k, x in kernels.items() if re.fullmatch(targets, k)}
  if not chosen:
    raise errors.UserError(
      f"lora targets {targets!r} match no module: the names begin"
      f" {', '.join(list(kernels)[:3])}"
    )
  shapes = {}
  for path, kernel in chosen.items():
    if kernel.ndim == 3:
      raise errors.UserError(
        f"{path} is stacked: train LoRAs with stack_from=0"
      )
    *window, inner, outer = kernel.shape
    least = min(rank, inner, outer)
    shapes[path] = (*window, inner, least), (least, outer)

  def draw(rng):
    flat = {}
    for path, (down, up) in shapes.items():
      # As torch's linear layers begin, and so LoRA's.
      bound = 1 / math.sqrt(math.prod(down[:-1]))
      key = rngs.stream(rng, path)
      flat[f"{path}/down"] = jax.random.uniform(
        key, down, minval=-bound, maxval=bound
      )
      flat[f"{path}/up"] = jnp.zeros(up)
    return flat

  return trees.unflatten(jax.jit(draw)(rng))


def merge(
  params: types.Params, adapters: types.Params, *, scale: float
) -> types.Params:
  """Returns the network's parameters with the factors merged in.

  Args:
    params: of the frozen network.
    adapters: of `init_params`.
    scale: alpha / rank.
  """
  flat = dict(trees.flatten(params))
  factors = trees.flatten(adapters)
  for name, down in factors.items():
    if not name.endswith("/down"):
      continue
    path = name.removesuffix("/down")
    delta = jnp.matmul(
      down,
      factors[f"{path}/up"].reshape(
        (1,) * (down.ndim - 2) + (down.shape[-1], -1)
      ),
      precision="highest",
    )
    flat[path + _KERNEL] = flat[path + _KERNEL] + scale * delta
  return trees.unflatten(flat)
