"""Trains a method on GenePerson, or on a benchmark's training people.

python launch/train.py --config configs/dppp.py --workdir runs/dppp
python launch/train.py --config configs/dppp.py:mini --workdir runs/mini

Run the same command again to go on where a run was stopped or killed.
"""

from dppp_jax import cli, process, training


def define_flags():
  """Defines what a training needs beside its config."""
  cli.path("data_dir", "data", "Folder of the dataset.")
  cli.path("workdir", None, "Run folder.", required=True)


def main(args) -> int:
  """Trains, and says how to evaluate."""
  wanted = "configs/dppp.py, or a preset of it"
  cli.refuse_other(args.config, "clip", "dppp", "eval", wanted=wanted)
  cli.refuse_idle(args, training.idle(args.config.to_dict()))
  outcome = training.train(
    args.config.to_dict(), data_dir=args.data_dir, workdir=args.workdir
  )
  if not outcome.finished:
    print(f"stopped at step {outcome.step}; run the same command to go on")
    return 0
  print(
    f"trained {outcome.step} steps; next: python launch/evaluate.py"
    f" --workdir {args.workdir} --benchmark market1501 --benchmark_root DIR"
  )
  return 0


if __name__ == "__main__":
  process.fuse_outputs()
  cli.run(main, config=cli.REQUIRED, define_flags=define_flags)
