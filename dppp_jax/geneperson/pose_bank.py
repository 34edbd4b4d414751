"""A bank of skeletons, of which every person is given a choice.

    bank = pose_bank.default_bank()
    chosen = bank.choose(42, seed=0, pid=7, body="slim figure")
    canvas.skeleton_map([pose.fit((256, 128)) for pose in chosen], layout)

The bank's own poses are the walking figure of `poses` in all its instants, seen
from all sides, from level and above, in a few shapes of body: no photograph is
behind them. Others come from the JSON files of OpenPose.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import itertools
import math
import pathlib
from typing import overload

import numpy as np

from dppp_jax import errors, files, paths
from dppp_jax.geneperson import openpose, poses

Path = str | pathlib.Path

# Numbers of poses are made of the places in these: append, never reorder.
SHAPES: tuple[tuple[str, poses.Build], ...] = (
  ("average", poses.Build()),
  ("slim", poses.Build(shoulder=0.094, hip=0.044, girth=0.88)),
  ("broad", poses.Build(shoulder=0.119, hip=0.048, girth=1.05)),
  ("heavy", poses.Build(shoulder=0.110, hip=0.058, girth=1.2)),
)
# Words for a body in the vocabulary, and the shape that they mean.
_WORDS = (
  ("slim", ("slim", "petite", "lean")),
  ("broad", ("broad", "muscular", "athletic")),
  ("heavy", ("heavy", "plump", "stout", "stocky", "curvy", "maternal")),
)
_IMPORTED = 2**40  # Numbers of imported poses begin here.
_SECTOR = 15.0  # Degrees that count as one azimuth when poses are dealt.
_STREAM = 11  # Of (seed, pid): what the random numbers are for.


@dataclasses.dataclass(frozen=True)
class Walker:
  """The walking figure, from one side in one instant."""

  gait: poses.Gait
  build: poses.Build
  view: poses.View

  def place(
    self,
    size: tuple[int, int],
    *,
    fill: float = 0.93,
    shift: tuple[float, float] = (0.0, 0.0),
  ) -> poses.Keypoints:
    """Returns the key points in a cell; see `poses.fit`."""
    place = poses.fit(size, self.view, fill=fill, shift=shift)
    return poses.keypoints(self.gait, self.build, self.view, placement=place)


@dataclasses.dataclass(frozen=True)
class Pose:
  """One skeleton of a bank.

  Attributes:
    name: for people.
    number: for datasets. Of the bank's own poses it reads, in decimals,
      shape, elevation, gait and azimuth: 1 08 03 090 is the slim figure seen
      from 8 degrees above, in the fourth of poses.POSES, walking to the right.
      Of imported ones it is made of their points. It depends on nothing else
      that is in the bank.
    view: "front", "side" or "back".
    azimuth: degrees; see `poses.View`.
    activity: "walking", "standing", or "" where nobody knows.
    shape: name in SHAPES, or "" where nobody knows.
    figure: what is placed.
  """

  name: str
  number: int
  view: poses.ViewName
  azimuth: float
  activity: str
  shape: str
  figure: Walker | openpose.Skeleton

  def fit(
    self,
    size: tuple[int, int],
    *,
    fill: float = 0.93,
    shift: tuple[float, float] = (0.0, 0.0),
  ) -> poses.Keypoints:
    """Places the skeleton in a cell.

    Args:
      size: (height, width) of the cell, pixels.
      fill: share of the cell's height that the body takes, or less where its
        arms would not fit the width.
      shift: (right, down) displacement as shares of width and height.

    Returns:
      Key points in pixels of the cell, all of whose dots `poses.draw` draws
      whole.

    Raises:
      errors.UserError: a point would lie off the cell, or fill is none.
    """
    if not fill > 0:
      raise errors.UserError(f"fill {fill:g}: must be above 0")
    placed = self.figure.place(size, fill=fill, shift=shift)
    seen, half = placed.xy[placed.visible], poses.half_width(size)
    over = np.stack([half - seen, seen + half - (size[1], size[0])])
    most = over.max(1)  # [low or high, x or y]
    if most.max() > 0:
      side = (("left", "top"), ("right", "bottom"))
      low, axis = np.unravel_index(most.argmax(), most.shape)
      raise errors.UserError(
        f"pose {self.number} ({self.name}) would stand {most.max():.1f} pixels"
        f" off the {side[low][axis]} of its cell of {size[0]} x {size[1]} with"
        f" fill {fill:g} and shift {shift[0]:g}, {shift[1]:g}: lower the fill,"
        " shift it less, or make the cells larger"
      )
    return placed


class Bank(Sequence[Pose]):
  """Poses in the order of their numbers."""

  def __init__(self, members: Sequence[Pose]):
    """Takes the poses.

    Raises:
      errors.UserError: there are none, or two are the same.
    """
    ordered = sorted(members, key=lambda pose: pose.number)
    if not ordered:
      raise errors.UserError("a bank needs at least one pose: give some")
    for one, other in itertools.pairwise(ordered):
      if one.number == other.number:
        raise errors.UserError(
          f"{one.name} and {other.name} are the same pose: remove one of them"
        )
    self._poses = tuple(ordered)
    self._numbers = {pose.number: pose for pose in ordered}

  def __len__(self) -> int:
    return len(self._poses)

  @overload
  def __getitem__(self, index: int) -> Pose: ...
  @overload
  def __getitem__(self, index: slice) -> tuple[Pose, ...]: ...
  def __getitem__(self, index):
    """Returns the pose at a place, which is not its number."""
    return self._poses[index]

  def __add__(self, other: "Bank") -> "Bank":
    """Returns a bank of the poses of both."""
    return Bank([*self, *other])

  def numbered(self, number: int) -> Pose:
    """Returns the pose of a number, e.g. of a dataset's feature `pose`."""
    if number not in self._numbers:
      raise errors.UserError(
        f"there is no pose {number} in this bank of {len(self)}: read the bank"
        " that the dataset was made with"
      )
    return self._numbers[number]

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of all poses, for a manifest: other names are no other bank."""
    lines = [f"{pose.number} {pose.view} {pose.figure!r}" for pose in self]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

  def choose(
    self,
    count: int,
    *,
    seed: int,
    pid: int,
    body: str | None = None,
    activity: str | None = None,
  ) -> tuple[Pose, ...]:
    """Chooses the poses of a person's cells; a pure function.

    One shape of body serves all cells: the one that `body` means, or else one
    drawn for the person. Of its poses, front, side and back are dealt in
    rounds, each of which has every view once in random order. Likewise a view
    deals its azimuths in rounds, and an azimuth its instants and elevations,
    none of them a second time before all were dealt. So views, and the
    azimuths within a view, never differ by more than one in number, and the
    first cells are the same whatever the count.

    Args:
      count: number of cells.
      seed: of the dataset.
      pid: of the person.
      body: words of the vocabulary such as "slim figure".
      activity: words of the vocabulary such as "walking slowly": only poses
        that show it, if there are any.
    """
    if count < 1:
      raise errors.UserError(f"{count} poses: choose at least 1")
    rng = np.random.default_rng([seed, _STREAM, pid])
    shapes = sorted({pose.shape for pose in self} - {""})
    drawn = shapes[rng.integers(len(shapes))] if shapes else ""
    meant = drawn if body is None else shape_of(body)
    shape = meant if meant in shapes else drawn
    usable = [pose for pose in self if pose.shape in (shape, "")]
    if activity:
      what = "standing" if "stand" in activity else "walking"
      usable = [p for p in usable if p.activity in (what, "")] or usable
    keys = (
      lambda pose: pose.view,
      lambda pose: round(pose.azimuth % 360.0 / _SECTOR),
      lambda pose: pose.number,
    )
    return tuple(itertools.islice(_deal(usable, keys, rng), count))


def shape_of(body: str) -> str:
  """Returns the name in SHAPES that words for a body mean."""
  for shape, words in _WORDS:
    if any(word in body for word in words):
      return shape
  return "average"


def default_bank(
  *,
  azimuths: int = 20,
  elevations: Sequence[int] = (0, 8, 16),
  shapes: Sequence[str] = tuple(name for name, _ in SHAPES),
) -> Bank:
  """Returns the walking figure in all of poses.POSES.

  Args:
    azimuths: number of sides, a divisor of 360. Of 20, five are a front, ten
      a side and five a back.
    elevations: of the viewer, whole degrees.
    shapes: of the body, names in SHAPES.

  Raises:
    errors.UserError: an argument that there is no pose for.
  """
  if azimuths < 1 or 360 % azimuths:
    raise errors.UserError(
      f"azimuths={azimuths}: must divide 360, such as 12, 20 or 24"
    )
  for elevation in elevations:
    if elevation != int(elevation) or not 0 <= elevation <= 45:
      raise errors.UserError(
        f"elevation {elevation}: give whole degrees from 0 to 45"
      )
  known = [name for name, _ in SHAPES]
  for shape in shapes:
    if shape not in known:
      raise errors.UserError(
        f"shape {shape!r} is unknown: choose of {', '.join(known)}"
      )
  members = []
  for (s, (shape, build)), elevation, (
    g,
    (activity, gait),
  ), k in itertools.product(
    enumerate(SHAPES), elevations, enumerate(poses.POSES), range(azimuths)
  ):
    if shape not in shapes:
      continue
    azimuth, elevation = k * 360 // azimuths, int(elevation)
    view = poses.View(float(azimuth), float(elevation))
    members.append(
      Pose(
        name=f"{shape}, {activity} ({g}) at {azimuth}, {elevation} degrees",
        number=((s * 100 + elevation) * 100 + g) * 1000 + azimuth,
        view=view.name,
        azimuth=view.azimuth,
        activity=activity,
        shape=shape,
        figure=Walker(gait, build, view),
      )
    )
  return Bank(members)


def read_openpose(
  path: Path,
  *,
  threshold: float = openpose.THRESHOLD,
  several: openpose.Several = "largest",
) -> Bank:
  """Reads skeletons that OpenPose found, or that an editor wrote.

  Args:
    path: a JSON file, or a folder of them, in which `hands`, faces and other
      files are left alone.
    threshold: points of a lower confidence are not seen.
    several: for a file with several people, the "largest" is taken, or the
      file is "refuse"d.

  Returns:
    A bank of one pose a file; views are estimated by `openpose.azimuth`.

  Raises:
    errors.UserError: as `openpose.read`, or two files hold the same skeleton.
  """
  path = paths.expand(path)
  found = files.visible(path, ".json") if path.is_dir() else [path]
  if not found:
    raise errors.UserError(
      f"{path} holds no .json file: give a folder of OpenPose's JSON files"
    )
  members = []
  for file in found:
    figure = openpose.read(file, threshold=threshold, several=several)
    azimuth = openpose.azimuth(figure)
    members.append(
      Pose(
        name=str(file),
        number=_number(figure),
        view=poses.View(azimuth).name,
        azimuth=azimuth,
        activity="",
        shape="",
        figure=figure,
      )
    )
  return Bank(members)


def _number(skeleton: openpose.Skeleton) -> int:
  """Returns a number that only this skeleton has, in the same proportions."""
  left, top, right, bottom = skeleton.box
  size = math.hypot(right - left, bottom - top)
  # In units of its own size: pixels and shares of the canvas are one pose.
  own = [
    p and (round((p[0] - left) / size, 4), round((p[1] - top) / size, 4))
    for p in skeleton.points
  ]
  found = hashlib.sha256(repr(own).encode()).digest()
  return _IMPORTED + int.from_bytes(found[:5], "big")


def _deal(members, keys, rng) -> Iterator[Pose]:
  """Yields without end: each value of the first key once in every round."""
  if not keys:
    yield from itertools.repeat(members[0])
  groups: dict = {}
  for pose in members:
    groups.setdefault(keys[0](pose), []).append(pose)
  hands = [_deal(groups[key], keys[1:], rng) for key in sorted(groups)]
  while True:
    for i in rng.permutation(len(hands)):
      yield next(hands[i])
