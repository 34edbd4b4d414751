"""Metrics on disk and on the console, and progress bars."""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import json
import pathlib
import sys
import threading
import time
from typing import Any, TextIO

import tqdm

from dppp_jax import errors


def progress(
  iterable: Iterable | None = None,
  *,
  total: int | None = None,
  desc: str = "",
  unit: str = "it",
  initial: int = 0,
  bar_format: str | None = None,
) -> tqdm.tqdm:
  """Returns a tqdm bar on stderr; silent where stderr is not a terminal.

  Args:
    iterable: what to walk, or None to call `update` by hand.
    total: number of units; taken from the iterable where it has a length.
    desc: what is being done.
    unit: name of one unit, e.g. "image".
    initial: units already done by an earlier run.
    bar_format: tqdm's, for a bar that shows other rates.
  """
  return tqdm.tqdm(
    iterable,
    total=total,
    desc=desc,
    unit=unit,
    initial=initial,
    bar_format=bar_format,
    dynamic_ncols=True,
    disable=not sys.stderr.isatty(),
  )


def progress_of_bytes(total: int, *, desc: str) -> tqdm.tqdm:
  """Returns a bar that counts bytes, shown only where it takes a second."""
  return tqdm.tqdm(
    total=total,
    desc=desc,
    unit="B",
    unit_scale=True,
    delay=1,
    dynamic_ncols=True,
    disable=not sys.stderr.isatty(),
  )


def say(text: str) -> None:
  """Writes a line to stderr, above a progress bar where there is one."""
  tqdm.tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def waiting(
  text: str,
  *,
  has_bar: bool = False,
  first: float = 5.0,
  every: float = 10.0,
) -> Iterator[None]:
  """Says what is being done, while the block takes long.

  Args:
    text: what is being done.
    has_bar: whether the block shows a bar; then nothing is said where the bar
      is seen.
    first: seconds before the first word.
    every: seconds between words.
  """
  done = threading.Event()
  begin = time.monotonic()

  def speak() -> None:
    pause = first
    while not done.wait(pause):
      pause = every
      say(f"{text}: {time.monotonic() - begin:.0f} s so far")

  if has_bar and sys.stderr.isatty():
    yield
    return
  speaker = threading.Thread(target=speak, name="waiting", daemon=True)
  speaker.start()
  try:
    yield
  finally:
    done.set()
    speaker.join()


class Writer:
  """Appends metrics to `metrics.jsonl`, and to TensorBoard when asked.

  Every line is one JSON object with "step" and "stage". Lines of steps beyond
  the one that training resumes from are cut, so that a run which was killed
  leaves the same file as one which was not.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    tensorboard: bool = False,
    resume_step: int = 0,
  ):
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._path.parent.mkdir(parents=True, exist_ok=True)
    _cut_after(self._path, resume_step)
    self._file: TextIO = self._path.open("a")
    self._board = None
    if tensorboard:
      # Optional extra `log`: imported only where it is asked for.
      try:
        import tensorboardX  # pylint: disable=g-import-not-at-top
      except ImportError as error:
        raise errors.UserError(
          "config train.tensorboard needs tensorboardX: install it (the extra"
          " log), or set it to False"
        ) from error

      self._board = tensorboardX.SummaryWriter(str(workdir))

  def write(self, step: int, stage: str, metrics: Mapping[str, Any]) -> None:
    """Appends one line and flushes it: a killed run loses no line."""
    scalars = {key: float(value) for key, value in metrics.items()}
    line = {"step": int(step), "stage": stage, **scalars}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    if self._board is not None:
      for key, value in scalars.items():
        self._board.add_scalar(f"{stage}/{key}", value, step)

  def holds(self, step: int, name: str | None) -> bool:
    """Whether a metric was written at a step, now or by an earlier run."""
    return step in by_step(self._path.parent, name)

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    if self._board is not None:
      self._board.close()


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of a metrics.jsonl; a torn last line is left out."""
  lines = []
  for line in pathlib.Path(path).read_text().splitlines():
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return lines


def by_step(workdir: str | pathlib.Path, name: str | None) -> dict[int, float]:
  """Returns {step: value} of a metric, of the lines of a run that hold it."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  lines = read(path) if path.exists() else []
  return {line["step"]: line[name] for line in lines if name in line}


def _cut_after(path: pathlib.Path, step: int) -> None:
  if not path.exists():
    return
  kept = [line for line in read(path) if line["step"] <= step]
  scratch = path.with_suffix(".tmp")
  scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
  scratch.replace(path)
