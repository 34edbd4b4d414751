"""Attention against torch's, whichever way it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax.models import attention, layers

_HEADS, _WIDTH = 3, 12


def _torch(x, rows, kernels, biases, mask):
  """Returns (y, gradients of x and of the weights) by torch's own function."""
  x, *weights = (
    None if y is None else torch.tensor(y, requires_grad=True)
    for y in (x, *kernels, *biases)
  )
  maps = [
    torch.nn.functional.linear(y, kernel.T, bias)
    for y, kernel, bias in zip(
      (x[:, :rows], x, x), weights[:3], weights[3:], strict=True
    )
  ]
  split = lambda y: y.unflatten(-1, (_HEADS, -1)).transpose(1, 2)
  y = torch.nn.functional.scaled_dot_product_attention(
    *map(split, maps),
    attn_mask=None if mask is None else torch.tensor(mask)[:, None],
  )
  y = y.transpose(1, 2)
  count = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape)
  (y * count.cos()).sum().backward()
  leaves = [x, *(w for w in weights if w is not None)]
  return y.detach().numpy(), [leaf.grad.numpy() for leaf in leaves]


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("halved", [False, True])
def test_attention_of_linear_maps_is_torchs(
  rows, bias, masked, halved, monkeypatch
):
  monkeypatch.setattr(attention, "_HALVED_FROM", 1 if halved else 1 << 22)
  rng = np.random.default_rng(rows)
  x = rng.normal(size=(3, 7, 5))
  kernels = rng.normal(size=(3, 5, _WIDTH))
  biases = rng.normal(size=(3, _WIDTH)) if bias else [None] * 3
  mask = None
  if masked:
    mask = rng.random((3, rows, 7)) < 0.5
    mask[..., 3] = True

  def ours(x, weights):
    linear = lambda: layers.Linear(
      x.shape[-1], _WIDTH, use_bias=bias, dtype=jnp.float64
    )
    query, key, value = (linear().bind({"params": w}) for w in weights)
    query = query(x[:, :rows]).reshape(3, rows, _HEADS, -1)
    return attention.of_linear(query, x, key, value, mask=mask)

  def scored(x, weights):
    y = ours(x, weights)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

  with jax.enable_x64(True):
    weights = [
      {"kernel": jnp.asarray(k)} | ({"bias": jnp.asarray(b)} if bias else {})
      for k, b in zip(kernels, biases, strict=True)
    ]
    (_, y), (dx, dw) = jax.value_and_grad(scored, (0, 1), has_aux=True)(
      jnp.asarray(x), weights
    )
    text = str(jax.make_jaxpr(ours)(jnp.asarray(x), weights))
  # Keys [3, 7, 12] are made where many rows ask, and only there.
  assert ("f64[3,7,12]" in text) == (rows == 7)
  # Of three examples the first, and the other two: their logits.
  for half in ("f64[1,3,7,7]", "f64[2,3,7,7]"):
    assert (half in text) == (halved and rows == 7)
  expected, grads = _torch(x, rows, kernels, biases, mask)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
  found = [dx, *(w["kernel"] for w in dw)]
  found += [w["bias"] for w in dw] if bias else []
  for one, other in zip(found, grads, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("masks", [0, 1, 5])
@pytest.mark.parametrize("halved", [False, True])
def test_causal_and_masked_attention_is_torchs(masks, halved, monkeypatch):
  monkeypatch.setattr(attention, "_HALVED_FROM", 1 if halved else 1 << 22)
  rng = np.random.default_rng(masks)
  query, key, value = rng.normal(size=(3, 5, 4, _HEADS, 2))
  mask = rng.random((masks, 4, 4)) < 0.5
  mask[..., 0] = True
  with jax.enable_x64(True):
    y = attention.dot_product(
      *map(jnp.asarray, (query, key, value)),
      causal=not masks,
      mask=jnp.asarray(mask) if masks else None,
    )
  expected = torch.nn.functional.scaled_dot_product_attention(
    *(torch.tensor(x).transpose(1, 2) for x in (query, key, value)),
    attn_mask=torch.tensor(mask)[:, None] if masks else None,
    is_causal=not masks,
  )
  np.testing.assert_allclose(
    y, expected.transpose(1, 2).numpy(), rtol=0, atol=1e-12
  )


def test_few_products_are_left_in_one_stack():
  rows = lambda n: jax.ShapeDtypeStruct((2, n, 2, 64), jnp.float32)
  split = lambda n: (
    "split"
    in str(jax.make_jaxpr(lambda x: attention.dot_product(x, x, x))(rows(n)))
  )
  assert not split(127)
  assert split(128)  # 2 examples x 2 heads x 128 x 128 x 64 = 2^22.
