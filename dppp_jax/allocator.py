"""The memory allocator of the process, tuned for steps that are all alike."""

import ctypes
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


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
