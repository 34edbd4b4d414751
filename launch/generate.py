"""Makes the dataset `geneperson`; stop it when you like, run it again.

python launch/generate.py --data_dir data
python launch/generate.py --config configs/geneperson.py:paperdoll
python launch/generate.py --config configs/geneperson.py --shard 0/8
"""

import os

from absl import flags

from dppp_jax import cli, generation
from dppp_jax.geneperson import idle, pipeline, store


def define_flags():
  """Defines where the dataset goes, and who makes which part of it."""
  cli.path("data_dir", "data", "Folder that tfds.load looks into.")
  flags.DEFINE_string(
    "shard",
    "0/1",
    "i/N: make every N-th group of people, beside N - 1 other processes.",
  )
  flags.DEFINE_integer(
    "num_processes",
    min(8, os.cpu_count() or 1),
    "Processes that draw paper dolls; 0 draws in this one.",
    lower_bound=0,
  )
  flags.DEFINE_integer(
    "sheet_every",
    100,
    "People between two contact sheets; 0 for none.",
    lower_bound=0,
  )


def main(args) -> int:
  """Feeds the store with people, and says where the dataset lies."""
  wanted = "configs/geneperson.py, or a preset of it"
  cli.refuse_other(args.config, "maker", "image_size", wanted=wanted)
  cli.refuse_idle(args, idle.keys(args.config.to_dict()))
  shard = store.parse_shard(args.shard)
  work = generation.build(args.config.to_dict(), data_dir=args.data_dir)
  outcome = pipeline.run(
    work.maker,
    data_dir=args.data_dir,
    shard=shard,
    num_processes=args.num_processes,
    sheet_every=args.sheet_every,
    **work.options,
  )
  print(outcome.summary())
  if outcome.finished:
    where = f"data_dir={args.data_dir!r}"
    print(f"load it: tfds.load('geneperson', split='train', {where})")
  return outcome.exit_code


if __name__ == "__main__":
  cli.run(main, config="geneperson.py:mini", define_flags=define_flags)
