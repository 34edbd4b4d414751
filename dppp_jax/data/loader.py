"""Pictures off the disk: a whole data set at once, or batches by a plan."""

import collections
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import os
import threading
from typing import Any

from absl import logging
import grain
import numpy as np

from dppp_jax import errors, logs
from dppp_jax.data import images, sampler
from dppp_jax.data import source as source_lib

_ON_CORRUPT = ("error", "skip")
_CHUNK = 64  # Pictures a thread takes at once: fewer and bookkeeping shows.


def load_images(
  source: source_lib.Source,
  *,
  size: tuple[int, int],
  interpolation: str = "bicubic",
  on_corrupt: str = "error",
  num_threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes and resizes a whole source, for the `device` placement.

  Args:
    source: N pictures.
    size: (H, W) wanted.
    interpolation: "bicubic" or "bilinear".
    on_corrupt: "error" stops at the first picture that cannot be decoded;
      "skip" leaves it out, with a warning, as long as its person has others.
    num_threads: threads that decode; one for each processor by default, and
      one for 0.

  Returns:
    uint8 [M, H, W, 3] and int64 [M]: the pictures, and which of the source they
    are, in rising order. M = N unless some were skipped.

  Raises:
    images.CorruptImageError: under "error", naming the file.
    errors.UserError: no pictures, or none left of some person.
  """
  _check_on_corrupt(on_corrupt)
  num = len(source)
  if not num:
    raise errors.UserError("no images to load: the source is empty")
  pixels = np.empty((num, *size, 3), np.uint8)
  failures: list[tuple[int, images.CorruptImageError]] = []

  def load(start: int) -> int:
    stop = min(start + _CHUNK, num)
    for i in range(start, stop):
      try:
        pixels[i] = images.resize(
          source.read(i), size, interpolation=interpolation
        )
      except images.CorruptImageError as error:
        if on_corrupt == "error":
          raise
        failures.append((i, error))
    return stop - start

  num_threads = max(1, _threads(num_threads))
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    futures = [pool.submit(load, start) for start in range(0, num, _CHUNK)]
    try:
      with logs.progress(total=num, desc="images", unit="image") as bar:
        for future in futures:
          bar.update(future.result())
    except BaseException:
      # Nobody wants the rest decoded before hearing of the error.
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  if not failures:
    return pixels, np.arange(num)

  failures.sort(key=lambda failure: failure[0])
  for _, error in failures:
    logging.warning("skipped: %s", error)
  logging.warning("skipped %d of %d images", len(failures), num)
  kept = np.setdiff1d(np.arange(num), [i for i, _ in failures])
  lost = np.setdiff1d(source.pids, source.pids[kept])
  if lost.size:
    first = next(e for i, e in failures if source.pids[i] == lost[0])
    raise errors.UserError(
      f"no image is left of {lost.size} persons, the first is {lost[0]}:"
      f" {first}"
    )
  # In place: a second copy of a data set may not fit into memory.
  for to, i in enumerate(kept):
    pixels[to] = pixels[i]
  return pixels[: len(kept)], kept


class HostBatches(Iterator[dict[str, np.ndarray]]):
  """Batches of a plan, decoded ahead by threads; see `host_batches`.

  An error in a thread is raised by the `next` that would have returned its
  batch.
  """

  def __init__(self, steps: "_Steps", iterator: Any):
    self._steps = steps
    self._iterator = iterator

  def __next__(self) -> dict[str, np.ndarray]:
    try:
      return next(self._iterator)
    except StopIteration:
      self.close()
      raise

  @property
  def num_corrupt(self) -> int:
    """How many different files were found corrupt so far."""
    return len(self._steps.corrupt)

  def close(self) -> None:
    """Stops the threads, and says how many files were corrupt."""
    self._iterator.close()
    if self.num_corrupt and not self._steps.is_reported:
      self._steps.is_reported = True
      logging.warning(
        "%d corrupt images were replaced by others of the same person",
        self.num_corrupt,
      )


def host_batches(
  source: source_lib.Source,
  plan: sampler.Plan,
  *,
  size: tuple[int, int],
  interpolation: str = "bicubic",
  start_step: int = 0,
  num_threads: int | None = None,
  prefetch: int | None = None,
  on_corrupt: str = "error",
) -> HostBatches:
  """Decodes and resizes the batches of a plan, for the `host` placement.

  Batch s is the same whatever the step begun at and the number of threads.

  Args:
    source: N pictures.
    plan: indices below N.
    size: (H, W) wanted.
    interpolation: "bicubic" or "bilinear".
    start_step: steps of the plan already done by an earlier run.
    num_threads: threads that decode, a batch each; one for each processor by
      default, 0 decodes in the caller's thread.
    prefetch: batches held ready, twice `num_threads` by default. Each takes
      B * H * W * 3 bytes: 6 MiB for 64 of 256 x 128.
    on_corrupt: "error" raises at a picture that cannot be decoded; "skip"
      puts the next one of the same person in its place, one that the batch
      does not hold yet where there is any.

  Returns:
    An iterator of {"image": uint8 [B, H, W, 3], "index": int32 [B]}, the index
    being that of the picture delivered.

  Raises:
    images.CorruptImageError: under "error", naming the file; from `next`.
    errors.UserError: no picture of a person can be decoded; from `next`.
  """
  _check_on_corrupt(on_corrupt)
  if not 0 <= start_step <= len(plan):
    raise ValueError(f"start_step {start_step} is not in 0 to {len(plan)}")
  if len(plan) and not 0 <= plan.indices.min() <= plan.indices.max() < len(
    source
  ):
    raise ValueError(f"the plan has indices beyond the {len(source)} images")
  num_threads = _threads(num_threads)
  if prefetch is None:
    prefetch = 2 * num_threads
  steps = _Steps(source, plan[start_step:], size, interpolation, on_corrupt)
  # grain counts elements, which are whole batches here: its default of 500
  # would fill the memory.
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads)
  )
  if not len(steps):
    return HostBatches(steps, _Nothing())
  dataset = grain.MapDataset.source(steps).to_iter_dataset(options)
  return HostBatches(steps, iter(dataset))


def device_prefetch(
  batches: Iterable[Any],
  size: int = 2,
  *,
  put: Callable[[Any], Any] | None = None,
) -> Iterator[Any]:
  """Keeps batches on the device ahead of the one in use.

  Transfers are asynchronous: while a step runs, the next batches travel.

  Args:
    batches: dicts of arrays.
    size: batches on the device, the one in use not counted.
    put: moves a batch; `jax.device_put` by default, or one with a sharding.

  Yields:
    The batches, in order, as device arrays.
  """
  if put is None:
    import jax  # Not needed to read pictures; this room's readers go without.

    put = jax.device_put
  batches = iter(batches)
  queue: collections.deque[Any] = collections.deque()
  try:
    for batch in batches:
      queue.append(put(batch))
      if len(queue) > size:
        yield queue.popleft()
    while queue:
      yield queue.popleft()
  finally:
    # Also where the consumer leaves early, e.g. upon SIGTERM.
    if hasattr(batches, "close"):
      batches.close()


class _Nothing(Iterator):
  """What is left of a plan that is done; grain refuses empty data sets."""

  def __next__(self):
    raise StopIteration

  def close(self) -> None:
    """Does nothing."""


class _Steps:
  """A random-access sequence of batches, read by grain's threads."""

  def __init__(
    self,
    source: source_lib.Source,
    plan: sampler.Plan,
    size: tuple[int, int],
    interpolation: str,
    on_corrupt: str,
  ):
    self._source = source
    self._plan = plan
    self._size = size
    self._interpolation = interpolation
    self._on_corrupt = on_corrupt
    self._lock = threading.Lock()
    self.corrupt: dict[int, str] = {}  # Message by index.
    self.is_reported = False

  def __len__(self) -> int:
    return len(self._plan)

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    row = self._plan.indices[step].copy()
    pixels = np.empty((len(row), *self._size, 3), np.uint8)
    for slot, index in enumerate(row):
      if not self._read(int(index), pixels[slot]):
        row[slot] = self._replace(int(index), row, pixels[slot])
    return {"image": pixels, "index": row}

  def _read(self, index: int, out: np.ndarray) -> bool:
    """Fills `out` with a picture; returns False where it is corrupt."""
    if index in self.corrupt:
      return False
    try:
      image = self._source.read(index)
    except images.CorruptImageError as error:
      if self._on_corrupt == "error":
        raise
      with self._lock:  # Threads may meet the same file at once.
        if index not in self.corrupt:
          self.corrupt[index] = str(error)
          logging.warning("replaced: %s", error)
      return False
    out[:] = images.resize(image, self._size, interpolation=self._interpolation)
    return True

  def _replace(self, index: int, row: np.ndarray, out: np.ndarray) -> int:
    """Fills `out` with the next picture of the same person; returns which.

    A function of the files and the row alone, not of what threads met before.
    """
    pid = self._source.pids[index]
    mine = np.flatnonzero(self._source.pids == pid)
    following = np.roll(mine, -np.searchsorted(mine, index) - 1)[:-1]
    # Stable: those that the batch does not hold come first, in their order.
    for candidate in following[
      np.argsort(np.isin(following, row), stable=True)
    ]:
      if self._read(int(candidate), out):
        return int(candidate)
    raise errors.UserError(
      f"no image of person {pid} can be read: {self.corrupt[index]}"
    )


def _threads(num_threads: int | None) -> int:
  if num_threads is None:
    return os.cpu_count() or 1
  if num_threads < 0:
    raise errors.UserError(f"num_threads = {num_threads}: must not be negative")
  return num_threads


def _check_on_corrupt(on_corrupt: str) -> None:
  if on_corrupt not in _ON_CORRUPT:
    raise errors.UserError(
      f"on_corrupt = {on_corrupt!r}: use one of {', '.join(_ON_CORRUPT)}"
    )
