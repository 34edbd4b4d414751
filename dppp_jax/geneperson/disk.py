"""Locks, durable writes, and what to say when the disk refuses."""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import pathlib
from typing import IO

from dppp_jax import errors, logs


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
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds an exclusive lock on a file; waits for it, and says so."""
  with path.open("a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logs.say(f"{path.parent}: waiting for another process to finish it")
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def own(file: IO, message: str) -> None:
  """Locks an open file until it is closed, or fails with a message."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise errors.UserError(message) from error


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
