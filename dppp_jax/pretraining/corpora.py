"""The drawn canvases that a configuration's `data` asks for."""

from collections.abc import Mapping
import hashlib
import pathlib
from typing import Any

import numpy as np

from dppp_jax.paperdoll import canvas_corpus


def draw(data: Mapping[str, Any], split: str, num: int) -> canvas_corpus.Corpus:
  """Draws canvases 0 .. num - 1 of a split, or reads them back.

  Args:
    data: "seed" of the world, "processes" and "cache".
    split: a key of `canvases.SPLITS`.
    num: of canvases.
  """
  return canvas_corpus.draw(
    num,
    seed=data["seed"],
    split=split,
    processes=data["processes"],
    cache=data["cache"],
  )


def name(canvases: canvas_corpus.Corpus) -> str:
  """Returns what names a corpus: the folder it is mapped from, or its hash."""
  images = canvases.images
  if isinstance(images, np.memmap) and images.filename:
    return pathlib.Path(images.filename).parent.name
  return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()[:16]
