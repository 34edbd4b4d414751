r"""Writes what the paper dolls can wear as a vocabulary of stage A.

python data_tools/mini_vocabulary.py [--out FILE]
"""

import sys

from absl import app, flags

from dppp_jax import paths
from dppp_jax.paperdoll import lexicon

_OUT = flags.DEFINE_string("out", str(lexicon.PATH), "File to write.")


def main(argv: list[str]) -> None:
  """Writes the file."""
  if len(argv) > 1:
    print(f"error: {argv[1]!r}: not a flag; see --help", file=sys.stderr)
    sys.exit(2)
  paths.expand(_OUT.value).write_text(lexicon.text(), encoding="utf-8")
  print(_OUT.value)


if __name__ == "__main__":
  app.run(main)
