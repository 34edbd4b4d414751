"""What glibc does with freed memory, before and after."""

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
from dppp_jax import allocator
import numpy as np
if sys.argv[1] == "keep":
  assert allocator.keep_memory()
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(64 << 20, np.uint8)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def _faults(mode):
  found = subprocess.run(
    [sys.executable, "-c", _FAULTS, mode],
    capture_output=True,
    text=True,
    check=True,
  )
  return int(found.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_used_again():
  assert _faults("keep") < 50 < _faults("leave")
