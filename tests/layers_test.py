"""The pieces whose gradients are written by hand, against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax.models import layers


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def _close(ours, theirs):
  np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 11)])
def test_layer_norm_is_torchs(rng, shape):
  x, dy = rng.normal(3.0, 2.0, (2, *shape))
  scale, bias = rng.standard_normal((2, shape[-1]))
  with jax.enable_x64(True):
    norm = layers.LayerNorm(epsilon=1e-3)
    apply = lambda x, scale, bias: norm.apply(
      {"params": {"scale": scale, "bias": bias}}, x
    )
    y, pull = jax.vjp(apply, *map(jnp.asarray, (x, scale, bias)))
    grads = pull(jnp.asarray(dy))
  given = [torch.tensor(z, requires_grad=True) for z in (x, scale, bias)]
  theirs = torch.nn.functional.layer_norm(
    given[0], shape[-1:], *given[1:], 1e-3
  )
  theirs.backward(torch.tensor(dy))
  _close(y, theirs)
  for ours, leaf in zip(grads, given, strict=True):
    _close(ours, leaf.grad)


def test_layer_norm_of_bfloat16_is_float32(rng):
  x = jnp.asarray(rng.normal(100.0, 1.0, (2, 64)), jnp.bfloat16)
  norm = layers.LayerNorm()
  y = norm.apply(norm.init(jax.random.key(0), x), x)
  assert y.dtype == jnp.float32
  wide = np.asarray(x, np.float64)
  wide -= wide.mean(-1, keepdims=True)
  wide /= np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(y, wide, atol=1e-5)


def test_layer_norm_for_products_in_bfloat16_sums_in_float32(rng):
  """Only what comes out, and the factors of `scale`, are rounded."""
  x, dy = rng.normal(9.0, 2.0, (2, 3, 40, 64)).astype(np.float32)
  scale, bias = rng.standard_normal((2, 64)).astype(np.float32)
  dy = jnp.asarray(dy, jnp.bfloat16)
  norm = layers.LayerNorm(dtype=jnp.bfloat16)
  apply = lambda x, scale, bias: norm.apply(
    {"params": {"scale": scale, "bias": bias}}, x
  )

  @jax.jit
  def both(x, scale, bias):
    y, pull = jax.vjp(apply, x, scale, bias)
    return y, *pull(dy)

  y, *grads = both(x, scale, bias)
  assert y.dtype == jnp.bfloat16
  given = [
    torch.tensor(z, dtype=torch.float64, requires_grad=True)
    for z in (x, scale, bias)
  ]
  theirs = torch.nn.functional.layer_norm(given[0], (64,), *given[1:], 1e-5)
  theirs.backward(torch.tensor(np.asarray(dy, np.float64)))
  pairs = [(y, theirs.detach())]
  pairs += [(g, leaf.grad) for g, leaf in zip(grads, given, strict=True)]
  for (ours, wanted), most in zip(pairs, (3e-3, 2e-6, 3e-3, 2e-6), strict=True):
    error = np.linalg.norm(np.asarray(ours, np.float64) - wanted.numpy())
    assert error < most * np.linalg.norm(wanted.numpy())


def test_product_and_its_gradients_are_numpys(rng):
  x, kernel = rng.standard_normal((2, 3, 5)), rng.standard_normal((5, 4))
  dy = rng.standard_normal((2, 3, 4))
  with jax.enable_x64(True):
    y, pull = jax.vjp(layers.product, jnp.asarray(x), jnp.asarray(kernel))
    dx, dk = pull(jnp.asarray(dy))
  np.testing.assert_allclose(y, x @ kernel, atol=1e-12)
  np.testing.assert_allclose(dx, dy @ kernel.T, atol=1e-12)
  expected = sum(a.T @ b for a, b in zip(x, dy, strict=True))
  np.testing.assert_allclose(dk, expected, atol=1e-12)


@pytest.mark.parametrize("use_bias", [True, False])
def test_activation_of_a_linear_layer_is_computed_anew(rng, use_bias):
  x, dy = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 7))
  names = ("kernel", "bias")[: 1 + use_bias]
  params = [rng.standard_normal(s) for s in ((5, 7), (7,))[: len(names)]]
  with jax.enable_x64(True):
    linear = layers.Linear(5, 7, use_bias=use_bias, dtype=jnp.float64)
    act = layers.activation("quick_gelu")
    apply = lambda x, *params: linear.apply(
      {"params": dict(zip(names, params, strict=True))}, x, act
    )
    y, pull = jax.vjp(apply, *map(jnp.asarray, (x, *params)))
    grads = pull(jnp.asarray(dy))
  # Neither the activation's input nor its slope is kept beside the product.
  assert sum(leaf.shape == y.shape for leaf in jax.tree.leaves(pull)) == 1
  given = [torch.tensor(z, requires_grad=True) for z in (x, *params)]
  theirs = given[0] @ given[1]
  theirs = theirs + given[2] if use_bias else theirs
  theirs = theirs * torch.sigmoid(1.702 * theirs)
  theirs.backward(torch.tensor(dy))
  _close(y, theirs)
  for ours, leaf in zip(grads, given, strict=True):
    _close(ours, leaf.grad)
