"""One canvas, many cells: the maps that steer it, and cutting it up."""

from collections.abc import Sequence
import dataclasses

import cv2
import numpy as np

from dppp_jax import errors, types
from dppp_jax.geneperson import poses

STEP = 4 * 255  # Canny's gradient where white lies beside black.


@dataclasses.dataclass(frozen=True)
class Layout:
  """How cells lie on a canvas; cell i is in row i // cols.

  Attributes:
    rows: cells from top to bottom.
    cols: cells from left to right.
    cell: (height, width) of each, pixels.
    multiple: what both sides of the canvas must divide by. 32 for SDXL: the
      VAE shrinks by 8, the UNet by 4 more.
  """

  rows: int = 6
  cols: int = 7
  cell: tuple[int, int] = (256, 128)
  multiple: int = 32

  def __post_init__(self):
    values = (self.rows, self.cols, *self.cell, self.multiple)
    if min(values) < 1:
      raise errors.UserError(
        f"a canvas of {self.rows} x {self.cols} cells of {self.cell} pixels is"
        " empty: all numbers must be positive"
      )
    for side, size in zip(("high", "wide"), self.size, strict=True):
      if size % self.multiple:
        low = size - size % self.multiple
        raise errors.UserError(
          f"the canvas would be {size} pixels {side}, which is no multiple of"
          f" {self.multiple}: choose cells that make it"
          f" {low or self.multiple} or {low + self.multiple}"
        )

  @property
  def size(self) -> tuple[int, int]:
    """(height, width) of the canvas, pixels."""
    return self.rows * self.cell[0], self.cols * self.cell[1]

  @property
  def num_cells(self) -> int:
    """Number of cells."""
    return self.rows * self.cols


def cut(canvas: types.Array, layout: Layout) -> types.Array:
  """Cuts canvases into their cells.

  Args:
    canvas: [*b, H, W, C], NumPy or JAX.
    layout: of the cells.

  Returns:
    [*b, N, h, w, C], row by row.

  Raises:
    errors.UserError: the canvas has another size.
  """
  *batch, height, width, channels = canvas.shape
  if (height, width) != layout.size:
    raise errors.UserError(
      f"a canvas of {height} x {width} pixels does not cut into"
      f" {layout.rows} x {layout.cols} cells of {layout.cell}: it should be"
      f" {layout.size[0]} x {layout.size[1]}"
    )
  h, w = layout.cell
  cells = canvas.reshape(*batch, layout.rows, h, layout.cols, w, channels)
  cells = cells.swapaxes(-4, -3)
  return cells.reshape(*batch, layout.num_cells, h, w, channels)


def join(cells: types.Array, layout: Layout) -> types.Array:
  """Puts cells [*b, N, h, w, C] on canvases [*b, H, W, C]: undoes `cut`."""
  *batch, _, h, w, channels = cells.shape
  grid = cells.reshape(*batch, layout.rows, layout.cols, h, w, channels)
  grid = grid.swapaxes(-4, -3)
  return grid.reshape(*batch, *layout.size, channels)


def grid_map(layout: Layout, *, line_width: int = 2) -> np.ndarray:
  """Draws the grid of equal blocks: black lines between and around white ones.

  Args:
    layout: of the cells.
    line_width: pixels; a line lies with one half on either side of a border,
      on the edge of the canvas with the half that is inside. 0: no lines.

  Returns:
    uint8 [H, W, 3].

  Raises:
    errors.UserError: the lines are as wide as the cells.
  """
  if line_width >= min(layout.cell):
    raise errors.UserError(
      f"line_width={line_width}: lines must be narrower than the cells of"
      f" {layout.cell} pixels"
    )
  height, width = layout.size
  grid = np.full((height, width, 3), 255, np.uint8)
  before, after = line_width // 2, line_width - line_width // 2
  for size, step, axis in (
    (height, layout.cell[0], 0),
    (width, layout.cell[1], 1),
  ):
    lines = grid if axis == 0 else grid.swapaxes(0, 1)
    lines[:after] = lines[size - after :] = 0
    for at in range(step, size, step):
      lines[at - before : at + after] = 0
  return grid


def line_map(
  picture: np.ndarray, *, low: float = 100, high: float = 200
) -> np.ndarray:
  """Returns the Canny edges of a picture, white on black.

  OpenCV puts the edge between pure black and pure white on either side of the
  step, keeps one side of a line of two pixels, and leaves corners open. So an
  edge between these two is laid on the white pixels along it: on a grid a
  closed frame in every block, equally far from the borders on all sides.

  Args:
    picture: uint8 [H, W, 3], e.g. of `grid_map`.
    low: threshold of weak edges, which count where they touch a strong one.
    high: threshold of strong ones.

  Returns:
    uint8 [H, W, 3], as a Canny ControlNet was trained with.
  """
  grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
  edges = cv2.Canny(grey, low, high)
  around = np.ones((3, 3), np.uint8)
  steps = (grey == 255) & (cv2.erode(grey, around) == 0)
  edges[cv2.dilate(steps.astype(np.uint8), around) > 0] = 0
  if max(low, high) < STEP:
    edges[steps] = 255
  return np.repeat(edges[..., None], 3, axis=-1)


def skeleton_map(
  figures: Sequence[poses.Keypoints], layout: Layout
) -> np.ndarray:
  """Draws one skeleton into every cell.

  Args:
    figures: key points in pixels of their own cell, row by row.
    layout: of the cells.

  Returns:
    uint8 [H, W, 3], as an OpenPose ControlNet was trained with.

  Raises:
    errors.UserError: another number of figures than of cells, or one that
      stands out of its cell (its neighbour would get a third arm).
  """
  if len(figures) != layout.num_cells:
    raise errors.UserError(
      f"{len(figures)} skeletons for {layout.num_cells} cells: give one each"
    )
  height, width = layout.cell
  for i, figure in enumerate(figures):
    seen = figure.xy[figure.visible]
    inside = (seen >= 0).all() and (seen <= (width, height)).all()
    if not inside or not len(seen):
      raise errors.UserError(
        f"skeleton {i} does not stand within its cell of {height} x {width}"
        " pixels: place it with poses.fit"
      )
  drawn = [poses.draw(figure, size=layout.cell) for figure in figures]
  return join(np.stack(drawn), layout)
