"""Locks, durable writes, and what to say when the disk refuses."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import os
import pathlib
import time
from typing import IO

from dppp_jax import errors, logs

_PAUSE = 0.2  # Seconds between two looks at a lock.


@contextlib.contextmanager
def reported(where: pathlib.Path) -> Iterator[None]:
  """Says in one line what the operating system has against writing here."""
  try:
    yield
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise errors.UserError(
        f"{where}: no space left ({error}): free some and run the same command"
        " again, nothing that was finished is lost"
      ) from error
    raise errors.UserError(
      f"{where}: cannot be written ({error}): choose another --data_dir"
    ) from error


@contextlib.contextmanager
def locked(
  path: pathlib.Path, *, stopped: Callable[[], bool] = lambda: False
) -> Iterator[bool]:
  """Holds an exclusive lock on a file; waits for it, and says so.

  Args:
    path: of the file, which is made.
    stopped: whether to wait no longer. A signal that is only noted does not
      end a system call that waits, so that the file is looked at again.

  Yields:
    Whether it is held: False where the waiting was stopped.
  """
  with path.open("a") as file:
    is_held = _try(file)
    if not is_held:
      logs.say(f"{path.parent}: waiting for another process to finish it")
    while not is_held and not stopped():
      time.sleep(_PAUSE)
      is_held = _try(file)
    yield is_held


def own(file: IO, message: str) -> None:
  """Locks an open file until it is closed, or fails with a message."""
  if not _try(file):
    raise errors.UserError(message)


def is_free(path: pathlib.Path) -> bool:
  """Tells whether nobody holds a lock on a file, which is made."""
  with path.open("a") as file:
    return _try(file)


def _try(file: IO) -> bool:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def write(file: int, data: bytes) -> None:
  """Writes all bytes, and returns when they are on the disk."""
  view = memoryview(data)
  while view:
    view = view[os.write(file, view) :]
  os.fsync(file)


def replace(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a reader sees the old one or the new one."""
  scratch = path.with_name(f".{path.name}.tmp")
  scratch.write_text(text + "\n")
  sync(scratch)
  scratch.replace(path)


def sync(path: pathlib.Path) -> None:
  """Makes a file's bytes, or the names in a folder, survive a power cut."""
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)
