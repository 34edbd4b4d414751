"""How many gallery images are nearer than a positive: the engines.

Two engines give the same counts: NumPy (BLAS tiles, threads) and JAX (one
compiled program on the default device).
"""

import collections
from collections.abc import Iterable, Iterator
from concurrent import futures
import dataclasses
import os
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors

JUNK_PID = -1
_TILE_BYTES = 64 << 20
_MAX_TILE_ROWS = 512

Metric = Literal["cosine", "euclidean"]
# (first query, distances of the same-pid images [b, S], number of gallery
# images that are nearer than each of them [b, S]).
Counted = tuple[int, np.ndarray, np.ndarray]


def distances(
  query: np.ndarray, gallery: np.ndarray, *, metric: Metric = "cosine"
) -> np.ndarray:
  """Returns float32 distances [b, G] between features from `prepare`.

  Args:
    query: float32 [b, D].
    gallery: float32 [G, D].
    metric: "cosine" gives 1 - cosine, "euclidean" the squared distance.
  """
  out = query @ gallery.T
  if metric == "cosine":
    return np.subtract(np.float32(1), out, out=out)
  out *= -2
  out += np.einsum("nd,nd->n", query, query)[:, None]
  out += np.einsum("nd,nd->n", gallery, gallery)
  return np.maximum(out, 0, out=out)  # Rounding goes below zero.


@dataclasses.dataclass(frozen=True)
class Labels:
  """Who is whose positive; gallery images of pid -1 are out already."""

  query_pids: np.ndarray
  query_camids: np.ndarray
  gallery_camids: np.ndarray  # [G'] without pid -1, as is all that follows.
  kept: np.ndarray  # bool [G]
  order: np.ndarray  # [G'] gallery sorted by pid, stable.
  starts: np.ndarray  # [Q] where the query's pid begins in `order`.
  counts: np.ndarray  # [Q] and how many images it has.

  @classmethod
  def make(
    cls,
    query_pids: np.ndarray,
    query_camids: np.ndarray,
    gallery_pids: np.ndarray,
    gallery_camids: np.ndarray,
  ) -> "Labels":
    """Checks the labels, int [Q] twice and [G] twice, and indexes them."""
    query_pids, query_camids, gallery_pids, gallery_camids = (
      np.asarray(a, np.int64)
      for a in (query_pids, query_camids, gallery_pids, gallery_camids)
    )
    for side, pids, camids in (
      ("query", query_pids, query_camids),
      ("gallery", gallery_pids, gallery_camids),
    ):
      if pids.ndim != 1 or pids.shape != camids.shape:
        raise errors.UserError(
          f"{side} pids {pids.shape} and camids {camids.shape} differ: give"
          " one of each per image"
        )
    kept = gallery_pids != JUNK_PID
    gallery_pids = gallery_pids[kept]
    order = np.argsort(gallery_pids, kind="stable")
    in_order = gallery_pids[order]
    starts = np.searchsorted(in_order, query_pids, "left")
    counts = np.searchsorted(in_order, query_pids, "right") - starts
    return cls(
      query_pids,
      query_camids,
      gallery_camids[kept],
      kept,
      order,
      starts,
      counts,
    )

  @property
  def num_gallery(self) -> int:
    """Number of gallery images as given, junk included."""
    return len(self.kept)

  def without_junk(self, gallery: np.ndarray) -> np.ndarray:
    """Returns [G, ...] without the images of pid -1."""
    return gallery if self.kept.all() else gallery[self.kept]

  def same_pid(
    self, start: int, stop: int, width: int | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the gallery images of each query's pid [b, S], and a mask."""
    counts = self.counts[start:stop]
    lane = np.arange(max(1, counts.max()) if width is None else width)
    mask = lane < counts[:, None]
    at = np.where(mask, self.starts[start:stop, None] + lane, 0)
    images = self.order[at] if len(self.order) else at
    return np.where(mask, images, 0), mask


def check_sizes(labels: Labels, num_query: int, num_gallery: int) -> None:
  """Raises UserError where there is not one label for each feature."""
  for side, labelled, given in (
    ("query", len(labels.query_pids), num_query),
    ("gallery", labels.num_gallery, num_gallery),
  ):
    if labelled != given:
      raise errors.UserError(
        f"{given} {side} features but {labelled} {side} labels: give one"
        " label per feature"
      )
  if not labels.kept.any():
    raise errors.UserError("the gallery is empty, or all of it has pid -1")


def tile_rows(num_gallery: int) -> int:
  """Returns how many queries one tile of distances holds."""
  return int(np.clip(_TILE_BYTES // (4 * num_gallery), 1, _MAX_TILE_ROWS))


def tiles(
  query: np.ndarray, gallery: np.ndarray, *, metric: Metric
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (first query, distances [b, G]) over all queries, tile by tile."""
  rows = tile_rows(len(gallery))
  for start in range(0, len(query), rows):
    yield (
      start,
      distances(query[start : start + rows], gallery, metric=metric),
    )


def with_numpy(
  tiles: Iterable[tuple[int, np.ndarray]], labels: Labels
) -> Iterator[Counted]:
  """Counts on the CPU: BLAS fills the next tile while threads count the last.

  To sort the values of a row (no argsort) and look the positives up in it is,
  on the vector units of today, faster than one comparison pass per positive.
  """

  def count(start: int, tile: np.ndarray) -> Counted:
    same, mask = labels.same_pid(start, start + len(tile))
    near = np.take_along_axis(tile, same, axis=1)
    ranks = np.zeros(same.shape, np.int64)
    by_value = np.sort(tile, axis=1)
    for i, row in enumerate(by_value):
      own = near[i][mask[i]]
      left = np.searchsorted(row, own, "left")
      tied = np.searchsorted(row, own, "right") - left > 1
      for j in np.flatnonzero(tied):  # Rare: the order of the gallery decides.
        left[j] += np.count_nonzero(tile[i, : same[i, j]] == own[j])
      ranks[i, : len(own)] = left
    return start, near, ranks

  num_threads = min(4, os.cpu_count() or 1)
  with futures.ThreadPoolExecutor(num_threads) as pool:
    pending: collections.deque[futures.Future[Counted]] = collections.deque()
    for start, tile in tiles:
      pending.append(pool.submit(count, start, tile))
      del tile
      if len(pending) > num_threads:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


def with_jax(
  query: np.ndarray, gallery: np.ndarray, labels: Labels, *, metric: Metric
) -> Iterator[Counted]:
  """Counts on the accelerator, with one compiled program for all tiles."""
  rows = min(tile_rows(len(gallery)), len(query))
  width = max(1, int(labels.counts.max()))
  on_device = jax.device_put(gallery)
  count = jax.jit(count_tile, static_argnames=("metric",))
  for start in range(0, len(query), rows):
    part = query[start : start + rows]
    same, _ = labels.same_pid(start, start + len(part), width)
    padding = ((0, rows - len(part)), (0, 0))
    near, ranks = count(
      np.pad(part, padding),
      on_device,
      np.pad(same, padding).astype(np.int32),
      metric=metric,
    )
    yield start, np.asarray(near)[: len(part)], np.asarray(ranks)[: len(part)]


def count_tile(
  query: jax.Array, gallery: jax.Array, same: jax.Array, *, metric: Metric
) -> tuple[jax.Array, jax.Array]:
  """Returns the distances of the images `same` [b, S] and their ranks."""
  dot = jnp.matmul(query, gallery.T, precision=jax.lax.Precision.HIGHEST)
  if metric == "cosine":
    tile = 1 - dot
  else:
    square = lambda x: jnp.sum(x * x, axis=1)
    tile = square(query)[:, None] - 2 * dot + square(gallery)[None]
    tile = jnp.maximum(tile, 0)
  near = jnp.take_along_axis(tile, same, axis=1)
  place = jnp.arange(len(gallery), dtype=jnp.int32)[None]

  def count_one(_, lane):
    value, image = (a[:, None] for a in lane)  # [b, 1]
    nearer = (tile < value) | ((tile == value) & (place < image))
    return None, jnp.sum(nearer, axis=1, dtype=jnp.int32)

  _, ranks = jax.lax.scan(count_one, None, (near.T, same.T))
  return near, ranks.T
