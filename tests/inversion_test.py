"""Inversion networks against torch.nn with the same weights, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax.models import inversion

_B, _P, _D, _E = 3, 5, 8, 6  # Batch, patches, their width, v_g's width.


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def tensor(x):
  return torch.tensor(np.asarray(x, np.float64))


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def linear(params):
  layer = torch.nn.Linear(*params["kernel"].shape).double()
  layer.weight.data = tensor(params["kernel"]).T
  layer.bias.data = tensor(params["bias"])
  return layer


def random_like(tree, seed=0):
  """Replaces every leaf, so that no zero or one hides a mistake."""
  leaves, treedef = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  leaves = [0.5 * rng.normal(size=x.shape) for x in leaves]
  return jax.tree.unflatten(treedef, leaves)


def encoder_layer(params, heads):
  """torch's own transformer layer with the weights of ours."""
  width, hidden = params["fc1"]["kernel"].shape
  layer = torch.nn.TransformerEncoderLayer(
    width,
    heads,
    hidden,
    dropout=0.0,
    activation="relu",
    batch_first=True,
    norm_first=True,
  ).double()
  qkv = [params[f"{name}_proj"] for name in "qkv"]
  weights = [tensor(x["kernel"]).T for x in qkv]
  biases = [tensor(x.get("bias", np.zeros(width))) for x in qkv]
  layer.self_attn.in_proj_weight.data = torch.cat(weights)
  layer.self_attn.in_proj_bias.data = torch.cat(biases)
  layer.self_attn.out_proj = linear(params["out_proj"])
  layer.linear1, layer.linear2 = linear(params["fc1"]), linear(params["fc2"])
  for i in (1, 2):
    norm, given = getattr(layer, f"norm{i}"), params[f"layer_norm{i}"]
    norm.weight.data = tensor(given["scale"])
    norm.bias.data = tensor(given["bias"])
  return layer


@pytest.mark.parametrize("batch_norm", [False, True])
def test_content_inversion(batch_norm):
  x = draw(_B, _E)
  module = inversion.ContentInversion(
    4, hidden=7, batch_norm=batch_norm, dtype=jnp.float64
  )
  variables = module.init(jax.random.key(0), x)
  params = random_like(variables["params"])
  layers = [linear(params["fc1"]), torch.nn.ReLU()]
  layers += [linear(params["fc2"]), torch.nn.ReLU(), linear(params["fc3"])]
  stats = {}
  if batch_norm:
    norm = torch.nn.BatchNorm1d(4).double()
    norm.weight.data = tensor(params["norm"]["scale"])
    norm.bias.data = tensor(params["norm"]["bias"])
    layers.append(norm)
    stats = {"batch_stats": variables["batch_stats"]}
  oracle = torch.nn.Sequential(*layers)
  y, updates = module.apply(
    {"params": params, **stats}, x, train=True, mutable=["batch_stats"]
  )
  np.testing.assert_allclose(y, oracle(tensor(x)).detach(), rtol=1e-9)
  y = module.apply({"params": params, **updates}, x, train=False)
  np.testing.assert_allclose(y, oracle.eval()(tensor(x)).detach(), rtol=1e-9)


def test_style_inversion():
  x = draw(_B, 2, _E)
  module = inversion.StyleInversion(4, hidden=7, dtype=jnp.float64)
  params = random_like(module.init(jax.random.key(0), x)["params"])
  oracle = torch.nn.Sequential(
    linear(params["fc1"]),
    torch.nn.GELU(),
    linear(params["fc2"]),
    torch.nn.GELU(),
    linear(params["fc3"]),
  )
  y = module.apply({"params": params}, x)
  np.testing.assert_allclose(y, oracle(tensor(x)).detach(), rtol=1e-9)


def test_dropout_of_style_inversion_acts_in_training_only():
  x = draw(_B, 2, _E)
  module = inversion.StyleInversion(4, hidden=50, dropout=0.5)
  params = module.init(jax.random.key(0), x)
  run = jax.jit(
    lambda key, train: module.apply(
      params, x, train=train, rngs={"dropout": key}
    ),
    static_argnums=1,
  )
  apply = lambda train, seed: run(jax.random.key(seed), train)
  assert np.array_equal(apply(False, 0), apply(False, 1))
  assert not np.allclose(apply(True, 0), apply(True, 1))
  assert not np.allclose(apply(True, 0), apply(False, 0))
  mean = np.mean([apply(True, seed) for seed in range(200)], axis=0)
  np.testing.assert_allclose(mean, apply(False, 0), atol=0.1)


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_style_extractor(num_heads, qkv_bias, sigmoid):
  """The whole of Eq. 2 to 4, with every feature kept in the tokens' order."""
  patches, v_g = draw(_B, _P, _D), draw(_B, _E, seed=1)
  module = inversion.StyleExtractor(
    _E,
    num_tokens=4,
    num_selected=4,
    order="slot",
    num_heads=num_heads,
    qkv_bias=qkv_bias,
    sigmoid=sigmoid,
    dtype=jnp.float64,
  )
  params = jax.eval_shape(module.init, jax.random.key(0), patches, v_g)
  params = random_like(params["params"])
  assert {name for name in params if name.startswith("layers")} == {
    "layers_0",
    "layers_1",
    "layers_2",
  }
  assert params["layers_0"]["fc1"]["kernel"].shape == (_D, 2 * _D)
  tokens = tensor(params["tokens"]).expand(_B, -1, -1)
  x = torch.cat([tokens, tensor(patches)], dim=1)
  for i in range(3):
    x = encoder_layer(params[f"layers_{i}"], num_heads)(x)
  x = linear(params["fc"])(x[:, :4])
  expected = (torch.sigmoid(x) if sigmoid else x).detach()
  y = module.apply({"params": params}, patches, v_g)
  np.testing.assert_allclose(y, expected, rtol=1e-9)
  # And filtered: the best two by Eq. 3, best first.
  kept = module.clone(num_selected=2, order="score").apply(
    {"params": params}, patches, v_g
  )
  for b in range(_B):
    scores = np.exp(expected[b].numpy() @ v_g[b])
    best = np.argsort(-scores / scores.sum())[:2]
    np.testing.assert_allclose(kept[b], expected[b][best], rtol=1e-9)


def test_tokens_begin_small():
  module = inversion.StyleExtractor(
    _E, num_tokens=50, init_std=0.3, num_layers=0
  )
  x, v_g = jnp.zeros((1, _P, 40)), jnp.zeros((1, _E))
  params = module.init(jax.random.key(0), x, v_g)["params"]
  np.testing.assert_allclose(np.std(params["tokens"]), 0.3, rtol=0.1)


def loop_select(features, v_g, k, order):
  kept = []
  for rows, g in zip(features, v_g, strict=True):
    scores = [sum(a * b for a, b in zip(row, g, strict=True)) for row in rows]
    ranked = sorted(range(len(rows)), key=lambda i: (-scores[i], i))[:k]
    kept.append(
      [rows[i] for i in (sorted(ranked) if order == "slot" else ranked)]
    )
  return np.array(kept)


@pytest.mark.parametrize("order", ["score", "slot"])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_select(k, order):
  features, v_g = draw(_B, 7, _E), draw(_B, _E, seed=1)
  y = inversion.select(features, v_g, k=k, order=order)
  np.testing.assert_array_equal(y, loop_select(features, v_g, k, order))
  if k == 7:  # All are kept; only "score" moves them.
    assert np.array_equal(y, features) == (order == "slot")


def test_select_breaks_ties_by_slot():
  features = np.tile(draw(1, 1, _E), (1, 5, 1)) + 0.0
  features[0, :, 0] = np.arange(5)  # v_g does not look at this one.
  v_g = np.r_[0.0, np.ones(_E - 1)][None]
  y = inversion.select(features, v_g, k=3)
  np.testing.assert_array_equal(y[0, :, 0], [0, 1, 2])


def test_gradients_reach_the_chosen_features_and_no_scores():
  features, v_g = draw(_B, 7, _E), draw(_B, _E, seed=1)
  weights = draw(_B, 2, _E, seed=2)
  loss = lambda f, g: (inversion.select(f, g, k=2) * weights).sum()
  to_features, to_global = jax.grad(loss, argnums=(0, 1))(features, v_g)
  assert not to_global.any()
  expected = np.zeros_like(features)
  for b in range(_B):
    best = np.argsort(-features[b] @ v_g[b])[:2]
    expected[b, best] = weights[b]
  np.testing.assert_allclose(to_features, expected)


def test_unknown_order():
  with pytest.raises(ValueError, match="rank"):
    inversion.select(draw(1, 3, 2), draw(1, 2), k=2, order="rank")


def test_the_papers_widths():
  """ViT-B/16 at 256 x 128: 128 patches of 768, v_g and words of 512."""
  key, v_g = jax.random.key(0), jnp.zeros((1, 512))
  shapes = lambda module, *args: jax.tree.map(
    lambda x: x.shape, jax.eval_shape(module.init, key, *args)["params"]
  )
  style = shapes(inversion.StyleExtractor(512), jnp.zeros((1, 128, 768)), v_g)
  assert style["tokens"] == (24, 768)
  assert style["fc"]["kernel"] == (768, 512)
  content = shapes(inversion.ContentInversion(512), v_g)
  assert [content[f"fc{i}"]["kernel"] for i in (1, 2, 3)] == [(512, 512)] * 3
  words = shapes(inversion.StyleInversion(512), jnp.zeros((1, 6, 512)))
  assert [words[f"fc{i}"]["kernel"] for i in (1, 2, 3)] == [
    (512, 2048),
    (2048, 2048),
    (2048, 512),
  ]
