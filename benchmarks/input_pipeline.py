"""Images a second of each placement, from JPEG files to augmented batches.

    python benchmarks/input_pipeline.py [--num_images 2048] [--batch_size 64]

`host` decodes and resizes with threads and augments on the device; `device`
keeps the whole data set there and gathers and augments inside one program.
Beside them, in the same run and on the same files and batches, a PyTorch
DataLoader with torchvision's transforms as they work on Pillow images, written
out below. Everything ends as a normalised float32 batch; on a GPU, PyTorch's
batches still lie in host memory and ours on the device.

The files are drawn noise with a photograph's smoothness, in Market-1501's size
(128 x 64), which every path enlarges to 256 x 128.
"""

import argparse
import os
import pathlib
import random
import statistics
import tempfile
import time

import common
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import torch

from dppp_jax import logs
from dppp_jax.data import benchmarks, images, loader, sampler, transforms

_SPEC = transforms.Augment()  # DPPP's: flip, pad and crop, contrast.
_IMAGES_PER_PERSON = 16


def make_files(
  folder: pathlib.Path, num: int, stored: tuple[int, int], seed: int
) -> benchmarks.ImageFiles:
  """Writes JPEG files that compress about as photographs of people do."""
  rng = np.random.default_rng(seed)
  height, width = stored
  paths = []
  for i in range(num):
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    smooth = images.resize(coarse, stored).astype(np.float32)
    grain = rng.normal(0, 4, smooth.shape)
    picture = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    paths.append(folder / f"{i:06}.jpg")
    paths[-1].write_bytes(images.encode_jpeg(picture, quality=90))
  pids = np.arange(num) // _IMAGES_PER_PERSON
  return benchmarks.ImageFiles(paths, pids, camids=np.zeros(num, int))


class PillowDataset(torch.utils.data.Dataset):
  """torchvision's Resize, flip, Pad, RandomCrop, contrast, ToTensor, Normalize.

  Contrast is one factor per picture from U(.5, 1.5), as DPPP has it.
  """

  def __init__(self, paths: list[str], size: tuple[int, int]):
    self._paths = paths
    self._size = size

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, i: int) -> torch.Tensor:
    height, width = self._size
    with PIL.Image.open(self._paths[i]) as file:
      image = file.convert("RGB")
    image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    if random.random() < _SPEC.flip:
      image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    image = PIL.ImageOps.expand(image, _SPEC.pad)
    top, left = (random.randint(0, 2 * _SPEC.pad) for _ in range(2))
    image = image.crop((left, top, left + width, top + height))
    factor = random.uniform(*_SPEC.contrast)
    image = PIL.ImageEnhance.Contrast(image).enhance(factor)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    tensor = tensor.to(torch.float32).div(255)
    mean, std = (
      torch.tensor(x)[:, None, None] for x in (_SPEC.mean, _SPEC.std)
    )
    return tensor.sub_(mean).div_(std)


def make_torch_epoch(files, plan, size, num_workers: int):
  """Returns a function that walks the plan once with a DataLoader."""
  # Spawned, because forking a process in which JAX has threads may hang; they
  # stay between epochs, so that their start is not timed.
  workers = (
    dict(multiprocessing_context="spawn", persistent_workers=True)
    if num_workers
    else {}
  )
  batches = torch.utils.data.DataLoader(
    PillowDataset([str(path) for path in files.paths], size),
    batch_sampler=plan.indices.tolist(),
    num_workers=num_workers,
    **workers,
  )

  def epoch():
    for batch in batches:
      assert batch.dtype == torch.float32

  return epoch


def make_host_epochs(files, plan, size):
  """Returns walks over the plan: decoding alone, and all of it."""
  step = jax.jit(transforms.augment, static_argnums=2)
  key = jax.random.key(0)

  def decode():
    for _ in loader.host_batches(files, plan, size=size):
      pass

  def whole():
    batches = loader.host_batches(files, plan, size=size)
    for i, batch in enumerate(loader.device_prefetch(batches)):
      out = step(batch["image"], jax.random.fold_in(key, i), _SPEC)
    return out

  return decode, whole


def make_device_epochs(pixels, plan):
  """Returns walks over the plan: gathering and augmenting, augmenting alone."""
  resident = jax.device_put(pixels)
  key = jax.random.key(0)
  augment = jax.jit(transforms.augment, static_argnums=2)

  @jax.jit
  def gather(resident, index, key):
    batch = jnp.take(resident, index, axis=0, mode="clip")
    return transforms.augment(batch, key, _SPEC)

  def whole():
    for i, index in enumerate(plan.indices):
      # Waited for each time, as a training step would.
      out = gather(resident, index, jax.random.fold_in(key, i))
      out.block_until_ready()
    return out

  def alone():
    batch = resident[: plan.batch_size]
    for i in range(len(plan)):
      out = augment(batch, jax.random.fold_in(key, i), _SPEC)
      out.block_until_ready()
    return out

  return whole, alone


def main() -> None:
  """Runs, prints and writes."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--num_images", type=int, default=2048)
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--size", type=int, nargs=2, default=(256, 128))
  parser.add_argument("--stored", type=int, nargs=2, default=(128, 64))
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  size, cpus = tuple(args.size), os.cpu_count() or 1
  in_workers = f"PyTorch DataLoader, {cpus} workers"
  # As DataLoader sets it in its workers; threads within an image only harm.
  torch.set_num_threads(1)

  with tempfile.TemporaryDirectory() as folder:
    files = make_files(
      pathlib.Path(folder), args.num_images, tuple(args.stored), args.seed
    )
    plan = sampler.shuffled(
      len(files), batch_size=args.batch_size, epochs=1, seed=args.seed
    )
    start = time.perf_counter()
    pixels, _ = loader.load_images(files, size=size)
    loading = time.perf_counter() - start
    decode, host = make_host_epochs(files, plan, size)
    device, alone = make_device_epochs(pixels, plan)
    walks = {
      "device: gather + augment": device,
      "host: decode + resize + transfer + augment": host,
      "host: decode + resize only": decode,
      "augment only": alone,
      in_workers: make_torch_epoch(files, plan, size, cpus),
      "PyTorch DataLoader, no workers": make_torch_epoch(files, plan, size, 0),
    }
    # In rounds, so that other work on the machine disturbs all alike; CPU time
    # is what it disturbs least.
    rounds = {name: [] for name in walks}
    cpu = {name: [] for name in walks}
    for i in logs.progress(range(args.repeats), desc="rounds"):
      for name, walk in walks.items():
        if i == 0:
          walk()
        start = time.process_time()
        timed = common.measure(walk, warmup=0, repeats=1)
        rounds[name].append(timed["min"])
        cpu[name].append(time.process_time() - start)

  num = len(plan) * plan.batch_size
  paths = {
    name: {
      "images_per_second": num / min(rounds[name]),
      "images_per_second_median": num / statistics.median(rounds[name]),
      # Of this process: what worker processes burn is not in it.
      "cpu_us_per_image": (
        None if name == in_workers else min(cpu[name]) / num * 1e6
      ),
    }
    for name in walks
  }
  best = max(
    rate["images_per_second"]
    for name, rate in paths.items()
    if name.startswith("PyTorch")
  )
  rows = [
    [
      name,
      rate["images_per_second"],
      rate["images_per_second"] / best,
      rate["cpu_us_per_image"] or "-",
    ]
    for name, rate in paths.items()
  ]
  header = ["path", "images/s", "x best PyTorch", "CPU us/image"]
  print(common.table(header, rows))
  print(f"the device placement loads {len(files) / loading:,.0f} images/s once")
  path = common.write(
    "input_pipeline",
    {
      **vars(args),
      "load_images_per_second": len(files) / loading,
      "paths": paths,
    },
  )
  print(f"written to {path}")


if __name__ == "__main__":
  main()
