"""Pre-trains the small networks of the embedded default.

python launch/pretrain.py --config configs/pretrain_vae.py --workdir runs/vae

Each network has a configuration of its own, configs/pretrain_*.py; `make
pretrain` trains all of them in order.
"""

from dppp_jax import cli
from dppp_jax.pretraining import methods


def define_flags():
  """Defines what a pre-training needs beside its config."""
  cli.path("workdir", None, "Run folder; run again to resume.", required=True)


def main(args) -> int:
  """Trains, and says where the network lies."""
  wanted = "one of configs/pretrain_*.py"
  cli.refuse_other(args.config, "method", "data", "train", wanted=wanted)
  cli.refuse_idle(args, methods.idle(args.config.to_dict()))
  folder = methods.train(args.config.to_dict(), args.workdir)
  if folder is None:
    print(f"stopped; run the same command again to go on in {args.workdir}")
    return 0
  print(f"{folder}: {(folder / 'README.md').read_text()}")
  return 0


if __name__ == "__main__":
  cli.run(main, config="pretrain_clip.py", define_flags=define_flags)
