"""Augmentation and normalisation as pure functions on the device.

Both placements run these inside the compiled step: what the host delivers, and
what the device keeps, are uint8 pictures of the final size. `draw` makes the
random numbers and `apply` uses them, so that `apply` can be checked exactly.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dppp_jax import errors, ranges, rngs, types

# Luma as torchvision's rgb_to_grayscale has it.
_LUMA = (0.2989, 0.587, 0.114)
_INSTANCE_EPSILON = 1e-5  # torch.nn.InstanceNorm2d
_ERASING_ATTEMPTS = 10

_NORMALIZE = ("constants", "instance")
_BOUNDS = ("contrast", "gain", "erasing_area", "erasing_aspect")
RANGES = {
  "flip": ranges.UNIT,
  "pad": ranges.WHOLE,
  "mean": ranges.COLOUR,
  "std": ranges.SPREAD,
  "erasing": ranges.UNIT,
  **dict.fromkeys(("erasing_area", "erasing_aspect"), ranges.BOUNDS),
  **dict.fromkeys(("contrast", "gain"), ranges.or_none(ranges.BOUNDS)),
}


@dataclasses.dataclass(frozen=True)
class Augment:
  """What is done to a training picture, in the order of the fields.

  Attributes:
    flip: probability of mirroring left and right.
    pad: pixels of black put around before a random crop of the picture's own
      size; 0 switches both off.
    contrast: range of the factor drawn per picture, or None. 1 changes
      nothing, 0 leaves an even grey.
    gain: range of the factors drawn per picture and channel, or None: the
      exposure and the white balance of another camera.
    normalize: "constants" subtracts `mean` and divides by `std`; "instance"
      uses the picture's own statistics (CLIP-FGDI).
    mean: per channel, of values in [0, 1].
    std: likewise.
    erasing: probability of putting noise in the place of a rectangle.
    erasing_area: range of its area as a share of the picture's.
    erasing_aspect: range of its height over its width, log-uniform.
  """

  flip: float = 0.5
  pad: int = 10
  contrast: tuple[float, float] | None = (0.5, 1.5)
  gain: tuple[float, float] | None = None
  normalize: str = "constants"
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  erasing: float = 0.0
  erasing_area: tuple[float, float] = (0.02, 1 / 3)
  erasing_aspect: tuple[float, float] = (0.3, 3.3)

  def __post_init__(self):
    # Lists, which configs hold, cannot be static arguments of jit.
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, list):
        object.__setattr__(self, field.name, tuple(value))
    ranges.check(self, RANGES, where="augment.")
    for key in _BOUNDS:
      value = getattr(self, key)
      lowest = 0 if key in ("contrast", "gain") else 1e-6
      if value is not None and not lowest <= value[0] <= value[1]:
        raise errors.UserError(
          f"augment.{key}={value}: give a lower and an upper bound"
        )
    if self.normalize not in _NORMALIZE:
      raise errors.UserError(
        f"augment.normalize = {self.normalize!r}: use one of"
        f" {', '.join(_NORMALIZE)}"
      )


def augment(images: types.Array, rng: jax.Array, spec: Augment) -> jax.Array:
  """Augments and normalises a batch.

  A picture's changes depend on the key and on its place in the batch, not on
  its neighbours or their number.

  Args:
    images: uint8 [B, H, W, 3].
    rng: a key of `jax.random.key`; one for each step.
    spec: static under jit.

  Returns:
    float32 [B, H, W, 3].
  """
  return apply(images, draw(rng, images.shape, spec), spec)


def normalize(
  images: types.Array,
  *,
  mean: tuple[float, float, float] | None = (0.5, 0.5, 0.5),
  std: tuple[float, float, float] | None = (0.5, 0.5, 0.5),
  mode: str = "constants",
) -> jax.Array:
  """Returns pictures as the network wants them, without augmentation.

  Args:
    images: uint8 [B, H, W, 3], or floats in [0, 1].
    mean: per channel; not used by "instance".
    std: likewise.
    mode: "constants" or "instance", as `Augment.normalize`.

  Returns:
    float32 [B, H, W, 3].
  """
  images = _to_unit(images)
  if mode == "instance":
    centred = images - _channel_means(images)
    variance = _channel_means(jnp.square(centred))
    return centred * jax.lax.rsqrt(variance + _INSTANCE_EPSILON)
  if mode != "constants":
    raise errors.UserError(
      f"normalize = {mode!r}: use one of {', '.join(_NORMALIZE)}"
    )
  constants = lambda values: jnp.asarray(values, jnp.float32)[None, None, None]
  return (images - constants(mean)) / constants(std)


def draw(
  rng: jax.Array, shape: tuple[int, int, int, int], spec: Augment
) -> dict[str, jax.Array]:
  """Draws what `apply` needs, and nothing for what is switched off.

  Args:
    rng: a key.
    shape: [B, H, W, 3] of the batch.
    spec: what to draw for.

  Returns:
    Some of "flip" bool [B]; "top" and "left" int32 [B], from 0 to 2 * pad;
    "contrast" float32 [B]; "gain" float32 [B, 3]; "box" int32 [B, 4], the top,
    left, height and width of what is erased, height 0 for nothing; "noise"
    float32 [B, H, W, 3].
  """
  batch, height, width, _ = shape
  slots = jnp.arange(batch, dtype=jnp.uint32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, slots)
  return jax.vmap(lambda key: _draw_one(key, height, width, spec))(keys)


def apply(
  images: types.Array, draws: dict[str, jax.Array], spec: Augment
) -> jax.Array:
  """Applies what `draw` drew.

  Args:
    images: uint8 [B, H, W, 3].
    draws: as `draw` returns them.
    spec: the same as for `draw`.

  Returns:
    float32 [B, H, W, 3].
  """
  images = jnp.asarray(images)
  if "flip" in draws:
    flip = draws["flip"][:, None, None, None]
    images = jnp.where(flip, images[:, :, ::-1], images)
  if "top" in draws:
    # Still uint8: a quarter of the bytes to move.
    images = _crop(images, draws["top"], draws["left"], spec.pad)
  if "contrast" in draws or spec.normalize == "instance":
    # Read twice from here on: XLA would otherwise do all above twice as well.
    images = jax.lax.optimization_barrier(images)
  if "contrast" in draws:
    images = _adjust_contrast(images, draws["contrast"])
  if "gain" in draws:
    gains = draws["gain"][:, None, None]
    images = jnp.clip(gains * _to_unit(images), 0, 1)
  images = normalize(images, mean=spec.mean, std=spec.std, mode=spec.normalize)
  if "box" in draws:
    images = jnp.where(
      _inside(draws["box"], images.shape), draws["noise"], images
    )
  return images


def _draw_one(
  key: jax.Array, height: int, width: int, spec: Augment
) -> dict[str, jax.Array]:
  """Draws for one picture; named streams, so that no switch shifts another."""
  draws: dict[str, Any] = {}
  if spec.flip:
    draws["flip"] = jax.random.bernoulli(rngs.stream(key, "flip"), spec.flip)
  if spec.pad:
    top, left = jax.random.randint(
      rngs.stream(key, "crop"), (2,), 0, 2 * spec.pad + 1
    )
    draws |= {"top": top, "left": left}
  if spec.contrast is not None:
    low, high = spec.contrast
    draws["contrast"] = jax.random.uniform(
      rngs.stream(key, "contrast"), minval=low, maxval=high
    )
  if spec.gain is not None:
    low, high = spec.gain
    draws["gain"] = jax.random.uniform(
      rngs.stream(key, "gain"), (3,), minval=low, maxval=high
    )
  if spec.erasing:
    draws["box"] = _draw_box(rngs.stream(key, "erasing"), height, width, spec)
    draws["noise"] = jax.random.normal(
      rngs.stream(key, "noise"), (height, width, 3)
    )
  return draws


def _draw_box(
  key: jax.Array, height: int, width: int, spec: Augment
) -> jax.Array:
  """Draws the rectangle that timm's RandomErasing would, int32 [4].

  Ten rectangles are drawn at once and the first one that fits is taken; where
  none does nothing is erased.
  """
  uniform = jax.random.uniform(key, (1 + 4 * _ERASING_ATTEMPTS,))
  is_erased, attempts = uniform[0] < spec.erasing, uniform[1:].reshape(4, -1)
  between = lambda share, bounds: bounds[0] + share * (bounds[1] - bounds[0])
  area = between(attempts[0], spec.erasing_area) * height * width
  low, high = (jnp.log(bound) for bound in spec.erasing_aspect)
  aspect = jnp.exp(between(attempts[1], (low, high)))
  heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  fits = (heights < height) & (widths < width)
  # Corners such that the rectangle ends inside, the border included.
  tops = (attempts[2] * (height - heights + 1)).astype(jnp.int32)
  lefts = (attempts[3] * (width - widths + 1)).astype(jnp.int32)
  box = jnp.stack([tops, lefts, heights, widths], axis=-1)[jnp.argmax(fits)]
  return jnp.where(is_erased & fits.any(), box, jnp.zeros_like(box))


def _crop(
  images: jax.Array, tops: jax.Array, lefts: jax.Array, pad: int
) -> jax.Array:
  """Pads with black and cuts the original size out, per picture."""
  _, height, width, channels = images.shape
  padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  one = lambda image, top, left: jax.lax.dynamic_slice(
    image, (top, left, 0), (height, width, channels)
  )
  return jax.vmap(one)(padded, tops, lefts)


def _to_unit(images: types.Array) -> jax.Array:
  """Returns uint8 as float32 in [0, 1], and floats as they are."""
  images = jnp.asarray(images)
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 255
  return images.astype(jnp.float32)


def _channel_means(images: jax.Array) -> jax.Array:
  """Returns the mean over height and width, [B, 1, 1, C].

  Rows first, as a sum over long rows: on CPU faster than over height and width
  at once, where the three channels are the inner loop.
  """
  batch, height, width, channels = images.shape
  rows = images.reshape(batch, height, width * channels).mean(axis=1)
  return rows.reshape(batch, 1, width, channels).mean(axis=2, keepdims=True)


def _adjust_contrast(images: jax.Array, factors: jax.Array) -> jax.Array:
  """Blends with the even grey of each picture's mean luma, in [0, 1].

  Args:
    images: uint8 [B, H, W, 3].
    factors: float32 [B].

  Returns:
    float32 [B, H, W, 3].
  """
  batch, height, width, channels = images.shape
  # Sums of integers are exact in any order, which lets XLA use vector units:
  # on CPU four times faster than sums of floats.
  rows = images.reshape(batch, height, width * channels).astype(jnp.int32)
  sums = rows.sum(axis=1).reshape(batch, width, channels).sum(axis=1)
  means = sums.astype(jnp.float32) / (255 * height * width)
  luma = jnp.asarray(_LUMA, jnp.float32)[None]
  grey = (means * luma).sum(axis=-1)[:, None, None, None]
  factors = factors[:, None, None, None]
  return jnp.clip(factors * _to_unit(images) + (1 - factors) * grey, 0, 1)


def _inside(boxes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns bool [B, H, W, 1], true within each picture's rectangle."""
  _, height, width, _ = shape
  top, left, box_height, box_width = boxes.T[:, :, None]
  rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
  rows = (rows >= top) & (rows < top + box_height)
  columns = (columns >= left) & (columns < left + box_width)
  return (rows[:, :, None] & columns[:, None, :])[..., None]
