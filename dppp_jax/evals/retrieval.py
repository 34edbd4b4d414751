"""CMC, mAP and mINP by counting the ranks of the positives.

A query has about fifteen positives among tens of thousands of gallery images,
and the metrics need the ranks of those fifteen only. So nothing is argsorted:
a tile of distances is computed, the rank of a positive is the number of gallery
images that are nearer, and the tile is dropped. Memory is a few tiles, whatever
the number of queries.

The protocol is Market-1501's: gallery images of the query's identity *and*
camera are junk, and so is every image with pid -1; pid 0 (Market's distractors)
counts as negative; a query without a positive is skipped and counted. Equal
distances rank in the order of the gallery, as a stable sort has them.
"""

from collections.abc import Iterable, Iterator
import dataclasses
from typing import Literal

from absl import logging
import numpy as np

from dppp_jax import devices, errors, logs
from dppp_jax.evals import counting

_COLLAPSED = 1e-3  # Spread around the mean feature, in units of its norm.

Backend = Literal["numpy", "jax", "auto"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What one ranking scores.

  Attributes:
    mAP: mean average precision over the counted queries, 0 to 1.
    cmc: float64 [max_rank]; cmc[k - 1] is Rank-k, 0 to 1.
    mINP: mean inverse negative penalty, positives / rank of the last one.
    num_valid_queries: queries with a positive.
    num_skipped_queries: queries without one.
    ap: float64 [Q], NaN for skipped queries.
    inp: float64 [Q], NaN for skipped queries.
    first_rank: int64 [Q], rank of the nearest positive from 1; 0 if skipped.
  """

  mAP: float  # The field's spelling.
  cmc: np.ndarray
  mINP: float
  num_valid_queries: int
  num_skipped_queries: int
  ap: np.ndarray
  inp: np.ndarray
  first_rank: np.ndarray

  def summary(self) -> dict[str, float | int]:
    """Returns the scalars that a table or a JSON file shows."""
    ranks = {
      f"rank{k}": float(self.cmc[k - 1])
      for k in (1, 5, 10, 20)
      if k <= len(self.cmc)
    }
    return {
      "mAP": self.mAP,
      "mINP": self.mINP,
      **ranks,
      "num_valid_queries": self.num_valid_queries,
      "num_skipped_queries": self.num_skipped_queries,
    }


def evaluate(
  query_features: np.ndarray,
  query_pids: np.ndarray,
  query_camids: np.ndarray,
  gallery_features: np.ndarray,
  gallery_pids: np.ndarray,
  gallery_camids: np.ndarray,
  *,
  metric: counting.Metric = "cosine",
  ap: Literal["step", "trapezoid"] = "step",
  max_rank: int = 50,
  skipped_as_zero: bool = False,
  backend: Backend = "auto",
) -> Result:
  """Ranks the gallery for every query by distance and scores the ranking.

  Args:
    query_features: [Q, D], taken as float32; need not be normalised.
    query_pids: int [Q].
    query_camids: int [Q].
    gallery_features: [G, D].
    gallery_pids: int [G]; -1 is junk.
    gallery_camids: int [G].
    metric: "cosine" (1 - cosine) or "euclidean" (ranked by its square).
    ap: "step" (mean of k / rank_k, what current papers report) or "trapezoid"
      (Market-1501's first Matlab code).
    max_rank: length of the CMC curve.
    skipped_as_zero: queries without a positive score 0 in every mean (as the
      Matlab code had it) in place of being left out.
    backend: "numpy", "jax" (the default device) or "auto": jax where there is
      an accelerator.

  Returns:
    The scores.

  Raises:
    errors.UserError: shapes differ, NaN or Inf in a feature (the row is named),
      or no query has a positive.
  """
  labels = counting.Labels.make(
    query_pids, query_camids, gallery_pids, gallery_camids
  )
  query = prepare(query_features, where="query", metric=metric)
  gallery = prepare(gallery_features, where="gallery", metric=metric)
  counting.check_sizes(labels, len(query), len(gallery))
  if query.shape[1] != gallery.shape[1]:
    raise errors.UserError(
      f"query features are {query.shape[1]} wide and gallery features"
      f" {gallery.shape[1]}: extract both with the same model"
    )
  gallery = labels.without_junk(gallery)
  if backend == "auto":
    backend = "numpy" if devices.platform() == "cpu" else "jax"
  if backend == "jax":
    counted = counting.with_jax(query, gallery, labels, metric=metric)
  elif backend == "numpy":
    counted = counting.with_numpy(
      counting.tiles(query, gallery, metric=metric), labels
    )
  else:
    raise errors.UserError(f"backend {backend!r} is none of numpy, jax, auto")
  return _score(
    counted, labels, ap=ap, max_rank=max_rank, skipped_as_zero=skipped_as_zero
  )


def evaluate_distances(
  distances: np.ndarray | Iterable[np.ndarray],
  query_pids: np.ndarray,
  query_camids: np.ndarray,
  gallery_pids: np.ndarray,
  gallery_camids: np.ndarray,
  *,
  ap: Literal["step", "trapezoid"] = "step",
  max_rank: int = 50,
  skipped_as_zero: bool = False,
) -> Result:
  """Scores given distances, e.g. those of re-ranking.

  Args:
    distances: [Q, G], or the same in blocks of rows [b, G], one after another.
    query_pids: int [Q].
    query_camids: int [Q].
    gallery_pids: int [G].
    gallery_camids: int [G].
    ap: as in `evaluate`.
    max_rank: as in `evaluate`.
    skipped_as_zero: as in `evaluate`.

  Returns:
    The scores.

  Raises:
    errors.UserError: sizes differ, NaN in the distances, no valid query.
  """
  labels = counting.Labels.make(
    query_pids, query_camids, gallery_pids, gallery_camids
  )
  blocks = distances
  if isinstance(distances, np.ndarray):
    rows = counting.tile_rows(max(1, distances.shape[-1]))
    blocks = (distances[i : i + rows] for i in range(0, len(distances), rows))

  def tiles() -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for block in blocks:
      if block.ndim != 2 or block.shape[1] != labels.num_gallery:
        raise errors.UserError(
          f"distances are {block.shape}, the gallery has"
          f" {labels.num_gallery} labels: give [queries, gallery]"
        )
      if np.isnan(block).any():
        row = start + int(np.flatnonzero(np.isnan(block).any(axis=1))[0])
        raise errors.UserError(
          f"the distances of query {row} hold NaN: check the features"
        )
      start += len(block)
      if start > len(labels.query_pids):
        break
      yield start - len(block), labels.without_junk(block.T).T
    counting.check_sizes(labels, start, labels.num_gallery)

  return _score(
    counting.with_numpy(tiles(), labels),
    labels,
    ap=ap,
    max_rank=max_rank,
    skipped_as_zero=skipped_as_zero,
  )


def prepare(
  features: np.ndarray, *, where: str, metric: counting.Metric = "cosine"
) -> np.ndarray:
  """Returns checked float32 features [N, D], of norm 1 for the cosine.

  Args:
    features: [N, D].
    where: "query" or "gallery", for the messages.
    metric: "cosine" or "euclidean".

  Raises:
    errors.UserError: not [N, D], empty, or a row with NaN or Inf.
  """
  if metric not in ("cosine", "euclidean"):
    raise errors.UserError(f"metric {metric!r} is none of cosine, euclidean")
  features = np.asarray(features, np.float32)
  if features.ndim != 2 or not features.size:
    raise errors.UserError(
      f"{where} features are {features.shape}: give at least one row, [N, D]"
    )
  norms = np.sqrt(np.einsum("nd,nd->n", features, features))
  # The norm is finite unless an entry is not (or squares to overflow).
  if not np.isfinite(norms).all():
    bad = np.flatnonzero(~np.isfinite(norms))
    raise errors.UserError(
      f"{where} row {bad[0]} holds NaN or Inf ({len(bad)} of {len(norms)} rows"
      " do): the features cannot be ranked, check the weights"
    )
  scale = max(float(norms.max()), np.finfo(np.float32).tiny)
  spread = np.sqrt(float(features.var(axis=0, dtype=np.float64).sum())) / scale
  if len(features) > 1 and spread < _COLLAPSED:
    logging.warning(
      "%s features have collapsed: they spread %.1e of their norm around"
      " their mean, so the ranking means nothing",
      where,
      spread,
    )
  if metric == "euclidean":
    return features
  # A zero row stays zero: it is at distance 1 from everything.
  return features / np.maximum(norms, np.finfo(np.float32).tiny)[:, None]


def ranked_lists(
  block: np.ndarray,
  query_pids: np.ndarray,
  query_camids: np.ndarray,
  gallery_pids: np.ndarray,
  gallery_camids: np.ndarray,
  *,
  k: int = 10,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the k nearest kept gallery images of a few queries.

  Args:
    block: [b, G] distances, a row for each query.
    query_pids: int [b].
    query_camids: int [b].
    gallery_pids: int [G].
    gallery_camids: int [G].
    k: length of a list.

  Returns:
    Gallery indices int64 [b, k], -1 behind the end of a short list; and whether
    each is of the query's identity, bool [b, k].
  """
  indices = np.full((len(block), k), -1)
  for i, row in enumerate(block):
    same = (gallery_pids == query_pids[i]) & (gallery_camids == query_camids[i])
    order = np.argsort(row, kind="stable")
    order = order[~(same | (gallery_pids == counting.JUNK_PID))[order]][:k]
    indices[i, : len(order)] = order
  hits = gallery_pids[indices] == np.asarray(query_pids)[:, None]
  return indices, hits & (indices >= 0)


def _score(
  counted: Iterable[counting.Counted],
  labels: counting.Labels,
  *,
  ap: str,
  max_rank: int,
  skipped_as_zero: bool,
) -> Result:
  """Turns counts into ranks without junk, and ranks into scores."""
  if ap not in ("step", "trapezoid"):
    raise errors.UserError(f"ap {ap!r} is none of step, trapezoid")
  num_query = len(labels.query_pids)
  aps, inps = np.full((2, num_query), np.nan)
  first = np.zeros(num_query, np.int64)
  bar = logs.progress(total=num_query, desc="rank", unit="query")
  for start, near, nearer in counted:
    stop = start + len(near)
    same, mask = labels.same_pid(start, stop, near.shape[1])
    own_camera = labels.query_camids[start:stop, None]
    junk = mask & (labels.gallery_camids[same] == own_camera)
    # Same-pid images from near to far; `same` ascends, so ties are stable.
    order = np.argsort(np.where(mask, near, np.inf), axis=1, kind="stable")
    junk, is_positive, nearer = (
      np.take_along_axis(a, order, axis=1) for a in (junk, mask & ~junk, nearer)
    )
    rank = 1 + nearer - np.cumsum(junk, axis=1)
    hit = np.cumsum(is_positive, axis=1)
    rank = np.where(is_positive, rank, 1)  # Keeps the divisions quiet.
    precision = hit / rank
    if ap == "trapezoid":
      before = (hit - 1) / np.maximum(rank - 1, 1)
      before = np.where(rank == 1, 1.0, before)
      precision = (precision + before) / 2
    num = is_positive.sum(axis=1)
    valid = num > 0
    total = np.where(is_positive, precision, 0).sum(axis=1)
    last = np.where(is_positive, rank, 0).max(axis=1)
    foremost = np.where(is_positive, rank, np.iinfo(np.int64).max).min(axis=1)
    aps[start:stop][valid] = total[valid] / num[valid]
    inps[start:stop][valid] = num[valid] / last[valid]
    first[start:stop][valid] = foremost[valid]
    bar.update(len(near))
  bar.close()
  valid = first > 0
  num_valid = int(valid.sum())
  if not num_valid:
    raise errors.UserError(
      f"none of the {num_query} queries has a gallery image of its identity"
      " from another camera: check the pids and camids"
    )
  denominator = num_query if skipped_as_zero else num_valid
  found = np.bincount(
    first[valid & (first <= max_rank)], minlength=max_rank + 1
  )
  return Result(
    mAP=float(aps[valid].sum() / denominator),
    cmc=np.cumsum(found[1:]) / denominator,
    mINP=float(inps[valid].sum() / denominator),
    num_valid_queries=num_valid,
    num_skipped_queries=num_query - num_valid,
    ap=aps,
    inp=inps,
    first_rank=first,
  )
