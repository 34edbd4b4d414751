r"""Writes drawn street pictures in Market-1501's and DukeMTMC-reID's layouts.

python data_tools/paperdoll_benchmark.py --out benchmarks_drawn --layout both
"""

import os

from absl import flags

from dppp_jax import cli, errors
from dppp_jax.paperdoll import benchmark


def define_flags():
  """Defines what is drawn, how much of it, and where to."""
  layouts = [*benchmark.FOLDERS, "both"]
  cli.path("out", None, "Folder to write into.", required=True)
  flags.DEFINE_enum("layout", "both", layouts, "Which benchmark.")
  for name, default, least, text in (
    ("train_ids", 50, 1, "Training identities."),
    ("test_ids", 100, 1, "Test identities."),
    ("images_per_camera", 3, 1, "Pictures of an identity before one camera."),
    ("distractors", 60, 0, "Gallery pictures of nobody that is asked for."),
    ("seed", 0, 0, "Seed of the drawn world."),
  ):
    flags.DEFINE_integer(name, default, text, lower_bound=least)
  flags.DEFINE_integer(
    "num_processes",
    min(8, os.cpu_count() or 1),
    "Processes that draw; 0 draws in this one.",
    lower_bound=0,
  )
  flags.DEFINE_list("size", ["96", "48"], "Height and width, pixels.")


def main(args) -> None:
  """Writes what the flags ask for."""
  try:
    height, width = (int(x) for x in args.size)
  except ValueError as error:
    raise errors.UserError(
      f"--size={','.join(args.size)}: give height,width such as 96,48"
    ) from error
  layouts = list(benchmark.FOLDERS) if args.layout == "both" else [args.layout]
  # Before the first is drawn: half of an order helps nobody.
  benchmark.refuse_existing(args.out, layouts)
  for layout in layouts:
    folder = benchmark.write(
      layout,
      args.out,
      train_ids=args.train_ids,
      test_ids=args.test_ids,
      images_per_camera=args.images_per_camera,
      distractors=args.distractors,
      seed=args.seed,
      size=(height, width),
      num_processes=args.num_processes,
    )
    print(folder)


if __name__ == "__main__":
  cli.run(main, define_flags=define_flags)
