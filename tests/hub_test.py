"""What is fetched of a hub's repository: what is read, and nothing else."""

import fnmatch

import huggingface_hub
import pytest

from dppp_jax import errors
from dppp_jax.weights import diffusers_folder, u2net

_STEM = "diffusion_pytorch_model"
# As the repositories of SDXL and of its ControlNets are laid out.
_SDXL = [
  "README.md",
  "model_index.json",
  "sd_xl_base_1.0.safetensors",
  "sd_xl_offset_example-lora_1.0.safetensors",
  "scheduler/scheduler_config.json",
  "text_encoder/config.json",
  "text_encoder/model.safetensors",
  "text_encoder/model.fp16.safetensors",
  "text_encoder/model.onnx",
  "tokenizer/merges.txt",
  "unet/config.json",
  f"unet/{_STEM}.safetensors",
  f"unet/{_STEM}.fp16.safetensors",
  "vae/config.json",
  f"vae/{_STEM}.safetensors",
]
_SHARDED = [
  "config.json",
  f"{_STEM}.safetensors.index.json",
  f"{_STEM}-00001-of-00002.safetensors",
  f"{_STEM}-00002-of-00002.safetensors",
  f"{_STEM}.safetensors.index.fp16.json",
  f"{_STEM}.fp16-00001-of-00002.safetensors",
  f"{_STEM}.fp16-00002-of-00002.safetensors",
  f"{_STEM}.bin",
]


@pytest.fixture
def fetched(tmp_path, monkeypatch):
  """What the hub is asked for, of repositories that it lists."""
  asked = []
  listed = {"a/sdxl": _SDXL, "a/net": _SHARDED}

  def download(name, *, allow_patterns):
    asked.append(allow_patterns)
    return str(tmp_path)

  def files(name):
    if name not in listed:
      raise OSError("no network")
    return listed[name]

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  monkeypatch.setattr(huggingface_hub, "list_repo_files", files)
  return asked


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_one_precision_of_a_pipeline_and_no_single_files(fetched, variant):
  diffusers_folder.resolve("a/sdxl", variant=variant)
  dot = ".fp16" if variant else ""
  assert sorted(fetched[0]) == sorted(
    [
      "model_index.json",
      "scheduler/scheduler_config.json",
      "text_encoder/config.json",
      f"text_encoder/model{dot}.safetensors",
      "tokenizer/merges.txt",
      "unet/config.json",
      f"unet/{_STEM}{dot}.safetensors",
      "vae/config.json",
      f"vae/{_STEM}.safetensors",  # There is no other.
    ]
  )


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_of_one_precision(fetched, variant):
  diffusers_folder.resolve("a/net", variant=variant)
  half = {name for name in _SHARDED if "fp16" in name}
  whole = {name for name in _SHARDED if _STEM in name} - half
  weights = half if variant else whole - {f"{_STEM}.bin"}
  assert set(fetched[0]) == {"config.json"} | weights


def test_variants_alone_are_fetched_for_whoever_reads_them(
  fetched, monkeypatch
):
  files = ["config.json", f"{_STEM}.fp16.safetensors"]
  monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)
  diffusers_folder.resolve("a/net")
  assert sorted(fetched[0]) == files


def test_files_of_torch_where_there_are_no_others(fetched, monkeypatch):
  files = [
    "model_index.json",
    *(f"unet/{_STEM}.bin", f"unet/{_STEM}.fp16.bin"),
    *("text_encoder/pytorch_model.bin", "text_encoder/training_args.bin"),
    *(f"vae/{_STEM}.safetensors", f"vae/{_STEM}.bin"),
  ]
  monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)
  diffusers_folder.resolve("a/old")
  assert sorted(fetched[0]) == [
    "model_index.json",
    "text_encoder/pytorch_model.bin",
    f"unet/{_STEM}.bin",
    f"vae/{_STEM}.safetensors",
  ]
  # Beside a name that is none of the usual ones.
  files[:] = ["OpenPoseXL2.safetensors", f"{_STEM}.bin", "config.json"]
  diffusers_folder.resolve("a/net")
  assert sorted(fetched[1]) == ["OpenPoseXL2.safetensors", "config.json"]


@pytest.mark.parametrize(
  "files,wanted",
  [
    (["u2net.pth", "README.md"], ["u2net.pth"]),
    (["u2net.pth", "u2net.onnx"], ["u2net.onnx"]),
    (
      ["pytorch_model.bin", "config.json"],
      ["pytorch_model.bin", "config.json"],
    ),
    (["a.safetensors", "a.onnx", "a.pth"], ["a.safetensors"]),
  ],
)
def test_one_format_of_a_u2net(fetched, monkeypatch, files, wanted):
  monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)
  u2net.resolve("a/u2net")
  assert fetched == [wanted]


def test_without_a_list_the_cache_is_asked_for_all(fetched):
  diffusers_folder.resolve("b/unlisted")
  matches = lambda file: any(fnmatch.fnmatch(file, p) for p in fetched[0])
  assert matches("unet/config.json") and matches("vae/x.safetensors")
  assert not matches("unet/x.bin")


def test_no_network_at_all_is_one_sentence(monkeypatch):
  def unreachable(*args, **kwargs):
    raise OSError("no network")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
  monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
  with pytest.raises(errors.UserError, match="could not be fetched") as caught:
    diffusers_folder.resolve("b/unlisted")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError])
def test_no_network_is_one_line_whatever_the_library_raises(monkeypatch, error):
  def fail(*_, **__):
    raise error("Name or service not known")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
  with pytest.raises(errors.UserError, match=r"a/b is no .*not known"):
    diffusers_folder.resolve("a/b")
