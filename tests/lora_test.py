import json
import pickle

import diffusers
import diffusers_twins as twins
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import torch_lora
import transformers

from dppp_jax import errors, trees
from dppp_jax.models import unet
from dppp_jax.weights import (
  convert,
  diffusion_rules,
  lora,
  rules,
)

# float32 sums against float64; a wrong formula stands at 1e-2 and above.
TOLERANCE = 3e-6
RANK, ALPHA = torch_lora.RANK, torch_lora.ALPHA
low_rank, random = torch_lora.low_rank, torch_lora.random
kohya, layers = torch_lora.kohya, torch_lora.layers


@pytest.fixture(scope="module")
def twin():
  net = twins.randomise(diffusers.UNet2DConditionModel(**twins.XL))
  config = unet.Config.from_hf(dict(net.config))
  shapes = unet.param_shapes(config)
  params = twins.params(net, diffusion_rules.unet(config), shapes)
  return net.double(), config, params


@pytest.fixture(scope="module")
def texts():
  """Both text encoders of SDXL, small, and their trees."""
  found = []
  for cls in (
    transformers.CLIPTextModel,
    transformers.CLIPTextModelWithProjection,
  ):
    config = transformers.CLIPTextConfig(
      vocab_size=60,
      hidden_size=24,
      intermediate_size=40,
      num_hidden_layers=2,
      num_attention_heads=3,
      max_position_embeddings=16,
      projection_dim=20,
      bos_token_id=58,
      eos_token_id=59,
      pad_token_id=1,
    )
    net = twins.randomise(cls(config), seed=len(found))
    prefix = "" if cls is transformers.CLIPTextModel else "text_model."
    table = rules.hf_text(prefix)
    params = convert.convert(twins.tensors(net), table, where="twin")
    found.append((net.double(), table, trees.unflatten(params)))
  return found


def save(tmp_path, tensors, name="any name at all.safetensors", metadata=None):
  path = tmp_path / name
  tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, path, metadata=metadata)
  return path


def hooked(net, mores, scale, run):
  """What the frozen network gives with the narrow ways beside its layers."""
  handles = [
    net.get_submodule(name).register_forward_hook(
      lambda _, x, y, more=more: y + scale * more(x[0])
    )
    for name, more in mores.items()
  ]
  try:
    return run()
  finally:
    for handle in handles:
      handle.remove()


def loaded(net, params, table, run):
  """What the network gives with a tree of ours in its place."""
  before = {k: v.clone() for k, v in net.state_dict().items()}
  tensors = convert.invert(params, table, where="test")
  tensors = {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}
  net.load_state_dict(tensors)
  try:
    return run()
  finally:
    net.load_state_dict(before)


def run_unet(net, config):
  args, conditions = twins.inputs(config, size=(8, 12))
  with twins.float64():
    args, added = twins.torch_inputs(args, conditions)
    return net(*args, **added).sample.numpy()


def run_text(net):
  ids = torch.tensor([[58, 3, 41, 7, 59], [58, 5, 59, 1, 1]])
  with torch.no_grad():
    out = net(ids, output_hidden_states=True)
  return np.concatenate([x.numpy().ravel() for x in out.hidden_states])


KINDS = {
  "low_rank": "lora",
  "tucker": "lora",
  "loha": "loha",
  "loha_tucker": "loha",
  "lokr": "lokr",
  "lokr_whole": "lokr",
  "lokr_tucker": "lokr",
  "full": "full",
  "ia3": "ia3",
  "dora": "dora of lora",
  "dora_of_inputs": "dora of lora",
  "dora_of_peft": "dora of lora",
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_papers_formula(twin, tmp_path, kind):
  make = getattr(torch_lora, kind)
  net, config, params = twin
  rng = np.random.default_rng(5)
  tensors, mores = {}, {}
  for name, layer in layers(net).items():
    parts, mores[name] = make(layer, rng)
    tensors |= {f"{kohya(name)}.{k}": v for k, v in parts.items()}
  path = save(tmp_path, tensors)
  merged, (report,) = lora.merge({"unet": params}, [lora.Lora(path, scale=0.7)])
  assert report.matched == {"unet": len(mores)} and not report.unmatched
  assert report.kinds[KINDS[kind]] > 20
  run = lambda: run_unet(net, config)
  got = loaded(net, merged["unet"], diffusion_rules.unet(config), run)
  want = hooked(net, mores, 0.7, run)
  assert twins.distance(got, want) < TOLERANCE
  assert twins.distance(run(), want) > 0.02


# ---- Names.


def spell(style, name):
  """A module's name in the old and new manners of diffusers and peft."""
  if style == "new":
    return f"unet.{name}.lora.{{}}.weight"
  if style == "peft":
    return f"unet.base_model.model.{name}.lora_{{}}.default.weight"
  if style == "bare":
    return f"{name}.lora_{{}}.weight"
  parent, _, last = name.removesuffix(".0").rpartition(".")
  return f"unet.{parent}.processor.{last}_lora.{{}}.weight"


@pytest.mark.parametrize("style", ["old", "new", "peft", "bare"])
def test_the_manners_of_diffusers_and_peft(twin, tmp_path, style):
  net, _, params = twin
  rng = np.random.default_rng(6)
  ends = ("A", "B") if style in ("peft", "bare") else ("down", "up")
  tensors, plain = {}, {}
  for name, layer in layers(net).items():
    if style == "old" and ".attn" not in name:
      continue
    parts, _ = low_rank(layer, rng)
    plain |= {f"{kohya(name)}.{k}": v for k, v in parts.items()}
    key = spell(style, name)
    # No alpha here: these files mean alpha = r.
    tensors[key.format(ends[0])] = parts["lora_down.weight"] * (ALPHA / RANK)
    tensors[key.format(ends[1])] = parts["lora_up.weight"]
  one = lora.Lora(save(tmp_path, plain, "a.safetensors"))
  two = lora.Lora(save(tmp_path, tensors, "b.safetensors"))
  (want, got) = (lora.merge({"unet": params}, [x])[0] for x in (one, two))
  close(got, want, 1e-6)
  assert far(got["unet"], params)


def close(got, want, tolerance):
  got, want = trees.flatten(got), trees.flatten(want)
  assert got.keys() == want.keys()
  for name in want:
    assert got[name].shape == want[name].shape
    assert np.abs(got[name] - want[name]).max() < tolerance, name


def far(got, want):
  got, want = trees.flatten(got), trees.flatten(want)
  return [k for k in want if np.abs(got[k] - want[k]).max() > 1e-3]


TEXT_STYLES = {
  "kohya": ("lora_te{}_", "_", "", "lora_down", "lora_up"),
  "new": ("text_encoder{}.", ".", "", "lora_linear_layer.down",
          "lora_linear_layer.up"),
  "peft": ("text_encoder{}.", ".", "", "lora_A", "lora_B"),
  "unnamed": ("text_encoder{}.", ".", "text_model.", "lora_A", "lora_B"),
}  # fmt: skip


@pytest.mark.parametrize("style", TEXT_STYLES)
def test_text_encoders(texts, tmp_path, style):
  before, sep, dropped, down, up = TEXT_STYLES[style]
  rng = np.random.default_rng(7)
  tensors, all_mores = {}, []
  for n, (net, _, _) in enumerate(texts):
    mark = str(n + 1) if style == "kohya" else ("", "_2")[n]
    mores = {}
    for name, layer in layers(net).items():
      parts, mores[name] = low_rank(layer, rng)
      whole = name if "text_" in name else f"text_model.{name}"
      key = whole.removeprefix(dropped).replace(".", sep)
      key = before.format(mark) + key
      tensors[f"{key}.{down}.weight"] = parts["lora_down.weight"]
      tensors[f"{key}.{up}.weight"] = parts["lora_up.weight"]
      tensors[f"{key}.alpha"] = parts["alpha"]
    all_mores.append(mores)
  components = {"text_encoder": texts[0][2], "text_encoder_2": texts[1][2]}
  file = lora.Lora(save(tmp_path, tensors), text_scale=0.6)
  merged, (report,) = lora.merge(components, [file])
  assert report.matched == {"text_encoder": 12, "text_encoder_2": 13}
  for (net, table, _), params, mores in zip(
    texts, merged.values(), all_mores, strict=True
  ):
    run = lambda net=net: run_text(net)
    got = loaded(net, params, table, run)
    want = hooked(net, mores, 0.6, run)
    assert twins.distance(got, want) < TOLERANCE
    assert twins.distance(run(), want) > 0.02


def test_old_diffusers_names_of_a_text_encoder(texts, tmp_path):
  rng = np.random.default_rng(8)
  stem = "text_encoder.text_model.encoder.layers.1.self_attn."
  tensors = {}
  for name in ("to_q", "to_k", "to_v", "to_out"):
    tensors[f"{stem}{name}_lora.down.weight"] = random(rng, RANK, 24)
    tensors[f"{stem}{name}_lora.up.weight"] = random(rng, 24, RANK)
  params = texts[0][2]
  file = lora.Lora(save(tmp_path, tensors))
  merged, _ = lora.merge({"text_encoder": params}, [file])
  place = "text_model/encoder/layers_1/self_attn/"
  assert sorted(far(merged["text_encoder"], params)) == [
    f"{place}{name}_proj/kernel" for name in ("k", "out", "q", "v")
  ]


# ---- Scales, headers and several files.


def weight(params, path):
  return trees.flatten(params)[path]


QUERY = "mid_block.attentions.0.transformer_blocks.1.attn1.to_q"


def one_module(rng, name=QUERY, alpha=None, width=128):
  key = f"unet.{name}"
  tensors = {
    f"{key}.lora_A.weight": random(rng, RANK, width),
    f"{key}.lora_B.weight": random(rng, width, RANK),
  }
  product = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
  if alpha is not None:
    tensors[f"{key}.alpha"] = np.float32(alpha)
  return tensors, product


@pytest.mark.parametrize(
  "values, factor",
  [
    ({"unet.lora_alpha": 6, "unet.r": RANK}, 2.0),
    ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / RANK**0.5),
    ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 12}}, 4.0),
    ({"unet.lora_alpha": 6, "unet.alpha_pattern": {f"^{QUERY}": 12}}, 4.0),
    ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"^to_q": 12}}, 2.0),
    ({"lora_alpha": 9}, 3.0),
    ({"text_encoder.lora_alpha": 9}, 1.0),
  ],
)
def test_alpha_in_the_header(twin, tmp_path, values, factor):
  _, _, params = twin
  tensors, product = one_module(np.random.default_rng(9))
  header = {"format": "pt", "lora_adapter_metadata": json.dumps(values)}
  file = lora.Lora(save(tmp_path, tensors, metadata=header))
  merged, _ = lora.merge({"unet": params}, [file])
  path = diffusion_rules.path(QUERY) + "/kernel"
  delta = weight(merged["unet"], path) - weight(params, path)
  assert twins.distance(delta, factor * product.T) < 1e-5


def test_a_file_of_diffusers_own_writer(twin, tmp_path):
  _, _, params = twin
  tensors, product = one_module(np.random.default_rng(9))
  diffusers.StableDiffusionXLPipeline.save_lora_weights(
    tmp_path,
    unet_lora_layers={
      k.removeprefix("unet."): torch.from_numpy(v) for k, v in tensors.items()
    },
    unet_lora_adapter_metadata={"r": RANK, "lora_alpha": 2 * RANK},
  )
  merged, _ = lora.merge({"unet": params}, [lora.Lora(tmp_path)])
  path = diffusion_rules.path(QUERY) + "/kernel"
  delta = weight(merged["unet"], path) - weight(params, path)
  assert twins.distance(delta, 2 * product.T) < 1e-5


def test_several_files_in_any_order(twin, texts, tmp_path):
  """Sums and DoRAs, with scales for each part; what is given stays as it is."""
  net, _, params = twin
  te = texts[0][2]
  rng = np.random.default_rng(10)
  files = []
  for n, make in enumerate((low_rank, torch_lora.dora, torch_lora.loha)):
    tensors = {}
    for name, layer in layers(net).items():
      if ".attentions." in name:
        parts, _ = make(layer, rng)
        tensors |= {f"{kohya(name)}.{k}": v for k, v in parts.items()}
    for name, layer in layers(texts[0][0]).items():
      key = "lora_te1_text_model_" + name.replace(".", "_")
      parts, _ = make(layer, rng)
      tensors |= {f"{key}.{k}": v for k, v in parts.items()}
    files.append(save(tmp_path, tensors, f"{n}.safetensors"))
  given = {"unet": params, "text_encoder": te}
  copies = {k: trees.flatten(v) for k, v in given.items()}
  copies = {k: {n: x.copy() for n, x in v.items()} for k, v in copies.items()}
  loras = [
    lora.Lora(files[0], scale=0.5),
    lora.Lora(files[1], unet_scale=0.25, text_scale=-1.0),
    lora.Lora(files[2], scale=0.3, text_scale=0),
  ]
  one, reports = lora.merge(given, loras)
  two, _ = lora.merge(given, loras[::-1])
  close(one, two, 1e-5)
  for name in given:
    flat = trees.flatten(given[name])
    assert all(np.array_equal(flat[k], v) for k, v in copies[name].items())
    deltas = {k: np.zeros_like(v) for k, v in flat.items()}
    for single in loras:
      alone = trees.flatten(
        lora.merge(given, [lora.Lora(single.path)])[0][name]
      )
      scale = single.scale_of(name)
      for k, v in alone.items():
        deltas[k] += scale * (v - flat[k])
    want = {k: flat[k] + d for k, d in deltas.items()}
    close(trees.flatten(one[name]), want, 1e-5)
  assert [r.skipped for r in reports] == [0, 0, 12]
  assert reports[2].matched.keys() == {"unet"}
  # What no file names is not even copied.
  path = "conv_in/kernel"
  assert weight(one["unet"], path) is weight(params, path)


def test_stacked_transformers_get_the_same_numbers(twin, tmp_path):
  net, _, params = twin
  rng = np.random.default_rng(11)
  tensors = {}
  for name, layer in layers(net).items():
    parts, _ = low_rank(layer, rng)
    tensors |= {f"{kohya(name)}.{k}": v for k, v in parts.items()}
  file = lora.Lora(save(tmp_path, tensors))
  want, _ = lora.merge({"unet": params}, [file])
  stacked = diffusion_rules.stack_layers(params, stack_from=2)
  assert "transformer_blocks" in stacked["mid_block"]["attentions_0"]
  got, (report,) = lora.merge({"unet": stacked}, [file])
  assert report.matched == {"unet": len(layers(net))}
  close(diffusion_rules.unstack_layers(got["unet"]), want["unet"], 1e-7)


@pytest.mark.parametrize(
  "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_numbers_of_half_and_less(twin, tmp_path, dtype):
  _, _, params = twin
  tensors, _ = one_module(np.random.default_rng(9))
  half = {k: v.astype(dtype) for k, v in tensors.items()}
  a, b = (half[k].astype(np.float32) for k in sorted(half))
  path = save_raw(tmp_path / "half.safetensors", half)
  merged, _ = lora.merge({"unet": params}, [lora.Lora(path)])
  path = diffusion_rules.path(QUERY) + "/kernel"
  delta = weight(merged["unet"], path) - weight(params, path)
  assert twins.distance(delta, (b @ a).T) < 1e-5


def save_raw(path, tensors):
  """The format by hand, for types that NumPy does not have."""
  names = {"float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
  header, blob = {}, b""
  for name, value in tensors.items():
    end = len(blob) + value.nbytes
    header[name] = {
      "dtype": names[value.dtype.name],
      "shape": list(value.shape),
      "data_offsets": [len(blob), end],
    }
    blob += value.tobytes()
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + blob)
  return path


def test_a_bias_beside_the_factors(twin, tmp_path):
  """peft's lora_bias: it is scaled as its product is."""
  _, _, params = twin
  name = QUERY.replace("to_q", "to_out.0")
  tensors, _ = one_module(np.random.default_rng(9), name, alpha=6)
  bias = np.arange(128, dtype=np.float32)
  tensors[f"unet.{name}.lora_B.bias"] = bias
  file = lora.Lora(save(tmp_path, tensors), scale=0.5)
  merged, _ = lora.merge({"unet": params}, [file])
  path = diffusion_rules.path(name) + "/bias"
  delta = weight(merged["unet"], path) - weight(params, path)
  np.testing.assert_allclose(delta, 0.5 * 2 * bias, atol=1e-4)


def test_deltas_of_norms(twin, tmp_path):
  """LyCORIS' norm modules."""
  _, _, params = twin
  key = "lora_unet_input_blocks_4_1_norm"
  more = np.arange(64, dtype=np.float32)
  tensors = {f"{key}.w_norm": more, f"{key}.b_norm": -more}
  # This small UNet has one layer in a block: 4_1 is down_blocks.1's.
  tensors = {k.replace("_4_1_", "_3_1_"): v for k, v in tensors.items()}
  file = lora.Lora(save(tmp_path, tensors), scale=2)
  merged, _ = lora.merge({"unet": params}, [file])
  path = "down_blocks_1/attentions_0/norm"
  for leaf, sign in (("scale", 1), ("bias", -1)):
    name = f"{path}/{leaf}"
    delta = weight(merged["unet"], name) - weight(params, name)
    np.testing.assert_allclose(delta, sign * 2 * more, atol=1e-5)


# ---- What is refused.


def refused(components, path, message, **kwargs):
  options = {k: kwargs.pop(k) for k in ("allow_unmatched",) if k in kwargs}
  with pytest.raises(errors.UserError, match=message) as caught:
    lora.merge(components, [lora.Lora(path, **kwargs)], **options)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_unmatched_modules_are_not_passed_over(twin, tmp_path):
  _, _, params = twin
  rng = np.random.default_rng(9)
  tensors, _ = one_module(rng)
  for name in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_x"):
    tensors[f"{name}.lora_down.weight"] = random(rng, RANK, 8)
    tensors[f"{name}.lora_up.weight"] = random(rng, 8, RANK)
  tensors["bundle_emb.token.string_to_param"] = random(rng, 3, 8)
  metadata = {"ss_base_model_version": "sd_v1.5"}
  path = save(tmp_path, tensors, metadata=metadata)
  components = {"unet": params}
  said = refused(components, path, "3 of 4 modules are not in this base model")
  for word in ("any name at all", "bundle_emb", "lora_te1_text", "sd_v1.5"):
    assert word in said
  assert "2 of 3" in refused(components, path, "lora_unet_x", text_scale=0)
  _, (report,) = lora.merge(components, [lora.Lora(path)], allow_unmatched=True)
  assert len(report.unmatched) == 3 and report.matched == {"unet": 1}
  assert "1 unet" in str(report) and "3 unmatched" in str(report)


def test_a_file_for_something_else(twin, tmp_path):
  components = {"unet": twin[2]}
  rng = np.random.default_rng(9)
  path = save(tmp_path, {"transformer.single.weight": random(rng, 3, 3)})
  said = "matches no module of this base model"
  refused(components, path, said)
  refused(components, path, said, allow_unmatched=True)


def test_a_lora_for_another_base(twin, tmp_path):
  rng = np.random.default_rng(9)
  tensors, _ = one_module(rng, width=64)
  tensors |= one_module(rng, QUERY.replace("to_q", "to_v"))[0]
  refused(
    {"unet": twin[2]},
    save(tmp_path, tensors),
    r"made for another base model: 1 of 2 modules have other shapes, first"
    r" mid_block/.*to_q wants \(128, 128\) and gets \(64, 64\)",
  )


@pytest.mark.parametrize(
  "change, said",
  [
    ({"lora_B.weight": None}, "incomplete: up is missing"),
    ({"lora_A.weight": np.nan}, "lora_A.weight holds NaN"),
    ({"lora_B.weight": np.ones((128, 2), np.float32)}, "do not go together"),
    ({"hada_w1_a": np.ones((2, 2), np.float32)}, "lora and loha at once"),
    ({"lora_down.weight": np.ones((3, 128), np.float32)}, "is the second"),
    ({"oft_blocks": np.ones((3, 3), np.float32)}, "oft_blocks"),
    ({"lokr_t2": np.ones((3, 3), np.float32)}, "lokr_t2, which do not belong"),
    ({"alpha": np.ones(2, np.float32)}, "do not go together"),
    ({"lora_B.weight": np.ones((128, 3), np.int8)}, "holds int8, not floats"),
    (
      {
        "lora_A.weight": np.ones((0, 128), np.float32),
        "lora_B.weight": np.ones((128, 0), np.float32),
        "alpha": np.ones((), np.float32),
      },
      "factors do not go together",
    ),
  ],
)
def test_damaged_modules(twin, tmp_path, change, said):
  tensors, _ = one_module(np.random.default_rng(9))
  for part, value in change.items():
    key = f"unet.{QUERY}.{part}"
    if value is None:
      del tensors[key]
    elif isinstance(value, float):
      tensors[key] = tensors[key] + value
    else:
      tensors[key] = value
  refused({"unet": twin[2]}, save(tmp_path, tensors), said)


@pytest.mark.parametrize(
  ("value", "said"),
  [
    ("{", "cannot be read"),
    ("[]", "cannot be read"),
    ('{"lora_alpha": "x"}', "sets lora_alpha to 'x', where a number is"),
  ],
)
def test_a_damaged_header(twin, tmp_path, value, said):
  tensors, _ = one_module(np.random.default_rng(9))
  path = save(tmp_path, tensors, metadata={"lora_adapter_metadata": value})
  refused({"unet": twin[2]}, path, f"lora_adapter_metadata .*{said}")


def test_a_pattern_that_is_a_program(twin, tmp_path):
  tensors, _ = one_module(np.random.default_rng(9))
  values = {"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}
  header = {"lora_adapter_metadata": json.dumps(values)}
  path = save(tmp_path, tensors, metadata=header)
  refused({"unet": twin[2]}, path, "is a regex")


def test_truncated_missing_and_odd_files(twin, tmp_path):
  components = {"unet": twin[2]}
  tensors, _ = one_module(np.random.default_rng(9))
  path = save(tmp_path, tensors)
  for size in (0, 5, 40, path.stat().st_size - 1):
    short = tmp_path / "short.safetensors"
    short.write_bytes(path.read_bytes()[:size])
    refused(components, short, "truncated")
  refused(components, tmp_path / "none.safetensors", "does not exist")
  refused(components, tmp_path, "holds 2 weight files")
  with pytest.raises(errors.UserError, match="scale is nan"):
    lora.Lora(path, scale=float("nan"))


class Bomb:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt", "x.safetensors"])
def test_a_pickle_with_code_never_runs(twin, tmp_path, name):
  path = tmp_path / name
  path.write_bytes(pickle.dumps({"a": Bomb(tmp_path / "ran")}))
  refused({"unet": twin[2]}, path, str(path))
  torch.save({"a": Bomb(tmp_path / "ran")}, path)
  refused({"unet": twin[2]}, path, str(path))
  assert not (tmp_path / "ran").exists()


def test_a_torch_file_of_tensors(twin, tmp_path):
  tensors, product = one_module(np.random.default_rng(9))
  path = tmp_path / "old.pt"
  torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, path)
  merged, _ = lora.merge({"unet": twin[2]}, [lora.Lora(path)])
  name = diffusion_rules.path(QUERY) + "/kernel"
  delta = weight(merged["unet"], name) - weight(twin[2], name)
  assert twins.distance(delta, product.T) < 1e-5
