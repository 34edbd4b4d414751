"""What makers hand to the driver: one person, and the numbers behind it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Identity:
  """What a maker made of one pid.

  Attributes:
    records: one mapping per picture with the keys of dataset.RECORD_KEYS;
      `image` is uint8 [H, W, 3] RGB, JPEG bytes, or a function of nothing that
      returns the former and is called in another thread.
    dropped: number of cells that were thrown away, by reason.
    prompt: that of the canvas; that of the first record by default.
    seed: of the canvas, where there is one.
    further_seeds: of the canvases after the first, where there are some.
    steps: draws how the pictures came about, uint8 [h, w, 3], to look at.
  """

  records: Sequence[Mapping[str, Any]]
  dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
  prompt: str = ""
  seed: int | None = None
  further_seeds: Sequence[int] = ()
  steps: Callable[[], np.ndarray] | None = None


MakeIdentity = Callable[[int], Identity | Iterable[Mapping[str, Any]]]


@runtime_checkable
class BatchMaker(Protocol):
  """Makes many people at once; each is a pure function of its pid all the same.

  Attributes:
    unit: what it makes, in the plural, for the progress bar.
    group_size: consecutive pids that are always made together, see `groups`.
  """

  unit: str
  group_size: int

  def prepare(self, *, stopped: Callable[[], bool]) -> None:
    """Makes what everybody shares; leaves early where `stopped()`."""

  def people(
    self, pids: Iterable[int], *, stopped: Callable[[], bool]
  ) -> Iterator[tuple[int, Identity]]:
    """Yields the people of the pids, ascending, reading some ahead.

    Where `stopped()`, groups in progress are ended and none is begun.
    """


def seed_of(*words: str | int) -> int:
  """Returns a seed in 0 .. 2^64 - 1 that depends on the words alone."""
  text = "/".join(map(str, words)).encode()
  return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
