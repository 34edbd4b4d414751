"""What JAX computes on, and the programs that it keeps."""

import contextlib
import os
import pathlib

import jax

from dppp_jax import errors

# A program that was traced for one platform is not taken for another one: the
# context is part of the key of every cache of `jax.jit`.
_PLATFORM = jax.make_user_context(None)


def platform() -> str:
  """Returns what programs are traced for: "cpu", "gpu" or "tpu".

  Whatever chooses between kernels, dtypes or compiler options asks here.
  """
  return _PLATFORM.value or jax.default_backend()


def traced_for(name: str) -> contextlib.AbstractContextManager[None]:
  """Traces programs for another platform than the one of this process.

  A program for a GPU can so be traced, and compiled ahead of time, where there
  is none.

  Args:
    name: what `platform` returns within the context, in this thread.
  """
  return _PLATFORM(name)


def share(count: int, *, batch_size: int) -> list[jax.Device]:
  """Returns devices that share batches of a size.

  XLA spreads each operation of a program over the cores of a CPU, which keeps
  them busy where operations are large. Those of a small network are not: there
  it is faster to take cores for devices, with a part of the batch each. JAX
  can be told so only before it has looked for devices.

  Args:
    count: of devices; 0: as many cores as divide the batch, or one
      accelerator.
    batch_size: of the batches, at least 1.

  Raises:
    errors.UserError: there are not so many devices.
  """
  if count < 0:
    raise errors.UserError(f"run.devices={count}: must be 0 or more")
  has_affinity = hasattr(os, "sched_getaffinity")  # Not on every system.
  cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
  wanted = count or _divisor(batch_size, cores or 1)
  with contextlib.suppress(RuntimeError):  # It has looked: that must do.
    jax.config.update("jax_num_cpu_devices", wanted)
  found = jax.local_devices()
  if count > len(found):
    raise errors.UserError(
      f"run.devices={count}: there are {len(found)} {found[0].platform} devices"
    )
  if not count:
    is_cpu = found[0].platform == "cpu"
    count = _divisor(batch_size, len(found)) if is_cpu else 1
  return found[:count]


def use_compilation_cache(folder: str | pathlib.Path | None) -> None:
  """Keeps compiled programs on disk, for this process and later ones.

  A program of SDXL compiles for minutes and loads in seconds.

  Args:
    folder: made if need be; None: no longer.
  """
  from jax.experimental.compilation_cache import compilation_cache

  jax.config.update(
    "jax_compilation_cache_dir", None if folder is None else str(folder)
  )
  # Whoever compiled something before this call made up JAX's mind already.
  compilation_cache.reset_cache()


def _divisor(number: int, most: int) -> int:
  return max(n for n in range(1, most + 1) if number % n == 0)
