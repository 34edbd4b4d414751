"""The step of a stage: what its compilation makes of its state."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppp_jax import process
from dppp_jax.train import optim
from dppp_jax.train import stage as stage_lib
from dppp_jax.train import step as step_lib

OPTIMISED = True  # The text of programs is looked at.
_DEPTH, _WIDTH = 5, 64


def make():
  """Returns (step function, its arguments) of a stack of layers."""

  def loss(params, collections, batch, rng):
    del rng
    x = batch["features"]
    for i in range(_DEPTH):
      x = x + jax.nn.relu(x @ params[f"layers_{i}"]["kernel"])
    value = jnp.mean(jnp.square(x[:, 0] - batch["label"]))
    return value, stage_lib.Aux({}, collections)

  stage = stage_lib.Stage(
    name="fit",
    init=None,
    loss=loss,
    rules=((".*", 1e-2),),
    batches=stage_lib.Shuffled(8),
    epochs=1,
    augment=None,
    weight_decay=1e-4,
  )
  rng = np.random.default_rng(0)
  params = {
    f"layers_{i}/kernel": rng.normal(0, 0.1, (_WIDTH, _WIDTH)).astype("f")
    for i in range(_DEPTH)
  }
  rates = dict.fromkeys(params, 1e-2)
  half = (0.5, 0.5, 0.5)
  step_fn, _ = step_lib.make_step(stage, rates, seed=0, mean=half, std=half)
  state = (params, {}, step_lib.make_tx(stage, rates).init(params))
  dataset = {
    "features": rng.normal(size=(8, _WIDTH)).astype("f"),
    "label": np.arange(8, dtype=np.float32),
  }
  feed = {"index": np.arange(8)[::-1].copy()}
  return step_fn, (state, {}, dataset, feed, np.int32(0), np.float32(1))


@pytest.fixture(scope="module", params=[False, True])
def programs(request, tmp_path_factory):
  """Returns (one loop, XLA's text) of a step of a process of its own."""
  path = tmp_path_factory.mktemp("step") / "program.txt"
  lines = (
    "import pathlib, sys; sys.path.insert(0, sys.argv[1])",
    "from dppp_jax import process",
    "assert process.fuse_outputs()" if request.param else "",
    "import step_test",
    "step_fn, arguments = step_test.make()",
    "program = step_test.step_lib.compile_ahead(step_fn, *arguments)",
    "pathlib.Path(sys.argv[2]).write_text(program.as_text())",
  )
  here = pathlib.Path(__file__).parent
  command = [sys.executable, "-c", "\n".join(lines), str(here), str(path)]
  subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": ""})
  return request.param, path.read_text()


def test_state_is_updated_where_it_lies(programs):
  one_loop, text = programs
  kernel = rf"f32\[{_WIDTH},{_WIDTH}\]\S*"
  assert len(re.findall(rf"{kernel} parameter\(", text)) >= 3 * _DEPTH
  assert not re.findall(rf"{kernel} copy\(", text)
  # A parameter and both its moments.
  three = rf"\({kernel}, {kernel}, {kernel}\) fusion\("
  assert len(re.findall(three, text)) == one_loop * _DEPTH


@pytest.mark.parametrize("one_loop", [False, True])
def test_compiled_step_computes_what_the_plain_one_does(monkeypatch, one_loop):
  monkeypatch.setenv("XLA_FLAGS", "")
  if one_loop:  # XLA has read its flags already: only the formulas change.
    assert process.fuse_outputs()
  step_fn, (state, *rest) = make()
  compiled = step_lib.compile_ahead(step_fn, state, *rest)
  want, got = state, jax.device_put(state)
  for _ in range(3):
    want, expected = step_fn(want, *rest)
    got, values = compiled(got, *rest)
    np.testing.assert_allclose(values, expected, rtol=2e-6)
  for name, value in want[0].items():
    np.testing.assert_allclose(got[0][name], value, rtol=2e-6, atol=1e-6)
  before, after = optim.norm(state[0]), optim.norm(got[0])
  assert abs(float(after - before)) > 1e-3  # It moved at all.
