"""benchmarks/real_check.py: what needs no file of a package."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import real_check

from dppp_jax import cli
from dppp_jax.weights import hub


def test_page_is_that_of_its_results():
  found = json.loads((cli.ROOT / "docs/real_check.json").read_text())
  assert real_check.page(found) == (
    (cli.ROOT / "docs/real_check.md").read_text()
  )
  assert set(found["checks"]) == set(real_check._CHECKS)
  assert all(values["ok"] for values in found["checks"].values())
  names = [file["inside"] for file in found["files"]]
  assert names == [file.inside for file in real_check.FILES.values()]


def test_a_header_claims_what_the_disk_does_not_hold(tmp_path):
  path = tmp_path / "big.safetensors"
  size = real_check.write_header(
    path,
    {
      "a": {"shape": [1 << 20, 1 << 10], "dtype": "float32"},
      "b": {"shape": [], "dtype": "int64"},
    },
  )
  assert size > 1 << 32 and path.stat().st_blocks * 512 < 1 << 20
  tensors = hub.read_tensors(path)
  assert tensors["a"].shape == (1 << 20, 1 << 10)
  assert tensors["b"].dtype == "int64" and tensors["b"].shape == ()


def test_another_file_of_that_name_is_refused(tmp_path):
  file = real_check.File("some", "1.0", "inside/it.bin", "0" * 64)
  place = tmp_path / "some-1.0/inside/it.bin"
  place.parent.mkdir(parents=True)
  place.write_bytes(b"other")
  with pytest.raises(SystemExit, match=r"is not that of some 1\.0"):
    real_check.fetch(file, tmp_path)


def test_what_cannot_be_fetched_is_none(tmp_path, monkeypatch):
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  file = real_check.File("no-such", "1.0", "inside/it.bin", "0" * 64)
  assert real_check.fetch(file, tmp_path) is None
