"""The script for a GPU: its sections on a CPU, and what a failure costs."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import device


def test_both_resizes_are_compared():
  found = device._resize(True)
  assert found.keys() == {"jax.image.resize", "ours"}
  for row in found.values():
    assert row["compiles"] and row["largest_difference"] < 1e-3


def test_numbers_of_bfloat16_are_near_and_not_the_same(monkeypatch):
  monkeypatch.setattr(device, "_ATTENTIONS", ((7, 7, True),))
  found = device._attention(True)
  assert set(found) == {"7 x 7, causal"}
  assert all(1e-4 < error < 3e-2 for error in found.values()), found


def test_a_section_that_fails_or_hangs_costs_no_other(
  tmp_path, monkeypatch, capsys
):
  scripts = {
    "fails": "print('why'); raise SystemExit(3)",
    # What is written before the end of the time is kept.
    "hangs": """
import json, os, pathlib, time
place = pathlib.Path(os.environ["BENCHMARK_RESULTS"]) / "x-cpu.json"
place.write_text(json.dumps({"results": {"speed": 2}}))
time.sleep(60)
""",
    "works": """
import json, os, pathlib
place = pathlib.Path(os.environ["BENCHMARK_RESULTS"]) / "x-cpu.json"
place.write_text(json.dumps({"results": {"speed": 1}}))
""",
  }
  for name, text in scripts.items():
    (tmp_path / f"{name}.py").write_text(text)
  commands = {name: ([str(tmp_path / f"{name}.py")],) * 2 for name in scripts}
  monkeypatch.setattr(device, "_SCRIPTS", commands)
  monkeypatch.setattr(
    device, "_SECTIONS", {"fails": 30, "hangs": 5, "works": 30}
  )
  out = tmp_path / "out"
  monkeypatch.setattr(sys, "argv", ["device.py", "--out", str(out), "--tiny"])
  device.main()
  found = json.loads((out / "device.json").read_text())
  assert found["fails"]["note"] == "exit 3"
  assert found["fails"]["said"] == ["why"]
  assert found["hangs"]["note"] == "stopped after 5 s"
  assert found["hangs"]["speed"] == 2
  assert found["works"]["speed"] == 1 and "note" not in found["works"]
  assert str(out) in capsys.readouterr().out.splitlines()[-1]


def test_sections_end_with_the_time(monkeypatch):
  monkeypatch.setattr(
    device.subprocess, "Popen", lambda *a, **k: pytest.fail("started")
  )
  assert (
    "left out" in device._section("ptl", tiny=True, limit=3, cache="")["note"]
  )
