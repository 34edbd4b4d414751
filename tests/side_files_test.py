"""What stands beside weights: each key is honoured, or refused by its name."""

import json
import math
import shutil

import numpy as np
import pytest

from dppp_jax import cli, errors
from dppp_jax.diffusion import schedulers
from dppp_jax.evals import spec
from dppp_jax.geneperson import components, sources
from dppp_jax.models import clip_config, unet_config, vae
from dppp_jax.weights import load

_MINI = cli.ROOT / "dppp_jax/assets/mini"
# What SDXL's own folder says.
_SDXL = {
  "_class_name": "EulerDiscreteScheduler",
  "_diffusers_version": "0.19.0.dev0",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": False,
  "interpolation_type": "linear",
  "num_train_timesteps": 1000,
  "prediction_type": "epsilon",
  "sample_max_value": 1.0,
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "timestep_spacing": "leading",
  "trained_betas": None,
  "use_karras_sigmas": False,
}


# ---- scheduler_config.json.


@pytest.mark.parametrize("method", [None, "euler_ancestral", "dpmpp_2m"])
def test_sdxls_own_scheduler_is_read(method):
  config = schedulers.Config.from_hf(_SDXL, method=method)
  assert config.method == (method or "euler")
  assert (config.beta_end, config.steps_offset) == (0.012, 1)


@pytest.mark.parametrize(
  "name",
  [
    *("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"),
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    *("CosineDPMSolverMultistepScheduler", "SCMScheduler", "Unheard"),
  ],
)
@pytest.mark.parametrize("method", [None, "euler_ancestral", "ddim"])
def test_networks_that_no_sampler_here_is_for(name, method):
  with pytest.raises(errors.UserError, match=name):
    schedulers.Config.from_hf(_SDXL | {"_class_name": name}, method=method)


@pytest.mark.parametrize(
  "key, value",
  [
    ("prediction_type", "sample"),
    ("prediction_type", "flow_prediction"),
    ("trained_betas", [0.1]),
    ("use_flow_sigmas", True),
    ("timestep_type", "continuous"),
    ("sigma_max", 700.0),
    ("sigma_data", 0.5),
    ("shift", 3.0),
    ("snr_shift_scale", 3.0),
    ("beta_schedule", "squaredcos_cap_v2"),
    ("beta_start", "0.00085"),
    ("beta_end", math.nan),
    ("num_train_timesteps", 0),
    ("num_train_timesteps", 1000.5),
    ("num_train_timesteps", "1000"),
    ("num_train_timesteps", None),
    ("beta_end", "0.02"),
    ("steps_offset", -1),
    ("timestep_spacing", "even"),
    ("rescale_betas_zero_snr", "false"),
    ("use_karras_sigmas", "no"),
    ("a_key_of_tomorrow", 1),
  ],
)
@pytest.mark.parametrize("method", [None, "euler_ancestral"])
def test_what_a_network_was_told_is_not_passed_over(key, value, method):
  with pytest.raises(errors.UserError, match=key):
    schedulers.Config.from_hf(_SDXL | {key: value}, method=method)


def test_steps_of_a_sampler_matter_to_that_sampler():
  own = _SDXL | {"_class_name": "EulerAncestralDiscreteScheduler"}
  karras = {"use_karras_sigmas": True}
  with pytest.raises(errors.UserError, match="use_karras_sigmas"):
    schedulers.Config.from_hf(own | karras)
  assert schedulers.Config.from_hf(_SDXL | karras).karras
  named = schedulers.Config.from_hf(_SDXL | karras, method="euler_ancestral")
  assert not named.karras
  dpm = {"_class_name": "DPMSolverMultistepScheduler"}
  no_clip = {"lambda_min_clipped": -math.inf}
  assert schedulers.Config.from_hf(dpm | no_clip).method == "dpmpp_2m"
  with pytest.raises(errors.UserError, match="lambda_min_clipped"):
    schedulers.Config.from_hf(dpm | {"lambda_min_clipped": -5.1})
  v = schedulers.Config.from_hf(
    _SDXL | {"prediction_type": "sample"}, prediction_type="v_prediction"
  )
  assert v.prediction_type == "v_prediction"


# ---- model_index.json.


@pytest.mark.parametrize(
  "key, value",
  [
    ("transformer", ["diffusers", "FluxTransformer2DModel"]),
    ("text_encoder", ["kolors", "ChatGLMModel"]),
    ("text_encoder_2", ["transformers", "T5EncoderModel"]),
    ("unet", ["diffusers", "UNetSpatioTemporalConditionModel"]),
    ("tokenizer", ["transformers", "BertTokenizer"]),
    ("requires_aesthetics_score", True),
    ("is_cosxl_edit", True),
    ("motion_adapter", ["diffusers", "MotionAdapter"]),
  ],
)
def test_parts_of_a_pipeline_that_would_be_left_aside(tmp_path, key, value):
  index = json.loads((_MINI / "sdxl/model_index.json").read_text())
  usual = {"safety_checker": [None, None], "add_watermarker": True}
  usual |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
  usual |= {"requires_aesthetics_score": False}
  for extra, said in ((usual, None), (usual | {key: value}, key)):
    folder = tmp_path / ("refused" if said else "base")
    shutil.copytree(_MINI / "sdxl", folder)
    text = json.dumps(index | extra)
    (folder / "model_index.json").write_text(text, encoding="utf-8-sig")
    if said is None:
      components.find_components(folder)
      continue
    with pytest.raises(errors.UserError, match=said) as caught:
      components.find_components(folder)
    assert "model_index.json" in str(caught.value)


# ---- preprocessor_config.json and open_clip_config.json.

_HF = {
  "image_processor_type": "CLIPImageProcessor",
  "do_resize": True,
  "size": {"shortest_edge": 96},
  "resample": 3,
  "do_center_crop": True,
  "crop_size": {"height": 96, "width": 96},
  "do_convert_rgb": True,
  "do_rescale": True,
  "rescale_factor": 0.00392156862745098,
  "do_normalize": True,
  "image_mean": [0.5, 0.25, 0.5],
  "image_std": [0.5, 0.5, 0.125],
}


def pictures(folder, values, name="preprocessor_config.json"):
  (folder / name).write_text(json.dumps(values), encoding="utf-8-sig")
  return spec.of_clip(folder, clip_config.VisionConfig(image_size=64))


def test_a_clip_without_side_files(tmp_path):
  plain = spec.of_clip(tmp_path, clip_config.VisionConfig(image_size=64))
  assert plain.image_size == (96, 48) and plain.interpolation == "bilinear"
  assert plain.mean[0] == 0.48145466


@pytest.mark.parametrize(
  "change, field, value",
  [
    ({}, "mean", (0.5, 0.25, 0.5)),
    ({}, "std", (0.5, 0.5, 0.125)),
    ({}, "image_size", (144, 72)),
    ({}, "interpolation", "bicubic"),
    ({"resample": 2}, "interpolation", "bilinear"),
    ({"resample": None}, "interpolation", "bilinear"),
    ({"size": 96, "crop_size": 96}, "image_size", (144, 72)),
    ({"size": {"height": 96, "width": 96}}, "image_size", (144, 72)),
    (
      {"size": {"height": 384, "width": 128}, "do_center_crop": False},
      "image_size",
      (384, 128),
    ),
    ({"size": [384, 128], "crop_size": None}, "image_size", (384, 128)),
    ({"do_normalize": False}, "mean", (0.0,) * 3),
    ({"do_normalize": False}, "std", (1.0,) * 3),
  ],
)
def test_how_a_clip_wants_its_pictures(tmp_path, change, field, value):
  assert getattr(pictures(tmp_path, _HF | change), field) == value


@pytest.mark.parametrize(
  "key, value",
  [
    ("do_resize", False),
    ("do_rescale", False),
    ("rescale_factor", 1 / 127.5),
    ("resample", 0),
    ("resample", "lanczos"),
    ("crop_size", 72),
    ("size", {"longest_edge": 96}),
    ("size", {"shortest_edge": 96, "longest_edge": 128}),
    ("size", -1),
    ("size", "96"),
    ("image_mean", [0.5]),
    ("image_mean", 0.5),
    ("image_std", [0.5, 0.5, 0]),
    ("image_std", [0.5, 0.5, None]),
    ("image_std", [0.5, 0.5, 1e-60]),
    ("image_mean", [1e39, 0.5, 0.5]),
    ("image_mean", [10**400, 0.5, 0.5]),
    ("rescale_factor", 10**400),
    ("resample", [3]),
    ("size", 10**9),
    ("do_center_crop", "false"),
    ("do_normalize", "false"),
    ("do_pad", True),
    ("size_divisor", 32),
    ("do_flip_channel_order", True),
  ],
)
def test_what_would_change_a_picture_is_refused(tmp_path, key, value):
  with pytest.raises(errors.UserError, match=key) as caught:
    pictures(tmp_path, _HF | {key: value})
  assert "preprocessor_config.json" in str(caught.value)


def test_how_an_openclip_wants_its_pictures(tmp_path):
  name = "open_clip_config.json"
  cfg = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "squash",
    "size": [256, 256],
  }
  found = pictures(tmp_path, {"preprocess_cfg": cfg}, name)
  assert found.mean == (0.5,) * 3 and found.std == (0.25,) * 3
  assert found.image_size == (256, 128) and found.interpolation == "bicubic"
  for key, value in (
    ("resize_mode", "longest"),
    ("interpolation", "random"),
    ("mode", "L"),
    ("std", [1, 1]),
    ("timm", "x"),
  ):
    with pytest.raises(errors.UserError, match=key):
      pictures(tmp_path, {"preprocess_cfg": cfg | {key: value}}, name)
  for value in ("bicubic", ["RGB"], True, 0):
    with pytest.raises(errors.UserError, match="preprocess_cfg"):
      pictures(tmp_path, {"preprocess_cfg": value}, name)
  # transformers' file goes first.
  assert pictures(tmp_path, _HF).mean == (0.5, 0.25, 0.5)


@pytest.mark.parametrize(
  "group, key, value",
  [
    ("", "multimodal_cfg", {"width": 1}),
    ("", "init_logit_bias", -10),
    ("", "embed_dim", 99),
    ("vision_cfg", "pool_type", "avg"),
    ("vision_cfg", "no_ln_pre", True),
    ("vision_cfg", "attentional_pool", True),
    ("vision_cfg", "timm_model_name", "vit_base"),
    ("vision_cfg", "norm_kwargs", {"eps": 1e-6}),
    ("vision_cfg", "layers", 7),
    ("text_cfg", "no_causal_mask", True),
    ("text_cfg", "pool_type", "last"),
    ("text_cfg", "hf_tokenizer_name", "roberta"),
    ("text_cfg", "width", 99),
    ("text_cfg", "a_key_of_tomorrow", 1),
  ],
)
def test_keys_of_an_openclip(group, key, value):
  config = clip_config.Config()
  usual = {
    "embed_dim": config.projection_dim,
    "quick_gelu": True,
    "custom_text": True,
    "vision_cfg": {"layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0},
  }
  file = _MINI / "open_clip_config.json"

  def check(extra):
    load._check_open_clip(extra, str(file))
    load._check_sizes(config, extra, file)

  check(usual)
  inner = usual[group] | {key: value} if group else {}
  change = {group: inner} if group else {key: value}
  with pytest.raises(errors.UserError, match=key):
    check(usual | change)


def test_depths_are_counted():
  names = ["visual.transformer.resblocks.0.x", "visual.transformer.resblocks."]
  huge = "visual.transformer.resblocks." + "9" * 5000 + ".x"
  assert load._depth([*names, huge], "visual.") == 2


# ---- config.json of a CLIP.


@pytest.mark.parametrize(
  "values, said",
  [
    ({"model_type": "xlm-roberta"}, "is of a xlm-roberta"),
    ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
    ({"position_embedding_type": "rotary"}, "position_embedding_type"),
    ({"pruned_heads": {"1": [0]}}, "pruned_heads"),
  ],
)
def test_other_networks_than_clip(values, said):
  usual = {"hidden_size": 48, "num_beams": 1, "id2label": {"0": "x"}}
  usual |= {"attention_dropout": 0.0, "torch_dtype": "float32"}
  usual |= {
    "transformers_version": "4",
    "_name_or_path": "x",
    "pruned_heads": {},
  }
  assert clip_config.text_from_hf(usual).hidden_size == 48
  for read in (clip_config.text_from_hf, clip_config.vision_from_hf):
    with pytest.raises(errors.UserError, match=said):
      read(usual | values)
  whole = {"text_config": usual, "vision_config": usual}
  with pytest.raises(errors.UserError, match=said):
    clip_config.Config.from_hf(whole | values)
  assert np.isfinite(clip_config.Config.from_hf(whole).text.layer_norm_eps)


# ---- config.json of UNets, VAEs and ControlNets; model_index.json.


@pytest.mark.parametrize(
  ("folder", "read"),
  [
    ("sdxl/unet", unet_config.Config.from_hf),
    ("sdxl/vae", vae.Config.from_hf),
    ("controlnet-canny", unet_config.ControlNetConfig.from_hf),
  ],
)
def test_values_of_another_type_or_size_are_refused(folder, read):
  values = json.loads((_MINI / folder / "config.json").read_text())
  read(values)
  for key in ("block_out_channels", "down_block_types"):
    for wrong in (None, 0, 1.5, True, "x", {}, [0], ["a", 1], [10**30]):
      with pytest.raises(errors.UserError, match=key):
        read(values | {key: wrong})
  for key in ("in_channels", "norm_num_groups", "layers_per_block"):
    for wrong in (None, 0, -1, 1.5, 10**30, "x", True, {}, [0], [[1]]):
      with pytest.raises(errors.UserError, match=key):
        read(values | {key: wrong})
  for key in ("norm_eps", "mid_block_scale_factor", "scaling_factor"):
    for wrong in (None, 0, -1.0, math.inf, "x", True, [1.0]):
      if key in values:
        with pytest.raises(errors.UserError, match=key):
          read(values | {key: wrong})
  for key in ("flip_sin_to_cos", "force_upcast", "use_linear_projection"):
    for wrong in (None, 0, 1, "true"):
      if key in values:
        with pytest.raises(errors.UserError, match=key):
          read(values | {key: wrong})
  with pytest.raises(errors.UserError, match="act_fn"):
    read(values | {"act_fn": "swoosh"})


def test_a_vae_has_one_mean_for_each_channel():
  values = json.loads((_MINI / "sdxl/vae/config.json").read_text())
  with pytest.raises(errors.UserError, match="latents_std has 2 entries"):
    vae.Config.from_hf(values | {"latents_std": [1.0, 2.0]})


def test_scheduler_values_of_another_size_are_refused():
  for key, wrong in (
    ("_class_name", ["EulerDiscreteScheduler"]),
    ("num_train_timesteps", 10**30),
    ("steps_offset", 1000),
  ):
    with pytest.raises(
      errors.UserError, match=key if key[0] != "_" else "of a"
    ):
      schedulers.Config.from_hf(_SDXL | {key: wrong})


@pytest.mark.parametrize(
  ("key", "wrong"),
  [
    ("layer_norm_eps", 0),
    ("layer_norm_eps", True),
    ("num_hidden_layers", True),
    ("vocab_size", 10**30),
    ("hidden_act", []),
  ],
)
def test_clip_values_of_another_type_or_size_are_refused(key, wrong):
  with pytest.raises(errors.UserError, match=key):
    clip_config.text_from_hf({key: wrong})


@pytest.mark.parametrize("wrong", [None, "x", [], {}])
def test_clip_logit_scale_is_a_number(wrong):
  with pytest.raises(errors.UserError, match="logit_scale_init_value"):
    clip_config.Config(logit_scale_init_value=wrong)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"text_encoder_2": [None, None]}, "names no text_encoder_2"),
    ({"tokenizer": None}, "names no tokenizer,"),
    ({"scheduler": False}, "names no scheduler"),
    ({"force_zeros_for_empty_prompt": "no"}, "true or false"),
    ({"_class_name": 3}, "_class_name is 3"),
  ],
)
def test_an_index_that_contradicts_its_folder(tmp_path, change, said):
  for path in (_MINI / "sdxl").iterdir():
    (tmp_path / path.name).symlink_to(path)
  index = json.loads((_MINI / "sdxl/model_index.json").read_text())
  (tmp_path / "model_index.json").unlink()
  (tmp_path / "model_index.json").write_text(json.dumps(index | change))
  with pytest.raises(errors.UserError, match=said):
    components.find_components(tmp_path)


def test_a_vae_of_its_own_excuses_only_the_vae(tmp_path):
  index = json.loads((_MINI / "sdxl/model_index.json").read_text())
  shutil.copytree(_MINI / "sdxl", tmp_path / "base")
  overrides = sources.Overrides(vae=str(_MINI / "sdxl/vae"))
  for name, is_refused in (("vae", False), ("unet", True)):
    wrong = json.dumps(index | {name: ["diffusers", "SomethingElse"]})
    (tmp_path / "base/model_index.json").write_text(wrong)
    if is_refused:
      with pytest.raises(errors.UserError, match="unet"):
        components.find_components(tmp_path / "base", overrides=overrides)
    else:
      components.find_components(tmp_path / "base", overrides=overrides)
