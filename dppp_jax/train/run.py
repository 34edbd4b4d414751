"""The run folder: what was asked for, and on what it ran."""

from collections.abc import Mapping
import datetime
import importlib.metadata
import json
import pathlib
import platform
import sys
from typing import Any

import jax

from dppp_jax import checkpoints, errors, files, paths

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def prepare(
  workdir: str | pathlib.Path,
  config: Mapping[str, Any],
  *,
  free: tuple[str, ...] = (),
) -> pathlib.Path:
  """Makes a run folder, or checks that an existing one is this run's.

  A run that has no checkpoint yet may be begun with another configuration.

  Args:
    workdir: the folder.
    config: the resolved configuration, of JSON types.
    free: dotted keys (`data.num_threads`; `eval` for all below it) that may
      differ on a rerun, because they change where a run looks and what it
      shows, not what it learns.

  Returns:
    The folder's path.

  Raises:
    errors.UserError: the folder holds a run of another configuration, or
      cannot be one.
  """
  workdir = paths.expand(workdir)
  config = json.loads(json.dumps(config))
  path, about = workdir / "config.json", workdir / "environment.json"
  try:
    # Folders of models have a config.json too.
    if path.exists() and (checkpoints.steps(workdir) or not about.exists()):
      _check_held(path, config, free)
    elif not path.exists() and workdir.exists() and files.has_visible(workdir):
      raise errors.UserError(
        f"{workdir}: not empty and not a run folder; choose another --workdir"
      )
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, config)
    write_json(about, environment())
  except OSError as error:
    raise errors.UserError(
      f"{workdir}: cannot be a run folder ({error.strerror}); choose another"
      " --workdir"
    ) from error
  return workdir


def _check_held(
  path: pathlib.Path, config: Mapping[str, Any], free: tuple[str, ...]
) -> None:
  try:
    held = json.loads(path.read_text(encoding="utf-8-sig"))
  except ValueError as error:
    raise errors.UserError(
      f"{path}: not JSON; restore it, or choose another --workdir"
    ) from error
  differs = [key for key in _differences(held, config) if not _in(key, free)]
  if differs:
    raise errors.UserError(
      f"{path}: holds another configuration (differs in"
      f" {', '.join(differs[:5])}); choose another --workdir"
    )


def environment() -> dict[str, Any]:
  """Returns versions and devices, as they are written beside every run."""
  return {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": sys.argv,
    "python": platform.python_version(),
    "platform": platform.platform(),
    "devices": [device.device_kind for device in jax.devices()],
    "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new one."""
  scratch = path.with_name(f".{path.name}.tmp")
  scratch.write_text(json.dumps(value, indent=2) + "\n")
  scratch.replace(path)


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
  if isinstance(a, Mapping) and isinstance(b, Mapping):
    found = []
    for key in sorted(a.keys() | b.keys()):
      found += _differences(a.get(key), b.get(key), f"{prefix}{key}.")
    return found
  return [] if a == b else [prefix.removesuffix(".")]


def _in(key: str, free: tuple[str, ...]) -> bool:
  return any(key == name or key.startswith(f"{name}.") for name in free)
