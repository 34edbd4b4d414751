"""Looks at a dataset: checks every byte, counts, and draws a contact sheet.

python data_tools/inspect_shards.py --data_dir data --sheet sheet.png
"""

import collections
import pathlib

from absl import flags
import numpy as np
import PIL.Image

from dppp_jax import cli, errors, logs
from dppp_jax.data import images, shards

_SHOWN = 8  # Words of an attribute in the table.


def define_flags():
  """Defines what is looked at, and how much of it is drawn."""
  cli.path("data_dir", "data", "Folder that holds geneperson/.")
  cli.path("sheet", None, "Contact sheet to write, a .png.")
  flags.DEFINE_integer("rows", 12, "People on the sheet.", lower_bound=1)
  flags.DEFINE_integer("columns", 12, "Pictures of each.", lower_bound=1)


def main(args) -> None:
  """Prints counts and a table of words; raises where a picture is broken."""
  if args.sheet is None:
    why = "it is of the contact sheet that --sheet asks for"
    cli.refuse_idle(args, {"rows": why, "columns": why})
  held = shards.load(args.data_dir, verify=True)
  print(f"{held.folder}: every CRC is right")
  words = collections.defaultdict(collections.Counter)
  sizes = collections.Counter()
  bar = logs.progress(range(len(held)), desc="reading", unit="image")
  for i in bar:
    record = held.record(i)
    sizes[record["image"].shape] += 1
    for key in ("view", "lighting", "background"):
      words[key][record[key]] += 1
    for key, word in record["attributes"].items():
      words[key][word] += 1
  _, per_person = np.unique(held.pids, return_counts=True)
  print(
    f"{len(held)} pictures of {len(per_person)} people, {per_person.min()} to"
    f" {per_person.max()} of each; sizes {dict(sizes)}"
  )
  for key, counter in words.items():
    top = counter.most_common(_SHOWN)
    line = ", ".join(
      f"{word or '(none)'} {n / len(held):.1%}" for word, n in top
    )
    more = (
      f", and {len(counter) - _SHOWN} more" if len(counter) > _SHOWN else ""
    )
    print(f"{key:17} {line}{more}")
  if args.sheet:
    _draw(held, pathlib.Path(args.sheet), args.rows, args.columns)


def _draw(
  held: shards.Shards, path: pathlib.Path, rows: int, columns: int
) -> None:
  people = np.unique(held.pids)
  # Evenly over the whole, so that the sheet shows the late ones too.
  people = people[np.linspace(0, len(people) - 1, rows).astype(int)]
  chosen = [np.flatnonzero(held.pids == pid)[:columns] for pid in people]
  sheet = images.contact_sheet(
    [[held.read(int(i)) for i in indices] for indices in chosen]
  )
  try:
    PIL.Image.fromarray(sheet).save(path)
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"--sheet {path}: cannot be written ({error}): name a .png in a folder"
      " that exists"
    ) from error
  print(f"contact sheet: {path}")


if __name__ == "__main__":
  cli.run(main, define_flags=define_flags)
