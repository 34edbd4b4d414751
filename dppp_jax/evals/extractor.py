"""Images in, features out: what a trained run is for.

An extractor knows the sizes of its network, its input and its normalisation; it
needs no dataset and no number of classes. Whatever comes in is read by threads,
resized, and run through one compiled program of one batch size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent import futures
import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any, Literal

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from dppp_jax import (
  checkpoints,
  devices,
  errors,
  logs,
  paths,
  ranges,
  trees,
  types,
)
from dppp_jax.data import images as images_lib
from dppp_jax.data import source as source_lib
from dppp_jax.data import transforms
from dppp_jax.evals import spec as spec_lib
from dppp_jax.models import clip, heads
from dppp_jax.weights import convert, hub, load

RUN_FILE = "extractor.json"
EXPORT_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DTYPES = ("float32", "bfloat16")
_USED = ("clip/vision_model/", "clip/visual_projection/", "projector/")


class Extractor:
  """Maps person images to features of norm 1.

  Args:
    spec: what the network is and what it wants to see.
    params: {"clip": {"vision_model", "visual_projection"}, "projector"}; more
      than that is left aside.
    batch_size: images a step; smaller batches are padded to it.
    dtype: compute dtype; by default bfloat16 on accelerators and float32 on
      CPUs.
    num_threads: that read and resize.
    where: where the parameters come from, for messages.
    folder: of a run, an export or a checkpoint; `where` by default.

  Attributes:
    spec: as given.
    where: as given.
    folder: as given.
    dtype: name of the compute dtype.
    params: float32 on the device, exactly those that are used.
    num_compilations: programs compiled so far: at most one.

  Raises:
    errors.UserError: parameters of another model, or NaN among them.
  """

  def __init__(
    self,
    spec: spec_lib.Spec,
    params: types.Params,
    *,
    batch_size: int = 64,
    dtype: jax.typing.DTypeLike | None = None,
    num_threads: int | None = None,
    where: str = "the parameters",
    folder: str | os.PathLike | None = None,
  ):
    ranges.one("batch_size", batch_size, ranges.COUNT)
    if num_threads is not None:
      ranges.one("num_threads", num_threads, ranges.COUNT)
    self.spec = spec
    self.where = where
    self.folder = str(folder or where)
    self.dtype = _dtype_name(dtype)
    self.params = _used(spec, params, where)
    self.num_compilations = 0
    self._batch_size = batch_size
    self._num_threads = num_threads or min(8, os.cpu_count() or 1)
    self._forward = make_forward(spec, self.dtype)
    self._compiled = None

  def with_feature(self, feature: spec_lib.Feature) -> "Extractor":
    """Returns an extractor of another feature of the same parameters."""
    return Extractor(
      dataclasses.replace(self.spec, feature=feature),
      self.params,
      batch_size=self._batch_size,
      dtype=self.dtype,
      num_threads=self._num_threads,
      where=self.where,
      folder=self.folder,
    )

  def __call__(
    self,
    images: types.Array | Iterable[Any],
    *,
    progress: bool = False,
  ) -> np.ndarray:
    """Extracts features.

    Args:
      images: uint8 [B, H, W, 3]; or any number of pictures of any sizes, each
        a path, the bytes of a file, a picture of Pillow (`images.of_pillow`),
        or numbers (`images.of_array`).
      progress: show a progress bar.

    Returns:
      float32 [B, D], of L2 norm 1.

    Raises:
      errors.UserError: a file that is missing or damaged (it is named),
        numbers that are no uint8 image, or one image instead of several.
    """
    items = _several(images)
    read = lambda i: _to_image(items[i], i)
    desc = "extract" if progress else None
    return self._run(read, len(items), on_corrupt="error", desc=desc)[0]

  def extract(
    self,
    source: source_lib.Source,
    *,
    on_corrupt: Literal["error", "skip"] = "error",
    desc: str = "extract",
  ) -> tuple[np.ndarray, np.ndarray]:
    """Extracts the features of a whole source, with a progress bar.

    Args:
      source: N images.
      on_corrupt: what an image that cannot be decoded does.
      desc: what the bar says.

    Returns:
      float32 [M, D] and the indices of the M images that could be read.
    """
    if on_corrupt not in ("error", "skip"):
      raise errors.UserError(
        f"on_corrupt {on_corrupt!r} is none of error, skip"
      )
    return self._run(source.read, len(source), on_corrupt=on_corrupt, desc=desc)

  def _run(
    self,
    read: Callable[[int], np.ndarray],
    num: int,
    *,
    on_corrupt: str,
    desc: str | None,
  ) -> tuple[np.ndarray, np.ndarray]:
    if self._compiled is None:
      self._compile()
    features = np.zeros((num, self.spec.width), np.float32)
    sound = np.ones(num, bool)
    bar = desc and logs.progress(total=num, desc=desc, unit="image")
    waiting = None  # One batch is on the device while the next is read.
    for start, batch, good in self._batches(read, num, on_corrupt):
      sound[start : start + len(good)] = good
      output = self._compiled(self.params, batch)
      if waiting is not None:
        _take(features, *waiting)
      waiting = start, output
      if bar is not None:
        bar.update(len(good))
    if waiting is not None:
      _take(features, *waiting)
    if bar is not None:
      bar.close()
    return features[sound], np.flatnonzero(sound)

  def _batches(
    self, read: Callable[[int], np.ndarray], num: int, on_corrupt: str
  ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (start, images [batch_size, H, W, 3], which could be read)."""

    def load_one(i: int) -> np.ndarray | None:
      try:
        image = read(i)
      except images_lib.CorruptImageError:
        if on_corrupt == "skip":
          return None
        raise
      return images_lib.resize(
        image, self.spec.image_size, interpolation=self.spec.interpolation
      )

    size = self._batch_size
    pool = futures.ThreadPoolExecutor(self._num_threads)
    try:
      numbers = iter(range(num))
      ahead = [
        pool.submit(load_one, i) for i in itertools.islice(numbers, 2 * size)
      ]
      for start in range(0, num, size):
        batch = np.zeros((size, *self.spec.image_size, 3), np.uint8)
        now, ahead = ahead[:size], ahead[size:]
        good = np.zeros(len(now), bool)
        for lane, future in enumerate(now):
          image = future.result()
          if image is not None:
            batch[lane], good[lane] = image, True
        ahead += [
          pool.submit(load_one, i) for i in itertools.islice(numbers, size)
        ]
        yield start, batch, good
    finally:
      pool.shutdown(wait=True, cancel_futures=True)

  def _compile(self) -> None:
    images = jax.ShapeDtypeStruct(
      (self._batch_size, *self.spec.image_size, 3), np.uint8
    )
    forward = jax.jit(self._forward)
    # A GPU's float32 products have 10 bits otherwise (TF32).
    exact = "float32" if self.dtype == "float32" else None
    with jax.default_matmul_precision(exact):
      self._compiled = forward.lower(self.params, images).compile()
    self.num_compilations += 1


def load_extractor(
  path: str | os.PathLike,
  *,
  feature: spec_lib.Feature | None = None,
  image_size: tuple[int, int] | None = None,
  step: int | None = None,
  batch_size: int = 64,
  dtype: jax.typing.DTypeLike | None = None,
) -> Extractor:
  """Loads an extractor from a run, an export or a CLIP checkpoint.

  Args:
    path: a run folder (extractor.json and checkpoints/), an export folder
      (launch/export.py), a CLIP checkpoint folder in Hugging Face's layout, or
      a hub id of one.
    feature: "content", "projected" or "concat"; what the folder says by
      default, "projected" for a CLIP.
    image_size: (H, W), what the folder says by default. A CLIP is given people:
      256 x 128, or 1.5 times its own side and half as wide if that is less.
    step: checkpoint of a run, the newest by default.
    batch_size: images a step.
    dtype: compute dtype, see `Extractor`.

  Raises:
    errors.UserError: nothing there to load, or damaged, or of another model.
  """
  ranges.one("batch_size", batch_size, ranges.COUNT)
  dtype = _dtype_name(dtype)
  if step is not None:
    ranges.one("step", step, ranges.WHOLE)
  path = paths.expand(path)
  is_run, folder = (path / RUN_FILE).is_file(), path
  if step is not None and not is_run:
    raise errors.UserError(
      f"step {step}: {path} is no run folder, and has no checkpoints: leave the"
      " step out"
    )
  if is_run:
    spec = spec_lib.Spec.from_json(path / RUN_FILE)
    step, params = checkpoints.restore_model(path, step)
    where = f"{path} (step {step})"
    spec = _of_its_stage(spec, params, feature, where)
  elif _is_export(path):
    spec = spec_lib.Spec.from_json(path / EXPORT_FILE)
    params = trees.unflatten(hub.read_tensors(path / WEIGHTS_FILE))
    where = str(path / WEIGHTS_FILE)
  elif (path / "checkpoints").is_dir() or (path / "environment.json").is_file():
    raise errors.UserError(
      f"{path}: a run folder without {RUN_FILE}: train it to the end of its"
      " first stage with launch/train.py"
    )
  else:
    folder = hub.resolve(path)
    config, params = load.clip(folder)
    spec, params = spec_lib.of_clip(folder, config.vision), {"clip": params}
    where = str(folder)
  changes = {"feature": feature, "image_size": image_size}
  spec = dataclasses.replace(
    spec, **{key: x for key, x in changes.items() if x is not None}
  )
  return Extractor(
    spec,
    params,
    batch_size=batch_size,
    dtype=dtype,
    where=where,
    folder=folder,
  )


def _of_its_stage(
  spec: spec_lib.Spec, params: types.Params, feature: str | None, where: str
) -> spec_lib.Spec:
  """Returns the spec of the stage that a checkpoint is of.

  extractor.json is of the stage that ended last; an older checkpoint may be of
  the stage before, which has no projector.
  """
  if spec.projector is None or "projector" in params:
    return spec
  if feature == "content":
    raise errors.UserError(
      f"{where}: is of stage ptl, and feature 'content' needs the projector of"
      " stage psd: take feature 'projected', or a later step"
    )
  spec = dataclasses.replace(spec, projector=None, feature="projected")
  if feature is None:
    logging.warning("%s: is of stage ptl: its feature is 'projected'", where)
  return spec


def make_forward(
  spec: spec_lib.Spec, dtype: jax.typing.DTypeLike = "float32"
) -> Callable[[types.Params, jax.Array], jax.Array]:
  """Returns the pure function (params, uint8 [B, H, W, 3]) -> [B, D]."""
  tower = clip.VisionTower(spec.vision, dtype=dtype)
  projector = heads.Projector(**spec.projector) if spec.projector else None

  def forward(params: types.Params, images: jax.Array) -> jax.Array:
    pixels = transforms.normalize(images, mean=spec.mean, std=spec.std)
    output = tower.apply({"params": params["clip"]}, pixels)
    feature = output.projected.astype(jnp.float32)
    if spec.feature == "content":
      feature = projector.apply({"params": params["projector"]}, feature)
    elif spec.feature == "concat":
      cls = output.cls.astype(jnp.float32)
      feature = jnp.concatenate([cls, feature], axis=-1)
    norm = jnp.linalg.norm(feature, axis=-1, keepdims=True)
    return feature / jnp.maximum(norm, 1e-12)

  return forward


def param_shapes(spec: spec_lib.Spec) -> types.Params:
  """Returns the tree of ShapeDtypeStructs that `make_forward` reads."""
  shapes = {"clip": clip.param_shapes(spec.vision)}
  if spec.feature == "content":
    width = jax.ShapeDtypeStruct((1, spec.vision.projection_dim), np.float32)
    shapes["projector"] = jax.eval_shape(
      heads.Projector(**spec.projector).init, jax.random.key(0), width
    )["params"]
  return shapes


def _take(features: np.ndarray, start: int, output: jax.Array) -> None:
  part = features[start : start + len(output)]
  part[:] = np.asarray(output)[: len(part)]


def _several(images: Any) -> Any:
  """Returns what has a length and an i-th picture; refuses a single one."""
  single = (str, bytes, bytearray, memoryview, os.PathLike, PIL.Image.Image)
  num_axes = getattr(images, "ndim", None)
  if num_axes == 1:  # Of paths, or of objects.
    return list(images)
  if isinstance(images, single) or num_axes not in (None, 4):
    raise errors.UserError(
      "give uint8 [B, H, W, 3] or a list of images, not one image: [image]"
    )
  if num_axes == 4:
    try:
      return np.asarray(images)
    except Exception as error:  # A tensor on a GPU, a deleted array, ...
      reason = " ".join(str(error).split())
      raise errors.UserError(
        f"the images are no array ({reason}): give uint8 [B, H, W, 3]"
      ) from error
  if isinstance(images, (Mapping, Set)) or not isinstance(images, Iterable):
    raise errors.UserError(
      f"give uint8 [B, H, W, 3] or a list of images, not a"
      f" {type(images).__name__}"
    )
  return list(images)


def _to_image(item: Any, i: int) -> np.ndarray:
  """Returns uint8 [H, W, 3] of anything that is a picture."""
  if isinstance(item, (str, os.PathLike)):
    return images_lib.read_file(item)
  name = f"image {i}"
  if isinstance(item, (bytes, bytearray, memoryview)):
    return images_lib.decode(bytes(item), name=name)
  if not isinstance(item, PIL.Image.Image):
    return images_lib.of_array(item, name=name)
  name = getattr(item, "filename", "") or name
  try:
    return images_lib.of_pillow(item, name=name)
  except errors.UserError:
    raise
  except Exception as error:  # Pillow reads a file when it is asked for pixels.
    reason = " ".join(str(error).split())
    raise images_lib.CorruptImageError(
      f"{name}: cannot be decoded ({reason}): replace or remove it"
    ) from error


def _dtype_name(dtype: Any) -> str:
  """Returns the name of the compute dtype; of None the device's usual one."""
  if dtype is None:
    return "float32" if devices.platform() == "cpu" else "bfloat16"
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = str(dtype)
  if name not in DTYPES:
    raise errors.UserError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
  return name


def _used(
  spec: spec_lib.Spec, params: types.Params, where: str
) -> types.Params:
  """Returns in float32 what the extractor reads; all is accounted for."""
  expected = param_shapes(spec)
  names = tuple(
    name
    for name in _USED
    if spec.feature == "content" or "projector" not in name
  )
  given = {
    name: leaf
    for name, leaf in trees.flatten(params).items()
    if name.startswith(names)
  }
  merged = trees.flatten(trees.merge(expected, given, where=where))
  merged = {k: np.asarray(v) for k, v in merged.items()}
  for name, leaf in merged.items():
    if not convert.is_finite(leaf):
      raise errors.UserError(
        f"{where}: the tensor {name} holds NaN or Inf: the training diverged,"
        " take an earlier checkpoint"
      )
  return trees.unflatten(trees.to_float32(merged))


def _is_export(path: pathlib.Path) -> bool:
  file = path / EXPORT_FILE
  if not file.is_file():
    return False
  try:
    values = json.loads(file.read_bytes())
    return isinstance(values, dict) and spec_lib.MARK in values
  except (ValueError, RecursionError):
    return False  # Whoever reads it next says so.
