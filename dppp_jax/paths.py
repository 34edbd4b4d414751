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
