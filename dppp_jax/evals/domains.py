"""How far real and virtual people lie apart (the paper's Fig. 6).

Distances are Euclidean between features of norm 1: raw features of two models
have two scales and could not be compared. All models see the same pairs.
"""

from collections.abc import Mapping

import numpy as np

from dppp_jax import errors
from dppp_jax.data import source as source_lib
from dppp_jax.evals import extractor


def draw_pairs(
  num_target: int, num_source: int, *, num: int = 10_000, seed: int = 0
) -> np.ndarray:
  """Returns int [num, 2], uniform pairs (target, source).

  Args:
    num_target: images of the real domain.
    num_source: images of the virtual one.
    num: pairs.
    seed: the same seed, the same pairs.

  Raises:
    errors.UserError: one of the domains is empty.
  """
  if not num_target or not num_source:
    raise errors.UserError(
      f"pairs need images on both sides; there are {num_target} and"
      f" {num_source}"
    )
  rng = np.random.default_rng(seed)
  target = rng.integers(0, num_target, num)
  return np.stack([target, rng.integers(0, num_source, num)], axis=1)


def distances(
  target: np.ndarray, source: np.ndarray, pairs: np.ndarray
) -> np.ndarray:
  """Returns Euclidean distances [num] of normalised features, 0 to 2.

  Args:
    target: [Q, D].
    source: [N, D].
    pairs: int [num, 2], of `draw_pairs`.
  """
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  target, source = unit(target), unit(source)
  return np.linalg.norm(target[pairs[:, 0]] - source[pairs[:, 1]], axis=1)


def between(
  models: Mapping[str, extractor.Extractor],
  target: source_lib.Source,
  source: source_lib.Source,
  *,
  num: int = 10_000,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Extracts what the pairs need, and returns their distances by model.

  Args:
    models: label -> extractor.
    target: real images, e.g. a benchmark's gallery.
    source: virtual images, e.g. the training shards.
    num: pairs.
    seed: of the pairs.

  Returns:
    label -> float32 [num].
  """
  pairs = draw_pairs(len(target), len(source), num=num, seed=seed)
  sides, places = [], []
  for whole, column in zip((target, source), pairs.T, strict=True):
    needed, place = np.unique(column, return_inverse=True)
    sides.append(source_lib.Subset(whole, needed))
    places.append(place)
  places = np.stack(places, axis=1)
  found = {}
  for label, model in models.items():
    features = [
      model.extract(side, desc=f"pairs, {label}")[0] for side in sides
    ]
    found[label] = distances(*features, places)
  return found
