"""Many studio canvases, drawn by several processes, kept on disk."""

from collections.abc import Iterator, Mapping
import dataclasses
import hashlib
import json
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from dppp_jax import logs, workers
from dppp_jax.geneperson import canvas, poses, prompts, vocabulary
from dppp_jax.paperdoll import (
  bags,
  brush,
  canvases,
  figure,
  garments,
  head,
  lexicon,
  lighting,
  parts,
  scenes,
  wardrobe,
  world,
)

_CHUNK = 200  # Canvases that one task draws.
_ARRAYS = ("images", "alphas", "keypoints")
# Whatever changes a pixel or a word.
_CODE = (
  bags, brush, canvas, canvases, figure, garments, head, lexicon, lighting,
  parts, poses, prompts, scenes, vocabulary, wardrobe, world,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Corpus:
  """N canvases of one seed and split.

  Attributes:
    images: uint8 [N, H, W, 3], in memory or mapped from a file.
    alphas: uint8 [N, H, W].
    keypoints: float32 [N, cells, 18, 3], x and y in pixels of the cell, then
      1 where visible; zero for places.
    records: N dicts of "prompt", "words", "attributes", "has_grid" and
      "is_scene", as `canvases.Sample` has them.
  """

  images: np.ndarray
  alphas: np.ndarray
  keypoints: np.ndarray
  records: list[Mapping[str, Any]]

  def __len__(self) -> int:
    return len(self.images)

  @property
  def prompts(self) -> list[str]:
    """The prompts."""
    return [record["prompt"] for record in self.records]

  @property
  def is_scene(self) -> np.ndarray:
    """Which are places, bool [N]."""
    return np.array([record["is_scene"] for record in self.records])

  def skeleton(self, i: int) -> np.ndarray:
    """Draws the skeletons of canvas i, uint8 [H, W, 3]; black for a place."""
    if self.records[i]["is_scene"]:
      return canvases.skeleton(())
    figures = tuple(
      poses.Keypoints(
        xy=points[:, :2].astype(np.float64),
        depth=np.zeros(len(points)),
        visible=points[:, 2] > 0,
      )
      for points in self.keypoints[i]
    )
    return canvases.skeleton(figures)

  def skeletons(self) -> Iterator[np.ndarray]:
    """Yields `skeleton(i)` of all canvases."""
    return (self.skeleton(i) for i in range(len(self)))

  def lines(self, i: int) -> np.ndarray:
    """Returns the Canny map of canvas i, uint8 [H, W, 3]."""
    lines = canvases.grid_lines()
    return lines if self.records[i]["has_grid"] else np.zeros_like(lines)


def draw(
  num: int,
  *,
  seed: int,
  split: str = "train",
  with_scenes: bool = True,
  processes: int = 2,
  cache: str | pathlib.Path | None = None,
) -> Corpus:
  """Draws canvases 0 .. num - 1, or reads them back.

  Args:
    num: N.
    seed: of the world.
    split: a key of canvases.SPLITS.
    with_scenes: whether every eighth is a place.
    processes: that draw beside each other; the canvases do not depend on it.
    cache: folder that keeps the arrays, which are then mapped and not read;
      None draws into a folder that is removed again.

  Returns:
    The corpus.
  """
  if cache is None:
    with tempfile.TemporaryDirectory() as scratch:
      held = draw(
        num, seed=seed, split=split, with_scenes=with_scenes,
        processes=processes, cache=scratch,
      )  # fmt: skip
      return dataclasses.replace(
        held, **{name: np.array(getattr(held, name)) for name in _ARRAYS}
      )
  key = json.dumps([num, seed, split, with_scenes, _renderer()])
  name = hashlib.sha256(key.encode()).hexdigest()[:16]
  folder = pathlib.Path(cache) / f"canvases-{name}"
  if not folder.is_dir():
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
      _write(scratch, num, (seed, split, with_scenes), processes)
      scratch.rename(folder)
    except OSError:
      if not folder.is_dir():  # Another process may have been faster.
        raise
    finally:
      shutil.rmtree(scratch, ignore_errors=True)
  arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
  return Corpus(*arrays, json.loads((folder / "records.json").read_text()))


def _renderer() -> str:
  """Returns a digest of the code that draws, so that no cache outlives it."""
  digest = hashlib.sha256()
  for module in _CODE:
    digest.update(pathlib.Path(module.__file__).read_bytes())
  return digest.hexdigest()


def _write(folder, num, choice, processes) -> None:
  height, width = canvases.LAYOUT.size
  shapes = {
    "images": ((num, height, width, 3), np.uint8),
    "alphas": ((num, height, width), np.uint8),
    "keypoints": ((num, canvases.LAYOUT.num_cells, 18, 3), np.float32),
  }
  for name, (shape, dtype) in shapes.items():
    np.lib.format.open_memmap(
      folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape
    ).flush()
  tasks = [
    (folder, start, min(start + _CHUNK, num), *choice)
    for start in range(0, num, _CHUNK)
  ]
  records = []
  with logs.progress(total=num, desc="drawing canvases", unit="canvas") as bar:
    beside = processes if processes > 1 and len(tasks) > 1 else 0
    for _, part in workers.each(_draw, tasks, num_processes=beside):
      records += part
      bar.update(len(part))
  (folder / "records.json").write_text(json.dumps(records))


def _draw(task) -> list[dict[str, Any]]:
  folder, start, end, seed, split, with_scenes = task
  images, alphas, keypoints = (
    np.load(folder / f"{name}.npy", mmap_mode="r+") for name in _ARRAYS
  )
  records = []
  for i in range(start, end):
    sample = canvases.draw(seed, i, split=split, with_scenes=with_scenes)
    images[i], alphas[i] = sample.image, sample.alpha
    for cell, points in enumerate(sample.keypoints):
      keypoints[i, cell, :, :2] = points.xy
      keypoints[i, cell, :, 2] = points.visible
    records.append(
      {
        "prompt": sample.prompt,
        "words": dict(sample.words),
        "attributes": dict(sample.attributes),
        "has_grid": sample.has_grid,
        "is_scene": sample.is_scene,
      }
    )
  for array in (images, alphas, keypoints):
    array.flush()
  return records
