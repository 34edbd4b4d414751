"""Decoding, encoding and resizing, and the in-memory source."""

import io

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
