"""Everything, small: invented people, two training stages, two benchmarks.

python launch/demo.py [--seeds 3]
"""

import pathlib

from absl import flags

from dppp_jax import cli, demo


def define_flags():
  """Defines how often, and where to."""
  flags.DEFINE_integer("seeds", 1, "Trainings to average over.", lower_bound=1)
  flags.DEFINE_string(
    "workdir", str(cli.ROOT / "runs" / "demo"), "Folder of all that is made."
  )


def main(args) -> int:
  """Runs the demo and prints its table."""
  demo.main(pathlib.Path(args.workdir), num_seeds=args.seeds)
  return 0


if __name__ == "__main__":
  cli.run(main, define_flags=define_flags)
