"""Bytes to pixels and back, and the resize that torchvision does on PIL."""

from collections.abc import Sequence
import io
import os
import pathlib
from typing import Any
import warnings

import numpy as np
import PIL.Image
import PIL.ImageOps

from dppp_jax import errors, paths, ranges

_FILTERS = {
  "bicubic": PIL.Image.Resampling.BICUBIC,
  "bilinear": PIL.Image.Resampling.BILINEAR,
}
_TOO_LARGE = (
  PIL.Image.DecompressionBombWarning,
  PIL.Image.DecompressionBombError,
)
# What is found in folders of pictures and is none, by its first bytes.
_KINDS = (
  (b"version https://git-lfs", "a Git LFS pointer: run git lfs pull"),
  (b"<!doctype html", "an HTML page: download the picture again"),
  (b"<html", "an HTML page: download the picture again"),
  (b"%pdf", "PDF: convert it to PNG"),
  (b"\x93numpy", "a NumPy array: give numpy.load of it"),
  (b"pk\x03\x04", "a zip archive: unpack it"),
)
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_PRINTABLE = frozenset((*range(32, 127), *b"\t\r\n"))


class CorruptImageError(errors.UserError):
  """Bytes that are not a whole picture; the message names the file."""


def decode(data: bytes, *, name: str) -> np.ndarray:
  """Decodes a JPEG, PNG or whatever Pillow knows; the only decoder here.

  Pillow rather than OpenCV, which fills what a truncated file lacks with grey
  and returns it as if it were a picture.

  Args:
    data: the encoded picture.
    name: where it comes from, for the message.

  Returns:
    uint8 [H, W, 3] RGB: what a viewer shows on a white page. See `of_pillow`.

  Raises:
    CorruptImageError: not a picture, a truncated one, several in one file, one
      of too many pixels, or one whose values have no agreed range.
  """
  try:
    with warnings.catch_warnings():
      # Pillow warns of, e.g., a palette with transparency, which is handled.
      warnings.simplefilter("ignore")
      # A picture of 90 million pixels would fill the memory of every thread.
      warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
      with PIL.Image.open(io.BytesIO(data)) as image:
        return of_pillow(image, name=name)
  except CorruptImageError:
    raise
  except _TOO_LARGE as error:
    limit = PIL.Image.MAX_IMAGE_PIXELS
    raise CorruptImageError(
      f"{name}: has more than {limit:,} pixels: scale it down"
    ) from error
  except Exception as error:  # Pillow raises a dozen types on hostile bytes.
    # Pillow names the BytesIO object; the reader wants the file.
    reason = str(error).split("<_io")[0].strip() or type(error).__name__
    reason = _kind(data) or " ".join(reason.split())
    raise CorruptImageError(
      f"{name}: cannot be decoded as an image ({len(data)} bytes; {reason}):"
      " replace or remove it"
    ) from error


def of_pillow(image: PIL.Image.Image, *, name: str) -> np.ndarray:
  """Returns what a picture of Pillow shows, whatever its mode.

  Palettes, grey, CMYK, HSV and YCbCr become RGB. Alpha is laid on white. The
  EXIF orientation is applied. Grey of 16 bits is divided by 257.

  Args:
    image: of any mode.
    name: of the picture, for the message.

  Returns:
    uint8 [H, W, 3] RGB.

  Raises:
    CorruptImageError: an animation or several pages, an empty picture, 32-bit
      or Lab values, or (of Pillow's own types) a damaged one.
  """
  refuse = lambda text: CorruptImageError(f"{name}: {text}")
  # A phone's MPO begins with the photograph; its other pictures are extras.
  if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
    raise refuse(f"holds {frames} pictures ({image.format}): save one of them")
  if 0 in image.size:
    width, height = image.size
    raise refuse(f"is {width} x {height} pixels: remove it")
  if image.mode == "I" and image.format == "PPM":  # Of at most 16 bits.
    image = image.convert("I;16")
  # Of colours of 16 bits Pillow keeps the upper 8.
  is_deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
  clear = image.info.get("transparency")
  image = PIL.ImageOps.exif_transpose(image)
  if is_deep and not image.mode.startswith("I"):
    most = max(high for _, high in _laid_on("black", image).getextrema())
    if 0 <= most < 16:
      raise refuse(
        "16-bit values, all of them below 4096: save the picture with 8 bits"
      )
  if image.mode.startswith("I;16"):
    values = np.asarray(image).astype(np.uint16)
    # 8 or 12 bits in a file of 16: scaled, next to nothing would be left.
    if 0 < values.max() < 4096:
      raise refuse(
        f"16-bit values of at most {values.max()}: save the picture with 8 bits"
      )
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(clear, int):  # The value that is transparent.
      grey = np.where(values == clear, np.uint8(255), grey)
    return np.repeat(grey[:, :, None], 3, axis=2)
  if image.mode in ("I", "F", "LAB"):
    kind = {"I": "32-bit integers", "F": "floats", "LAB": "Lab colours"}
    raise refuse(
      f"holds {kind[image.mode]}, whose range is not agreed: save it as 8-bit"
      " RGB"
    )
  return np.array(_laid_on("white", image))


def _laid_on(colour: str, image: PIL.Image.Image) -> PIL.Image.Image:
  """Returns a picture of RGB; the colour shows where the picture is clear."""
  if image.has_transparency_data:
    if image.mode == "La":  # Which only LA is made of.
      image = image.convert("LA")
    image = image.convert("RGBA")
    ground = PIL.Image.new("RGBA", image.size, colour)
    image = PIL.Image.alpha_composite(ground, image)
  return image.convert("RGB")


def of_array(array: Any, *, name: str) -> np.ndarray:
  """Returns a picture that is held as numbers.

  Args:
    array: of NumPy, JAX or torch, or nested lists: uint8 [H, W], [H, W, 1],
      [H, W, 3] or [H, W, 4], alpha laid on white.
    name: of the picture, for the message.

  Returns:
    uint8 [H, W, 3] RGB.

  Raises:
    errors.UserError: another type or shape; it says how to convert it.
  """
  refuse = lambda text: errors.UserError(f"{name} {text}")
  want = "give uint8 [H, W, 3], 0 to 255, or a path"
  try:
    image = np.asarray(array)
  except Exception as error:  # A tensor on a GPU, a deleted array, ...
    reason = " ".join(str(error).split())
    raise refuse(f"is no array ({reason}): {want}") from error
  is_number = image.dtype.kind in "fiu"
  if image.ndim not in (2, 3) or not image.size or not is_number:
    kind = f"{image.dtype} {image.shape}"
    raise refuse(f"is {kind if image.ndim else type(array).__name__}: {want}")
  last = image.shape[2] if image.ndim == 3 else 1
  if last not in (1, 3, 4):
    if image.shape[0] not in (1, 3, 4) or min(image.shape[1:]) < 5:
      raise refuse(f"has {last} channels: give grey, RGB or RGBA")
    raise refuse(
      f"is {image.shape}, channels first: give uint8 [H, W, 3], such as"
      " numpy.moveaxis(image, 0, -1)"
    )
  if image.dtype != np.uint8:
    remedy = "image.astype(numpy.uint8)"
    if image.dtype == np.uint16:
      remedy = "(image // 257).astype(numpy.uint8)"
    elif image.min() < 0 or np.isnan(image.max()):
      remedy = "the picture as it was before it was normalised"
    elif image.dtype.kind == "f" and image.max() <= 1:
      remedy = "(255 * image).round().astype(numpy.uint8)"
    raise refuse(f"is {image.dtype} {image.shape}: {want}, such as {remedy}")
  if image.ndim == 2 or image.shape[2] == 1:
    return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
  if image.shape[2] == 4:
    return of_pillow(
      PIL.Image.fromarray(np.ascontiguousarray(image)), name=name
    )
  return np.ascontiguousarray(image)


def read_file(path: str | os.PathLike) -> np.ndarray:
  """Returns the picture of a file, uint8 [H, W, 3]; "~" is the home folder.

  Raises:
    CorruptImageError: it cannot be read or decoded; the message names it.
  """
  path = paths.expand(path)
  return decode(read_bytes(path), name=str(path))


def read_bytes(path: pathlib.Path) -> bytes:
  """Returns a file's bytes; raises `CorruptImageError` where there are none."""
  try:
    return path.read_bytes()
  except (OSError, ValueError) as error:  # ValueError: a zero in the name.
    reason = getattr(error, "strerror", None) or error
    raise CorruptImageError(
      f"{path}: cannot be read ({reason}): restore the file"
    ) from error


def _kind(data: bytes) -> str:
  """Returns what bytes are that are no picture, with the remedy, or ""."""
  head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
  if not data:
    return "an empty file"
  if data[4:8] == b"ftyp" and data[8:12] in _HEIC:
    return "HEIC: convert it to JPEG"
  for begin, kind in _KINDS:
    if head.startswith(begin):
      return kind
  if b"<svg" in head:
    return "SVG, a drawing without pixels: convert it to PNG"
  if all(byte in _PRINTABLE for byte in data[:512]):
    return "text"
  return ""


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
    size: (height, width), whole numbers from 1 to 16,384.
    interpolation: "bicubic" or "bilinear".

  Raises:
    errors.UserError: another one.
  """
  if interpolation not in _FILTERS:
    raise errors.UserError(
      f"interpolation {interpolation!r} is unknown: use one of"
      f" {', '.join(sorted(_FILTERS))}"
    )
  if not ranges.PAIR.holds(size):
    shown = tuple(size) if isinstance(size, list) else size
    raise errors.UserError(f"image_size {shown}: give {ranges.PAIR.text}")


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
