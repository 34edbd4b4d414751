"""Bytes to pixels and back, and the resize that torchvision does on PIL."""

from collections.abc import Sequence
import io
import warnings

import numpy as np
import PIL.Image

from dppp_jax import errors

_FILTERS = {
  "bicubic": PIL.Image.Resampling.BICUBIC,
  "bilinear": PIL.Image.Resampling.BILINEAR,
}


class CorruptImageError(errors.UserError):
  """Bytes that are not a whole picture; the message names the file."""


def decode(data: bytes, *, name: str) -> np.ndarray:
  """Decodes a JPEG, PNG or whatever Pillow knows.

  Pillow rather than OpenCV, which fills what a truncated file lacks with grey
  and returns it as if it were a picture.

  Args:
    data: the encoded picture.
    name: where it comes from, for the message.

  Returns:
    uint8 [H, W, 3] RGB. Grey and palette pictures become RGB, alpha is dropped,
    an EXIF rotation is not applied (nor is it by torchvision).

  Raises:
    CorruptImageError: not a picture, or a truncated one.
  """
  try:
    with warnings.catch_warnings():
      # E.g. a palette with transparency, or a picture of 90 million pixels.
      warnings.simplefilter("ignore")
      with PIL.Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))
  except Exception as error:  # Pillow raises a dozen types on hostile bytes.
    # Pillow names the BytesIO object; the reader wants the file.
    reason = str(error).split("<_io")[0].strip() or type(error).__name__
    raise CorruptImageError(
      f"{name}: cannot be decoded as an image ({len(data)} bytes; {reason}):"
      " replace or remove it"
    ) from error


def encode_jpeg(image: np.ndarray, *, quality: int = 95) -> bytes:
  """Encodes uint8 [H, W, 3] RGB as JPEG.

  Args:
    image: uint8 [H, W, 3] RGB.
    quality: 1 to 100; colour at half the resolution (4:2:0) as cameras do.

  Returns:
    The file's bytes: the same for the same pixels and library version.
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(
      f"an image is uint8 [H, W, 3], not {image.dtype} {image.shape}"
    )
  buffer = io.BytesIO()
  PIL.Image.fromarray(image).save(buffer, "JPEG", quality=quality)
  return buffer.getvalue()


def check_resize(size: Sequence[int], interpolation: str) -> None:
  """Refuses what `resize` cannot do.

  Args:
    size: (height, width), whole numbers of at least 1.
    interpolation: "bicubic" or "bilinear".

  Raises:
    errors.UserError: another one.
  """
  if interpolation not in _FILTERS:
    raise errors.UserError(
      f"interpolation {interpolation!r} is unknown: use one of"
      f" {', '.join(sorted(_FILTERS))}"
    )
  if len(size) != 2 or min(size) < 1:
    raise errors.UserError(
      f"image_size {tuple(size)}: give height and width, such as 256,128"
    )


def resize(
  image: np.ndarray,
  size: tuple[int, int],
  *,
  interpolation: str = "bicubic",
) -> np.ndarray:
  """Resizes as torchvision does on PIL images: antialiased when it shrinks.

  Args:
    image: uint8 [H, W, 3].
    size: (height, width) wanted.
    interpolation: "bicubic" or "bilinear".

  Returns:
    uint8 [height, width, 3]; the image itself where it has that size.
  """
  check_resize(size, interpolation)
  height, width = size
  if image.shape[:2] == (height, width):
    return image
  resized = PIL.Image.fromarray(image).resize(
    (width, height), _FILTERS[interpolation]
  )
  return np.asarray(resized)


def contact_sheet(
  rows: Sequence[Sequence[np.ndarray]], *, max_height: int = 128
) -> np.ndarray:
  """Puts pictures side by side.

  Args:
    rows: uint8 [H, W, 3] each, row by row; rows may be of any length, the first
      picture says how large all are drawn.
    max_height: of one picture on the sheet.

  Returns:
    uint8 [height, width, 3], white where a row is shorter.
  """
  first = next((image for row in rows for image in row), None)
  if first is None:
    return np.full((1, 1, 3), 255, np.uint8)
  scale = min(1.0, max_height / first.shape[0])
  height, width = (max(1, round(side * scale)) for side in first.shape[:2])
  columns = max(len(row) for row in rows)
  sheet = np.full((len(rows) * height, columns * width, 3), 255, np.uint8)
  for y, row in enumerate(rows):
    for x, image in enumerate(row):
      top, left = y * height, x * width
      cell = resize(image, (height, width))
      sheet[top : top + height, left : left + width] = cell
  return sheet
