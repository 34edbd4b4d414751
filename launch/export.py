"""Writes a model as an extractor that stands alone.

python launch/export.py --workdir runs/dppp --out extractor/
"""

from absl import flags

from dppp_jax import cli, errors
from dppp_jax.evals import export, extractor
from dppp_jax.evals import spec as spec_lib


def define_flags():
  """Defines what is exported, and where to."""
  cli.path("workdir", None, "Run folder of launch/train.py.")
  cli.path("model", None, "Or: a CLIP folder or a hub id of one.")
  flags.DEFINE_integer(
    "step", None, "Checkpoint of the run; newest if unset.", lower_bound=0
  )
  flags.DEFINE_enum("feature", None, spec_lib.FEATURES, "The model's if unset.")
  cli.path("out", None, "Folder to write; must not exist.", required=True)


def main(args) -> None:
  """Writes the folder and says how to use it."""
  if (args.workdir is None) == (args.model is None):
    raise errors.UserError("give one of --workdir and --model")
  if args.workdir is None:
    cli.refuse_idle(args, {"step": "a CLIP has no checkpoints"})
  model = extractor.load_extractor(
    args.workdir or args.model, feature=args.feature, step=args.step
  )
  folder = export.save(model, args.out)
  height, width = model.spec.image_size
  print(
    f"{folder}: {model.spec.feature} features of width {model.spec.width} from"
    f" {height} x {width} images\n"
    f"  dppp_jax.load_extractor({str(folder)!r})(images)\n"
    f"  or, with JAX alone, {folder / export.PROGRAM_FILE}"
  )


if __name__ == "__main__":
  cli.run(main, define_flags=define_flags)
