"""Which examples make up which batch, decided before training begins.

A plan is a pure function of its arguments, whatever reads it: to resume at
step s is to go on with `plan[s:]`, for any number of threads.
"""

import dataclasses

import numpy as np

from dppp_jax import errors


@dataclasses.dataclass(frozen=True)
class Plan:
  """The batches of a whole training.

  Attributes:
    indices: int32 [S, B], the examples of each of S steps.
    epochs: int32 [S], each step's epoch, from 1. Epochs of `pk` differ in
      length.
  """

  indices: np.ndarray
  epochs: np.ndarray

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, steps: slice) -> "Plan":
    """Returns the plan of some of the steps."""
    return Plan(self.indices[steps], self.epochs[steps])

  @property
  def batch_size(self) -> int:
    """Returns B."""
    return self.indices.shape[1]


def pk(pids: np.ndarray, *, P: int, K: int, epochs: int, seed: int) -> Plan:
  """Plans batches of P persons with K images each, as CLIP-ReID does.

  In an epoch every person's images are shuffled and cut into chunks of K; what
  remains of a person with more than K is left out, a person with fewer draws K
  with replacement. A batch takes one chunk each of P persons, drawn uniformly
  among those who have chunks left. The epoch ends when fewer than P have, so
  persons with many images dominate its end.

  Args:
    pids: integers [N], the person of each example.
    P: persons in a batch.
    K: images of each.
    epochs: number of epochs.
    seed: the same seed, the same plan.

  Returns:
    A plan with B = P * K; a batch holds each person's K images side by side.

  Raises:
    errors.UserError: P, K or epochs below 1, a negative seed, no examples,
      fewer than P persons, or K above what any person has.
  """
  _check({"P": P, "K": K, "epochs": epochs}, seed=seed)
  pids = np.asarray(pids)
  if pids.size == 0:
    raise errors.UserError(
      "no images to sample from: the training set is empty"
    )
  _, labels, sizes = np.unique(pids, return_inverse=True, return_counts=True)
  if len(sizes) < P:
    raise errors.UserError(
      f"P = {P} persons a batch, but the training set has only {len(sizes)}:"
      " lower P or add persons"
    )
  if sizes.max() < K:
    raise errors.UserError(
      f"K = {K} images a person, but no person has more than {sizes.max()}:"
      " lower K or add images"
    )
  steps = [
    _pk_epoch(labels, sizes, P=P, K=K, rng=np.random.default_rng([seed, epoch]))
    for epoch in range(1, epochs + 1)
  ]
  lengths = [len(s) for s in steps]
  return Plan(
    np.concatenate(steps),
    np.repeat(np.arange(1, epochs + 1, dtype=np.int32), lengths),
  )


def shuffled(
  num_examples: int, *, batch_size: int, epochs: int, seed: int
) -> Plan:
  """Plans batches of a fresh random order every epoch.

  Every example is used in every epoch. Where the batch size does not divide
  their number, the last batch is filled up from the beginning of the same
  order, so that all batches have one shape; where it does, there is no further,
  empty batch.

  Args:
    num_examples: N.
    batch_size: B.
    epochs: number of epochs.
    seed: the same seed, the same plan.

  Returns:
    A plan with ceil(N / B) steps an epoch; no batch holds an example twice.

  Raises:
    errors.UserError: a number below 1, or fewer examples than a batch.
  """
  _check({"batch_size": batch_size, "epochs": epochs}, seed=seed)
  if num_examples < batch_size:
    raise errors.UserError(
      f"batch_size = {batch_size}, but there are only {num_examples} examples:"
      " lower batch_size"
    )
  steps = -(-num_examples // batch_size)
  orders = []
  for epoch in range(1, epochs + 1):
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(num_examples).astype(np.int32)
    orders.append(np.resize(order, (steps, batch_size)))
  return Plan(
    np.concatenate(orders),
    np.repeat(np.arange(1, epochs + 1, dtype=np.int32), steps),
  )


def _check(counts: dict[str, int], *, seed: int) -> None:
  for key, value in counts.items():
    if value < 1:
      raise errors.UserError(f"{key} = {value}: must be at least 1")
  if seed < 0:
    raise errors.UserError(f"seed = {seed}: must not be negative")


def _pk_epoch(
  labels: np.ndarray,
  sizes: np.ndarray,
  *,
  P: int,
  K: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Returns int32 [S, P * K], one epoch.

  Args:
    labels: integers [N] below the number of persons, none without an example.
    sizes: integers [persons], examples of each.
    P: persons in a batch.
    K: images of each.
    rng: the epoch's own generator.
  """
  # Random order within each person, persons one after another.
  order = np.lexsort((rng.random(len(labels)), labels)).astype(np.int32)
  starts = np.cumsum(sizes) - sizes
  num_chunks = np.maximum(sizes // K, 1)

  # chunks [all chunks, K], those of one person side by side.
  first = np.cumsum(num_chunks) - num_chunks
  owner = np.repeat(np.arange(len(sizes)), num_chunks)
  within = np.arange(len(owner)) - first[owner]
  offsets = (within * K)[:, None] + np.arange(K)
  few = sizes[owner] < K
  offsets[few] = rng.integers(sizes[owner][few, None], size=(few.sum(), K))
  chunks = order[starts[owner][:, None] + offsets]

  # The persons with chunks left are alive[:count], in no particular order.
  alive, count = np.arange(len(sizes)), len(sizes)
  left, following = num_chunks.copy(), first.copy()
  picked = []
  while count >= P:
    at = rng.choice(count, P, replace=False, shuffle=False)
    persons = alive[at]
    picked.append(following[persons])
    following[persons] += 1
    left[persons] -= 1
    # From the back, so that what moves into a gap is itself never one.
    for gap in np.sort(at[left[persons] == 0])[::-1]:
      count -= 1
      alive[gap] = alive[count]
  return chunks[np.stack(picked)].reshape(len(picked), P * K)
