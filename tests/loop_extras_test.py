"""The loop's averages of parameters, rows on disk, and watcher."""

import jax.numpy as jnp
import numpy as np
import pytest

from dppp_jax import logs, trees
from dppp_jax.data import source as source_lib
from dppp_jax.train import loop
from dppp_jax.train import stage as stage_lib

_NUM, _BATCH = 12, 4


def _stage(rows, *, epochs=3, ema=None, name="only", init=None):
  def begin(params, collections, rng):
    del params, collections, rng
    return {"w": {"kernel": jnp.ones(5)}, "held": {"kernel": jnp.ones(2)}}, {
      "seen": {"count": jnp.zeros(())}
    }

  def loss(params, collections, batch, rng):
    del rng
    assert set(batch) == {"index", "label", "rows"}  # No picture.
    assert "ema" not in collections
    error = batch["rows"] - params["w"]["kernel"][None]
    count = collections["seen"]["count"] + len(error)
    aux = stage_lib.Aux({}, {"seen": {"count": count}})
    return jnp.square(error).mean(), aux

  return stage_lib.Stage(
    name=name,
    init=init or begin,
    loss=loss,
    rules=(("w/.*", 0.1), (".*", None)),
    batches=stage_lib.Shuffled(_BATCH),
    epochs=epochs,
    ema=ema,
    extras={"rows": rows},
  )


@pytest.fixture
def rows():
  return np.random.default_rng(0).normal(size=(_NUM, 5)).astype(np.float32)


def _fit(folder, stages, **options):
  watcher = options.pop("watcher", None)
  return loop.fit(
    stages,
    source_lib.Records(_NUM),
    workdir=folder,
    options=loop.Options(log_every=100, **options),
    watcher=watcher,
  )


def _raw(folder, rows, **kwargs):
  """Returns the parameters after each step of a run without averages."""
  seen = []
  watcher = lambda name, step, params: (
    seen.append(np.array(params["w"]["kernel"])) or {"step_seen": step}
  )
  _fit(folder, [_stage(rows, **kwargs)], watch_every=1, watcher=watcher)
  return seen


def test_average_is_that_of_the_equation(tmp_path, rows):
  seen = _raw(tmp_path / "raw", rows)
  want = np.ones(5)
  for step, params in enumerate(seen):
    decay = min(0.5, (1 + step) / (10 + step))
    want = decay * want + (1 - decay) * params
  outcome = _fit(tmp_path / "ema", [_stage(rows, ema=0.5)])
  got = outcome.params["w"]["kernel"]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert np.abs(got - seen[-1]).max() > 1e-3
  np.testing.assert_array_equal(outcome.params["held"]["kernel"], 1)
  lines = logs.read(tmp_path / "raw" / "metrics.jsonl")
  steps = [line["step_seen"] for line in lines if "step_seen" in line]
  assert steps == list(range(1, 10))


def test_masters_are_float32_whatever_the_file_holds(tmp_path, rows):
  """And train as those that were float32 from the beginning."""
  begin = {
    "w": {"kernel": np.linspace(0, 1, 5, dtype=np.float16)},
    "held": {"kernel": np.ones(2, jnp.bfloat16)},
  }
  wide = {k: {"kernel": v["kernel"].astype("f")} for k, v in begin.items()}
  init = lambda tree: lambda *_: (tree, {"seen": {"count": jnp.zeros(())}})
  half, full = (
    _fit(
      tmp_path / name,
      [_stage(rows, init=init(tree), ema=0.5)],
    )
    for name, tree in (("half", begin), ("full", wide))
  )
  for name, leaf in trees.flatten(half.params).items():
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, trees.flatten(full.params)[name])


def test_average_resumes_to_the_bit(tmp_path, rows):
  whole = _fit(tmp_path / "whole", [_stage(rows, ema=0.9)])
  _fit(tmp_path / "parts", [_stage(rows, ema=0.9, epochs=1)])
  parts = _fit(tmp_path / "parts", [_stage(rows, ema=0.9)])
  for name, leaf in trees.flatten(whole.params).items():
    np.testing.assert_array_equal(leaf, trees.flatten(parts.params)[name])


def test_next_stage_begins_from_the_last_step_not_the_average(tmp_path, rows):
  """Averages end with their stage; what trains on is what was trained."""
  begun = {}

  def keep(params, collections, rng):
    del rng
    begun["w"] = np.array(params["w"]["kernel"])
    begun["collections"] = set(collections)
    return params, collections

  seen = _raw(tmp_path / "raw", rows)
  stages = [
    _stage(rows, ema=0.9),
    _stage(rows, name="second", init=keep, epochs=1),
  ]
  outcome = _fit(tmp_path / "two", stages)
  np.testing.assert_array_equal(begun["w"], seen[-1])
  assert begun["collections"] == {"seen", "ema"}
  lines = logs.read(tmp_path / "two" / "metrics.jsonl")
  assert lines[-1]["step"] == 12
  assert np.isfinite(outcome.params["w"]["kernel"]).all()


def test_rows_on_disk_give_what_rows_in_memory_give(tmp_path, rows):
  path = tmp_path / "rows.npy"
  np.save(path, rows)
  on_disk = np.load(path, mmap_mode="r")
  assert isinstance(on_disk, np.memmap)
  stages = [[_stage(x, ema=0.9)] for x in (rows, on_disk)]
  found = [
    _fit(tmp_path / str(i), stage).params["w"]["kernel"]
    for i, stage in enumerate(stages)
  ]
  np.testing.assert_array_equal(*found)
