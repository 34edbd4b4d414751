"""Eq. 6 to 12 and 15 of DPPP against loops that know no mask and no matmul."""

import math

import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import pytest

from dppp_jax.train import losses

_PK = np.repeat(np.arange(4), 3)  # P x K.
_UNEVEN = np.array([5, 5, 9, 2, 5, 9, 7, 2, 2, 7])


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def features(labels, width=5, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return scale * rng.normal(size=(len(labels), width))


def dot(x, y):
  return sum(float(p) * float(q) for p, q in zip(x, y, strict=True))


def sim(x, y, similarity):
  value = dot(x, y)
  if similarity == "cosine":
    value /= math.sqrt(dot(x, x)) * math.sqrt(dot(y, y))
  return value


def sup_con_loop(a, b, labels, similarity, tau):
  """Eq. 7 and 8 as corrected: a minus, a mean over P(i), a mean over i."""
  total = 0.0
  for i in range(len(a)):
    row = [math.exp(sim(a[i], b[j], similarity) / tau) for j in range(len(b))]
    positives = [p for p in range(len(b)) if labels[p] == labels[i]]
    total += -sum(math.log(row[p] / sum(row)) for p in positives) / len(
      positives
    )
  return total / len(a)


def triplet_loop(x, labels, margin, squared):
  """Eq. 9 and 11 as corrected: hardest pairs, negatives in the second term."""
  values = []
  for i in range(len(x)):
    distances = [
      dot(x[i] - x[j], x[i] - x[j]) ** (1 if squared else 0.5)
      for j in range(len(x))
    ]
    others = [j for j in range(len(x)) if j != i]
    same = [distances[j] for j in others if labels[j] == labels[i]]
    different = [distances[j] for j in others if labels[j] != labels[i]]
    if not same or not different:
      continue
    gap = max(same) - min(different)
    if margin == "soft":
      values.append(math.log(1 + math.exp(gap)))
    else:
      values.append(max(0.0, gap + margin))
  return sum(values) / len(values) if values else 0.0


def cross_entropy_loop(logits, labels, eps):
  """Eq. 12 as corrected: minus log p of the smoothed label, mean over j."""
  total = 0.0
  for row, label in zip(logits, labels, strict=True):
    norm = math.log(sum(math.exp(z) for z in row))
    for k, z in enumerate(row):
      target = (1 - eps) * (k == label) + eps / len(row)
      total -= target * (z - norm)
  return total / len(logits)


@pytest.mark.parametrize("labels", [_PK, _UNEVEN], ids=["pk", "uneven"])
@pytest.mark.parametrize(
  ("similarity", "tau"), [("dot", 1.0), ("dot", 0.5), ("cosine", 0.07)]
)
def test_sup_con(labels, similarity, tau):
  a, b = features(labels), features(labels, seed=1)
  options = {"similarity": similarity, "temperature": tau}
  i2t = sup_con_loop(a, b, labels, similarity, tau)
  t2i = sup_con_loop(b, a, labels, similarity, tau)
  np.testing.assert_allclose(
    losses.sup_con(a, b, labels, **options), i2t, rtol=1e-12
  )
  both = losses.symmetric_sup_con(a, b, labels, **options)
  np.testing.assert_allclose(both, i2t + t2i, rtol=1e-12)
  assert abs(i2t - t2i) > 1e-3  # The two directions are not the same loss.


def test_sup_con_has_the_floor_of_its_duplicates():
  """Perfect features cannot go below log K, and reach it."""
  x = 30 * np.eye(4)[_PK]
  np.testing.assert_allclose(losses.sup_con(x, x, _PK), math.log(3), rtol=1e-12)


def test_sup_con_of_one_identity_is_a_plain_mean():
  labels = np.zeros(4, int)
  a, b = features(labels), features(labels, seed=1)
  loop = sup_con_loop(a, b, labels, "dot", 1.0)
  np.testing.assert_allclose(losses.sup_con(a, b, labels), loop, rtol=1e-12)


@pytest.mark.parametrize("labels", [_PK, _UNEVEN], ids=["pk", "uneven"])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margin", [0.3, "soft"])
def test_triplet(labels, squared, margin):
  x = features(labels)
  value = losses.triplet(x, labels, margin=margin, squared=squared)
  loop = triplet_loop(x, labels, margin, squared)
  assert loop > 0.1
  np.testing.assert_allclose(value, loop, rtol=1e-12)


def test_triplet_leaves_out_anchors_without_a_triplet():
  labels = np.array([0, 0, 1, 2])  # 1 and 2 have no positive.
  x = features(labels)
  np.testing.assert_allclose(
    losses.triplet(x, labels), triplet_loop(x, labels, 0.3, False), rtol=1e-12
  )
  for alone in (np.arange(4), np.zeros(4, int)):
    value, grad = jax.value_and_grad(losses.triplet)(jnp.array(x), alone)
    assert value == 0
    assert not grad.any()


def test_triplet_of_satisfied_pairs_is_zero():
  x = 10.0 * np.eye(4)[_PK] + 0.01 * features(_PK, width=4)
  assert losses.triplet(x, _PK) == 0


def test_triplet_gradient_is_finite_for_equal_features():
  x = jnp.zeros((len(_PK), 5))
  value, grad = jax.value_and_grad(losses.triplet)(x, _PK)
  np.testing.assert_allclose(value, 0.3, rtol=1e-12)
  assert np.isfinite(grad).all()


def test_triplet_in_float32_survives_a_large_common_mean():
  """CLIP's raw features share a mean far larger than their differences."""
  x = (features(_PK, seed=3) + 1000).astype(np.float32)
  loop = triplet_loop(x.astype(np.float64), _PK, 0.3, False)
  value = losses.triplet(x, _PK)
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, loop, rtol=2e-6)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_cross_entropy(eps):
  logits = features(_UNEVEN, width=10)
  value = losses.cross_entropy(logits, _UNEVEN, label_smoothing=eps)
  loop = cross_entropy_loop(logits, _UNEVEN, eps)
  np.testing.assert_allclose(value, loop, rtol=1e-12)


@pytest.mark.parametrize(
  "loss",
  [
    lambda a, b: losses.symmetric_sup_con(a, b, _UNEVEN),
    lambda a, b: losses.sup_con(
      a, b, _UNEVEN, similarity="cosine", temperature=0.2
    ),
    lambda a, b: losses.triplet(a, _UNEVEN) + 0 * b.sum(),
    lambda a, b: losses.triplet(a * b, _UNEVEN, squared=True),
    lambda a, b: losses.triplet(a, _UNEVEN, margin="soft") + 0 * b.sum(),
    lambda a, b: losses.cross_entropy(a @ b.T, _UNEVEN),
  ],
  ids=["sup_con", "cosine", "triplet", "squared", "soft", "cross_entropy"],
)
def test_gradients(loss):
  a, b = features(_UNEVEN, seed=4), features(_UNEVEN, seed=5)
  test_util.check_grads(loss, (a, b), order=1, modes=["rev"], eps=1e-6)


def test_low_precision_features_are_compared_in_float32():
  a = jnp.asarray(features(_PK), jnp.bfloat16)
  b = jnp.asarray(features(_PK, seed=1), jnp.bfloat16)
  wide = [np.asarray(x, np.float64) for x in (a, b)]
  value = losses.sup_con(a, b, _PK)
  assert value.dtype == jnp.float32
  loop = sup_con_loop(*wide, _PK, "dot", 1.0)
  np.testing.assert_allclose(value, loop, rtol=1e-6)


def test_accuracies():
  logits = np.array([[2.0, 1], [0, 3], [5, 4], [0, 1]])
  np.testing.assert_allclose(
    losses.accuracy(logits, np.array([0, 1, 1, 0])), 0.5
  )
  # Row 0 finds its own kind in another row, row 2 finds a stranger.
  a, labels = np.eye(3), np.array([7, 7, 8])
  b = np.array([[0, 1.0, 0.5], [1, 0, 0.9], [0, 0, 0.1]])
  np.testing.assert_allclose(
    losses.retrieval_accuracy(a, b, labels), 2 / 3, rtol=1e-6
  )


def test_unknown_similarity():
  x = features(_PK)
  with pytest.raises(ValueError, match="euclid"):
    losses.sup_con(x, x, _PK, similarity="euclid")
