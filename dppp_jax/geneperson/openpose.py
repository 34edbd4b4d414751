"""Skeletons from the JSON files that OpenPose and its kin write.

    {"people": [{"pose_keypoints_2d": [x, y, confidence, ...]}],
     "canvas_width": 512, "canvas_height": 768}

Read are the 18 points of COCO (54 numbers) and the 25 of BODY-25 (75 numbers,
of which the middle of the hips and the feet are left out); hands and faces are
not. Coordinates are pixels or, where all are small, shares of the canvas from 0
to 1 or from -1 to 1 (OpenPose's --keypoint_scale 3 and 4).
"""

from collections.abc import Sequence
import dataclasses
import math
import pathlib
from typing import Any, Literal

import numpy as np

from dppp_jax import errors, files
from dppp_jax.geneperson import poses

Path = str | pathlib.Path
Several = Literal["largest", "refuse"]

# OpenPose itself draws no point of a body below this (its render_threshold).
THRESHOLD = 0.05
# Which of BODY-25's points are COCO's, in COCO's order.
_BODY_25 = (*range(8), *range(9, 15), *range(15, 19))
_LAYOUTS = {3 * 18: tuple(range(18)), 3 * 25: _BODY_25}
_HEAD = [poses.INDEX[n] for n in poses.KEYPOINTS if n.endswith(("eye", "ear"))]
_HEAD.append(poses.INDEX["nose"])
# What a body has beyond its points, and what it measures, in body heights.
_SKULL, _TOES, _FLESH = 0.085, 0.060, 0.030
_EYES_TO_ANKLES = 0.91
_MIN_POINTS = 3  # A stick and something to hold it against.


@dataclasses.dataclass(frozen=True)
class Skeleton:
  """A figure whose place in the picture is not decided yet.

  Attributes:
    points: COCO's eighteen, (x, y) in any unit; None is not seen.
    box: (left, top, right, bottom) of the whole body in the same unit: skull,
      feet and flesh reach beyond the points.
  """

  points: tuple[tuple[float, float] | None, ...]
  box: tuple[float, float, float, float]

  def place(
    self,
    size: tuple[int, int],
    *,
    fill: float = 0.93,
    shift: tuple[float, float] = (0.0, 0.0),
  ) -> poses.Keypoints:
    """Returns the points in a cell, in the middle, as large as it goes.

    Args:
      size: (height, width) of the cell, pixels.
      fill: share of height and width that the box takes at most.
      shift: (right, down) displacement as shares of width and height.
    """
    left, top, right, bottom = self.box
    height, width = size
    scale = fill * min(height / (bottom - top), width / (right - left))
    center = np.array([left + right, top + bottom]) / 2
    to = np.array([width * (0.5 + shift[0]), height * (0.5 + shift[1])])
    visible = np.array([point is not None for point in self.points])
    xy = np.array([point or tuple(center) for point in self.points], float)
    return poses.Keypoints(
      xy=(xy - center) * scale + to, depth=np.zeros(18), visible=visible
    )


def read(
  path: Path, *, threshold: float = THRESHOLD, several: Several = "largest"
) -> Skeleton:
  """Reads the skeleton of a file.

  Args:
    path: of the JSON file.
    threshold: points of a lower confidence are not seen.
    several: what becomes of a file with several people: the "largest" one by
      the area of its points is taken, or the file is "refuse"d.

  Raises:
    errors.UserError: the file is missing, no JSON, or holds no person that can
      be drawn.
  """
  path = pathlib.Path(path)
  values = _load(path)
  given = _people(values, path)
  people = [_points(person, path, threshold) for person in given]
  people = [p for p in people if p[1].sum() >= _MIN_POINTS]
  if not people:
    raise errors.UserError(
      f"{path} shows no person (none has {_MIN_POINTS} points of confidence"
      f" {threshold:g} or more): lower the threshold, or use another file"
    )
  if len(people) > 1 and several == "refuse":
    raise errors.UserError(
      f"{path} shows {len(people)} people: leave one of them in it, or let the"
      " largest be taken"
    )
  xy, seen = max(people, key=lambda person: _area(*person))
  xy = xy * _unit(values, xy[seen], path)
  return Skeleton(
    points=tuple(
      (float(x), float(y)) if visible else None
      for (x, y), visible in zip(xy, seen, strict=True)
    ),
    box=_box(xy, seen),
  )


def azimuth(skeleton: Skeleton, *, build: poses.Build | None = None) -> float:
  """Estimates from where a figure is seen; see `poses.View`.

  The width of the shoulders (of the hips, where a shoulder is hidden) over the
  length of the trunk is the cosine, and negative from behind, where the left
  one lies left of the right one. The nose, or what else is seen of the head,
  lies on that side of the neck to which the figure walks, and so gives the
  sign of the sine. Where no such pair is seen, the face decides: nose and both
  eyes are a front, ears without a nose are a back, all else is a side.

  Args:
    skeleton: of the figure.
    build: whose proportions are taken for the figure's.

  Returns:
    Degrees, 0 <= azimuth < 360.
  """
  build = build or poses.Build()
  at = lambda name: skeleton.points[poses.INDEX[name]]
  trunk = _trunk(skeleton)
  cosine = None
  for part, half in (("shoulder", build.shoulder), ("hip", build.hip)):
    left, right = at(f"left_{part}"), at(f"right_{part}")
    if left and right and trunk:
      width = (left[0] - right[0]) / trunk
      cosine = float(np.clip(width / (2 * half / poses.TRUNK), -1, 1))
      break
  if cosine is None:
    if at("nose") and at("left_eye") and at("right_eye"):
      cosine = 1.0
    elif not at("nose") and (at("left_ear") or at("right_ear")):
      cosine = -1.0
    else:
      cosine = 0.0
  turned = math.degrees(math.acos(cosine))
  return turned if _walks_right(skeleton) else (360.0 - turned) % 360.0


def _walks_right(skeleton: Skeleton) -> bool:
  """Tells on which side of the neck the head lies."""
  neck = skeleton.points[poses.INDEX["neck"]]
  nose = skeleton.points[poses.INDEX["nose"]]
  head = [nose] if nose else [p for i in _HEAD if (p := skeleton.points[i])]
  if not head:
    return True
  others = [p for p in skeleton.points if p and p not in head]
  x = neck[0] if neck else np.mean([p[0] for p in others or head])
  return float(np.mean([p[0] for p in head])) >= float(x)


def _trunk(skeleton: Skeleton) -> float | None:
  """Returns the distance from the neck to the middle of the hips."""
  neck = skeleton.points[poses.INDEX["neck"]]
  names = ("left_hip", "right_hip")
  hips = [p for n in names if (p := skeleton.points[poses.INDEX[n]])]
  if neck is None or not hips:
    return None
  return math.dist(neck, np.mean(hips, axis=0)) or None


def _load(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise errors.UserError(
      f"{path} does not exist: give a JSON file of OpenPose, or a folder of"
      " them"
    )
  wanted = "write it with OpenPose's --write_json, or with an editor of poses"
  values = files.read_json(path, wanted=wanted)
  if isinstance(values, list):  # Editors for videos: a list of frames.
    if len(values) != 1:
      raise errors.UserError(
        f"{path} holds {len(values)} frames: give each a file of its own"
      )
    values = values[0]
  if not isinstance(values, dict):
    raise errors.UserError(
      f"{path} holds no JSON object with people: give a JSON file of OpenPose"
    )
  return values


def _people(values: dict[str, Any], path: pathlib.Path) -> list[Any]:
  people = values.get("people")
  is_list = isinstance(people, list)
  if not is_list or not all(isinstance(person, dict) for person in people):
    raise errors.UserError(
      f"{path} has no list of people: give a JSON file of OpenPose"
    )
  if not people:
    raise errors.UserError(
      f"{path} shows no person (people is empty): use another file"
    )
  return people


def _points(
  person: dict[str, Any], path: pathlib.Path, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns float64 [18, 2] and which of them are seen, bool [18]."""
  numbers = person.get("pose_keypoints_2d")
  if numbers is None:
    raise errors.UserError(
      f"{path} has a person without pose_keypoints_2d: give a JSON file of"
      " OpenPose"
    )
  is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str)
  if not is_list or len(numbers) not in _LAYOUTS:
    count = len(numbers) if is_list else "no"
    raise errors.UserError(
      f"{path}: pose_keypoints_2d has {count} numbers: 54 (COCO, 18 points) or"
      " 75 (BODY-25) are wanted, x, y and confidence of each"
    )
  try:
    table = np.array(numbers, np.float64).reshape(-1, 3)
  except (TypeError, ValueError) as error:
    raise errors.UserError(
      f"{path}: pose_keypoints_2d holds something else than numbers: write x, y"
      " and confidence 0 for a point that is not seen"
    ) from error
  if not np.isfinite(table).all():
    raise errors.UserError(
      f"{path}: pose_keypoints_2d holds NaN or infinity: write x, y and"
      " confidence 0 for a point that is not seen"
    )
  table = table[list(_LAYOUTS[len(numbers)])]
  # A confidence of 0 is OpenPose's word for a point that it did not find.
  seen = (table[:, 2] >= threshold) & (table[:, 2] > 0)
  return table[:, :2], seen


def _area(xy: np.ndarray, seen: np.ndarray) -> float:
  return float(np.prod(np.ptp(xy[seen], axis=0)))


def _unit(
  values: dict[str, Any], xy: np.ndarray, path: pathlib.Path
) -> np.ndarray:
  """Returns the factors (x, y) that make coordinates pixels."""
  # Points may lie a little off the canvas; a figure of two pixels is none.
  if np.abs(xy).max() > 2:
    return np.ones(2)
  sides = [values.get(name) for name in ("canvas_width", "canvas_height")]
  is_size = all(
    isinstance(n, int | float) and math.isfinite(n) and n > 0 for n in sides
  )
  if not is_size:
    raise errors.UserError(
      f"{path} has coordinates of -1 or 0 to 1 and no canvas_width and"
      " canvas_height, without which nobody knows how wide the figure is: add"
      " them, or write pixels"
    )
  return np.array(sides, np.float64)


def _box(xy: np.ndarray, seen: np.ndarray) -> tuple[float, float, float, float]:
  """Returns what the whole body takes up; see `Skeleton`."""
  points = tuple(
    tuple(p) if s else None for p, s in zip(xy.tolist(), seen, strict=True)
  )
  low, high = xy[seen].min(0), xy[seen].max(0)
  trunk = _trunk(Skeleton(points, (0, 0, 1, 1))) or 0.0
  unit = max(trunk / poses.TRUNK, (high[1] - low[1]) / _EYES_TO_ANKLES)
  unit = unit or float(high[0] - low[0]) or 1.0
  head = [xy[i, 1] - _SKULL * unit for i in _HEAD if seen[i]]
  names = ("left_ankle", "right_ankle")
  feet = [poses.INDEX[name] for name in names]
  feet = [xy[i, 1] + _TOES * unit for i in feet if seen[i]]
  flesh = _FLESH * unit
  return (
    float(low[0] - flesh),
    float(min([low[1] - flesh, *head])),
    float(high[0] + flesh),
    float(max([high[1] + flesh, *feet])),
  )
