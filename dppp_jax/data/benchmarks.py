"""Benchmark folders as people have them on disk: train, query, gallery.

A benchmark is one row of `_ROWS`. Parsing looks at base names only, so that no
folder above can be taken for a person or a camera.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import re

from absl import logging
import numpy as np

from dppp_jax import errors, paths
from dppp_jax.data import images

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_LARGEST = 2**31 - 1  # Of a person's and a camera's number.
_JUNK = -1  # Bad detections: dropped, which scores as ignoring them does.


@dataclasses.dataclass(frozen=True)
class Counts:
  """How much a subset holds, once junk is dropped.

  Attributes:
    images: number of pictures.
    ids: number of different pids; a gallery's distractors count as one.
  """

  images: int
  ids: int

  def __str__(self) -> str:
    return f"{self.images:,} images of {self.ids:,} persons"


class ImageFiles:
  """A `source.Source` of image files, read as they are asked for.

  Args:
    paths: N files.
    pids: integers [N].
    camids: integers [N], counted from 0.
  """

  def __init__(
    self, paths: list[pathlib.Path], pids: np.ndarray, *, camids: np.ndarray
  ):
    self.paths = list(paths)
    self.pids = np.asarray(pids, np.int64)
    self.camids = np.asarray(camids, np.int64)

  def __len__(self) -> int:
    return len(self.paths)

  @property
  def counts(self) -> Counts:
    """How many pictures of how many persons."""
    return Counts(len(self), len(np.unique(self.pids)))

  def name(self, i: int) -> str:
    """Returns the path of picture i."""
    return str(self.paths[i])

  def read(self, i: int) -> np.ndarray:
    """Returns picture i as uint8 [H, W, 3].

    Raises:
      images.CorruptImageError: the file cannot be read or decoded.
    """
    return images.decode(self.raw(i), name=self.name(i))

  def raw(self, i: int) -> bytes:
    """Returns the bytes of file i; raises as `read` where there are none."""
    return images.read_bytes(self.paths[i])


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One benchmark, its files parsed and counted.

  Attributes:
    name: key of the table, e.g. "market1501".
    title: as papers write it, e.g. "Market-1501".
    root: the folder found to hold the subsets.
    train: pictures to train on, perhaps none; never a distractor.
    query: pictures to search with.
    gallery: pictures to search in; distractors (pid 0) are negatives.
    published: what the whole benchmark is known to hold, by subset.
  """

  name: str
  title: str
  root: pathlib.Path
  train: ImageFiles
  query: ImageFiles
  gallery: ImageFiles
  published: Mapping[str, Counts]

  @property
  def counts(self) -> dict[str, Counts]:
    """What was found on disk, by subset."""
    return {
      "train": self.train.counts,
      "query": self.query.counts,
      "gallery": self.gallery.counts,
    }

  @property
  def is_whole(self) -> bool:
    """Whether images and persons number what was published.

    Training pictures that are not there are not missed: no score reads them.
    """
    return not _differing(self, self.published)


@dataclasses.dataclass(frozen=True)
class _Row:
  """What must be known of a benchmark.

  Attributes:
    title: as papers write it.
    stem: beginning of the folder names in use, in lower-case letters and
      digits only.
    folders: folder of each subset.
    pattern: matches the beginning of a base name: person, then camera from 1.
    example: a name that matches, for messages.
    distractor: pid of gallery pictures of nobody in particular, or None.
    published: counts without junk.
  """

  title: str
  stem: str
  folders: Mapping[str, str]
  pattern: str
  example: str
  distractor: int | None
  published: Mapping[str, Counts]


_MARKET_FOLDERS = {
  "train": "bounding_box_train",
  "query": "query",
  "gallery": "bounding_box_test",
}

_ROWS = {
  "market1501": _Row(
    title="Market-1501",
    stem="market1501",
    folders=_MARKET_FOLDERS,
    pattern=r"(-1|\d+)_c([1-9]\d*)s\d+_\d+_\d+",
    example="0002_c1s1_000451_03.jpg",
    distractor=0,
    published={
      "train": Counts(12_936, 751),
      "query": Counts(3_368, 750),
      "gallery": Counts(15_913, 751),
    },
  ),
  "dukemtmcreid": _Row(
    title="DukeMTMC-reID",
    stem="dukemtmc",
    folders=_MARKET_FOLDERS,
    pattern=r"(\d+)_c([1-9]\d*)_f\d+",
    example="0001_c2_f0046182.jpg",
    distractor=None,
    published={
      "train": Counts(16_522, 702),
      "query": Counts(2_228, 702),
      "gallery": Counts(17_661, 1_110),
    },
  ),
}

NAMES = tuple(_ROWS)


def load(
  name: str,
  root: str | pathlib.Path,
  *,
  allow_partial: bool = False,
  needs: tuple[str, ...] = ("query", "gallery"),
) -> Benchmark:
  """Reads a benchmark's file names and compares its counts.

  Camera ids count from 0, so that c1 in a file name is camid 0. Files are
  sorted by name. Junk (pid -1) is dropped everywhere, distractors are dropped
  outside the gallery.

  Args:
    name: "market1501" or "dukemtmcreid", however hyphened or capitalised.
    root: the folder of the subsets, or one or two levels above it under any of
      the names that toolboxes give it.
    allow_partial: go on, with a warning, where counts differ from the
      published ones.
    needs: subsets that must be there; the others may be absent or empty.

  Returns:
    The benchmark.

  Raises:
    errors.UserError: unknown name, folders missing, a subset without pictures
      that is needed, a name that does not parse, counts that differ, persons
      both in train and query, or no query that the gallery can answer.
  """
  key = _plain(name)
  if key not in _ROWS:
    raise errors.UserError(
      f"benchmark {name!r} is unknown: use one of {', '.join(NAMES)}"
    )
  row = _ROWS[key]
  root = _find(paths.expand(root), row, needs)
  found = Benchmark(
    name=key,
    title=row.title,
    root=root,
    published=dict(row.published),
    **{
      subset: _scan(root, subset, row, is_needed=subset in needs)
      for subset in row.folders
    },
  )
  _check_persons(found, row)
  _check_counts(found, allow_partial=allow_partial)
  return found


def _plain(name: str) -> str:
  return re.sub(r"[^a-z0-9]", "", name.lower())


def _find(
  root: pathlib.Path, row: _Row, needs: tuple[str, ...]
) -> pathlib.Path:
  """Returns the folder that holds the subsets that are needed."""
  needed = [row.folders[subset] for subset in needs]
  if not root.is_dir():
    raise errors.UserError(
      f"{root}: no such folder: give the folder that holds {row.title}"
      f" ({', '.join(needed)})"
    )
  # As unpacked, as torchreid nests it, and as a folder of all data sets.
  children = _named(root, row)
  nested = [found for child in children for found in _named(child, row)]
  candidates = [root, *children, *nested]
  lacking = {
    folder: [name for name in needed if not (folder / name).is_dir()]
    for folder in candidates
  }
  whole = [folder for folder in candidates if not lacking[folder]]
  if root in whole:
    return root
  # A link to a copy is no second one.
  whole = list({folder.resolve(): folder for folder in whole[::-1]}.values())
  if len(whole) > 1:
    raise errors.UserError(
      f"{root}: holds {row.title} more than once"
      f" ({', '.join(map(str, whole))}): give the one to use"
    )
  if whole:
    return whole[0]
  nearest = min(candidates, key=lambda folder: len(lacking[folder]))
  looked = ", ".join(str(folder) for folder in candidates)
  raise errors.UserError(
    f"{nearest}: no folder {' nor '.join(lacking[nearest])} of {row.title}"
    f" (looked in {looked}): give the folder that holds"
    f" {', '.join(needed)}"
  )


def _named(folder: pathlib.Path, row: _Row) -> list[pathlib.Path]:
  """Returns the sub-folders whose names begin as the benchmark's does."""
  return sorted(
    child
    for child in folder.iterdir()
    if _plain(child.name).startswith(row.stem)
    and not child.name.startswith(".")
    and child.is_dir()
  )


def _scan(
  root: pathlib.Path, subset: str, row: _Row, *, is_needed: bool
) -> ImageFiles:
  """Parses the names of one subset; it may be absent unless it is needed."""
  folder = root / row.folders[subset]
  nothing = ImageFiles([], np.zeros(0), camids=np.zeros(0))
  if not is_needed and not folder.is_dir():
    return nothing
  # Archives carry Thumbs.db, and ._ files once a Mac has seen them.
  files = sorted(
    path
    for path in folder.iterdir()
    if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
  )
  if not files and not is_needed:
    return nothing
  if not files:
    raise errors.UserError(
      f"{folder}: holds no {', '.join(_SUFFIXES)} file:"
      f" unpack {row.title} again"
    )
  kept, pids, camids = [], [], []
  for path in files:
    match = re.match(row.pattern, path.name)
    if match is None:
      raise errors.UserError(
        f"{path}: not a file name of {row.title} (such as {row.example}):"
        " remove or rename it"
      )
    pid, camera = int(match.group(1)), int(match.group(2))
    if max(pid, camera) > _LARGEST:
      raise errors.UserError(
        f"{path}: person {pid}, camera {camera}: numbers end at {_LARGEST:,}:"
        " rename it"
      )
    if pid == _JUNK or (subset != "gallery" and pid == row.distractor):
      continue
    kept.append(path)
    pids.append(pid)
    camids.append(camera - 1)
  if not kept:
    raise errors.UserError(
      f"{folder}: none of its {len(files):,} files shows a known person:"
      f" unpack {row.title} again"
    )
  return ImageFiles(kept, np.array(pids), camids=np.array(camids))


def _check_persons(found: Benchmark, row: _Row) -> None:
  """Refuses what cannot be evaluated, or would measure memory."""
  shared = np.intersect1d(found.train.pids, found.query.pids)
  if shared.size:
    raise errors.UserError(
      f"{found.root}: {shared.size} persons are both in {row.folders['train']}"
      f" and in {row.folders['query']}, the first is {shared[0]}: the two must"
      " not share persons"
    )
  if not len(found.query) or not len(found.gallery):
    return
  cameras: dict[int, set[int]] = {}
  for pid, camid in zip(found.gallery.pids, found.gallery.camids, strict=True):
    cameras.setdefault(int(pid), set()).add(int(camid))
  lost = [
    i
    for i in range(len(found.query))
    if not cameras.get(int(found.query.pids[i]), set())
    - {int(found.query.camids[i])}
  ]
  if len(lost) == len(found.query):
    raise errors.UserError(
      f"{found.root}: no query has a picture of the same person from another"
      f" camera in {row.folders['gallery']}: nothing can be evaluated"
    )
  if lost:
    logging.warning(
      "%s: %d of %d queries have no match from another camera in the gallery"
      " and will be skipped; the first is %s",
      found.root,
      len(lost),
      len(found.query),
      found.query.name(lost[0]),
    )


def _differing(
  found: Benchmark, published: Mapping[str, Counts]
) -> dict[str, Counts]:
  """Returns the subsets that are there with other counts than published."""
  return {
    subset: counts
    for subset, counts in found.counts.items()
    if counts.images and counts != published[subset]
  }


def _check_counts(found: Benchmark, *, allow_partial: bool) -> None:
  """Compares with the published counts, naming both numbers."""
  differing = [
    f"{subset} has {counts}, published are {found.published[subset]}"
    for subset, counts in _differing(found, found.published).items()
  ]
  if not differing:
    return
  message = (
    f"{found.root}: not the whole of {found.title}: {'; '.join(differing)}"
  )
  if not allow_partial:
    raise errors.UserError(
      f"{message}: unpack it again, or go on with --allow_partial"
    )
  logging.warning("%s", message)
