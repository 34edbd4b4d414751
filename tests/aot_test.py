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
    "bytes": 2e9, "kernels": {"attention": 3},
  } | changes  # fmt: skip


_PROGRAM = aot_programs.Program(
  name="p", about="", build=lambda tiny: None, peak=0.6, attentions=3,
  moved=3.0,
)  # fmt: skip


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({}, None),
    ({"alias": 60}, "donated, and"),
    ({"peak": 7e8}, "needs 0.70 GB, its bound is 0.6"),
    ({"wide_share": 0.02}, "2.00% of its FLOP are float32"),
    ({"kernels": {"attention": 2}}, "2 attentions in cuDNN, expected are 3"),
    ({"bytes": 3.2e9}, "moves 3.20 GB, its bound is 3"),
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
  monkeypatch.setattr(
    sys, "argv", ["aot.py", "--programs", "psd", "--processes", "1"]
  )
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
  # What is not compiled yet, the page says. Nothing breaks its bounds.
  assert kept["results"].keys() <= _PROGRAMS.keys()
  for name, found in kept["results"].items():
    assert not aot.violations(_PROGRAMS[name], found), name


def test_what_fits_is_arithmetic_on_the_figures():
  # 2 GB whatever the batch, and a tenth of a GB for each picture.
  step = facts(peak=8.4e9, temp=6.4e9)
  canvas = lambda argument, temp: facts(argument=argument, temp=temp)
  kept = {
    "ptl_host": step,
    "canvas_denoise_1": canvas(10e9, 3e9),
    "canvas_denoise_4": canvas(10e9, 50e9),
    "canvas_decode_1": canvas(1e9, 2e9),
    "canvas_decode_4": canvas(1e9, 4e9),
    # Texts are read before the denoising begins: their temporaries are gone.
    "canvas_encode_1": canvas(2e9, 5e9),
    "canvas_encode_4": canvas(2e9, 5e9),
    "matting_f32": canvas(0.5e9, 3e9),
  }
  rows = [
    [cell.strip() for cell in line.split("|")[2:-1]]
    for line in aot.fits({"results": kept}).splitlines()[2:]
  ]
  # 0.92 x 24 = 22.08 GB: (22.08 - 2) / 0.1 is 200; 80 GB give 716, or 712.
  assert rows[0] == ["8.4 GB at 64", "200 pictures", "712 pictures"]
  # 10 + 1 + 2 + 0.5 held, and 3 + 2 + 3 or 50 + 4 + 3 waiting.
  assert rows[1] == ["21.5 at 1, 70.5 at 4 GB", "batch 1", "batch 4"]
  assert len(rows) == 2
