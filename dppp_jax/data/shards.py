"""TFRecord shards of a TFDS folder, read by memory map without TensorFlow.

The framing of a record: its length (uint64), the masked CRC-32C of the length,
the bytes, the masked CRC-32C of the bytes; all little-endian.
"""

from collections.abc import Sequence
import json
import mmap
import pathlib
import struct
from typing import Any

import google_crc32c
import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from dppp_jax import errors, paths
from dppp_jax.data import images

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_OVERHEAD = _HEADER.size + _FOOTER.size


def masked_crc(data: bytes) -> int:
  """Returns TFRecord's CRC of some bytes (masked, for CRCs of CRCs)."""
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(record: bytes) -> bytes:
  """Returns a record as it lies in a TFRecord file."""
  length = struct.pack("<Q", len(record))
  return b"".join(
    [
      length,
      _FOOTER.pack(masked_crc(length)),
      record,
      _FOOTER.pack(masked_crc(record)),
    ]
  )


def scan(
  buffer: Any, *, name: str, verify: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the records of a TFRecord file.

  Args:
    buffer: the file's bytes, or a memory map of them.
    name: the file, for the message.
    verify: whether to check the CRC of every record, which reads the whole
      file; that of the lengths is always checked.

  Returns:
    Where the records begin, int64 [N], and how long they are, int64 [N].

  Raises:
    errors.UserError: names the record that is torn or damaged.
  """
  starts, lengths = [], []
  position, size = 0, len(buffer)
  while position < size:
    where = f"{name}: record {len(starts)}"
    if position + _OVERHEAD > size:
      raise errors.UserError(f"{where} is torn: {_REMEDY}")
    length, crc = _HEADER.unpack_from(buffer, position)
    if crc != masked_crc(bytes(buffer[position : position + 8])):
      raise errors.UserError(f"{where} is damaged (its length): {_REMEDY}")
    start = position + _HEADER.size
    position = start + length + _FOOTER.size
    if position > size:
      raise errors.UserError(f"{where} is torn: {_REMEDY}")
    if verify:
      (crc,) = _FOOTER.unpack_from(buffer, start + length)
      if crc != masked_crc(bytes(buffer[start : start + length])):
        raise errors.UserError(f"{where} is damaged (its bytes): {_REMEDY}")
    starts.append(start)
    lengths.append(length)
  return np.array(starts, np.int64), np.array(lengths, np.int64)


_REMEDY = "restore the file, or remove its folder and generate it again"


class Shards:
  """The pictures of a dataset folder: a `source.Source`; see `load`.

  Attributes:
    pids: int64 [N].
    camids: int64 [N], zeros: invented people have no cameras.
    folder: where the shards lie.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    files: Sequence[str],
    counts: Sequence[int],
    *,
    verify: bool = False,
  ):
    self.folder = folder
    self._arguments = (folder, tuple(files), tuple(counts))
    self._files = list(files)
    self._views = _class_names(folder / "view.labels.txt")
    self._maps, starts, lengths = [], [], []
    for file, count in zip(files, counts, strict=True):
      buffer = _map(folder / file)
      start, length = scan(buffer, name=str(folder / file), verify=verify)
      if len(start) != count:
        raise errors.UserError(
          f"{folder / file}: holds {len(start)} records, dataset_info.json"
          f" says {count}: {_REMEDY}"
        )
      self._maps.append(buffer)
      starts.append(start)
      lengths.append(length)
    self._starts = np.concatenate(starts)
    self._lengths = np.concatenate(lengths)
    self._ends = np.cumsum([len(s) for s in starts])
    self.pids = np.array([self._pid(i) for i in range(len(self))], np.int64)
    self.camids = np.zeros(len(self), np.int64)

  def __len__(self) -> int:
    return len(self._starts)

  def __reduce__(self):
    # A memory map cannot go to a worker process; the path to it can.
    return Shards, self._arguments

  def name(self, i: int) -> str:
    """Returns "shard:record", the record counted within the shard."""
    shard, record = self._locate(i)
    return f"{self.folder / self._files[shard]}:{record}"

  def raw(self, i: int) -> bytes:
    """Returns record i, a serialised tf.train.Example."""
    shard, _ = self._locate(i)
    start = int(self._starts[i])
    return self._maps[shard][start : start + int(self._lengths[i])]

  def read(self, i: int) -> np.ndarray:
    """Returns picture i as uint8 [H, W, 3] RGB."""
    data = self._feature(i)["image"].bytes_list.value[0]
    return images.decode(data, name=self.name(i))

  def record(self, i: int) -> dict[str, Any]:
    """Returns all features of record i; attributes as a dict of words."""
    record: dict[str, Any] = {"attributes": {}}
    for key, feature in self._feature(i).items():
      if key == "image":
        value = images.decode(feature.bytes_list.value[0], name=self.name(i))
      elif feature.WhichOneof("kind") == "int64_list":
        value = int(feature.int64_list.value[0])
      else:
        value = feature.bytes_list.value[0].decode()
      if key.startswith("attributes/"):
        record["attributes"][key.removeprefix("attributes/")] = value
      else:
        record[key] = value
    if "view" in record:
      record["view"] = self._views[record["view"]]
    return record

  def _locate(self, i: int) -> tuple[int, int]:
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of {len(self)}")
    shard = int(np.searchsorted(self._ends, i, side="right"))
    return shard, i - (int(self._ends[shard - 1]) if shard else 0)

  def _pid(self, i: int) -> int:
    feature = self._feature(i)
    if "pid" not in feature or "image" not in feature:
      raise errors.UserError(
        f"{self.name(i)}: has no pid or no image: is it another dataset?"
      )
    return feature["pid"].int64_list.value[0]

  def _feature(self, i: int) -> Any:
    try:
      return tf_example_pb2.Example.FromString(self.raw(i)).features.feature
    except Exception as error:  # protobuf's DecodeError is private to it.
      raise errors.UserError(
        f"{self.name(i)}: not a tf.train.Example: {_REMEDY}"
      ) from error


def load(
  data_dir: str | pathlib.Path,
  *,
  name: str = "geneperson",
  version: str = "1.0.0",
  split: str = "train",
  verify: bool = False,
) -> Shards:
  """Opens the shards of `<data_dir>/<name>/<version>`.

  Args:
    data_dir: what `tfds.load` takes as data_dir.
    name: dataset.
    version: its version.
    split: its split.
    verify: whether to check every record's CRC first.

  Raises:
    errors.UserError: missing, half-written or damaged.
  """
  data_dir = paths.expand(data_dir)
  folder = data_dir / name / version
  make = f"python launch/generate.py --data_dir {data_dir}"
  if not folder.is_dir():
    if (data_dir / name / f"{version}.parts").exists():
      raise errors.UserError(
        f"{folder}: not finished yet: run `{make}` again with its --config"
      )
    raise errors.UserError(f"{folder}: no such dataset: run `{make}` first")
  path = folder / "dataset_info.json"
  try:
    info = json.loads(path.read_text(encoding="utf-8-sig"))
    entry = next(s for s in info["splits"] if s["name"] == split)
    counts = [int(n) for n in entry["shardLengths"]]
  except FileNotFoundError as error:
    raise errors.UserError(
      f"{path}: missing, so {folder} is not a whole dataset: remove the folder"
      f" and run `{make}`"
    ) from error
  except (ValueError, KeyError, TypeError, StopIteration) as error:
    raise errors.UserError(
      f"{path}: cannot be read, or has no split {split!r}: remove the folder"
      f" and run `{make}`"
    ) from error
  if not sum(counts):
    raise errors.UserError(f"{folder}: split {split!r} is empty: run `{make}`")
  files = [
    f"{name}-{split}.tfrecord-{i:05d}-of-{len(counts):05d}"
    for i in range(len(counts))
  ]
  return Shards(folder, files, counts, verify=verify)


def _map(path: pathlib.Path) -> mmap.mmap | bytes:
  try:
    with path.open("rb") as file:
      if not path.stat().st_size:  # Nothing cannot be mapped.
        return b""
      return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except FileNotFoundError as error:
    raise errors.UserError(f"{path}: missing shard: {_REMEDY}") from error


def _class_names(path: pathlib.Path) -> list[str]:
  return path.read_text().split() if path.exists() else []
