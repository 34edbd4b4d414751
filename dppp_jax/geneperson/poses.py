"""A walking figure in three dimensions, its COCO-18 key points, its drawing.

Units: one is the height of the body. Body frame: x to the figure's own left, y
up from the ground, z forward. An azimuth of 0 shows the face, 90 walks to the
right edge of the picture, 180 shows the back; a positive elevation looks down.
"""

import dataclasses
from typing import Literal

import cv2
import numpy as np

ViewName = Literal["front", "side", "back"]

# The eighteen points in OpenPose's COCO order, then what drawing needs besides.
KEYPOINTS = (
    "nose", "neck",
    "right_shoulder", "right_elbow", "right_wrist",
    "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle",
    "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip
EXTRA = (
    "head", "pelvis",
    "right_heel", "right_toe", "left_heel", "left_toe",
    "right_hand", "left_hand",
)  # fmt: skip
INDEX = {name: i for i, name in enumerate(KEYPOINTS + EXTRA)}

# Pairs of key points in the order in which OpenPose draws them.
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
COLORS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0),
    (85, 255, 0), (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255),
    (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255),
    (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip

# Lengths in body heights.
THIGH, SHANK, UPPER_ARM, FOREARM = 0.245, 0.245, 0.170, 0.145
ANKLE_HEIGHT, TRUNK, NECK_TO_HEAD = 0.040, 0.295, 0.103
_SUBPIXEL = 4  # bits of cv2's fixed-point coordinates


@dataclasses.dataclass(frozen=True)
class Build:
  """Proportions of one body, in body heights.

  Attributes:
    shoulder: half the distance between the shoulder joints.
    hip: half the distance between the hip joints.
    girth: factor on the thickness of trunk and limbs (used by drawing).
  """

  shoulder: float = 0.105
  hip: float = 0.048
  girth: float = 1.0


@dataclasses.dataclass(frozen=True)
class Gait:
  """One instant of a walk.

  Attributes:
    phase: fraction of the cycle, 0 with the left leg foremost.
    stride: factor on the swing of legs and arms; 0 stands.
    spread: angle of the arms away from the trunk, degrees.
    elbow: bend of the elbows at rest, degrees.
  """

  phase: float = 0.0
  stride: float = 1.0
  spread: float = 8.0
  elbow: float = 14.0


@dataclasses.dataclass(frozen=True)
class View:
  """From where the figure is seen, degrees."""

  azimuth: float = 0.0
  elevation: float = 0.0

  @property
  def name(self) -> ViewName:
    """The word for the azimuth: quarters centred on 0, 90, 180 and 270."""
    turned = abs((self.azimuth + 180.0) % 360.0 - 180.0)
    return "front" if turned < 45 else "side" if turned < 135 else "back"


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the figure stands in the picture.

  Attributes:
    scale: pixels for one body height.
    x: column of the point of the ground between the feet, pixels.
    y: row of that point, pixels.
  """

  scale: float
  x: float
  y: float


@dataclasses.dataclass(frozen=True)
class Keypoints:
  """The eighteen COCO points of one figure in one picture.

  Attributes:
    xy: float64 [18, 2] pixels; (0, 0) is the corner of the first pixel.
    depth: float64 [18] body heights away from the viewer, ground point = 0.
    visible: bool [18].
  """

  xy: np.ndarray
  depth: np.ndarray
  visible: np.ndarray


# The poses a dataset numbers: eight instants of a walk, then two ways to stand.
POSES: tuple[tuple[str, Gait], ...] = (
  *(("walking", Gait(phase=k / 8)) for k in range(8)),
  ("standing", Gait(phase=0.25, stride=0.0, spread=7.0, elbow=8.0)),
  ("standing", Gait(phase=0.05, stride=0.22, spread=10.0, elbow=22.0)),
)


def joints(gait: Gait, build: Build) -> np.ndarray:
  """Returns the points of the body, KEYPOINTS then EXTRA.

  The foot that is lower touches the ground; all limb lengths are constant.

  Args:
    gait: the instant of the walk.
    build: the proportions.

  Returns:
    float64 [26, 3] in the body frame.
  """
  cycle = 2.0 * np.pi * gait.phase
  points = np.zeros((len(INDEX), 3))
  lowest = 0.0
  for name, side, swing in (("left", 1.0, 0.0), ("right", -1.0, np.pi)):
    here = cycle + swing
    # The knee bends while the leg swings forward, that is while -sin > 0.
    lift = max(0.0, -np.sin(here)) ** 1.5
    hip = np.radians(2.0 + gait.stride * 24.0 * np.cos(here))
    knee = np.radians(4.0 + gait.stride * (6.0 + 44.0 * lift))
    hip_at = np.array([side * build.hip, 0.0, 0.0])
    knee_at = hip_at + THIGH * _swung(hip)
    ankle_at = knee_at + SHANK * _swung(hip - knee)
    # The foot stays level on the ground and points down behind the body.
    pitch = 0.55 * min(0.0, hip - knee + 0.15)
    ahead = np.array([0.0, np.sin(pitch), np.cos(pitch)])
    below = np.array([0.0, -np.cos(pitch), np.sin(pitch)])
    splay = np.array([side * 0.14, 0.0, 0.0])
    heel_at = ankle_at + 0.022 * below - 0.020 * ahead
    toe_at = ankle_at + 0.024 * below + 0.085 * (ahead + splay)
    shoulder_at = np.array([side * build.shoulder, TRUNK - 0.032, 0.0])
    arm = np.radians(-gait.stride * 24.0 * np.cos(here))
    bend = np.radians(gait.elbow + gait.stride * (10.0 - 16.0 * np.cos(here)))
    out = np.radians(gait.spread) * side
    elbow_at = shoulder_at + UPPER_ARM * _swung(arm, out)
    wrist_at = elbow_at + FOREARM * _swung(arm + bend, 0.4 * out)
    hand_at = wrist_at + 0.045 * _swung(arm + 1.3 * bend, 0.0)
    for part, at in (
        ("hip", hip_at), ("knee", knee_at), ("ankle", ankle_at),
        ("heel", heel_at), ("toe", toe_at), ("shoulder", shoulder_at),
        ("elbow", elbow_at), ("wrist", wrist_at), ("hand", hand_at),
    ):  # fmt: skip
      points[INDEX[f"{name}_{part}"]] = at
    lowest = min(lowest, ankle_at[1])
  lean = 0.018 * gait.stride
  points[INDEX["neck"]] = (0.0, TRUNK, lean)
  points[[INDEX["left_shoulder"], INDEX["right_shoulder"]], 2] += lean
  for arm_part in ("elbow", "wrist", "hand"):
    points[[INDEX[f"left_{arm_part}"], INDEX[f"right_{arm_part}"]], 2] += lean
  head = np.array([0.0, TRUNK + NECK_TO_HEAD, lean + 0.012])
  points[INDEX["head"]] = head
  points[INDEX["nose"]] = head + np.array((0.0, -0.008, 0.062))
  for side, name in ((1.0, "left"), (-1.0, "right")):
    points[INDEX[f"{name}_eye"]] = head + np.array((side * 0.021, 0.010, 0.052))
    points[INDEX[f"{name}_ear"]] = head + np.array((side * 0.050, -0.004, 0.0))
  points[:, 1] += ANKLE_HEIGHT - lowest
  return points


def rotation(view: View) -> np.ndarray:
  """Returns the matrix [3, 3] from the body frame to (right, up, nearer)."""
  a, e = np.radians(view.azimuth), np.radians(view.elevation)
  ca, sa, ce, se = np.cos(a), np.sin(a), np.cos(e), np.sin(e)
  return np.array(
    [
      [ca, 0.0, sa],
      [se * sa, ce, -se * ca],
      [-ce * sa, se, ce * ca],
    ]
  )


def project(
  points: np.ndarray, view: View, *, placement: Placement
) -> tuple[np.ndarray, np.ndarray]:
  """Projects points of the body frame (orthographic).

  Args:
    points: float [N, 3] in body heights.
    view: azimuth and elevation.
    placement: scale and position in the picture.

  Returns:
    xy float64 [N, 2] in pixels and depth float64 [N] in body heights, which
    grows away from the viewer.
  """
  seen = points @ rotation(view).T
  xy = np.stack(
    [
      placement.x + placement.scale * seen[:, 0],
      placement.y - placement.scale * seen[:, 1],
    ],
    axis=1,
  )
  return xy, -seen[:, 2]


def fit(
  size: tuple[int, int],
  view: View,
  *,
  fill: float = 0.93,
  shift: tuple[float, float] = (0.0, 0.0),
) -> Placement:
  """Returns the placement that lets a figure fill a cell.

  Args:
    size: (height, width) of the cell, pixels.
    view: from where the figure is seen.
    fill: share of the cell's height that the figure takes.
    shift: (right, down) displacement as shares of width and height.
  """
  height, width = size
  e = np.radians(view.elevation)
  # Seen from above the body shortens and the feet spread down the picture.
  above, below = 1.02 * np.cos(e) + 0.08 * np.sin(e), 0.02 + 0.22 * np.sin(e)
  # Half the width of a full stride: steps from the side, shoulders from the
  # front, and feet that point outwards in between.
  turn = np.radians(view.azimuth)
  s, c = abs(np.sin(turn)), abs(np.cos(turn))
  reach = np.sqrt((0.283 * s) ** 2 + (0.139 * c) ** 2 + 0.067 * s * c)
  scale = min(fill * height / (above + below), 0.5 * width / reach)
  margin = 0.5 * (height - scale * (above + below))
  return Placement(
    scale=float(scale),
    x=width * (0.5 + shift[0]),
    y=float(height * (1.0 + shift[1]) - margin - scale * below),
  )


def keypoints(
  gait: Gait, build: Build, view: View, *, placement: Placement
) -> Keypoints:
  """Returns the projected COCO-18 key points of a figure."""
  return seen(joints(gait, build), view, placement=placement)


def seen(points: np.ndarray, view: View, *, placement: Placement) -> Keypoints:
  """Returns the key points of a body whose joints are known already.

  Args:
    points: float [26, 3] as `joints` returns them.
    view: from where the figure is seen.
    placement: where it stands.
  """
  count = len(KEYPOINTS)
  xy, depth = project(points[:count], view, placement=placement)
  matrix = rotation(view)
  visible = np.ones(count, bool)
  # A point of the head hides when the skull is between it and the viewer.
  for name, limit in (
      ("nose", -0.1), ("left_eye", 0.05), ("right_eye", 0.05),
      ("left_ear", -0.5), ("right_ear", -0.5),
  ):  # fmt: skip
    away = points[INDEX[name]] - points[INDEX["head"]]
    nearer = float(matrix[2] @ away) / float(np.linalg.norm(away))
    visible[INDEX[name]] = nearer > limit
  # An arm hides when the trunk or the top of the thighs is before it.
  across = abs(matrix[0, 0]) * 0.095 + abs(matrix[0, 2]) * 0.060
  trunk = 0.5 * (xy[INDEX["right_hip"]] + xy[INDEX["left_hip"]])
  neck = xy[INDEX["neck"]]
  behind = 0.5 * (depth[INDEX["neck"]] + depth[INDEX["left_hip"]])
  for name in ("left_elbow", "left_wrist", "right_elbow", "right_wrist"):
    i = INDEX[name]
    inside = (
      abs(xy[i, 0] - 0.5 * (neck[0] + trunk[0])) < across * placement.scale
      and neck[1] < xy[i, 1] < trunk[1] + 0.09 * placement.scale
    )
    visible[i] = not (inside and depth[i] > behind + 0.04)
  # Who sees a wrist guesses the elbow: no wrist floats alone in the drawing.
  for side in ("left", "right"):
    visible[INDEX[f"{side}_elbow"]] |= visible[INDEX[f"{side}_wrist"]]
  return Keypoints(xy=xy, depth=depth, visible=visible)


def half_width(size: tuple[int, int]) -> float:
  """Returns half the width of sticks and dots in a drawing, pixels.

  Args:
    size: (height, width) of the drawing.
  """
  return max(0.9, 4.0 * max(size) / 512.0)


def draw(points: Keypoints, *, size: tuple[int, int]) -> np.ndarray:
  """Draws a skeleton as OpenPose does: its colours, order and thickness.

  Sticks are ellipses of 0.6 times the colour under full-coloured dots; both
  are four pixels in half-width at 512 pixels and shrink with the picture.

  Args:
    points: the key points; the hidden ones are left out with their sticks.
    size: (height, width) of the picture, pixels.

  Returns:
    uint8 [H, W, 3].
  """
  height, width = size
  # A thin stick has no colour at the size of a cell: three times finer.
  factor = 3 if height <= 256 else 1
  canvas = np.zeros((height * factor, width * factor, 3), np.uint8)
  half = factor * half_width(size)
  xy = points.xy * factor - 0.5
  one = 1 << _SUBPIXEL
  for color, (a, b) in zip(COLORS, LIMBS, strict=False):
    if not (points.visible[a] and points.visible[b]):
      continue
    center, along = 0.5 * (xy[a] + xy[b]), 0.5 * (xy[b] - xy[a])
    outline = cv2.ellipse2Poly(
        (0, 0),
        (round(float(np.hypot(*along)) * one), round(half * one)),
        round(float(np.degrees(np.arctan2(along[1], along[0])))),
        0, 360, 12,
    )  # fmt: skip
    outline = outline + np.rint(center * one).astype(np.int32)
    dimmed = [int(0.6 * c) for c in color]
    cv2.fillConvexPoly(canvas, outline, dimmed, cv2.LINE_AA, _SUBPIXEL)
  for i in np.flatnonzero(points.visible):
    x, y = (round(float(v) * one) for v in xy[i])
    cv2.circle(
      canvas, (x, y), round(half * one), COLORS[i], -1, cv2.LINE_AA, _SUBPIXEL
    )
  if factor == 1:
    return canvas
  return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)


def _swung(angle: float, out: float = 0.0) -> np.ndarray:
  """A unit vector that hangs down, swung forward and then out to the left."""
  return np.array(
    [
      np.sin(out),
      -np.cos(angle) * np.cos(out),
      np.sin(angle) * np.cos(out),
    ]
  )
