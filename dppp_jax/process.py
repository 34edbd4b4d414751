"""The process, tuned for steps that are all alike: its memory, XLA's loops."""

import ctypes
import os
import pathlib
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
# Of Linux' mman.h, and the size of such a page on most processors.
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 << 20

_EXTRA = "--xla_backend_extra_options"
_FUSION = "xla_cpu_use_multi_output_fusion"


def tune_memory() -> None:
  """Keeps memory, in large pages; to be called before there are threads."""
  if keep_memory():
    use_huge_pages()


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


def use_huge_pages() -> bool:
  """Asks for large pages under the memory that `keep_memory` was told to keep.

  The heap is grown by half of the machine's memory at once, advised, and left
  to the allocator before anything is written there: that takes none of it.
  What the process asks for later then lies in pages of 2 MB, where the system
  has such, and is found with fewer walks through the page table.

  Returns:
    Whether the system took the advice.
  """
  policy = pathlib.Path("/proc/sys/vm/overcommit_memory")
  if not policy.exists() or policy.read_text().strip() == "2":
    return False  # Not Linux; or memory that is asked for counts as taken.
  libc = ctypes.CDLL(None)
  malloc, free, madvise = libc.malloc, libc.free, libc.madvise
  malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  free.argtypes = [ctypes.c_void_p]
  madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
  begin = malloc(size)
  if not begin:
    return False
  aligned = -(-begin // _HUGE_PAGE) * _HUGE_PAGE
  length = (begin + size - aligned) // _HUGE_PAGE * _HUGE_PAGE
  refused = madvise(aligned, length, _MADV_HUGEPAGE)
  free(begin)
  return not refused


def fuse_outputs() -> bool:
  """Lets XLA's CPU backend write several arrays in one loop.

  A loop of its own for each array would read what they are made of anew: Adam
  then moves twelve numbers for each parameter, and not seven. XLA takes this
  from the environment alone, for all programs of the process and of those it
  starts, and reads that when it compiles for the first time.

  It is for the training of transformers: XLA then computes nothing twice, but
  writes it down, and a UNet that denoises takes several times as long.

  Returns:
    Whether XLA is asked for it; not where `XLA_FLAGS` has other such options.
  """
  given = os.environ.get("XLA_FLAGS", "")
  if _EXTRA not in given:
    os.environ["XLA_FLAGS"] = f"{given} {_EXTRA}={_FUSION}".strip()
  return outputs_are_fused()


def outputs_are_fused() -> bool:
  """Returns whether XLA was asked for loops that write several arrays."""
  return _FUSION in os.environ.get("XLA_FLAGS", "")
