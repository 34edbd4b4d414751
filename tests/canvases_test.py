"""Studio canvases: the same everywhere, true to their words and mattes."""

import dataclasses
import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dppp_jax.geneperson import canvas, prompts, vocabulary
from dppp_jax.paperdoll import canvas_corpus, canvases, lexicon, wardrobe
from dppp_jax.weights import load

_ROOT = pathlib.Path(__file__).parents[1]
_TOKENIZER = _ROOT / "dppp_jax/assets/mini/clip"


@pytest.fixture(scope="module")
def samples():
  return [canvases.draw(3, number) for number in range(24)]


def _digest(sample):
  parts = (sample.image, sample.alpha, sample.skeleton, sample.lines)
  digest = hashlib.sha256(sample.prompt.encode())
  for part in parts:
    digest.update(part.tobytes())
  return digest.hexdigest()


def test_a_canvas_is_a_function_of_seed_number_and_split(samples):
  numbers = (7, 0, 20)
  assert [_digest(canvases.draw(3, n)) for n in numbers] == [
    _digest(samples[n]) for n in numbers
  ]
  code = (
    "from tests import canvases_test as t; from dppp_jax.paperdoll import"
    f" canvases; print(*[t._digest(canvases.draw(3, n)) for n in {numbers}])"
  )
  other = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True, text=True, check=True, cwd=_ROOT,
  )  # fmt: skip
  assert other.stdout.split() == [_digest(samples[n]) for n in numbers]
  others = [canvases.draw(4, 0), canvases.draw(3, 0, split="held_out")]
  assert len({s.prompt for s in (samples[0], *others)}) == 3


def test_a_matte_is_where_a_person_changes_the_picture(samples):
  """Against the paper itself, which is the same in all cells of a canvas."""
  for sample in samples[:7]:
    cells = canvas.cut(sample.image, canvases.LAYOUT).astype(int)
    mattes = canvas.cut(sample.alpha[..., None], canvases.LAYOUT)[..., 0]
    # A row of paper has one tone; few hands reach a cell's edge.
    paper = np.median(cells[:, :, 3:4], axis=0, keepdims=True)
    changed = (np.abs(cells - paper) > 24).any(-1)
    inner = np.zeros(changed.shape, bool)
    inner[:, 2:70, 2:-2] = True  # Without grid lines, and above the shadow.
    solid, clear = mattes > 200, mattes == 0
    assert (changed & clear & inner).mean() < 0.002
    # Clothes may have the colour of the paper, but not most of them.
    assert (changed & solid & inner).sum() > 0.5 * (solid & inner).sum()
    assert 0.08 < (mattes > 127).mean() < 0.5


def test_grid_lines_are_black_and_nobody(samples):
  grid = canvas.grid_map(canvases.LAYOUT)[..., 0] == 0
  with_grid = [s for s in samples if s.has_grid]
  without = [s for s in samples if not (s.has_grid or s.is_scene)]
  assert len(with_grid) > len(without) > 0
  for sample in with_grid:
    assert not sample.image[grid].any() and not sample.alpha[grid].any()
    want = canvas.line_map(canvas.grid_map(canvases.LAYOUT))
    np.testing.assert_array_equal(sample.lines, want)
  for sample in without:
    assert sample.image[grid].mean() > 40 and not sample.lines.any()


def test_skeletons_lie_on_their_people(samples):
  for sample in samples[:7]:
    drawn = (sample.skeleton > 60).any(-1)
    matte = sample.alpha > 0
    assert matte[drawn].mean() > 0.9


def test_places_have_nobody(samples):
  places = [s for s in samples if s.is_scene]
  assert [samples[n] for n in (7, 15, 23)] == places
  for sample in places:
    assert not sample.alpha.any() and not sample.skeleton.any()
    assert sample.prompt.startswith("scenery, ")
    assert sample.words["place"] in lexicon.PLACES
    assert not sample.attributes
    indoor = "indoors" in sample.words["lighting"]
    assert indoor == sample.words["place"].startswith("indoors")


def test_prompts_are_what_stage_a_asks(samples):
  words = vocabulary.load(lexicon.PATH)
  for sample in samples:
    if sample.is_scene:
      continue
    who = prompts.Person(0, sample.words)
    assert sample.prompt == who.prompt(lexicon.TEMPLATE)
    assert words.objection(sample.words) is None
    for key in (*vocabulary.OUTFIT, *vocabulary.EXTRAS):
      assert sample.words[key] in words.values(key, sample.words["gender"])
    assert set(sample.attributes) == set(wardrobe.VALUES)
    for key, value in sample.attributes.items():
      assert value in wardrobe.VALUES[key], (key, value)


def test_every_prompt_fits_into_the_mini_clip():
  tokenizer = load.tokenizer(_TOKENIZER)
  raw = lexicon.words()
  longest = lambda values: max(
    values, key=lambda v: len(tokenizer(v).input_ids)
  )
  flat = lambda key: lexicon.vocabulary().values(key)
  words = {
    key: longest(flat(key))
    for key in ("gender", *vocabulary.OUTFIT, *vocabulary.EXTRAS)
  }
  prompt = prompts.Person(0, words).prompt(lexicon.TEMPLATE)
  assert len(tokenizer(prompt).input_ids) <= 77
  place = longest([*raw["place"]["outdoors"], *raw["place"]["indoors"]])
  prompt = prompts.background(
    place, words["lighting"], template=lexicon.BACKGROUND
  )
  assert len(tokenizer(prompt).input_ids) <= 77


def test_new_combinations_are_kept_from_training():
  triple = lambda who: tuple(
    who.words[k] for k in ("upper_type", "upper_color", "lower_color")
  )
  seen = {
    split: {
      triple(canvases.person(0, n, split=split)) for n in range(400 // part)
    }
    for split, part in (("train", 1), ("new", 8))
  }
  assert not seen["train"] & seen["new"]
  some = [canvases.person(1, n, split="held_out").words for n in range(2000)]
  assert 0.03 < np.mean([canvases.is_new(w) for w in some]) < 0.07
  # Each word of a new combination has been seen by itself.
  for i in range(3):
    assert {t[i] for t in seen["new"]} <= {t[i] for t in seen["train"]}


def test_people_are_many_and_different():
  house = prompts.People(0, vocabulary=lexicon.vocabulary())
  assert house.capacity > 9000
  people = [canvases.person(0, n, split="train") for n in range(300)]
  assert len({p.prompt(lexicon.TEMPLATE) for p in people}) == 300
  # Beyond the capacity there are other people, not the same again.
  far = canvases.person(0, house.capacity, split="train")
  assert far.words != people[0].words


def test_vocabulary_file_is_current(tmp_path):
  assert lexicon.PATH.read_text() == lexicon.text()
  out = tmp_path / "words.json"
  subprocess.run(
    [sys.executable, "data_tools/mini_vocabulary.py", f"--out={out}"],
    check=True, capture_output=True, cwd=_ROOT,
  )  # fmt: skip
  assert out.read_text() == lexicon.text()
  assert vocabulary.load(out).digest == lexicon.vocabulary().digest


@pytest.mark.parametrize("processes", [1, 2])
def test_corpus_holds_the_samples(tmp_path, samples, processes, monkeypatch):
  monkeypatch.setattr(canvas_corpus, "_CHUNK", 9)
  corpus = canvas_corpus.draw(
    16, seed=3, processes=processes, cache=tmp_path / "cache"
  )
  for i, sample in enumerate(samples[:16]):
    np.testing.assert_array_equal(corpus.images[i], sample.image)
    np.testing.assert_array_equal(corpus.alphas[i], sample.alpha)
    np.testing.assert_array_equal(corpus.lines(i), sample.lines)
    # Key points are kept in float32.
    apart = corpus.skeleton(i).astype(int) - sample.skeleton
    assert np.abs(apart).max() <= 8
    assert corpus.prompts[i] == sample.prompt
    assert corpus.records[i]["attributes"] == dict(sample.attributes)
  assert corpus.is_scene.tolist() == [s.is_scene for s in samples[:16]]


def test_corpus_is_drawn_once(tmp_path, monkeypatch):
  first = canvas_corpus.draw(3, seed=1, processes=1, cache=tmp_path)
  monkeypatch.setattr(canvases, "draw", None)
  again = canvas_corpus.draw(3, seed=1, processes=1, cache=tmp_path)
  np.testing.assert_array_equal(first.images, again.images)
  assert isinstance(again.images, np.memmap)
  monkeypatch.setattr(canvas_corpus, "_renderer", lambda: "other code")
  with pytest.raises(TypeError):
    canvas_corpus.draw(3, seed=1, processes=1, cache=tmp_path)
  # Nothing half-drawn is left behind.
  assert len(list(tmp_path.iterdir())) == 1


def test_sample_draws_its_own_layout():
  layout = dataclasses.replace(canvases.LAYOUT, rows=1, cols=4, cell=(64, 32))
  sample = canvases.draw(0, 0, layout=layout)
  assert sample.image.shape == sample.skeleton.shape == (64, 128, 3)
  assert len(sample.keypoints) == 4
