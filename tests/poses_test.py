import math

import cv2
import numpy as np
import pytest

from dppp_jax.geneperson import poses

_I = poses.INDEX
_BUILD = poses.Build()
_LENGTHS = (
  ("hip", "knee", 0.245),
  ("knee", "ankle", 0.245),
  ("shoulder", "elbow", 0.170),
  ("elbow", "wrist", 0.145),
)


def _view_by_hand(point, azimuth, elevation):
  """Turns the figure, then tips the camera, with plain trigonometry."""
  x, y, z = point
  a, e = math.radians(azimuth), math.radians(elevation)
  right = x * math.cos(a) + z * math.sin(a)
  nearer = z * math.cos(a) - x * math.sin(a)
  up = y * math.cos(e) - nearer * math.sin(e)
  return right, up, nearer * math.cos(e) + y * math.sin(e)


@pytest.mark.parametrize("phase", [0.0, 0.2, 0.45, 0.7])
@pytest.mark.parametrize("stride", [0.0, 1.0])
def test_limbs_keep_their_lengths_in_every_instant(phase, stride):
  points = poses.joints(poses.Gait(phase=phase, stride=stride), _BUILD)
  for side in ("left", "right"):
    for start, end, length in _LENGTHS:
      got = np.linalg.norm(
        points[_I[f"{side}_{start}"]] - points[_I[f"{side}_{end}"]]
      )
      np.testing.assert_allclose(got, length, rtol=1e-12)


def test_lower_foot_stands_on_the_ground_and_the_head_is_at_one():
  for k in range(16):
    points = poses.joints(poses.Gait(phase=k / 16), _BUILD)
    ankles = points[[_I["left_ankle"], _I["right_ankle"]], 1]
    np.testing.assert_allclose(ankles.min(), poses.ANKLE_HEIGHT, rtol=1e-12)
    assert 0.95 < points[_I["head"], 1] + 0.071 < 1.03


def test_legs_and_arms_swing_against_each_other():
  points = poses.joints(poses.Gait(phase=0.0), _BUILD)
  ahead = lambda name: points[_I[name], 2]
  assert ahead("left_ankle") > 0.1 > -0.1 > ahead("right_ankle")
  assert ahead("left_wrist") < ahead("right_wrist")
  half = poses.joints(poses.Gait(phase=0.5), _BUILD)
  mirrored = half[_I["right_ankle"]] * (-1, 1, 1)
  np.testing.assert_allclose(points[_I["left_ankle"]], mirrored, atol=1e-12)


def test_the_knee_bends_while_the_leg_swings_forward():
  def bend(phase):
    p = poses.joints(poses.Gait(phase=phase), _BUILD)
    thigh = p[_I["left_knee"]] - p[_I["left_hip"]]
    shank = p[_I["left_ankle"]] - p[_I["left_knee"]]
    cosine = thigh @ shank / np.linalg.norm(thigh) / np.linalg.norm(shank)
    return math.degrees(math.acos(cosine))

  # Phase 0 is the left leg foremost; it comes forward from 0.5 to 1.
  assert bend(0.75) > 45 > 15 > bend(0.25)


@pytest.mark.parametrize("azimuth", [0, 37, 90, 180, 250])
@pytest.mark.parametrize("elevation", [0, 20])
def test_projection_is_the_one_of_the_formula(azimuth, elevation):
  view = poses.View(azimuth, elevation)
  gait = poses.Gait(phase=0.1)
  place = poses.Placement(scale=80.0, x=24.0, y=90.0)
  got = poses.keypoints(gait, _BUILD, view, placement=place)
  points = poses.joints(gait, _BUILD)
  for i in range(18):
    right, up, nearer = _view_by_hand(points[i], azimuth, elevation)
    np.testing.assert_allclose(
      got.xy[i], [24 + 80 * right, 90 - 80 * up], atol=1e-9
    )
    np.testing.assert_allclose(got.depth[i], -nearer, atol=1e-12)


def test_left_and_right_change_places_from_behind():
  gait = poses.Gait(phase=0.1)
  place = poses.Placement(scale=100.0, x=0.0, y=0.0)
  front = poses.keypoints(gait, _BUILD, poses.View(0), placement=place)
  back = poses.keypoints(gait, _BUILD, poses.View(180), placement=place)
  np.testing.assert_allclose(back.xy, front.xy * (-1, 1), atol=1e-9)
  # Who faces the viewer has the left shoulder at the right of the picture.
  left, right = _I["left_shoulder"], _I["right_shoulder"]
  assert front.xy[left, 0] > front.xy[right, 0]
  assert back.xy[left, 0] < back.xy[right, 0]


@pytest.mark.parametrize(
  ("azimuth", "seen", "hidden"),
  [
    (0, "nose left_eye right_eye left_ear right_ear", ""),
    (90, "nose right_eye right_ear", "left_ear left_eye"),
    (180, "left_ear right_ear", "nose left_eye right_eye"),
    (270, "nose left_eye left_ear", "right_ear right_eye"),
  ],
)
def test_face_points_hide_behind_the_skull(azimuth, seen, hidden):
  place = poses.Placement(scale=100.0, x=0.0, y=0.0)
  gait = poses.Gait(phase=0.25, stride=0.0)
  got = poses.keypoints(gait, _BUILD, poses.View(azimuth - 5), placement=place)
  other = poses.keypoints(
    gait, _BUILD, poses.View(azimuth + 5), placement=place
  )
  for name in seen.split():
    assert got.visible[_I[name]] or other.visible[_I[name]], name
  for name in hidden.split():
    assert not (got.visible[_I[name]] and other.visible[_I[name]]), name
  assert got.visible[1:3].all()


def test_far_arm_hides_behind_the_trunk():
  gait = poses.Gait(phase=0.25, stride=0.0, elbow=5.0, spread=2.0)
  place = poses.Placement(scale=100.0, x=0.0, y=0.0)
  got = poses.keypoints(gait, _BUILD, poses.View(90), placement=place)
  # Walking to the right edge, the figure shows its right arm.
  assert got.visible[_I["right_wrist"]] and got.visible[_I["right_elbow"]]
  assert not got.visible[_I["left_elbow"]]


@pytest.mark.parametrize(
  ("azimuth", "name"),
  [(0, "front"), (44, "front"), (316, "front"), (46, "side"), (134, "side"),
   (136, "back"), (180, "back"), (270, "side"), (-90, "side"), (400, "front")],
)  # fmt: skip
def test_view_names(azimuth, name):
  assert poses.View(azimuth).name == name


@pytest.mark.parametrize("size", [(96, 48), (256, 128), (128, 128)])
@pytest.mark.parametrize("elevation", [0, 15, 30])
def test_fit_keeps_the_figure_in_its_cell(size, elevation):
  for azimuth in range(0, 360, 45):
    view = poses.View(azimuth, elevation)
    place = poses.fit(size, view)
    for phase in (0.0, 0.25, 0.6):
      points = poses.joints(poses.Gait(phase=phase), _BUILD)
      xy, _ = poses.project(points, view, placement=place)
      assert (xy[:, 1] > 0.02 * size[0]).all()
      assert (xy[:, 1] < size[0]).all()
      assert (xy[:, 0] > 0).all() and (xy[:, 0] < size[1]).all()


def _openpose(points, height, width):
  """OpenPose's drawing at the size where its sticks are four pixels wide."""
  canvas = np.zeros((height, width, 3), np.uint8)
  pairs = [
    [2, 3], [2, 6], [3, 4], [4, 5], [6, 7], [7, 8], [2, 9], [9, 10],
    [10, 11], [2, 12], [12, 13], [13, 14], [2, 1], [1, 15], [15, 17],
    [1, 16], [16, 18],
  ]  # fmt: skip
  hues = np.array([
    [255, 0, 0], [255, 85, 0], [255, 170, 0], [255, 255, 0], [170, 255, 0],
    [85, 255, 0], [0, 255, 0], [0, 255, 85], [0, 255, 170], [0, 255, 255],
    [0, 170, 255], [0, 85, 255], [0, 0, 255], [85, 0, 255], [170, 0, 255],
    [255, 0, 255], [255, 0, 170], [255, 0, 85],
  ])  # fmt: skip
  rows, columns = np.mgrid[:height, :width] + 0.5
  for (a, b), hue in zip(pairs, hues[:17], strict=True):
    if not (points.visible[a - 1] and points.visible[b - 1]):
      continue
    (xa, ya), (xb, yb) = points.xy[a - 1], points.xy[b - 1]
    half = math.hypot(xb - xa, yb - ya) / 2
    angle = math.atan2(yb - ya, xb - xa)
    dx, dy = columns - (xa + xb) / 2, rows - (ya + yb) / 2
    along = dx * math.cos(angle) + dy * math.sin(angle)
    across = dy * math.cos(angle) - dx * math.sin(angle)
    canvas[(along / half) ** 2 + (across / 4) ** 2 <= 1] = 0.6 * hue
  for (x, y), hue, visible in zip(points.xy, hues, points.visible, strict=True):
    if visible:
      canvas[(columns - x) ** 2 + (rows - y) ** 2 <= 16] = hue
  return canvas


@pytest.mark.parametrize("azimuth", [0, 60, 180])
def test_drawing_is_openposes(azimuth):
  view, size = poses.View(azimuth, 5), (512, 256)
  points = poses.keypoints(
    poses.Gait(phase=0.1), _BUILD, view, placement=poses.fit(size, view)
  )
  ours = poses.draw(points, size=size).astype(int)
  theirs = _openpose(points, *size).astype(int)
  # Anti-aliased edges differ; the inside of sticks and dots does not.
  inside = cv2.erode(theirs.max(2).astype(np.uint8), np.ones((3, 3))) > 0
  different = np.abs(ours - theirs).max(2) > 40
  assert inside.sum() > 1500
  assert different[inside].mean() < 0.06
  outside = cv2.dilate(theirs.max(2).astype(np.uint8), np.ones((5, 5))) == 0
  assert not ours[outside].any()


def test_small_drawing_shows_every_visible_point_in_its_colour():
  view, size = poses.View(0), (96, 48)
  points = poses.keypoints(
    poses.Gait(phase=0.1), _BUILD, view, placement=poses.fit(size, view)
  )
  drawn = poses.draw(points, size=size)
  for name in ("right_wrist", "left_wrist", "right_ankle", "left_knee"):
    x, y = points.xy[_I[name]]
    pixel = drawn[int(y), int(x)].astype(float)
    hue = np.array(poses.COLORS[_I[name]], float)
    cosine = pixel @ hue / np.linalg.norm(pixel) / np.linalg.norm(hue)
    assert cosine > 0.97 and pixel.max() > 90, name
