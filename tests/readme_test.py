"""The README prints what was measured with the networks that are shipped."""

import json

from dppp_jax import cli, demo

_RESULTS = json.loads((cli.ROOT / "docs/demo_results.json").read_text())


def test_table_is_that_of_the_last_demo():
  text = (cli.ROOT / "README.md").read_text()
  printed = demo.as_text(*demo.table(_RESULTS["scores"]))
  for line in printed.splitlines():
    assert f"    {line}\n" in text


def test_demo_ran_with_the_shipped_networks():
  assert _RESULTS["networks"] == demo.networks()
  assert _RESULTS["people"] == demo.PRESETS[0]
