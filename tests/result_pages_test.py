"""Pages that scripts write from measurements: rows, verdicts, bars."""

import json
import pathlib
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT / "benchmarks"))

import common
import mini_page
import paperdoll_results

from dppp_jax import demo


def _scores(name, *rank1):
  where = common.environment()
  return {
    str(seed): {
      **{b: {"rank1": x, "mAP": x / 2} for b in paperdoll_results._NAMES},
      "where": where | {"commit": f"seed{seed}"},
    }
    for seed, x in enumerate(rank1)
  }


def test_small_tables_say_what_holds_in_every_seed():
  names = (paperdoll_results.FROZEN, *paperdoll_results.RUNS)
  scores = {name: _scores(name, 0.5, 0.6) for name in names}
  scores[names[0]] = _scores(names[0], 0.5)  # Without a seed.
  scores["a"] = _scores("a", 0.1, 0.2)  # Below b in both seeds.
  scores["e"] = _scores("e", 0.7, 0.55)  # Above c once, below it once.
  scores["k24"] = _scores("k24", 0.9, 0.9, 0.1)  # Above e in both seeds.
  text = paperdoll_results.page(
    {"scores": scores, "people": 3, "views": 6, "distances": "Of two models."}
  )
  row = lambda start: next(x for x in text.splitlines() if start in x)
  assert "| +40.0 ± 0.0 | +40.0 ± 0.0 | holds |" in row("IV b over a")
  assert "| open: better 2 of 4 times |" in row("IV e over c")
  assert "| does not hold |" in row("k = 6 over 24")
  assert "| 62.5 ± 10.6 | 31.2 ± 5.3 |" in row("e) + L2-SupCon")
  assert "| 50.0 ± 0.0 | 25.0 ± 0.0 |" in row("frozen mini CLIP |")
  assert "commit seed0" in text  # Each machine and commit has a line.
  assert "commit seed1" in text
  # Trained and tested on the same benchmark is no transfer.
  assert "| (own) | (own) | 55.0" in row("Market's people")


def test_the_mini_page_shows_bars_and_what_a_reader_can_say():
  reading = lambda x: {
    "zero_shot": {
      name: {"canvas": x, "cell": 0.0}
      for name in (
        "upper_color", "lower_color", "upper_pattern", "lower_pattern",
        "hair_color",
      )
    },
    "histogram": {"upper_color": x, "lower_color": x},
    "identity_auc": x, "pose_iou": x, "spill": 1 - x,
  }  # fmt: skip
  lora = {"without": 1.0, "with": 2.0, "wanted": 3.0}
  results = {
    "num": 8, "steps": 20, "spacing": "even", "guidance": 3.0, "seed": 1,
    "held_out": {
      "generated": reading(0.75) | {"pose_iou_without_controlnet": 0.25},
      "drawn": reading(0.875),
    },
    "new": {"generated": reading(0.5), "drawn": reading(1.0)},
    "luminance": {"words": {"night": 30.0}, "hours": {"day": 1.0, "dusk": 0.5}},
    "cards": {
      "vae": {"psnr_canvases": 30.0, "psnr_people": 25.0},
      "u2netp": dict.fromkeys(
        ("iou_drawn", "iou_degraded", "iou_reconstructed"), 0.96875
      ),
      "loras": {"detail": lora},
    },
  }  # fmt: skip
  text = mini_page.page(
    {"results": results, "environment": common.environment()}
  )
  row = lambda start: next(
    [cell.strip() for cell in line.split("|")[2:-1]]
    for line in text.splitlines()
    if line.startswith(f"| {start} |")
  )
  numbers = ["0.750", "0.875", "0.500", "1.000"]
  assert row("upper colour, by CLIP") == ["at least 0.9", *numbers]
  assert row("pose, IoU without the ControlNet") == ["", "0.250", "", "", ""]
  assert row("spill") == ["at most 0.02", "0.250", "0.125", "0.500", "0.000"]
  assert row("LoRA detail: without, with, taught by") == ["1.000, 2.000, 3.000"]


def test_mini_page_is_current():
  folder = _ROOT / "benchmarks" / "results"
  if not (folder / "mini_quality-cpu.json").is_file():
    pytest.skip("the small networks have not been measured")
  mini_page.write(check=True)


def test_small_tables_are_those_of_the_shipped_networks():
  assert paperdoll_results.held(demo.networks())
  results = json.loads(paperdoll_results._JSON.read_text())
  written = (_ROOT / "docs/paperdoll_results.md").read_text()
  assert written == paperdoll_results.page(results)
