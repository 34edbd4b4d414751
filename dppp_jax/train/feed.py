"""Batches for the loop, in either placement, from any source."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from dppp_jax import errors
from dppp_jax.data import loader, sampler
from dppp_jax.data import source as source_lib


class Feed:
  """Pictures and labels of a source, ready for a compiled step.

  Args:
    source: labelled pictures.
    image_size: (H, W) that they are resized to.
    interpolation: "bicubic" or "bilinear".
    placement: "device" keeps all pictures in the accelerator's memory as
      uint8; "host" decodes in threads and sends batches ahead.
    on_corrupt: "error" or "skip".
    num_threads: threads that decode.

  Attributes:
    pids: int64 [N].
    labels: int32 [N], classes 0 .. C - 1 in the order of the pids.
    resident: {"image": uint8 [N, H, W, 3]} on the device, or nothing.
    has_pictures: False for `source.Records`.

  Raises:
    errors.UserError: an unknown placement, or a corrupt picture.
  """

  def __init__(
    self,
    source: source_lib.Source,
    *,
    image_size: tuple[int, int],
    interpolation: str,
    placement: str,
    on_corrupt: str,
    num_threads: int,
  ):
    if placement not in ("device", "host"):
      raise errors.UserError(
        f"config data.placement {placement!r}: choose 'device' or 'host'"
      )
    self._source = source
    self._read = {
      "size": image_size,
      "interpolation": interpolation,
      "on_corrupt": on_corrupt,
      "num_threads": num_threads,
    }
    self.pids = np.asarray(source.pids)
    self.labels = np.unique(self.pids, return_inverse=True)[1].astype(np.int32)
    self.resident: dict[str, jax.Array] = {}
    self.has_pictures = not isinstance(source, source_lib.Records)
    if placement == "device" and self.has_pictures:
      self.resident["image"] = jax.device_put(self._load())

  def batches(
    self,
    plan: sampler.Plan,
    start: int,
    on_disk: Mapping[str, np.ndarray] | None = None,
  ) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches of the plan from step `start` on, on the device.

    A batch is {"index": int32 [B]}, on the host placement also {"image":
    uint8 [B, H, W, 3]}, and the rows of what lies on disk.

    Args:
      plan: what stands in which batch.
      start: the first step wanted.
      on_disk: arrays [N, ...] of which only a batch's rows are read.
    """
    if self.resident or not self.has_pictures:
      batches = ({"index": indices} for indices in plan.indices[start:])
    else:
      batches = loader.host_batches(
        self._source, plan, start_step=start, **self._read
      )
    yield from loader.device_prefetch(_with_rows(batches, on_disk or {}))

  def _load(self) -> np.ndarray:
    """Reads all pictures; one that is skipped gives its place to a twin."""
    pictures, kept = loader.load_images(self._source, **self._read)
    if len(kept) == len(self._source):
      return pictures
    # The plan speaks of places in the source: a lost picture is replaced by
    # another one of the same person, so that no batch changes its shape.
    place = np.full(len(self._source), -1)
    place[kept] = np.arange(len(kept))
    for lost in np.flatnonzero(place < 0):
      twins = kept[self.pids[kept] == self.pids[lost]]
      place[lost] = place[twins[lost % len(twins)]]
    return pictures[place]


def _with_rows(batches, on_disk):
  """Adds to each batch the rows of arrays that are not in memory."""
  for batch in batches:
    rows = {k: np.asarray(x[batch["index"]]) for k, x in on_disk.items()}
    yield {**batch, **rows}
