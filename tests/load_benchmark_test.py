"""The benchmark of loading: the files it makes, and what it counts."""

import pathlib
import sys

import pytest
import safetensors.numpy

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import load


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("made")
  return folder, load.make(folder, size="tiny", seed=3)


def test_files_are_random_and_repeatable(made, tmp_path):
  folder, counted = made
  files = sorted(folder.rglob("*.safetensors"))
  assert len(files) == 7  # Two ControlNets, four parts of the base, a LoRA.
  assert counted["bytes"] == sum(path.stat().st_size for path in files)
  again = load.make(tmp_path / "again", size="tiny", seed=3)
  assert again == counted
  for path in files:
    other = tmp_path / "again" / path.relative_to(folder)
    assert other.read_bytes() == path.read_bytes()
  values = safetensors.numpy.load_file(
    folder / "sdxl/unet/diffusion_pytorch_model.safetensors"
  )
  kernel = values["conv_in.weight"]
  assert kernel.dtype == "float16" and len(set(kernel.ravel().tolist())) > 500
  assert abs(kernel).min() >= 1 / 128 and abs(kernel).max() < 1 / 64


def test_all_is_loaded_and_counted(made):
  """In bfloat16, but for norms, biases and the small layers in float32."""
  folder, counted = made
  found = load.measure("ours", folder)
  # A parameter takes 2 bytes, or 4 in the small layers.
  assert 2 < found["device_gb"] * 1e9 / counted["parameters"] < 2.5
  assert found["peak_gb"] >= found["start_gb"] > 0
  assert found["seconds"] > 0


def test_anonymous_memory_is_seen():
  memory = load.Memory(seconds=0.001)
  with memory.watched():
    held = bytearray(64 << 20)
    held[:: 1 << 12] = bytes(len(held) >> 12)
    while memory.peak < memory.now + (60 << 20):
      pass  # Until the thread has looked.
  assert memory.peak >= memory.now + (60 << 20)
