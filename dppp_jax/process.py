"""The process, tuned for steps that are all alike: its memory, XLA's loops."""

import ctypes
import os
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8

_EXTRA = "--xla_backend_extra_options"


def tune() -> None:
  """Does all of this module; to be called before there are threads."""
  keep_memory()
  fuse_outputs()


def keep_memory() -> bool:
  """Lets the process keep what it has once asked the system for.

  XLA's CPU backend frees the temporaries of a program when it ends. glibc
  then gives them back to the system, and the next step takes every page anew:
  150,000 page faults in a PTL step of ViT-B/16, a tenth of its processor time.

  Call it before there are threads. Memory on accelerators is another matter.

  Returns:
    Whether this is a system where that could be arranged (glibc's).
  """
  if not sys.platform.startswith("linux"):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):  # Another C library.
    return False
  # -1 is never: 2 GB, the largest number, are less than some programs need.
  settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
  return all([mallopt(*setting) for setting in settings.items()])


def fuse_outputs() -> bool:
  """Lets XLA's CPU backend write several arrays in one loop.

  A loop of its own for each array would read what they are made of anew: Adam
  then moves twelve numbers for each parameter, and not seven. XLA takes this
  from the environment alone, for all programs of the process and of those it
  starts, and reads that when it compiles for the first time.

  Returns:
    Whether XLA is asked for it; not where `XLA_FLAGS` has such options already.
  """
  given = os.environ.get("XLA_FLAGS", "")
  if _EXTRA in given:
    return False
  flag = f"{_EXTRA}=xla_cpu_use_multi_output_fusion"
  os.environ["XLA_FLAGS"] = f"{given} {flag}".strip()
  return True
