"""Studio pictures with their texts, drawn in parallel and kept on disk."""

from collections.abc import Mapping
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import pathlib

import numpy as np

from dppp_jax import logs
from dppp_jax.geneperson import poses
from dppp_jax.paperdoll import cameras, wardrobe, world

_CHUNK = 250  # Pictures that one task draws.
_TEXTS = 0x7E87  # Stream of the short texts.
_STREET_PIDS = 2_000_000  # Above everybody of the benchmarks.
# What a short text speaks of, most often the clothes.
_ALONE = (
  ("upper_color", "lower_color") * 3
  + ("upper_pattern", "lower_pattern") * 3
  + ("upper_type", "lower_type", "footwear_color", "footwear_type") * 2
  + ("hair_color", "skin", "hat", "bag") * 2
  + ("gender", "body", "hair_length", "hair_style", "hat_color", "bag_color")
)
_GARMENTS = ("upper", "lower", "footwear")
_DETAILS = ("color", "pattern", "type")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """N pictures of N different people, with C texts of each kind.

  Attributes:
    images: uint8 [N, H, W, 3].
    full: N lists of full captions.
    short: N lists of short sentences about one attribute or one garment.
    mentions: N lists, for each short text the attributes that it names.
    attributes: N dicts, attribute -> word.
  """

  images: np.ndarray
  full: list[list[str]]
  short: list[list[str]]
  mentions: list[list[list[str]]]
  attributes: list[Mapping[str, str]]

  def words(self) -> list[str]:
    """Returns every text, for a vocabulary."""
    return [text for group in (*self.full, *self.short) for text in group]


def draw(
  num: int,
  *,
  seed: int,
  size: tuple[int, int],
  domain: str = "studio",
  num_short: int = 4,
  processes: int = 2,
  cache: str | pathlib.Path | None = None,
) -> Corpus:
  """Draws a corpus, or reads it back.

  Args:
    num: N.
    seed: of the world.
    size: (H, W), pixels.
    domain: "studio"; "held_out" for people that no training has seen; or
      "street" for such people before street cameras, without texts.
    num_short: short phrases of each picture.
    processes: that draw beside each other; the pictures do not depend on it.
    cache: folder in which a corpus of the same arguments is kept, or None.

  Returns:
    The corpus.
  """
  key = json.dumps([num, seed, size, domain, num_short, _renderer()])
  name = hashlib.sha256(key.encode()).hexdigest()[:16]
  path = None if cache is None else pathlib.Path(cache) / f"corpus-{name}.npz"
  if path is not None and path.exists():
    with np.load(path) as held:
      texts = json.loads(bytes(held["texts"]))
      return Corpus(held["images"], *texts)
  tasks = [
    (start, min(start + _CHUNK, num), seed, size, domain, num_short)
    for start in range(0, num, _CHUNK)
  ]
  parts = []
  # Spawned, not forked: the parent may hold threads of JAX.
  context = multiprocessing.get_context("spawn")
  with (
    concurrent.futures.ProcessPoolExecutor(processes, context) as pool,
    logs.progress(total=num, desc="drawing people", unit="image") as bar,
  ):
    for part in pool.map(_draw, tasks):
      parts.append(part)
      bar.update(len(part[0]))
  images = np.concatenate([part[0] for part in parts])
  texts = [[x for part in parts for x in part[i]] for i in (1, 2, 3, 4)]
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
  start, end, seed, size, domain, num_short = task
  images, full, short, mentions, attributes = [], [], [], [], []
  for pid in range(start, end):
    if domain == "street":
      image, words = _on_the_street(pid, seed, size)
    else:
      sample = world.studio(
        pid, pid % 64, seed=seed, size=size, domain=domain, sentences=0.0
      )
      image, words = sample.image, sample.attributes
      full.append([sample.caption])
    rng = np.random.default_rng((seed, pid, _TEXTS))
    pairs = [_short(words, rng) for _ in range(num_short)]
    images.append(image)
    short.append([text for text, _ in pairs])
    mentions.append([named for _, named in pairs])
    attributes.append(dict(words))
  return np.stack(images), full, short, mentions, attributes


def _on_the_street(pid, seed, size):
  """Draws people that no benchmark has, before each of Market's cameras."""
  pid += _STREET_PIDS
  camera = 1 + pid % len(cameras.SETS["market1501"])
  image = world.street(
    pid, camera, 0, benchmark="market1501", seed=seed, size=size
  )
  who = world.person(pid, seed=seed, domain="market1501", palette="street")
  return image, who.attributes


def _short(
  attributes: Mapping[str, str], rng: np.random.Generator
) -> tuple[str, list[str]]:
  """Returns a sentence on one garment or one attribute, and what it names."""
  if rng.random() < 0.3:
    part = _GARMENTS[rng.integers(3)]
    keys = ["color", "type"] if part == "footwear" else list(_DETAILS)
    named = [f"{part}_{key}" for key in keys]
    *adjectives, kind = (attributes[key] for key in named)
    return wardrobe.worn(part, adjectives, kind), named
  attribute = _ALONE[rng.integers(len(_ALONE))]
  value = attributes[attribute]
  part, _, what = attribute.partition("_")
  kind = attributes.get(f"{part}_type")
  if part in _GARMENTS and what != "type":
    return wardrobe.worn(part, [value], kind), [attribute, f"{part}_type"]
  texts = wardrobe.phrases(attribute, value)
  if part in ("hat", "bag") and what and value != "none":
    thing = attributes[part]
    text = next(text for text in texts if text.endswith(thing))
    return text, [attribute, part]
  return texts[0], [attribute]
