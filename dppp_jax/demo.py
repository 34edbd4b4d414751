"""The whole system on the drawn world: shards, PTL, PSD, direct transfer.

Each step is a command that a reader could type; it is printed before it runs.
Only the comparison of the models is done here.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

from absl import logging
import cv2
import matplotlib.figure
import numpy as np

from dppp_jax import cli, errors, logs
from dppp_jax.data import benchmarks, shards
from dppp_jax.evals import benchmark as benchmark_lib
from dppp_jax.evals import domains, extractor, figures, report
from dppp_jax.train import run

MINI_CLIP = cli.ROOT / "dppp_jax" / "assets" / "mini" / "clip"
DRAWN = (
  "Drawn, not photographed: training pictures and test pictures are paper"
  " dolls, so these numbers say how the parts work together, not how well"
  " people are found on real cameras."
)
_MODELS = ("frozen mini CLIP", "PTL", "PTL + PSD")
_BENCHMARKS = ("market1501", "dukemtmcreid")


def main(folder: str | pathlib.Path, *, num_seeds: int) -> pathlib.Path:
  """Runs the demo, or goes on where it was stopped.

  Args:
    folder: receives benchmarks/, seed0/ ..., results.json and report.html.
    num_seeds: trainings, each with other invented people.

  Returns:
    The path of report.html.

  Raises:
    errors.UserError: a step failed; its own message stands above.
  """
  folder = pathlib.Path(folder).absolute()
  begin = time.monotonic()
  # The drawn benchmarks have other counts than the published ones, by intent.
  logging.set_verbosity(logging.ERROR)
  drawn = folder / "benchmarks"
  if not drawn.exists():
    _call("data_tools/paperdoll_benchmark.py", out=drawn, layout="both")
  scores, first = [], None
  for seed in range(num_seeds):
    here = folder / f"seed{seed}"
    _call(
      "launch/generate.py",
      "--config=configs/geneperson.py:paperdoll",
      data_dir=here / "data",
      **{"config.seed": seed},
    )
    _call(
      "launch/train.py",
      "--config=configs/dppp.py:mini",
      data_dir=here / "data",
      workdir=here / "run",
      **{"config.train.seed": 1234 + seed},
    )
    models, evaluations = _evaluate(here / "run", drawn)
    scores.append(
      {
        name: {b: found.result.summary() for b, found in each.items()}
        for name, each in evaluations.items()
      }
    )
    first = first or (models, evaluations)
  seconds = time.monotonic() - begin
  results = {
    "note": DRAWN,
    "seeds": num_seeds,
    "seconds": round(seconds, 1),
    "scores": scores,
    "environment": run.environment(),
  }
  run.write_json(folder / "results.json", results)
  header, rows = table(scores)
  print(as_text(header, rows))
  print(DRAWN)
  sections = _sections(folder, *first, header=header, rows=rows)
  path = report.write(
    folder / "report.html",
    "DPPP on the drawn world",
    sections,
    subtitle=DRAWN,
    overwrite=True,
  )
  print(f"{seconds / 60:.1f} minutes; the whole story in pictures: {path}")
  return path


def table(
  scores: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]],
) -> tuple[list[str], list[list[str]]]:
  """Returns header and rows of the table: mean, and spread over seeds.

  Args:
    scores: for each seed, model -> benchmark -> summary of a `Result`.
  """
  header = ["model"]
  for name in _BENCHMARKS:
    header += [f"{name} Rank-1", "mAP"]
  rows = []
  for model in _MODELS:
    row = [model]
    for name in _BENCHMARKS:
      for key in ("rank1", "mAP"):
        values = [100 * each[model][name][key] for each in scores]
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        row.append(f"{np.mean(values):.1f}{spread}")
    rows.append(row)
  return header, rows


def as_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table for a console."""
  widths = [
    max(len(row[i]) for row in (header, *rows)) for i in range(len(header))
  ]
  line = lambda row: "  ".join(
    cell.ljust(w) if i == 0 else cell.rjust(w)
    for i, (cell, w) in enumerate(zip(row, widths, strict=True))
  )
  rule = "-" * len(line(header))
  return "\n".join([rule, line(header), rule, *map(line, rows), rule])


def _evaluate(workdir, drawn):
  """Scores the frozen CLIP, the encoder of PTL and the projector of PSD."""
  size = tuple(
    json.loads((workdir / "extractor.json").read_text())["image_size"]
  )
  models = {
    _MODELS[0]: extractor.load_extractor(MINI_CLIP, image_size=size),
    # PSD leaves the encoder as PTL made it: one checkpoint holds both.
    _MODELS[1]: extractor.load_extractor(workdir, feature="projected"),
    _MODELS[2]: extractor.load_extractor(workdir, feature="content"),
  }
  evaluations = {name: {} for name in models}
  for title in _BENCHMARKS:
    data = benchmarks.load(title, drawn, allow_partial=True)
    for name, model in models.items():
      evaluations[name][title] = benchmark_lib.evaluate(model, data)
  return models, evaluations


def _sections(folder, models, evaluations, *, header, rows):
  """Returns the story: people, training, table, ranked lists, distances."""
  data_dir = folder / "seed0" / "data"
  source = shards.load(data_dir)
  final = evaluations[_MODELS[-1]]
  curves = {
    f"{name}, {title}": found.result.cmc
    for name, each in evaluations.items()
    for title, found in each.items()
  }
  sections = [
    report.Section(
      "Invented people, drawn",
      report.paragraph(
        f"{len(source):,} training pictures of {len(np.unique(source.pids)):,}"
        " invented people; one row is one person."
      )
      + report.figure(_sheet(source), "GenePerson, paper-doll condition"),
    ),
    report.Section(
      "Training", report.figure(_curves(folder / "seed0" / "run"))
    ),
    report.Section(
      "Direct transfer",
      report.table(header, rows)
      + report.figure(figures.png(figures.cmc(curves))),
    ),
  ]
  for title, found in final.items():
    body = ""
    for which in ("best", "worst"):
      picture = figures.png(figures.ranked_lists(found, which=which))
      body += report.figure(picture, f"{which} queries by AP, {_MODELS[-1]}")
    sections.append(report.Section(f"Ranked lists, {title}", body))
  shown = {k: models[k] for k in (_MODELS[0], _MODELS[-1])}
  found = domains.between(shown, final["market1501"].gallery, source, num=2_000)
  body = report.figure(
    figures.png(figures.distance_distributions(found)),
    "Distances of street and invented people, the same pairs for both models",
  )
  sections.append(report.Section("Between the domains", body))
  return sections


def _sheet(source: shards.Shards, *, num: int = 6, columns: int = 16) -> bytes:
  """Returns a PNG of some people, one row each."""
  lines = []
  for pid in np.unique(source.pids)[:num]:
    places = np.flatnonzero(source.pids == pid)[:columns]
    cells = [source.read(int(i)) for i in places]
    cells += [np.full_like(cells[0], 255)] * (columns - len(cells))
    lines.append(np.concatenate(cells, axis=1))
  picture = np.concatenate(lines)
  return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()


def _curves(workdir: pathlib.Path) -> bytes:
  """Returns a PNG of the losses and accuracies of all stages."""
  lines = logs.read(workdir / "metrics.jsonl")
  keys = ("loss", "sup_con", "tri_img", "id", "tri_txt")
  figure = matplotlib.figure.Figure((8.4, 3.2), layout="constrained")
  left, right = figure.subplots(1, 2)
  for key in keys:
    points = [(x["step"], x[key]) for x in lines if key in x]
    left.plot(*zip(*points, strict=True), label=key)
  for key in sorted({k for x in lines for k in x if k.startswith("acc_")}):
    points = [(x["step"], x[key]) for x in lines if key in x]
    right.plot(*zip(*points, strict=True), label=key)
  for axes, title in ((left, "losses"), (right, "accuracy in the batch")):
    axes.set(title=title, xlabel="step")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
  return figures.png(figure)


def _call(script: str, *words: str, **flags: Any) -> None:
  """Prints a command and runs it in the project's root."""
  words += tuple(f"--{name}={value}" for name, value in flags.items())
  shown = shlex.join(["python", script, *words])
  print(f"$ {shown}", flush=True)
  done = subprocess.run(
    [sys.executable, script, *words], cwd=cli.ROOT, check=False
  )
  if done.returncode:
    raise errors.UserError(
      f"demo: the command above ended with {done.returncode}; mend it and run"
      " the demo again, it goes on from there"
    )
