"""Guard rails for every test: CPU, two devices of it, no rank promotion.

And what keeps the whole suite small: nearly all of its time is XLA's, which
compiles thousands of programs that run once.
"""

import contextlib
import ctypes
import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

from dppp_jax import process

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Modules of a minute and more begin first, so that no process of the tests ends
# long after the other.
_LONG = (
  "diffusion_training_test",
  "generation_test",
  "mini_sdxl_test",
  "matting_training_test",
  "sampling_test",
  "training_test",
)


def pytest_collection_modifyitems(items):
  """Puts the tests of long modules first; the others keep their order."""
  rank = {name: number for number, name in enumerate(_LONG)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


# Launchers that a test runs in its own process would let that process keep all
# memory that it ever had.
process.tune_memory = lambda: None


@pytest.fixture(scope="module", autouse=True)
def _programs(request):
  """Compiles a module's programs quickly, and forgets them after it.

  Nearly all programs of the tests run once, on little data: what LLVM does to
  make them fast takes longer than they do. A module that says `OPTIMISED =
  True` runs long enough, or looks at what XLA makes of a program. Processes
  that a test starts do as the test's own does, and so compute the same bits.
  """
  is_quick = not getattr(request.module, "OPTIMISED", False)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(is_quick)))
    jax.config.update("jax_disable_most_optimizations", is_quick)
    yield
  jax.clear_caches()
  gc.collect()
  _trim()


@pytest.fixture(autouse=True)
def _trimmed():
  """Trims between two tests, since one module compiles gigabytes."""
  yield
  _trim()


def _trim():
  """Gives back what LLVM has freed, and glibc keeps."""
  with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(None).malloc_trim(0)
