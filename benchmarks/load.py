"""Seconds and memory until SDXL, two ControlNets and a LoRA can be sampled.

  python benchmarks/load.py                  # 12 GB in a temporary folder
  python benchmarks/load.py --folder DIR --keep
  python benchmarks/load.py --size tiny

The weights are random, of the published sizes and in float16, in the folders
that diffusers writes. They are loaded as launch/generate.py loads them, in
bfloat16, and by diffusers, in a process of its own each; before each the system
is told to forget the files, so that both read them from the disk. diffusers
loads no LoRA here: it would need peft. Without `accelerate`, which is not among
the tests' packages either, it draws its networks at random first.
"""

import argparse
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import common
import numpy as np

from dppp_jax import cli, logs
from dppp_jax.models import clip, unet_config
from dppp_jax.weights import single_file

SIDES = ("ours", "diffusers")
# Gigabytes of anonymous memory beside the device's, and seconds: the promise.
BAR = {"host_gb": 3.0, "seconds": 120.0}
_MINI = cli.ROOT / "dppp_jax/assets/mini"
_CONTROLNETS = ("controlnet-openpose", "controlnet-canny")
_LORA, _RANK = "detail.safetensors", 16
_BLOCK = 1 << 24  # Numbers that are drawn at once.


def _configs(size: str) -> single_file.Configs:
  """Returns the networks of the published SDXL, or small ones of its kind."""
  if size == "full":
    return single_file.SDXL
  text = dict(
    vocab_size=777,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    bos_token_id=775,
    eos_token_id=776,
  )
  return single_file.Configs(
    unet=dataclasses.replace(
      single_file.SDXL.unet,
      block_out_channels=(32, 64),
      layers_per_block=1,
      down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
      up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
      attention_head_dim=(1, 2),
      transformer_layers_per_block=(1, 2),
      cross_attention_dim=256,
      addition_time_embed_dim=32,
      projection_class_embeddings_input_dim=6 * 32 + 128,
    ),
    vae=dataclasses.replace(
      single_file.SDXL.vae,
      block_out_channels=(32, 64),
      down_block_types=("DownEncoderBlock2D",) * 2,
      up_block_types=("UpDecoderBlock2D",) * 2,
      layers_per_block=1,
    ),
    text_encoder=clip.TextConfig(**text, projection_dim=None),
    text_encoder_2=clip.TextConfig(**text, projection_dim=128),
  )


def make(folder: pathlib.Path, *, size: str, seed: int) -> dict[str, int]:
  """Writes the files, one block of random numbers after the other.

  Args:
    folder: where to; must be empty or missing.
    size: `full` or `tiny`.
    seed: of the numbers.

  Returns:
    "bytes" of all weights and "parameters" of all networks.
  """
  import diffusers
  import torch
  import transformers

  configs = _configs(size)
  steering = {field.name for field in dataclasses.fields(unet_config.Config)}
  steering &= {f.name for f in dataclasses.fields(unet_config.ControlNetConfig)}
  hint = (16, 32, 96, 256)[: len(configs.vae.block_out_channels)]
  control = unet_config.ControlNetConfig(
    **{name: getattr(configs.unet, name) for name in steering},
    conditioning_embedding_out_channels=hint,
  )
  text = lambda config, name: (
    getattr(transformers, name),
    {
      "architectures": [name],
      "model_type": "clip_text_model",
      **{k: v for k, v in vars(config).items() if v is not None},
    },
  )
  network = lambda config, name: (
    getattr(diffusers, name),
    {"_class_name": name, **dataclasses.asdict(config)},
  )
  folders = {
    "sdxl/unet": network(configs.unet, "UNet2DConditionModel"),
    "sdxl/vae": network(configs.vae, "AutoencoderKL"),
    "sdxl/text_encoder": text(configs.text_encoder, "CLIPTextModel"),
    "sdxl/text_encoder_2": text(
      configs.text_encoder_2, "CLIPTextModelWithProjection"
    ),
    **{name: network(control, "ControlNetModel") for name in _CONTROLNETS},
  }
  rng = np.random.SFC64(seed)
  factors: dict[str, tuple[int, ...]] = {}
  parameters = 0
  bars = logs.progress(folders.items(), desc="writing", unit="network")
  for place, (kind, values) in bars:
    (folder / place).mkdir(parents=True)
    _write_json(folder / place / "config.json", values)
    with torch.device("meta"):  # Names and shapes, and no memory.
      if "_class_name" in values:
        net = kind.from_config(values)
      else:
        net = kind(kind.config_class(**values))
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    stem = "model" if "text" in place else "diffusion_pytorch_model"
    _write_tensors(folder / place / f"{stem}.safetensors", shapes, rng)
    parameters += sum(int(np.prod(shape)) for shape in shapes.values())
    factors |= _factors(place, net)
  _write_tensors(folder / _LORA, factors, rng)
  for part in ("scheduler", "tokenizer", "tokenizer_2", "model_index.json"):
    copy = shutil.copytree if (_MINI / "sdxl" / part).is_dir() else shutil.copy
    copy(_MINI / "sdxl" / part, folder / "sdxl" / part)
  size_of = lambda path: path.stat().st_size
  return {
    "bytes": sum(map(size_of, folder.rglob("*.safetensors"))),
    "parameters": parameters,
  }


def _factors(place: str, net: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a LoRA for all linear layers of all attentions."""
  prefixes = {
    "sdxl/unet": "lora_unet_",
    "sdxl/text_encoder": "lora_te1_",
    "sdxl/text_encoder_2": "lora_te2_",
  }
  found = {}
  for name, module in net.named_modules():
    inside = "attentions" in name or "layers" in name
    if place not in prefixes or not inside or type(module).__name__ != "Linear":
      continue
    if "text" in place and not name.startswith("text_model."):
      name = f"text_model.{name}"
    key = prefixes[place] + name.replace(".", "_")
    found[f"{key}.lora_down.weight"] = (_RANK, module.in_features)
    found[f"{key}.lora_up.weight"] = (module.out_features, _RANK)
  return found


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")


def _write_tensors(
  path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], rng: Any
) -> None:
  """Writes float16 numbers of both signs, of 1/128 to 1/64."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, shape in shapes.items():
    start, end = end, end + 2 * int(np.prod(shape))
    header[name] = {
      "dtype": "F16",
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for first in range(0, end // 2, _BLOCK):
      count = min(_BLOCK, end // 2 - first)
      bits = rng.random_raw(-(-count // 4)).view(np.uint16)[:count]
      file.write((bits & 0x83FF | 0x2000).data)


def forget(folder: pathlib.Path) -> None:
  """Lets the system drop from memory what it keeps of files."""
  for path in folder.rglob("*.safetensors"):
    with path.open("rb") as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Memory:
  """The anonymous memory of this process, now and at most."""

  def __init__(self, *, seconds: float = 0.01):
    self.now = self.peak = _anonymous()
    self._seconds, self._ended = seconds, threading.Event()

  @contextlib.contextmanager
  def watched(self) -> Iterator[None]:
    """Looks every hundredth of a second."""
    thread = threading.Thread(target=self._watch, daemon=True)
    thread.start()
    try:
      yield
    finally:
      self._ended.set()
      thread.join()

  def _watch(self) -> None:
    while not self._ended.wait(self._seconds):
      self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
  """Returns bytes that no file holds; Linux only."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("RssAnon:"):
      return int(line.split()[1]) << 10
  raise RuntimeError("this system does not say how much memory is anonymous")


def ours(folder: pathlib.Path) -> int:
  """Loads as launch/generate.py does; returns the bytes on the device."""
  import jax
  import jax.numpy as jnp

  from dppp_jax.diffusion import sampler as sampler_lib
  from dppp_jax.geneperson import networks

  config = cli.load_config("geneperson.py").to_dict()
  places = {
    "models.base": folder / "sdxl",
    "models.pose_controlnet": folder / _CONTROLNETS[0],
    "models.grid_controlnet": folder / _CONTROLNETS[1],
    "models.u2net": _MINI / "u2netp",
    "loras.detail": folder / _LORA,
  }
  dtypes = {"sampler.dtype": jnp.bfloat16, "sampler.vae_dtype": jnp.bfloat16}
  place = sampler_lib.Placement(*dtypes.values(), tuple(jax.devices()[:1]))
  dtypes["matting.dtype"] = jnp.float32
  loaded = networks.load(config, places, dtypes, place=place)
  sampler = sampler_lib.Sampler(loaded.parts, dtype=jnp.bfloat16)
  jax.block_until_ready(sampler.params)
  return sum(leaf.nbytes for leaf in jax.tree.leaves(sampler.params))


def theirs(folder: pathlib.Path) -> int:
  """Loads with diffusers; returns the bytes of all parameters."""
  import diffusers
  import torch

  options = {"torch_dtype": torch.bfloat16}
  pipeline = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
    folder / "sdxl",
    controlnet=[
      diffusers.ControlNetModel.from_pretrained(folder / name, **options)
      for name in _CONTROLNETS
    ],
    **options,
  )
  networks = [pipeline.unet, pipeline.vae, pipeline.controlnet]
  networks += [pipeline.text_encoder, pipeline.text_encoder_2]
  return sum(p.nbytes for net in networks for p in net.parameters())


def measure(side: str, folder: pathlib.Path) -> dict[str, float]:
  """Loads in this process; imports are not timed.

  Returns:
    "seconds", "cpu_seconds", and in GB "device_gb" of all parameters,
    "start_gb" of anonymous memory after the imports, "peak_gb" of it, and
    "host_gb": what was needed at most beside the parameters. On a CPU they
    are part of the anonymous memory.
  """
  if side == "ours":
    import jax

    from dppp_jax.diffusion import sampler  # noqa: F401
    from dppp_jax.geneperson import networks  # noqa: F401

    on_host = jax.devices()[0].platform == "cpu"
    load = ours
  else:
    import diffusers

    diffusers.StableDiffusionXLControlNetPipeline  # noqa: B018  Imports it.
    on_host, load = True, theirs
  memory = Memory()
  start, cpu = time.perf_counter(), time.process_time()
  with memory.watched():
    device = load(folder)
  giga = lambda number: round(number / 1e9, 3)
  return {
    "seconds": round(time.perf_counter() - start, 1),
    "cpu_seconds": round(time.process_time() - cpu, 1),
    "device_gb": giga(device),
    "start_gb": giga(memory.now),
    "peak_gb": giga(memory.peak),
    "host_gb": giga(memory.peak - device * on_host),
  }


def _remote(side: str, folder: pathlib.Path) -> dict[str, Any]:
  """Measures in a process of its own, from the disk."""
  forget(folder)
  command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
  if done.returncode:
    return {"failed": f"exit status {done.returncode}: is there enough memory?"}
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Makes the files, measures both sides, and writes the results."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=("full", "tiny"), default="full")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=pathlib.Path, help="for the files")
  parser.add_argument("--keep", action="store_true", help="the files")
  parser.add_argument("--only", choices=SIDES, help="print, and write nothing")
  parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.side:
    print(json.dumps(measure(args.side, args.folder)))
    return
  folder = args.folder or pathlib.Path(tempfile.mkdtemp(prefix="load_"))
  folder = folder / f"{args.size}-{args.seed}"
  made = folder / "made.json"
  try:
    if not made.is_file():  # Of an earlier run that kept them.
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir(parents=True)
      found = make(folder, size=args.size, seed=args.seed)
      _write_json(made, found)
    results = {"size": args.size, "seed": args.seed, "bar": BAR}
    results |= json.loads(made.read_text())
    for side in (args.only,) if args.only else SIDES:
      results[side] = _remote(side, folder)
  finally:
    if not args.keep:
      shutil.rmtree(folder)
  rows = [
    [side, *(results[side].get(key, "") for key in _COLUMNS)]
    for side in SIDES
    if side in results
  ]
  print(common.table(["", *_COLUMNS], rows))
  if args.size == "full" and not args.only:
    print(common.write("load", results))


_COLUMNS = (
  "seconds",
  "cpu_seconds",
  "device_gb",
  "start_gb",
  "peak_gb",
  "host_gb",
  "failed",
)

if __name__ == "__main__":
  main()
