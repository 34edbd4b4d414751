"""An object in a process of its own, called through a pipe.

Two frameworks in one process share threads, allocators and CUDA libraries, and
their memory cannot be told apart.
"""

import ctypes
import gc
import importlib
import multiprocessing
import pathlib
from typing import Any


class Failed(RuntimeError):
  """What was raised over there, in one line."""


class Remote:
  """Calls the methods of an object in another process by their names.

  Args:
    path: "module:class" of what is made there; the module is imported there
      only.
    *args: what it is made of.
  """

  def __init__(self, path: str, *args: Any):
    context = multiprocessing.get_context("spawn")
    self._pipe, other = context.Pipe()
    self._process = context.Process(
      target=_serve, args=(other, path, args), daemon=True
    )
    self._process.start()
    other.close()
    self._receive()

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_"):
      raise AttributeError(name)

    def call(*args):
      self._pipe.send((name, args))
      return self._receive()

    return call

  def close(self) -> None:
    """Ends the process."""
    self._pipe.close()
    self._process.join(5)
    self._process.terminate()

  def _receive(self) -> Any:
    try:
      error, value = self._pipe.recv()
    except EOFError:
      raise Failed("the process died: is there enough memory?") from None
    if error is not None:
      raise Failed(error)
    return value


def _serve(pipe: Any, path: str, args: tuple[Any, ...]) -> None:
  """Makes the object, then answers calls until the pipe is closed."""
  side = None

  def make():
    nonlocal side
    module, name = path.split(":")
    made = getattr(importlib.import_module(module), name)
    # What the imports take is not the object's.
    before = resident("VmRSS")
    side = made(*args)
    side.host_memory = lambda: resident("VmHWM") - before
    side.forget_peak = _forget_peak

  def answer(fn, given):
    try:
      pipe.send((None, fn(*given)))
    except Exception as error:  # It belongs to the process that called.
      lines = str(error).splitlines() or [""]
      pipe.send((f"{type(error).__name__}: {lines[0][:300]}", None))

  answer(make, ())
  while True:
    try:
      name, given = pipe.recv()
    except EOFError:
      return
    answer(getattr(side, name), given)


def _forget_peak() -> int:
  """Returns VmHWM, and lets it begin anew with what is in use now."""
  peak = resident("VmHWM")
  gc.collect()
  try:
    # What was freed but kept is not in use.
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  except (OSError, AttributeError):  # Another system: the peak of all.
    pass
  return peak


def resident(key: str) -> int:
  """Returns VmRSS (now) or VmHWM (at most so far) in bytes; 0 if unknown.

  `ru_maxrss` would not do: a child inherits its parent's.
  """
  try:
    status = pathlib.Path("/proc/self/status").read_text()
  except OSError:
    return 0
  line = next(x for x in status.splitlines() if x.startswith(key))
  return int(line.split()[1]) * 1024
