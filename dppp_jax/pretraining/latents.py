"""Latents of many pictures, computed once and kept on disk."""

from collections.abc import Callable
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import files, logs, trees
from dppp_jax.models import vae
from dppp_jax.weights import diffusers_folder

_BATCH = 16

# (index, uint8 [H, W, 3]) -> uint8 [H, W, 3].
Transform = Callable[[int, np.ndarray], np.ndarray]


def moments(
  images: np.ndarray,
  folder: str | pathlib.Path,
  *,
  cache: str | pathlib.Path,
  label: str,
  transform: Transform | None = None,
) -> np.memmap:
  """Encodes pictures, or opens what was encoded before.

  The posterior's mean and logvar are kept, not a sample of it, so that a
  training draws afresh at each step.

  Args:
    images: uint8 [N, H, W, 3], e.g. mapped from a file.
    folder: of the VAE, in diffusers' layout.
    cache: folder that the latents are kept in.
    label: says which pictures these are, and which transform; it names the
      file, with the VAE's weights and the first picture after the transform.
    transform: what is done to each picture first.

  Returns:
    float16 [N, h, w, 2 C], mapped: mean, then logvar.
  """
  folder = pathlib.Path(folder)
  digest = hashlib.sha256()
  for file in files.visible(folder, ".safetensors"):
    digest.update(file.read_bytes())
  first = images[0] if transform is None else transform(0, images[0])
  digest.update(np.ascontiguousarray(first))
  key = json.dumps([digest.hexdigest(), label, images.shape])
  name = hashlib.sha256(key.encode()).hexdigest()[:16]
  path = pathlib.Path(cache) / f"latents-{name}.npy"
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    _encode(images, folder, scratch, transform)
    scratch.replace(path)
  return np.load(path, mmap_mode="r")


def pictures(
  draw: Callable[[int], np.ndarray],
  num: int,
  *,
  cache: str | pathlib.Path,
  label: str,
) -> np.memmap:
  """Draws control images, or opens what was drawn before.

  Args:
    draw: number -> uint8 [H, W, 3].
    num: N.
    cache: folder that they are kept in.
    label: says which they are; it names the file.

  Returns:
    uint8 [N, H, W, 3], mapped.
  """
  name = hashlib.sha256(json.dumps([label, num]).encode()).hexdigest()[:16]
  path = pathlib.Path(cache) / f"control-{name}.npy"
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    first = draw(0)
    whole = np.lib.format.open_memmap(
      scratch, mode="w+", dtype=np.uint8, shape=(num, *first.shape)
    )
    for i in logs.progress(range(num), desc="control images", unit="image"):
      whole[i] = draw(i)
    whole.flush()
    scratch.replace(path)
  return np.load(path, mmap_mode="r")


def _encode(images, folder, path, transform) -> None:
  config, params = diffusers_folder.vae(folder)
  params = trees.to_float32(params)
  net = vae.VAE(config)

  @jax.jit
  def encode(params, images):
    x = images.astype(jnp.float32) / 127.5 - 1
    found = net.apply({"params": params}, x, method="encode")
    return jnp.concatenate(found, axis=-1).astype(jnp.float16)

  num, height, width, _ = images.shape
  sides = (height // config.factor, width // config.factor)
  whole = np.lib.format.open_memmap(
    path,
    mode="w+",
    dtype=np.float16,
    shape=(num, *sides, 2 * config.latent_channels),
  )
  starts = range(0, num, _BATCH)
  for start in logs.progress(starts, desc="encoding", unit="batch"):
    some = range(start, min(start + _BATCH, num))
    batch = [
      np.asarray(images[i]) if transform is None else transform(i, images[i])
      for i in some
    ]
    batch += batch[-1:] * (_BATCH - len(batch))  # One shape, one program.
    whole[some.start : some.stop] = encode(params, np.stack(batch))[: len(some)]
  whole.flush()
