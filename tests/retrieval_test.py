from absl import logging
import jax
import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.evals import counting, retrieval

BACKENDS = ("numpy", "jax")


def brute_force(distances, qp, qc, gp, gc, *, ap="step", max_rank=50):
  """One stable argsort per query and a walk down the list."""
  aps, inps, firsts = [], [], []
  for i, row in enumerate(distances):
    order = np.argsort(row, kind="stable")
    junk = (gp == -1) | ((gp == qp[i]) & (gc == qc[i]))
    relevant = (gp == qp[i])[order][~junk[order]]
    if not relevant.any():
      continue
    score, hits, precision_before = 0.0, 0, 1.0
    for rank, is_hit in enumerate(relevant, 1):
      hits += is_hit
      precision = hits / rank
      if is_hit and ap == "step":
        score += precision
      elif is_hit:
        score += (precision_before + precision) / 2
      precision_before = precision
    aps.append(score / hits)
    inps.append(hits / (np.flatnonzero(relevant)[-1] + 1))
    firsts.append(np.flatnonzero(relevant)[0] + 1)
  firsts = np.array(firsts)
  cmc = [np.mean(firsts <= k) for k in range(1, max_rank + 1)]
  return np.mean(aps), np.array(cmc), np.mean(inps), len(aps)


def one_query(relevance, **kwargs):
  """Scores a list whose images lie at distances 1, 2, 3 ..."""
  gallery = np.arange(1.0, len(relevance) + 1)[None]
  return retrieval.evaluate_distances(
    gallery,
    np.array([7]),
    np.array([1]),
    np.where(relevance, 7, 9),
    np.full(len(relevance), 2),
    **kwargs,
  )


@pytest.mark.parametrize(
  "relevance, step, trapezoid, inp",
  [
    ((1, 0, 1, 0), 5 / 6, 0.5 * (1 + (1 / 2 + 2 / 3) / 2), 2 / 3),
    ((0, 1), 0.5, 0.25, 0.5),
    ((0, 0, 0, 1), 0.25, 0.125, 0.25),
    ((1, 1, 1), 1.0, 1.0, 1.0),
  ],
)
def test_metrics_by_hand(relevance, step, trapezoid, inp):
  result = one_query(relevance)
  assert result.mAP == pytest.approx(step, abs=1e-15)
  assert result.mINP == pytest.approx(inp, abs=1e-15)
  by_trapezoid = one_query(relevance, ap="trapezoid").mAP
  assert by_trapezoid == pytest.approx(trapezoid, abs=1e-15)
  first = relevance.index(1) + 1
  np.testing.assert_array_equal(
    result.cmc, [float(k >= first) for k in range(1, 51)]
  )
  assert (result.num_valid_queries, result.num_skipped_queries) == (1, 0)


def test_junk_distractors_and_skipped_queries():
  gallery_pids = np.array([1, -1, 1, 0, 1, 2, 3])
  gallery_camids = np.array([1, 2, 2, 2, 3, 1, 1])
  query_pids, query_camids = np.array([1, 2, 5, -1]), np.array([1, 1, 1, 1])
  distances = np.tile(np.arange(7, dtype=np.float32), (4, 1))
  labels = (query_pids, query_camids, gallery_pids, gallery_camids)
  result = retrieval.evaluate_distances(distances, *labels, max_rank=3)
  # Query 0: image 0 is of its camera and image 1 has pid -1: hits at ranks 1
  # and 3, the distractor at 2. Query 1 has a match in its own camera only,
  # query 2 none, and pid -1 is nobody's.
  assert result.num_valid_queries == 1
  assert result.num_skipped_queries == 3
  assert result.mAP == pytest.approx((1 + 2 / 3) / 2)
  assert result.mINP == pytest.approx(2 / 3)
  np.testing.assert_array_equal(result.first_rank, [1, 0, 0, 0])
  np.testing.assert_array_equal(np.isnan(result.ap), [False, True, True, True])
  np.testing.assert_array_equal(result.cmc, [1, 1, 1])
  zero = retrieval.evaluate_distances(
    distances, *labels, max_rank=3, skipped_as_zero=True
  )
  assert zero.mAP == pytest.approx(result.mAP / 4)
  np.testing.assert_array_equal(zero.cmc, [0.25] * 3)
  indices, hits = retrieval.ranked_lists(
    distances[:2],
    *(query_pids[:2], query_camids[:2], gallery_pids, gallery_camids),
    k=6,
  )
  np.testing.assert_array_equal(
    indices, [[2, 3, 4, 5, 6, -1], [0, 2, 3, 4, 6, -1]]
  )
  np.testing.assert_array_equal(hits, [[1, 0, 1, 0, 0, 0], [0] * 6])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_rank_in_the_order_of_the_gallery(backend):
  features = np.tile(np.array([[0.6, 0.8]]), (5, 1))
  features[0] = [1, 0]
  run = lambda pids: retrieval.evaluate(
    np.array([[0.6, 0.8]]),
    np.array([1]),
    np.array([0]),
    features,
    np.array(pids),
    np.ones(5),
    backend=backend,
  )
  assert run([2, 1, 2, 2, 2]).mAP == 1
  assert run([2, 2, 2, 2, 1]).mAP == 0.25
  assert run([1, 2, 2, 2, 2]).mAP == 0.2
  assert run([2, 2, 1, 2, 1]).mAP == 0.5


@pytest.mark.parametrize("ap", ("step", "trapezoid"))
@pytest.mark.parametrize("metric", ("cosine", "euclidean"))
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force(seed, metric, ap, monkeypatch):
  monkeypatch.setattr(counting, "_TILE_BYTES", 4 * 90 * 7)  # Several tiles.
  rng = np.random.default_rng(seed)
  # Few distinct features, so that ties abound.
  draw = lambda n: rng.integers(-2, 3, (n, 3)) * [[1, 1, 0.5]] + [[3, 0, 0]]
  query, gallery = draw(30), draw(90)
  labels = (
    rng.integers(0, 12, 30),
    rng.integers(0, 3, 30),
    rng.integers(-1, 10, 90),
    rng.integers(0, 3, 90),
  )
  distances = counting.distances(
    retrieval.prepare(query, where="query", metric=metric),
    retrieval.prepare(gallery, where="gallery", metric=metric),
    metric=metric,
  )
  assert len(np.unique(distances[0])) < 60
  mean_ap, cmc, inp, valid = brute_force(distances, *labels, ap=ap)
  blocks = (distances[i : i + 11] for i in range(0, 30, 11))
  for result in (
    retrieval.evaluate_distances(distances, *labels, ap=ap),
    retrieval.evaluate_distances(blocks, *labels, ap=ap),
  ):
    assert result.mAP == pytest.approx(mean_ap, abs=1e-12)
    assert result.mINP == pytest.approx(inp, abs=1e-12)
    np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=1e-12)
    assert result.num_valid_queries == valid
    assert valid < 30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ("cosine", "euclidean"))
def test_both_backends_equal_brute_force(backend, metric, monkeypatch):
  monkeypatch.setattr(counting, "_TILE_BYTES", 4 * 300 * 16)
  rng = np.random.default_rng(1)
  query, gallery = rng.normal(size=(40, 16)), rng.normal(size=(300, 16))
  labels = (
    rng.integers(0, 20, 40),
    rng.integers(0, 3, 40),
    rng.integers(-1, 20, 300),
    rng.integers(0, 3, 300),
  )
  # An oracle in float64: distances this far apart rank the same in float32.
  q, g = query, gallery
  if metric == "cosine":
    q, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, g))
  distances = ((q[:, None] - g[None]) ** 2).sum(axis=2)
  mean_ap, cmc, inp, valid = brute_force(distances, *labels, max_rank=10)
  result = retrieval.evaluate(
    query,
    *labels[:2],
    gallery,
    *labels[2:],
    metric=metric,
    backend=backend,
    max_rank=10,
  )
  assert result.mAP == pytest.approx(mean_ap, abs=1e-12)
  assert result.mINP == pytest.approx(inp, abs=1e-12)
  np.testing.assert_allclose(result.cmc, cmc, rtol=0, atol=1e-12)
  assert result.num_valid_queries == valid


def test_jax_backend_compiles_once(monkeypatch):
  monkeypatch.setattr(counting, "_TILE_BYTES", 4 * 50 * 8)
  traces = []
  tile = counting.count_tile
  monkeypatch.setattr(
    counting, "count_tile", lambda *a, **k: traces.append(0) or tile(*a, **k)
  )
  rng = np.random.default_rng(0)
  result = retrieval.evaluate(
    rng.normal(size=(30, 4)),
    rng.integers(0, 5, 30),
    np.zeros(30),
    rng.normal(size=(50, 4)),
    rng.integers(0, 5, 50),
    np.ones(50),
    backend="jax",
  )
  assert result.num_valid_queries == 30
  assert len(traces) == 1


def test_gallery_smaller_than_max_rank():
  result = retrieval.evaluate_distances(
    np.array([[2.0, 1.0], [1.0, 2.0]]),
    np.array([1, 1]),
    np.array([0, 0]),
    np.array([1, 2]),
    np.array([1, 1]),
    max_rank=5,
  )
  np.testing.assert_array_equal(result.cmc, [0.5, 1, 1, 1, 1])
  assert result.summary()["rank5"] == 1
  assert "rank10" not in result.summary()


def labels(num_query, num_gallery):
  return (
    np.arange(num_query) % 2,
    np.zeros(num_query, int),
    np.arange(num_gallery) % 2,
    np.ones(num_gallery, int),
  )


def features(n, d=4):
  return np.random.default_rng(n).normal(size=(n, d)).astype(np.float32)


@pytest.mark.parametrize("bad", (np.nan, np.inf))
@pytest.mark.parametrize("side", ("query", "gallery"))
def test_nan_is_refused_by_row(side, bad):
  query, gallery = features(4), features(6)
  {"query": query, "gallery": gallery}[side][3, 1] = bad
  qp, qc, gp, gc = labels(4, 6)
  with pytest.raises(errors.UserError, match=f"{side} row 3 holds NaN"):
    retrieval.evaluate(query, qp, qc, gallery, gp, gc)
  distances = np.zeros((4, 6))
  distances[2, 1] = np.nan
  with pytest.raises(errors.UserError, match="query 2 hold NaN"):
    retrieval.evaluate_distances(distances, qp, qc, gp, gc)


def test_collapsed_features_are_warned_of(monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda *a: said.append(a[0] % a[1:]))
  qp, qc, gp, gc = labels(4, 6)
  retrieval.evaluate(features(4), qp, qc, features(6), gp, gc)
  assert not said
  constant = np.ones((6, 4)) + 1e-5 * features(6)
  retrieval.evaluate(features(4), qp, qc, constant, gp, gc)
  assert len(said) == 1 and "gallery features have collapsed" in said[0]


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(gallery_features=features(6, 5)), "4 wide and gallery features 5"),
    (dict(gallery_pids=np.arange(5)), "gallery pids .5,. and camids .6,."),
    (dict(query_features=features(3)), "3 query features but 4 query labels"),
    (dict(query_features=np.zeros((0, 4))), "at least one row"),
    (dict(gallery_pids=np.full(6, -1)), "all of it has pid -1"),
    (dict(query_pids=np.full(4, 9)), "none of the 4 queries"),
    (dict(metric="manhattan"), "manhattan"),
    (dict(backend="cuda"), "cuda"),
    (dict(ap="mean"), "mean"),
  ],
)
def test_bad_input_is_one_clear_line(change, message):
  qp, qc, gp, gc = labels(4, 6)
  given = dict(
    query_features=features(4),
    query_pids=qp,
    query_camids=qc,
    gallery_features=features(6),
    gallery_pids=gp,
    gallery_camids=gc,
  )
  with pytest.raises(errors.UserError, match=message) as caught:
    retrieval.evaluate(**(given | change))
  assert "\n" not in str(caught.value)


def test_auto_backend_follows_the_device():
  assert jax.default_backend() == "cpu"
  qp, qc, gp, gc = labels(4, 6)
  auto, by_numpy = (
    retrieval.evaluate(
      features(4), qp, qc, features(6), gp, gc, backend=backend
    )
    for backend in ("auto", "numpy")
  )
  assert auto.mAP == by_numpy.mAP


@pytest.mark.parametrize("rows", (3, 5))
def test_one_row_of_distances_per_query(rows):
  blocks = (np.ones((1, 6)) for _ in range(rows))
  with pytest.raises(errors.UserError, match="but 4 query labels"):
    retrieval.evaluate_distances(blocks, *labels(4, 6))
