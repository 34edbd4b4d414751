"""Scores a model on benchmark folders by direct transfer.

python launch/evaluate.py --workdir runs/dppp --benchmark market1501 \
    --benchmark_root DIR [--benchmark dukemtmcreid] [--rerank]

The paper's Fig. 6, of any two models:

python launch/evaluate.py --workdir runs/dppp --benchmark_root DIR \
    --data_dir data --baseline runs/baseline
"""

import pathlib

from absl import flags

from dppp_jax import cli, errors
from dppp_jax.data import benchmarks, shards
from dppp_jax.evals import benchmark, domains, extractor, report
from dppp_jax.evals import spec as spec_lib


def define_flags():
  """Defines what is evaluated, on what, and how."""
  switch = flags.DEFINE_boolean
  cli.path("workdir", None, "Run folder of launch/train.py.")
  cli.path("model", None, "Or: an export folder, a CLIP folder or its hub id.")
  flags.DEFINE_integer(
    "step", None, "Checkpoint of the run; newest if unset.", lower_bound=0
  )
  flags.DEFINE_multi_enum(
    "benchmark", ["market1501"], benchmarks.NAMES, "Repeat for several."
  )
  cli.path("benchmark_root", None, "Folder that holds them.", required=True)
  flags.DEFINE_enum("feature", None, spec_lib.FEATURES, "The model's if unset.")
  flags.DEFINE_enum(
    "dtype",
    "float32",
    extractor.DTYPES,
    "Of the network: float32 as published rows are scored, or bfloat16.",
  )
  switch("rerank", False, "Also k-reciprocal re-ranking (20, 6, 0.3).")
  switch("allow_partial", False, "Go on where images are missing.")
  switch("skip_corrupt", False, "Leave undecodable images out, counted.")
  cli.path("data_dir", None, "Shards of training images: adds Fig. 6.")
  cli.path(
    "baseline",
    None,
    "Fig. 6 of another run, export or CLIP beside the model, in place of the"
    " model before and after its projector.",
  )
  cli.path("out", None, "Folder of the results: the workdir, or evaluation/.")
  switch("overwrite", False, "Replace the results of an earlier evaluation.")
  flags.DEFINE_integer("batch_size", 64, "Images a step.", lower_bound=1)


def main(args) -> None:
  """Prints the table, and writes evaluation.json and report.html."""
  if (args.workdir is None) == (args.model is None):
    raise errors.UserError("give one of --workdir and --model")
  idle = {}
  if args.workdir is None:
    idle["step"] = "an export or a CLIP has no checkpoints"
  if args.data_dir is None:
    idle["baseline"] = "Fig. 6 needs the training images of --data_dir"
  cli.refuse_idle(args, idle)
  out = pathlib.Path(args.out or args.workdir or "evaluation")
  files = [out / "evaluation.json", out / "report.html"]
  report.refuse_existing(*files, overwrite=args.overwrite)
  path = args.workdir or args.model
  options = {"batch_size": args.batch_size, "dtype": args.dtype}
  model = extractor.load_extractor(
    path, feature=args.feature, step=args.step, **options
  )
  compared = domains.of_run(model)
  if args.baseline:
    baseline = extractor.load_extractor(args.baseline, **options)
    compared = domains.with_baseline(model, baseline)
  names = list(dict.fromkeys(args.benchmark))
  root, partial = args.benchmark_root, args.allow_partial
  found = [benchmarks.load(n, root, allow_partial=partial) for n in names]
  source = shards.load(args.data_dir) if args.data_dir else None
  on_corrupt = "skip" if args.skip_corrupt else "error"
  evaluations = [
    benchmark.evaluate(model, b, use_rerank=args.rerank, on_corrupt=on_corrupt)
    for b in found
  ]
  distances = {}
  for each in evaluations if source is not None else ():
    title = each.benchmark.title
    kinds = (f"a {title} gallery image", "a training image")
    distances[title] = domains.compare(
      compared, each.gallery, source, names=kinds
    )
  print(benchmark.text(*benchmark.rows(evaluations)))
  results = report.results(evaluations, distances=distances)
  report.write_json(files[0], results, overwrite=args.overwrite)
  sections = report.evaluation_sections(evaluations, distances=distances)
  title = f"Direct transfer of {path}"
  report.write(files[1], title, sections, overwrite=args.overwrite)
  print(*files, sep="\n")


if __name__ == "__main__":
  cli.run(main, define_flags=define_flags)
