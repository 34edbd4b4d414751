"""Every drop rule on a cell that breaks it alone, and on drawn people."""

import dataclasses

import cv2
import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.geneperson import poses, quality
from dppp_jax.paperdoll import world

SIZE = (96, 48)


@pytest.fixture(scope="module")
def people():
  return [
    world.studio(pid, cell, seed=11, size=SIZE)
    for pid in range(3)
    for cell in range(4)
  ]


def _cells(people):
  return (
    np.stack([p.image for p in people]),
    np.stack([p.alpha for p in people]),
  )


def _one(cell, matte, **options):
  (reason,) = quality.judge(cell[None], matte[None], **options)
  return reason


def test_drawn_people_are_kept(people):
  for i in range(0, 12, 4):  # One person a canvas.
    cells, alpha = _cells(people[i : i + 4])
    skeletons = [p.keypoints for p in people[i : i + 4]]
    reasons = quality.judge(
      cells,
      alpha,
      peak=np.ones(4),
      skeletons=skeletons,
      rules=quality.Rules(min_agreement=0.85),
    )
    assert reasons == [None] * 4


def test_empty(people):
  person = people[0]
  low = np.array([0.3], np.float32)
  assert _one(person.image, person.alpha, peak=low) == "empty"
  assert _one(person.image, person.alpha * 0) == "empty"
  assert _one(person.image, person.alpha, peak=low + 0.4) is None


def test_area(people):
  person = people[0]
  small = cv2.resize(person.alpha, (12, 24), interpolation=cv2.INTER_AREA)
  matte = np.zeros(SIZE, np.uint8)
  matte[40:64, 18:30] = small
  share = (matte >= 127.5).mean()
  assert share < 0.08
  assert _one(person.image, matte) == "small"
  rules = quality.Rules(min_area=share - 1e-6, min_sharpness=None)
  assert _one(person.image, matte, rules=rules) is None
  assert _one(person.image, np.full(SIZE, 255, np.uint8)) == "large"


def test_several(people):
  """Two figures of half the width beside each other."""
  person = people[0]
  half = cv2.resize(person.alpha, (24, 96), interpolation=cv2.INTER_AREA)
  image = cv2.resize(person.image, (24, 96), interpolation=cv2.INTER_AREA)
  two = np.concatenate([half, half], axis=1)
  assert _one(np.concatenate([image] * 2, axis=1), two) == "several"
  # A crumb of the matte is no second person.
  crumb = person.alpha.copy()
  crumb[2:5, 2:5] = 255
  assert _one(person.image, crumb) is None


@pytest.mark.parametrize(
  "shift,expected",
  [((0, 15), "cut"), ((0, -15), "cut"), ((-12, 0), "cut"), ((1, 1), None)],
)
def test_cut(people, shift, expected):
  """Pushed over the left, right and upper border."""
  person = people[0]
  down, right = shift
  move = np.array([[1, 0, right], [0, 1, down]], np.float32)
  moved = [
    cv2.warpAffine(x, move, SIZE[::-1], borderMode=mode)
    for x, mode in (
      (person.image, cv2.BORDER_REPLICATE),
      (person.alpha, cv2.BORDER_CONSTANT),
    )
  ]
  assert _one(*moved) == expected


def test_cut_through_the_legs(people):
  person = people[0]
  upper = cv2.resize(person.image[:60], SIZE[::-1])
  matte = cv2.resize(person.alpha[:60], SIZE[::-1])
  rules = quality.Rules(max_feet=0.15, min_sharpness=None)
  assert _one(upper, matte, rules=rules) == "cut"


def test_blurred(people):
  for person in people:
    soft = cv2.GaussianBlur(person.image, (0, 0), 2.0)
    inside = person.alpha > 127
    assert quality.sharpness(person.image, inside) > 0.03
    assert _one(soft, person.alpha) == "blurred"
    # Dark is not blurred.
    assert _one(person.image // 3, person.alpha) is None


def test_sharpness_by_value():
  """A checkerboard of 0 and 255: the Laplacian is +-4 * 255."""
  y, x = np.mgrid[:20, :20]
  board = np.repeat(((y + x) % 2 * 255)[..., None], 3, -1).astype(np.uint8)
  inside = np.zeros((20, 20), bool)
  inside[5:15, 5:15] = True
  found = quality.sharpness(board, inside)
  expected = (4 * 127.5 * 2) ** 2 / (127.5**2 + 1) * (20 / 256) ** 2
  assert abs(found - expected) < 1e-4
  assert quality.sharpness(board, np.zeros((20, 20), bool)) == 0


def test_duplicates_keep_the_first(people):
  cells, alpha = _cells([people[0], people[1], people[0], people[4]])
  cells = cells.copy()
  cells[2] = np.clip(cells[2].astype(int) + 2, 0, 255)
  reasons = quality.judge(cells, alpha)
  assert reasons == [None, None, "duplicate", None]
  # What was thrown away for another reason is nobody's original.
  peak = np.array([0.1, 1, 1, 1])
  assert quality.judge(cells, alpha, peak=peak)[:3] == ["empty", None, None]


def test_pose(people):
  person = people[0]
  rules = quality.Rules(min_agreement=0.85)
  options = {"rules": rules, "skeletons": [person.keypoints]}
  assert _one(person.image, person.alpha, **options) is None
  points = person.keypoints
  aside = dataclasses.replace(points, xy=points.xy + np.array([14.0, 0]))
  options["skeletons"] = [aside]
  assert _one(person.image, person.alpha, **options) == "pose"
  half = np.zeros(SIZE, bool)
  half[:, :24] = True
  xy = np.stack([np.linspace(0.5, 47.5, 18), np.full(18, 40.0)], axis=1)
  line = poses.Keypoints(xy, np.zeros(18), np.ones(18, bool))
  # Columns up to 24 plus the reach of one pixel.
  assert quality.agreement(line, half) == (xy[:, 0] < 25).mean()


def _paint_over(person, rows):
  """Takes rows of a drawn person away, picture and matte."""
  image, alpha = person.image.copy(), person.alpha.copy()
  image[rows] = np.median(image[rows, :3], axis=1, keepdims=True)
  alpha[rows] = 0
  return image, alpha


def test_a_missing_head_or_missing_legs_are_seen(people):
  """Most points agree all the same; those of the part do not."""
  rules = quality.Rules(min_agreement=0.5)
  for person in people:
    options = {"rules": rules, "skeletons": [person.keypoints]}
    assert _one(person.image, person.alpha, **options) is None
    y = dict(zip(poses.KEYPOINTS, person.keypoints.xy[:, 1], strict=False))
    neck, knee = int(y["neck"]), int(max(y["right_knee"], y["left_knee"])) - 2
    for rows in (slice(0, neck), slice(knee, None)):
      image, alpha = _paint_over(person, rows)
      inside = alpha > 127
      assert quality.agreement(person.keypoints, inside) > 0.5
      assert quality.least_agreement(person.keypoints, inside) <= 0.5
  options["rules"] = quality.Rules(min_agreement=0.51)
  assert _one(image, alpha, **options) == "pose"


def test_least_agreement_by_hand():
  """Matte on the left half: of the head, the legs and all by columns."""
  half = np.zeros(SIZE, bool)
  half[:, :24] = True
  xy = np.full((18, 2), 10.0)
  head = [poses.INDEX[n] for n in ("nose", "right_eye", "left_eye")]
  xy[head[:2], 0] = 40.0
  visible = np.ones(18, bool)
  visible[[poses.INDEX["right_ear"], poses.INDEX["left_ear"]]] = False
  points = poses.Keypoints(xy, np.zeros(18), visible)
  assert quality.least_agreement(points, half) == 1 / 3
  visible[head] = False  # Of the head nothing is asked.
  xy[poses.INDEX["left_ankle"], 0] = 40.0
  assert quality.least_agreement(points, half) == 3 / 4
  nothing = dataclasses.replace(points, visible=np.zeros(18, bool))
  assert quality.least_agreement(nothing, half) == 0
  assert quality.agreement(nothing, half) == 0


def test_refuses_what_cannot_be_judged(people):
  cells, alpha = _cells(people[:2])
  with pytest.raises(errors.UserError, match="no skeletons"):
    quality.judge(cells, alpha, rules=quality.Rules(min_agreement=0.5))
  with pytest.raises(errors.UserError, match=r"\[1, 2\]"):
    quality.judge(cells, alpha[:1])


def test_every_rule_can_be_switched_off():
  off = {f.name: None for f in dataclasses.fields(quality.Rules)}
  nothing = np.zeros((1, *SIZE), np.uint8)
  cells = np.zeros((1, *SIZE, 3), np.uint8)
  assert quality.judge(cells, nothing, rules=quality.Rules(**off)) == [None]
