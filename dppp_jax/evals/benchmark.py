"""Direct transfer: an extractor on a benchmark folder is a row of the table."""

from collections.abc import Sequence
import dataclasses
import importlib.metadata
import pathlib
import subprocess
import time
from typing import Any, Literal

from absl import logging
import jax
import numpy as np

from dppp_jax.data import benchmarks
from dppp_jax.data import source as source_lib
from dppp_jax.evals import counting, extractor, rerank, retrieval

_K1, _K2, _WEIGHT = 20, 6, 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """What an extractor scores on a benchmark, with what the figures need.

  Attributes:
    benchmark: the folder that was read.
    query: the query images that could be decoded.
    gallery: likewise.
    query_features: float32 [Q, D].
    gallery_features: float32 [G, D].
    result: scores of the plain ranking.
    reranked: scores after k-reciprocal re-ranking, or None.
    ranker: the re-ranking itself, or None.
    facts: features, metric, counts ..., of JSON types.
  """

  benchmark: benchmarks.Benchmark
  query: source_lib.Source
  gallery: source_lib.Source
  query_features: np.ndarray
  gallery_features: np.ndarray
  result: retrieval.Result
  reranked: retrieval.Result | None
  ranker: rerank.KReciprocal | None
  facts: dict[str, Any]

  @property
  def final(self) -> retrieval.Result:
    """The re-ranked scores where there are any."""
    return self.result if self.reranked is None else self.reranked

  def distances(self, queries: np.ndarray) -> np.ndarray:
    """Returns the distances [b, G] by which `final` ranks some queries [b]."""
    if self.ranker is not None:
      return self.ranker.rows(queries)
    metric = self.facts["metric"]
    prepare = lambda features, where: retrieval.prepare(
      features, where=where, metric=metric
    )
    return counting.distances(
      prepare(self.query_features[queries], "query"),
      prepare(self.gallery_features, "gallery"),
      metric=metric,
    )

  def to_json(self) -> dict[str, Any]:
    """Returns scores and circumstances, of JSON types."""
    scores = {"scores": self.result.summary()}
    if self.reranked is not None:
      scores["reranked_scores"] = self.reranked.summary()
    return {"benchmark": self.benchmark.name, **scores, **self.facts}


def evaluate(
  model: extractor.Extractor,
  benchmark: benchmarks.Benchmark,
  *,
  use_rerank: bool = False,
  metric: counting.Metric = "cosine",
  ap: Literal["step", "trapezoid"] = "step",
  max_rank: int = 50,
  on_corrupt: Literal["error", "skip"] = "error",
) -> Evaluation:
  """Extracts the query and the gallery and scores the ranking.

  Args:
    model: the extractor.
    benchmark: what `data.benchmarks.load` returns.
    use_rerank: also re-rank, with k1 = 20, k2 = 6 and weight 0.3.
    metric: "cosine" or "euclidean".
    ap: "step" or "trapezoid", see `retrieval.evaluate`.
    max_rank: length of the CMC curve.
    on_corrupt: whether an image that cannot be decoded ends the evaluation or
      is left out and counted.

  Raises:
    errors.UserError: as `Extractor.extract` and `retrieval.evaluate`.
  """
  begin = time.perf_counter()
  sides, features, corrupt = {}, {}, {}
  for side in ("query", "gallery"):
    whole = getattr(benchmark, side)
    features[side], kept = model.extract(
      whole, on_corrupt=on_corrupt, desc=f"{benchmark.title} {side}"
    )
    corrupt[side] = len(whole) - len(kept)
    if corrupt[side]:
      logging.warning(
        "%s: %d images of the %s could not be decoded and are left out",
        benchmark.root,
        corrupt[side],
        side,
      )
    sides[side] = source_lib.Subset(whole, kept)
  seconds = time.perf_counter() - begin
  query, gallery = sides["query"], sides["gallery"]
  labels = (query.pids, query.camids), (gallery.pids, gallery.camids)
  scoring = {"ap": ap, "max_rank": max_rank}
  result = retrieval.evaluate(
    features["query"],
    *labels[0],
    features["gallery"],
    *labels[1],
    metric=metric,
    **scoring,
  )
  ranker = reranked = None
  if use_rerank:
    ranker = rerank.KReciprocal(
      features["query"],
      features["gallery"],
      k1=_K1,
      k2=_K2,
      weight=_WEIGHT,
      metric=metric,
    )
    reranked = retrieval.evaluate_distances(
      ranker.blocks(), *labels[0], *labels[1], **scoring
    )
  facts = {
    "root": str(benchmark.root),
    "is_whole": benchmark.is_whole,
    "counts": _counts(benchmark.counts),
    "published_counts": _counts(benchmark.published),
    "corrupt_images": corrupt,
    "model": model.where,
    "feature": model.spec.feature,
    "feature_width": model.spec.width,
    "image_size": list(model.spec.image_size),
    "interpolation": model.spec.interpolation,
    "dtype": model.dtype,
    "metric": metric,
    "ap": ap,
    "reranking": {"k1": _K1, "k2": _K2, "weight": _WEIGHT}
    if use_rerank
    else None,
    "images_per_second": sum(map(len, features.values())) / seconds,
    "device": jax.devices()[0].device_kind,
    "version": importlib.metadata.version("dppp-jax"),
    "commit": commit(),
  }
  return Evaluation(
    benchmark=benchmark,
    query=query,
    gallery=gallery,
    query_features=features["query"],
    gallery_features=features["gallery"],
    result=result,
    reranked=reranked,
    ranker=ranker,
    facts=facts,
  )


def rows(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list]]:
  """Returns the header and the rows of the table of scores, in percent."""
  header = ["Benchmark", "R1", "R5", "R10", "mAP", "mINP", "queries", "skipped"]
  table = []
  for evaluation in evaluations:
    results = [("", evaluation.result), (" re-ranked", evaluation.reranked)]
    for suffix, result in results:
      if result is None:
        continue
      share = lambda value: f"{100 * value:.1f}"
      ranks = [
        share(result.cmc[k - 1]) if k <= len(result.cmc) else "-"
        for k in (1, 5, 10)
      ]
      means = [share(result.mAP), share(result.mINP)]
      counts = [result.num_valid_queries, result.num_skipped_queries]
      table.append(
        [evaluation.benchmark.title + suffix, *ranks, *means, *counts]
      )
  return header, table


def text(header: Sequence[str], table: Sequence[Sequence[Any]]) -> str:
  """Returns a table for the console."""
  cells = [list(map(str, row)) for row in (header, *table)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  lines = [
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in cells
  ]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def commit() -> str:
  """Returns the short commit of this code, "+" if changed, or "unknown"."""
  folder = pathlib.Path(__file__).resolve().parents[2]
  if not (folder / ".git").exists():  # Installed: some other repository's.
    return "unknown"
  git = lambda *words: subprocess.run(
    ["git", "-C", str(folder), *words],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  try:
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _counts(counts: Any) -> dict[str, dict[str, int]]:
  return {side: dataclasses.asdict(found) for side, found in counts.items()}
