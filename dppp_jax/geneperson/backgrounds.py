"""A pool of generated backgrounds for each light, drawn once and kept.

Scene `number` of a light is a pure function of the pool's configuration, and it
is always drawn in the same place of the same batch: the scenes of one light in
groups of `batch_size` numbers (see `groups`), of which those that are there
already are drawn again and not kept. So a pool may be drawn by anybody, in any
order, and be interrupted at any moment; more scenes, or other lights, change
none of the others. A file is whole or not there: it is written under another
name first, and its own name ends with a digest of its bytes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import re
from typing import Any, TypeVar

import numpy as np
import PIL.Image

from dppp_jax import errors, files, logs, types
from dppp_jax.data import images
from dppp_jax.geneperson import (
  compose,
  disk,
  groups,
  identity,
  prompts,
  vocabulary,
)
from dppp_jax.geneperson import store as store_lib

T = TypeVar("T")

# (prompts, seeds) -> uint8 [B, H, W, 3], perhaps still being computed.
Draw = Callable[[Sequence[str], Sequence[int]], types.Array]

_STREAM = 13  # Of (seed, pid, cell): what the random numbers are for.
_DECODED = 128  # Pictures that are kept decoded.


@dataclasses.dataclass(frozen=True)
class Scene:
  """One picture of a pool, drawn or not.

  Attributes:
    lighting: the words for its light.
    number: of the scene under this light.
    place: the words for the place.
    prompt: what it is drawn from.
    seed: likewise.
  """

  lighting: str
  number: int
  place: str
  prompt: str
  seed: int

  @property
  def stem(self) -> str:
    """How the names of its files begin."""
    light = re.sub(r"[^a-z0-9]+", "-", self.lighting.lower()).strip("-")
    return f"{light}-{self.number:05d}"


class Pool:
  """Backgrounds by light.

  Attributes:
    folder: where the pictures lie, or will: a folder of `root` by the digest
      of the configuration.
    scenes: {lighting: scenes}.
  """

  def __init__(
    self,
    root: str | os.PathLike,
    draw: Draw,
    *,
    lightings: Iterable[str],
    count: int,
    size: tuple[int, int],
    batch_size: int,
    seed: int,
    config: Mapping[str, Any],
    template: str = prompts.BACKGROUND,
    words: vocabulary.Vocabulary | None = None,
  ):
    """Plans the pool; `prepare` draws it.

    Args:
      root: where pools are kept; made if need be.
      draw: the sampler.
      lightings: of the people who will stand before the backgrounds.
      count: pictures of each; more of them change none of the first.
      size: (height, width) of each, pixels.
      batch_size: prompts that `draw` is given, always; scenes of a group.
      seed: of the scenes, and of what a cell is given.
      config: whatever else the pictures depend on, of JSON types.
      template: see `prompts.background`.
      words: whose places are shown.
    """
    words = words or vocabulary.default()
    self._config = {
      **json.loads(json.dumps(config)),
      "seed": seed,
      "size": list(size),
      "template": template,
      "places": words.raw["place"],
    }
    digest = store_lib.fingerprint(self._config)
    self.folder = pathlib.Path(root) / digest[:16]
    self._draw, self._batch_size, self._seed = draw, batch_size, seed
    self._size = tuple(size)
    self._scene = functools.partial(
      _scene, seed=seed, template=template, words=words
    )
    self.scenes = {
      lighting: tuple(self._scene(lighting, number) for number in range(count))
      for lighting in sorted(set(lightings))
    }
    self._files: dict[str, pathlib.Path] = {}
    self._read = functools.lru_cache(maxsize=_DECODED)(self._decode)

  def prepare(self, *, stopped: Callable[[], bool] = lambda: False) -> None:
    """Draws what is not there yet; other processes wait for it.

    Args:
      stopped: whether to leave after the batches in progress, or to wait for
        another process no longer.

    Raises:
      errors.UserError: a damaged file, no space left.
    """
    scenes = [scene for some in self.scenes.values() for scene in some]
    with disk.reported(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
      lock = self.folder / ".lock"
      with disk.locked(lock, stopped=stopped) as is_held:
        if not is_held:
          return
        known = self._whole_files()
        disk.replace(
          self.folder / "pool.json", json.dumps(self._config, indent=1)
        )
        left = [scene for scene in scenes if scene.stem not in known]
        if left:  # Where there is no bar, nothing else is said for long.
          logs.say(
            f"{self.folder}: drawing {len(left)} backgrounds,"
            f" {len(scenes) - len(left)} are there already"
          )
        with logs.progress(
          total=len(scenes),
          initial=len(scenes) - len(left),
          desc="backgrounds",
          unit="picture",
        ) as bar:
          lacking = {scene.stem for scene in left}
          for some, pictures in ahead(self._drawn(left, stopped)):
            for scene, picture in zip(some, np.asarray(pictures), strict=True):
              if scene.stem in lacking:
                known[scene.stem] = self._write(scene, picture)
                bar.update()
    self._files = known

  def choose(
    self, lighting: str, *, pid: int, cell: int
  ) -> tuple[Scene, np.random.Generator]:
    """Returns what a cell stands before, by (seed, pid, cell) alone.

    Returns:
      The scene, and the generator for its crop.
    """
    rng = np.random.default_rng([self._seed, _STREAM, pid, cell])
    scenes = self.scenes[lighting]
    return scenes[int(rng.integers(len(scenes)))], rng

  def crop(
    self, scene: Scene, size: tuple[int, int], *, rng: np.random.Generator
  ) -> np.ndarray:
    """Returns a part of a scene, uint8 [height, width, 3].

    Args:
      scene: of `choose`.
      size: (height, width) of the cell, pixels.
      rng: of `choose`.

    Raises:
      errors.UserError: the file was damaged since `prepare`.
    """
    return compose.crop(self._read(scene.stem), size, rng=rng)

  def _drawn(
    self, scenes: Sequence[Scene], stopped: Callable[[], bool]
  ) -> Iterator[tuple[list[Scene], types.Array]]:
    """Yields groups that hold one of `scenes`, whole, and their pictures."""
    for lighting in self.scenes:
      numbers = [one.number for one in scenes if one.lighting == lighting]
      for group, _ in groups.split(numbers, self._batch_size):
        if stopped():
          return
        some = [self._scene(lighting, number) for number in group]
        yield (
          some,
          self._draw([one.prompt for one in some], [one.seed for one in some]),
        )

  def _whole_files(self) -> dict[str, pathlib.Path]:
    """Returns the files by their stems, each compared with its digest."""
    found = {}
    for path in files.visible(self.folder, ".png"):
      stem, _, digest = path.stem.rpartition("-")
      if _digest(path.read_bytes()) != digest:
        raise errors.UserError(
          f"{path}: is damaged: remove it and run the same command again, which"
          " draws it anew"
        )
      found[stem] = path
    return found

  def _write(self, scene: Scene, picture: np.ndarray) -> pathlib.Path:
    stream = io.BytesIO()
    PIL.Image.fromarray(picture).save(stream, "png")
    data = stream.getvalue()
    path = self.folder / f"{scene.stem}-{_digest(data)}.png"
    scratch = self.folder / f".{scene.stem}.tmp"
    scratch.write_bytes(data)
    disk.sync(scratch)
    scratch.replace(path)
    return path

  def _decode(self, stem: str) -> np.ndarray:
    path = self._files[stem]
    try:
      data = path.read_bytes()
    except OSError as error:
      raise errors.UserError(
        f"{path}: is gone ({error}): run the same command again, which draws it"
        " anew"
      ) from error
    picture = images.decode(data, name=str(path))
    if picture.shape[:2] != self._size:
      raise errors.UserError(
        f"{path}: is {picture.shape[:2]} pixels and should be {self._size}:"
        " remove it and run the same command again"
      )
    return picture


def ahead(items: Iterable[T]) -> Iterator[T]:
  """Yields each item after the next one was begun.

  What the items hold is computed by the device while the caller works on the
  one before.
  """
  waiting: list[T] = []
  for item in items:
    waiting.append(item)
    if len(waiting) > 1:
      yield waiting.pop(0)
  yield from waiting


def _scene(
  lighting: str,
  number: int,
  *,
  seed: int,
  template: str,
  words: vocabulary.Vocabulary,
) -> Scene:
  places = prompts.places(lighting, words)
  place = places[number % len(places)]
  return Scene(
    lighting,
    number,
    place,
    prompts.background(place, lighting, template),
    identity.seed_of("background", seed, lighting, number),
  )


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]
