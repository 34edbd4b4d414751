"""Freed memory and its pages, before and after; the flags of XLA."""

import os
import pathlib
import subprocess
import sys

import pytest

from dppp_jax import process

_FAULTS = """
import resource, sys
from dppp_jax import process
import numpy as np
if sys.argv[1] == "keep":
  assert process.keep_memory()
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


_HEAP = """
import pathlib
from dppp_jax import process
process.keep_memory()
assert process.use_huge_pages()
heap = False
for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
  words = line.split()
  heap = words[-1] == "[heap]" if "-" in words[0] else heap
  if heap and words[0] == "Rss:":
    taken = int(words[1])
  if heap and words[0] == "VmFlags:" and "hg" in words:
    print(taken)
"""


def _gives_large_pages():
  policy = pathlib.Path("/proc/sys/vm/overcommit_memory")
  given = pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists()
  return given and policy.read_text().strip() != "2"


@pytest.mark.skipif(not _gives_large_pages(), reason="no large pages here")
def test_large_pages_are_asked_for_and_none_is_taken():
  found = subprocess.run(
    [sys.executable, "-c", _HEAP], capture_output=True, text=True, check=True
  )
  assert sum(map(int, found.stdout.split())) < 64 << 10  # kB, of half of all.
  assert found.stdout


@pytest.mark.parametrize("given", ["", "--xla_cpu_enable_fast_math=false"])
def test_flags_of_the_user_are_kept(monkeypatch, given):
  monkeypatch.setenv("XLA_FLAGS", given)
  assert process.fuse_outputs()
  flags = os.environ["XLA_FLAGS"].split()
  assert flags[:-1] == given.split()
  assert flags[-1].endswith("=xla_cpu_use_multi_output_fusion")
  assert process.fuse_outputs()  # Once is enough.
  assert os.environ["XLA_FLAGS"].split() == flags


def test_extra_options_of_the_user_have_the_last_word(monkeypatch):
  given = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling"
  monkeypatch.setenv("XLA_FLAGS", given)
  assert not process.fuse_outputs()
  assert os.environ["XLA_FLAGS"] == given
