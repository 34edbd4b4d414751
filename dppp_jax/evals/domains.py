"""How far real and virtual people lie apart (the paper's Fig. 6).

Distances are Euclidean between features of norm 1: raw features of two models
have two scales and could not be compared. All models see the same pairs.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from dppp_jax import errors
from dppp_jax.data import source as source_lib
from dppp_jax.evals import extractor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """Distances of the same pairs for several models, and what they are.

  Attributes:
    distances: label of a model -> float32 [num].
    models: label -> where it lies, its feature and its input, of JSON types.
    target: what the first of a pair is, in words.
    source: what the second of a pair is, in words.
  """

  distances: Mapping[str, np.ndarray]
  models: Mapping[str, Mapping[str, Any]]
  target: str
  source: str

  @property
  def caption(self) -> str:
    """What the figure shows, in a sentence or two."""
    num = len(next(iter(self.distances.values())))
    shown = "; ".join(
      f"{label}: feature {about['feature']} of {about['image_size'][0]} x"
      f" {about['image_size'][1]} pixels in {about['dtype']}"
      for label, about in self.models.items()
    )
    return (
      f"{num:,} uniform pairs of {self.target} and {self.source}, the same for"
      f" all models ({shown}). Euclidean distances of features of norm 1; the"
      " dashed lines are the means."
    )

  def to_json(self) -> dict[str, Any]:
    """Returns means, standard deviations and models, of JSON types."""
    return {
      label: {
        "mean": float(found.mean()),
        "std": float(found.std()),
        "pairs": len(found),
        **self.models[label],
      }
      for label, found in self.distances.items()
    }


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


def compare(
  models: Mapping[str, extractor.Extractor],
  target: source_lib.Source,
  source: source_lib.Source,
  *,
  names: tuple[str, str],
  num: int = 10_000,
  seed: int = 0,
) -> Comparison:
  """Compares any models on the same pairs: the paper's Fig. 6.

  Args:
    models: label -> extractor, such as `of_run` or `with_baseline` return.
    target: real images, e.g. a benchmark's gallery.
    source: virtual images, e.g. the training shards.
    names: what an image of the target and one of the source is, for the
      caption: ("a Market-1501 image", "a training image").
    num: pairs.
    seed: of the pairs.
  """
  about = {
    label: {
      "model": model.where,
      "feature": model.spec.feature,
      "image_size": list(model.spec.image_size),
      "dtype": model.dtype,
    }
    for label, model in models.items()
  }
  return Comparison(
    distances=between(models, target, source, num=num, seed=seed),
    models=about,
    target=names[0],
    source=names[1],
  )


def of_run(model: extractor.Extractor) -> dict[str, extractor.Extractor]:
  """Returns a model by its feature, and v_g before P_s beside its v_c."""
  models = {model.spec.feature: model}
  if model.spec.feature == "content":
    models = {"projected": model.with_feature("projected"), **models}
  return models


def with_baseline(
  model: extractor.Extractor, baseline: extractor.Extractor
) -> dict[str, extractor.Extractor]:
  """Returns two models by labels for the figure, the baseline first."""
  name = lambda one: pathlib.Path(one.folder).name
  label = lambda one: f"{name(one)}, {one.spec.feature}"
  return {f"baseline {label(baseline)}": baseline, label(model): model}
