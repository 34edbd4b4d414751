"""Base models as users have them: parts apart, marks, strange neighbours."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from dppp_jax import cli, errors, trees
from dppp_jax.geneperson import components, networks, sources
from dppp_jax.models import controlnet_union, unet_config
from dppp_jax.weights import (
  controlnet_file,
  diffusers_folder,
  hub,
  single_file,
)

_MINI = cli.ROOT / "dppp_jax/assets/mini"
_WORDS = [_MINI / "sdxl/tokenizer"]
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
Overrides = sources.Overrides


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """The small SDXL in one file: its configurations and tensors."""
  parts = components.load_components(_MINI / "sdxl")
  configs = single_file.Configs(parts.unet, parts.vae, *parts.texts)
  path = tmp_path_factory.mktemp("base") / "whole.safetensors"
  single_file.save(path, single_file.Checkpoint(configs, parts.params))
  return configs, hub.read_tensors(path), parts.params


@pytest.fixture
def no_numbers(monkeypatch):
  """Whoever reads the numbers of a file fails."""

  def fail(*args, **kwargs):
    raise AssertionError("numbers were read")

  monkeypatch.setattr(single_file.convert, "convert", fail)


def write(folder, tensors, name="x.safetensors", **metadata):
  path = folder / name
  copies = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  texts = {k.replace("__", "."): v for k, v in metadata.items()}
  safetensors.numpy.save_file(copies, path, metadata=texts or None)
  return path


def find(path, configs, **overrides):
  return components.find_components(
    path,
    configs=configs,
    tokenizers=_WORDS,
    overrides=Overrides(**overrides),
  )


@pytest.mark.parametrize(
  "change, said",
  [
    (lambda t: without(t, "first_stage_model."), "no VAE"),
    (lambda t: without(t, "conditioner.embedders.0."), "no first text"),
    (lambda t: without(t, "conditioner.embedders.1."), "no second text"),
    (lambda t: t | {_FIRST: np.zeros((64, 9, 3, 3), "f")}, "an inpainting"),
    (lambda t: t | {_FIRST: np.zeros((64, 8, 3, 3), "f")}, "that edits"),
    (lambda t: t | {_FIRST: np.zeros((7, 16, 3, 3), "f")}, "! conv_in/kernel"),
    (lambda t: t | {"edm_mean": np.ones(4, "f")}, "EDM .*Playground"),
    (lambda t: t | {"edm_vpred.sigma_max": np.ones(1, "f")}, "EDM .*CosXL"),
    (
      lambda t: (
        t
        | {"model.diffusion_model.time_embed.cond_proj.weight": np.ones(1, "f")}
      ),
      "consistency model",
    ),
    (lambda t: without(t, _FIRST), "- conv_in/kernel"),
  ],
)
def test_what_a_header_shows_is_found_first(
  base, tmp_path, change, said, no_numbers
):
  configs, tensors, _ = base
  path = write(tmp_path, change(dict(tensors)))
  with pytest.raises(errors.UserError, match=said) as caught:
    find(path, configs)
  assert str(path) in str(caught.value)


def without(tensors, prefix):
  return {k: v for k, v in tensors.items() if not k.startswith(prefix)}


@pytest.mark.parametrize(
  "names, said",
  [
    (["lora_unet_x.lora_up.weight"], "is a LoRA"),
    (["unet.x.lora_A.default.weight"], "is a LoRA"),
    (["controlnet_cond_embedding.conv_in.weight"], "is a ControlNet"),
    (["down_blocks.0.resnets.0.conv1.weight"], "is a UNet alone"),
    (["encoder.conv_in.weight"], "is a VAE alone"),
    (["model.diffusion_model.joint_blocks.0.x"], "is a Stable Diffusion 3"),
    (["model.diffusion_model.double_blocks.0.x"], "is a Flux"),
    (["emb_params"], "is a textual inversion"),
    (["vision_model.x"], "is a CLIP"),
    (["image_proj.x"], "is an IP-Adapter"),
    (["stage1.rebnconvin.conv_s1.weight"], "is a U-2-Net"),
  ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, names, said):
  path = write(tmp_path, {name: np.ones(1, np.float32) for name in names})
  with pytest.raises(errors.UserError, match=said):
    single_file.peek(path)


def test_a_layer_that_sdxl_never_reads_may_be_missing(base, tmp_path):
  configs, tensors, params = base
  last = configs.text_encoder.num_hidden_layers - 1
  first = "conditioner.embedders.0.transformer.text_model."
  less = without(tensors, f"{first}encoder.layers.{last}.")
  less = without(less, f"{first}final_layer_norm.")
  assert len(less) < len(tensors)
  path = write(tmp_path, less)
  single_file.peek(path, configs=configs)
  got = trees.flatten(single_file.load(path, configs=configs).params)
  for name, want in trees.flatten(params).items():
    unused = name.startswith("text_encoder/") and (
      f"layers_{last}/" in name or "final_layer_norm" in name
    )
    np.testing.assert_array_equal(got[name], 0 * want if unused else want)


def test_what_the_pooled_text_needs_is_there_whole_or_not_at_all(
  base, tmp_path, caplog
):
  """As published lists of the names of real SDXL files have it."""
  configs, tensors, params = base
  last = configs.text_encoder_2.num_hidden_layers - 1
  prefix = "conditioner.embedders.1.model."
  less = tensors
  for group in (
    f"transformer.resblocks.{last}.",
    "ln_final.",
    "text_projection",
  ):
    less = without(less, f"{prefix}{group}")
  path = write(tmp_path, less)
  with caplog.at_level("WARNING"):
    single_file.peek(path, configs=configs)
  assert "has no text_model/final_layer_norm" in caplog.text
  got = trees.flatten(single_file.load(path, configs=configs).params)
  for name, want in trees.flatten(params).items():
    is_zero = name.startswith("text_encoder_2/") and (
      f"layers_{last}/" in name
      or "final_layer_norm" in name
      or "text_projection" in name
    )
    np.testing.assert_array_equal(got[name], 0 * want if is_zero else want)
  torn = without(tensors, f"{prefix}ln_final.bias")
  with pytest.raises(errors.UserError, match="- text_model/final_layer_norm"):
    find(write(tmp_path, torn), configs)


# ---- A VAE apart.


@pytest.mark.parametrize("place", ["folder", "file in it", "file", "whole"])
def test_a_vae_apart(base, tmp_path, place):
  configs, tensors, params = base
  path = write(tmp_path, without(tensors, "first_stage_model."))
  vae = _MINI / "sdxl/vae"
  if place == "file in it":
    vae = vae / "diffusion_pytorch_model.safetensors"
  elif place == "file":
    vae = tmp_path / "sdxl_vae (fp16 fix).safetensors"
    shutil.copy(_MINI / "sdxl/vae/diffusion_pytorch_model.safetensors", vae)
  elif place == "whole":
    vae = write(tmp_path, tensors, "other.safetensors")
  overrides = {"vae": vae}
  found = find(path, configs, **overrides)
  assert found.parts.vae == configs.vae
  got = components.load_components(
    path,
    configs=configs,
    tokenizers=_WORDS,
    overrides=Overrides(**overrides),
  ).params["vae"]
  jax.tree.map(np.testing.assert_array_equal, got, params["vae"])
  # It is part of what a dataset was made with.
  cache = tmp_path / "cache.json"
  told = components.digests(
    path,
    configs=configs,
    tokenizers=_WORDS,
    overrides=Overrides(**overrides),
    cache=cache,
  )
  assert told["vae"]["name"] == vae.name


def test_a_vae_instead_of_a_folders_own(tmp_path):
  config, params = diffusers_folder.vae(_MINI / "sdxl/vae")
  other = dataclasses.replace(config, scaling_factor=0.5)
  params = jax.tree.map(lambda x: x * np.float32(1.5), params)
  diffusers_folder.save(tmp_path / "vae", other, params)
  shutil.copytree(_MINI / "sdxl", tmp_path / "base")
  shutil.rmtree(tmp_path / "base/vae")  # Not even needed.
  overrides = Overrides(vae=tmp_path / "vae")
  got = components.load_components(tmp_path / "base", overrides=overrides)
  assert got.vae.scaling_factor == 0.5
  jax.tree.map(np.testing.assert_array_equal, got.params["vae"], params)
  digest = lambda over: components.digests(
    _MINI / "sdxl", overrides=over, cache=tmp_path / "cache.json"
  )
  assert "vae" not in digest(Overrides())
  assert digest(overrides)["base"] != digest(Overrides())["base"]


def test_what_is_no_vae(base, tmp_path):
  path = write(tmp_path, {"lora_unet_x.lora_up.weight": np.ones(1, "f")})
  for vae, said in (
    (path, "is a LoRA and holds no VAE"),
    (_MINI / "sdxl/unet", "config.json is of a UNet2DConditionModel"),
    (tmp_path / "none.safetensors", "does not exist"),
  ):
    with pytest.raises(errors.UserError, match=said):
      components.find_components(_MINI / "sdxl", overrides=Overrides(vae=vae))


# ---- What the UNet predicts.

_MARK = {"v_pred": np.zeros(0, np.float32)}
_ZERO = {"ztsnr": np.zeros(0, np.float32)}


@pytest.mark.parametrize(
  "marks, header, override, want",
  [
    ({}, {}, None, "epsilon"),
    (_MARK, {}, None, "v_prediction"),
    ({}, {"modelspec__prediction_type": "v"}, None, "v_prediction"),
    ({}, {"modelspec__prediction_type": "Epsilon"}, None, "epsilon"),
    (_MARK, {"modelspec__prediction_type": "v"}, None, "v_prediction"),
    (_MARK, {"modelspec__prediction_type": "epsilon"}, None, "two things"),
    (
      _MARK,
      {"modelspec__prediction_type": "epsilon"},
      "v_prediction",
      "v_prediction",
    ),
    ({}, {}, "v_prediction", "v_prediction"),
    (_MARK, {}, "epsilon", "epsilon"),
    ({}, {"modelspec__prediction_type": "flow"}, None, "'flow' by its header"),
    ({}, {}, "sample", "prediction_type 'sample'"),
  ],
)
def test_what_a_file_predicts(
  base, tmp_path, marks, header, override, want, no_numbers
):
  configs, tensors, _ = base
  path = write(tmp_path, tensors | marks, **header)
  if not want.startswith(("epsilon", "v_pred")):
    with pytest.raises(errors.UserError, match=want):
      find(path, configs, prediction_type=override)
    return
  steps = find(path, configs, prediction_type=override).parts.scheduler
  assert steps.prediction_type == want and not steps.zero_snr
  asked = find(path, configs, prediction_type=override, zero_snr=True)
  path = write(tmp_path, tensors | marks | _ZERO, **header)
  marked = find(path, configs, prediction_type=override)
  assert asked.parts.scheduler == marked.parts.scheduler
  assert marked.parts.scheduler.zero_snr


def test_the_configuration_sets_what_is_predicted():
  config = cli.load_config("configs/geneperson.py:mini").to_dict()
  places = {"models.base": _MINI / "sdxl"}
  assert networks.base(config, places).scheduler.prediction_type == (
    "v_prediction"
  )
  config["sampler"]["prediction_type"] = "epsilon"
  assert networks.base(config, places).scheduler.prediction_type == "epsilon"
  config["sampler"]["prediction_type"] = "noise"
  with pytest.raises(errors.UserError, match=r"--config\.models.*'noise'"):
    networks.base(config, places)


# ---- ControlNets beside configurations of others.


def union(kinds):
  config = unet_config.UnionConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=(1, 2),
    cross_attention_dim=16,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=40,
    conditioning_embedding_out_channels=(4, 8),
    num_control_type=kinds,
    num_trans_channel=8,
    num_trans_head=2,
    num_proj_channel=8,
  )
  rng = np.random.default_rng(kinds)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    controlnet_union.param_shapes(config),
  )
  return config, params


@pytest.mark.parametrize("beside", ["config_promax.json", "both", "own"])
def test_the_configuration_that_goes_with_a_file(tmp_path, beside):
  (six, few), (eight, more) = union(6), union(8)
  diffusers_folder.save(tmp_path / "union", six, few)
  diffusers_folder.save(tmp_path / "other", eight, more)
  stem = "diffusion_pytorch_model"
  file = tmp_path / "union" / f"{stem}_promax.safetensors"
  shutil.copy(tmp_path / "other" / f"{stem}.safetensors", file)
  name = "config_promax.json"
  if beside == "own":
    name = f"{stem}_promax.json"
  if beside != "both":
    (tmp_path / "union/config.json").unlink()
  shutil.copy(tmp_path / "other/config.json", tmp_path / "union" / name)
  config, params = controlnet_file.load(file)
  assert config == eight
  jax.tree.map(np.testing.assert_array_equal, params, more)
  assert controlnet_file.config_file(file).name == name
  source = sources.describe_controlnet(file, file, None)
  assert set(source.files) == {name, file.name}
  if beside == "both":
    config, _ = controlnet_file.load(file.with_name(f"{stem}.safetensors"))
    assert config == six


@pytest.mark.parametrize(
  "stray", ["clip/config.json", "sdxl/unet/config.json", "other", "empty"]
)
def test_a_stray_configuration_is_not_believed(tmp_path, capsys, stray):
  own = _MINI / "controlnet-openpose"
  file = tmp_path / "openpose.safetensors"
  shutil.copy(own / "diffusion_pytorch_model.safetensors", file)
  path = tmp_path / "config.json"
  if stray == "empty":
    path.write_text("{}")
  elif stray == "other":
    values = json.loads((own / "config.json").read_text())
    path.write_text(json.dumps(values | {"layers_per_block": 2}))
  else:
    shutil.copy(_MINI / stray, path)
  unet = diffusers_folder.read_config(_MINI / "sdxl", "unet")
  got = sources.controlnet_config(file, unet, variant=None)
  assert got.block_out_channels == unet.block_out_channels
  assert "config.json is of a" in capsys.readouterr().err
  assert set(sources.describe_controlnet(file, file, None).files) == {""}
  params = sources.controlnet(file, got, variant=None)
  want = diffusers_folder.controlnet(own)[1]
  jax.tree.map(np.testing.assert_array_equal, params, want)


def test_what_is_no_controlnet(base, tmp_path):
  _, tensors, _ = base
  for content, said in (
    ({"lora_unet_x.lora_up.weight": np.ones(1, "f")}, "it is a LoRA"),
    (tensors, "it is a checkpoint of Stable Diffusion"),
    ({"adapter.body.0.in_conv.weight": np.ones(1, "f")}, "it is a T2I-Adapter"),
    ({"input_blocks.0.0.weight": np.ones(1, "f")}, "it is a UNet alone"),
  ):
    with pytest.raises(errors.UserError, match=said):
      controlnet_file.load(write(tmp_path, content))
