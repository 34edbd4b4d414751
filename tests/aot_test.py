"""The GPU check: its programs trace, and its bounds are asserted."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import aot
import aot_programs

_PROGRAMS = {program.name: program for program in aot_programs.programs()}
# Those that trace in a second or two. What the others are made of, the tests of
# trainings and of matting run.
_TRACED = (
  "retrieval", "extractor_bf16", "export", "psd_device", "ptl_host",
  "canvas_encode_1", "canvas_decode_1", "canvas_denoise_1",
)  # fmt: skip


@pytest.mark.parametrize("name", _TRACED)
def test_programs_trace(name):
  traced = _PROGRAMS[name].build(True).trace()
  assert traced.jaxpr.eqns


def test_lora_is_built():
  job = _PROGRAMS["pretrain_lora"].build(True)
  state, _, dataset, feed, *_ = job.args
  assert all(name.startswith("lora/") for name in state[0])
  assert job.donated == aot_programs.nbytes(state) > 0
  # Latents come from the disk with each batch, tokens lie on the device.
  assert feed["moments"].shape == (4, 48, 36, 32)
  assert dataset["ids/text_encoder"].shape[0] == 8


def test_a_training_step_donates_its_whole_state():
  job = _PROGRAMS["ptl_device"].build(False)
  _, frozen, dataset, *_ = job.args
  assert job.donate == (0,)
  # The vision tower of ViT-B/16 and its two moments are most of it.
  assert 3 * 4 * 86e6 < job.donated < 3 * 4 * 130e6
  assert dataset["image"].shape == (130_519, 256, 128, 3)
  assert all(name.startswith("clip/") for name in frozen)


def facts(**changes):
  return {
    "donated": 100, "alias": 100, "peak": 5e8, "wide_share": 0.001,
    "kernels": {"attention": 3},
  } | changes  # fmt: skip


_PROGRAM = aot_programs.Program(
  name="p", about="", build=lambda tiny: None, peak=0.6, attentions=3
)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({}, None),
    ({"alias": 60}, "donated, and"),
    ({"peak": 7e8}, "needs 0.70 GB, its bound is 0.6"),
    ({"wide_share": 0.02}, "2.00% of its FLOP are float32"),
    ({"kernels": {"attention": 2}}, "2 attentions in cuDNN, expected are 3"),
    ({"error": "INTERNAL: x"}, "does not compile: INTERNAL: x"),
  ],
)
def test_bounds_are_asserted(changes, said):
  lines = aot.violations(_PROGRAM, facts(**changes))
  if said is None:
    assert not lines
  else:
    (line,) = lines
    assert line.startswith("p: ") and said in line and "\n" not in line


def test_results_are_kept_one_by_one(tmp_path, monkeypatch):
  monkeypatch.setattr(aot, "RESULTS", tmp_path / "aot.json")
  # Later ones first: the file has the order of the programs.
  aot.keep("ptl_host", facts(commit="a"))
  aot.keep("retrieval", facts(commit="b"))
  aot.keep("ptl_host", facts(commit="c"))
  found = json.loads(aot.RESULTS.read_text())
  assert list(found["results"]) == ["retrieval", "ptl_host"]
  assert found["results"]["ptl_host"]["commit"] == "c"
  # Of another compiler nothing is kept.
  monkeypatch.setattr(aot, "environment", lambda: {"packages": {}})
  aot.keep("export", facts())
  assert list(aot.read()["results"]) == ["export"]


def test_a_wrong_name_is_refused(monkeypatch, capsys):
  monkeypatch.setattr(aot, "topology", lambda: pytest.fail("must come later"))
  monkeypatch.setattr(sys, "argv", ["aot.py", "--programs", "ptl,nothing"])
  assert aot.main() == 2
  assert "nothing" in capsys.readouterr().err
  assert {p.name for p in aot.chosen("ptl,psd")} == {
    "ptl_device", "ptl_host", "psd_device", "psd_host",
  }  # fmt: skip


def test_one_violation_is_one_line_and_an_exit_code(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(aot, "RESULTS", tmp_path / "aot.json")
  monkeypatch.setattr(aot, "topology", lambda: type("T", (), {"devices": [0]}))
  monkeypatch.setattr(sys, "argv", ["aot.py", "--programs", "psd"])
  compiled = lambda program, *a, **k: facts(
    peak=2e9, kernels={"attention": program.attentions}
  )
  monkeypatch.setattr(aot, "compile_program", compiled)
  assert aot.main() == 1
  lines = capsys.readouterr().err.splitlines()
  assert lines == ["psd_host: needs 2.00 GB, its bound is 1"]
  assert list(aot.read()["results"]) == ["psd_device", "psd_host"]


def test_the_page_shows_what_is_kept():
  kept = aot.read()
  assert aot.page(aot.PAGE.read_text(), kept) == aot.PAGE.read_text()
  # All that is in the list was compiled, and nothing breaks its bounds.
  assert list(kept["results"]) == list(_PROGRAMS)
  for name, found in kept["results"].items():
    assert not aot.violations(_PROGRAMS[name], found), name
