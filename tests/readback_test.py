"""pretraining/readback.py: loops over pairs and pixels, and drawn canvases."""

import itertools

import numpy as np
import pytest

from dppp_jax import cli
from dppp_jax.evals import zeroshot
from dppp_jax.paperdoll import (
  canvas_corpus,
  canvases,
  lexicon,
  lighting,
  wardrobe,
)
from dppp_jax.pretraining import readback

_CLIP = cli.ROOT / "dppp_jax/assets/mini/clip"


@pytest.fixture(scope="module")
def drawn():
  return canvas_corpus.draw(
    24, seed=5, split="held_out", with_scenes=False, processes=1
  )


@pytest.fixture(scope="module")
def colours():
  return readback.Colours(canvas_corpus.draw(400, seed=6, processes=2))


def _lights(corpus):
  return [record["words"]["lighting"] for record in corpus.records]


def test_identity_auc_is_the_share_of_pairs_in_order():
  rng = np.random.default_rng(0)
  features = rng.integers(-1, 2, (4, 3, 5)).astype(float)  # With ties.
  flat = features.reshape(-1, 5)
  same, other = [], []
  for i, j in itertools.combinations(range(len(flat)), 2):
    (same if i // 3 == j // 3 else other).append(flat[i] @ flat[j])
  wins = [(a > b) + 0.5 * (a == b) for a in same for b in other]
  got = readback.identity_auc(features)
  np.testing.assert_allclose(got, np.mean(wins), rtol=1e-12)
  one_hot = np.repeat(np.eye(4)[:, None], 3, axis=1)
  assert readback.identity_auc(one_hot) == 1.0
  assert readback.identity_auc(np.ones((4, 3, 2))) == 0.5


def test_pose_iou_and_spill_by_hand():
  found, wanted = np.zeros((2, 2, 8, 10), np.uint8)
  found[0, 2:6, 2:6], wanted[0, 2:6, 4:8] = 255, 200  # 8 of 24 pixels.
  found[1, 0:4, 4:6] = 255  # Two of its four rows are on the border.
  wanted[1, 0:4, 4:6] = 128
  assert readback.pose_iou(found, wanted) == pytest.approx((8 / 24 + 1) / 2)
  assert readback.spill(found) == pytest.approx(4 / 24)
  assert readback.spill(np.zeros((1, 8, 8), np.uint8)) == 0
  assert readback.pose_iou(found * 0, wanted * 0) == 0


def test_luminance_is_bt601():
  image = np.zeros((1, 2, 3), np.uint8)
  image[0, 0] = (255, 0, 0)
  image[0, 1] = (0, 100, 200)
  want = (0.299 * 255 + 0.587 * 100 + 0.114 * 200) / 2
  assert readback.luminance(image) == pytest.approx(want)


def test_histograms_name_the_colours_of_drawn_clothes(drawn, colours):
  cells, mattes = readback.cut(drawn.images), readback.cut(drawn.alphas)
  wanted = [record["attributes"] for record in drawn.records]
  lit = _lights(drawn)
  found = colours.agreement(cells, mattes, drawn.keypoints, wanted, lit)
  assert min(found.values()) >= 0.75  # 0.96 where more have been seen.
  # Of others' words it is right by chance only.
  words = [
    {**person, "upper_color": other["upper_color"]}
    for person, other in zip(wanted, wanted[1:] + wanted[:1], strict=True)
  ]
  wrong = colours.agreement(cells, mattes, drawn.keypoints, words, lit)
  assert wrong["upper_color"] < 0.3


def test_histograms_see_what_is_inside_the_matte_only(drawn, colours):
  cells, mattes = readback.cut(drawn.images), readback.cut(drawn.alphas)
  rest = (drawn.keypoints[0], drawn.records[0]["attributes"], _lights(drawn)[0])
  before = colours.read("upper", cells[0], mattes[0], *rest)
  cells = np.where(mattes[..., None] > 127, cells, 0)
  after = colours.read("upper", cells[0], mattes[0], *rest)
  assert before == after


def test_what_a_coat_hides_is_not_asked_for(drawn, colours):
  cells, mattes = readback.cut(drawn.images[:4]), readback.cut(drawn.alphas[:4])
  wanted = [record["attributes"] for record in drawn.records[:4]]
  rows, lit = (cells, mattes, drawn.keypoints[:4]), _lights(drawn)[:4]
  each = lambda words: zip(*rows, words, lit, strict=True)
  read = [colours.read("lower", *row) for row in each(wanted)]
  words = [
    {**x, "upper_type": "shirt", "lower_color": y}
    for x, y in zip(wanted, read, strict=True)
  ]
  right = [
    colours.read("lower", *row) == row[3]["lower_color"] for row in each(words)
  ]
  # Of the first nothing is asked: below a coat its shorts cannot be seen.
  words[0] = {**words[0], "upper_type": "coat", "lower_type": "shorts"}
  found = colours.agreement(*rows, words, lit)
  assert found["lower_color"] == pytest.approx(np.mean(right[1:]))
  for upper, lower, is_seen in (
    ("coat", "shorts", False), ("coat", "skirt", False),
    ("coat", "trousers", True), ("jacket", "shorts", True),
  ):  # fmt: skip
    clothes = {"upper_type": upper, "lower_type": lower}
    assert readback.is_seen("lower_pattern", clothes) == is_seen
    assert readback.is_seen("upper_color", clothes)


@pytest.mark.parametrize("light", lighting.LIGHTINGS, ids=lambda x: x.words)
def test_even_light_is_that_of_the_renderer(light):
  """A white wall under any light of a canvas is white again."""
  words = lexicon.said(light)
  white = 200 * canvases.studio_light(words).gain / lighting.EVEN.gain
  seen = np.rint(np.clip(white, 0, 255)).astype(np.uint8)
  found = readback.evenly_lit(np.tile(seen, (2, 3, 1)), words)
  assert found.shape == (2, 3, 3)
  assert np.abs(found.astype(int) - 200).max() <= 1
  assert found.dtype == np.uint8
  bright = readback.evenly_lit(np.full((1, 3), 255, np.uint8), words)[0]
  np.testing.assert_allclose(
    bright, np.minimum(255, 255 * 200 / white), atol=0.5
  )  # And never darker for having been too bright.


def test_regions_follow_the_kind_of_clothes():
  points = np.zeros((18, 3))
  for side, x in (("right", 18), ("left", 30)):
    for name, y in (("shoulder", 20), ("hip", 45), ("knee", 65), ("ankle", 85)):
      points[readback.poses.INDEX[f"{side}_{name}"]] = (x, y, 1)
  region = lambda part, **words: readback._region(
    part, points, (96, 48), {"upper_type": "shirt", **words}
  )
  rows = lambda mask: np.flatnonzero(mask.any(axis=1))[[0, -1]].tolist()
  assert rows(region("upper", lower_type="jeans")) == [18, 47]
  # Thighs are 20 pixels long; lines begin and end with caps of two.
  assert rows(region("lower", lower_type="shorts")) == [50, 64]
  assert rows(region("lower", lower_type="jeans")) == [50, 79]
  coat = region("lower", lower_type="jeans", upper_type="coat")
  assert rows(coat) == [63, 81]


def test_a_clip_reads_cells_and_whole_canvases(drawn):
  encoder = zeroshot.load(_CLIP)
  cells = readback.cut(drawn.images[:6])
  wanted = [record["attributes"] for record in drawn.records[:6]]
  got = readback.attributes(encoder, cells, wanted, ["upper_color"])
  table = []
  for value in wardrobe.VALUES["upper_color"]:
    mean = encoder.texts(wardrobe.phrases("upper_color", value)).mean(axis=0)
    table.append(mean / np.linalg.norm(mean))
  hits, whole = [], []
  for canvas_cells, words in zip(cells, wanted, strict=True):
    features = encoder.images(canvas_cells)
    truth = wardrobe.VALUES["upper_color"].index(words["upper_color"])
    hits += [int(np.argmax(table @ x)) == truth for x in features]
    whole.append(int(np.argmax(table @ features.mean(axis=0))) == truth)
  assert got["upper_color"]["cell"] == pytest.approx(np.mean(hits))
  assert got["upper_color"]["canvas"] == pytest.approx(np.mean(whole))


def test_drawn_cells_of_a_person_are_alike(drawn):
  encoder = zeroshot.load(_CLIP)
  features = readback.features_of(encoder, readback.cut(drawn.images))
  assert readback.identity_auc(features) > 0.99
  shuffled = features.transpose(1, 0, 2)[: canvases.LAYOUT.num_cells]
  assert readback.identity_auc(shuffled) < 0.6
