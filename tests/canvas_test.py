"""The canvas: which pixel belongs to whom, and the maps that steer it."""

import cv2
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


@pytest.mark.parametrize("line_width", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize(
  "layout",
  [
    canvas.Layout(),
    canvas.Layout(2, 3, (96, 48), 16),
    canvas.Layout(1, 1, (31, 17), 1),
    canvas.Layout(3, 14, (64, 32), 32),
  ],
  ids=str,
)
def test_edges_close_every_cell_and_lie_around_its_borders(layout, line_width):
  """By hand: a frame of one pixel where a block begins, and nothing else."""
  grid = canvas.grid_map(layout, line_width=line_width)
  lines = canvas.line_map(grid)
  assert lines.shape == (*layout.size, 3)
  before, after = line_width // 2, (line_width + 1) // 2
  expected = np.zeros(layout.size, np.uint8)
  (height, width), (rows, cols) = layout.cell, (layout.rows, layout.cols)
  for row in range(rows):
    top = row * height + after
    low = (row + 1) * height - (before if row < rows - 1 else after) - 1
    for col in range(cols):
      left = col * width + after
      right = (col + 1) * width - (before if col < cols - 1 else after) - 1
      expected[[top, low], left : right + 1] = 255
      expected[top : low + 1, [left, right]] = 255
  np.testing.assert_array_equal(lines, np.repeat(expected[..., None], 3, -1))
  # No way leads out of a cell but over its frame.
  dark = (lines[..., 0] == 0).astype(np.uint8)
  _, regions = cv2.connectedComponents(dark, connectivity=8)
  middles = canvas.cut(regions[..., None], layout)[:, height // 2, width // 2]
  assert len(np.unique(middles)) == layout.num_cells
  if line_width % 2 == 0:  # As far on one side of a border as on the other.
    np.testing.assert_array_equal(lines, lines[::-1, ::-1])


def test_edges_of_other_pictures_are_opencvs():
  """Without pure black beside pure white, as in a photograph."""
  rng = np.random.default_rng(0)
  picture = np.kron(
    rng.integers(1, 255, (6, 5, 3), dtype=np.uint8),
    np.ones((8, 8, 1), np.uint8),
  )
  grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
  edges = cv2.Canny(grey, 100, 200)
  assert edges.any()
  for i in range(3):
    np.testing.assert_array_equal(canvas.line_map(picture)[..., i], edges)


def test_thresholds_above_a_step_find_no_edges():
  grid = canvas.grid_map(SMALL)
  assert not canvas.line_map(grid, high=1021).any()
  assert canvas.line_map(grid, low=500, high=1000).any()
  assert not canvas.line_map(canvas.grid_map(SMALL, line_width=0)).any()


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
  with pytest.raises(errors.UserError, match=r"line_width=32: .*narrower"):
    canvas.grid_map(SMALL, line_width=32)
  with pytest.raises(errors.UserError, match="128 x 96"):
    canvas.cut(np.zeros((128, 128, 3)), SMALL)
