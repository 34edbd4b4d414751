"""The loop: exact resume, one compilation, frozen leaves, bad losses."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppp_jax import checkpoints, errors, logs, trees
from dppp_jax.data import source as source_lib
from dppp_jax.data import transforms
from dppp_jax.train import loop
from dppp_jax.train import stage as stage_lib
from dppp_jax.train import step as step_lib

_NUM_IDS, _PER_ID = 6, 5


def make_source(seed=0, per_id=_PER_ID):
  rng = np.random.default_rng(seed)
  pictures = rng.integers(0, 255, (_NUM_IDS * per_id, 8, 4, 3), np.uint8)
  pids = np.repeat(np.arange(_NUM_IDS) * 7 + 3, per_id)
  return source_lib.Arrays(pictures, pids)


def make_stages(epochs=4, explode_at=None):
  def init(params, collections, rng):
    del params, collections
    kernel = jax.random.normal(rng, (96, _NUM_IDS)) * 0.1
    params = {
      "head": {"kernel": kernel, "bias": jnp.zeros(_NUM_IDS)},
      "fixed": {"kernel": jnp.ones(3)},
    }
    return params, {"batch_stats": {"seen": jnp.zeros(())}}

  def loss(params, collections, batch, rng):
    x = batch["image"].reshape(len(batch["image"]), -1)
    x = x * jax.random.bernoulli(rng, 0.9, x.shape)  # Dropout: uses the rng.
    logits = x @ params["head"]["kernel"] + params["head"]["bias"][None]
    value = (
      -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(x)), batch["label"]])
      * params["fixed"]["kernel"][0]
    )
    seen = collections["batch_stats"]["seen"] + len(x)
    if explode_at is not None:
      value = jnp.where(seen > explode_at, jnp.nan, value)
    aux = stage_lib.Aux({"seen": seen}, {"batch_stats": {"seen": seen}})
    return value, aux

  def keep(params, collections, rng):
    del rng
    return params, collections

  rules = (("head/.*", 1e-2), (".*", None))
  augment = transforms.Augment(flip=0.5, pad=1, contrast=(0.5, 1.5))
  common = dict(loss=loss, rules=rules, epochs=epochs, augment=augment)
  return [
    stage_lib.Stage(
      name="first", init=init, batches=stage_lib.PK(3, 2), **common
    ),
    stage_lib.Stage(
      name="second",
      init=keep,
      batches=stage_lib.Shuffled(10),
      schedule=stage_lib.step_decay((3, 4)),
      **common,
    ),
  ]


def make_options(**kwargs):
  defaults = dict(
    image_size=(8, 4),
    log_every=2,
    checkpoint_every=3,
    num_threads=1,
  )
  return loop.Options(**(defaults | kwargs))


def fit(workdir, **kwargs):
  stages = kwargs.pop("stages", None) or make_stages()
  source = kwargs.pop("source", None) or make_source()
  evaluator = kwargs.pop("evaluator", None)
  options = make_options(**kwargs)
  return loop.fit(
    stages,
    source,
    workdir=workdir,
    options=options,
    evaluator=evaluator,
  )


def assert_same(a, b):
  a, b = trees.flatten(a), trees.flatten(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))


def test_learns_and_leaves_the_frozen_leaf_alone(tmp_path):
  outcome = fit(tmp_path)
  lines = logs.read(tmp_path / "metrics.jsonl")
  assert outcome.finished
  assert lines[-1]["loss"] < lines[0]["loss"]
  np.testing.assert_array_equal(outcome.params["fixed"]["kernel"], np.ones(3))
  decayed = [x["lr_factor"] for x in lines if x["stage"] == "second"]
  np.testing.assert_allclose(sorted(set(decayed)), [0.01, 0.1, 1.0], rtol=1e-6)


def test_both_placements_give_the_same_parameters(tmp_path):
  device = fit(tmp_path / "device", placement="device")
  host = fit(tmp_path / "host", placement="host")
  assert_same(device.params, host.params)


def test_finished_run_trains_no_further(tmp_path):
  first = fit(tmp_path)
  again = fit(tmp_path)
  assert again.step == first.step
  assert_same(first.params, again.params)


def test_damaged_newest_checkpoint_falls_back(tmp_path):
  whole = fit(tmp_path)
  steps = sorted(
    int(p.name)
    for p in (tmp_path / "checkpoints").iterdir()
    if p.name.isdigit()
  )
  newest = tmp_path / "checkpoints" / str(steps[-1])
  for path in newest.rglob("*"):
    if path.is_file() and path.stat().st_size > 0:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  again = fit(tmp_path)
  assert_same(whole.params, again.params)
  step, params = checkpoints.restore_model(tmp_path)
  assert step == whole.step
  assert_same(whole.params, params)


def test_all_checkpoints_damaged_is_one_clear_error(tmp_path):
  fit(tmp_path)
  for path in (tmp_path / "checkpoints").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  before = sorted((tmp_path / "checkpoints").iterdir())
  for _ in range(2):  # The same again: it does not become a new run.
    with pytest.raises(errors.UserError, match="none of the checkpoints"):
      fit(tmp_path)
  assert sorted((tmp_path / "checkpoints").iterdir()) == before


def test_step_is_traced_and_compiled_once_a_stage(tmp_path, monkeypatch):
  traces = []
  original = step_lib.make_step

  def counting(*args, **kwargs):
    step_fn, names = original(*args, **kwargs)

    def traced(*xs):
      traces.append(1)
      return step_fn(*xs)

    return traced, names

  monkeypatch.setattr(step_lib, "make_step", counting)
  fit(tmp_path, stages=make_stages(epochs=6))
  assert len(traces) == 2  # Two stages, whatever their steps and epochs.


def test_loss_that_is_not_finite_names_step_and_pids(tmp_path):
  stages = make_stages(explode_at=20)
  with pytest.raises(errors.UserError) as caught:
    fit(tmp_path, stages=stages)
  message = str(caught.value)
  assert "not finite at step 3" in message  # 6 seen a step: 24 > 20.
  pids = json.loads(message.split("pids of the batch: ")[1].split("]")[0] + "]")
  assert len(pids) == 3
  assert all((pid - 3) % 7 == 0 for pid in pids)
  assert "last good metrics" in message


def test_evaluator_is_called_and_its_best_checkpoint_kept(tmp_path):
  scores = iter([0.9, 0.1])
  seen = []

  def evaluator(stage, params):
    seen.append((stage, params["head"]["kernel"].shape))
    return {"mAP": next(scores)}

  loop.fit(
    make_stages(),
    make_source(),
    workdir=tmp_path,
    options=make_options(best_metric="mAP", checkpoint_every=2),
    evaluator=evaluator,
  )
  assert [stage for stage, _ in seen] == ["first", "second"]
  lines = [x for x in logs.read(tmp_path / "metrics.jsonl") if "mAP" in x]
  kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
  assert [x["mAP"] for x in lines] == [0.9, 0.1]
  assert lines[0]["step"] in kept  # The best one, though far from newest.


def test_best_checkpoint_outlives_a_restart(tmp_path):
  scores = iter([0.9, 0.2, 0.3, 0.1, 0.15, 0.12])
  evaluator = lambda stage, params: {"mAP": next(scores)}
  measured = lambda: logs.by_step(tmp_path, "mAP")
  for epochs in (3, 6):
    fit(
      tmp_path,
      stages=make_stages(epochs=epochs)[:1],
      evaluator=evaluator,
      best_metric="mAP",
      eval_every=1,
      checkpoint_every=1000,
    )
  assert list(measured().values()) == [0.9, 0.2, 0.3, 0.1, 0.15, 0.12]
  kept = checkpoints.steps(tmp_path)
  assert kept == sorted([*list(measured())[-2:], min(measured())])[::-1]


def test_failing_evaluation_loses_no_step_and_is_made_up_for(tmp_path):
  def failing(stage, params):
    raise errors.UserError("a benchmark's picture is damaged")

  def measure(folder, evaluator):
    return fit(folder, evaluator=evaluator, best_metric="mAP")

  score = lambda stage, params: {"mAP": float(params["head"]["bias"].sum())}
  whole = measure(tmp_path / "whole", score)
  with pytest.raises(errors.UserError, match="damaged"):
    measure(tmp_path / "cut", failing)
  (end_of_first,) = [
    step
    for step in logs.by_step(tmp_path / "whole", "mAP")
    if step != whole.step
  ]
  assert checkpoints.steps(tmp_path / "cut")[0] == end_of_first
  assert_same(whole.params, measure(tmp_path / "cut", score).params)
  found = [logs.by_step(tmp_path / x, "mAP") for x in ("whole", "cut")]
  assert found[0] == found[1] and len(found[0]) == 2
  measure(tmp_path / "cut", failing)  # Nothing is measured twice.


@pytest.mark.parametrize(
  "other", [make_source(per_id=7), make_source(seed=1)], ids=["more", "pixels"]
)
def test_another_dataset_is_refused(tmp_path, other):
  fit(tmp_path)
  with pytest.raises(errors.UserError, match="another dataset"):
    fit(tmp_path, source=other)
  assert not list((tmp_path / "checkpoints").glob("damaged-*"))


def test_checkpoints_that_name_no_dataset_go_on(tmp_path):
  first = fit(tmp_path)
  for path in (tmp_path / "checkpoints").glob("*/data/*"):
    if '"source"' in path.read_text():
      data = json.loads(path.read_text())
      del data["source"]
      path.write_text(json.dumps(data))
  assert fit(tmp_path).step == first.step
  # What they tell is where their stages began.
  with pytest.raises(errors.UserError, match="other lengths"):
    fit(tmp_path, source=make_source(per_id=7))


def test_checkpoint_beyond_the_configuration_is_refused(tmp_path):
  fit(tmp_path)
  with pytest.raises(errors.UserError, match="beyond this configuration"):
    fit(tmp_path, stages=make_stages(epochs=1))


_CHILD = """
import sys
sys.path.insert(0, {tests!r})
import loop_test
outcome = loop_test.fit({workdir!r}, stages=loop_test.make_stages(epochs=60))
print("finished", outcome.finished)
"""


def _start(workdir):
  code = _CHILD.format(
    tests=str(pathlib.Path(__file__).parent), workdir=str(workdir)
  )
  return subprocess.Popen(
    [sys.executable, "-c", code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )


def _wait_for_lines(workdir, process, count):
  path = pathlib.Path(workdir) / "metrics.jsonl"
  while process.poll() is None:
    if path.exists() and len(path.read_text().splitlines()) >= count:
      return
    time.sleep(0.02)


def test_kill_and_terminate_then_rerun_gives_the_same_bits(tmp_path):
  whole = fit(tmp_path / "whole", stages=make_stages(epochs=60))
  workdir = tmp_path / "killed"
  for lines, how in ((9, signal.SIGKILL), (25, signal.SIGTERM)):
    process = _start(workdir)
    _wait_for_lines(workdir, process, lines)
    process.send_signal(how)
    out, err = process.communicate(timeout=120)
    if how == signal.SIGTERM and process.returncode == 0:
      assert "finished False" in out or "finished True" in out, err
  process = _start(workdir)
  out, err = process.communicate(timeout=120)
  assert "finished True" in out, err
  step, params = checkpoints.restore_model(workdir)
  assert step == whole.step
  assert_same(whole.params, params)
  lines = logs.read(workdir / "metrics.jsonl")
  steps = [x["step"] for x in lines]
  assert steps == sorted(set(steps))
