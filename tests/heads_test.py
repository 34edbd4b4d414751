"""BNNeck and projector against torch.nn, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax.models import heads

_B, _D, _K = 6, 5, 7


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def tensor(x):
  return torch.tensor(np.asarray(x, np.float64))


def features(seed=0, shape=(_B, _D)):
  return np.random.default_rng(seed).normal(2.0, 3.0, size=shape)


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_torchs(bias):
  """Three training steps, gradients, then test mode: same statistics."""
  rng = np.random.default_rng(1)
  oracle = torch.nn.BatchNorm1d(_D).double()
  module = heads.BatchNorm(use_bias=bias)
  params = {"scale": rng.normal(size=_D)}
  oracle.weight.data = tensor(params["scale"])
  if bias:
    params["bias"] = rng.normal(size=_D)
    oracle.bias.data = tensor(params["bias"])
  stats = module.init(jax.random.key(0), features(), train=True)["batch_stats"]
  assert np.array_equal(stats["mean"], np.zeros(_D))
  assert np.array_equal(stats["var"], np.ones(_D))
  apply = lambda x, stats: module.apply(
    {"params": params, "batch_stats": stats},
    x,
    train=True,
    mutable=["batch_stats"],
  )
  for seed in range(3):
    x = features(seed)
    given = tensor(x).requires_grad_()
    expected = oracle(given)
    expected.square().sum().backward()
    y, updates = apply(x, stats)
    np.testing.assert_allclose(y, expected.detach(), rtol=1e-9, atol=1e-12)
    grad = jax.grad(lambda x, s=stats: jnp.square(apply(x, s)[0]).sum())(x)
    np.testing.assert_allclose(grad, given.grad, rtol=1e-6, atol=1e-9)
    stats = updates["batch_stats"]
  np.testing.assert_allclose(stats["mean"], oracle.running_mean, rtol=1e-12)
  np.testing.assert_allclose(stats["var"], oracle.running_var, rtol=1e-12)
  x = features(9)
  y = module.apply({"params": params, "batch_stats": stats}, x, train=False)
  expected = oracle.eval()(tensor(x)).detach()
  np.testing.assert_allclose(y, expected, rtol=1e-9)


def test_neck_classifies_the_normalised_feature():
  module = heads.BNNeck(_K)
  x = features()
  variables = module.init(jax.random.key(0), x, train=True)
  assert set(variables["params"]["norm"]) == {"scale"}  # No shift to learn.
  assert set(variables["params"]["classifier"]) == {"kernel"}
  kernel = variables["params"]["classifier"]["kernel"]
  assert 3e-4 < np.std(kernel) < 3e-3
  (normed, logits), _ = module.apply(
    variables, x, train=True, mutable=["batch_stats"]
  )
  expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
  np.testing.assert_allclose(normed, expected, rtol=1e-9)
  np.testing.assert_allclose(logits, expected @ kernel, rtol=1e-9)


def test_neck_of_bfloat16_features_is_float32():
  with jax.enable_x64(False):
    x = jnp.asarray(features(), jnp.bfloat16)
    module = heads.BNNeck(_K)
    variables = module.init(jax.random.key(0), x, train=False)
    normed, logits = module.apply(variables, x, train=False)
  assert normed.dtype == logits.dtype == jnp.float32


def test_linear_begins_as_torchs():
  module = heads.linear(64, 300, dtype=jnp.float64)
  params = module.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
  for x in (params["kernel"], params["bias"]):
    assert np.abs(x).max() <= 1 / 8
    np.testing.assert_allclose(np.std(x), 1 / 8 / 3**0.5, rtol=0.1)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
  ("act", "oracle"), [("relu", torch.nn.ReLU()), ("gelu", torch.nn.GELU())]
)
def test_projector(residual, act, oracle):
  x = features(shape=(_B, 4))
  module = heads.Projector(
    4, hidden=9, act=act, residual=residual, dtype=jnp.float64
  )
  params = module.init(jax.random.key(0), x)["params"]
  first, second = torch.nn.Linear(4, 9), torch.nn.Linear(9, 4)
  for layer, name in ((first, "fc1"), (second, "fc2")):
    layer.weight.data = tensor(params[name]["kernel"]).T
    layer.bias.data = tensor(params[name]["bias"])
  expected = second(oracle(first(tensor(x)))).detach().numpy()
  expected = expected + x * residual
  y = module.apply({"params": params}, x)
  np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-12)


def test_projector_has_the_papers_widths():
  shapes = jax.eval_shape(
    heads.Projector(512).init, jax.random.key(0), jnp.zeros((1, 512))
  )["params"]
  assert shapes["fc1"]["kernel"].shape == (512, 512)
  assert shapes["fc2"]["kernel"].shape == (512, 512)
