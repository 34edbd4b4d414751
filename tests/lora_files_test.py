"""Files of LoRAs as trainers leave them: names, side files, strange kinds."""

import json

import numpy as np
import pytest
import safetensors.numpy

from dppp_jax import errors, trees
from dppp_jax.geneperson import sources
from dppp_jax.weights import lora, lora_keys, peft_config

_R = np.random.default_rng(0)
RANK = 4
A = _R.normal(size=(RANK, 6)).astype(np.float32)
B = _R.normal(size=(6, RANK)).astype(np.float32)
DOTS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
LEAF = "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel"
ORIGINAL = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_" + DOTS.replace(".", "_")
TEXT = "text_model.encoder.layers.1.mlp.fc1"
TEXT_LEAF = "text_model/encoder/layers_1/mlp/fc1/kernel"


@pytest.fixture(scope="module")
def trees_():
  """As much of the networks as names ask for."""
  unet = {
    "conv_in/kernel": np.ones((3, 3, 4, 6), np.float32),
    "down_blocks_0/resnets_0/conv1/kernel": np.ones((3, 3, 6, 6), np.float32),
    LEAF: np.ones((6, 6), np.float32),
  }
  text = {TEXT_LEAF: np.ones((6, 6), np.float32)}
  return {
    "unet": trees.unflatten(unet),
    "text_encoder": trees.unflatten(text),
    "text_encoder_2": trees.unflatten(text),
  }


def write(folder, tensors, name="x.safetensors", metadata=None):
  path = folder / name
  tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, path, metadata=metadata)
  return path


def factors(name, down="lora_down", up="lora_up"):
  return {f"{name}.{down}.weight": A, f"{name}.{up}.weight": B}


PEFT = factors(f"base_model.model.{DOTS}", "lora_A", "lora_B")


def strength(components, path, component="unet", leaf=LEAF, **options):
  """By how much of B A a module has changed."""
  merged, _ = lora.merge(components, [lora.Lora(path)], **options)
  delta = trees.flatten(merged[component])[leaf] - 1
  want = (B @ A).T
  return float((delta * want).sum() / (want * want).sum())


def refused(components, path, said, **options):
  with pytest.raises(errors.UserError, match=said) as caught:
    lora.merge(components, [lora.Lora(path)], **options)
  assert "\n" not in str(caught.value)
  assert str(path.parent) in str(caught.value)


# ---- What stands beside the tensors.


@pytest.mark.parametrize(
  "values, factor",
  [
    ({"r": 4, "lora_alpha": 16}, 4.0),
    ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8.0),
    ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
    ({"r": 4, "lora_alpha": 4, "alpha_pattern": {r"^.*\.x$": 2}}, None),
    ({"r": 2, "lora_alpha": 4, "rank_pattern": {"to_q": 4}}, 1.0),
    ({}, 2.0),  # peft's own 8.
    ({"peft_type": None, "lora_alpha": 4, "target_modules": ["to_q"]}, 1.0),
    ({"lora_alpha": 4, "target_modules": "all-linear", "bias": "none"}, 1.0),
    ({"lora_alpha": 4, "base_model_name_or_path": "x", "lora_dropout": 1}, 1.0),
    ({"r": 8, "lora_alpha": 16}, "rank 8"),
    ({"peft_type": "LOHA", "alpha": 2}, "LOHA"),
    ({"use_dora": True}, "use_dora"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "lora_only"}, "bias"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"target_modules": ["to_k"]}, "target_modules leave out"),
    ({"exclude_modules": ["attn1.to_q"]}, "leave out"),
    ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow"),
    ({"lora_alpha": "much"}, "much"),
  ],
)
@pytest.mark.parametrize("place", ["beside", "header"])
def test_peft_says_how_much(trees_, tmp_path, values, factor, place):
  name, metadata = "adapter_model.safetensors", None
  if place == "header":
    values = {f"unet.{k}": v for k, v in values.items()} or {"unet.r": RANK}
    metadata = {"lora_adapter_metadata": json.dumps(values)}
  else:
    text = "\ufeff" + json.dumps(values)
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
  path = write(tmp_path, PEFT, name, metadata)
  if isinstance(factor, float):
    assert strength(trees_, path) == pytest.approx(factor, abs=1e-5)
  else:
    refused(trees_, path, factor or "is a regex")


def test_a_configuration_of_another_file_is_left_alone(trees_, tmp_path):
  config = tmp_path / "adapter_config.json"
  config.write_text('{"lora_alpha": 40}')
  for name in (KOHYA, f"unet.{DOTS}"):
    path = write(tmp_path, factors(name))
    assert strength(trees_, path) == pytest.approx(1)
    assert lora_keys.files_of(path) == [path]
  own = write(tmp_path, PEFT, "adapter_model.safetensors")
  other = write(tmp_path, PEFT, "renamed.safetensors")
  assert strength(trees_, own) == pytest.approx(10)
  assert strength(trees_, other) == pytest.approx(1)
  assert lora_keys.locate(tmp_path) == own
  # Another alpha is another LoRA.
  one = sources.describe_lora(lora.Lora(own))
  assert set(one.files.values()) == {own, config}


def test_a_key_that_stands_twice_is_refused(trees_, tmp_path):
  path = write(tmp_path, PEFT, "adapter_model.safetensors")
  config = tmp_path / "adapter_config.json"
  config.write_text('{"lora_alpha": 4, "lora_alpha": 40}')
  with pytest.raises(errors.UserError, match="'lora_alpha' stands in it twice"):
    strength(trees_, path)


def test_alphas_that_a_file_has_lost(trees_, tmp_path):
  notes = {"ss_network_alpha": "1", "ss_network_dim": "4"}
  path = write(tmp_path, factors(KOHYA), metadata=notes)
  refused(trees_, path, "ss_network_alpha 1 for ss_network_dim 4")
  alpha = {f"{KOHYA}.alpha": np.float32(2)}
  path = write(tmp_path, factors(KOHYA) | alpha, metadata=notes)
  assert strength(trees_, path) == pytest.approx(0.5)
  notes["ss_network_dim"] = "Dynamic"
  path = write(tmp_path, factors(KOHYA), metadata=notes)
  assert strength(trees_, path) == pytest.approx(1)


# ---- Names.


@pytest.mark.parametrize(
  "name",
  [
    f"diffusion_model.{ORIGINAL}",
    f"diffusion_model.{DOTS}",
    f"model.diffusion_model.{ORIGINAL}",
    f"lora_unet.{DOTS}",
    f"lycoris_{DOTS.replace('.', '_')}",
  ],
)
def test_prefixes_of_a_unet(trees_, tmp_path, name):
  assert strength(trees_, write(tmp_path, factors(name))) == pytest.approx(1)


@pytest.mark.parametrize(
  "name, component",
  [
    (f"text_encoders.clip_l.transformer.{TEXT}", "text_encoder"),
    (f"text_encoders.clip_g.transformer.{TEXT}", "text_encoder_2"),
    (f"clip_l.{TEXT}", "text_encoder"),
    (f"cond_stage_model.transformer.{TEXT}", "text_encoder"),
    (f"conditioner.embedders.0.transformer.{TEXT}", "text_encoder"),
    (
      "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc",
      "text_encoder_2",
    ),
    ("lora_te2_" + TEXT.replace(".", "_"), "text_encoder_2"),
    (f"lora_te1.{TEXT}", "text_encoder"),
  ],
)
def test_prefixes_of_text_encoders(trees_, tmp_path, name, component):
  path = write(tmp_path, factors(name))
  got = strength(trees_, path, component, TEXT_LEAF)
  assert got == pytest.approx(1)


@pytest.mark.parametrize("adapter", ["default_0", "style", "my-style_2"])
def test_adapters_by_any_name(trees_, tmp_path, adapter):
  names = (f"lora_A.{adapter}", f"lora_B.{adapter}")
  path = write(tmp_path, factors(f"unet.{DOTS}", *names))
  assert strength(trees_, path) == pytest.approx(1)
  both = factors(f"unet.{DOTS}", "lora_A.other", "lora_B.other")
  both |= factors(f"unet.{DOTS}", *names)
  path = write(tmp_path, both)
  refused(trees_, path, f"2 adapters of the unet .*{adapter}")
  both = {k.replace("other", "o"): v + 1 for k, v in both.items()} | both
  refused(trees_, write(tmp_path, both), "adapters of the unet")


# ---- Files of which nothing, or not all, can be merged.

OTHERS = {
  "OFT": {"oft_blocks": np.ones((2, 3, 3), np.float32)},
  "BOFT": {"boft_R.default": np.ones((2, 3, 3), np.float32)},
  "GLoRA": {"a1.weight": A, "a2.weight": B},
  "IA3": {"ia3_l.default": np.ones(6, np.float32)},
  "VeRA": {"vera_lambda_b": np.ones(6, np.float32)},
  "AdaLoRA": {
    "lora_A.weight": A,
    "lora_B.weight": B,
    "lora_E": np.ones((4, 1), np.float32),
  },
  "modules_to_save": {"modules_to_save.default.weight": B},
  "alpha alone": {},
  "dora alone": {"dora_scale": np.ones((6, 1), np.float32)},
  "magnitude alone": {"lora_magnitude_vector.x": np.ones(6, np.float32)},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("allow", [False, True])
def test_other_kinds_are_never_said_to_be_merged(trees_, tmp_path, kind, allow):
  tensors = {f"{KOHYA}.{k}": v for k, v in OTHERS[kind].items()}
  if "alone" not in kind or not tensors:
    tensors[f"{KOHYA}.alpha"] = np.float32(1)
  path = write(tmp_path, tensors)
  refused(trees_, path, kind, allow_unmatched=allow)
  # Beside a module that can be merged it is named, and only left out if asked.
  other = factors("lora_te1_" + TEXT.replace(".", "_"))
  path = write(tmp_path, tensors | other)
  if not allow:
    refused(trees_, path, f"1 of 2 modules .*{kind}")
    return
  merged, (report,) = lora.merge(
    trees_, [lora.Lora(path)], allow_unmatched=True
  )
  assert report.matched == {"text_encoder": 1}
  assert kind in report.unmatched[0]
  assert np.array_equal(trees.flatten(merged["unet"])[LEAF], np.ones((6, 6)))


def test_zeros_are_no_lora(trees_, tmp_path):
  tensors = factors(KOHYA)
  tensors[f"{KOHYA}.lora_up.weight"] = 0 * B
  refused(trees_, write(tmp_path, tensors), "changes nothing")
  alpha = {f"{KOHYA}.alpha": np.float32(0)}
  refused(trees_, write(tmp_path, factors(KOHYA) | alpha), "changes nothing")


@pytest.mark.parametrize(
  "name, said",
  [
    ("model.diffusion_model.input_blocks.0.0.weight", "a checkpoint of Stable"),
    ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
    ("emb_params", "a textual inversion"),
    ("lora_unet_double_blocks_0_img_attn_proj.lora_up.weight", "Flux, SD3"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "Flux, SD3"),
    ("encoder.conv_in.weight", "a VAE alone"),
  ],
)
def test_what_is_no_lora_of_this_base(trees_, tmp_path, name, said):
  path = write(tmp_path, {name: A})
  refused(trees_, path, f"matches no module .*{said}")


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("r", "4"),
    ("lora_alpha", [1]),
    ("lora_alpha", True),
    ("use_rslora", "yes"),
    ("rank_pattern", []),
    ("alpha_pattern", "x"),
    ("exclude_modules", 5),
  ],
)
def test_peft_values_of_another_type_are_refused(key, value):
  with pytest.raises(errors.UserError, match=f"a.json sets {key} to"):
    peft_config.Adapter("a.json", {key: value})


def test_factors_whose_product_overflows_are_refused(trees_, tmp_path):
  name = "lora_unet_" + LEAF.removesuffix("/kernel").replace("/", "_")
  huge = {k: v * np.float32(1e30) for k, v in factors(name).items()}
  refused(trees_, write(tmp_path, huge), "is not finite")
