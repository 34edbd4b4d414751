"""k-reciprocal re-ranking with sparse lists (Zhong et al., CVPR 2017).

Two images are likely the same person if each is among the other's k nearest and
their neighbourhoods overlap. The published code keeps several matrices over all
pairs of images, 33 GiB each at MSMT17's size; all that it reads of them are the
k1 nearest of each image and the farthest. So only these are kept:

    memory = N (4 k1 + about 8 k1 k2) bytes + a few tiles,  N = Q + G,

0.2 GB at MSMT17's size. Distances are squared L2 divided by the row's largest,
which the code gets from a column-wise maximum and a transposition.
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse

from dppp_jax import errors, logs
from dppp_jax.evals import counting, retrieval

_CHUNK = 2048  # Images whose neighbours' neighbours are held at once.


class KReciprocal:
  """Re-ranked distances between queries and gallery, row by row.

  Args:
    query: [Q, D] features.
    gallery: [G, D] features.
    k1: neighbours that must be reciprocal.
    k2: neighbours whose encodings are averaged.
    weight: of the original distance; the rest is Jaccard's (lambda).
    metric: "cosine" normalises the features first, "euclidean" does not; the
      distance is squared L2 either way.

  Raises:
    errors.UserError: bad features (see `retrieval.prepare`), or parameters
      that the number of images does not allow.
  """

  def __init__(
    self,
    query: np.ndarray,
    gallery: np.ndarray,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    metric: counting.Metric = "cosine",
  ):
    query = retrieval.prepare(query, where="query", metric=metric)
    gallery = retrieval.prepare(gallery, where="gallery", metric=metric)
    if query.shape[1] != gallery.shape[1]:
      raise errors.UserError(
        f"query features are {query.shape[1]} wide and gallery features"
        f" {gallery.shape[1]}: extract both with the same model"
      )
    self._features = np.concatenate([query, gallery])
    self._num_query = len(query)
    self._weight = weight
    if not 1 <= k2 <= k1 + 1 or not 1 <= k1 < len(self._features):
      raise errors.UserError(
        f"re-ranking k1={k1}, k2={k2} needs 1 <= k2 <= k1 + 1 and more than k1"
        f" images; there are {len(self._features)}"
      )
    nearest, self._farthest = _neighbours(self._features, k1 + 1)
    encoding = _encode(self._features, nearest, self._farthest)
    self._encoding = _average(encoding, nearest[:, :k2])
    self._by_neighbour = self._encoding[self._num_query :].tocsc()

  def rows(self, queries: np.ndarray) -> np.ndarray:
    """Returns the final distances float32 [b, G] of some queries.

    Args:
      queries: int [b], indices of queries.
    """
    gallery = self._features[self._num_query :]
    original = _squared(self._features[queries], gallery)
    original /= self._farthest[queries, None]
    jaccard = np.stack([self._jaccard(i) for i in queries])
    return (1 - self._weight) * jaccard + self._weight * original

  def blocks(self) -> Iterator[np.ndarray]:
    """Yields the distances of all queries in blocks for the evaluation."""
    size = counting.tile_rows(len(self._features) - self._num_query)
    bar = logs.progress(
      range(0, self._num_query, size), desc="re-rank", unit="block"
    )
    for start in bar:
      yield self.rows(np.arange(start, min(start + size, self._num_query)))

  def _jaccard(self, i: int) -> np.ndarray:
    """Returns 1 - |min| / |max| of the encodings of query i and all [G].

    Encodings sum to one, so that the sum of maxima is 2 - the sum of minima.
    """
    row = self._encoding[[i]]
    columns = self._by_neighbour[:, row.indices]
    own = np.repeat(row.data, np.diff(columns.indptr))
    shared = np.bincount(
      columns.indices,
      weights=np.minimum(own, columns.data),
      minlength=columns.shape[0],
    ).astype(np.float32)
    return 1 - shared / (2 - shared)


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return counting.distances(a, b, metric="euclidean")


def _neighbours(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the k nearest of each image, itself among them, and the farthest.

  Args:
    features: float32 [N, D].
    k: length of the lists.

  Returns:
    int32 [N, k], from near to far and equals in order; and the largest squared
    distance, float32 [N].
  """
  num = len(features)
  nearest = np.empty((num, k), np.int32)
  farthest = np.empty(num, np.float32)
  size = counting.tile_rows(num)
  bar = logs.progress(range(0, num, size), desc="neighbours", unit="block")
  for start in bar:
    tile = _squared(features[start : start + size], features)
    farthest[start : start + len(tile)] = tile.max(axis=1)
    bounds = np.partition(tile, k - 1, axis=1)[:, k - 1]
    for i, (row, bound) in enumerate(zip(tile, bounds, strict=True)):
      near = np.flatnonzero(row <= bound)  # k of them, or more if some tie.
      order = np.argsort(row[near], kind="stable")[:k]
      nearest[start + i] = near[order]
  # Where all images are one and the same, any scale will do.
  return nearest, np.maximum(farthest, np.finfo(np.float32).tiny)


def _encode(
  features: np.ndarray, nearest: np.ndarray, farthest: np.ndarray
) -> scipy.sparse.csr_array:
  """Returns each image's k-reciprocal encoding: weights [N, N] that sum to 1.

  Args:
    features: float32 [N, D].
    nearest: int32 [N, k1 + 1].
    farthest: float32 [N].
  """
  num, width = nearest.shape
  few = round((width - 1) / 2) + 1  # Of halves, the even one, as NumPy.
  reciprocal = _reciprocal(nearest)
  reciprocal_few = _reciprocal(nearest[:, :few])
  columns, values, lengths = [], [], []
  for start in range(0, num, _CHUNK):
    own = nearest[start : start + _CHUNK]
    own_mask = reciprocal[start : start + _CHUNK]
    # The candidates' own neighbours [b, k1 + 1, few]: how many does the image
    # share with each?
    theirs = nearest[own, :few]
    theirs_mask = reciprocal_few[own]
    shared = np.zeros(own.shape, np.int64)
    for lane in range(few):
      is_shared = (theirs[:, :, lane, None] == own[:, None]) & own_mask[:, None]
      shared += is_shared.any(axis=2) & theirs_mask[:, :, lane]
    size = theirs_mask.sum(axis=2)
    # Whole numbers: 2 / 3 itself does not exist in floating point.
    joins = own_mask & (3 * shared > 2 * size)
    for i in range(len(own)):
      members = np.unique(
        np.concatenate(
          [own[i][own_mask[i]], theirs[i][theirs_mask[i] & joins[i, :, None]]]
        )
      )
      image = start + i
      near = _squared(features[[image]], features[members])[0]
      value = np.exp(-near / farthest[image])
      columns.append(members)
      values.append(value / value.sum())
      lengths.append(len(members))
  return scipy.sparse.csr_array(
    (
      np.concatenate(values),
      np.concatenate(columns),
      np.concatenate([[0], np.cumsum(lengths)]),
    ),
    shape=(num, num),
  )


def _reciprocal(nearest: np.ndarray) -> np.ndarray:
  """Returns whether each in an image's list has it in its own, bool [N, k]."""
  found = np.empty(nearest.shape, bool)
  for start in range(0, len(nearest), _CHUNK):
    own = nearest[start : start + _CHUNK]
    image = np.arange(start, start + len(own))
    found[start : start + len(own)] = (
      nearest[own] == image[:, None, None]
    ).any(axis=2)
  return found


def _average(
  encoding: scipy.sparse.csr_array, nearest: np.ndarray
) -> scipy.sparse.csr_array:
  """Returns the mean encoding of each image's nearest (query expansion)."""
  num, k = nearest.shape
  pick = scipy.sparse.csr_array(
    (
      np.full(nearest.size, 1 / k, np.float32),
      nearest.ravel(),
      np.arange(0, nearest.size + 1, k),
    ),
    shape=(num, num),
  )
  return pick @ encoding
