"""A person from one picture onto the ground of another, by its matte."""

import cv2
import numpy as np

from dppp_jax import errors
from dppp_jax.data import images

# Windows from which pure colours are taken, in shares of the longer side. The
# near ones decide; the far ones only speak where the near ones hold nothing.
_WINDOWS = (0.03, 0.09, 0.35)
_FAR = 0.1
_PURITY = 32  # Exponent: half-covered pixels say nothing of pure colours.
_NOISE = 4.0  # Variance of a pixel that is due to rounding and JPEG.


def fuse(
  cell: np.ndarray,
  alpha: np.ndarray,
  *,
  background: np.ndarray,
  decontaminate: bool = False,
) -> np.ndarray:
  """Fuses pixel by pixel: alpha * person + (1 - alpha) * background.

  Args:
    cell: uint8 [H, W, 3], the person on its old ground.
    alpha: [H, W], float in 0..1 or uint8 in 0..255.
    background: uint8 [H, W, 3], the new ground.
    decontaminate: take the old ground's colour out of half-covered pixels
      first; without it hair and hems keep a fringe of it.

  Returns:
    uint8 [H, W, 3]; exactly the background where alpha is 0 and exactly the
    cell where it is 1.

  Raises:
    errors.UserError: the three are of different sizes.
  """
  if not cell.shape[:2] == alpha.shape == background.shape[:2]:
    raise errors.UserError(
      f"a cell of {cell.shape[:2]}, a matte of {alpha.shape} and a background"
      f" of {background.shape[:2]} pixels cannot be fused: resize them to one"
    )
  alpha = as_float(alpha)
  person = foreground(cell, alpha) if decontaminate else cell
  cover = alpha[..., None]
  fused = cover * person + (1 - cover) * background
  return np.rint(fused).astype(np.uint8)


def foreground(cell: np.ndarray, alpha: np.ndarray) -> np.ndarray:
  """Estimates the person's own colours F in I = alpha F + (1 - alpha) B.

  F and B of a pixel are expected to be as in their surroundings, where they are
  seen pure; what I differs from that is given to the one that varies more
  there (the mean of two Gaussians, given their sum). On a plain ground that is
  F, which is then as sharp as the picture.

  Args:
    cell: uint8 [H, W, 3].
    alpha: float32 [H, W] in 0..1.

  Returns:
    float32 [H, W, 3] in 0..255; the cell itself where alpha is 1.
  """
  image = cell.astype(np.float32)
  cover = alpha[..., None].astype(np.float32)
  front, front_variance = _surroundings(image, cover**_PURITY)
  back, back_variance = _surroundings(image, (1 - cover) ** _PURITY)
  rest = image - cover * front - (1 - cover) * back
  share = cover * front_variance
  total = cover * share + (1 - cover) ** 2 * back_variance + _NOISE
  found = np.clip(front + rest * share / total, 0, 255)
  return np.where(cover >= 1, image, found)


def crop(
  picture: np.ndarray, size: tuple[int, int], *, rng: np.random.Generator
) -> np.ndarray:
  """Takes a part of a background at random, in the shape of a cell.

  Args:
    picture: uint8 [H, W, 3], at least as large as the cell.
    size: (height, width) of the cell, pixels.
    rng: where from: between all of the height (or width, whichever is used
      up first) and two thirds of it, anywhere.

  Returns:
    uint8 [height, width, 3].

  Raises:
    errors.UserError: the picture is smaller than the cell.
  """
  height, width = size
  largest = min(picture.shape[0] / height, picture.shape[1] / width)
  if largest < 1:
    raise errors.UserError(
      f"a background of {picture.shape[:2]} pixels is smaller than a cell of"
      f" {size}: generate larger ones"
    )
  scale = rng.uniform(max(1.0, largest * 2 / 3), largest)
  h, w = min(int(height * scale), picture.shape[0]), int(width * scale)
  w = min(w, picture.shape[1])
  top = int(rng.integers(picture.shape[0] - h + 1))
  left = int(rng.integers(picture.shape[1] - w + 1))
  part = np.ascontiguousarray(picture[top : top + h, left : left + w])
  return images.resize(part, size)


def as_float(alpha: np.ndarray) -> np.ndarray:
  """Returns a matte as float32 in 0..1."""
  if alpha.dtype == np.uint8:
    return alpha.astype(np.float32) / 255
  return alpha.astype(np.float32)


def _surroundings(
  image: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns weighted means [H, W, 3] and variances [H, W, 1] near a pixel."""
  sums = np.concatenate(
    [image * weight, np.square(image) * weight, weight], axis=-1
  )
  total = np.zeros_like(sums)
  for k, share in enumerate(_WINDOWS):
    size = 2 * max(1, round(share * max(image.shape) / 2)) + 1
    # OpenCV filters four channels at most.
    blurred = [
      cv2.blur(np.ascontiguousarray(part), (size, size))
      for part in np.split(sums, [3, 6], axis=-1)
    ]
    total += _FAR**k * np.concatenate(
      [part.reshape(*image.shape[:2], -1) for part in blurred], axis=-1
    )
  sure = np.maximum(total[..., 6:], 1e-12)
  mean, square = total[..., :3] / sure, total[..., 3:6] / sure
  variance = np.maximum(square - np.square(mean), 0).mean(-1, keepdims=True)
  return mean, variance
