"""The README prints what was measured with the networks that are shipped."""

import json

import pytest

from dppp_jax import cli, demo

_README = (cli.ROOT / "README.md").read_text()
_DEMOS = {
  name: json.loads((cli.ROOT / f"docs/demo_{name}.json").read_text())
  for name in ("results", "seed0")
}
_SCORES = _DEMOS["results"]["scores"]


def test_table_is_that_of_the_last_demo():
  for line in demo.as_text(*demo.table(_SCORES)).splitlines():
    assert f"    {line}\n" in _README


def test_minutes_are_those_of_one_seed():
  one = _DEMOS["seed0"]
  assert one["seeds"] == 1
  assert f"`make demo` took {one['seconds'] / 60:.1f} minutes" in _README
  # The same people and draws, alone and as the first of three.
  for model, found in one["scores"][0].items():
    for name, scores in found.items():
      assert scores["mAP"] == pytest.approx(_SCORES[0][model][name]["mAP"])


def test_gains_are_those_of_all_seeds():
  def gains(better, worse):
    found = [
      100 * (seed[better][name]["rank1"] - seed[worse][name]["rank1"])
      for seed in _SCORES
      for name in seed[worse]
    ]
    return min(found), max(found)

  words = " ".join(_README.split())
  lift = "by {:.0f} to {:.0f} points of Rank-1".format(
    *gains("PTL", "frozen mini CLIP")
  )
  more = "PSD changes that by {:.1f} to {:.1f} points".format(
    *gains("PTL + PSD", "PTL")
  )
  assert f"{lift}, and {more}" in words


@pytest.mark.parametrize("name", _DEMOS)
def test_demo_ran_with_the_shipped_networks(name):
  assert _DEMOS[name]["networks"] == demo.networks()
  assert _DEMOS[name]["people"] == demo.PRESETS[0]
