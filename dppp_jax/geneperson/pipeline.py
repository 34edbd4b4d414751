"""The driver: makes people one after the other and puts them into the store.

Whoever makes the pictures (drawn paper dolls, or the diffusion sampler) is a
function from a pid to records, or makes people in batches; everything here is
the same for both.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import io
import json
import os
import pathlib
from typing import Any

import numpy as np
import PIL.Image

from dppp_jax import errors, interrupts, logs, workers
from dppp_jax.data import images
from dppp_jax.geneperson import dataset, manifest, remedies, watch
from dppp_jax.geneperson import identity as identity_lib
from dppp_jax.geneperson import store as store_lib

_AHEAD = 2  # Identities that are being encoded while the next one is made.
Identity = identity_lib.Identity


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    folder: where the dataset lies, or will.
    finished: whether it is there.
    made: identities that this run made.
    missing: identities that nobody has made yet.
    signal: number of the signal that stopped the run, or 0.
    cells: pictures that were made for the whole dataset, where it is finished.
    images: those of them that are kept.
  """

  folder: pathlib.Path
  finished: bool
  made: int
  missing: int
  signal: int = 0
  cells: int = 0
  images: int = 0

  @property
  def exit_code(self) -> int:
    """What a shell expects: 0, or 128 + signal where a signal stopped it."""
    return 128 + self.signal if self.signal else 0

  def summary(self) -> str:
    """Returns how the run ended, in one line, with what to do next."""
    if self.finished and not self.made:
      return f"{self.folder}: is finished, nobody was left to make"
    if self.finished:
      return (
        f"{self.folder}: finished, {self.made} people made in this run; of"
        f" {self.cells:,} cells {self.images:,} were kept"
      )
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
  maker: identity_lib.MakeIdentity | identity_lib.BatchMaker,
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
  about: Mapping[str, Any] | None = None,
) -> Outcome:
  """Makes every identity that is not in the store yet, then finalises it.

  Stop it whenever you like: SIGTERM and Ctrl-C end it after the identities (or
  the batches of them) in progress, a kill -9 loses those, and the same call
  goes on from there.

  Args:
    maker: pid -> Identity or records, a pure function of the pid; or a maker
      of batches.
    data_dir: what `tfds.load` will take as data_dir.
    num_identities: pids are 0 .. num_identities - 1.
    seed: for the choice of pictures where there are more than `cap`; the
      maker's seed, too.
    image_size: (height, width) of every picture.
    source: what the pictures are, in words, for the manifest.
    config: whatever else the pictures depend on, of JSON types: a data_dir
      that holds another configuration is refused.
    shard: (i, N): this process makes the groups of the maker with
      group % N == i; the group of a maker of single people is one.
    cap: pictures kept of one identity at most.
    quality: of the JPEGs.
    sheet_every: identities between two contact sheets; 0 for none.
    num_threads: of the JPEG encoder, and of the fusion where pictures come as
      functions.
    num_processes: that call a maker of single people (which must pickle); 0
      for this one.
    about: what the manifest says besides, of JSON types; nothing that the
      pictures depend on.

  Returns:
    The outcome.

  Raises:
    errors.UserError: bad arguments, another configuration, no space left.
  """
  check_positive(
    num_identities=num_identities, cap=cap, num_threads=num_threads
  )
  check_quality(quality)
  config = _whole_config(config, source, seed, cap, quality)
  spec = dataset.features(image_size)
  is_batch = isinstance(maker, identity_lib.BatchMaker)
  group_size = maker.group_size if is_batch else 1
  with store_lib.Store(
    data_dir,
    config=config,
    num_identities=num_identities,
    image_size=image_size,
    shard=shard,
    group_size=group_size,
  ) as store:
    if store.finished:
      return Outcome(store.folder, True, 0, 0)
    made = 0
    sheet = watch.Sheet(store.scratch, every=sheet_every)
    first = _FirstGroup(min(group_size, len(store.todo)))
    with (
      interrupts.Interrupts("stopping after the people in progress") as signals,
      futures.ThreadPoolExecutor(num_threads) as pool,
    ):
      stopped = lambda: bool(signals.number)
      if store.num_done:
        logs.say(f"resuming: {store.num_done} people are there already")
      if is_batch:
        if store.todo:
          maker.prepare(stopped=stopped)
        people = maker.people(store.todo, stopped=stopped)
      else:
        people = workers.each(
          functools.partial(_make, maker),
          store.todo,
          num_processes=num_processes,
          stopped=stopped,
        )
      unit = maker.unit if is_batch else "people"
      with watch.Progress(
        store.num_done, len(store.todo), unit=unit
      ) as progress:
        for pid, person, jobs, dropped in _encoded(
          people, pool, cap=cap, seed=seed, size=image_size, quality=quality
        ):
          records = [job.result() for job in jobs]
          store.append(
            pid,
            [dataset.serialize(record, spec) for record in records],
            manifest.note(
              records,
              dropped,
              prompt=person.prompt,
              seed=person.seed,
              further_seeds=person.further_seeds,
            ),
          )
          made += 1
          progress.update(len(records), sum(dropped.values()))
          sheet.add(pid, records, person.steps)
          first.add(len(records), dropped)
    missing = store.missing()
    if missing:
      return Outcome(store.folder, False, made, missing, signals.number)
    folder = store.finalize(
      functools.partial(
        manifest.describe, source=source, seed=seed, about=about
      )
    )
  # Another stripe may have been the last, and have written it.
  told = json.loads((folder / "manifest.json").read_text())
  totals = {key: told[key] for key in ("cells", "images")}
  if without := told.get("without_images"):
    pids = ", ".join([*without][:5]) + ", ..." * (len(without) > 5)
    logs.say(
      f"{folder}: {len(without)} of {num_identities} people have no picture, as"
      f" all their cells were dropped (pid {pids}):"
      f" {remedies.of(without.values())}, or give more --config.tries"
    )
  return Outcome(folder, True, made, 0, **totals)


class _FirstGroup:
  """Says it at once where the first people of a run lose all of their cells.

  Args:
    size: people to look at.
  """

  def __init__(self, size: int):
    self._size = size
    self._count = self._kept = 0
    self._dropped: list[Mapping[str, int]] = []

  def add(self, num_images: int, dropped: Mapping[str, int]) -> None:
    """Counts one more person."""
    self._count += 1
    self._kept += num_images
    if self._count > self._size or self._kept:
      return
    self._dropped.append(dropped)
    if self._count == self._size:
      logs.say(
        f"the first {self._size} people lost all of their cells, and so may all"
        f" others (Ctrl-C stops): {remedies.of(self._dropped)}"
      )


def is_finished(
  data_dir: str | os.PathLike,
  *,
  num_identities: int,
  seed: int,
  image_size: tuple[int, int],
  source: str,
  config: Mapping[str, Any],
  cap: int = 20,
  quality: int = 95,
  **others: Any,
) -> bool:
  """Tells whether `run` of the same arguments would find nothing to do.

  Asked before gigabytes are read; it makes nothing.

  Raises:
    errors.UserError: data_dir holds another configuration.
  """
  del others
  return store_lib.is_finished(
    data_dir,
    config=_whole_config(config, source, seed, cap, quality),
    num_identities=num_identities,
    image_size=image_size,
  )


def _whole_config(
  config: Mapping[str, Any], source: str, seed: int, cap: int, quality: int
) -> dict[str, Any]:
  """Returns what the store compares."""
  own = {"source": source, "seed": seed, "cap": cap, "quality": quality}
  return {**config, **own}


def _make(maker: identity_lib.MakeIdentity, pid: int) -> Identity:
  made = maker(pid)
  return made if isinstance(made, Identity) else Identity(list(made))


def _encoded(
  people: Iterator[tuple[int, Identity]],
  pool: futures.Executor,
  *,
  cap: int,
  seed: int,
  size: tuple[int, int],
  quality: int,
) -> Iterator[tuple[int, Identity, list[futures.Future], dict[str, int]]]:
  """Yields (pid, identity, records being encoded, dropped), some ahead."""
  begun = collections.deque()
  for pid, identity in people:
    records, dropped = _cap(identity, cap=cap, seed=seed, pid=pid)
    jobs = [pool.submit(_encode, r, pid, size, quality) for r in records]
    begun.append((pid, identity, jobs, dropped))
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
  if callable(image):
    image = image()
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


def check_quality(quality: int) -> None:
  """Raises errors.UserError for what is no quality of a JPEG."""
  if not 1 <= quality <= 100:
    raise errors.UserError(f"quality={quality}: JPEG knows 1 to 100")


def check_size(size: Sequence[int]) -> tuple[int, int]:
  """Returns (height, width), or raises errors.UserError."""
  if len(size) != 2 or min(size) < 8:
    raise errors.UserError(
      f"image_size={tuple(size)}: write height,width of 8 pixels or more, such"
      " as 256,128"
    )
  return size[0], size[1]
