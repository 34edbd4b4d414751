"""What a dataset says of its own making: counts, prompts, versions."""

import collections
from collections.abc import Mapping, Sequence
import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

from dppp_jax.geneperson import store

_PACKAGES = (
  "dppp-jax",
  "jax",
  "jaxlib",
  "flax",
  "numpy",
  "pillow",
  "opencv-python-headless",
  "tensorflow-datasets",
  "array_record",
)


def note(
  records: Sequence[Mapping[str, Any]],
  dropped: Mapping[str, int],
  *,
  prompt: str = "",
  seed: int | None = None,
  further_seeds: Sequence[int] = (),
) -> dict[str, Any]:
  """Returns what the journal keeps of an identity, of JSON types.

  Args:
    records: the pictures that are kept.
    dropped: number of the others by reason.
    prompt: of the canvas; the first record's by default.
    seed: of the canvas, if there is one.
    further_seeds: of the canvases after it.
  """
  tally = lambda key: dict(
    sorted(collections.Counter(record[key] for record in records).items())
  )
  first = records[0]["prompt"] if records else ""
  return {
    "prompt": prompt or first,
    "seed": seed,
    "further_seeds": list(further_seeds),
    "dropped": {key: int(dropped[key]) for key in sorted(dropped)},
    "view": tally("view"),
    "lighting": tally("lighting"),
  }


def describe(
  entries: Sequence[store.Entry],
  *,
  source: str,
  seed: int,
  about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns what manifest.json says beside the configuration.

  There is no time in it: the same people give the same bytes.

  Args:
    entries: of every identity, with what `note` made.
    source: what the pictures are, in words.
    seed: of the people.
    about: what else is to be said, e.g. which networks drew them.
  """
  totals = {
    key: collections.Counter() for key in ("dropped", "view", "lighting")
  }
  for entry in entries:
    for key, total in totals.items():
      total.update(entry.note[key])
  ordered = {key: dict(sorted(total.items())) for key, total in totals.items()}
  images = sum(entry.images for entry in entries)
  seeds = {str(entry.pid): entry.note.get("seed") for entry in entries}
  further = {str(e.pid): e.note.get("further_seeds") for e in entries}
  return {
    "source": source,
    **(about or {}),
    "seed": seed,
    "identities": sum(entry.images > 0 for entry in entries),
    "identities_without_images": sum(not entry.images for entry in entries),
    "without_images": {
      str(entry.pid): entry.note["dropped"]
      for entry in entries
      if not entry.images
    },
    # Both counts: the paper cuts 6,641 x 42 cells and publishes 130,519.
    "cells": images + sum(ordered["dropped"].values()),
    "images": images,
    "images_per_view": ordered["view"],
    "images_per_lighting": ordered["lighting"],
    "dropped": ordered["dropped"],
    "versions": _versions(),
    "commit": _commit(),
    "prompts": {str(entry.pid): entry.note["prompt"] for entry in entries},
    "seeds": {pid: seed for pid, seed in seeds.items() if seed is not None},
    # Of those who were given another canvas, in the order of their cells.
    "further_seeds": {pid: some for pid, some in further.items() if some},
  }


def _versions() -> dict[str, str]:
  versions = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "unknown"  # E.g. run from a checkout, not installed.
  return versions


def _commit() -> str | None:
  root = pathlib.Path(__file__).resolve().parents[2]
  if not (root / ".git").exists():
    return None
  try:
    return subprocess.run(
      ["git", "-C", str(root), "rev-parse", "HEAD"],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None
