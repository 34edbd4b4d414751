r"""Draws the contact sheets of the paper-doll world.

python data_tools/paperdoll_sheets.py --out docs
"""

from absl import app, flags
import numpy as np
import PIL.Image

from dppp_jax import paths
from dppp_jax.paperdoll import cameras, world

_OUT = flags.DEFINE_string("out", "docs", "Folder of the two PNG files.")
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the drawn world.", lower_bound=0
)
_GAP = 4


def studio(seed: int, *, people: int = 8) -> np.ndarray:
  """One person a row: six cells, a skeleton and a matte, 192 x 96 each."""
  rows = []
  for pid in range(people):
    cells = [
      world.studio(pid, cell, seed=seed, size=(192, 96)) for cell in range(6)
    ]
    last = cells[-1]
    matte = np.repeat(last.alpha[..., None], 3, axis=2)
    rows.append([*(cell.image for cell in cells), last.skeleton, matte])
  return _sheet(rows)


def street(seed: int, *, people: int = 4) -> np.ndarray:
  """One person a row before every camera; then cells of the drawn dataset."""
  rows = []
  for layout, row in cameras.SETS.items():
    for pid in range(1, people + 1):
      seen = [
        world.street(pid, camera, frame, benchmark=layout, seed=seed)
        for camera in range(1, len(row) + 1)
        for frame in range(2)
      ]
      rows.append(seen)
  count = max(len(row) for row in rows)
  for pid in range(2):
    records = world.make_identity(pid, seed=seed, cells=count)
    rows.append([record["image"] for record in records])
  return _sheet(rows)


def _sheet(rows: list[list[np.ndarray]]) -> np.ndarray:
  height, width, _ = rows[0][0].shape
  count = max(len(row) for row in rows)
  sheet = np.full(
    (len(rows) * (height + _GAP), count * (width + _GAP), 3), 255, np.uint8
  )
  for i, row in enumerate(rows):
    for j, picture in enumerate(row):
      y, x = i * (height + _GAP), j * (width + _GAP)
      sheet[y : y + height, x : x + width] = picture
  return sheet


def main(argv: list[str]) -> None:
  """Writes both sheets."""
  del argv
  out = paths.expand(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  for name, sheet in (
    ("paperdoll_studio.png", studio(_SEED.value)),
    ("paperdoll_street.png", street(_SEED.value)),
  ):
    PIL.Image.fromarray(sheet).save(out / name)
    print(out / name)


if __name__ == "__main__":
  app.run(main)
