"""The shipped mini U2-Net: size, and whom it finds."""

import json

import numpy as np
import pytest

from dppp_jax import cli
from dppp_jax.geneperson import matting as matting_lib
from dppp_jax.paperdoll import canvas_corpus, canvases
from dppp_jax.pretraining import matting

_FOLDER = cli.ROOT / "dppp_jax/assets/mini/u2netp"
_VAE = cli.ROOT / "dppp_jax/assets/mini/sdxl/vae"
if not _FOLDER.exists():
  pytest.skip("this network is not shipped yet", allow_module_level=True)


@pytest.fixture(scope="module")
def corpus():
  """Other people and another world seed than those of the card."""
  return canvas_corpus.draw(8, seed=7, split="held_out", processes=1)


def test_is_small():
  assert sum(p.stat().st_size for p in _FOLDER.iterdir()) <= 2 * 2**20


def test_finds_people_on_drawn_and_on_generated_like_cells(corpus):
  found = matting.measure(_FOLDER, corpus, vae=str(_VAE))
  assert found["iou_drawn"] >= 0.93
  assert found["iou_reconstructed"] >= 0.93
  assert found["iou_degraded"] >= 0.91  # The card's bar is 0.93 on more cells.
  assert found["empty_peak"] < 0.5


def test_an_empty_cell_has_an_empty_matte(corpus):
  network = matting_lib.load(_FOLDER, size=canvases.LAYOUT.cell, batch_size=16)
  cells = np.stack([np.full((96, 48, 3), tone, np.uint8) for tone in (90, 200)])
  mattes = network(cells)
  assert not mattes.alpha.any() and (mattes.peak < 0.5).all()


def test_card_says_what_was_measured():
  metrics = json.loads((_FOLDER / "metrics.json").read_text())
  config = json.loads((_FOLDER / "training.json").read_text())
  text = (_FOLDER / "README.md").read_text()
  assert matting.card(config, metrics) == text
  for key in ("drawn", "degraded", "reconstructed"):
    assert metrics[f"iou_{key}"] >= 0.93
  committed = cli.load_config("configs/pretrain_u2netp.py").to_dict()
  assert json.loads(json.dumps(committed)) == config
