import hashlib
import pathlib
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from dppp_jax import errors
from dppp_jax.geneperson import poses
from dppp_jax.paperdoll import (
  benchmark,
  brush,
  cameras,
  figure,
  lighting,
  scenes,
  wardrobe,
  world,
)

_I = poses.INDEX
_ROOT = pathlib.Path(__file__).parents[1]

# The same statements run here and in another process.
_DIGEST = """
import hashlib
from dppp_jax.paperdoll import world
digest = hashlib.sha256()
for pid in range(3):
  sample = world.studio(pid, 4, seed=11)
  for part in (sample.image, sample.alpha, sample.skeleton):
    digest.update(part.tobytes())
  digest.update(sample.caption.encode())
  for record in world.make_identity(pid, seed=11, cells=2):
    digest.update(record["image"].tobytes() + record["prompt"].encode())
  for name in ("market1501", "dukemtmcreid"):
    seen = world.street(pid, 2 + pid, 1, benchmark=name, seed=11)
    digest.update(seen.tobytes())
result = digest.hexdigest()
"""


def test_same_seed_same_pixels_in_any_process():
  held = {}
  exec(_DIGEST, held)
  again = {}
  # Other people drawn in between change nothing.
  world.studio(99, 0, seed=5)
  exec(_DIGEST, again)
  assert held["result"] == again["result"]
  other = subprocess.run(
    [sys.executable, "-c", _DIGEST + "\nprint(result)"],
    capture_output=True, text=True, check=True, cwd=_ROOT,
  )  # fmt: skip
  assert other.stdout.strip() == held["result"]


def test_seed_pid_and_cell_change_the_picture():
  first = world.studio(1, 1, seed=1).image
  for other in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
    pid, cell, seed = other
    assert (world.studio(pid, cell, seed=seed).image != first).any()


def test_a_person_is_the_same_in_all_pictures():
  first = world.studio(7, 0, seed=3)
  for cell in range(1, 6):
    assert world.studio(7, cell, seed=3).attributes == first.attributes
  people = [dict(world.person(pid, seed=3).attributes) for pid in range(40)]
  # Asked in another order, and after others, they are who they were.
  world.person.cache_clear()
  again = [dict(world.person(p, seed=3).attributes) for p in (39, 12, 0)]
  assert again == [people[39], people[12], people[0]]
  records = list(world.make_identity(7, seed=3, cells=3))
  assert all(r["attributes"] == records[0]["attributes"] for r in records)


def test_domains_hold_different_people():
  for pid in range(5):
    words = {
      tuple(world.person(pid, seed=0, domain=d).attributes.items())
      for d in world.DOMAINS
    }
    assert len(words) == len(world.DOMAINS)


def test_attributes_obey_the_rules_of_the_wardrobe():
  people = [wardrobe.person((0, i)) for i in range(400)]
  for who in people:
    a = who.attributes
    assert set(a) == set(wardrobe.VALUES)
    for key, value in a.items():
      assert value in wardrobe.VALUES[key], (key, value)
    if a["upper_type"] == "dress" or "skirt" in a["lower_type"]:
      assert a["gender"] == "woman"
    assert (a["upper_type"] == "dress") == (a["lower_type"] == "dress")
    if a["lower_type"] == "dress":
      assert a["lower_color"] == a["upper_color"]
    for thing in ("hat", "bag"):
      assert (a[thing] == "none") == (a[f"{thing}_color"] == "none")
  for key in ("upper_color", "lower_color", "upper_type", "lower_type"):
    assert {p.attributes[key] for p in people} == set(wardrobe.VALUES[key])


@pytest.mark.parametrize("name", wardrobe.COLORS)
def test_jitter_keeps_a_colour_nearest_to_its_own_name(name):
  table = np.array(list(wardrobe.COLORS.values()))
  rng = np.random.default_rng(0)
  for _ in range(50):
    color = np.array(wardrobe._jitter(wardrobe.COLORS[name], rng, 8.0))
    nearest = np.square(table - color).sum(1).argmin()
    assert list(wardrobe.COLORS)[nearest] == name


def _dressed(**changes):
  who = wardrobe.person((4, 4))
  attributes = {
    **who.attributes, "upper_type": "sweater", "upper_pattern": "plain",
    "hair_length": "short", "hair_style": "straight", "hat": "none",
    "hat_color": "none", "bag": "none", "bag_color": "none", **changes,
  }  # fmt: skip
  base = wardrobe.COLORS[attributes["upper_color"]]
  return who.__class__(
    **{
      **who.__dict__,
      "attributes": attributes,
      "colors": {**who.colors, "upper": base},
    }
  )


def _draw(who, azimuth, *, size=(96, 48), gait=None):
  view = poses.View(azimuth, 5.0)
  gait = gait or poses.Gait(phase=0.25, stride=0.0, spread=12.0)
  place = poses.fit(size, view)
  return figure.render(who, gait, view, size=size, placement=place)


@pytest.mark.parametrize("name", wardrobe.COLORS)
@pytest.mark.parametrize("azimuth", [0, 180])
def test_upper_garment_shows_the_colour_it_is_named_for(name, azimuth):
  drawn = _draw(_dressed(upper_color=name), azimuth)
  ground = np.full((96, 48, 3), 128, np.uint8)
  image, xy = drawn.over(ground), drawn.keypoints.xy
  top = int(0.6 * xy[_I["neck"], 1] + 0.4 * xy[_I["left_hip"], 1])
  bottom = int(0.25 * xy[_I["neck"], 1] + 0.75 * xy[_I["left_hip"], 1])
  left, right = sorted(
    (xy[_I["left_shoulder"], 0], xy[_I["right_shoulder"], 0])
  )
  region = np.s_[top:bottom, int(left) + 2 : int(right) - 2]
  pixels = image[region][drawn.alpha[region] == 255].astype(float)
  assert len(pixels) > 40
  table = np.array(list(wardrobe.COLORS.values()))
  nearest = np.square(pixels[:, None] - table).sum(2).argmin(1)
  share = np.mean(np.array(list(wardrobe.COLORS))[nearest] == name)
  assert share > 0.75, share


def test_matte_covers_the_figure_and_nothing_else():
  drawn = _draw(_dressed(), 30)
  rng = np.random.default_rng(0)
  ground = rng.integers(0, 256, (96, 48, 3), dtype=np.uint8)
  fused = drawn.over(ground)
  outside = drawn.alpha == 0
  assert 0.5 < outside.mean() < 0.9
  np.testing.assert_array_equal(fused[outside], ground[outside])
  # Where the matte is full no ground shines through.
  full = drawn.alpha == 255
  assert full.mean() > 0.1
  np.testing.assert_array_equal(fused[full], drawn.over(255 - ground)[full])
  # At the edge the shares of figure and ground are those of the matte.
  edge = (drawn.alpha > 0) & ~full
  black, white = (
    drawn.over(np.full_like(ground, v))[edge].astype(float) for v in (0, 255)
  )
  np.testing.assert_allclose(
    (white - black).mean(1), 255.0 - drawn.alpha[edge], atol=1.0
  )


@pytest.mark.parametrize("azimuth", [0, 45, 90, 200])
def test_matte_lies_on_the_key_points(azimuth):
  drawn = _draw(_dressed(), azimuth, gait=poses.Gait(phase=0.1))
  for i in np.flatnonzero(drawn.keypoints.visible):
    x, y = drawn.keypoints.xy[i]
    assert drawn.alpha[int(y), int(x)] > 100, poses.KEYPOINTS[i]


def _near(image, center, radius, color):
  y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
  inside = (x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2
  gap = np.abs(image[inside].astype(float) - np.asarray(color)).max(1)
  return np.mean(gap < 60)


def test_a_face_is_seen_from_the_front_and_hair_from_behind():
  who = _dressed(upper_color="blue")
  colors = {**who.colors, "skin": (240, 190, 160), "hair": (20, 20, 200)}
  who = who.__class__(**{**who.__dict__, "colors": colors})
  skin, hair = colors["skin"], colors["hair"]
  for azimuth, seen, other in ((0, skin, hair), (180, hair, skin)):
    drawn = _draw(who, azimuth, size=(256, 128))
    points = poses.joints(
      poses.Gait(phase=0.25, stride=0.0, spread=12.0), figure.build(who)
    )
    view = poses.View(azimuth, 5.0)
    xy, _ = poses.project(points, view, placement=poses.fit((256, 128), view))
    image = drawn.over(np.zeros((256, 128, 3), np.uint8))
    middle = xy[_I["head"]]
    assert _near(image, middle, 8.0, seen) > 0.6
    assert _near(image, middle, 8.0, other) < 0.3


@pytest.mark.parametrize(
  ("azimuth", "near", "far"), [(90, "right", "left"), (270, "left", "right")]
)
def test_near_arm_lies_over_the_trunk_and_far_arm_under_it(azimuth, near, far):
  # A bare arm on a blue trunk, seen from both sides.
  who = _dressed(upper_color="blue", upper_type="t-shirt")
  colors = {**who.colors, "skin": (240, 190, 160), "upper": (30, 60, 220)}
  who = who.__class__(**{**who.__dict__, "colors": colors})
  # Phase 0 swings the left arm back and the right arm forward, here so little
  # that both elbows lie within the outline of the trunk.
  gait = poses.Gait(phase=0.0, stride=0.4, spread=2.0, elbow=0.0)
  drawn = _draw(who, azimuth, size=(256, 128), gait=gait)
  image = drawn.over(np.zeros((256, 128, 3), np.uint8))
  xy = drawn.keypoints.xy
  assert _near(image, xy[_I[f"{near}_elbow"]], 3.0, colors["skin"]) > 0.5
  assert _near(image, xy[_I[f"{far}_elbow"]], 3.0, colors["skin"]) < 0.1
  assert _near(image, xy[_I[f"{far}_elbow"]], 3.0, colors["upper"]) > 0.5


@pytest.mark.parametrize("pattern", wardrobe.UPPER_PATTERNS[1:])
def test_patterns_show_at_the_size_of_a_cell(pattern):
  plain = _draw(_dressed(upper_color="red"), 0)
  worn = _draw(_dressed(upper_color="red", upper_pattern=pattern), 0)
  ground = np.zeros((96, 48, 3), np.uint8)
  change = np.abs(plain.over(ground).astype(int) - worn.over(ground))
  xy = plain.keypoints.xy
  top, bottom = int(xy[_I["neck"], 1]), int(xy[_I["left_hip"], 1])
  assert (change[top:bottom].max(2) > 40).sum() > 15
  # And nowhere but on the upper garment.
  assert change[: int(xy[_I["nose"], 1])].max() == 0
  assert change[bottom + 14 :].max() == 0


def test_light_changes_figure_and_scene_as_its_words_say():
  by_words = {x.words: x for x in lighting.LIGHTINGS}
  assert len(by_words) == len(lighting.LIGHTINGS) >= 9

  def tone(words):
    light = by_words[words]
    drawn = figure.render(
      _dressed(upper_color="grey"), poses.Gait(), poses.View(),
      size=(96, 48), placement=poses.fit((96, 48), poses.View()),
      lighting=light,
    )  # fmt: skip
    scene = scenes.strip("street", (1,), height=96, width=96, lighting=light)
    return (
      drawn.color[drawn.alpha == 255].mean(0),
      scene.reshape(-1, 3).mean(0),
    )

  for sunny, dark, dusk in zip(
    tone("day, sunshine"), tone("night, dark"), tone("dusk"), strict=True
  ):
    assert sunny.mean() > 2 * dark.mean()
    assert dusk[0] / dusk[2] > 1.25 * sunny[0] / sunny[2]


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_scenes_are_the_same_place_under_every_light(kind):
  def edges(light):
    strip = scenes.strip(kind, (3,), height=64, width=192, lighting=light)
    grey = strip[24:].mean(2)
    grey = (grey - grey.mean()) / grey.std()
    return strip, grey

  first, day = edges(lighting.LIGHTINGS[1])
  again, _ = edges(lighting.LIGHTINGS[1])
  np.testing.assert_array_equal(first, again)
  _, rain = edges(lighting.LIGHTINGS[2])
  assert np.mean(day * rain) > 0.9
  assert first.reshape(-1, 3).std(0).min() > 8.0


def test_caption_names_everything_in_the_order_of_the_template():
  who = world.person(1, seed=0).attributes
  text = wardrobe.caption(
    who, activity="walking", view="back", lighting="day, sunshine"
  )
  words = [
    who["gender"], "walking", "back view",
    f"{who['upper_color']} {who['upper_pattern']} {who['upper_type']}",
    f"{who['footwear_color']} {who['footwear_type']}", "day, sunshine",
    f"{who['body']} figure", f"{who['skin']} skin",
  ]  # fmt: skip
  places = [text.index(word) for word in words]
  assert places == sorted(places)


def test_every_value_has_its_own_phrases():
  for attribute, values in wardrobe.VALUES.items():
    held = [wardrobe.phrases(attribute, value) for value in values]
    assert all(held) and len(set(held)) == len(values), attribute
  assert wardrobe.worn("upper", ["red", "striped"], "shirt") == (
    "a person in a red striped shirt"
  )


def test_records_are_those_of_the_dataset():
  records = list(world.make_identity(5, seed=2, size=(64, 32), cells=6))
  assert [r["cell"] for r in records] == list(range(6))
  assert len({r["view"] for r in records}) >= 2
  for record in records:
    assert record["image"].shape == (64, 32, 3)
    assert record["image"].dtype == np.uint8
    assert record["lighting"] in record["prompt"]
    assert f"{record['view']} view" in record["prompt"]
    assert record["background"] in scenes.KINDS
    indoor = record["lighting"].startswith("indoor")
    assert indoor == (record["background"] == "indoor")


def test_camera_sets_share_no_camera_and_change_pictures():
  market, duke = cameras.SETS["market1501"], cameras.SETS["dukemtmcreid"]
  assert (len(market), len(duke)) == (6, 8)
  assert not {c.name for c in market} & {c.name for c in duke}
  means = np.stack([
    np.mean([
      world.street(p, c, 0, benchmark="market1501", seed=0).mean((0, 1))
      for p in range(6)
    ], axis=0)
    for c in range(1, 7)
  ])  # fmt: skip
  gaps = np.abs(means[:, None] - means[None]).max(2)
  assert gaps[np.triu_indices(6, 1)].min() > 3.0


_NAMES = {
  "market1501": r"^(-?\d+)_c(\d)s(\d)_(\d+)_(\d+)\.jpg$",
  "dukemtmcreid": r"^(\d+)_c(\d)_f(\d+)\.jpg$",
}


def _labels(layout, pictures):
  folders = {"bounding_box_train": [], "query": [], "bounding_box_test": []}
  for path in pictures:
    folder, name = path.split("/")
    match = re.match(_NAMES[layout], name)
    assert match, name
    folders[folder].append((int(match.group(1)), int(match.group(2))))
  return folders


@pytest.mark.parametrize("layout", benchmark.FOLDERS)
@pytest.mark.parametrize("per_camera", [2, 4])
def test_plan_of_a_benchmark(layout, per_camera):
  plan = benchmark.plan(
    layout, train_ids=30, test_ids=40, images_per_camera=per_camera,
    distractors=30, seed=1,
  )  # fmt: skip
  paths = [p.path for p in plan]
  assert len(set(paths)) == len(paths)
  folders = _labels(layout, paths)
  train, query, gallery = folders.values()
  ids = lambda rows: {pid for pid, _ in rows}
  assert ids(train) == set(range(1, 31))
  assert ids(query) == set(range(31, 71))
  assert not ids(train) & (ids(query) | ids(gallery))
  assert len(set(query)) == len(query), "one query per (id, camera)"
  for pid, camera in query:
    assert any(p == pid and c != camera for p, c in gallery)
  others = ids(gallery) - ids(query)
  if layout == "market1501":
    assert others == {0, -1}
    count = lambda label: sum(pid == label for pid, _ in gallery)
    assert (count(0), count(-1)) == (30, 10)
  else:
    assert len(others) == 30 and min(others) > 70
  assert max(c for _, c in gallery) <= len(cameras.SETS[layout])
  # Whoever is drawn as a stranger is nobody of the train or test people.
  known = {p.person for p in plan if p.pid in ids(train) | ids(query)}
  strangers = {p.person for p in plan if p.pid in others}
  assert not known & strangers


def _tree(folder):
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def test_written_benchmark_is_whole_repeatable_and_never_overwritten(tmp_path):
  sizes = dict(train_ids=1, test_ids=2, images_per_camera=2, distractors=3)
  for layout in benchmark.FOLDERS:
    first = benchmark.write(layout, tmp_path / "a", seed=4, **sizes)
    second = benchmark.write(
      layout, tmp_path / "b", seed=4, num_processes=2, **sizes
    )
    assert first.name == benchmark.FOLDERS[layout]
    held = _tree(first)
    planned = {p.path for p in benchmark.plan(layout, seed=4, **sizes)}
    assert set(held) == planned
    assert held == _tree(second)
    _labels(layout, held)
    with pytest.raises(errors.UserError, match=f"{first.name}.*overwritten"):
      benchmark.write(layout, tmp_path / "a", seed=5, **sizes)
    assert _tree(first) == held
  left = {path.name for path in (tmp_path / "a").iterdir()}
  assert left == set(benchmark.FOLDERS.values())


def test_a_failed_benchmark_leaves_nothing(tmp_path, monkeypatch):
  def broken(*args, **kwargs):
    raise OSError("disk")

  monkeypatch.setattr(world, "street", broken)
  with pytest.raises(OSError, match="disk"):
    benchmark.write("market1501", tmp_path, train_ids=1, test_ids=1)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"layout": "msmt17"}, "msmt17"),
    ({"train_ids": 0}, "train_ids=0"),
    ({"images_per_camera": 1}, "images_per_camera=1"),
    ({"distractors": -1}, "distractors=-1"),
    ({"test_ids": 9999}, "test_ids=9999"),
    ({"size": (8, 4)}, "size"),
  ],
)
def test_impossible_benchmarks_are_refused(tmp_path, changes, named):
  asked = {"layout": "market1501", "train_ids": 1, "test_ids": 1, **changes}
  layout = asked.pop("layout")
  with pytest.raises(errors.UserError, match=named):
    benchmark.write(layout, tmp_path / "out", **asked)
  assert not (tmp_path / "out").exists()


def _script(*words):
  return subprocess.run(
    [sys.executable, "data_tools/paperdoll_benchmark.py", *words],
    capture_output=True, text=True, cwd=_ROOT, check=False,
  )  # fmt: skip


@pytest.mark.parametrize(
  ("words", "named"),
  [
    ((), "--out"),
    (("--out=OUT", "--layout=nope"), "nope"),
    (("--out=OUT", "--seed=-1"), "seed=-1"),
    (("--out=OUT", "--size=96"), "--size=96"),
    (("--out=OUT", "word"), "word"),
    (("--out=FILE",), "FILE"),
  ],
)
def test_mistakes_of_the_script_are_one_line(tmp_path, words, named):
  (tmp_path / "FILE").write_text("mine")
  places = {f"--out={x}": f"--out={tmp_path / x}" for x in ("OUT", "FILE")}
  done = _script(*(places.get(word, word) for word in words))
  assert done.returncode == 2, done.stderr
  assert done.stderr.count("\n") == 1 and named in done.stderr
  assert [x.name for x in tmp_path.iterdir()] == ["FILE"]


def test_the_script_writes_both_and_refuses_to_overwrite(tmp_path):
  run = lambda: _script(
    f"--out={tmp_path / 'out'}", "--train_ids=1", "--test_ids=1",
    "--images_per_camera=2", "--distractors=1", "--size=48,24",
  )  # fmt: skip
  done = run()
  assert done.returncode == 0, done.stderr
  assert [pathlib.Path(x).name for x in done.stdout.split()] == list(
    benchmark.FOLDERS.values()
  )
  again = run()
  assert again.returncode == 2
  assert again.stderr.count("\n") == 1 and "overwritten" in again.stderr


def test_the_committed_contact_sheets_are_those_of_the_script(tmp_path):
  subprocess.run(
    [sys.executable, "data_tools/paperdoll_sheets.py", f"--out={tmp_path}"],
    capture_output=True, check=True, cwd=_ROOT,
  )  # fmt: skip
  for name in ("paperdoll_studio.png", "paperdoll_street.png"):
    ours, held = (
      np.array(PIL.Image.open(folder / name)).astype(int)
      for folder in (tmp_path, _ROOT / "docs")
    )
    assert ours.shape == held.shape
    # Another OpenCV may round a pixel otherwise; the pictures are the same.
    assert np.abs(ours - held).mean() < 1.0


def test_ribbon_paints_bands_where_its_cloth_has_them():
  canvas = brush.Canvas((60, 20), light=(0.0, 0.0, 1.0), factor=3)
  band = brush.Ribbon(
    np.array([[10.0, 0.0], [10.0, 60.0]]),
    np.array([8.0, 8.0]),
    np.array([0.0, 0.56]),
  )
  cloth = brush.Cloth((200.0, 0.0, 0.0), (0.0, 0.0, 200.0), "striped")
  canvas.ribbon(band, cloth, scale=107.0, outline=False)
  flat = np.ones(3)
  color, alpha = canvas.finish(ambient=flat, key=0.0 * flat)
  assert alpha[30, 10] == 255 and alpha[30, 0] == 0
  # Ten periods of 0.056 in 60 rows; a band is 0.021 / 0.056 of each.
  blue = color[:, 10, 2] > 100
  assert np.sum(blue[1:] & ~blue[:-1]) + blue[0] == 10
  np.testing.assert_allclose(blue.mean(), 0.375, atol=0.1)
