"""CMC, mAP and mINP of random features with labels like the real ones.

    python benchmarks/retrieval.py [--set market1501] [--set msmt17]

Market-1501's size: this project's evaluation beside a plain Python ranker of
the kind that Re-ID toolboxes fall back to (a full distance matrix, a full
argsort, a loop over the queries). MSMT17's size: time and peak memory above the
features, in a fresh process; the plain ranker is timed on a part of the queries
there, because it needs three matrices of 3.6 GiB and more for all of them.
"""

import argparse
import multiprocessing
import time

import common
import numpy as np
import remote

from dppp_jax.evals import retrieval

_SEED = 0
# Queries, gallery, identities, cameras, distractors of the real sets.
SIZES = {
  "market1501": (3368, 15913, 750, 6, 2798),
  "msmt17": (11659, 82161, 3060, 15, 0),
}
WIDTH = 512


def make(name: str) -> tuple[np.ndarray, ...]:
  """Returns features and labels in the order of `retrieval.evaluate`."""
  num_query, num_gallery, num_pids, num_cameras, distractors = SIZES[name]
  rng = np.random.default_rng(_SEED)
  # Real identities are uneven: a few have many images, most have few.
  share = rng.gamma(3.0, size=num_pids)
  gallery_pids = np.concatenate(
    [
      np.zeros(distractors, int),
      1
      + rng.choice(num_pids, num_gallery - distractors, p=share / share.sum()),
    ]
  )
  rng.shuffle(gallery_pids)
  query_pids = 1 + np.arange(num_query) % num_pids
  features = lambda n: rng.standard_normal((n, WIDTH), dtype=np.float32)
  return (
    features(num_query),
    query_pids,
    rng.integers(0, num_cameras, num_query),
    features(num_gallery),
    gallery_pids,
    rng.integers(0, num_cameras, num_gallery),
  )


def plain(qf, qp, qc, gf, gp, gc, *, max_rank=50):
  """The plain ranker: one matrix, one argsort, a loop over the queries.

  It normalises with the same function and sorts stably, so that both rank the
  very same float32 distances and the numbers can be compared to the last digit.
  """
  qf = retrieval.prepare(qf, where="query")
  gf = retrieval.prepare(gf, where="gallery")
  distances = 1 - qf @ gf.T
  order = np.argsort(distances, axis=1, kind="stable")
  matches = (gp[order] == qp[:, None]).astype(np.int32)
  all_cmc, all_ap, all_inp = [], [], []
  for i in range(len(qp)):
    ranked = order[i]
    keep = ~((gp[ranked] == qp[i]) & (gc[ranked] == qc[i]))
    raw = matches[i][keep]
    if not raw.any():
      continue
    cmc = raw.cumsum()
    last = np.flatnonzero(raw)[-1]
    all_inp.append(cmc[last] / (last + 1.0))
    cmc[cmc > 1] = 1
    all_cmc.append(cmc[:max_rank])
    hits = raw.cumsum()
    precision = [x / (k + 1.0) for k, x in enumerate(hits)]
    all_ap.append((np.asarray(precision) * raw).sum() / raw.sum())
  cmc = np.asarray(all_cmc, np.float64).sum(axis=0) / len(all_cmc)
  return np.mean(all_ap), cmc, np.mean(all_inp)


def market(repeats: int) -> dict:
  """Times both on all of Market-1501 and compares every number."""
  data = make("market1501")
  start = time.perf_counter()
  mean_ap, cmc, inp = plain(*data)
  plain_s = time.perf_counter() - start
  ours = common.measure(lambda: retrieval.evaluate(*data), repeats=repeats)
  result = retrieval.evaluate(*data)
  difference = max(
    abs(result.mAP - mean_ap),
    abs(result.mINP - inp),
    float(np.abs(result.cmc - cmc).max()),
  )
  return {
    "size": SIZES["market1501"][:2],
    "plain_s": plain_s,
    "ours_s": ours,
    "times_faster": plain_s / ours["median"],
    "queries_per_s": len(data[0]) / ours["median"],
    "largest_difference": difference,
    "mAP": result.mAP,
  }


def _msmt(pipe) -> None:
  data = make("msmt17")
  # Whatever the libraries allocate once is not the evaluation's.
  retrieval.evaluate(*(a[:1024] for a in data))
  before = remote.resident("VmRSS")
  start = time.perf_counter()
  result = retrieval.evaluate(*data)
  seconds = time.perf_counter() - start
  above = remote.resident("VmHWM") - before
  few = 200
  start = time.perf_counter()
  mean_ap, _, _ = plain(*(a[:few] for a in data[:3]), *data[3:])
  pipe.send(
    {
      "size": SIZES["msmt17"][:2],
      "ours_s": seconds,
      "peak_gb_above_features": above / 1e9,
      "features_gb": (data[0].nbytes + data[3].nbytes) / 1e9,
      "plain_s_extrapolated_from_200_queries": (time.perf_counter() - start)
      * len(data[0])
      / few,
      "difference_of_200_aps": abs(np.nanmean(result.ap[:few]) - mean_ap),
      "mAP": result.mAP,
    }
  )


def msmt17() -> dict:
  """Runs MSMT17's size in a process of its own: peak memory only grows."""
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=_msmt, args=(sender,))
  process.start()
  found = receiver.recv()
  process.join()
  return found


def main() -> None:
  """Measures, prints and writes results/retrieval-*.json."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--set", action="append", choices=sorted(SIZES))
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  names = args.set or list(SIZES)
  results = {"seed": _SEED, "width": WIDTH}
  if "market1501" in names:
    results["market1501"] = market(args.repeats)
  if "msmt17" in names:
    results["msmt17"] = msmt17()
  for name in names:
    rows = [[key, value] for key, value in results[name].items()]
    print(common.table([name, ""], rows), end="\n\n")
  print(common.write("retrieval", results))


if __name__ == "__main__":
  main()
