import collections
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.data import sampler

# Persons with fewer than K = 4 images, exactly K, and remainders.
SIZES = {7: 2, 3: 4, 11: 5, 0: 8, 20: 11, 5: 23, 9: 1, 2: 9}
P, K = 3, 4


def make_pids(seed=0):
  pids = np.repeat(list(SIZES), list(SIZES.values()))
  return np.random.default_rng(seed).permutation(pids)


def naive_epoch(pids, rng):
  """One epoch by lists and dicts: [(pid, [K examples]), ...] per batch."""
  chunks = {}
  for pid in sorted(set(pids.tolist())):
    mine = [i for i in range(len(pids)) if pids[i] == pid]
    if len(mine) < K:
      mine = rng.choice(mine, K).tolist()
    rng.shuffle(mine)
    chunks[pid] = [mine[i : i + K] for i in range(0, len(mine) - K + 1, K)]
  batches, alive = [], sorted(chunks)
  while len(alive) >= P:
    batch = []
    for pid in rng.permutation(alive)[:P].tolist():
      batch.append((pid, chunks[pid].pop()))
      if not chunks[pid]:
        alive.remove(pid)
    batches.append(batch)
  return batches


def as_batches(plan, pids):
  batches = []
  for row in plan.indices.reshape(len(plan), P, K):
    assert all(len(set(pids[chunk].tolist())) == 1 for chunk in row)
    batches.append([(int(pids[chunk[0]]), chunk.tolist()) for chunk in row])
  return batches


def test_every_batch_has_p_persons_with_k_images():
  pids = make_pids()
  plan = sampler.pk(pids, P=P, K=K, epochs=30, seed=1)
  assert plan.indices.dtype == plan.epochs.dtype == np.int32
  assert plan.batch_size == P * K
  for batch in as_batches(plan, pids):
    assert len({pid for pid, _ in batch}) == P
    for pid, chunk in batch:
      # Only a person with fewer than K images may repeat one.
      if SIZES[pid] >= K:
        assert len(set(chunk)) == K


def test_no_example_is_used_twice_in_an_epoch():
  pids = make_pids()
  plan = sampler.pk(pids, P=P, K=K, epochs=30, seed=1)
  for epoch in range(1, 31):
    batches = as_batches(plan[slice(*span(plan, epoch))], pids)
    used = collections.Counter(
      i for batch in batches for pid, c in batch if SIZES[pid] >= K for i in c
    )
    assert max(used.values()) == 1
    chunks = collections.Counter(pid for batch in batches for pid, _ in batch)
    quota = {pid: max(n // K, 1) for pid, n in SIZES.items()}
    assert all(chunks[pid] <= quota[pid] for pid in SIZES)
    # The epoch ends when, and not before, fewer than P have chunks left.
    assert sum(chunks[pid] < quota[pid] for pid in SIZES) < P


def span(plan, epoch):
  at = np.flatnonzero(plan.epochs == epoch)
  assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
  return int(at[0]), int(at[-1]) + 1


def test_distribution_is_that_of_the_naive_sampler():
  pids, epochs = make_pids(), 3000
  plan = sampler.pk(pids, P=P, K=K, epochs=epochs, seed=5)
  lengths = np.bincount(plan.epochs)[1:]
  first = [as_batches(plan[s : s + 1], pids)[0]
           for s in np.cumsum(lengths) - lengths]  # fmt: skip
  rng = np.random.default_rng(8)
  naive = [naive_epoch(pids, rng) for _ in range(epochs)]
  naive_lengths = np.array([len(e) for e in naive])

  def frequencies(counter):
    return np.array([counter[key] for key in keys]) / epochs

  # How long epochs are.
  keys = sorted(set(naive_lengths.tolist()) | set(lengths.tolist()))
  ours = frequencies(collections.Counter(lengths.tolist()))
  theirs = frequencies(collections.Counter(naive_lengths.tolist()))
  np.testing.assert_allclose(ours, theirs, atol=0.04)

  # How often each person is used in an epoch: big ones fill its end.
  keys = sorted(SIZES)
  ours = frequencies(collections.Counter(pids[plan.indices[:, ::K]].flat))
  theirs = frequencies(
    collections.Counter(pid for e in naive for b in e for pid, _ in b)
  )
  np.testing.assert_allclose(ours, theirs, atol=0.06)

  # The first batch is uniform over persons, whatever they own.
  ours = frequencies(collections.Counter(p for b in first for p, _ in b))
  np.testing.assert_allclose(ours, P / len(SIZES), atol=0.04)

  # Which of their images persons contribute is uniform too.
  examples = collections.Counter(plan.indices.flat)
  for pid in SIZES:
    mine = np.array([examples[i] for i in np.flatnonzero(pids == pid)])
    np.testing.assert_allclose(mine / mine.mean(), 1, atol=0.1)


def test_persons_with_too_few_images_draw_with_replacement():
  # Two images, K = 4: 2 draws of 16 show one image only.
  pids = np.array([0, 0, 1, 1, 1, 1])
  plan = sampler.pk(pids, P=2, K=4, epochs=4000, seed=0)
  few = np.sort(plan.indices.reshape(-1, 2, 4), axis=-1)
  few = few[few[:, :, 0] < 2].reshape(-1, 4)
  assert len(few) == 4000
  alone = np.mean(few[:, 0] == few[:, -1])
  assert abs(alone - 2 / 16) < 0.02


def test_same_arguments_same_plan_in_any_process():
  code = (
    "import numpy as np, hashlib; from dppp_jax.data import sampler;"
    "p = sampler.pk(np.arange(300) % 37, P=4, K=3, epochs=3, seed=9);"
    "s = sampler.shuffled(100, batch_size=7, epochs=3, seed=9);"
    "print(hashlib.sha256(p.indices.tobytes() + s.indices.tobytes())"
    ".hexdigest())"
  )
  digests = set()
  for hash_seed in ("0", "1"):
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    digests.add(
      subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
      ).stdout.strip()
    )
  p = sampler.pk(np.arange(300) % 37, P=4, K=3, epochs=3, seed=9)
  s = sampler.shuffled(100, batch_size=7, epochs=3, seed=9)
  here = hashlib.sha256(p.indices.tobytes() + s.indices.tobytes()).hexdigest()
  assert digests == {here}


def test_epochs_and_seeds_differ_and_longer_plans_begin_alike():
  pids = make_pids()
  plan = sampler.pk(pids, P=P, K=K, epochs=3, seed=1)
  longer = sampler.pk(pids, P=P, K=K, epochs=5, seed=1)
  np.testing.assert_array_equal(longer.indices[: len(plan)], plan.indices)
  np.testing.assert_array_equal(longer.epochs[: len(plan)], plan.epochs)
  one, two = (plan[slice(*span(plan, e))].indices for e in (1, 2))
  assert not np.array_equal(one[:4], two[:4])
  other = sampler.pk(pids, P=P, K=K, epochs=3, seed=2)
  assert not np.array_equal(other.indices[:4], plan.indices[:4])


def test_a_slice_is_what_is_left():
  plan = sampler.pk(make_pids(), P=P, K=K, epochs=3, seed=1)
  rest = plan[5:]
  assert len(rest) == len(plan) - 5
  np.testing.assert_array_equal(rest.indices[0], plan.indices[5])
  np.testing.assert_array_equal(rest.epochs, plan.epochs[5:])


@pytest.mark.parametrize(
  ("num_examples", "steps"), [(12, 3), (13, 4), (15, 4), (4, 1)]
)
def test_shuffled_uses_everything_in_batches_of_one_shape(num_examples, steps):
  plan = sampler.shuffled(num_examples, batch_size=4, epochs=2, seed=0)
  # 12 examples make 3 batches, and no fourth one that is empty.
  assert plan.indices.shape == (2 * steps, 4)
  assert plan.epochs.tolist() == [1] * steps + [2] * steps
  for epoch in (plan[:steps], plan[steps:]):
    assert set(epoch.indices.flat) == set(range(num_examples))
    assert all(len(set(row)) == 4 for row in epoch.indices.tolist())
    used = np.bincount(epoch.indices.flat)
    assert (used - 1).sum() == steps * 4 - num_examples
  if num_examples > 4:
    assert not np.array_equal(plan.indices[0], plan.indices[steps])


PIDS = np.array([0, 0, 1, 1, 2])


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (dict(P=4), "P = 4 persons a batch, but the training set has only 3"),
    (dict(K=0), "K = 0: must be at least 1"),
    (dict(P=0), "P = 0: must be at least 1"),
    (dict(K=3), "K = 3 images a person, but no person has more than 2"),
    (dict(epochs=0), "epochs = 0"),
    (dict(seed=-1), "seed = -1"),
    (dict(pids=PIDS[:0]), "the training set is empty"),
  ],
)
def test_bad_arguments_of_pk(arguments, says):
  good = dict(pids=PIDS, P=2, K=2, epochs=1, seed=0)
  sampler.pk(**good)
  with pytest.raises(errors.UserError, match=says):
    sampler.pk(**(good | arguments))


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (dict(num_examples=3), "batch_size = 4, but there are only 3 examples"),
    (dict(num_examples=0), "only 0 examples"),
    (dict(batch_size=0), "batch_size = 0"),
    (dict(epochs=0), "epochs = 0"),
  ],
)
def test_bad_arguments_of_shuffled(arguments, says):
  good = dict(num_examples=4, batch_size=4, epochs=1, seed=0)
  with pytest.raises(errors.UserError, match=says):
    sampler.shuffled(**(good | arguments))


def test_large_plans_take_seconds():
  sizes = np.random.default_rng(0).integers(5, 35, 6641)
  pids = np.repeat(np.arange(6641), sizes)
  plan = sampler.pk(pids, P=8, K=8, epochs=1, seed=0)
  assert 1000 < len(plan) < 2100  # One epoch of GenePerson; about 0.05 s.
