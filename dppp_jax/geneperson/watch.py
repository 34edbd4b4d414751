"""What there is to look at while people are made: a bar and contact sheets."""

import collections
from collections.abc import Callable, Mapping, Sequence
import pathlib
import time
from typing import Any

import numpy as np
import PIL.Image
import tqdm

from dppp_jax import logs
from dppp_jax.data import images
from dppp_jax.geneperson import disk

_SHEET = (8, 12)  # Rows (people) and columns (pictures) of a contact sheet.
# Without tqdm's own rate: `Progress.text` has it, and two more.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_QUIET_SECONDS = 30.0  # Between log lines where there is no progress bar.


class Progress:
  """Canvases/s, images/s, drop rate, time left: a bar, or a line at times.

  Args:
    done: people that earlier runs made.
    todo: people that this run is to make.
    unit: what a person is called, in the plural.
    clock: seconds, for tests.
  """

  def __init__(
    self,
    done: int,
    todo: int,
    *,
    unit: str = "people",
    clock: Callable[[], float] = time.monotonic,
  ):
    self._bar = logs.progress(
      total=done + todo, initial=done, desc="geneperson", bar_format=_BAR
    )
    self._done, self._total, self._unit = 0, todo, unit
    self._images = self._dropped = 0
    self._clock = clock
    self._start = self._last = clock()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()

  def update(self, num_images: int, num_dropped: int) -> None:
    """Counts one more identity, its pictures and those thrown away."""
    self._done += 1
    self._images += num_images
    self._dropped += num_dropped
    self._bar.set_postfix_str(self.text(), refresh=False)
    self._bar.update()
    now = self._clock()
    if self._bar.disable and now - self._last > _QUIET_SECONDS:
      self._last = now
      left = (now - self._start) / self._done * (self._total - self._done)
      logs.say(
        f"{self._done} of {self._total} {self._unit}, {self.text()},"
        f" {tqdm.tqdm.format_interval(left)} left"
      )

  def text(self) -> str:
    """Returns the rates so far."""
    seconds = max(self._clock() - self._start, 1e-9)
    cells = self._images + self._dropped
    return (
      f"{self._done / seconds:.2f} {self._unit}/s,"
      f" {self._images / seconds:.1f} images/s,"
      f" {self._dropped / max(cells, 1):.0%} dropped"
    )


class Sheet:
  """A picture of the last people made, once in a while, to look at.

  Beside it another one of how the pictures of the last of them came about.

  Args:
    folder: where the sheets go; made if need be.
    every: people between two of them; 0 for none.
  """

  def __init__(self, folder: pathlib.Path, *, every: int):
    self._folder, self._every, self._count = folder, every, 0
    self._rows: collections.deque[list[bytes]] = collections.deque(
      maxlen=_SHEET[0]
    )

  def add(
    self,
    pid: int,
    records: Sequence[Mapping[str, Any]],
    steps: Callable[[], np.ndarray] | None = None,
  ) -> None:
    """Takes an identity; writes a sheet when it is time.

    Args:
      pid: whose name the sheet gets.
      records: with JPEG bytes.
      steps: of identity.Identity.
    """
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
    self._write(f"contact_sheet-{pid:06d}.png", images.contact_sheet(rows))
    if steps is not None:  # JPEG, since a canvas is a megapixel.
      self._write(f"steps-{pid:06d}.jpg", steps(), quality=95)

  def _write(self, name: str, picture: np.ndarray, **options: Any) -> None:
    with disk.reported(self._folder):
      self._folder.mkdir(exist_ok=True)
      scratch = self._folder.parent / f"scratch-{name}"
      PIL.Image.fromarray(picture).save(scratch, **options)
      scratch.replace(self._folder / name)
