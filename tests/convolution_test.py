"""Our convolution is XLA's, forwards and backwards."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppp_jax import devices, trees
from dppp_jax.models import convolution, winograd

_SIZE = (2, 9, 6)
_GROUPS = "feature_group_count"
_CASES = {
  "3x3": dict(kernel_size=(3, 3), padding=1),
  "strided": dict(kernel_size=(3, 3), padding=1, strides=2),
  "strided, below and right": dict(
    kernel_size=(3, 3), padding=((0, 1), (0, 1)), strides=2
  ),
  "dilated": dict(kernel_size=(3, 3), padding=2, kernel_dilation=2),
  "uneven": dict(kernel_size=(3, 2), padding=((2, 0), (0, 1)), strides=(1, 2)),
  "same": dict(kernel_size=(3, 3), strides=2),
  "valid": dict(kernel_size=(5, 5), padding="VALID"),
  "wide padding": dict(kernel_size=(3, 3), padding=4),
  "1x1": dict(kernel_size=(1, 1)),
  "1x1 strided": dict(kernel_size=(1, 1), strides=2),
  "kernel's height": dict(kernel_size=(9, 6), padding=0),
}


def _draw(channels, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(*_SIZE, channels)))


def _both(case, widths, x):
  """Returns outputs and gradients, (of nn.Conv, of ours)."""
  shape = (*case["kernel_size"], widths[0] // case.get(_GROUPS, 1), widths[1])
  rng = np.random.default_rng(1)
  params = {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[3])}

  def run(params, x):
    found = []
    for cls in (nn.Conv, convolution.Conv):
      net = cls(widths[1], param_dtype=x.dtype, **case)
      y, back = jax.vjp(lambda p, x: net.apply({"params": p}, x), params, x)
      dy = jnp.cos(jnp.arange(math.prod(y.shape), dtype=y.dtype) ** 2)
      found.append((y, back(dy.reshape(y.shape))))
    return found

  return jax.jit(run)(params, x)


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize(
  ("widths", "joined"), [((5, 3), None), ((3, 5), 9), ((5, 3), 0)]
)
def test_equals_flax(name, widths, joined, monkeypatch):
  if joined is not None:
    # What bfloat16 takes, at a precision that shows mistakes.
    monkeypatch.setattr(convolution, "convolve", _by_products)
    monkeypatch.setattr(convolution, "_JOINED", joined)
  with jax.enable_x64(True):
    theirs, ours = _both(_CASES[name], widths, _draw(widths[0]))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
      assert a.dtype == b.dtype == jnp.float64
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(9, 6), (8, 7), (1, 1), (2, 5), (4, 4)])
@pytest.mark.parametrize("padding", [1, ((0, 2), (3, 1)), ((2, 1), (2, 2))])
def test_winograd_equals_flax(size, padding, monkeypatch):
  monkeypatch.setattr(convolution, "_MANY", 3)
  used = []
  for name in ("convolve", "kernel_gradient"):
    plain = getattr(winograd, name)
    monkeypatch.setattr(
      winograd,
      name,
      lambda *words, f=plain: used.append(f.__name__) or f(*words),
    )
  case = dict(kernel_size=(3, 3), padding=padding)
  rng = np.random.default_rng(2)
  with jax.enable_x64(True):
    x = jnp.asarray(rng.normal(size=(2, *size, 5)))
    theirs, ours = _both(case, (5, 3), x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
  # The second convolution is the gradient of x, where it needs no cutting.
  is_small = padding == 1 or padding[0][1] == 1
  wanted = ["convolve", "kernel_gradient"]
  assert sorted({*used}) == wanted
  assert used.count("convolve") == (2 if is_small else 1)


def test_winograd_is_as_exact_as_the_plain_way_in_float32():
  rng = np.random.default_rng(3)
  x, kernel = rng.normal(size=(2, 12, 9, 64)), rng.normal(size=(3, 3, 64, 48))
  with jax.enable_x64(True):
    exact = np.asarray(_plain(jnp.asarray(x), jnp.asarray(kernel)))
  x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
  error = lambda y: np.linalg.norm(y - exact) / np.linalg.norm(exact)
  ours = winograd.convolve(x, kernel, ((1, 1), (1, 1)))
  assert error(ours) < 5e-7
  assert error(_plain(x, kernel)) > 5e-8  # It rounds, too.


def _plain(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_products(x, kernel, window):
  return convolution.by_products(x, kernel, window)


_by_products.defvjp(
  lambda x, k, window: (_by_products(x, k, window), (x, k)),
  convolution._backward,
)


@pytest.mark.parametrize("strides", [1, 2])
def test_bfloat16_sums_in_float32(strides):
  """Wide enough for products; what is rounded is operands and result."""
  case = dict(kernel_size=(3, 3), padding=1, strides=strides)
  widths = (64, 48)
  x = _draw(widths[0]).astype(jnp.bfloat16)
  net = convolution.Conv(widths[1], dtype=jnp.bfloat16, **case)
  params = net.init(jax.random.key(0), x)
  assert trees.flatten(params)["params/kernel"].shape == (3, 3, *widths)
  y, back = jax.vjp(net.apply, params, x)
  assert y.dtype == jnp.bfloat16
  exact = nn.Conv(widths[1], **case)
  rounded = jax.tree.map(
    lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params
  )
  wanted, wanted_back = jax.vjp(exact.apply, rounded, x.astype(jnp.float32))
  dy = jnp.ones(y.shape, y.dtype)
  pairs = zip(
    jax.tree.leaves((y, back(dy))),
    jax.tree.leaves((wanted, wanted_back(dy.astype(jnp.float32)))),
  )
  for ours, theirs in pairs:
    scale = float(jnp.abs(theirs).max())
    # Three decimals and a bit: a bfloat16 sum of 576 would miss by 10 %.
    assert jnp.abs(ours.astype(jnp.float32) - theirs).max() < 0.006 * scale


def test_other_devices_keep_xlas(monkeypatch):
  monkeypatch.setattr(convolution, "convolve", None)  # Would fail.
  net = convolution.Conv(3, (3, 3), padding=1)
  x = _draw(4).astype(jnp.float32)
  with devices.traced_for("gpu"):
    y, _ = net.init_with_output(jax.random.key(0), x)
  assert y.shape == (*_SIZE, 3)


def test_groups_are_left_to_xla():
  with jax.enable_x64(True):
    case = dict(kernel_size=(3, 3), padding=1, feature_group_count=2)
    theirs, ours = _both(case, (4, 6), _draw(4))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
