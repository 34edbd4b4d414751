"""Where things lie that people name."""

import os
import pathlib

from dppp_jax import errors


def expand(path: str | os.PathLike) -> pathlib.Path:
  """Returns a path with a leading ~ as the home folder.

  No shell expands the ~ of --data_dir=~/data, and none that of a config.

  Raises:
    errors.UserError: ~name of nobody, nothing at all, or no path.
  """
  if not isinstance(path, (str, os.PathLike)) or not str(path):
    raise errors.UserError(f"{path!r} is no path: give a file or a folder")
  try:
    return pathlib.Path(os.fsdecode(path)).expanduser()
  except RuntimeError as error:
    raise errors.UserError(f"{path}: no such home folder") from error


def refuse_unwritable(folder: pathlib.Path, *, flag: str) -> None:
  """Refuses a folder that cannot be made or written, before hours of work.

  Args:
    folder: need not exist.
    flag: that named the folder, for the error.

  Raises:
    errors.UserError: the folder, or what stands where a folder above it should,
      is a file, or may not be written.
  """
  place = folder.absolute()
  while not place.exists() and place != place.parent:
    place = place.parent
  if not place.is_dir():
    raise errors.UserError(
      f"{flag}={folder}: {place} is no folder: choose another {flag}"
    )
  if not os.access(place, os.W_OK | os.X_OK):
    raise errors.UserError(
      f"{flag}={folder}: {place} may not be written: choose another {flag}"
    )
