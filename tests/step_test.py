"""The step of a stage: what its compilation makes of its state."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppp_jax.train import optim
from dppp_jax.train import stage as stage_lib
from dppp_jax.train import step as step_lib

_DEPTH, _WIDTH = 5, 64


@pytest.fixture(scope="module")
def step():
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


def test_state_is_updated_where_it_lies(step):
  step_fn, arguments = step
  text = step_lib.compile_ahead(step_fn, *arguments).as_text()
  kernel = rf"f32\[{_WIDTH},{_WIDTH}\]\S*"
  assert len(re.findall(rf"{kernel} parameter\(", text)) >= 3 * _DEPTH
  assert not re.findall(rf"{kernel} copy\(", text)
  # A parameter and its moments in one loop, `process.fuse_outputs`.
  three = rf"\({kernel}, {kernel}, {kernel}\) fusion\("
  assert len(re.findall(three, text)) == _DEPTH


def test_compiled_step_computes_what_the_plain_one_does(step):
  step_fn, (state, *rest) = step
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
