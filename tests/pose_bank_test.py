"""The bank of skeletons: numbers, choices, places, and OpenPose's files."""

import collections
import itertools
import json
import math
import pathlib

import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.geneperson import canvas, openpose, pose_bank, poses

_I = poses.INDEX
SIZES = [(256, 128), (96, 48)]
# What seed 0 gives person 7.
GOLDEN = [10004252, 10802216, 10004342, 10001180]
# The names in the order of OpenPose's documentation, written out by hand.
COCO = [
  "nose", "neck", "rshoulder", "relbow", "rwrist", "lshoulder", "lelbow",
  "lwrist", "rhip", "rknee", "rankle", "lhip", "lknee", "lankle", "reye",
  "leye", "rear", "lear",
]  # fmt: skip
BODY_25 = [
  "nose", "neck", "rshoulder", "relbow", "rwrist", "lshoulder", "lelbow",
  "lwrist", "midhip", "rhip", "rknee", "rankle", "lhip", "lknee", "lankle",
  "reye", "leye", "rear", "lear", "lbigtoe", "lsmalltoe", "lheel", "rbigtoe",
  "rsmalltoe", "rheel",
]  # fmt: skip


@pytest.fixture(scope="module")
def bank():
  return pose_bank.default_bank()


def _sector(azimuth):
  away = min(azimuth % 360, 360 - azimuth % 360)
  return "front" if away < 45 else "side" if away < 135 else "back"


def test_numbers_say_what_a_pose_is(bank):
  assert len(bank) == 4 * 3 * 10 * 20
  assert len({pose.number for pose in bank}) == len(bank)
  for pose in bank[::37]:
    digits = f"{pose.number:09d}"
    shape, elevation, gait, azimuth = (
      int(digits[a:b]) for a, b in ((0, 2), (2, 4), (4, 6), (6, 9))
    )
    assert pose_bank.SHAPES[shape][0] == pose.shape
    assert poses.POSES[gait] == (pose.activity, pose.figure.gait)
    assert pose.figure.view == poses.View(azimuth, elevation)
    assert pose.azimuth == azimuth
    assert pose.view == _sector(azimuth)
    assert bank.numbered(pose.number) is pose
  with pytest.raises(errors.UserError, match="no pose 5 in this bank of 2400"):
    bank.numbered(5)


def test_numbers_and_figures_outlast_an_extension(bank):
  more = pose_bank.default_bank(azimuths=40, elevations=(30, 16, 8, 0, 4))
  assert len(more) == 4 * 5 * 10 * 40
  assert all(more.numbered(pose.number) == pose for pose in bank)
  assert more.digest != bank.digest
  assert pose_bank.default_bank().digest == bank.digest


@pytest.mark.parametrize("size", SIZES)
def test_every_pose_fits_its_cell(bank, size):
  height, width = size
  shares = []
  for pose in bank:
    placed = pose.fit(size)
    half = max(0.9, 4 * height / 512)
    seen = placed.xy[placed.visible]
    assert (seen >= half).all() and (seen + half <= (width, height)).all()
    if pose.figure.view.elevation == 0:
      ankles = placed.xy[[_I["left_ankle"], _I["right_ankle"]], 1].max()
      shares.append((ankles - placed.xy[_I["neck"], 1]) / height)
  # From neck to ankle a body measures 0.785 of its height and more in stride.
  assert min(shares) > 0.55 and max(shares) < 0.78


@pytest.mark.parametrize("size", SIZES)
def test_figure_is_drawn_as_poses_draws_it(bank, size):
  chosen = bank.choose(6, seed=0, pid=1)
  layout = canvas.Layout(rows=2, cols=3, cell=size, multiple=4)
  figures = [pose.fit(size) for pose in chosen]
  cells = canvas.cut(canvas.skeleton_map(figures, layout), layout)
  for pose, cell in zip(chosen, cells, strict=True):
    view = pose.figure.view
    want = poses.keypoints(
      pose.figure.gait,
      dict(pose_bank.SHAPES)[pose.shape],
      view,
      placement=poses.fit(size, view),
    )
    np.testing.assert_array_equal(cell, poses.draw(want, size=size))
    assert (cell.max(2) > 60).sum() > 100


@pytest.mark.parametrize("count", [42, 6, 20, 7])
def test_choice_spreads_over_views_and_azimuths(bank, count):
  for pid in range(6):
    chosen = bank.choose(count, seed=3, pid=pid)
    views = collections.Counter(pose.view for pose in chosen)
    assert max(views.values()) - min(views.values()) <= 1
    assert len(views) == 3
    assert len({pose.shape for pose in chosen}) == 1
    assert len({pose.number for pose in chosen}) == count
    for view, directions in (("front", 5), ("side", 10), ("back", 5)):
      azimuths = collections.Counter(
        pose.azimuth for pose in chosen if pose.view == view
      )
      dealt = views[view]
      assert len(azimuths) == min(dealt, directions)
      assert max(azimuths.values()) == math.ceil(dealt / directions)


def test_choice_is_a_pure_function_of_seed_and_pid(bank):
  chosen = bank.choose(42, seed=0, pid=7)
  assert bank.choose(42, seed=0, pid=7) == chosen
  assert bank.choose(10, seed=0, pid=7) == chosen[:10]
  others = [bank.choose(42, seed=s, pid=p) for s, p in ((0, 8), (1, 7), (7, 0))]
  assert len({chosen, *others}) == 4
  # These stand in datasets: another stream would make others.
  assert [pose.number for pose in chosen[:4]] == GOLDEN


def test_all_poses_of_a_person_come_before_any_returns():
  small = pose_bank.default_bank(azimuths=4, elevations=(0,), shapes=("slim",))
  chosen = small.choose(80, seed=0, pid=0)
  counts = collections.Counter(pose.number for pose in chosen)
  # 4 azimuths: one front, two sides, one back, of ten poses each.
  assert [p.view for p in small].count("side") == 20
  assert set(counts) == {pose.number for pose in small}
  per_view = collections.defaultdict(list)
  for pose in chosen:
    per_view[pose.view].append(pose.number)
  for view, available in (("front", 10), ("back", 10), ("side", 20)):
    dealt = per_view[view]
    assert len(set(dealt[:available])) == available
    assert len(dealt) in (26, 27)


@pytest.mark.parametrize(
  "words, shape",
  [
    ("slim figure", "slim"), ("lean figure", "slim"),
    ("average figure", "average"), ("tall figure", "average"),
    ("broad-shouldered figure", "broad"), ("muscular figure", "broad"),
    ("maternal build body", "heavy"), ("stocky figure", "heavy"),
  ],
)  # fmt: skip
def test_body_and_activity_of_the_prompt_are_kept(bank, words, shape):
  chosen = bank.choose(9, seed=0, pid=2, body=words, activity="standing")
  assert {pose.shape for pose in chosen} == {shape}
  assert {pose.activity for pose in chosen} == {"standing"}
  chosen = bank.choose(9, seed=0, pid=2, body=words, activity="striding")
  assert {pose.activity for pose in chosen} == {"walking"}


def test_shapes_differ_as_they_are_called(bank):
  widths = {}
  for k, (shape, _) in enumerate(pose_bank.SHAPES):
    xy = bank.numbered(k * 10_000_000 + 8000).fit((512, 256)).xy
    span = lambda part: xy[_I[f"left_{part}"], 0] - xy[_I[f"right_{part}"], 0]
    widths[shape] = span("shoulder"), span("hip")
  assert widths["slim"][0] < widths["average"][0] < widths["broad"][0]
  assert widths["average"][1] == widths["broad"][1] < widths["heavy"][1]
  ratio = widths["broad"][0] / widths["slim"][0]
  np.testing.assert_allclose(ratio, 0.119 / 0.094, rtol=1e-9)


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(shift=(0.4, 0)), r"off the right .* shift 0\.4, 0: lower the fill"),
    (dict(shift=(-0.4, 0)), "off the left"),
    (dict(shift=(0, -0.3)), "off the top"),
    (dict(shift=(0, 0.3)), "off the bottom"),
    (dict(fill=1.4), "fill 1.4"),
  ],
)
def test_skeleton_off_its_cell_is_refused_by_name(bank, options, words):
  pose = bank.numbered(8000)
  words = r"pose 8000 \(average, standing \(8\) at 0, 0 degrees\).* " + words
  with pytest.raises(errors.UserError, match=words) as caught:
    pose.fit((96, 48), **options)
  assert "\n" not in str(caught.value)


def test_amount_off_the_cell_is_told(bank):
  pose = bank.numbered(8090)
  placed = pose.fit((96, 48))
  seen = placed.xy[placed.visible]
  room = 48 - 0.9 - seen[:, 0].max()
  pose.fit((96, 48), shift=((room - 0.01) / 48, 0))
  with pytest.raises(
    errors.UserError, match=r"stand 2\.0 pixels off the right"
  ):
    pose.fit((96, 48), shift=((room + 2) / 48, 0))


def test_bad_banks_are_refused():
  bad = pose_bank.default_bank
  for options, words in (
    (dict(azimuths=7), "azimuths=7: must divide 360"),
    (dict(elevations=(0, 60)), "elevation 60: give whole degrees from 0 to 45"),
    (dict(elevations=(2.5,)), "elevation 2.5"),
    (dict(shapes=("fat",)), "shape 'fat' is unknown: choose of average, slim"),
    (dict(shapes=()), "at least one pose"),
  ):
    with pytest.raises(errors.UserError, match=words):
      bad(**options)
  one = bad(azimuths=1, elevations=(0,), shapes=("slim",))
  with pytest.raises(errors.UserError, match="are the same pose"):
    one + one
  with pytest.raises(errors.UserError, match="choose at least 1"):
    one.choose(0, seed=0, pid=0)


# OpenPose's files.


def _figure(azimuth, gait=9, scale=300.0, at=(200.0, 400.0), elevation=0):
  """Key points of the average figure, and its canvas."""
  return poses.keypoints(
    poses.POSES[gait][1],
    poses.Build(),
    poses.View(azimuth, elevation),
    placement=poses.Placement(scale, *at),
  )


def _person(points, names=COCO, factor=(1.0, 1.0)):
  """One of OpenPose's people; points that are not COCO's lie anywhere."""
  numbers = []
  for name in names:
    if name in COCO and points.visible[COCO.index(name)]:
      x, y = points.xy[COCO.index(name)] * factor
      numbers += [x, y, 0.8]
    else:
      numbers += [0, 0, 0] if name in COCO else [7777 * factor[0], 0, 0.9]
  return {"pose_keypoints_2d": numbers, "hand_left_keypoints_2d": [1, 2]}


def _write(path, *people, **more):
  path.write_text(json.dumps({"people": list(people), **more}))
  return path


def test_coco_body_25_and_units_are_one_skeleton(tmp_path):
  points = _figure(60)
  first = openpose.read(_write(tmp_path / "a.json", _person(points)))
  for found, want, seen in zip(
    first.points, points.xy, points.visible, strict=True
  ):
    assert (found is not None) == seen
    if seen:
      np.testing.assert_array_equal(found, want)
  assert not points.visible.all()
  many = openpose.read(_write(tmp_path / "b.json", _person(points, BODY_25)))
  assert many == first
  unit = _person(points, factor=(1 / 400, 1 / 500))
  unit = _write(tmp_path / "c.json", unit, canvas_width=400, canvas_height=500)
  unit = openpose.read(unit)
  for found, want in zip(unit.points, first.points, strict=True):
    assert (found is None) == (want is None)
    if want:
      np.testing.assert_allclose(found, want, rtol=1e-12)
  # From -1 to 1 is the same at twice the size, and numbers have no size.
  both = _person(points)
  both["pose_keypoints_2d"] = [
    value if i % 3 == 2 else 2 * value / (400, 500)[i % 3] - 1
    for i, value in enumerate(both["pose_keypoints_2d"])
  ]
  _write(tmp_path / "d.json", both, canvas_width=400, canvas_height=500)
  numbers = {
    pose_bank.read_openpose(tmp_path / f"{name}.json")[0].number
    for name in "abcd"
  }
  assert len(numbers) == 1 and min(numbers) >= 2**40


@pytest.mark.parametrize("elevation", [0, 12])
def test_view_is_that_from_which_the_skeleton_was_made(tmp_path, elevation):
  for gait, azimuth in itertools.product((0, 3, 9), range(0, 360, 9)):
    points = _figure(azimuth, gait, elevation=elevation)
    file = _write(tmp_path / "p.json", _person(points))
    (pose,) = pose_bank.read_openpose(file)
    away = abs((pose.azimuth - azimuth + 180) % 360 - 180)
    # Of who is seen from straight before or behind the side is a guess.
    assert away < 14
    if min(abs(azimuth % 90 - 45), 45) > 8:
      assert pose.view == _sector(azimuth)


@pytest.mark.parametrize(
  "hidden, azimuth",
  [
    ("lshoulder", 0),  # The hips tell.
    ("lshoulder lhip", 0),  # The face tells.
    ("lshoulder lhip nose reye leye", 180),
    ("lshoulder lhip leye", 90),
  ],
)
def test_view_of_who_is_half_hidden(hidden, azimuth):
  points = _figure(0, gait=8)
  seen = tuple(
    None if name in hidden.split() else (float(x), float(y))
    for name, (x, y) in zip(COCO, points.xy, strict=True)
  )
  skeleton = openpose.Skeleton(seen, (0, 0, 1, 1))
  assert poses.View(openpose.azimuth(skeleton)).name == _sector(azimuth)


@pytest.mark.parametrize("size", SIZES)
def test_imported_skeleton_fills_its_cell_in_its_proportions(tmp_path, size):
  for k, azimuth in enumerate((0, 90, 200)):
    points = _figure(azimuth, gait=0)
    _write(tmp_path / f"{k}.json", _person(points))
  for pose in pose_bank.read_openpose(tmp_path):
    placed = pose.fit(size)
    (person,) = json.loads(pathlib.Path(pose.name).read_text())["people"]
    given = np.array(person["pose_keypoints_2d"]).reshape(18, 3)
    seen = given[:, 2] > 0
    np.testing.assert_array_equal(placed.visible, seen)
    scale = np.ptp(placed.xy[seen, 1]) / np.ptp(given[seen, 1])
    offset = placed.xy[seen] - scale * given[seen, :2]
    np.testing.assert_allclose(offset - offset[0], 0, atol=1e-9)
    # A body of 300 pixels: 0.93 of the height, or of the width in stride.
    assert 0.8 < scale * 300 / (0.93 * size[0]) < 1.01
    np.testing.assert_array_equal(placed.depth, np.zeros(18))


def test_place_of_a_skeleton_by_hand():
  points = [None] * 18
  points[1], points[2], points[5] = (10.0, 20.0), (0.0, 20.0), (20.0, 30.0)
  skeleton = openpose.Skeleton(tuple(points), (-10.0, 0.0, 30.0, 40.0))
  placed = skeleton.place((100, 80), fill=0.5, shift=(0.25, -0.1))
  # 40 units are half of 80 pixels; the box's middle (10, 20) goes to 60, 40.
  np.testing.assert_allclose(
    placed.xy[[1, 2, 5]], [[60, 40], [50, 40], [70, 50]]
  )
  assert placed.visible.sum() == 3


def test_confidence_and_the_largest_person_count(tmp_path):
  points = _figure(0)
  small = _person(_figure(180, scale=100.0))
  large = _person(points)
  large["pose_keypoints_2d"][3 * 4 + 2] = 0.3  # The right wrist.
  file = _write(tmp_path / "two.json", small, large)
  found = openpose.read(file)
  np.testing.assert_array_equal(found.points[1], points.xy[1])
  assert found.points[4] is not None
  assert openpose.read(file, threshold=0.4).points[4] is None
  with pytest.raises(
    errors.UserError, match=r"two\.json shows 2 people: leave"
  ):
    openpose.read(file, several="refuse")


def _numbers(numbers, **more):
  return json.dumps({"people": [{"pose_keypoints_2d": numbers}], **more})


@pytest.mark.parametrize(
  "text, words",
  [
    ("{", "is not JSON"),
    ("\xff\xfe", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("3", "holds no JSON object with people"),
    ("{}", "has no list of people"),
    ('{"people": 3}', "has no list of people"),
    ('{"people": []}', r"shows no person \(people is empty\)"),
    ('{"people": [{}]}', "a person without pose_keypoints_2d"),
    ('[{"people": []}, {"people": []}]', "holds 2 frames"),
    (_numbers([1, 2, 3]), "has 3 numbers: 54 .* or 75"),
    (_numbers("x" * 54), "has no numbers"),
    (_numbers([None] * 54), "(something else than numbers|NaN)"),
    (_numbers([[1]] + [0] * 53), "something else than numbers"),
    (_numbers([float("nan")] * 54), "NaN or infinity"),
    (_numbers([5, 5, 0.01] * 18), "no person .*confidence 0.05 or more"),
    (_numbers([0, 0, 0] * 18), "no person"),
    (_numbers([0.5, 0.2, 1] * 18), "0 to 1 and no canvas_width"),
    (
      _numbers([0.5, 0.2, 1] * 18, canvas_width=0, canvas_height=9),
      "0 to 1 and no canvas_width",
    ),
    (_numbers([-0.5, 0.2, 1] * 18), "0 to 1 and no canvas_width"),
  ],
)
def test_bad_files_are_one_line_that_names_them(tmp_path, text, words):
  file = tmp_path / "pose.json"
  file.write_bytes(text.encode("latin-1"))
  with pytest.raises(errors.UserError, match=words) as caught:
    pose_bank.read_openpose(file)
  assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_folders_are_refused(tmp_path):
  with pytest.raises(
    errors.UserError, match=r"none\.json does not exist: give"
  ):
    pose_bank.read_openpose(tmp_path / "none.json")
  with pytest.raises(errors.UserError, match=r"holds no \.json file"):
    pose_bank.read_openpose(tmp_path)
  for name in "ab":
    _write(tmp_path / f"{name}.json", _person(_figure(20)))
  with pytest.raises(errors.UserError, match=r"a\.json and .*b\.json are the"):
    pose_bank.read_openpose(tmp_path)


def test_what_a_mac_and_an_editor_leave_is_passed_over(tmp_path):
  _write(tmp_path / "a.json", _person(_figure(20)))
  text = (tmp_path / "a.json").read_bytes()
  (tmp_path / "a.json").rename(tmp_path / "A.JSON")
  (tmp_path / "A.JSON").write_bytes(b"\xef\xbb\xbf" + text)
  (tmp_path / "._A.JSON").write_bytes(b"\0\5\x16\7")
  assert len(pose_bank.read_openpose(tmp_path)) == 1


def test_banks_of_both_kinds_are_chosen_from_together(tmp_path, bank):
  for k, azimuth in enumerate((0, 90, 180)):
    _write(tmp_path / f"{k}.json", _person(_figure(azimuth)))
  own = pose_bank.read_openpose(tmp_path)
  assert [pose.view for pose in sorted(own, key=lambda p: p.name)] == [
    "front", "side", "back",
  ]  # fmt: skip
  chosen = own.choose(7, seed=0, pid=0, body="slim figure", activity="standing")
  assert {pose.number for pose in chosen} == {pose.number for pose in own}
  small = pose_bank.default_bank(azimuths=4, elevations=(0,), shapes=("slim",))
  both = own + small
  counts = collections.Counter(p.view for p in both.choose(99, seed=0, pid=0))
  assert set(counts.values()) == {33}
  assert both.digest not in (own.digest, small.digest)
