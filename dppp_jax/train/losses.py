"""The losses of person re-identification, on a batch of labelled features.

All of them look at all pairs of the batch through masks, so their shapes do
not depend on the labels. They compute in float32 (float64 stays as it is):
similarities of bfloat16 features lose the differences that hard mining and the
softmax live on.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from dppp_jax import types

Similarity = Literal["dot", "cosine"]

# On GPU the default precision of a float32 product is TF32, with 10 bits.
_PRECISION = jax.lax.Precision.HIGHEST


def similarities(
  a: types.Array,
  b: types.Array,
  *,
  similarity: Similarity = "dot",
  temperature: float = 1.0,
) -> jax.Array:
  """Returns sim(a_i, b_j) / temperature.

  Args:
    a: features [A, D].
    b: features [B, D].
    similarity: "dot" of the features as they are, or "cosine".
    temperature: tau of Eq. 7.

  Returns:
    [A, B].

  Raises:
    ValueError: an unknown similarity.
  """
  a, b = _to_float(a), _to_float(b)
  if similarity == "cosine":
    a, b = normalize(a), normalize(b)
  elif similarity != "dot":
    raise ValueError(f"similarity {similarity!r} is neither dot nor cosine")
  return jnp.matmul(a, b.T, precision=_PRECISION) / temperature


def sup_con(
  a: types.Array,
  b: types.Array,
  labels: types.Array,
  *,
  similarity: Similarity = "dot",
  temperature: float = 1.0,
) -> jax.Array:
  """Returns the supervised contrastive loss from a to b (Eq. 7, Eq. 8).

  mean_i -1/|P(i)| sum_{p in P(i)} log softmax_j(sim(a_i, b_j) / tau)[p], with
  P(i) the columns of the identity of row i. Eq. 7 leaves out the minus sign
  and 1/|P(i)|, and prints P(j) for P(i). Row and column i belong together, so
  P(i) always holds i and no anchor is without a positive. An anchor without a
  negative has the loss of a softmax over its positives alone.

  An identity fills |P(i)| columns, and its softmax is spread over them: the
  least possible value is the mean of log |P(i)|, not 0.

  Args:
    a: features [B, D] of the anchors.
    b: features [B, D] of what they are compared with.
    labels: int [B], the identity of row i of both.
    similarity: "dot" or "cosine".
    temperature: tau. Cosine needs a small one, such as 0.07: cosines lie in
      [-1, 1], which at tau 1 cannot tell 64 columns apart.

  Returns:
    A scalar.
  """
  logits = similarities(a, b, similarity=similarity, temperature=temperature)
  positive = labels[:, None] == labels[None, :]
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  per_anchor = jnp.where(positive, log_probs, 0).sum(-1) / positive.sum(-1)
  return -per_anchor.mean()


def symmetric_sup_con(
  a: types.Array,
  b: types.Array,
  labels: types.Array,
  *,
  similarity: Similarity = "dot",
  temperature: float = 1.0,
) -> jax.Array:
  """Returns sup_con(a, b) + sup_con(b, a), a sum of two (Eq. 6, Eq. 15)."""
  options = {"similarity": similarity, "temperature": temperature}
  return sup_con(a, b, labels, **options) + sup_con(b, a, labels, **options)


def triplet(
  features: types.Array,
  labels: types.Array,
  *,
  margin: float | Literal["soft"] = 0.3,
  squared: bool = False,
) -> jax.Array:
  """Returns the batch-hard triplet loss (Eq. 9 with squared, Eq. 11).

  Every sample is an anchor; its positive is the farthest other sample of its
  identity, its negative the nearest one of another identity. Anchors that lack
  either are left out of the mean, and a batch without any triplet costs 0.

  Args:
    features: [B, D], compared as they are (Euclidean, not normalised).
    labels: int [B].
    margin: max(0, d_p - d_n + margin); "soft" is log(1 + exp(d_p - d_n)).
    squared: take squared distances, as Eq. 9 prints them.

  Returns:
    A scalar.
  """
  features = _to_float(features)
  same = labels[:, None] == labels[None, :]
  itself = jnp.eye(len(labels), dtype=bool)
  mining = _mining_distances(jax.lax.stop_gradient(features))
  hardest_positive = jnp.where(same & ~itself, mining, -jnp.inf).argmax(-1)
  hardest_negative = jnp.where(same, jnp.inf, mining).argmin(-1)
  # Only the chosen pairs are measured by their difference: exact where the
  # expanded square cancels, and a gradient for B pairs instead of B * B.
  gap = _distance(features, features[hardest_positive], squared=squared)
  gap -= _distance(features, features[hardest_negative], squared=squared)
  if margin == "soft":
    per_anchor = jax.nn.softplus(gap)
  else:
    per_anchor = jax.nn.relu(gap + margin)
  is_anchor = (same & ~itself).any(-1) & ~same.all(-1)
  total = jnp.where(is_anchor, per_anchor, 0).sum()
  return total / jnp.maximum(is_anchor.sum(), 1)


def cross_entropy(
  logits: types.Array, labels: types.Array, *, label_smoothing: float = 0.1
) -> jax.Array:
  """Returns the label-smoothed cross-entropy, mean over the batch (Eq. 12).

  The target is (1 - eps) on the label plus eps / K on each of the K classes.
  (Eq. 12 sums over j as a class and divides by B as if it were a sample.)

  Args:
    logits: [B, K].
    labels: int [B] in [0, K).
    label_smoothing: eps.

  Returns:
    A scalar.
  """
  log_probs = jax.nn.log_softmax(_to_float(logits), axis=-1)
  picked = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
  smooth = log_probs.mean(-1)
  losses = (1 - label_smoothing) * picked + label_smoothing * smooth
  return -losses.mean()


def accuracy(logits: types.Array, labels: types.Array) -> jax.Array:
  """Returns the share of rows [B, K] whose greatest logit is the label."""
  return (logits.argmax(-1) == labels).mean(dtype=jnp.float32)


def retrieval_accuracy(
  a: types.Array,
  b: types.Array,
  labels: types.Array,
  *,
  similarity: Similarity = "dot",
) -> jax.Array:
  """Returns the share of rows of a whose most similar row of b is its own kind.

  Args:
    a: features [B, D].
    b: features [B, D].
    labels: int [B], the identity of row i of both.
    similarity: "dot" or "cosine".

  Returns:
    A scalar in [0, 1].
  """
  nearest = similarities(a, b, similarity=similarity).argmax(-1)
  return (jnp.asarray(labels)[nearest] == labels).mean(dtype=jnp.float32)


def normalize(x: types.Array, *, epsilon: float = 1e-12) -> jax.Array:
  """Returns x [*b, D] with L2 norm 1; a zero row stays zero."""
  x = _to_float(x)
  # The floor is under the square root: its gradient at 0 is 0, not NaN.
  norm = jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), epsilon**2))
  return x / norm


def _to_float(x: types.Array) -> jax.Array:
  return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _mining_distances(features: jax.Array) -> jax.Array:
  """Returns squared distances [B, B], good enough to rank pairs by."""
  # Distances do not know the origin, rounding does: features of one network
  # share a large mean.
  features -= features.mean(0, keepdims=True)
  squares = (features * features).sum(-1)
  products = jnp.matmul(features, features.T, precision=_PRECISION)
  return squares[:, None] + squares[None, :] - 2 * products


def _distance(a: jax.Array, b: jax.Array, *, squared: bool) -> jax.Array:
  squares = jnp.square(a - b).sum(-1)
  # 1e-12 keeps the gradient of the root finite for two equal features.
  return squares if squared else jnp.sqrt(jnp.maximum(squares, 1e-12))
