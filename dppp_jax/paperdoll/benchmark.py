"""Street pictures in the folders and file names of two real benchmarks."""

from collections.abc import Sequence
import dataclasses
import functools
import os
import pathlib
import shutil

import numpy as np

from dppp_jax import errors, logs, workers
from dppp_jax.data import images
from dppp_jax.paperdoll import cameras, world

FOLDERS = {
  "market1501": "Market-1501-v15.09.15",
  "dukemtmcreid": "DukeMTMC-reID",
}
TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
# People of distractor pictures: numbers that no label reaches.
_STRANGERS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Picture:
  """One file of a benchmark.

  Attributes:
    path: below the benchmark's folder, e.g. "query/0002_c1s1_000451_01.jpg".
    pid: the label in the file name; 0 is nobody known, -1 junk.
    camera: from 1.
    person: whom world.street draws; -1 draws nobody.
    frame: which picture of that person before that camera.
    crop: error of the box around the person, 1 is usual.
  """

  path: str
  pid: int
  camera: int
  person: int
  frame: int
  crop: float = 1.0


def plan(
  layout: str,
  *,
  train_ids: int,
  test_ids: int,
  images_per_camera: int = 3,
  distractors: int = 0,
  seed: int = 0,
) -> list[Picture]:
  """Decides which pictures a benchmark has.

  Identities are numbered 1 to train_ids for training and on from there for the
  test. Everybody passes two to all of the cameras. Of every test identity one
  picture a camera is a query and the others are gallery. Distractors are
  pid 0 in the Market layout, where a third as many junk pictures of pid -1 come
  with them, and gallery-only identities in the Duke layout.

  Args:
    layout: "market1501" or "dukemtmcreid".
    train_ids: number of identities, >= 1.
    test_ids: number of identities, >= 1.
    images_per_camera: of one identity, >= 2.
    distractors: number of pictures, >= 0.
    seed: of the world.

  Returns:
    The pictures, in the order of their writing.

  Raises:
    errors.UserError: an argument that no benchmark can have.
  """
  if layout not in FOLDERS:
    raise errors.UserError(
      f"layout {layout!r}: no such benchmark; take one of {sorted(FOLDERS)}"
    )
  for name, value, least in (
    ("train_ids", train_ids, 1),
    ("test_ids", test_ids, 1),
    ("images_per_camera", images_per_camera, 2),
    ("distractors", distractors, 0),
    ("seed", seed, 0),
  ):
    if value < least:
      raise errors.UserError(f"{name}={value}: must be at least {least}")
  if train_ids + test_ids + distractors > 9999:
    raise errors.UserError(
      f"train_ids={train_ids}, test_ids={test_ids}, distractors={distractors}:"
      " file names have four digits; ask for at most 9999 in all"
    )
  pictures = []
  for pid in range(1, train_ids + test_ids + 1):
    rng = _rng(layout, seed, pid)
    seen = _cameras(layout, rng)
    for camera in seen:
      start = int(rng.integers(1, 90_000))
      asked = int(rng.integers(images_per_camera))
      for k in range(images_per_camera):
        folder = TRAIN
        if pid > train_ids:
          folder = QUERY if k == asked else GALLERY
        name = _name(layout, pid, camera, start + 25 * k)
        pictures.append(Picture(f"{folder}/{name}", pid, camera, pid, k))
  pictures += _distractors(
    layout, count=distractors, first=train_ids + test_ids + 1, seed=seed
  )
  return pictures


def write(
  layout: str,
  out: str | pathlib.Path,
  *,
  train_ids: int,
  test_ids: int,
  images_per_camera: int = 3,
  distractors: int = 0,
  seed: int = 0,
  size: tuple[int, int] = (96, 48),
  num_processes: int = 0,
) -> pathlib.Path:
  """Draws and writes a benchmark.

  It is written beside its place and renamed at the end: what stands there is
  whole.

  Args:
    layout: "market1501" or "dukemtmcreid".
    out: folder in which the benchmark's own folder is made.
    train_ids: see `plan`, as for the following ones.
    test_ids: number of test identities.
    images_per_camera: pictures of one identity before one camera.
    distractors: number of pictures.
    seed: of the world; file bytes are a function of it and of the sizes.
    size: (height, width), pixels.
    num_processes: that draw side by side; 0 draws in this one.

  Returns:
    The benchmark's folder, e.g. out/Market-1501-v15.09.15.

  Raises:
    errors.UserError: an impossible argument, or the folder is there already.
  """
  pictures = plan(
    layout, train_ids=train_ids, test_ids=test_ids,
    images_per_camera=images_per_camera, distractors=distractors, seed=seed,
  )  # fmt: skip
  if min(size) < 16:
    raise errors.UserError(f"size={size}: height and width must be at least 16")
  target = pathlib.Path(out) / FOLDERS[layout]
  refuse_existing(out, [layout])
  scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
  try:
    for folder in (TRAIN, QUERY, GALLERY):
      (scratch / folder).mkdir(parents=True)
  except OSError as error:
    raise errors.UserError(
      f"{scratch.parent}: cannot be written into ({error.strerror}); choose"
      " another --out"
    ) from error
  try:
    draw = functools.partial(_draw, layout=layout, seed=seed, size=size)
    drawn = workers.each(draw, pictures, num_processes=num_processes)
    with logs.progress(total=len(pictures), desc=layout, unit="image") as bar:
      for picture, data in drawn:
        (scratch / picture.path).write_bytes(data)
        bar.update()
    # An empty folder that appeared meanwhile would be replaced in silence.
    refuse_existing(out, [layout])
    scratch.rename(target)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise
  return target


def refuse_existing(out: str | pathlib.Path, layouts: Sequence[str]) -> None:
  """Raises errors.UserError if a benchmark's folder is in `out` already."""
  for layout in layouts:
    target = pathlib.Path(out) / FOLDERS[layout]
    if target.exists():
      raise errors.UserError(
        f"{target}: is there already and is not overwritten; remove it or"
        " choose another --out"
      )


def _draw(
  picture: Picture, *, layout: str, seed: int, size: tuple[int, int]
) -> bytes:
  """Returns a picture as its camera writes it, JPEG."""
  drawn = world.street(
    picture.person, picture.camera, picture.frame, benchmark=layout,
    seed=seed, size=size, crop=picture.crop,
  )  # fmt: skip
  quality = cameras.SETS[layout][picture.camera - 1].quality
  return images.encode_jpeg(drawn, quality=quality)


def _distractors(
  layout: str, *, count: int, first: int, seed: int
) -> list[Picture]:
  pictures = []
  num_cameras = len(cameras.SETS[layout])
  rng = _rng(layout, seed, 0)
  junk = count // 3 if layout == "market1501" else 0
  for i in range(count + junk):
    camera = int(rng.integers(1, num_cameras + 1))
    person, crop = _STRANGERS + i, 1.0
    if layout == "dukemtmcreid":
      pid = first + i
    elif i < count:
      # A detector's false alarms: half show nobody, half a stranger.
      pid = 0
      person = -1 if rng.random() < 0.5 else person
    else:
      # Bad boxes around anybody, of the test or not.
      pid, crop = -1, 6.0
    name = _name(layout, pid, camera, 25 * i + 1)
    pictures.append(Picture(f"{GALLERY}/{name}", pid, camera, person, i, crop))
  return pictures


def _cameras(layout: str, rng: np.random.Generator) -> list[int]:
  """Two to all of the cameras, in the order in which a person passes them."""
  total = len(cameras.SETS[layout])
  count = int(rng.integers(2, total + 1))
  return (rng.permutation(total)[:count] + 1).tolist()


def _name(layout: str, pid: int, camera: int, frame: int) -> str:
  label = "-1" if pid < 0 else f"{pid:04d}"
  if layout == "market1501":
    return f"{label}_c{camera}s1_{frame:06d}_01.jpg"
  return f"{label}_c{camera}_f{frame:07d}.jpg"


def _rng(layout: str, seed: int, number: int) -> np.random.Generator:
  # The last word keeps these draws apart from those of world.py.
  entropy = (seed, world.DOMAINS[layout], number, 0xB0C5)
  return np.random.default_rng(np.random.SeedSequence(entropy))
