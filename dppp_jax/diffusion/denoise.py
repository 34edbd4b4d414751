"""The loop from noise to latents, as one pure function.

A step runs the ControlNets that count at it, the UNet on both halves of the
guided batch, and one row of the step table. What is the same at every step is
computed before the loop: the embeddings of all times, keys and values of the
text in every attention, and the embedded condition images.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, types
from dppp_jax.diffusion import components, conditioning, schedulers
from dppp_jax.models import controlnet, unet


class Networks(NamedTuple):
  """What is compiled in.

  Attributes:
    unet: the denoiser.
    controlnets: any number.
    kinds: for each ControlNet the kinds of its images; None if no union.
    guess: ControlNets see the second half of the batch only, and finer
      residuals count less (diffusers' guess mode).
  """

  unet: unet.UNet
  controlnets: tuple[controlnet.ControlNet, ...]
  kinds: Sequence[tuple[int, ...] | None]
  guess: bool


class _Control(NamedTuple):
  """What a ControlNet needs at every step.

  Attributes:
    apply: (*args, method=) -> output, with the parameters bound.
    embs: [L, R', E], of all steps.
    text: keys and values.
    hint: embedded image, or images of a union.
    skipped: R - R', rows of the batch that it does not see.
    options: of its method `control`.
  """

  apply: Callable[..., Any]
  embs: jax.Array
  text: Any
  hint: Any
  skipped: int
  options: dict[str, Any]

  def residuals(
    self, i: types.Array, x: types.Array, scale: types.Array
  ) -> controlnet.Residuals:
    """Returns the residuals of step i for x [R, h, w, C]; 0 where unseen."""
    found = self.apply(
      x[self.skipped :],
      self.embs[i],
      self.text,
      self.hint,
      scale=scale,
      method="control",
      **self.options,
    )
    pad = lambda y: jnp.pad(y, ((self.skipped, 0), *[(0, 0)] * (y.ndim - 1)))
    return jax.tree.map(pad, found) if self.skipped else found


def run(
  networks: Networks,
  params: types.Params,
  *,
  latents: types.Array,
  keys: types.Array,
  table: schedulers.Table,
  text: conditioning.Text,
  time_ids: types.Array | None,
  images: Sequence[Sequence[types.Array]],
  scales: types.Array,
  guidance: types.Array,
  rescale: types.Array,
  guided: bool,
) -> jax.Array:
  """Denoises; to be called inside jit.

  Args:
    networks: see there.
    params: {name: tree} as in `components.Components`.
    latents: standard normal [B, h, w, C].
    keys: uint32 [B, 2], see `keys_of`.
    table: steps, of length L.
    text: R rows: B, or 2 B where guided, of which the first are negative.
    time_ids: [R, 6]; None where the UNet is told no sizes.
    images: for each ControlNet its images, [B or 1, H, W, 3].
    scales: [L, n]; a ControlNet is not run at a step where it has 0.
    guidance: [B].
    rescale: [], see `guide`.
    guided: two halves.

  Returns:
    float32 [B, h, w, C].
  """
  keys = keys_of(keys)
  conditions = {}
  if time_ids is not None:
    conditions = {"pooled": text.pooled, "time_ids": time_ids}
  apply = functools.partial(networks.unet.apply, {"params": params["unet"]})
  embs = _embed(apply, table.timesteps, len(text.context), conditions)
  keys_values = apply(text.context, method="text")
  controls = [
    _prepare(
      networks,
      k,
      params[components.controlnet_name(k)],
      timesteps=table.timesteps,
      context=text.context,
      conditions=conditions,
      images=images[k],
      batch=len(latents),
    )
    for k in range(len(networks.controlnets))
  ]

  def step(i: jax.Array, state: schedulers.State) -> schedulers.State:
    x = schedulers.network_input(table, i, state)
    x = jnp.concatenate([x, x]) if guided else x
    residuals = _sum(controls, i, x, scales)
    output = apply(x, embs[i], keys_values, residuals, method="denoise")
    if guided:
      output = guide(output, guidance, rescale=rescale)
    noise = schedulers.draw(keys, i, shape=latents.shape[1:])
    return schedulers.step(table, i, state, output=output, noise=noise)

  state = schedulers.begin(table, latents)
  return jax.lax.fori_loop(0, table.num_steps, step, state).latents


def split(
  function: Callable[..., jax.Array],
  mesh: jax.sharding.Mesh,
  params: types.Params,
  *,
  guided: bool,
  **given: Any,
) -> jax.Array:
  """Calls `run` on each device with its part of the batch.

  The devices never wait for each other. On a CPU, where XLA takes cores for
  devices, that is faster than one program whose operations are spread over
  them: most are too small for it.

  Args:
    function: `run` with its networks.
    mesh: of one axis, "batch", whose size divides B.
    params: see `run`.
    guided: see `run`.
    **given: the other arguments of `run`.

  Returns:
    float32 [B, h, w, C].
  """
  spec, size = jax.sharding.PartitionSpec, len(given["latents"])
  rows, halves = spec("batch"), spec(None, "batch")
  # Negatives and prompts of the same rows belong together.
  fold = lambda x: x.reshape(1 + guided, size, *x.shape[1:])
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  folded = jax.tree.map(fold, {k: given[k] for k in ("text", "time_ids")})
  where = dict.fromkeys(given, spec()) | {
    "images": jax.tree.map(
      lambda x: rows if len(x) == size else spec(), given["images"]
    ),
    **dict.fromkeys(("latents", "keys", "guidance"), rows),
    **dict.fromkeys(folded, halves),
  }

  def part(params, given):
    given |= {name: jax.tree.map(flat, given[name]) for name in folded}
    return function(params, guided=guided, **given)

  return jax.shard_map(
    part,
    mesh=mesh,
    in_specs=(spec(), where),
    out_specs=rows,
    check_vma=False,
  )(params, given | folded)


def guide(
  output: types.Array, guidance: types.Array, *, rescale: types.Array | float
) -> jax.Array:
  """Returns u + g (c - u), Ho and Salimans 2022, in float32 at least.

  Args:
    output: u, then c: [2 B, h, w, C].
    guidance: g [B].
    rescale: how far the spread of the sum is taken back to that of c; Lin et
      al. 2023, Eq. 15 and 16.

  Returns:
    [B, h, w, C].
  """
  output = output.astype(jnp.promote_types(output.dtype, jnp.float32))
  negative, positive = jnp.split(output, 2)
  guidance = guidance[:, None, None, None]
  found = negative + guidance * (positive - negative)
  std = functools.partial(jnp.std, axis=(1, 2, 3), keepdims=True, ddof=1)
  ratio = std(positive) / jnp.maximum(std(found), 1e-12)
  return found * (1 + rescale * (ratio - 1))


def keys_of(words: types.Array) -> jax.Array:
  """Returns keys [B] of uint32 [B, 2]: `jax.random.key` of (upper, lower)."""
  return jax.random.wrap_key_data(words, impl="threefry2x32")


def _prepare(
  networks: Networks,
  k: int,
  params: types.Params,
  *,
  timesteps: types.Array,
  context: types.Array,
  conditions: Mapping[str, types.Array],
  images: Sequence[types.Array],
  batch: int,
) -> _Control:
  """Computes what ControlNet k needs at every step."""
  net, kinds = networks.controlnets[k], networks.kinds[k]
  apply = functools.partial(net.apply, {"params": params})
  skipped = len(context) - batch if networks.guess else 0
  context = context[skipped:]
  conditions = {key: value[skipped:] for key, value in conditions.items()}
  images = [_unit(image) for image in images]
  halves = len(context) // batch
  # One image for the whole batch is embedded once.
  spread = lambda y: jnp.concatenate(
    [jnp.broadcast_to(y, (batch, *y.shape[1:]))] * halves
  )
  options: dict[str, Any] = {"guess": networks.guess}
  if kinds is None:
    hint = spread(apply(images[0], method="hint"))
  else:
    hint = [spread(y) for y in apply(images, method="hint")]
    used = np.zeros((len(context), net.config.num_control_type), np.float32)
    used[:, list(kinds)] = 1
    conditions["control_type"] = jnp.asarray(used)
    options["kinds"] = kinds
  return _Control(
    apply,
    _embed(apply, timesteps, len(context), conditions),
    apply(context, method="text"),
    hint,
    skipped,
    options,
  )


def _sum(
  controls: Sequence[_Control],
  i: jax.Array,
  x: jax.Array,
  scales: types.Array,
) -> controlnet.Residuals | None:
  """Sums what the networks give that count at step i, and runs no other.

  A branch for each network, not one for each subset of them: the UNet is
  compiled once, and adding zeros to its skips costs next to nothing.
  """
  if not controls:
    return None
  found = _zeros(
    [jax.eval_shape(c.residuals, i, x, scales[i, 0]) for c in controls]
  )
  add = lambda a, b: a + b.astype(a.dtype)
  for k, control in enumerate(controls):
    run_it = lambda total, control=control, k=k: jax.tree.map(
      add, total, control.residuals(i, x, scales[i, k])
    )
    found = jax.lax.cond(scales[i, k] != 0, run_it, lambda total: total, found)
  return found


def _zeros(shapes: Sequence[controlnet.Residuals]) -> controlnet.Residuals:
  """Returns zeros that residuals of all these shapes can be added to."""
  zeros = lambda *leaves: jnp.zeros(
    jnp.broadcast_shapes(*(leaf.shape for leaf in leaves)), leaves[0].dtype
  )
  try:
    return jax.tree.map(zeros, *shapes)
  except ValueError as error:
    raise errors.UserError(
      "the ControlNets are for different base models: their residuals have"
      " different shapes"
    ) from error


def _embed(
  apply: Callable[..., Any],
  timesteps: types.Array,
  rows: int,
  conditions: Mapping[str, types.Array],
) -> jax.Array:
  """Embeds all times with all rows' conditions at once: [L, rows, E]."""
  length = len(timesteps)
  tiled = {key: jnp.tile(v, (length, 1)) for key, v in conditions.items()}
  emb = apply(jnp.repeat(timesteps, rows), method="embed", **tiled)
  return emb.reshape(length, rows, -1)


def _unit(image: types.Array) -> jax.Array:
  """Returns an image in [0, 1]."""
  if image.dtype == jnp.uint8:
    return image.astype(jnp.float32) / 255
  return image.astype(jnp.float32)
