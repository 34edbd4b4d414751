"""CLIP in Flax against transformers, float64, by files through the loader."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_clip
import transformers
from transformers import activations

from dppp_jax import errors, trees
from dppp_jax.models import clip, layers, packing
from dppp_jax.weights import convert, load, rules

IDS = np.array([[58, 3, 5, 59, 0, 7], [58, 7, 59, 1, 1, 1]])


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


def close(ours, oracle, tolerance=1e-9):
  oracle = oracle.detach().numpy()
  assert ours.shape == oracle.shape
  np.testing.assert_allclose(
    np.asarray(ours), oracle, rtol=tolerance, atol=tolerance
  )


def wide(params):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)


def vision(config, params, images, *, dtype=jnp.float64, **kwargs):
  tower = clip.VisionTower(config, dtype=dtype)
  call = lambda p, x: tower.apply({"params": p}, x, **kwargs)
  return jax.jit(call)(wide(params), images)


def text(config, params, ids, **kwargs):
  tower = clip.TextTower(config, dtype=jnp.float64)
  static = {k: kwargs.pop(k) for k in ("hidden", "final_norm") if k in kwargs}
  call = lambda p, ids, kw: tower.apply({"params": p}, ids, **kw, **static)
  return jax.jit(call)(wide(params), ids, kwargs)


def draw(config):
  """Returns random parameters; compiling their initialisation takes longer."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: np.asarray(0.2 * rng.normal(size=leaf.shape), np.float32),
    clip.param_shapes(config),
  )


def pictures(*size, seed=0):
  return np.random.default_rng(seed).normal(size=(2, *size, 3))


def nchw(images):
  return torch.tensor(images).permute(0, 3, 1, 2)


VARIANTS = {
  "openai": {},
  "openclip": {
    "text": {"hidden_act": "gelu", "eos_token_id": 2, "num_hidden_layers": 1},
    "vision": {"hidden_act": "gelu", "patch_size": 4, "image_size": 22},
    "logit_scale_init_value": 1.5,
  },
  "odd": {
    "text": {"layer_norm_eps": 0.02, "num_attention_heads": 1},
    "vision": {
      "layer_norm_eps": 0.03,
      "num_hidden_layers": 1,
      "num_attention_heads": 8,
      "intermediate_size": 7,
    },
    "projection_dim": 5,
  },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_both_towers_match_transformers(tmp_path, name):
  hf = torch_clip.hf_config(**{k: v for k, v in VARIANTS[name].items()})
  model = torch_clip.save(transformers.CLIPModel(hf), tmp_path)
  config, params = load.clip(tmp_path)
  side = config.vision.image_size
  images = pictures(side, side)
  with torch.no_grad():
    oracle = model(
      input_ids=torch.tensor(IDS),
      pixel_values=nchw(images),
      output_hidden_states=True,
    )
  states = oracle.vision_model_output.hidden_states
  depth = config.vision.num_hidden_layers
  output = vision(
    config.vision, params, images, patch_blocks=tuple(range(depth + 1))
  )
  close(output.penultimate_cls, states[-2][:, 0])
  for block in range(depth + 1):
    close(output.patches[block], states[block][:, 1:])
  pooled = model.vision_model(nchw(images)).pooler_output
  close(output.cls, pooled)
  close(output.projected, model.visual_projection(pooled))

  states = oracle.text_model_output.hidden_states
  every = tuple(range(-len(states), len(states)))
  output = text(config.text, params, IDS, hidden=every)
  for index, state in zip(every, output.hidden, strict=True):
    close(state, states[index])
  pooled = model.text_model(torch.tensor(IDS)).pooler_output
  close(output.pooled, pooled)
  close(output.projected, model.text_projection(pooled))

  both = clip.CLIP(config, dtype=jnp.float64)
  both = jax.jit(both.apply)({"params": wide(params)}, images, IDS)
  close(both.scale * both.image @ both.text.T, oracle.logits_per_image)
  # The scaled last block (class token and end of text alone) is the same.
  np.testing.assert_allclose(
    both.text * jnp.linalg.norm(output.projected, axis=-1)[:, None],
    output.projected,
    rtol=1e-9,
  )


@pytest.mark.parametrize(
  "name",
  ["quick_gelu", "gelu", "gelu_new", "relu", "gelu_pytorch_tanh", "silu"],
)
def test_activations_match_transformers(name):
  x = np.linspace(-6, 6, 101)
  close(layers.activation(name)(x), activations.ACT2FN[name](torch.tensor(x)))


@pytest.mark.parametrize("has_projection", [True, False])
def test_text_encoders_of_sdxl(tmp_path, has_projection):
  cls = (
    transformers.CLIPTextModelWithProjection
    if has_projection
    else transformers.CLIPTextModel
  )
  hf = torch_clip.hf_config(text={"hidden_act": "gelu", "eos_token_id": 2})
  hf.text_config.projection_dim = 9
  model = torch_clip.save(cls(hf.text_config), tmp_path)
  config, params = load.clip_text(tmp_path)
  with torch.no_grad():
    oracle = model(torch.tensor(IDS), output_hidden_states=True)
  output = text(config, params, IDS, hidden=(-2, -4))
  close(output.hidden[0], oracle.hidden_states[-2])
  close(output.hidden[1], oracle.hidden_states[-4])
  if has_projection:
    close(output.projected, oracle.text_embeds)
  else:
    assert output.projected is None
    close(output.pooled, oracle.pooler_output)
  output = text(config, params, IDS, hidden=(-1,), final_norm=True)
  close(output.hidden[0], oracle.last_hidden_state)


def test_vision_model_with_projection(tmp_path):
  hf = torch_clip.hf_config().vision_config
  model = transformers.CLIPVisionModelWithProjection(hf)
  model = torch_clip.save(model, tmp_path)
  config, params = load.clip_vision(tmp_path)
  images = pictures(32, 32)
  with torch.no_grad():
    oracle = model(nchw(images))
  close(vision(config, params, images).projected, oracle.image_embeds)


@pytest.mark.parametrize(
  "grid", [(16, 8), (21, 10), (14, 14), (3, 30), (1, 1), (12, 6)]
)
def test_positions_are_resized_as_torch_does(grid):
  table = np.random.default_rng(0).normal(size=(14, 14, 3))
  oracle = torch.nn.functional.interpolate(
    torch.tensor(table).permute(2, 0, 1)[None],
    size=grid,
    mode="bilinear",
    align_corners=False,
  )[0].permute(1, 2, 0)
  close(layers.bilinear_grid(jnp.asarray(table), grid), oracle, 1e-12)


@pytest.mark.parametrize(
  ("size", "stride"), [((64, 32), 8), ((35, 30), 8), ((40, 29), 5)]
)
def test_any_size_and_stride(tmp_path, size, stride):
  """Overlapping patches are a stride of the convolution and nothing else."""
  model = transformers.CLIPModel(torch_clip.hf_config())
  model = torch_clip.save(model, tmp_path)
  config, params = load.clip(tmp_path)
  config = clip.VisionConfig(**vars(config.vision) | {"stride": stride})
  images = pictures(*size)
  tower = model.vision_model
  with torch.no_grad():
    weight = tower.embeddings.patch_embedding.weight
    x = torch.nn.functional.conv2d(nchw(images), weight, stride=stride)
    grid = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    cls = tower.embeddings.class_embedding.expand(2, 1, -1)
    offset = torch.randn(2, 1, 32, dtype=torch.float64)
    table = tower.embeddings.position_embedding.weight
    square = table[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(
      square, size=grid, mode="bilinear", align_corners=False
    )
    square = square.flatten(2).transpose(1, 2)
    x = torch.cat([cls + offset, x], 1)
    x = x + torch.cat([table[None, :1], square], 1)
    x = tower.encoder(tower.pre_layrnorm(x)).last_hidden_state
    oracle = model.visual_projection(tower.post_layernorm(x[:, 0]))
  assert config.grid(*size) == tuple(grid)
  output = vision(config, params, images, class_offset=offset[:, 0].numpy())
  close(output.projected, oracle)


@pytest.mark.parametrize("packed", [False, True])
def test_pseudo_words_stand_where_torch_puts_them(tmp_path, packed):
  model = transformers.CLIPModel(torch_clip.hf_config())
  model = torch_clip.save(model, tmp_path)
  config, params = load.clip(tmp_path)
  words = np.random.default_rng(1).normal(size=(2, 2, 24))
  template = np.array([[58, 4, 9, 9, 6, 59]])

  tower = clip.TextTower(config.text, dtype=jnp.float64)

  def ours(params, words):
    variables = {"params": params}
    tokens = tower.apply(variables, template, method="embed")
    if packed:
      own = packing.put_words(tokens[:, 1:], words, positions=(2, 0))
      layout = packing.Packing(lengths=(6,), shared=(1,))
      found = tower.apply(variables, layout, tokens[0, :1], own, method="read")
      return found[:, 0]
    tokens = packing.put_words(tokens, words, positions=(3, 1))
    return tower.apply(variables, embeddings=tokens, eot=5).projected

  given = torch.tensor(words, requires_grad=True)

  def patch(module, inputs, output):
    output = output.expand(2, -1, -1).clone()
    output[:, 3], output[:, 1] = given[:, 0], given[:, 1]
    return output

  hook = model.text_model.embeddings.token_embedding
  hook = hook.register_forward_hook(patch)
  ids = torch.tensor(np.repeat(template, 2, axis=0))
  oracle = model.get_text_features(ids).pooler_output
  hook.remove()
  loss, gradient = jax.jit(
    jax.value_and_grad(lambda p, w: jnp.sum(ours(p, w) ** 2), argnums=1)
  )(wide(params), words)
  close(jax.jit(ours)(wide(params), words), oracle)
  (oracle**2).sum().backward()
  close(gradient, given.grad)
  assert loss > 0


def test_nothing_after_the_end_of_text_counts():
  config = clip.TextConfig(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=4,
    eos_token_id=59,
  )
  params = draw(config)
  short = np.array([[58, 3, 5, 59]])
  long = np.concatenate([short, np.full((1, 73), 59)], axis=1)
  assert long.shape[1] == config.max_position_embeddings
  np.testing.assert_allclose(
    text(config, params, short).projected,
    text(config, params, long).projected,
    rtol=1e-12,
  )


def test_recomputing_blocks_changes_no_gradient():
  hf = torch_clip.hf_config(vision={"num_hidden_layers": 2})
  config = clip.Config.from_hf(hf.to_dict()).vision
  params = wide(draw(config))
  images = pictures(32, 16)

  def loss(params, remat):
    tower = clip.VisionTower(config, dtype=jnp.float64, remat=remat)
    return jnp.sum(tower.apply({"params": params}, images).projected ** 2)

  both = jax.jit(lambda p: [jax.grad(loss)(p, r) for r in (True, False)])
  recomputed, stored = both(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
    recomputed,
    stored,
  )
  # A bias of keys has no gradient, exactly so where keys are not computed.
  without = {n for n, g in trees.flatten(recomputed).items() if not np.any(g)}
  assert without <= {n for n in without if n.endswith("k_proj/bias")}


def test_exports_for_any_number_of_images():
  config = clip.Config.from_hf(torch_clip.hf_config().to_dict()).vision
  params = draw(config)
  images = pictures(40, 24).astype(np.float32)
  call = jax.jit(
    lambda p, x: clip.VisionTower(config).apply({"params": p}, x).projected
  )
  batch = jax.ShapeDtypeStruct(
    (*jax.export.symbolic_shape("b"), 40, 24, 3), jnp.float32
  )
  exported = jax.export.export(call)(params, batch)
  np.testing.assert_allclose(
    exported.call(params, images), call(params, images), rtol=1e-5
  )


def test_bfloat16_keeps_the_stream_in_float32():
  config = clip.Config.from_hf(torch_clip.hf_config().to_dict()).vision
  params = draw(config)
  images = pictures(32, 32).astype(np.float32)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  run = lambda dtype: jax.jit(
    lambda p, x: clip.VisionTower(config, dtype=dtype).apply({"params": p}, x)
  )(params, images)
  exact, rough = run(jnp.float32), run(jnp.bfloat16)
  for a, b in zip(exact[:3], rough[:3], strict=True):
    assert b.dtype == jnp.float32
    error = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert 1e-5 < error < 2e-2  # It did run in bfloat16, and well.


@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-L/14"])
def test_full_sizes_have_the_tensors_of_transformers(name):
  config = clip.VARIANTS[name]
  with torch.device("meta"):
    model = transformers.CLIPModel(transformers.CLIPConfig(**config.to_hf()))
  expected = trees.flatten(clip.param_shapes(config))
  assert trees.count(expected) == model.num_parameters()
  assert (
    trees.count(expected)
    == {
      "ViT-B/16": 149_620_737,
      "ViT-L/14": 427_616_513,
    }[name]
  )
  table = rules.hf_clip()
  found = {}
  for key, tensor in model.state_dict().items():
    zeros = np.zeros(tensor.shape, np.float32)
    (moved,) = convert.convert({key: zeros}, table, where=name).items()
    found[moved[0]] = moved[1].shape
  assert found == {path: leaf.shape for path, leaf in expected.items()}


def test_initial_spread_is_that_of_transformers():
  hf = torch_clip.hf_config(
    text={
      "vocab_size": 500,
      "hidden_size": 96,
      "intermediate_size": 200,
      "num_hidden_layers": 1,
    },
    vision={
      "hidden_size": 64,
      "intermediate_size": 200,
      "num_hidden_layers": 1,
    },
  )
  torch.manual_seed(0)
  oracle = convert.convert(
    {k: v.numpy() for k, v in transformers.CLIPModel(hf).state_dict().items()},
    rules.hf_clip(),
    where="transformers",
  )
  config = clip.Config.from_hf(hf.to_dict())
  params = trees.flatten(clip.init_params(config, jax.random.key(0)))
  assert params.keys() == oracle.keys()
  for path, leaf in params.items():
    if leaf.size < 500:
      np.testing.assert_allclose(np.std(leaf), np.std(oracle[path]), atol=0.1)
    else:
      np.testing.assert_allclose(np.std(leaf), np.std(oracle[path]), rtol=0.1)


def test_bad_calls_say_what_is_wrong():
  config = clip.Config.from_hf(torch_clip.hf_config().to_dict())
  shape = lambda module, *args, **kwargs: jax.eval_shape(
    lambda: module.init(jax.random.key(0), *args, **kwargs)
  )
  tower = clip.VisionTower(config.vision)
  with pytest.raises(errors.UserError, match="7x32 is less than one patch"):
    shape(tower, jnp.zeros((1, 7, 32, 3)))
  with pytest.raises(errors.UserError, match=r"patch_blocks \(4,\).*0..3"):
    shape(tower, jnp.zeros((1, 32, 32, 3)), patch_blocks=(4,))
  tower = clip.TextTower(config.text)
  with pytest.raises(errors.UserError, match="17 tokens is longer than the 16"):
    shape(tower, jnp.zeros((1, 17), int))
  with pytest.raises(errors.UserError, match="hidden state -5"):
    shape(tower, jnp.zeros((1, 4), int), hidden=(-5,))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"hidden_act": "mish"}, "hidden_act 'mish' is not known"),
    ({"num_attention_heads": 5}, "not a multiple of num_attention_heads 5"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
    ({"patch_size": 40}, "patch_size 40 exceeds image_size 32"),
    ({"patch_size": 0}, "patch_size is 0"),
    ({"layer_norm_eps": None}, "layer_norm_eps is None"),
    ({"image_size": [32, 16]}, r"image_size \[32, 16\].*not square"),
  ],
)
def test_bad_configurations_name_the_key(changes, message):
  values = torch_clip.hf_config().to_dict()
  values["vision_config"].update(changes)
  with pytest.raises(errors.UserError, match=message):
    clip.Config.from_hf(values)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"projection_dim": None}, "projection_dim is None"),
    ({"projection_dim": "512"}, "projection_dim is '512'"),
    ({"text_config": "small"}, "no text_config"),
  ],
)
def test_bad_configurations_of_both_towers(changes, message):
  values = torch_clip.hf_config().to_dict() | changes
  with pytest.raises(errors.UserError, match=message):
    clip.Config.from_hf(values)


def test_bad_width_of_a_single_tower():
  values = torch_clip.hf_config().to_dict()["text_config"]
  with pytest.raises(errors.UserError, match="projection_dim is '512'"):
    clip.text_from_hf(values | {"projection_dim": "512"})


def test_configurations_are_read_as_transformers_reads_them():
  old = {
    "projection_dim": 7,
    "text_config": {"hidden_size": 1, "projection_dim": 3},
    "text_config_dict": {"hidden_size": 128},
    "vision_config": {"image_size": [64, 64]},
    "vision_config_dict": None,
  }
  config = clip.Config.from_hf(old)
  assert config.text.hidden_size == 128
  assert config.text.projection_dim == config.vision.projection_dim == 7
  assert config.vision.image_size == 64
  assert config.vision.patch_size == 32  # What transformers takes by itself.
  assert clip.Config.from_hf(config.to_hf()) == config
  hf = transformers.CLIPConfig(**config.to_hf())
  assert hf.vision_config.image_size == 64
  assert hf.text_config.hidden_size == 128
  with pytest.raises(errors.UserError, match=r"of a bert.*CLIP is wanted"):
    clip.Config.from_hf({"model_type": "bert"})
