r"""Writes drawn street pictures in Market-1501's and DukeMTMC-reID's layouts.

python data_tools/paperdoll_benchmark.py --out benchmarks_drawn --layout both
"""

import sys

from absl import app, flags

from dppp_jax import errors
from dppp_jax.paperdoll import benchmark

_OUT = flags.DEFINE_string("out", None, "Folder to write into.", required=True)
_LAYOUT = flags.DEFINE_enum(
  "layout", "both", [*benchmark.FOLDERS, "both"], "Which benchmark."
)
_TRAIN_IDS = flags.DEFINE_integer("train_ids", 50, "Training identities.")
_TEST_IDS = flags.DEFINE_integer("test_ids", 100, "Test identities.")
_IMAGES = flags.DEFINE_integer(
  "images_per_camera", 3, "Pictures of one identity before one camera."
)
_DISTRACTORS = flags.DEFINE_integer(
  "distractors", 60, "Gallery pictures of nobody that is asked for."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the drawn world.")
_SIZE = flags.DEFINE_list("size", ["96", "48"], "Height and width, pixels.")


def main(argv: list[str]) -> None:
  """Writes what the flags ask for."""
  try:
    if len(argv) > 1:
      raise errors.UserError(f"{argv[1]!r}: not a flag; see --help")
    try:
      height, width = (int(x) for x in _SIZE.value)
    except ValueError as error:
      raise errors.UserError(
        f"--size={','.join(_SIZE.value)}: give height,width such as 96,48"
      ) from error
    both = _LAYOUT.value == "both"
    layouts = list(benchmark.FOLDERS) if both else [_LAYOUT.value]
    # Before the first is drawn: half of an order helps nobody.
    benchmark.refuse_existing(_OUT.value, layouts)
    for layout in layouts:
      folder = benchmark.write(
        layout,
        _OUT.value,
        train_ids=_TRAIN_IDS.value,
        test_ids=_TEST_IDS.value,
        images_per_camera=_IMAGES.value,
        distractors=_DISTRACTORS.value,
        seed=_SEED.value,
        size=(height, width),
      )
      print(folder)
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  app.run(main)
