"""devices.py: who shares a batch. The tests have a CPU of two devices."""

import os

import jax
import pytest

from dppp_jax import devices, errors


@pytest.mark.parametrize(
  ("count", "batch_size", "wanted"),
  [(0, 4, 2), (0, 3, 1), (0, 1, 1), (1, 4, 1), (2, 3, 2)],
)
def test_as_many_as_divide_the_batch_or_as_asked(count, batch_size, wanted):
  found = devices.share(count, batch_size=batch_size)
  assert found == jax.devices()[:wanted]


def test_more_than_there_are_is_one_line():
  with pytest.raises(errors.UserError, match="devices=-1: must be 0 or more"):
    devices.share(-1, batch_size=2)
  with pytest.raises(errors.UserError, match=r"devices=9: there are 2 cpu"):
    devices.share(9, batch_size=9)


def test_cores_become_devices_before_jax_looks(monkeypatch):
  """The largest divisor of the batch that there are cores for."""
  told = {}
  monkeypatch.setattr(jax.config, "update", told.__setitem__)
  monkeypatch.setattr(
    os, "sched_getaffinity", lambda _: set(range(6)), raising=False
  )
  devices.share(0, batch_size=8)
  assert told == {"jax_num_cpu_devices": 4}


def test_a_program_is_traced_anew_for_another_platform():
  traced = []

  @jax.jit
  def call(x):
    traced.append(devices.platform())
    return x

  call(1.0)
  with devices.traced_for("gpu"):
    call.lower(1.0)
    call.lower(1.0)
  call(1.0)
  assert traced == ["cpu", "gpu"]
  assert devices.platform() == "cpu"
