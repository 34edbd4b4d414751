"""Training of a UNet, of a ControlNet for it, and of LoRAs on it.

All three are one loss: cached latents get noise, prompts are encoded, the UNet
predicts. What differs is which parameters are trained, and what stands between
them and the UNet. The tree of parameters has the names of diffusers' folders,
`unet`, `text_encoder`, `text_encoder_2` and `controlnet`, and `lora`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import rngs
from dppp_jax.diffusion import conditioning, noising, objective
from dppp_jax.methods import adapters
from dppp_jax.models import clip, controlnet, unet, unet_config, vae
from dppp_jax.train import stage as stage_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
  """The configurations of a text-to-image system in training.

  Attributes:
    unet: the denoiser.
    texts: its text encoders, one or two.
    vae: of the cached latents.
    schedule: betas and prediction_type.
    control: the ControlNet in training, or None.
    zero_dropped: a dropped prompt is zeros, not "" (the folder's
      force_zeros_for_empty_prompt; SDXL only).
  """

  unet: unet_config.Config
  texts: tuple[clip.TextConfig, ...]
  vae: vae.Config
  schedule: noising.Config
  control: unet_config.ControlNetConfig | None = None
  zero_dropped: bool = True

  @property
  def text_names(self) -> tuple[str, ...]:
    """Names of the text encoders' parameters."""
    return ("text_encoder", "text_encoder_2")[: len(self.texts)]

  @property
  def is_xl(self) -> bool:
    """Whether the UNet is told pooled text and sizes."""
    return self.unet.addition_embed_type == "text_time"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How the loss is taken.

  Attributes:
    snr_gamma: of min-SNR weights, or None; see `objective.tables`.
    drop: share of the prompts that are dropped, for guidance.
    dtype: of the matrix products.
    stack_from: see `models.unet`.
    remat: recompute layers in the backward pass to save memory.
    control_drop: share of the examples that the ControlNet says nothing of,
      for a UNet that is trained beside it and has to draw without it, too.
    lora_scale: factor of the product of a LoRA's factors, alpha / rank.
    window: (h, w) of the part of the latents that a step looks at, the same
      for all its examples, or None for all of them. SDXL is told where it
      lies, as it is of any crop.
    window_stride: windows begin at multiples of (dy, dx).
  """

  snr_gamma: float | None = 5.0
  drop: float = 0.1
  dtype: Any = "float32"
  stack_from: int = 0
  remat: bool = False
  control_drop: float = 0.0
  lora_scale: float = 1.0
  window: tuple[int, int] | None = None
  window_stride: tuple[int, int] = (1, 1)


def extras(
  system: System,
  tokenizers: Sequence[Any],
  prompts: Sequence[str],
  *,
  moments: np.ndarray,
  time_ids: np.ndarray | None = None,
  control: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Returns the arrays that the loss reads, one row an example.

  Args:
    system: in training.
    tokenizers: of its text encoders.
    prompts: N texts; they are tokenised here, once.
    moments: mean and logvar of the VAE side by side, [N, h, w, 2 C]; may be a
      `np.memmap`.
    time_ids: float32 [N, 6] of `conditioning.time_ids` (SDXL).
    control: uint8 [N, H, W, 3], what a ControlNet in training sees; may be a
      `np.memmap`.
  """
  limit = min(text.max_position_embeddings for text in system.texts)
  tokens = conditioning.tokenize(
    tokenizers, prompts, limit=limit, long="truncate"
  )
  found = {"moments": moments, "counts": tokens.counts}
  for name, ids in zip(system.text_names, tokens.ids, strict=True):
    found[f"ids/{name}"] = ids
  if system.is_xl:
    assert time_ids is not None
    found["time_ids"] = np.asarray(time_ids, np.float32)
  if control is not None:
    found["control"] = control
  return found


def empty_ids(
  system: System, tokenizers: Sequence[Any]
) -> dict[str, np.ndarray]:
  """Returns {text encoder: ids [1, 1, N] of the prompt ""}."""
  limit = min(text.max_position_embeddings for text in system.texts)
  tokens = conditioning.tokenize(tokenizers, [""], limit=limit)
  return dict(zip(system.text_names, tokens.ids, strict=True))


def make_loss(
  system: System,
  options: Options,
  *,
  empty: Mapping[str, np.ndarray] | None = None,
) -> stage_lib.Loss:
  """Returns the loss of a batch of `extras`.

  Args:
    system: in training.
    options: see there.
    empty: of `empty_ids`; wanted unless dropped prompts are zeros.
  """
  numbers = objective.tables(system.schedule, snr_gamma=options.snr_gamma)
  net_options = {
    "dtype": options.dtype,
    "stack_from": options.stack_from,
    "remat": options.remat,
  }
  net = unet.UNet(system.unet, **net_options)
  control = None
  if system.control is not None:
    control = controlnet.ControlNet(system.control, **net_options)
  towers = [clip.TextTower(text, options.dtype) for text in system.texts]

  def read(params, batch, drop):
    ids = [batch[f"ids/{name}"] for name in system.text_names]
    if not system.zero_dropped:
      ids = [
        objective.empty_ids(one, empty[name], drop)
        for name, one in zip(system.text_names, ids, strict=True)
      ]
    text = conditioning.encode(
      towers,
      [params[name] for name in system.text_names],
      ids,
      counts=batch["counts"],
      is_xl=system.is_xl,
    )
    return objective.zero_text(text, drop) if system.zero_dropped else text

  def loss(params, collections, batch, rng):
    key = lambda name: rngs.stream(rng, name)
    if options.window is not None:
      batch = cut_window(
        batch,
        key("window"),
        size=options.window,
        stride=options.window_stride,
        factor=system.vae.factor,
      )
    num = len(batch["moments"])
    mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
    x0 = vae.Moments(mean, logvar).sample(key("posterior"))
    x0 = vae.normalize(x0, system.vae)
    noise = jax.random.normal(key("noise"), x0.shape)
    t = objective.timesteps(key("timesteps"), num, num=len(numbers.mean))
    noisy = objective.add_noise(numbers, t, x0, noise)
    drop = objective.dropped(key("drop"), num, share=options.drop)
    text = read(params, batch, drop)
    conditions = {}
    if system.is_xl:
      conditions = {"pooled": text.pooled, "time_ids": batch["time_ids"]}
    weights, residuals = params["unet"], None
    if "lora" in params:
      weights = adapters.merge(
        weights, params["lora"], scale=options.lora_scale
      )
    if control is not None:
      residuals = control.apply(
        {"params": params["controlnet"]},
        noisy,
        t,
        text.context,
        batch["control"].astype(jnp.float32) / 255,
        **conditions,
      )
      if options.control_drop:
        alone = objective.dropped(
          key("control"), num, share=options.control_drop
        )
        residuals = jax.tree.map(
          lambda x: jnp.where(alone[:, None, None, None], 0, x), residuals
        )
    output = net.apply(
      {"params": weights},
      noisy,
      t,
      text.context,
      residuals=residuals,
      **conditions,
    )
    every = objective.loss(numbers, t, output, x0=x0, noise=noise)
    plain = jnp.square(output - objective.target(numbers, t, x0, noise))
    metrics = {"mse": plain.mean(), "dropped": drop.mean()}
    return every.mean(), stage_lib.Aux(metrics, collections)

  return loss


def cut_window(
  batch: Mapping[str, jax.Array],
  rng: jax.Array,
  *,
  size: tuple[int, int],
  stride: tuple[int, int],
  factor: int,
) -> dict[str, jax.Array]:
  """Cuts one window, somewhere, out of all pictures of a batch.

  Args:
    batch: of `extras`.
    rng: key.
    size: (h, w) in latents.
    stride: (dy, dx) in latents; the window begins at multiples of them.
    factor: by how much pictures are larger than latents.

  Returns:
    The batch with its moments and control images cut, and with time ids that
    say so: crop moved by the corner, the window as target.
  """
  free = [
    (whole - part) // step + 1
    for whole, part, step in zip(
      batch["moments"].shape[1:3], size, stride, strict=True
    )
  ]
  corner = jax.random.randint(rng, (2,), 0, jnp.array(free))
  corner = corner * jnp.array(stride)

  def cut(x, scale):
    shape = (len(x), size[0] * scale, size[1] * scale, x.shape[-1])
    y, left = corner * scale
    return jax.lax.dynamic_slice(x, (0, y, left, 0), shape)

  found = {**batch, "moments": cut(batch["moments"], 1)}
  if "control" in batch:
    found["control"] = cut(batch["control"], factor)
  if "time_ids" in batch:
    original, crop, _ = jnp.split(batch["time_ids"], 3, axis=-1)
    target = jnp.array([[side * factor for side in size]], crop.dtype)
    found["time_ids"] = jnp.concatenate(
      [
        original,
        crop + (corner * factor).astype(crop.dtype)[None],
        jnp.broadcast_to(target, crop.shape),
      ],
      axis=-1,
    )
  return found


def stage(
  name: str,
  system: System,
  options: Options,
  *,
  init: stage_lib.Init,
  rules: tuple[tuple[str, float | None], ...],
  data: Mapping[str, np.ndarray],
  batch_size: int,
  epochs: int,
  warmup: float = 0.02,
  final: float = 0.0,
  weight_decay: float = 1e-2,
  muon: bool = False,
  clip_norm: float | None = 1.0,
  ema: float | None = None,
  empty: Mapping[str, np.ndarray] | None = None,
) -> stage_lib.Stage:
  """Returns a stage that trains by `make_loss`.

  Args:
    name: of the stage.
    system: in training.
    options: of the loss.
    init: how its parameters begin.
    rules: what is trained, see `Stage.rules`.
    data: of `extras`.
    batch_size: B.
    epochs: passes.
    warmup: fraction of the steps.
    final: factor of the rate at the end of the half cosine.
    weight_decay: of matrices (AdamW).
    muon: Muon for kernels.
    clip_norm: of the gradient, or None.
    ema: decay of the average of the parameters, or None.
    empty: see `make_loss`.
  """
  return stage_lib.Stage(
    name=name,
    init=init,
    loss=make_loss(system, options, empty=empty),
    rules=rules,
    batches=stage_lib.Shuffled(batch_size),
    epochs=epochs,
    schedule=stage_lib.warmup_cosine(warmup=warmup, final=final),
    weight_decay=weight_decay,
    decoupled=True,
    muon=muon,
    bias_lr_multiplier=1.0,
    clip_norm=clip_norm,
    extras=data,
    ema=ema,
  )
