"""What a GPU runs, traced without one: the branches, and their gradients."""

import diffusers_twins as twins
import jax
from jax._src.cudnn import fused_attention_stablehlo
import jax.numpy as jnp
import numpy as np
import pytest
import torch_clip

from dppp_jax import devices
from dppp_jax.models import (
  attention,
  clip,
  controlnet,
  controlnet_union,
  u2net,
  unet,
  unet_config,
  vae,
)

# Rows of the query and of keys and values, and whether causal.
_LENGTHS = [
  (129, 129, False),  # A picture of 256 x 128 pixels.
  (130, 130, False),
  (33, 33, False),
  (77, 77, True),  # A prompt.
  (76, 76, True),
  (36, 77, False),  # Latents that look at a prompt.
  (77, 36, False),
  (3, 1, False),
]


@pytest.fixture
def gpu(monkeypatch):
  """Traces for a GPU; JAX asks cuDNN for its version, and finds none here."""
  monkeypatch.setattr(
    fused_attention_stablehlo, "check_cudnn_version", lambda: 91900
  )
  with devices.traced_for("gpu"):
    yield


def _structs(query, keys, dtype=jnp.bfloat16):
  shape = lambda rows: jax.ShapeDtypeStruct((2, rows, 3, 16), dtype)
  return shape(query), shape(keys), shape(keys)


def _squares(tree):
  return sum(
    jnp.sum(jnp.square(x.astype(jnp.float32)))
    for x in jax.tree.leaves(tree)
    if x is not None
  )


def _gradient(call, *inputs, remat=False):
  """Returns the text of the gradient of all inputs of a call that scores."""
  score = lambda *args: _squares(call(*args))
  score = jax.checkpoint(score) if remat else score
  numbers = tuple(range(len(inputs)))
  traced = jax.make_jaxpr(jax.grad(score, numbers))(*inputs)
  found = jax.tree.leaves(traced.out_avals)
  shapes = lambda leaves: [(x.shape, x.dtype) for x in leaves]
  assert shapes(found) == shapes(jax.tree.leaves(inputs))
  return str(traced)


def _count(text):
  """Returns how often cuDNN attends, forward and backward."""
  counts = [
    text.count(f"dot_product_attention_{way}_wrapper[")
    for way in ("fwd", "bwd")
  ]
  return tuple(counts)


@pytest.mark.parametrize(("query", "keys", "causal"), _LENGTHS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_at_any_length(gpu, query, keys, causal, dtype):
  call = lambda *x: attention.dot_product(*x, causal=causal)
  inputs = _structs(query, keys, dtype)
  assert _count(_gradient(call, *inputs)) == (1, 1)
  assert _count(_gradient(call, *inputs, remat=True)) == (2, 1)
  assert _count(str(jax.make_jaxpr(call)(*inputs))) == (1, 0)


@pytest.mark.parametrize(("query", "keys", "causal"), _LENGTHS)
def test_gradients_in_a_loop(gpu, query, keys, causal):
  def call(query, key, value):
    body = jax.checkpoint(
      lambda x, _: (attention.dot_product(x, key, value, causal=causal), None)
    )
    return jax.lax.scan(body, query, length=3)[0]

  assert _count(_gradient(call, *_structs(query, keys)))[1] == 1


def test_nothing_is_padded_that_is_not_differentiated(gpu):
  call = lambda *x: attention.dot_product(*x)
  assert " pad[" not in str(jax.make_jaxpr(call)(*_structs(129, 129)))
  assert " pad[" not in _gradient(call, *_structs(130, 36))
  assert " pad[" in _gradient(call, *_structs(130, 35))


@pytest.mark.parametrize(
  ("change", "is_fused"),
  [
    ({}, True),
    (dict(dtype=jnp.float32), False),
    (dict(n=1), False),
    (dict(d=20), False),
    (dict(d=256), False),
    (dict(mask=True), False),
    (dict(platform="cpu"), False),
  ],
)
def test_what_is_left_to_plain_products(gpu, change, is_fused):
  case = dict(dtype=jnp.bfloat16, n=9, d=64, mask=False, platform="gpu")
  case |= change
  x = jax.ShapeDtypeStruct((2, case["n"], 3, case["d"]), case["dtype"])
  mask = jnp.ones((1, case["n"], case["n"]), bool) if case["mask"] else None
  call = lambda *x: attention.dot_product(*x, mask=mask)
  with devices.traced_for(case["platform"]):
    assert _count(_gradient(call, x, x, x)) == ((1, 1) if is_fused else (0, 0))


@pytest.mark.parametrize(("query", "keys", "causal"), _LENGTHS)
def test_padded_gradients_are_those_of_plain_attention(query, keys, causal):
  """By the implementation that any device has, with the same arguments."""
  rng = np.random.default_rng(query)
  inputs = [
    0.5 * rng.normal(size=(2, rows, 3, 16)) for rows in (query, keys, keys)
  ]
  weights = rng.normal(size=inputs[0].shape)

  def gradients(call, dtype):
    """Returns the output, and the gradients of its weighted sum.

    Not the sum: the terms of a sum near zero lose digits to each other.
    """

    def run(*x):
      output, pull = jax.vjp(call, *x)
      return output, pull(jnp.asarray(weights, dtype))

    x = [jnp.asarray(x, dtype) for x in inputs]
    return jax.tree.map(np.asarray, jax.jit(run)(*x))

  fused = lambda *x: attention.fused(*x, causal, "xla")
  with jax.enable_x64(True):
    plain = lambda *x: attention.dot_product(*x, causal=causal)
    wanted = gradients(plain, jnp.float64)
  for one, other in zip(
    jax.tree.leaves(gradients(fused, jnp.float32)),
    jax.tree.leaves(wanted),
    strict=True,
  ):
    # No part of a norm: for one key the gradient of the query is zero.
    error = np.linalg.norm(one - other)
    assert error < 2e-6 * np.linalg.norm(other) + 1e-5 * (keys == 1)


_CONTROL = twins.XL | dict(
  block_out_channels=(32, 64),
  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
  transformer_layers_per_block=(1, 2),
  attention_head_dim=(1, 2),
  conditioning_embedding_out_channels=(4, 8, 12),
)
del _CONTROL["up_block_types"]
_UNION = dict(
  num_control_type=4, num_trans_channel=32, num_proj_channel=32
) | dict(num_trans_head=4, num_trans_layer=2)


def _assert_traced(net, params, *args, attentions, **kwargs):
  """Asserts that a network's gradient is traced, with so many attentions."""
  call = lambda params, *args: net.apply({"params": params}, *args, **kwargs)
  found = _count(_gradient(lambda p: call(p, *args), params))
  assert found[1] == attentions, found
  assert found[0] >= attentions, found  # More where they are computed again.


@pytest.mark.parametrize("remat", [False, True])
def test_towers_of_clip(gpu, remat):
  heads = dict(text=dict(num_attention_heads=3))  # Of 8 channels.
  config = clip.Config.from_hf(torch_clip.hf_config(**heads).to_dict())
  params = clip.param_shapes(config)
  vision = clip.VisionTower(config.vision, remat=remat, dtype=jnp.bfloat16)
  images = np.zeros((2, 32, 32, 3), np.float32)  # 17 tokens.
  # The last block asks for the class token alone.
  _assert_traced(vision, params, images, attentions=2)
  _assert_traced(vision, params, images, patch_blocks=(3,), attentions=3)
  text = clip.TextTower(config.text, dtype=jnp.bfloat16)
  _assert_traced(text, params, np.zeros((2, 13), np.int32), attentions=2)


@pytest.mark.parametrize("stack_from", [0, 2])
def test_unet_and_controlnets(gpu, stack_from):
  options = dict(dtype=jnp.bfloat16, stack_from=stack_from)
  config = unet.Config.from_hf(twins.XL)
  params = unet.param_shapes(config, stack_from=stack_from)
  args, conditions = twins.inputs(config)
  args = [np.asarray(x, np.float32) for x in args]
  conditions = {k: np.asarray(v, np.float32) for k, v in conditions.items()}
  net = unet.UNet(config, remat=True, **options)
  # Eleven transformer blocks attend twice; four pairs of them are loops.
  _assert_traced(
    net, params, *args, **conditions, attentions=14 if stack_from else 22
  )
  config = controlnet.Config.from_hf(_CONTROL)
  image = np.zeros((2, 100, 68, 3), np.float32)
  params = controlnet.param_shapes(config, stack_from=stack_from)
  net = controlnet.ControlNet(config, **options)
  count = 4 if stack_from else 8
  _assert_traced(net, params, *args, image, **conditions, attentions=count)
  config = unet_config.UnionConfig.from_hf(_CONTROL | _UNION)
  params = controlnet_union.param_shapes(config, stack_from=stack_from)
  net = controlnet_union.build(config, **options)
  kinds = dict(kinds=[0], scale=1.0, guess=False)
  _assert_traced(
    net, params, *args, [image], **kinds, **conditions, attentions=count
  )


def test_autoencoder_and_u2net(gpu):
  config = vae.Config()
  net = vae.VAE(config, dtype=jnp.bfloat16)
  images = np.zeros((2, 24, 40, 3), np.float32)
  params = vae.param_shapes(config)
  # Its one head is narrow enough here.
  _assert_traced(net, params, images, method="encode", attentions=1)
  net = u2net.U2Net(u2net.SMALL, jnp.bfloat16)
  variables = jax.eval_shape(net.init, jax.random.key(0), images)
  call = lambda v: net.apply(v, images).sides
  assert _count(_gradient(call, variables)) == (0, 0)
