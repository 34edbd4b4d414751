"""Which weights a run was made with, told by their SHA-256.

    found = digests.describe({"base": source, "lora": other})
    found["base"]  # {"name": "sd_xl_base_1.0.safetensors", "sha256": "31e3..."}

Reading twenty gigabytes again for every resume would cost minutes, so what was
hashed is remembered by path, size and time of change.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from typing import Any

from dppp_jax import errors, logs, paths

Path = str | pathlib.Path

_CHUNK = 1 << 24  # Bytes read at once.
# A file that changes twice within a clock tick of its disk looks unchanged:
# what is younger is not remembered.
_SETTLED_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Source:
  """What one part of a run is read from.

  Attributes:
    name: of the file or folder, without what lies before it: another machine
      has it elsewhere.
    files: {path within the folder: where it lies now}; of one file {"": path}.
  """

  name: str
  files: Mapping[str, pathlib.Path]


def describe(
  sources: Mapping[str, Source], *, cache: Path | None = None
) -> dict[str, dict[str, str]]:
  """Returns {role: {"name": ..., "sha256": ...}}.

  The SHA-256 of a file is that which `sha256sum` and the hubs print. That of a
  folder is of what `sha256sum` prints for its files, sorted by path:

      (cd FOLDER && sha256sum FILES | LC_ALL=C sort -k2) | sha256sum

  Args:
    sources: of each role.
    cache: JSON file of what was hashed before; None: `default_cache()`.

  Raises:
    errors.UserError: a file that cannot be read, or changes meanwhile.
  """
  memory = _Memory(pathlib.Path(cache) if cache else default_cache())
  files = sorted({p for one in sources.values() for p in one.files.values()})
  known = {path: memory.find(path) for path in files}
  total = sum(_stat(path).st_size for path in files if known[path] is None)
  with logs.progress(total=total >> 20, desc="hashing", unit="MB") as bar:
    for path in files:
      if known[path] is None:
        known[path] = _hash(path, bar, memory)
  memory.save()
  found = {}
  for role, source in sources.items():
    lines = [
      f"{known[path]}  {name}\n" for name, path in sorted(source.files.items())
    ]
    if set(source.files) == {""}:
      whole = known[source.files[""]]
    else:
      whole = hashlib.sha256("".join(lines).encode()).hexdigest()
    found[role] = {"name": source.name, "sha256": str(whole)}
  return found


def default_cache() -> pathlib.Path:
  """Returns where digests are remembered: in the user's cache folder."""
  folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return paths.expand(folder) / "dppp_jax" / "digests.json"


def _stat(path: pathlib.Path) -> os.stat_result:
  try:
    return path.stat()
  except OSError as error:
    raise errors.UserError(
      f"{path} cannot be read ({error.strerror}): give a file that is there"
    ) from error


def _mark(path: pathlib.Path) -> list[int]:
  """Returns what tells two contents of a path apart."""
  stat = _stat(path)
  return [stat.st_size, stat.st_mtime_ns]


def _hash(path: pathlib.Path, bar: Any, memory: "_Memory") -> str:
  before, found = _mark(path), hashlib.sha256()
  buffer = memoryview(bytearray(_CHUNK))
  read = 0
  try:
    with path.open("rb", buffering=0) as file:
      while count := file.readinto(buffer):
        found.update(buffer[:count])
        bar.update((read + count >> 20) - (read >> 20))
        read += count
  except OSError as error:
    raise errors.UserError(
      f"{path} cannot be read ({error.strerror}): give a file that is there"
    ) from error
  if _mark(path) != before or read != before[0]:
    raise errors.UserError(
      f"{path} changed while it was read: run again when it is written"
    )
  memory.add(path, before, found.hexdigest())
  return found.hexdigest()


class _Memory:
  """{absolute path: [size, time of change in ns, SHA-256]} in a JSON file.

  It only saves time: one that is damaged, or cannot be written, is none.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._known = self._read()
    self._new: dict[str, Any] = {}

  def find(self, path: pathlib.Path) -> str | None:
    """Returns the SHA-256 of a file that has not changed since."""
    entry = self._known.get(str(path.absolute()))
    is_entry = isinstance(entry, list) and len(entry) == 3
    return entry[2] if is_entry and entry[:2] == _mark(path) else None

  def add(self, path: pathlib.Path, mark: list[int], found: str) -> None:
    """Remembers a file, unless it has just been written."""
    if time.time_ns() - mark[1] > _SETTLED_SECONDS * 1e9:
      self._new[str(path.absolute())] = [*mark, found]

  def save(self) -> None:
    """Writes what is new, beside what others have written meanwhile."""
    if not self._new:
      return
    scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      text = json.dumps(self._read() | self._new, indent=1, sort_keys=True)
      scratch.write_text(text, encoding="utf-8")
      scratch.replace(self._path)
    except OSError:
      with contextlib.suppress(OSError):
        scratch.unlink()

  def _read(self) -> dict[str, Any]:
    try:
      values = json.loads(self._path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
      return {}
    return values if isinstance(values, dict) else {}
