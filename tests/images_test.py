"""Decoding, encoding and resizing, and the in-memory source."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from dppp_jax import errors
from dppp_jax.data import images, source


@pytest.fixture(scope="module")
def picture():
  """A smooth 40 x 20 gradient with red, green and blue told apart."""
  y, x = np.mgrid[0:40, 0:20]
  return np.stack([y * 6, x * 12, 255 - y * 3 - x * 6], -1).astype(np.uint8)


def test_jpeg_round_trip_keeps_colours_in_rgb_order(picture):
  decoded = images.decode(images.encode_jpeg(picture), name="a.jpg")
  assert decoded.dtype == np.uint8 and decoded.shape == (40, 20, 3)
  difference = np.abs(decoded.astype(int) - picture)
  assert difference.mean() < 2 and difference.max() < 16


def test_quality_trades_bytes_and_the_same_pixels_give_the_same_bytes(picture):
  assert images.encode_jpeg(picture) == images.encode_jpeg(picture.copy())
  assert len(images.encode_jpeg(picture, quality=30)) < len(
    images.encode_jpeg(picture, quality=95)
  )


def _encoded(array, file_format="PNG", mode=None, **options):
  buffer = io.BytesIO()
  image = PIL.Image.fromarray(array)
  (image.convert(mode) if mode else image).save(buffer, file_format, **options)
  return buffer.getvalue()


def test_decode_png_is_exact(picture):
  decoded = images.decode(_encoded(picture), name="a.png")
  np.testing.assert_array_equal(decoded, picture)


def test_decode_grey_becomes_three_equal_channels():
  grey = np.arange(24, dtype=np.uint8).reshape(6, 4)
  decoded = images.decode(_encoded(grey), name="grey.png")
  np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, -1))


def test_alpha_is_laid_on_white(picture):
  alpha = np.zeros((40, 20, 1), np.uint8)
  alpha[:, 7:] = 255
  shown = np.where(alpha, picture, 255).astype(np.uint8)
  rgba = np.concatenate([picture, alpha], -1)
  for given in (
    images.decode(_encoded(rgba), name="x"),
    images.of_array(rgba, name="x"),
    images.of_pillow(PIL.Image.fromarray(rgba), name="x"),
  ):
    np.testing.assert_array_equal(given, shown)
  grey = PIL.Image.fromarray(np.full((2, 2), 9, np.uint8))
  buffer = io.BytesIO()
  grey.save(buffer, "PNG", transparency=9)
  assert images.decode(buffer.getvalue(), name="x").min() == 255


@pytest.mark.parametrize("kept", [0, 1, 10, 200, -1, -40])
def test_truncated_jpeg_is_named(picture, kept):
  noise = np.random.default_rng(0).integers(0, 256, (64, 32, 3), np.uint8)
  data = images.encode_jpeg(noise)[:kept]
  if kept == -1:  # Only half of the end marker is gone: all pixels are there.
    data = data[:-100]
  with pytest.raises(images.CorruptImageError, match=r"^cam1/x\.jpg: ") as info:
    images.decode(data, name="cam1/x.jpg")
  assert "\n" not in str(info.value) and "BytesIO" not in str(info.value)
  assert isinstance(info.value, errors.UserError)


def test_not_a_picture_is_named():
  with pytest.raises(images.CorruptImageError, match=r"notes\.txt"):
    images.decode(b"hello there" * 100, name="notes.txt")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(16, 8), (80, 31)])
def test_resize_equals_torchvisions_on_pil(picture, interpolation, size):
  # torchvision's Resize on a PIL image is `Image.resize(size[::-1], filter)`.
  wanted = PIL.Image.fromarray(picture).resize(
    size[::-1], getattr(PIL.Image, interpolation.upper())
  )
  got = images.resize(picture, size, interpolation=interpolation)
  np.testing.assert_array_equal(got, np.asarray(wanted))


def test_resize_averages_when_it_shrinks():
  # One-pixel stripes: a resize without antialiasing gives 0 or 255.
  stripes = np.zeros((32, 32, 3), np.uint8)
  stripes[::2] = 255
  small = images.resize(stripes, (8, 8), interpolation="bilinear")
  assert np.abs(small[2:6].astype(int) - 127.5).max() < 8


def test_resize_to_its_own_size_changes_nothing(picture):
  assert images.resize(picture, (40, 20)) is picture


@pytest.mark.parametrize("size", [(96,), (96, 48, 3), (0, 0), (96, -1)])
def test_resize_names_an_impossible_size(picture, size):
  for call in (
    lambda: images.resize(picture, size),
    lambda: images.check_resize(list(size), "bicubic"),
  ):
    with pytest.raises(errors.UserError, match="give height and width"):
      call()


def test_resize_names_an_unknown_interpolation(picture):
  with pytest.raises(errors.UserError, match=r"'lanczos'.*bicubic, bilinear"):
    images.resize(picture, (8, 4), interpolation="lanczos")


@pytest.mark.parametrize(
  "bad",
  [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)],
)
def test_encode_refuses_what_is_not_a_picture(bad):
  with pytest.raises(ValueError, match="uint8"):
    images.encode_jpeg(bad)


def test_arrays_is_a_source():
  pictures = np.arange(3 * 4 * 2 * 3, dtype=np.uint8).reshape(3, 4, 2, 3)
  arrays = source.Arrays(pictures, [7, 7, 9], camids=[1, 2, 1], label="studio")
  assert isinstance(arrays, source.Source) and len(arrays) == 3
  assert arrays.pids.dtype == arrays.camids.dtype == np.int64
  np.testing.assert_array_equal(arrays.read(2), pictures[2])
  assert arrays.name(2) == "studio[2]"
  assert source.Arrays(pictures, [1, 2, 3]).camids.tolist() == [0, 0, 0]


def test_arrays_refuses_labels_of_another_length():
  with pytest.raises(ValueError, match="pids"):
    source.Arrays(np.zeros((3, 4, 2, 3), np.uint8), [1, 2])


def test_contact_sheet_lays_rows_out_and_leaves_white():
  flat = lambda value: np.full((8, 4, 3), value, np.uint8)
  sheet = images.contact_sheet([[flat(10), flat(20)], [flat(30)]])
  assert sheet.shape == (16, 8, 3)
  corners = sheet[::8, ::4, 0]
  np.testing.assert_array_equal(corners, [[10, 20], [30, 255]])
  small = images.contact_sheet([[flat(10), flat(20)]], max_height=4)
  assert small.shape == (4, 4, 3) and small[0, 3, 0] == 20
  assert images.contact_sheet([[]]).shape == (1, 1, 3)


def _small_picture():
  rng = np.random.default_rng(0)
  noise = PIL.Image.fromarray(rng.integers(0, 256, (4, 2, 3), np.uint8))
  return noise.resize((24, 48), PIL.Image.Resampling.BICUBIC)


@pytest.mark.parametrize("mode", ["P", "CMYK", "HSV", "YCbCr", "RGBX", "RGBa"])
def test_modes_keep_what_is_shown(mode):
  shown = _small_picture()
  source = shown.convert("RGBA") if mode == "RGBa" else shown
  given = source.quantize(256) if mode == "P" else source.convert(mode)
  found = images.of_pillow(given, name="x").astype(int)
  assert np.abs(found - np.asarray(shown)).mean() < 10  # The palette's steps.


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "I;16", "I;16B"])
def test_grey_of_any_depth_is_grey(mode):
  grey = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
  image = PIL.Image.fromarray(grey)
  if mode.startswith("I"):
    order = ">u2" if mode.endswith("B") else "<u2"
    data = (grey.astype(np.uint16) * 257).astype(order).tobytes()
    image = PIL.Image.frombytes(mode, (13, 4), data)
  elif mode == "1":
    image = image.point(lambda x: 255 * (x > 99)).convert("1")
    grey = np.where(grey > 99, 255, 0)
  else:
    image = image.convert("LA" if mode == "La" else mode).convert(mode)
  found = images.of_pillow(image, name="x")
  np.testing.assert_array_equal(found, np.repeat(grey[:, :, None], 3, 2))


def test_a_pgm_of_16_bits_is_grey():
  grey = np.arange(0, 65536, 1285).reshape(4, 13)
  file = b"P5 13 4 65535\n" + grey.astype(">u2").tobytes()
  found = images.decode(file, name="x.pgm")
  expected = (grey // 257).astype(np.uint8)
  np.testing.assert_array_equal(found, np.repeat(expected[:, :, None], 3, 2))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_of_exif_is_applied(file_format):
  shown = _small_picture()
  exif = PIL.Image.Exif()
  exif[0x112] = 6  # To be turned by a quarter, clockwise.
  buffer = io.BytesIO()
  turned = shown.transpose(PIL.Image.Transpose.ROTATE_90)
  turned.save(buffer, file_format, exif=exif, quality=95)
  found = images.decode(buffer.getvalue(), name="x")
  assert found.shape == (48, 24, 3)
  assert np.abs(found.astype(int) - np.asarray(shown)).mean() < 8


def _png_header(width, height):
  def chunk(kind, data):
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check

  head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", head)
    + chunk(b"IDAT", zlib.compress(b""))
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize(
  ("data", "says"),
  [
    (b"", "an empty file"),
    (b"hello there" * 9, "text"),
    (b"\xef\xbb\xbf<!DOCTYPE html>\n\xff", "an HTML page"),
    (b'<?xml version="1.0"?><svg>', "SVG"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "HEIC: convert it"),
    (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    (_png_header(0, 5), "cannot be decoded"),
    (_png_header(10_000, 10_000), "more than 89,478,485 pixels"),
    (_png_header(100_000, 100_000), "more than 89,478,485 pixels"),
  ],
)
def test_what_is_no_picture_is_called_by_its_name(data, says):
  with pytest.raises(images.CorruptImageError, match=says) as caught:
    images.decode(data, name="a/b.jpg")
  assert str(caught.value).startswith("a/b.jpg: ")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_pictures_in_a_file_are_refused(file_format):
  first = _small_picture()
  buffer = io.BytesIO()
  second = first.point(lambda x: 255 - x)
  first.save(buffer, file_format, save_all=True, append_images=[second])
  with pytest.raises(images.CorruptImageError, match="holds 2 pictures"):
    images.decode(buffer.getvalue(), name="x")


@pytest.mark.parametrize(
  ("array", "says"),
  [
    (np.full((4, 4), 0.5, np.float32), "floats"),
    (np.full((4, 4), 70_000, np.int32), "32-bit integers"),
    (np.full((4, 4), 200, np.uint16), "16-bit values of at most 200"),
    (np.full((4, 4), 4095, np.uint16), "16-bit values of at most 4095"),
  ],
)
def test_values_of_unknown_range_are_refused(array, says):
  with pytest.raises(images.CorruptImageError, match=says):
    images.decode(_encoded(array, "TIFF"), name="x.tif")


@pytest.mark.parametrize(
  ("array", "says"),
  [
    (np.zeros((5, 6, 3), np.float32), r"\(255 \* image\)"),
    (np.full((5, 6, 3), 200.0), r"image\.astype"),
    (np.full((5, 6, 3), -0.5), "before it was normalised"),
    (np.full((5, 6, 3), np.nan), "before it was normalised"),
    (np.zeros((5, 6, 3), np.uint16), "257"),
    (np.zeros((5, 6, 3), bool), "is bool"),
    (np.zeros((3, 6, 7), np.uint8), "channels first"),
    (np.zeros((5, 6, 2), np.uint8), "2 channels"),
    (np.zeros((0, 6, 3), np.uint8), r"uint8 \(0, 6, 3\)"),
    (None, "is NoneType"),
    ([[1, 2], [3]], "no array"),
  ],
)
def test_arrays_that_are_no_picture(array, says):
  with pytest.raises(errors.UserError, match=f"^image 3 .*{says}") as caught:
    images.of_array(array, name="image 3")
  assert "\n" not in str(caught.value)


def _chunk(kind, data):
  crc = struct.pack(">I", zlib.crc32(kind + data))
  return struct.pack(">I", len(data)) + kind + data + crc


def _deep_png(values, colour_type, clear=None):
  """Encodes [H, W, C] of 16 bits, which Pillow writes of grey alone."""
  height, width, _ = values.shape
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
  parts = [_chunk(b"IHDR", head)]
  if clear is not None:
    parts.append(_chunk(b"tRNS", struct.pack(">H", clear)))
  parts += [_chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_the_transparent_value_of_deep_grey_is_laid_on_white():
  values = np.array([[[0], [30000]], [[65535], [0]]])
  decoded = images.decode(_deep_png(values, 0, clear=0), name="a.png")
  assert decoded[..., 0].tolist() == [[255, 117], [255, 255]]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_few_bits_in_deep_colours_are_refused(colour_type, channels):
  values = np.full((4, 4, channels), 200)
  if colour_type != 2:
    values[..., -1] = 65535  # Alpha.
  with pytest.raises(images.CorruptImageError, match=r"a\.png.*below 4096"):
    images.decode(_deep_png(values, colour_type), name="a.png")
  values[0, 0, 0] = 60000
  assert images.decode(_deep_png(values, colour_type), name="a").max() == 234
