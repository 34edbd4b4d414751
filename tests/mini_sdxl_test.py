"""The shipped small stage A: size, parity with diffusers, what it draws."""

import dataclasses
import pathlib
import sys

import diffusers
import numpy as np
import pytest

from dppp_jax import cli
from dppp_jax.geneperson import canvas
from dppp_jax.paperdoll import canvas_corpus, canvases, lexicon
from dppp_jax.pretraining import lora, readback

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import flax_generation
import generation_setting
import mini_quality
import torch_generation

# diffusers hands torch tensors to numpy in a way that numpy 2 discourages.
pytestmark = pytest.mark.filterwarnings(
  "ignore:__array__ implementation:DeprecationWarning"
)

_ASSETS = cli.ROOT / "dppp_jax/assets/mini"
_NUM = 8
OPTIMISED = True  # It draws for a minute.


@pytest.fixture(scope="module")
def drawn():
  """Other people and another world seed than those of docs/mini.md."""
  return canvas_corpus.draw(
    _NUM, seed=21, split="held_out", with_scenes=False, processes=2
  )


@pytest.fixture(scope="module")
def stage():
  return mini_quality.Stage(_ASSETS)


@pytest.fixture(scope="module")
def made(stage, drawn):
  cells = readback.cut(stage.canvases(drawn))
  return cells, stage.mattes(cells)


def test_all_small_networks_take_30_megabytes():
  files = [path for path in _ASSETS.rglob("*") if path.is_file()]
  assert sum(path.stat().st_size for path in files) <= 30 * 10**6


@pytest.mark.parametrize(
  "folder", ["sdxl", "controlnet-openpose", "controlnet-canny", "loras"]
)
def test_each_has_a_card(folder):
  text = (_ASSETS / folder / "README.md").read_text()
  assert "drawn" in text and "Licence: Apache-2.0" in text


def test_diffusers_reads_it_as_its_own():
  pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(_ASSETS / "sdxl")
  name = "EulerAncestralDiscreteScheduler"
  assert type(pipe.scheduler).__name__ == name
  assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_diffusers_draws_the_same_canvas():
  base, controls = generation_setting.shipped()
  setting = dataclasses.replace(
    generation_setting.settings(gpu=False)["mini"],
    folder=base,
    controlnets=controls,
  )
  ours = flax_generation.Side(setting)
  a = ours.draw("", 1).astype(int)
  b = torch_generation.Side(setting).draw("eager", 1, ours.noise(1)).astype(int)
  assert np.abs(a - b).max() <= 2
  assert a.std() > 10


def test_clothes_are_those_of_the_prompt(stage, drawn, made):
  wanted = [record["attributes"] for record in drawn.records]
  found = readback.attributes(stage.encoder, made[0], wanted)
  # Of eight canvases; docs/mini.md has the bars on many more.
  assert found["upper_color"]["canvas"] >= 0.75
  assert found["lower_color"]["canvas"] >= 0.6
  assert found["hair_color"]["canvas"] >= 0.6
  shifted = readback.attributes(
    stage.encoder, made[0], wanted[1:] + wanted[:1], ["upper_color"]
  )
  assert shifted["upper_color"]["canvas"] <= 0.4


def test_a_canvas_shows_one_person(stage, made):
  features = readback.features_of(stage.encoder, made[0])
  assert readback.identity_auc(features) >= 0.95


def test_figures_stand_as_their_skeletons_in_their_cells(stage, drawn, made):
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  wanted = flat(readback.cut(drawn.alphas))
  with_pose = readback.pose_iou(flat(made[1]), wanted)
  free = stage.mattes(readback.cut(stage.canvases(drawn, pose=0.0)))
  assert with_pose >= 0.55
  assert with_pose > readback.pose_iou(flat(free), wanted) + 0.1
  assert readback.spill(flat(made[1])) <= 0.03


@pytest.mark.parametrize(
  ("name", "least"), [("detail", 3.0), ("lighting", 20.0), ("style", 20.0)]
)
def test_loras_change_what_they_are_for(stage, drawn, made, name, least):
  words = [record["words"] for record in drawn.records]
  read = lora.reading(name, words)
  before = np.stack([canvas.join(x, canvases.LAYOUT) for x in made[0]])
  after = stage.canvases(drawn, params=stage.merged({name: 1.0}))
  assert read(after) > read(before) + least
  # It is still one person in the clothes of the prompt.
  wanted = [record["attributes"] for record in drawn.records]
  cells = readback.cut(after)
  assert readback.identity_auc(readback.features_of(stage.encoder, cells)) > 0.9
  found = readback.attributes(stage.encoder, cells, wanted, ["lower_color"])
  assert found["lower_color"]["canvas"] >= 0.5


def test_places_are_as_light_as_their_hour(stage):
  place = "outdoors, street, building"
  lumas = []
  for words in ("day, sunshine", "night, dark"):
    lighting = next(
      x for x in lexicon.words()["lighting"] if x.startswith(words[:5])
    )
    prompt = lexicon.BACKGROUND.format(place=place, lighting=lighting)
    lumas.append(readback.luminance(stage.places([prompt] * 4)))
  assert lumas[0] > lumas[1] + 30


def test_default_of_stage_a_is_whole():
  config = cli.load_config("geneperson.py:mini")
  models = [getattr(config.models, key) for key in ("base", "u2net")]
  assert all((cli.ROOT / path).exists() for path in models)
  layout = canvas.Layout(
    config.canvas.rows, config.canvas.cols, tuple(config.canvas.cell), 16
  )
  assert layout.size == (192, 144)
