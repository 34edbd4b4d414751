import tracemalloc

import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.evals import counting, rerank, retrieval


def dense(features, num_query, k1, k2, weight):
  """The published algorithm, with every matrix and every loop of it."""
  num = len(features)
  squared = np.zeros((num, num))
  for i in range(num):
    for j in range(num):
      squared[i, j] = np.sum((features[i] - features[j]) ** 2)
  original = (squared / squared.max(axis=0)).T
  ranking = np.argsort(original, axis=1, kind="stable")

  def reciprocal(i, k):
    return [j for j in ranking[i, : k + 1] if i in ranking[j, : k + 1]]

  encoding = np.zeros((num, num))
  grown = 0
  for i in range(num):
    base = reciprocal(i, k1)
    members = set(base)
    for candidate in base:
      others = reciprocal(candidate, int(np.around(k1 / 2)))
      if len(set(others) & set(base)) > 2 / 3 * len(others):
        members |= set(others)
    grown += len(members) > len(base)
    for j in members:
      encoding[i, j] = np.exp(-original[i, j])
    encoding[i] /= encoding[i].sum()
  encoding = np.stack(
    [encoding[ranking[i, :k2]].mean(axis=0) for i in range(num)]
  )
  jaccard = np.zeros((num_query, num))
  for i in range(num_query):
    for j in range(num):
      shared = np.minimum(encoding[i], encoding[j]).sum()
      jaccard[i, j] = 1 - shared / (2 - shared)
  final = (1 - weight) * jaccard + weight * original[:num_query]
  return final[:, num_query:], grown


def people(seed, num_query=12, num_gallery=60, num_pids=8, noise=0.8):
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(num_pids, 10))
  query_pids = rng.integers(0, num_pids, num_query)
  gallery_pids = rng.integers(0, num_pids, num_gallery)
  draw = lambda pids: (
    centres[pids] + noise * rng.normal(size=(len(pids), 10))
  ).astype(np.float32)
  return draw(query_pids), query_pids, draw(gallery_pids), gallery_pids


@pytest.mark.parametrize(
  "k1, k2, weight", [(20, 6, 0.3), (7, 1, 0.3), (5, 3, 0.0), (9, 4, 1.0)]
)
@pytest.mark.parametrize("metric", ("cosine", "euclidean"))
def test_equals_the_dense_algorithm(metric, k1, k2, weight, monkeypatch):
  monkeypatch.setattr(rerank, "_CHUNK", 17)
  query, _, gallery, _ = people(k1)
  features = np.concatenate([query, gallery]).astype(np.float64)
  if metric == "cosine":
    features /= np.linalg.norm(features, axis=1, keepdims=True)
  expected, grown = dense(features, len(query), k1, k2, weight)
  assert k1 < 7 or grown > 3  # The expansion was at work.
  ranker = rerank.KReciprocal(
    query, gallery, k1=k1, k2=k2, weight=weight, metric=metric
  )
  found = np.concatenate(list(ranker.blocks()))
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)
  # A product of other rows may sum in another order: float64 is the judge.
  some = ranker.rows(np.array([3, 1]))
  np.testing.assert_allclose(some, expected[[3, 1]], rtol=0, atol=5e-7)


def test_equal_distances_rank_in_order():
  # Twenty images in each of three places, and lists that end within a tie.
  line = np.tile(np.array([0.0, 1.0, 3.0]), 20)[:, None]
  features = np.concatenate([line, np.ones_like(line)], axis=1)
  expected, _ = dense(features, 5, 24, 6, 0.3)
  found = rerank.KReciprocal(
    features[:5], features[5:], k1=24, metric="euclidean"
  )
  np.testing.assert_allclose(
    np.concatenate(list(found.blocks())), expected, rtol=0, atol=5e-7
  )


def test_it_helps_and_feeds_the_evaluation():
  query, query_pids, gallery, gallery_pids = people(
    0, num_query=40, num_gallery=200, num_pids=10, noise=1.0
  )
  labels = (
    (query_pids, np.zeros(len(query_pids))),
    (gallery_pids, np.ones(len(gallery_pids))),
  )
  before = retrieval.evaluate(query, *labels[0], gallery, *labels[1])
  ranker = rerank.KReciprocal(query, gallery, k1=12, k2=4)
  after = retrieval.evaluate_distances(ranker.blocks(), *labels[0], *labels[1])
  assert after.num_valid_queries == 40
  assert after.mAP > before.mAP + 0.05


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(k1=72), "more than k1 images; there are 72"),
    (dict(k1=4, k2=6), "k1=4, k2=6"),
    (dict(k2=0), "k2=0"),
    (dict(metric="manhattan"), "manhattan"),
  ],
)
def test_bad_parameters(kwargs, message):
  query, _, gallery, _ = people(0)
  with pytest.raises(errors.UserError, match=message):
    rerank.KReciprocal(query, gallery, **kwargs)
  with pytest.raises(errors.UserError, match="10 wide and gallery features 9"):
    rerank.KReciprocal(query, gallery[:, :9])


def test_no_matrix_over_all_pairs(monkeypatch):
  monkeypatch.setattr(counting, "_TILE_BYTES", 1 << 18)
  features = np.random.default_rng(0).normal(size=(2500, 4))
  tracemalloc.start()
  try:
    ranker = rerank.KReciprocal(features[:300], features[300:], k1=10, k2=3)
    sum(block.sum() for block in ranker.blocks())
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 2500 * 2500 * 4 / 2
