"""The driver: makes people one after the other and puts them into the store.

Whoever makes the pictures (drawn paper dolls, or the diffusion sampler) is a
function from a pid to records; everything here is the same for both.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from typing import Any

import numpy as np
import PIL.Image

from dppp_jax import errors, interrupts, logs
from dppp_jax.data import images
from dppp_jax.geneperson import dataset, disk, manifest
from dppp_jax.geneperson import store as store_lib

_SHEET = (8, 12)  # Rows (people) and columns (pictures) of a contact sheet.
_AHEAD = 2  # Identities that are being encoded while the next one is made.
_QUIET_SECONDS = 30.0  # Between log lines where there is no progress bar.


@dataclasses.dataclass(frozen=True)
class Identity:
  """What a maker made of one pid.

  Attributes:
    records: one mapping per picture with the keys of dataset.RECORD_KEYS;
      `image` is uint8 [H, W, 3] RGB or JPEG bytes.
    dropped: number of cells that were thrown away, by reason.
  """

  records: Sequence[Mapping[str, Any]]
  dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)


MakeIdentity = Callable[[int], Identity | Iterable[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    folder: where the dataset lies, or will.
    finished: whether it is there.
    made: identities that this run made.
    missing: identities that nobody has made yet.
    signal: number of the signal that stopped the run, or 0.
  """

  folder: pathlib.Path
  finished: bool
  made: int
  missing: int
  signal: int = 0

  @property
  def exit_code(self) -> int:
    """What a shell expects: 0, or 128 + signal where a signal stopped it."""
    return 128 + self.signal if self.signal else 0

  def summary(self) -> str:
    """Returns how the run ended, in one line, with what to do next."""
    if self.finished and not self.made:
      return f"{self.folder}: is finished, nobody was left to make"
    if self.finished:
      return f"{self.folder}: finished, {self.made} people made in this run"
    if self.signal:
      return (
        f"{self.folder}: stopped with {self.missing} people to go: run the same"
        " command again to go on"
      )
    return (
      f"{self.folder}: this stripe is done; {self.missing} people of the other"
      " stripes are to go, the last one finishes the dataset"
    )


def run(
  make_identity: MakeIdentity,
  *,
  data_dir: str | os.PathLike,
  num_identities: int,
  seed: int,
  image_size: tuple[int, int],
  source: str,
  config: Mapping[str, Any],
  shard: tuple[int, int] = (0, 1),
  cap: int = 20,
  quality: int = 95,
  sheet_every: int = 100,
  num_threads: int = 2,
  num_processes: int = 0,
) -> Outcome:
  """Makes every identity that is not in the store yet, then finalises it.

  Stop it whenever you like: SIGTERM and Ctrl-C end it between two identities, a
  kill -9 loses the ones in progress, and the same call goes on from there.

  Args:
    make_identity: pid -> Identity or records; a pure function of the pid.
    data_dir: what `tfds.load` will take as data_dir.
    num_identities: pids are 0 .. num_identities - 1.
    seed: for the choice of pictures where there are more than `cap`; the
      maker's seed, too.
    image_size: (height, width) of every picture.
    source: what the pictures are, in words, for the manifest.
    config: whatever else the pictures depend on, of JSON types: a data_dir
      that holds another configuration is refused.
    shard: (i, N): this process makes the pids with pid % N == i.
    cap: pictures kept of one identity at most.
    quality: of the JPEGs.
    sheet_every: identities between two contact sheets; 0 for none.
    num_threads: of the JPEG encoder.
    num_processes: that call make_identity (which must pickle); 0 for this one.

  Returns:
    The outcome.

  Raises:
    errors.UserError: bad arguments, another configuration, no space left.
  """
  check_positive(num_identities=num_identities, cap=cap)
  if not 1 <= quality <= 100:
    raise errors.UserError(f"quality={quality}: JPEG knows 1 to 100")
  config = {
    **config,
    "source": source,
    "seed": seed,
    "cap": cap,
    "quality": quality,
  }
  spec = dataset.features(image_size)
  with store_lib.Store(
    data_dir,
    config=config,
    num_identities=num_identities,
    image_size=image_size,
    shard=shard,
  ) as store:
    if store.finished:
      return Outcome(store.folder, True, 0, 0)
    made = 0
    sheet = _Sheet(store.scratch, every=sheet_every)
    with (
      interrupts.Interrupts("stopping after the people in progress") as signals,
      futures.ThreadPoolExecutor(num_threads) as pool,
      _Progress(store.num_done, len(store.todo)) as progress,
    ):
      if store.num_done:
        logs.say(f"resuming: {store.num_done} people are there already")
      people = _make(make_identity, store.todo, signals, num_processes)
      for pid, jobs, dropped in _encoded(
        people, pool, cap=cap, seed=seed, size=image_size, quality=quality
      ):
        records = [job.result() for job in jobs]
        store.append(
          pid,
          [dataset.serialize(record, spec) for record in records],
          manifest.note(records, dropped),
        )
        made += 1
        progress.update(len(records))
        sheet.add(pid, records)
    missing = store.missing()
    if missing:
      return Outcome(store.folder, False, made, missing, signals.number)
    folder = store.finalize(
      lambda entries: manifest.describe(entries, source=source, seed=seed)
    )
  return Outcome(folder, True, made, 0)


def _make(
  make_identity: MakeIdentity,
  pids: Sequence[int],
  signals: interrupts.Interrupts,
  num_processes: int,
) -> Iterator[tuple[int, Identity]]:
  """Yields (pid, identity) in the order of the pids, until a signal."""
  if not num_processes:
    for pid in pids:
      if signals.number:
        return
      yield pid, _call(make_identity, pid)
    return
  left, begun = iter(pids), collections.deque()
  with futures.ProcessPoolExecutor(
    min(num_processes, max(1, len(pids))),
    # A fork of a process with threads may hang.
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_in_worker,
  ) as pool:
    with _deaf():  # Each of the first submissions starts a process.
      for pid in itertools.islice(left, num_processes):
        begun.append((pid, pool.submit(_call, make_identity, pid)))
    while not signals.number:
      for pid in itertools.islice(left, 2 * num_processes - len(begun)):
        begun.append((pid, pool.submit(_call, make_identity, pid)))
      if not begun:
        break
      pid, future = begun.popleft()
      try:
        yield pid, future.result()
      except futures.process.BrokenProcessPool as error:
        raise errors.UserError(
          f"a process that makes people died at pid {pid} (out of memory?):"
          " run again with fewer --num_processes"
        ) from error
    pool.shutdown(cancel_futures=True)


def _call(make_identity: MakeIdentity, pid: int) -> Identity:
  made = make_identity(pid)
  if isinstance(made, Identity):
    return made
  return Identity(list(made))


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
  """Lets processes be born deaf to Ctrl-C, which goes to all on a terminal."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  old = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, old)


def _in_worker() -> None:
  """Leaves Ctrl-C to the parent, and ends when the parent was killed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = os.getppid()

  def watch():
    while os.getppid() == parent:
      time.sleep(1.0)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _encoded(
  people: Iterator[tuple[int, Identity]],
  pool: futures.Executor,
  *,
  cap: int,
  seed: int,
  size: tuple[int, int],
  quality: int,
) -> Iterator[tuple[int, list[futures.Future], dict[str, int]]]:
  """Yields (pid, records being encoded, dropped); begins the next ones too."""
  begun = collections.deque()
  for pid, identity in people:
    records, dropped = _cap(identity, cap=cap, seed=seed, pid=pid)
    jobs = [pool.submit(_encode, r, pid, size, quality) for r in records]
    begun.append((pid, jobs, dropped))
    if len(begun) >= _AHEAD:
      yield begun.popleft()
  yield from begun


def _cap(
  identity: Identity, *, cap: int, seed: int, pid: int
) -> tuple[list[Mapping[str, Any]], dict[str, int]]:
  """Keeps `cap` records, chosen by (seed, pid), in their order."""
  records, dropped = list(identity.records), dict(identity.dropped)
  if len(records) > cap:
    rng = np.random.default_rng([seed, pid])
    chosen = rng.choice(len(records), cap, replace=False)
    dropped["cap"] = len(records) - cap
    records = [records[i] for i in sorted(chosen)]
  return records, dropped


def _encode(
  record: Mapping[str, Any], pid: int, size: tuple[int, int], quality: int
) -> dict[str, Any]:
  """Returns the record with JPEG bytes for its image."""
  image = record["image"]
  if record["pid"] != pid:
    raise ValueError(f"asked for pid {pid}, got one of {record['pid']}")
  if isinstance(image, bytes):
    with PIL.Image.open(io.BytesIO(image)) as header:
      held = header.size[::-1]
  else:
    held = image.shape[:2]
    image = images.encode_jpeg(image, quality=quality)
  if tuple(held) != tuple(size):
    raise ValueError(f"pid {pid}: a picture of {held}, not {size}")
  return {**record, "image": image}


def check_positive(**values: int) -> None:
  """Raises errors.UserError that names a value below 1."""
  for key, value in values.items():
    if value < 1:
      raise errors.UserError(f"{key}={value}: must be at least 1")


def check_size(size: Sequence[int]) -> tuple[int, int]:
  """Returns (height, width), or raises errors.UserError."""
  if len(size) != 2 or min(size) < 8:
    raise errors.UserError(
      f"image_size={tuple(size)}: write height,width of 8 pixels or more, such"
      " as 256,128"
    )
  return size[0], size[1]


class _Progress:
  """Identities/s, images/s and time left: a bar, or a log line at times."""

  def __init__(self, done: int, todo: int):
    self._bar = logs.progress(
      total=done + todo, initial=done, desc="geneperson", unit="person"
    )
    self._done, self._total = 0, todo
    self._images = 0
    self._start = self._last = time.monotonic()

  def __enter__(self) -> "_Progress":
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()

  def update(self, num_images: int) -> None:
    """Counts one more identity."""
    self._done += 1
    self._images += num_images
    now = time.monotonic()
    seconds = max(now - self._start, 1e-9)
    speed = f"{self._images / seconds:.1f} images/s"
    self._bar.set_postfix_str(speed, refresh=False)
    self._bar.update()
    if self._bar.disable and now - self._last > _QUIET_SECONDS:
      self._last = now
      left = seconds / self._done * (self._total - self._done)
      logs.say(
        f"{self._done} of {self._total} people, {speed}, {left:.0f} s left"
      )


class _Sheet:
  """A picture of the last people made, once in a while, to look at."""

  def __init__(self, folder: pathlib.Path, *, every: int):
    self._folder, self._every, self._count = folder, every, 0
    self._rows: collections.deque[list[bytes]] = collections.deque(
      maxlen=_SHEET[0]
    )

  def add(self, pid: int, records: Sequence[Mapping[str, Any]]) -> None:
    """Takes an identity; writes a sheet when it is time."""
    if not self._every:
      return
    self._rows.append([record["image"] for record in records[: _SHEET[1]]])
    self._count += 1
    if self._count % self._every and self._count != 1:
      return
    rows = [
      [images.decode(data, name="contact sheet") for data in row]
      for row in self._rows
    ]
    with disk.reported(self._folder):
      self._folder.mkdir(exist_ok=True)
      scratch = self._folder.parent / f"sheet-{pid:06d}.png"
      PIL.Image.fromarray(images.contact_sheet(rows)).save(scratch)
      scratch.replace(self._folder / f"contact_sheet-{pid:06d}.png")
