"""The canvas: which pixel belongs to whom, and the maps that steer it."""

import jax.numpy as jnp
import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.geneperson import canvas, poses

SMALL = canvas.Layout(rows=2, cols=3, cell=(64, 32), multiple=32)


def test_default_is_42_cells_on_896_x_1536():
  layout = canvas.Layout()
  assert layout.size == (1536, 896)
  assert layout.num_cells == 42


def test_cut_takes_the_pixels_of_each_cell():
  rng = np.random.default_rng(0)
  picture = rng.integers(0, 256, (*SMALL.size, 3), dtype=np.uint8)
  cells = canvas.cut(picture, SMALL)
  assert cells.shape == (6, 64, 32, 3)
  for i in range(6):
    top, left = i // 3 * 64, i % 3 * 32
    np.testing.assert_array_equal(
      cells[i], picture[top : top + 64, left : left + 32]
    )
  np.testing.assert_array_equal(canvas.join(cells, SMALL), picture)
  batch = jnp.asarray(np.stack([picture, picture[::-1]]))
  np.testing.assert_array_equal(canvas.cut(batch, SMALL)[0], cells)
  np.testing.assert_array_equal(
    canvas.join(canvas.cut(batch, SMALL), SMALL), batch
  )


def test_grid_lines_lie_on_the_borders_of_cells():
  grid = canvas.grid_map(SMALL)
  dark_columns = np.flatnonzero((grid == 0).all((0, 2)))
  dark_rows = np.flatnonzero((grid == 0).all((1, 2)))
  assert dark_columns.tolist() == [0, 31, 32, 63, 64, 95]
  assert dark_rows.tolist() == [0, 63, 64, 127]
  inner = canvas.cut(grid, SMALL)[:, 1:-1, 1:-1]
  assert (inner == 255).all()
  wide = canvas.grid_map(SMALL, line_width=4)
  assert (wide[:, 30:34] == 0).all() and (wide[1:60, 34] == 255)[2:].all()


def test_canny_draws_every_cell_once():
  layout = canvas.Layout()
  lines = canvas.line_map(canvas.grid_map(layout))
  assert set(np.unique(lines)) == {0, 255}
  assert (lines[..., 0] == lines[..., 1]).all()
  at_rows = np.flatnonzero((lines[..., 0] > 0).mean(1) > 0.8)
  at_columns = np.flatnonzero((lines[..., 0] > 0).mean(0) > 0.8)
  for at, step, count in ((at_rows, 256, 6), (at_columns, 128, 7)):
    near = np.abs(at - step * np.rint(at / step))
    assert near.max() <= 2  # Nothing but borders ...
    reached = set(np.rint(at / step).astype(int).tolist())
    assert set(range(1, count)) <= reached  # ... and all inner ones.
  for cell in canvas.cut(lines, layout):
    assert not cell[4:-4, 4:-4].any()


def test_skeletons_stand_in_their_cells():
  views = [0, 90, 180, 270, 45, 135]
  figures = []
  for azimuth in views:
    view = poses.View(azimuth=azimuth)
    place = poses.fit(SMALL.cell, view)
    figures.append(
      poses.keypoints(poses.Gait(), poses.Build(), view, placement=place)
    )
  drawn = canvas.skeleton_map(figures, SMALL)
  for figure, cell in zip(figures, canvas.cut(drawn, SMALL), strict=True):
    np.testing.assert_array_equal(cell, poses.draw(figure, size=SMALL.cell))
    assert cell.any()
  with pytest.raises(errors.UserError, match="5 skeletons for 6 cells"):
    canvas.skeleton_map(figures[:5], SMALL)
  astray = poses.Keypoints(
    figures[3].xy + np.array([20, 0]), figures[3].depth, figures[3].visible
  )
  with pytest.raises(errors.UserError, match="skeleton 3"):
    canvas.skeleton_map([*figures[:3], astray, *figures[4:]], SMALL)


def test_refuses_what_does_not_fit():
  with pytest.raises(errors.UserError, match=r"784 .* 768 or 800"):
    canvas.Layout(rows=1, cols=7, cell=(224, 112))
  with pytest.raises(errors.UserError, match="positive"):
    canvas.Layout(rows=0)
  with pytest.raises(errors.UserError, match="128 x 96"):
    canvas.cut(np.zeros((128, 128, 3)), SMALL)
