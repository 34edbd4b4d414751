"""The parts of a text-to-image system, and whether they fit each other."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from dppp_jax import errors, types
from dppp_jax.diffusion import schedulers
from dppp_jax.models import clip, controlnet_union, unet_config, vae


@dataclasses.dataclass(frozen=True, kw_only=True)
class Components:
  """Configurations, tokenisers and parameters of one system.

  Attributes:
    unet: the denoiser.
    vae: the autoencoder.
    texts: the text encoders, one or two.
    tokenizers: one for each of them.
    controlnets: any number.
    scheduler: the sampler that is used where none is asked for.
    params: {name: tree}, under the names of diffusers' folders: `unet`, `vae`,
      `text_encoder`, `text_encoder_2`, `controlnet`, `controlnet_1` ...
    zero_negative: no negative prompt is zeros, not "" (SDXL only).
    stack_from: see `models.unet`; the parameters are stacked so.
    sample_size: side of the latents that the UNet was trained on, if known.
  """

  unet: unet_config.Config
  vae: vae.Config
  texts: tuple[clip.TextConfig, ...]
  tokenizers: tuple[Any, ...]
  controlnets: tuple[unet_config.ControlNetConfig, ...] = ()
  scheduler: schedulers.Config
  params: types.Params
  zero_negative: bool = True
  stack_from: int = 0
  sample_size: int | None = None

  @property
  def is_xl(self) -> bool:
    """Whether the UNet is told pooled text and sizes."""
    return self.unet.addition_embed_type == "text_time"

  @property
  def text_names(self) -> tuple[str, ...]:
    """Names of the text encoders' parameters."""
    return ("text_encoder", "text_encoder_2")[: len(self.texts)]

  @property
  def max_tokens(self) -> int:
    """Longest prompt that every encoder takes, with both end marks."""
    limits = [text.max_position_embeddings for text in self.texts]
    limits += [tokenizer.model_max_length for tokenizer in self.tokenizers]
    return min(limits)


def controlnet_name(k: int) -> str:
  """Returns the name of ControlNet k in `Components.params`."""
  return f"controlnet_{k}" if k else "controlnet"


def check(parts: Components, *, controlnets: Sequence[Any] = ()) -> None:
  """Refuses parts that were not made for each other.

  Args:
    parts: of the system; their parameters are not looked at.
    controlnets: what the ControlNets are called, e.g. their files; by default
      they are counted from 1.

  Raises:
    errors.UserError: what does not fit.
  """
  net = parts.unet
  if net.in_channels != parts.vae.latent_channels:
    raise errors.UserError(
      f"the UNet takes {net.in_channels} channels and the VAE makes"
      f" {parts.vae.latent_channels}: inpainting and other special UNets are"
      " not sampled here"
    )
  if net.time_cond_proj_dim is not None:
    raise errors.UserError(
      "the UNet is a consistency model (time_cond_proj_dim), which is not"
      " sampled here: use the model that it was distilled from"
    )
  wanted = 2 if parts.is_xl else 1
  if len(parts.texts) != wanted:
    raise errors.UserError(
      f"the UNet wants {wanted} text encoders and there are"
      f" {len(parts.texts)}: refiners and other variants are not sampled here"
    )
  width = sum(text.hidden_size for text in parts.texts)
  reads = net.encoder_hid_dim or net.text_dim
  if width != reads:
    raise errors.UserError(
      f"the text encoders give {width} channels and the UNet reads {reads}:"
      " they are of different models"
    )
  if parts.is_xl:
    told = 6 * net.addition_time_embed_dim
    told += parts.texts[-1].projection_dim or 0
    if told != net.projection_class_embeddings_input_dim:
      raise errors.UserError(
        "the UNet is told"
        f" {net.projection_class_embeddings_input_dim} numbers of pooled text"
        f" and sizes, where SDXL's are {told}: refiners are not sampled here"
      )
  for k, control in enumerate(parts.controlnets):
    same = ("block_out_channels", "text_dim", "in_channels")
    bad = [n for n in same if getattr(control, n) != getattr(net, n)]
    factor = 2 ** (len(control.conditioning_embedding_out_channels) - 1)
    if bad or factor != parts.vae.factor:
      name = controlnets[k] if controlnets else k + 1
      raise errors.UserError(
        f"ControlNet {name} is for another base model"
        f" ({', '.join(bad) or 'size of its images'} differ): use one that was"
        " trained with this UNet"
      )


def check_kinds(
  controlnets: Sequence[unet_config.ControlNetConfig],
  kinds: Sequence[Sequence[int] | None] | None,
) -> list[tuple[int, ...] | None]:
  """Returns for each ControlNet the kinds of its images, None if no union.

  Raises:
    errors.UserError: kinds are missing, superfluous or unknown.
  """
  kinds = [None] * len(controlnets) if kinds is None else list(kinds)
  if len(kinds) != len(controlnets):
    raise errors.UserError(
      f"kinds has {len(kinds)} entries for {len(controlnets)} ControlNets:"
      " give one for each, None for those that are no union"
    )
  found = []
  for k, (config, kind) in enumerate(zip(controlnets, kinds, strict=True)):
    is_union = isinstance(config, controlnet_union.Config)
    known = range(config.num_control_type if is_union else 0)
    if is_union != bool(kind) or any(one not in known for one in kind or ()):
      what = f"kinds of 0 to {len(known) - 1}" if is_union else "None"
      raise errors.UserError(
        f"kinds[{k}] is {kind!r}: this ControlNet takes {what}"
      )
    found.append(tuple(kind) if is_union else None)
  return found


def control_images(
  given: Sequence[Any],
  kinds: Sequence[tuple[int, ...] | None],
  *,
  batch: int,
) -> tuple[tuple[types.Array, ...], ...]:
  """Returns for each ControlNet its images, [B or 1, H, W, 3] each.

  Raises:
    errors.UserError: another number of images, or no images at all.
  """
  if len(given) != len(kinds):
    raise errors.UserError(
      f"{len(given)} control_images for {len(kinds)} ControlNets: give one"
      " array for each"
    )
  every = []
  for k, (images, kind) in enumerate(zip(given, kinds, strict=True)):
    images = [images] if kind is None else list(images)
    if kind is not None and len(images) != len(kind):
      raise errors.UserError(
        f"control_images[{k}] has {len(images)} images for {len(kind)} kinds"
      )
    every.append(tuple(_image(image, k, batch) for image in images))
  return tuple(every)


def _image(image: Any, k: int, batch: int) -> types.Array:
  image = image if hasattr(image, "dtype") else np.asarray(image)
  image = image[None] if image.ndim == 3 else image
  is_image = image.ndim == 4 and image.shape[-1] == 3
  if not is_image or image.shape[0] not in (1, batch):
    raise errors.UserError(
      f"control_images[{k}] is {tuple(image.shape)}: give [H, W, 3], or"
      f" [{batch}, H, W, 3] for {batch} prompts"
    )
  if image.dtype != np.uint8:
    if isinstance(image, np.ndarray) and not (
      image.min() >= 0 and image.max() <= 1
    ):
      raise errors.UserError(
        f"control_images[{k}] is {image.dtype} and not in [0, 1]: give uint8,"
        " or divide by 255"
      )
    image = image.astype(np.float32)
  return image


def canvas(
  parts: Components,
  images: Sequence[Sequence[types.Array]],
  size: tuple[int, int] | None,
) -> tuple[int, int]:
  """Returns (H, W) of the pictures.

  Raises:
    errors.UserError: a control image has another size, or a side is not a
      multiple of what the VAE needs.
  """
  factor = parts.vae.factor
  if size is None and images:
    size = tuple(images[0][0].shape[1:3])
  if size is None and parts.sample_size is not None:
    size = (factor * parts.sample_size,) * 2
  if size is None:
    raise errors.UserError("the checkpoint has no size of its own: give size")
  for k, some in enumerate(images):
    for image in some:
      if tuple(image.shape[1:3]) != tuple(size):
        raise errors.UserError(
          f"control_images[{k}] is {image.shape[1]}x{image.shape[2]} (HxW) and"
          f" the canvas {size[0]}x{size[1]}: draw it at the canvas's size"
        )
  if min(size) < 1 or any(side % factor for side in size):
    raise errors.UserError(
      f"canvas {size[0]}x{size[1]} (HxW): both sides must be multiples of"
      f" {factor}, which is a pixel of the latents"
    )
  return tuple(size)


def seed_words(seeds: Sequence[int], *, batch: int) -> np.ndarray:
  """Returns uint32 [B, 2], the upper and lower word of each seed.

  Raises:
    errors.UserError: another number of seeds, or one out of range.
  """
  seeds = [int(seed) for seed in seeds]
  if len(seeds) != batch:
    raise errors.UserError(
      f"{len(seeds)} seeds for {batch} prompts: give one for each"
    )
  bad = [seed for seed in seeds if not 0 <= seed < 2**64]
  if bad:
    raise errors.UserError(f"seed {bad[0]}: choose between 0 and 2^64 - 1")
  words = [(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds]
  return np.array(words, np.uint32)


def control_scales(
  scales: Sequence[float] | float,
  ranges: Sequence[tuple[float, float]] | tuple[float, float],
  *,
  count: int,
  steps: int,
  length: int,
) -> np.ndarray:
  """Returns how much each ControlNet counts at each step, float32 [L, n].

  Step i of T counts where start <= i / T and (i + 1) / T <= end.

  Raises:
    errors.UserError: another number of scales or ranges, or a range that is
      none.
  """
  values = np.asarray(scales, np.float32)
  spans = np.asarray(ranges, np.float64)
  if values.shape not in ((), (count,)) or spans.shape not in (
    (2,),
    (count, 2),
  ):
    raise errors.UserError(
      f"control_scales and control_ranges must be one for all or one for each"
      f" of the {count} ControlNets"
    )
  spans = np.broadcast_to(spans, (count, 2))
  for start, end in spans:
    if not 0 <= start < end <= 1:
      raise errors.UserError(
        f"control range ({start:g}, {end:g}): must be 0 <= start < end <= 1"
      )
  i = np.arange(length)[:, None]
  counts = (i / steps >= spans[:, 0]) & ((i + 1) / steps <= spans[:, 1])
  return np.where(counts, values, 0).astype(np.float32)
