"""Pictures of many different people with their captions, kept on disk."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from dppp_jax import logs, workers
from dppp_jax.geneperson import poses
from dppp_jax.paperdoll import cameras, world

_CHUNK = 250  # Pictures that one task draws.
_STREET_PIDS = 2_000_000  # Above everybody of the benchmarks.


@dataclasses.dataclass(frozen=True)
class Corpus:
  """N pictures of N different people.

  Attributes:
    images: uint8 [N, H, W, 3].
    captions: N full captions; none for the street.
    attributes: N dicts, attribute -> word.
  """

  images: np.ndarray
  captions: list[str]
  attributes: list[Mapping[str, str]]


def draw(
  num: int,
  *,
  seed: int,
  size: tuple[int, int],
  domain: str = "studio",
  processes: int = 2,
  cache: str | pathlib.Path | None = None,
) -> Corpus:
  """Draws a corpus, or reads it back.

  Args:
    num: N.
    seed: of the world.
    size: (H, W), pixels.
    domain: "studio"; "held_out" for people that no training has seen; or
      "street" for such people before street cameras, without captions.
    processes: that draw beside each other; the pictures do not depend on it.
    cache: folder in which a corpus of the same arguments is kept, or None.

  Returns:
    The corpus.
  """
  key = json.dumps([num, seed, size, domain, _renderer()])
  name = hashlib.sha256(key.encode()).hexdigest()[:16]
  path = None if cache is None else pathlib.Path(cache) / f"corpus-{name}.npz"
  if path is not None and path.exists():
    with np.load(path) as held:
      texts = json.loads(bytes(held["texts"]))
      return Corpus(held["images"], *texts)
  tasks = [
    (start, min(start + _CHUNK, num), seed, size, domain)
    for start in range(0, num, _CHUNK)
  ]
  parts = []
  with logs.progress(total=num, desc="drawing people", unit="image") as bar:
    for _, part in workers.each(_draw, tasks, num_processes=processes):
      parts.append(part)
      bar.update(len(part[0]))
  images = np.concatenate([part[0] for part in parts])
  texts = [[x for part in parts for x in part[i]] for i in (1, 2)]
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp.npz")
    packed = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    np.savez(scratch, images=images, texts=packed)
    scratch.replace(path)
  return Corpus(images, *texts)


def _renderer() -> str:
  """Returns a digest of the code that draws, so that no cache outlives it."""
  files = [*pathlib.Path(__file__).parent.glob("*.py"), poses.__file__]
  digest = hashlib.sha256()
  for path in sorted(map(str, files)):
    digest.update(pathlib.Path(path).read_bytes())
  return digest.hexdigest()


def _draw(task):
  start, end, seed, size, domain = task
  images, captions, attributes = [], [], []
  for pid in range(start, end):
    if domain == "street":
      image, words = _on_the_street(pid, seed, size)
    else:
      sample = world.studio(
        pid, pid % 64, seed=seed, size=size, domain=domain, sentences=0.0
      )
      image, words = sample.image, sample.attributes
      captions.append(sample.caption)
    images.append(image)
    attributes.append(dict(words))
  return np.stack(images), captions, attributes


def _on_the_street(pid, seed, size):
  """Draws people that no benchmark has, before each of Market's cameras."""
  pid += _STREET_PIDS
  camera = 1 + pid % len(cameras.SETS["market1501"])
  image = world.street(
    pid, camera, 0, benchmark="market1501", seed=seed, size=size
  )
  who = world.person(pid, seed=seed, domain="market1501", palette="street")
  return image, who.attributes
