"""What a set of person images is, wherever it lies."""

import hashlib
from typing import Protocol, runtime_checkable

import numpy as np

from dppp_jax import errors, ranges

_NUM_DIGESTED = 8


@runtime_checkable
class Source(Protocol):
  """N pictures with a person and a camera each, read one by one.

  Attributes:
    pids: int64 [N], who is seen.
    camids: int64 [N], by which camera; all zero where there are no cameras.
  """

  pids: np.ndarray
  camids: np.ndarray

  def __len__(self) -> int:
    """Returns N."""

  def name(self, i: int) -> str:
    """Returns where picture i lies, for messages: a path or shard:record."""

  def read(self, i: int) -> np.ndarray:
    """Returns picture i as uint8 [H, W, 3] RGB, any size.

    Raises:
      images.CorruptImageError: the picture cannot be decoded.
    """

  def raw(self, i: int) -> bytes:
    """Returns picture i as it is stored: the bytes of a file or a record."""


class Arrays:
  """A Source in memory.

  Args:
    images: uint8 [N, H, W, 3] RGB.
    pids: integers [N].
    camids: integers [N]; zeros by default.
    label: what `name` calls the whole, e.g. "studio".
  """

  def __init__(
    self,
    images: np.ndarray,
    pids: np.ndarray,
    *,
    camids: np.ndarray | None = None,
    label: str = "array",
  ):
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
      raise ValueError(
        f"images are uint8 [N, H, W, 3], not {images.dtype} {images.shape}"
      )
    self.images = images
    self.pids = np.asarray(pids, np.int64)
    if camids is None:
      camids = np.zeros(len(images), np.int64)
    self.camids = np.asarray(camids, np.int64)
    for key in ("pids", "camids"):
      if getattr(self, key).shape != (len(images),):
        raise ValueError(
          f"{key} has shape {getattr(self, key).shape}, not {(len(images),)}"
        )
    self._label = label

  def __len__(self) -> int:
    return len(self.images)

  def name(self, i: int) -> str:
    """Returns "label[i]"."""
    return f"{self._label}[{i}]"

  def read(self, i: int) -> np.ndarray:
    """Returns image i, a view of uint8 [H, W, 3]."""
    return self.images[i]

  def raw(self, i: int) -> bytes:
    """Returns the pixels of image i."""
    return self.images[i].tobytes()


class Subset:
  """Some pictures of a Source, in the order given.

  Args:
    source: the whole.
    indices: integers [M], places in it.
  """

  def __init__(self, source: Source, indices: np.ndarray):
    self._source = source
    self._indices = np.asarray(indices, np.int64)
    self.pids = np.asarray(source.pids)[self._indices]
    self.camids = np.asarray(source.camids)[self._indices]

  def __len__(self) -> int:
    return len(self._indices)

  def name(self, i: int) -> str:
    """Returns the whole's name of picture i."""
    return self._source.name(int(self._indices[i]))

  def read(self, i: int) -> np.ndarray:
    """Returns picture i as uint8 [H, W, 3]."""
    return self._source.read(int(self._indices[i]))

  def raw(self, i: int) -> bytes:
    """Returns the whole's bytes of picture i."""
    return self._source.raw(int(self._indices[i]))


class Records:
  """N examples without a picture: what they are stands in a stage's extras.

  Args:
    num: N.
  """

  def __init__(self, num: int):
    self.pids = np.arange(num)
    self.camids = np.zeros(num, np.int64)

  def __len__(self) -> int:
    return len(self.pids)

  def name(self, i: int) -> str:
    """Returns "record[i]"."""
    return f"record[{i}]"

  def read(self, i: int) -> np.ndarray:
    """There is no picture to read."""
    raise TypeError(f"{self.name(i)} has no picture")

  def raw(self, i: int) -> bytes:
    """Returns nothing."""
    del i
    return b""


def first_ids(source: Source, num: int) -> Source:
  """Returns the pictures of the first `num` persons, or all for 0.

  Raises:
    errors.UserError: a number below 0, or none.
  """
  ranges.one("max_ids", num, ranges.WHOLE)
  if not num:
    return source
  ids = np.unique(source.pids)[:num]
  return Subset(source, np.flatnonzero(np.isin(source.pids, ids)))


def digest(source: Source) -> str:
  """Returns what tells a source from another, without reading all of it.

  It is made of all pids and camids and of a few pictures, evenly spread.
  """
  found = hashlib.sha256()
  for ids in (source.pids, source.camids):
    found.update(np.asarray(ids, np.int64).tobytes())
  spread = np.linspace(0, len(source) - 1, min(_NUM_DIGESTED, len(source)))
  for i in spread.astype(int):
    try:
      found.update(source.raw(int(i)))
    except errors.UserError:  # Whether it may be missing is said elsewhere.
      continue
  return found.hexdigest()[:16]
