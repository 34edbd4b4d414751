"""Prompts into pictures: text encoders, ControlNets, UNet, steps, VAE.

    sampler = sampler_lib.Sampler(components, dtype=jnp.bfloat16)
    images = sampler.sample(prompts, control_images=[poses, grid], seeds=seeds,
                            steps=30, guidance=5.0)

What the constructor takes is compiled in. What `sample` takes is an argument
of the compiled programs, the parameters included: one program serves every
prompt, seed, guidance, scale, LoRA set and step table of a batch of one shape.
There are two kinds of it, with and without guidance, which doubles the work.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, trees, types
from dppp_jax.diffusion import components as components_lib
from dppp_jax.diffusion import conditioning, denoise, schedulers
from dppp_jax.models import clip, controlnet_union, unet, vae

Components = components_lib.Components
Sizes = conditioning.Sizes

# Step tables are padded to a multiple of this, so that 20 and 50 steps run the
# same program; the padding costs an embedding of a time for each row.
_TABLE = 64
_ALL = jax.sharding.PartitionSpec()
# Small layers that run in float32 whatever the dtype: their weights do too.
_WIDE = re.compile(
  r".*\b(time_embedding|(control_)?add_embedding|class_embedding|conv_out"
  r"|(post_)?quant_conv|transformer_layes_\d+|spatial_ch_projs)/.*"
)


@dataclasses.dataclass(frozen=True)
class Placement:
  """Puts parameters on the device in the dtypes that the programs take.

  Attributes:
    dtype: of the networks' matrix products.
    vae_dtype: of the decoder's.
    devices: all of them hold all parameters.
  """

  dtype: jax.typing.DTypeLike
  vae_dtype: jax.typing.DTypeLike
  devices: tuple[jax.Device, ...]

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """The devices, of which each draws a part of the batch."""
    return jax.sharding.Mesh(np.array(self.devices), ("batch",))

  def __call__(self, name: str, value: types.Array) -> jax.Array:
    """Returns a leaf on the devices.

    Args:
      name: "unet/conv_in/kernel"
      value: in any precision; from there it is rounded once.
    """
    dtype = self.dtype_of(name)  # Once: in the loop it would be at each step.
    if isinstance(value, jax.Array):
      value = value.astype(dtype)
    else:
      # In the order of the file, which is fast; on its way to the device it is
      # turned. A copy always: on a CPU the file itself would be the device's.
      value = np.array(value, dtype, order="K")
    everywhere = jax.sharding.NamedSharding(self.mesh, _ALL)
    return jax.device_put(value, everywhere)

  def dtype_of(self, name: str) -> jnp.dtype:
    """Returns the dtype in which the programs take a parameter."""
    if not name.endswith("/kernel") or _WIDE.fullmatch(name):
      return jnp.dtype(jnp.float32)
    return jnp.dtype(self.vae_dtype if name.startswith("vae/") else self.dtype)


class Sampler:
  """Samples from a text-to-image system.

  Attributes:
    components: the system.
    params: its parameters on the device, as `place` returns them.
    programs: what is jitted, by name.
    traces: how often each program was compiled, by name.
  """

  def __init__(
    self,
    components: Components,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    vae_dtype: jax.typing.DTypeLike | None = None,
    clip_skip: int = 0,
    long_prompts: conditioning.Long = "error",
    min_chunks: int = 1,
    pooled: conditioning.Pooled = "first",
    guess: bool = False,
    kinds: Sequence[Sequence[int] | None] | None = None,
    decode_batch: int = 4,
    devices: Sequence[jax.Device] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
  ):
    """Builds the networks and puts the parameters on the device.

    Args:
      components: the system.
      dtype: of the networks' matrix products; the latents between the steps
        are float32 always.
      vae_dtype: of the decoder's; None: dtype, but float32 for a VAE that
        overflows float16.
      clip_skip: blocks of the text encoders left out for the prompts, but
        not for the negative ones.
      long_prompts: see `conditioning.tokenize`.
      min_chunks: see `conditioning.tokenize`.
      pooled: see `conditioning.encode`.
      guess: diffusers' guess mode: ControlNets see the prompts' half only,
        and finer residuals count less.
      kinds: for each ControlNet that is a union the kinds of its images, None
        for the others.
      decode_batch: images that the VAE decodes at once.
      devices: draw a part of each batch each, if it can be divided among
        them, and hold all parameters each; None: the first device draws all.
      compiler_options: of XLA, for this sampler's programs only.

    Raises:
      errors.UserError: parts that do not fit each other.
    """
    components_lib.check(components)
    conditioning.check(
      components.texts,
      is_xl=components.is_xl,
      clip_skip=clip_skip,
      pooled=pooled,
    )
    self.components = components
    self.traces: collections.Counter[str] = collections.Counter()
    self._dtype = jnp.dtype(dtype)
    if vae_dtype is None:
      overflows = self._dtype == jnp.float16 and components.vae.force_upcast
      vae_dtype = jnp.float32 if overflows else dtype
    self._vae_dtype = jnp.dtype(vae_dtype)
    self._long, self._min_chunks = long_prompts, min_chunks
    self._decode_batch = decode_batch
    devices = tuple(devices or jax.devices()[:1])
    self._placement = Placement(self._dtype, self._vae_dtype, devices)
    self._mesh = self._placement.mesh
    options = {"dtype": dtype, "stack_from": components.stack_from}
    self._kinds = components_lib.check_kinds(components.controlnets, kinds)
    self._networks = denoise.Networks(
      unet.UNet(components.unet, **options),
      tuple(
        controlnet_union.build(config, **options)
        for config in components.controlnets
      ),
      self._kinds,
      # A network that pools globally is run as in guess mode by diffusers.
      guess
      or any(c.global_pool_conditions for c in components.controlnets[:1]),
    )
    self._towers = [
      clip.TextTower(config, dtype) for config in components.texts
    ]
    self._vae = vae.VAE(components.vae, self._vae_dtype)
    jit = functools.partial(
      jax.jit, compiler_options=dict(compiler_options or {}) or None
    )
    encode = functools.partial(self._encode, clip_skip=clip_skip, pooled=pooled)
    self.programs = {
      "encode": jit(encode),
      "begin": jit(self._begin, static_argnames="shape"),
      "denoise": jit(
        self._denoise, static_argnames="guided", donate_argnames="latents"
      ),
      "decode": jit(self._decode),
    }
    self.params = self.place(components.params)

  def place(self, params: types.Params) -> types.Params:
    """Puts parameters on the device in the dtypes that the programs take.

    Args:
      params: as `Components.params`, e.g. with another set of LoRAs merged;
        what is there already, by `Placement`, stays.

    Returns:
      What `sample` takes as `params`.
    """
    flat = trees.flatten(params)
    return trees.unflatten({k: self._placement(k, v) for k, v in flat.items()})

  def dtype_of(self, name: str) -> jnp.dtype:
    """Returns the dtype in which the programs take a parameter."""
    return self._placement.dtype_of(name)

  def sample(self, prompts: Sequence[str], **options: Any) -> jax.Array:
    """Draws pictures.

    Args:
      prompts: B texts.
      **options: of `latents`.

    Returns:
      uint8 [B, H, W, 3] on the device; the call returns before it is there.

    Raises:
      errors.UserError: as `latents`.
    """
    found = self.latents(prompts, **options)
    return self.decode(found, params=options.get("params"))

  def latents(
    self,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative_prompts: Sequence[str] | str | None = None,
    control_images: Sequence[Any] = (),
    control_scales: Sequence[float] | float = 1.0,
    control_ranges: Sequence[tuple[float, float]] | tuple[float, float] = (
      0.0,
      1.0,
    ),
    steps: int = 30,
    guidance: Sequence[float] | float = 5.0,
    guidance_rescale: float = 0.0,
    scheduler: schedulers.Config | None = None,
    size: tuple[int, int] | None = None,
    sizes: Sizes | None = None,
    negative_sizes: Sizes | None = None,
    noise: types.Array | None = None,
    params: types.Params | None = None,
    min_chunks: int | None = None,
  ) -> jax.Array:
    """Draws latents.

    Args:
      prompts: B texts.
      seeds: one for each, 0 to 2^64 - 1. A picture depends on its own seed,
        and on the batch that it is drawn in only as far as numbers are rounded
        and prompts of one batch have equally many chunks.
      negative_prompts: what to stay away from, one for each or for all; None:
        nothing, which most SDXL checkpoints want as zeros and not as "".
      control_images: one for each ControlNet: [B, H, W, 3] or [H, W, 3] for
        all, uint8 or in [0, 1]; of a union a sequence of such.
      control_scales: of each ControlNet, or of all.
      control_ranges: (start, end) of each ControlNet, or of all, in parts of
        the run. A ControlNet is not run where it does not count.
      steps: T.
      guidance: classifier-free guidance of each, or of all; 1 and less is
        without, and takes half the time where it holds for all.
      guidance_rescale: share of the correction of Lin et al. 2023, Eq. 15.
      scheduler: the components' by default.
      size: (H, W); the control images', or the checkpoint's, by default.
      sizes: see `conditioning.Sizes`; SDXL only.
      negative_sizes: of the negative half, where it differs.
      noise: the first latents, standard normal [B, h, w, C]; drawn from the
        seeds by default.
      params: of `place`; `self.params` by default.
      min_chunks: of these prompts; the constructor's by default.

    Returns:
      float32 [B, H / f, W / f, C], normalised as the UNet works on them.

    Raises:
      errors.UserError: wrong sizes and numbers, or a prompt that is too long.
    """
    parts = self.components
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    batch = len(prompts)
    params = self._used(params, batch)
    images = components_lib.control_images(
      control_images, self._kinds, batch=batch
    )
    height, width = components_lib.canvas(parts, images, size)
    keys = components_lib.seed_words(seeds, batch=batch)
    guidance = np.maximum(np.asarray(guidance, np.float32), 1)
    if guidance.shape not in ((), (batch,)):
      raise errors.UserError(
        f"{guidance.size} guidance for {batch} prompts: give one for each, or"
        " one for all"
      )
    guidance = np.broadcast_to(guidance, (batch,))
    guided = bool((guidance > 1).any())
    length = -(-max(steps, 1) // _TABLE) * _TABLE
    table = schedulers.init(steps, scheduler or parts.scheduler, length=length)
    scales = components_lib.control_scales(
      control_scales,
      control_ranges,
      count=len(self._kinds),
      steps=steps,
      length=length,
    )
    text = self._read(prompts, negative_prompts, guided, params, min_chunks)
    ids = None
    if parts.is_xl:
      sizes = sizes or Sizes()
      pair = (negative_sizes or sizes, sizes) if guided else (sizes,)
      rows = [conditioning.time_ids((height, width), one) for one in pair]
      ids = np.repeat(np.stack(rows), batch, axis=0)
    shape = (height // parts.vae.factor, width // parts.vae.factor)
    shape = (*shape, parts.unet.in_channels)
    if noise is None:
      noise = self.programs["begin"](keys, shape=shape)
    elif noise.shape != (batch, *shape):
      raise errors.UserError(
        f"noise is {noise.shape}, and the canvas needs {(batch, *shape)}"
      )
    else:
      noise = jnp.array(noise, jnp.float32)  # A copy: it is donated.
    return self.programs["denoise"](
      params,
      latents=noise,
      keys=keys,
      table=table,
      text=text,
      time_ids=ids,
      images=images,
      scales=scales,
      guidance=guidance,
      rescale=np.float32(guidance_rescale),
      guided=guided,
    )

  def decode(
    self, latents: types.Array, *, params: types.Params | None = None
  ) -> jax.Array:
    """Returns pictures uint8 [B, H, W, 3] of latents [B, h, w, C]."""
    params = self._used(params, len(latents))
    return self.programs["decode"](params["vae"], latents)

  def _used(self, params: types.Params | None, batch: int) -> types.Params:
    """Returns parameters on all devices, or for an odd batch on the first."""
    params = params or self.params
    if self._mesh.size == 1 or self._is_split(batch):
      return params
    return jax.tree.map(lambda x: x.addressable_data(0), params)

  def _is_split(self, batch: int) -> bool:
    return self._mesh.size > 1 and batch % self._mesh.size == 0

  def _read(
    self,
    prompts: list[str],
    negative_prompts: Sequence[str] | str | None,
    guided: bool,
    params: types.Params,
    min_chunks: int | None,
  ) -> conditioning.Text:
    """Tokenises and encodes; [2 B] rows, negatives first, where guided."""
    parts, batch = self.components, len(prompts)
    zeroed = negative_prompts is None and parts.zero_negative and parts.is_xl
    texts = list(prompts)
    if guided:
      negative = "" if negative_prompts is None else negative_prompts
      negative = (
        [negative] * batch if isinstance(negative, str) else list(negative)
      )
      if len(negative) != batch:
        raise errors.UserError(
          f"{len(negative)} negative_prompts for {batch} prompts: give one for"
          " each, or one for all"
        )
      texts = negative + texts
    tokens = conditioning.tokenize(
      parts.tokenizers,
      texts,
      limit=parts.max_tokens,
      long=self._long,
      min_chunks=min_chunks or self._min_chunks,
    )
    is_prompt = np.arange(len(texts)) >= len(texts) - batch
    return self.programs["encode"](
      {name: params[name] for name in parts.text_names},
      tokens.ids,
      tokens.counts,
      is_prompt,
      is_prompt | (not zeroed),
    )

  def _encode(
    self,
    params: types.Params,
    ids: Sequence[types.Array],
    counts: types.Array,
    skip: types.Array,
    kept: types.Array,
    *,
    clip_skip: int,
    pooled: conditioning.Pooled,
  ) -> conditioning.Text:
    self.traces["encode"] += 1
    text = conditioning.encode(
      self._towers,
      [params[name] for name in self.components.text_names],
      ids,
      counts=counts,
      is_xl=self.components.is_xl,
      skip=skip,
      clip_skip=clip_skip,
      pooled=pooled,
    )
    zero = lambda x: jnp.where(jnp.expand_dims(kept, range(1, x.ndim)), x, 0)
    return jax.tree.map(zero, text)

  def _begin(self, words: types.Array, *, shape: tuple[int, ...]) -> jax.Array:
    self.traces["begin"] += 1
    return schedulers.draw(denoise.keys_of(words), -1, shape=shape)

  def _denoise(self, params: types.Params, **arguments: Any) -> jax.Array:
    self.traces["denoise"] += 1
    run = functools.partial(denoise.run, self._networks)
    if self._is_split(len(arguments["latents"])):
      return denoise.split(run, self._mesh, params, **arguments)
    return run(params, **arguments)

  def _decode(self, params: types.Params, latents: types.Array) -> jax.Array:
    self.traces["decode"] += 1

    def some(z: jax.Array) -> jax.Array:
      z = vae.denormalize(z, self.components.vae)
      images = self._vae.apply({"params": params}, z, method="decode")
      return jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    def every(latents: jax.Array) -> jax.Array:
      if len(latents) <= self._decode_batch:
        return some(latents)
      return jax.lax.map(
        lambda z: some(z[None])[0], latents, batch_size=self._decode_batch
      )

    if not self._is_split(len(latents)):
      return every(latents)
    rows = jax.sharding.PartitionSpec("batch")
    return jax.shard_map(
      every, mesh=self._mesh, in_specs=rows, out_specs=rows, check_vma=False
    )(latents)
