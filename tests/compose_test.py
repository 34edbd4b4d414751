"""Fusion, on drawn people whose mattes and own colours are known."""

import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.geneperson import compose, poses
from dppp_jax.paperdoll import figure, world

SIZE = (256, 128)


@pytest.fixture(scope="module")
def people():
  """Drawn figures, each without any ground."""
  drawn = []
  for pid, azimuth in ((0, 20), (1, 160), (2, 80)):
    view = poses.View(azimuth=azimuth)
    who = world.person(pid, seed=5)
    place = poses.fit(SIZE, view)
    drawn.append(
      figure.render(who, poses.Gait(), view, size=SIZE, placement=place)
    )
  return drawn


def _noise(seed):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def test_formula():
  cell, ground = _noise(0), _noise(1)
  alpha = np.random.default_rng(2).uniform(size=SIZE).astype(np.float32)
  fused = compose.fuse(cell, alpha, background=ground)
  for y, x in ((0, 0), (100, 77), (255, 127)):
    a = float(alpha[y, x])
    expected = a * cell[y, x].astype(float) + (1 - a) * ground[y, x]
    assert np.abs(fused[y, x] - expected).max() <= 0.5001
  by_byte = np.rint(alpha * 255).astype(np.uint8)
  near = compose.fuse(cell, by_byte, background=ground)
  assert np.abs(near.astype(int) - fused).max() <= 1


@pytest.mark.parametrize("decontaminate", [False, True])
def test_ends_are_exact(decontaminate):
  cell, ground = _noise(0), _noise(1)
  alpha = np.zeros(SIZE, np.uint8)
  alpha[64:128] = 255
  fused = compose.fuse(
    cell, alpha, background=ground, decontaminate=decontaminate
  )
  np.testing.assert_array_equal(fused[64:128], cell[64:128])
  np.testing.assert_array_equal(fused[:64], ground[:64])
  np.testing.assert_array_equal(fused[128:], ground[128:])


@pytest.mark.parametrize("old,new", [(215, 25), (40, 230)])
def test_no_halo_of_the_old_ground(people, old, new):
  """What a white studio leaves round a person at night, and the reverse."""
  rng = np.random.default_rng(0)
  slope = np.linspace(-8, 8, SIZE[0])[:, None, None]
  grain = rng.normal(0, 2, (*SIZE, 3))
  before = np.rint(old + slope + grain).astype(np.uint8)
  after = np.full((*SIZE, 3), new, np.uint8)
  for drawn in people:
    cell, truth = drawn.over(before), drawn.over(after).astype(float)
    fringe = (drawn.alpha > 10) & (drawn.alpha < 245)
    assert fringe.sum() > 300
    error = {}
    for clean in (False, True):
      fused = compose.fuse(
        cell, drawn.alpha, background=after, decontaminate=clean
      )
      error[clean] = (fused - truth)[fringe]
    # The plain formula leaves a light (or dark) line; this does not.
    assert np.abs(error[False]).mean() > 4
    assert abs(error[True].mean()) < 2
    assert np.abs(error[True]).mean() < 0.3 * np.abs(error[False]).mean()


def test_own_colours_are_found_on_a_made_up_matte():
  """A red disc with a soft edge on a green ground: F is red, everywhere."""
  y, x = np.mgrid[: SIZE[0], : SIZE[1]]
  away = np.hypot(y - 128, x - 64)
  alpha = np.clip((50 - away) / 12 + 0.5, 0, 1).astype(np.float32)
  red, green = np.array([200, 20, 30.0]), np.array([10, 180, 60.0])
  mixed = alpha[..., None] * red + (1 - alpha[..., None]) * green
  cell = np.rint(mixed).astype(np.uint8)
  found = compose.foreground(cell, alpha)
  error = np.abs(found - red)[(alpha > 0.1) & (alpha < 1)]
  assert error.mean() < 3
  assert np.abs(cell - red)[(alpha > 0.1) & (alpha < 1)].mean() > 40


def test_crops_have_the_shape_of_a_cell_and_come_from_everywhere():
  y, x = np.mgrid[:300, :400]
  picture = np.stack([y * 255 // 299, x * 255 // 399, 0 * x], -1)
  picture = picture.astype(np.uint8)
  rng = np.random.default_rng(0)
  centres, heights = [], []
  for _ in range(60):
    part = compose.crop(picture, (96, 48), rng=rng).astype(float)
    assert part.shape == (96, 48, 3)
    rows = part[..., 0].mean(1) * 299 / 255
    columns = part[..., 1].mean(0) * 399 / 255
    # Rows and columns are shrunk alike.
    assert abs(np.diff(rows).mean() / np.diff(columns).mean() - 1) < 0.06
    centres.append(columns.mean())
    heights.append(rows[-1] - rows[0])
  assert min(centres) < 110 and max(centres) > 290
  assert min(heights) > 180 and max(heights) > 280
  again = compose.crop(picture, (96, 48), rng=np.random.default_rng(0))
  first = compose.crop(picture, (96, 48), rng=np.random.default_rng(0))
  np.testing.assert_array_equal(again, first)


def test_refuses_sizes_that_do_not_match():
  with pytest.raises(errors.UserError, match="cannot be fused"):
    compose.fuse(_noise(0), np.zeros((9, 9)), background=_noise(1))
  with pytest.raises(errors.UserError, match="smaller than a cell"):
    compose.crop(
      np.zeros((90, 90, 3), np.uint8), SIZE, rng=np.random.default_rng(0)
    )
