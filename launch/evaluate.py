"""Scores a model on benchmark folders by direct transfer.

python launch/evaluate.py --workdir runs/dppp --benchmark market1501 \
    --benchmark_root DIR [--benchmark dukemtmcreid] [--rerank]
"""

import dataclasses
import pathlib

from absl import flags

from dppp_jax import cli, errors
from dppp_jax.data import benchmarks, shards
from dppp_jax.evals import benchmark, domains, extractor, report
from dppp_jax.evals import spec as spec_lib


def define_flags():
  """Defines what is evaluated, on what, and how."""
  text, switch = flags.DEFINE_string, flags.DEFINE_boolean
  text("workdir", None, "Run folder of launch/train.py.")
  text("model", None, "Or: an export folder, a CLIP folder or a hub id of one.")
  flags.DEFINE_integer("step", None, "Checkpoint of the run; newest if unset.")
  flags.DEFINE_multi_enum(
    "benchmark", ["market1501"], benchmarks.NAMES, "Repeat for several."
  )
  text("benchmark_root", None, "Folder that holds them.", required=True)
  flags.DEFINE_enum("feature", None, spec_lib.FEATURES, "The model's if unset.")
  switch("rerank", False, "Also k-reciprocal re-ranking (20, 6, 0.3).")
  switch("allow_partial", False, "Go on where images are missing.")
  switch("skip_corrupt", False, "Leave undecodable images out, counted.")
  text("data_dir", None, "Shards of training images: adds the paper's Fig. 6.")
  text("out", None, "Folder of the results: the workdir, or evaluation/.")
  switch("overwrite", False, "Replace the results of an earlier evaluation.")
  flags.DEFINE_integer("batch_size", 64, "Images a step.", lower_bound=1)


def main(args) -> None:
  """Prints the table, and writes evaluation.json and report.html."""
  if (args.workdir is None) == (args.model is None):
    raise errors.UserError("give one of --workdir and --model")
  out = pathlib.Path(args.out or args.workdir or "evaluation")
  files = [out / "evaluation.json", out / "report.html"]
  report.refuse_existing(*files, overwrite=args.overwrite)
  path = args.workdir or args.model
  model = extractor.load_extractor(
    path, feature=args.feature, step=args.step, batch_size=args.batch_size
  )
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
  if source is not None:
    models = {model.spec.feature: model}
    if model.spec.feature == "content":  # Before and after the projector.
      spec = dataclasses.replace(model.spec, feature="projected")
      before = extractor.Extractor(
        spec, model.params, batch_size=args.batch_size
      )
      models = {"projected": before, **models}
    for each in evaluations:
      pairs = domains.between(models, each.gallery, source)
      distances[each.benchmark.title] = pairs
  print(benchmark.text(*benchmark.rows(evaluations)))
  results = report.results(evaluations, distances=distances)
  report.write_json(files[0], results, overwrite=args.overwrite)
  sections = report.evaluation_sections(evaluations, distances=distances)
  title = f"Direct transfer of {path}"
  report.write(files[1], title, sections, overwrite=args.overwrite)
  print(*files, sep="\n")


if __name__ == "__main__":
  cli.run(main, define_flags=define_flags)
