"""Which cells are thrown away, and why.

The paper cuts 42 cells per person and publishes 19.7 of them, without saying
which. Each rule here is one number; the first that a cell breaks is its
reason, and counted as such in the manifest.
"""

from collections.abc import Sequence
import dataclasses
from typing import get_args, Literal

import cv2
import numpy as np

from dppp_jax import errors
from dppp_jax.geneperson import poses

Reason = Literal[
  "empty", "small", "large", "several", "cut", "blurred", "pose", "duplicate"
]
REASONS: tuple[str, ...] = get_args(Reason)
_INSIDE = 0.5  # Alpha from which a pixel is the person's.
_NAMES = poses.KEYPOINTS
# All points; those of the head; knees and ankles.
_PARTS = (
  np.ones(len(_NAMES), bool),
  np.array([name.endswith(("nose", "eye", "ear")) for name in _NAMES]),
  np.array([name.endswith(("knee", "ankle")) for name in _NAMES]),
)
_THUMBNAIL = (32, 16)  # (height, width) at which cells are compared.


@dataclasses.dataclass(frozen=True)
class Rules:
  """Bounds of a good cell; None switches a rule off.

  Attributes:
    min_peak: highest probability of the matting network, else "empty".
    min_area: share of the cell that the matte covers, else "small".
    max_area: likewise, else "large" (the matte took the ground).
    max_second: second largest piece of the matte over the largest, else
      "several" (people, or a person and a ghost).
    max_border: share of the left, the right or the upper border of the cell
      that lies in the matte, else "cut".
    max_feet: likewise of the lower border, where feet may stand.
    min_sharpness: see `sharpness`, else "blurred".
    min_agreement: share of the skeleton's visible points that lie in the
      matte, of all points, of the head's and of the legs' the least, else
      "pose": a head or legs are missing, or stand elsewhere. Off where cells
      have no skeletons.
    min_difference: mean difference of thumbnails, 0..255, from every earlier
      cell that is kept, else "duplicate".
  """

  min_peak: float | None = 0.5
  min_area: float | None = 0.08
  max_area: float | None = 0.75
  max_second: float | None = 0.12
  max_border: float | None = 0.1
  max_feet: float | None = 0.5
  min_sharpness: float | None = 0.025
  min_agreement: float | None = None
  min_difference: float | None = 3.0


def judge(
  cells: np.ndarray,
  alpha: np.ndarray,
  *,
  peak: np.ndarray | None = None,
  skeletons: Sequence[poses.Keypoints] | None = None,
  rules: Rules | None = None,
) -> list[Reason | None]:
  """Judges the cells of one canvas.

  Args:
    cells: uint8 [N, H, W, 3] as generated, before fusion.
    alpha: uint8 [N, H, W], their mattes.
    peak: float [N] of matting.Mattes; without it a matte that is all zero is
      empty.
    skeletons: the key points that each cell was asked to show.
    rules: the bounds.

  Returns:
    Per cell the reason for throwing it away, or None.

  Raises:
    errors.UserError: `min_agreement` without skeletons, or another number of
      anything than of cells.
  """
  rules = rules or Rules()
  if rules.min_agreement is not None and skeletons is None:
    raise errors.UserError(
      "min_agreement is set, but the cells have no skeletons: set it to None"
    )
  counts = {len(x) for x in (cells, alpha, peak, skeletons) if x is not None}
  if len(counts) > 1:
    raise errors.UserError(
      f"cells, mattes, peaks and skeletons differ in number: {sorted(counts)}"
    )
  reasons: list[Reason | None] = []
  kept: list[np.ndarray] = []
  for i, (cell, matte) in enumerate(zip(cells, alpha, strict=True)):
    sure = float(peak[i]) if peak is not None else float(matte.any())
    reason = _judge(
      cell, matte, sure, skeletons[i] if skeletons else None, rules
    )
    if reason is None and rules.min_difference is not None:
      small = _thumbnail(cell, matte)
      if any(np.abs(small - x).mean() < rules.min_difference for x in kept):
        reason = "duplicate"
      else:
        kept.append(small)
    reasons.append(reason)
  return reasons


def _judge(
  cell: np.ndarray,
  matte: np.ndarray,
  peak: float,
  skeleton: poses.Keypoints | None,
  rules: Rules,
) -> Reason | None:
  """Applies all rules that look at one cell alone."""
  breaks_below = lambda value, bound: bound is not None and value < bound
  breaks_above = lambda value, bound: bound is not None and value > bound
  if breaks_below(peak, rules.min_peak):
    return "empty"
  inside = matte >= 255 * _INSIDE
  area = inside.mean()
  if breaks_below(area, rules.min_area):
    return "small"
  if breaks_above(area, rules.max_area):
    return "large"
  if breaks_above(_second_piece(inside), rules.max_second):
    return "several"
  sides = (inside[:, 0], inside[:, -1], inside[0])
  if breaks_above(max(side.mean() for side in sides), rules.max_border):
    return "cut"
  if breaks_above(inside[-1].mean(), rules.max_feet):
    return "cut"
  if breaks_below(sharpness(cell, inside), rules.min_sharpness):
    return "blurred"
  if skeleton is not None and breaks_below(
    least_agreement(skeleton, inside), rules.min_agreement
  ):
    return "pose"
  return None


def sharpness(cell: np.ndarray, inside: np.ndarray) -> float:
  """Returns the variance of the Laplacian over that of the grey values.

  The quotient does not depend on contrast, so dark clothes are not blurred. It
  is counted in units of a cell of 256 rows, so that one bound serves cells of
  any size: a blur by 2 % of the height gives up to 0.02, a drawn person 0.03
  and more.

  Args:
    cell: uint8 [H, W, 3].
    inside: bool [H, W]; its outline is left out, because it is as sharp as the
      ground behind lets it be.
  """
  grey = cv2.cvtColor(cell, cv2.COLOR_RGB2GRAY).astype(np.float32)
  core = cv2.erode(inside.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
  if not core.any():
    return 0.0
  edges = cv2.Laplacian(grey, cv2.CV_32F)
  scale = (cell.shape[0] / 256) ** 2
  return float(scale * edges[core].var() / (grey[core].var() + 1.0))


def agreement(skeleton: poses.Keypoints, inside: np.ndarray) -> float:
  """Returns the share of visible points that lie in the matte or beside it."""
  agreeing = _agreeing(skeleton, inside)[skeleton.visible]
  return float(agreeing.mean()) if len(agreeing) else 0.0


def least_agreement(skeleton: poses.Keypoints, inside: np.ndarray) -> float:
  """Returns `agreement` of all points, of the head or of the legs: the least.

  A head is five points of eighteen, so that a figure without one agrees in
  three quarters of its points.
  """
  agreeing = _agreeing(skeleton, inside)
  shares = [
    float(agreeing[part & skeleton.visible].mean())
    for part in _PARTS
    if (part & skeleton.visible).any()
  ]
  return min(shares, default=0.0)


def _agreeing(skeleton: poses.Keypoints, inside: np.ndarray) -> np.ndarray:
  """Returns bool [18], which points lie in the matte or beside it."""
  height, width = inside.shape
  reach = max(1, round(0.015 * height))
  size = 2 * reach + 1
  kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
  wide = cv2.dilate(inside.astype(np.uint8), kernel) > 0
  x, y = np.floor(skeleton.xy).astype(int).T
  on_cell = (x >= 0) & (x < width) & (y >= 0) & (y < height)
  return on_cell & wide[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]


def _second_piece(inside: np.ndarray) -> float:
  """Returns the area of the second largest piece over the largest one's."""
  _, _, stats, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8))
  areas = np.sort(stats[1:, cv2.CC_STAT_AREA])[::-1]
  return float(areas[1] / areas[0]) if len(areas) > 1 else 0.0


def _thumbnail(cell: np.ndarray, matte: np.ndarray) -> np.ndarray:
  """Returns the person on grey, small, float32 [32, 16, 3]."""
  cover = matte[..., None].astype(np.float32) / 255
  person = cover * cell + (1 - cover) * 128
  return cv2.resize(
    person, _THUMBNAIL[::-1], interpolation=cv2.INTER_AREA
  ).astype(np.float32)
