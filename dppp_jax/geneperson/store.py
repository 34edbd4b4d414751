"""The store that a kill cannot hurt: parts that only grow, then one rename.

While people are made, `<data_dir>/geneperson/1.0.0.parts/` holds, per stripe,
TFRecord part files and a journal with one JSON line per finished identity. The
line is written after its records are on the disk; whatever lies behind the last
line is torn and cut when the stripe is opened again. So an identity is there
with all of its records or with none, and a rerun makes only what lacks.

When every identity is there, the parts become the shards of
`<data_dir>/geneperson/1.0.0/` (as hard links, in `incomplete.1.0.0` until the
folder is whole), with ArrayRecord copies and the metadata beside them.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

from absl import logging

from dppp_jax import errors, files
from dppp_jax.data import shards
from dppp_jax.geneperson import dataset, disk, groups, remedies

_LAYOUT = 1  # Of the parts folder; another layout is another configuration.


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of a journal: an identity that is safely on the disk.

  Attributes:
    pid: identity.
    part: name of the part file that holds its records.
    end: size of that file after its last record.
    images: number of records.
    note: what the maker wants to remember for the manifest, of JSON types.
  """

  pid: int
  part: str
  end: int
  images: int
  note: dict[str, Any]


def parse_shard(text: str) -> tuple[int, int]:
  """Returns (i, N) of "i/N": of N processes this one makes the i-th share."""
  try:
    index, count = (int(word) for word in text.split("/"))
  except ValueError:
    index, count = -1, 0
  if not 0 <= index < count:
    raise errors.UserError(
      f"--shard {text}: write i/N with 0 <= i < N, such as 0/4"
    )
  return index, count


def fingerprint(config: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of a configuration, whatever the order of its keys."""
  text = json.dumps(config, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def is_finished(
  data_dir: str | os.PathLike,
  *,
  config: Mapping[str, Any],
  num_identities: int,
  image_size: tuple[int, int],
) -> bool:
  """Tells whether a dataset is there; makes and locks nothing.

  Args:
    data_dir: as `Store` takes it, like the others.
    config: likewise.
    num_identities: likewise.
    image_size: likewise.

  Raises:
    errors.UserError: what is there, finished or not, is of another
      configuration.
  """
  root = pathlib.Path(data_dir) / dataset.NAME
  whole = _whole(config, num_identities, image_size)
  if (root / dataset.VERSION).exists():
    _compare(root / dataset.VERSION / "manifest.json", whole)
    return True
  begun = root / f"{dataset.VERSION}.parts" / "config.json"
  if begun.exists() and _entries(begun.parent):
    _compare(begun, whole)
  return False


class Store:
  """One stripe of a dataset in the making; a context manager.

  Attributes:
    folder: where the finished dataset lies, or will.
    finished: whether it is there already; nothing is to be done then.
    todo: the pids that this stripe still has to make, ascending.
    num_done: how many of this stripe's pids were there when it was opened.
  """

  def __init__(
    self,
    data_dir: str | os.PathLike,
    *,
    config: Mapping[str, Any],
    num_identities: int,
    image_size: tuple[int, int],
    shard: tuple[int, int] = (0, 1),
    group_size: int = 1,
    max_part_bytes: int = 256 << 20,
  ):
    """Opens or makes the store, and cuts what a killed run left torn.

    Args:
      data_dir: what `tfds.load` will take as data_dir.
      config: everything that the pictures depend on, of JSON types; a store
        of another configuration is refused.
      num_identities: pids are 0 .. num_identities - 1.
      image_size: (height, width).
      shard: (i, N): this process owns the pids of the groups with
        group % N == i.
      group_size: consecutive pids of a group.
      max_part_bytes: a part that reached it is followed by a new one.

    Raises:
      errors.UserError: another configuration, another owner, no such folder.
    """
    root = pathlib.Path(data_dir) / dataset.NAME
    self.folder = root / dataset.VERSION
    self._parts = root / f"{dataset.VERSION}.parts"
    self._scratch = root / f"incomplete.{dataset.VERSION}"
    self._config = _whole(config, num_identities, image_size)
    self._image_size = image_size
    self._shard, self._group_size = shard, group_size
    self._max_part_bytes = max_part_bytes
    self._stack = contextlib.ExitStack()
    self.finished, self.todo, self.num_done = False, [], 0
    try:
      with disk.reported(root):
        root.mkdir(parents=True, exist_ok=True)
        self._root_lock = root / f".{dataset.VERSION}.lock"
        self._open()
    except BaseException:
      self._stack.close()
      raise

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, *_) -> None:
    self._stack.close()

  @property
  def config(self) -> dict[str, Any]:
    """What the fingerprint is taken of."""
    return self._config

  @property
  def scratch(self) -> pathlib.Path:
    """A folder for whatever goes into the dataset's folder in the end."""
    return self._parts / "extras"

  def append(
    self, pid: int, records: Sequence[bytes], note: Mapping[str, Any]
  ) -> None:
    """Writes one identity; when this returns it survives a kill.

    Args:
      pid: one of `todo`.
      records: its serialised examples; may be empty.
      note: goes to the journal, see `Entry`.

    Raises:
      errors.UserError: no space left; nothing of the identity stays.
    """
    with disk.reported(self._parts):
      if self._size >= self._max_part_bytes:
        self._next_part()
      data = b"".join(shards.frame(record) for record in records)
      end = self._size + len(data)
      entry = Entry(pid, self._part, end, len(records), dict(note))
      line = json.dumps(dataclasses.asdict(entry), sort_keys=True).encode()
      try:
        disk.write(self._part_file, data)
        disk.write(self._journal_file, line + b"\n")
      except OSError:
        os.ftruncate(self._journal_file, self._journal_size)
        os.ftruncate(self._part_file, self._size)
        raise
      self._size = end
      self._journal_size += len(line) + 1

  def missing(self) -> int:
    """Returns how many identities no stripe has made yet."""
    lacking = self._config["num_identities"] - len(_entries(self._parts))
    # Where another stripe was the last, it finalised and removed the parts.
    return 0 if self.folder.exists() else lacking

  def finalize(
    self, describe: Callable[[list[Entry]], Mapping[str, Any]]
  ) -> pathlib.Path:
    """Turns the parts of all stripes into the dataset's folder.

    Args:
      describe: from all entries by pid to what manifest.json is to say.

    Returns:
      `folder`, at once where another stripe has made it.

    Raises:
      errors.UserError: no space left; the parts stay and a rerun goes on.
    """
    with disk.reported(self.folder), disk.locked(self._root_lock):
      if not self.folder.exists():
        self._build(describe)
        self._scratch.rename(self.folder)
        disk.sync(self.folder.parent)
      shutil.rmtree(self._parts, ignore_errors=True)
    self.finished = True
    return self.folder

  def _open(self) -> None:
    with disk.locked(self._root_lock):
      if self.folder.exists():
        _compare(self.folder / "manifest.json", self._config)
        # A run may have been killed between the rename and this.
        shutil.rmtree(self._parts, ignore_errors=True)
        self.finished = True
        return
      self._parts.mkdir(exist_ok=True)
      path = self._parts / "config.json"
      is_free = disk.is_free(self._parts / "stripes.lock")
      if path.exists() and (_entries(self._parts) or not is_free):
        _compare(path, self._config)
      elif not path.exists() and files.visible(self._parts, ".tfrecord"):
        raise errors.UserError(
          f"{path}: missing, so nobody knows what the parts beside it are:"
          " remove the folder"
        )
      else:
        # What nobody was made with may be replaced.
        digest = fingerprint(self._config)
        held = {"config": self._config, "fingerprint": digest}
        disk.replace(path, json.dumps(held, indent=2))
      self._own_stripe()
      self._recover()

  def _own_stripe(self) -> None:
    """Takes the locks: all runs agree on who owns whom, and each i on one."""
    index, count = self._shard
    stripes = f"{count}"
    if self._group_size > 1:
      stripes += f" in groups of {self._group_size}"
    layout = self._parts / "stripes.lock"
    file = self._stack.enter_context(layout.open("a+"))
    fcntl.flock(file, fcntl.LOCK_SH)  # Only ever exclusive under the root lock.
    file.seek(0)
    if file.read() != stripes:
      # They may change between runs, when nobody makes anything.
      disk.own(
        file,
        f"{self._parts}: other stripes than /{stripes} are being made now: wait"
        " for them, or give every process the same N in --shard i/N and the"
        " same --config.run.batch_size",
      )
      file.truncate(0)
      file.write(stripes)
      file.flush()
      fcntl.flock(file, fcntl.LOCK_SH)
    self._stem = f"stripe-{index:05d}-of-{count:05d}"
    lock = (self._parts / f"{self._stem}.lock").open("a")
    self._stack.enter_context(lock)
    disk.own(
      lock,
      f"{self._parts}: stripe {index}/{count} is being made by another process:"
      " wait for it, or give this one another --shard i/N",
    )

  def _recover(self) -> None:
    """Cuts the torn tail of this stripe and lists what is left to do."""
    index, count = self._shard
    journal = self._parts / f"{self._stem}.journal"
    entries, end = _read_journal(journal)
    sizes = {p.name: p.stat().st_size for p in self._own_parts()}
    kept = []
    for entry, line_end in zip(entries, end, strict=True):
      if sizes.get(entry.part, -1) < entry.end:
        # Only a disk that lies about fsync gets here.
        logging.warning(
          "%s ends before pid %d: made again from there", entry.part, entry.pid
        )
        break
      kept.append((entry, line_end))
    ends = {entry.part: entry.end for entry, _ in kept}
    for path in self._own_parts():
      if path.stat().st_size > ends.get(path.name, 0):
        os.truncate(path, ends.get(path.name, 0))
    self._journal_size = kept[-1][1] if kept else 0
    self._journal_file = self._append_to(journal)
    os.ftruncate(self._journal_file, self._journal_size)
    os.fsync(self._journal_file)
    self._part_index = -1
    self._part_file = None
    if kept:
      self._part_index = int(kept[-1][0].part.split(".")[1])
    self._next_part(step=0 if kept else 1)
    done = {entry.pid for entry in _entries(self._parts)}
    own = [
      pid
      for pid in range(self._config["num_identities"])
      if groups.owner(pid, size=self._group_size, count=count) == index
    ]
    self.todo = [pid for pid in own if pid not in done]
    self.num_done = len(own) - len(self.todo)

  def _own_parts(self) -> list[pathlib.Path]:
    return sorted(self._parts.glob(f"{self._stem}.*.tfrecord"))

  def _next_part(self, step: int = 1) -> None:
    self._part_index += step
    self._part = f"{self._stem}.{self._part_index:05d}.tfrecord"
    self._part_file = self._append_to(self._parts / self._part)
    self._size = os.fstat(self._part_file).st_size

  def _append_to(self, path: pathlib.Path) -> int:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    self._stack.callback(os.close, file)
    disk.sync(path.parent)  # A new file's name must survive, too.
    return file

  def _build(
    self, describe: Callable[[list[Entry]], Mapping[str, Any]]
  ) -> None:
    """Makes the whole folder under another name."""
    entries = _entries(self._parts)
    lacking = self._config["num_identities"] - len(entries)
    if lacking:
      raise ValueError(f"{lacking} identities are not made yet")
    counts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for entry in entries:
      counts[entry.part] = counts.get(entry.part, 0) + entry.images
      ends[entry.part] = max(ends.get(entry.part, 0), entry.end)
    for part, end in ends.items():
      # A stripe that was killed and never run again, since N was changed.
      os.truncate(self._parts / part, end)
    parts = {self._parts / part: counts[part] for part in sorted(counts)}
    parts = {path: count for path, count in parts.items() if count}
    if not parts:
      raise errors.UserError(
        f"{self._parts}: every picture of every identity was dropped:"
        f" {remedies.of(entry.note.get('dropped', {}) for entry in entries)};"
        " then remove that folder"
      )
    shutil.rmtree(self._scratch, ignore_errors=True)
    self._scratch.mkdir()
    try:
      dataset.write_folder(self._scratch, parts, image_size=self._image_size)
      if self.scratch.exists():
        for path in sorted(self.scratch.iterdir()):
          shutil.copy2(path, self._scratch / path.name)
      manifest = {
        "name": dataset.NAME,
        "version": dataset.VERSION,
        "fingerprint": fingerprint(self._config),
        "config": self._config,
        **describe(entries),
      }
      (self._scratch / "manifest.json").write_text(
        json.dumps(manifest, indent=1) + "\n"
      )
      for path in self._scratch.iterdir():
        disk.sync(path)
      disk.sync(self._scratch)
    except BaseException:
      shutil.rmtree(self._scratch, ignore_errors=True)  # The parts stay.
      raise


def _whole(
  config: Mapping[str, Any], num_identities: int, image_size: tuple[int, int]
) -> dict[str, Any]:
  """Returns what the fingerprint is taken of."""
  return {
    **json.loads(json.dumps(config)),
    "layout": _LAYOUT,
    "num_identities": num_identities,
    "image_size": list(image_size),
  }


def _compare(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Refuses a folder of another configuration than that in a file of it."""
  folder = path.parent
  remedy = "choose another --data_dir, or remove that folder"
  try:
    held = json.loads(path.read_text())["config"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"{folder}: holds something that this command did not write (no"
      f" {path.name}): {remedy}"
    ) from error
  if fingerprint(held) != fingerprint(config):
    differs = _differences(held, config)
    raise errors.UserError(
      f"{folder}: holds a dataset of another configuration"
      f" ({'; '.join(differs[:3])}): {remedy}"
    )


def _differences(held: Any, config: Any, where: str = "") -> list[str]:
  """Returns what differs, as deep as both are mappings."""
  if isinstance(held, Mapping) and isinstance(config, Mapping):
    found = []
    for key in sorted(held.keys() | config.keys()):
      inside = f"{where}.{key}" if where else key
      found += _differences(held.get(key), config.get(key), inside)
    return found
  return [f"{where} is {held!r} there and {config!r} here"] * (held != config)


def _entries(folder: pathlib.Path) -> list[Entry]:
  """Returns the entries of all stripes by pid."""
  entries = {}
  for path in files.visible(folder, ".journal"):
    for entry in _read_journal(path)[0]:
      entries[entry.pid] = entry
  return [entries[pid] for pid in sorted(entries)]


def _read_journal(path: pathlib.Path) -> tuple[list[Entry], list[int]]:
  """Returns the whole lines of a journal and where each of them ends."""
  entries, ends, end = [], [], 0
  try:
    lines = path.read_bytes().split(b"\n")
  except FileNotFoundError:
    return [], []
  for number, line in enumerate(lines[:-1]):  # Behind the last \n: torn.
    try:
      entries.append(Entry(**json.loads(line)))
    except (ValueError, TypeError) as error:
      raise errors.UserError(
        f"{path}: line {number + 1} is damaged: remove {path.parent} and"
        " generate again"
      ) from error
    end += len(line) + 1
    ends.append(end)
  return entries, ends
