import dataclasses
import logging
import pickle

import diffusers
from diffusers.loaders import single_file_utils
import diffusers_twins as twins
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from dppp_jax import errors, trees
from dppp_jax.models import clip, controlnet, controlnet_union, unet
from dppp_jax.models import vae as vae_lib
from dppp_jax.weights import (
  controlnet_file,
  convert,
  diffusion_rules,
  original,
  rules,
  single_file,
)

# SD 1.x with two of its levels.
SD1 = dict(
  block_out_channels=(64, 128),
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  layers_per_block=2,
  cross_attention_dim=24,
  attention_head_dim=8,
)
VAE = dict(
  block_out_channels=(32, 64),
  down_block_types=("DownEncoderBlock2D",) * 2,
  up_block_types=("UpDecoderBlock2D",) * 2,
  layers_per_block=2,
  norm_num_groups=8,
)


def text_config(**changes):
  values = dict(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=16,
    projection_dim=24,
    bos_token_id=58,
    eos_token_id=59,
    pad_token_id=1,
  )
  return transformers.CLIPTextConfig(**values | changes)


class Twin:
  """A pipeline's networks in torch, and as ours."""

  def __init__(self, unet_values, is_xl):
    cls = transformers.CLIPTextModelWithProjection
    self.nets = {
      "unet": diffusers.UNet2DConditionModel(**unet_values),
      "vae": diffusers.AutoencoderKL(**VAE),
      # With the outer name, as all published files have it.
      "text_encoder": cls(text_config()),
    }
    if is_xl:
      self.nets["text_encoder_2"] = cls(text_config(hidden_act="gelu"))
    for seed, net in enumerate(self.nets.values()):
      twins.randomise(net, seed)
    texts = [
      clip.text_from_hf(net.config.to_dict())
      for name, net in self.nets.items()
      if name.startswith("text")
    ]
    texts[0] = dataclasses.replace(texts[0], projection_dim=None)
    self.configs = single_file.Configs(
      unet.Config.from_hf(dict(self.nets["unet"].config)),
      vae_lib.Config.from_hf(dict(self.nets["vae"].config)),
      *texts,
    )
    self.state = {
      name: {
        k: v
        for k, v in twins.tensors(net).items()
        if name != "text_encoder" or k != "text_projection.weight"
      }
      for name, net in self.nets.items()
    }
    tables = {
      "unet": diffusion_rules.unet(self.configs.unet),
      "vae": diffusion_rules.autoencoder(),
      "text_encoder": rules.hf_text(),
      "text_encoder_2": rules.hf_text(),
    }
    self.params = {
      name: trees.unflatten(convert.convert(state, tables[name], where="twin"))
      for name, state in self.state.items()
    }


@pytest.fixture(scope="module", params=["xl", "sd1"])
def twin(request):
  is_xl = request.param == "xl"
  values = twins.XL | dict(layers_per_block=2) if is_xl else SD1
  return Twin(values, is_xl)


@pytest.fixture(scope="module")
def saved(twin, tmp_path_factory):
  path = tmp_path_factory.mktemp("saved") / "whatever v9 (pruned).safetensors"
  checkpoint = single_file.Checkpoint(twin.configs, twin.params)
  single_file.save(path, checkpoint)
  return path


@pytest.fixture(scope="module")
def tensors(saved):
  return safetensors.numpy.load_file(saved)


def write(tmp_path, tensors, name="file.safetensors"):
  path = tmp_path / name
  safetensors.numpy.save_file(
    {k: np.ascontiguousarray(v) for k, v in tensors.items()}, path
  )
  return path


def same(got, want):
  got, want = trees.flatten(got), trees.flatten(want)
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def as_torch(tensors):
  return {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}


def by_diffusers(twin, tensors):
  """What diffusers makes of a file: the state dicts of its classes."""
  tensors = as_torch(tensors)
  nets = twin.nets
  found = {
    "unet": single_file_utils.convert_ldm_unet_checkpoint(
      dict(tensors), dict(nets["unet"].config)
    ),
    "vae": single_file_utils.convert_ldm_vae_checkpoint(
      dict(tensors), dict(nets["vae"].config)
    ),
  }
  prefix = "cond_stage_model.transformer."
  if "text_encoder_2" in nets:
    prefix = "conditioner.embedders.0.transformer."
    found["text_encoder_2"] = single_file_utils.convert_open_clip_checkpoint(
      nets["text_encoder_2"], dict(tensors), "conditioner.embedders.1.model."
    )
  found["text_encoder"] = single_file_utils.convert_ldm_clip_checkpoint(
    dict(tensors), remove_prefix=prefix
  )
  return found


def test_diffusers_reads_what_is_written(twin, tensors):
  found = by_diffusers(twin, tensors)
  assert found.keys() == twin.state.keys()
  for name, state in found.items():
    same({k: v.numpy() for k, v in state.items()}, twin.state[name])


def test_a_file_comes_back(twin, saved):
  checkpoint = single_file.load(saved, configs=twin.configs)
  same(checkpoint.params, twin.params)
  assert checkpoint.prediction_type == "epsilon" and not checkpoint.zero_snr
  stacked = single_file.load(saved, configs=twin.configs, stack_from=2)
  want = diffusion_rules.stack_layers(twin.params["unet"], stack_from=2)
  same(stacked.params["unet"], want)


def test_the_original_shapes(twin, tensors):
  """What diffusers' reader would forgive."""
  name = "first_stage_model.encoder.mid.attn_1.q.weight"
  assert tensors[name].shape == (64, 64, 1, 1)
  if "text_encoder_2" in twin.nets:
    prefix = "conditioner.embedders.1.model."
    want = twin.state["text_encoder_2"]["text_projection.weight"].T
    np.testing.assert_array_equal(tensors[prefix + "text_projection"], want)
    fused = prefix + "transformer.resblocks.1.attn.in_proj_weight"
    assert tensors[fused].shape == (72, 24)


EXTRAS = (
  "alphas_cumprod",
  "alphas_cumprod_prev",
  "betas",
  "cond_stage_model.logit_scale",
  "cond_stage_model.transformer.text_model.embeddings.position_ids",
  "conditioner.embedders.0.transformer.text_projection.weight",
  "conditioner.embedders.1.model.logit_scale",
  "denoiser.sigmas",
  "first_stage_model.loss.discriminator.main.0.weight",
  "log_one_minus_alphas_cumprod",
  "logvar",
  "model_ema.decay",
  "model_ema.diffusion_modelinput_blocks00bias",
  "posterior_mean_coef1",
  "posterior_log_variance_clipped",
  "sqrt_alphas_cumprod",
  "sqrt_one_minus_alphas_cumprod",
  "sqrt_recip_alphas_cumprod",
  "sqrt_recipm1_alphas_cumprod",
)


def test_known_extras_and_marks(twin, tensors, tmp_path, caplog):
  is_xl = "text_encoder_2" in twin.nets
  extras = [n for n in EXTRAS if is_xl or not n.startswith("conditioner.")]
  extras = [n for n in extras if not is_xl or not n.endswith("_ids")]
  more = {name: np.ones(3, np.float32) for name in extras}
  more |= {k: np.zeros(0, np.float32) for k in ("v_pred", "ztsnr")}
  path = write(tmp_path, tensors | more)
  with caplog.at_level(logging.INFO, logger="absl"):
    checkpoint = single_file.load(path, configs=twin.configs)
  same(checkpoint.params, twin.params)
  assert checkpoint.prediction_type == "v_prediction" and checkpoint.zero_snr
  # position_ids belongs to a part, whose table leaves it out.
  count = len(more) - (0 if is_xl else 1)
  assert f"left out {count} tensors by rule" in caplog.text
  single_file.save(tmp_path / "v.safetensors", checkpoint, dtype="float16")
  again = single_file.load(tmp_path / "v.safetensors", configs=twin.configs)
  assert again.prediction_type == "v_prediction" and again.zero_snr
  flat = trees.flatten(checkpoint.params)
  half = {k: v.astype(np.float16) for k, v in flat.items()}
  same(again.params, half)


def test_an_inner_name_that_merging_lost(twin, tensors, tmp_path):
  change = lambda name: name.replace("transformer.text_model.", "transformer.")
  path = write(tmp_path, {change(k): v for k, v in tensors.items()})
  same(single_file.load(path, configs=twin.configs).params, twin.params)


# ---- The whole networks, by name and shape.


@pytest.mark.parametrize("kind", ["xl", "sd1"])
def test_every_name_and_shape_of_the_base_models(kind):
  configs = single_file.SDXL if kind == "xl" else single_file.SD1
  values = twins.SDXL if kind == "xl" else dict(cross_attention_dim=768)
  blocks = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
  )
  with torch.device("meta"):
    net = diffusers.UNet2DConditionModel(**values)
    vae = diffusers.AutoencoderKL(**blocks)
  assert unet.Config.from_hf(dict(net.config)) == configs.unet
  scaling = configs.vae.scaling_factor
  assert scaling == (0.13025 if kind == "xl" else 0.18215)
  want = vae_lib.Config.from_hf(dict(vae.config) | {"scaling_factor": scaling})
  assert want == configs.vae
  names = original.unet(tree(net))
  state = {
    f"model.diffusion_model.{original.rename(name, names)}": tensor
    for name, tensor in net.state_dict().items()
  }
  assert len(state) == (1680 if kind == "xl" else 686)
  assert not any("None" in name for name in state)
  back = single_file_utils.convert_ldm_unet_checkpoint(state, dict(net.config))
  compare(back, net)
  names = original.vae(tree(vae))
  new = {"to_q": "query", "to_k": "key", "to_v": "value"}
  new |= {"to_out.0": "proj_attn"}
  state = {}
  for name, tensor in vae.state_dict().items():
    for k, v in new.items():
      name = name.replace(k, v)
    state[f"first_stage_model.{original.rename(name, names)}"] = tensor
  assert len(state) == 248
  back = single_file_utils.convert_ldm_vae_checkpoint(state, dict(vae.config))
  compare(back, vae)


def tree(net):
  """The paths of our tree, whose equality with the nets has its own tests."""
  return {diffusion_rules.path(name): p for name, p in net.named_parameters()}


def compare(back, net):
  want = net.state_dict()
  assert back.keys() == want.keys()
  assert all(back[name] is not None for name in want)
  assert all(back[name].shape == want[name].shape for name in want)


# Names in published files, and what they are.
SPELLINGS = {
  "time_embed.2": "time_embedding.linear_2",
  "label_emb.0.2": "add_embedding.linear_2",
  "input_blocks.0.0": "conv_in",
  "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
  "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
  "input_blocks.8.1.norm": "down_blocks.2.attentions.1.norm",
  "middle_block.0.out_layers.0": "mid_block.resnets.0.norm2",
  "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
  "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
  "output_blocks.8.0.in_layers.2": "up_blocks.2.resnets.2.conv1",
  "out.0": "conv_norm_out",
}


def test_names_in_published_files():
  with torch.device("meta"):
    net = diffusers.UNet2DConditionModel(**twins.XL | {"layers_per_block": 2})
  names = original.swap(original.unet(tree(net)))
  found = {name: original.rename(name, names) for name in SPELLINGS}
  assert found == SPELLINGS
  assert original.rename("input_blocks.44.0.op", names) is None


# ---- VAEs and ControlNets alone.


@pytest.mark.parametrize("style", ["bare", "prefix", "vae.", "diffusers"])
def test_a_vae_alone(twin, tensors, tmp_path, style):
  first = "first_stage_model."
  own = {k: v for k, v in tensors.items() if k.startswith(first)}
  if style in ("bare", "vae."):
    new = "" if style == "bare" else style
    own = {k.replace(first, new): v for k, v in own.items()}
  elif style == "diffusers":
    own = twin.state["vae"]
  path = write(tmp_path, own, "sdxl_vae fixed.safetensors")
  config, params = single_file.vae(path, config=twin.configs.vae)
  assert config == twin.configs.vae
  same(params, twin.params["vae"])


# The widths by which heads of 64 are told.
NETS = {
  "sd1": SD1,
  "xl": twins.XL
  | dict(
    block_out_channels=(64, 64, 128),
    norm_num_groups=32,
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=6 * 256 + 32,
  ),
}
NETS["mid"] = NETS["xl"] | dict(
  mid_block_type="UNetMidBlock2D", transformer_layers_per_block=(1, 1, 1)
)


def control(kind):
  """A ControlNet in torch, with heads as the base models have them."""
  values = {k: v for k, v in NETS[kind].items() if k not in ("up_block_types",)}
  if kind != "sd1":
    values["attention_head_dim"] = (1, 1, 2)
  net = diffusers.ControlNetModel(
    conditioning_embedding_out_channels=(16, 24, 32), **values
  )
  twins.randomise(net)
  config = controlnet.Config.from_hf(dict(net.config))
  table = diffusion_rules.controlnet(config)
  return net, config, twins.params(net, table, controlnet.param_shapes(config))


@pytest.mark.parametrize("kind", NETS)
def test_a_controlnet_whose_sizes_are_read_off(tmp_path, kind):
  net, want, params = control(kind)
  path = write(tmp_path, twins.tensors(net), "OpenPoseXL2.safetensors")
  config, got = controlnet_file.load(path)
  # One depth for all levels may be written once.
  spread = lambda c: dataclasses.replace(
    c, transformer_layers_per_block=c.depths
  )
  assert spread(config) == spread(want)
  same(got, params)
  net.save_pretrained(tmp_path / "folder")
  for place in (tmp_path / "folder", next((tmp_path / "folder").glob("*.s*"))):
    same(controlnet_file.load(place)[1], params)


def test_a_controlnet_in_the_original_layout(tmp_path):
  net, config, params = control("sd1")
  names = original.controlnet(controlnet.param_shapes(config))
  state = {
    f"control_model.{original.rename(name, names)}": tensor
    for name, tensor in net.state_dict().items()
  }
  # Diffusers looks for the last of the hints where the base models have it.
  seen = {
    k.replace("input_hint_block.10", "input_hint_block.14"): v
    for k, v in state.items()
  }
  back = single_file_utils.convert_controlnet_checkpoint(seen, dict(net.config))
  compare(back, net)
  assert all(torch.equal(back[k], v) for k, v in net.state_dict().items())
  path = write(tmp_path, state_of(state), "control_v11p.safetensors")
  same(controlnet_file.load(path, config=config)[1], params)


def state_of(state):
  return {k: v.detach().numpy() for k, v in state.items()}


def test_a_union_whose_sizes_are_read_off(tmp_path):
  net = diffusers.ControlNetUnionModel(
    **{k: v for k, v in NETS["xl"].items() if k != "up_block_types"}
    | dict(attention_head_dim=(1, 1, 2)),
    conditioning_embedding_out_channels=(16, 24),
    num_control_type=4,
    num_trans_channel=64,
    num_proj_channel=64,
  )
  twins.randomise(net)
  path = write(tmp_path, twins.tensors(net), "promax.safetensors")
  config, params = controlnet_file.load(path, stack_from=2)
  want = controlnet_union.Config.from_hf(dict(net.config))
  assert config == want
  table = diffusion_rules.controlnet_union(want)
  tree = twins.params(net, table, controlnet_union.param_shapes(want))
  same(params, diffusion_rules.stack_layers(tree, stack_from=2))


# ---- What is refused.


def refused(path, said, configs=None):
  with pytest.raises(errors.UserError, match=said):
    single_file.load(path, configs=configs)


@pytest.mark.parametrize(
  "change, said",
  [
    ({"model.diffusion_model.out.2.bias": None}, "- conv_out/bias"),
    ({"model.diffusion_model.out.9.bias": 4}, r"out\.9\.bias"),
    ({"model.diffusion_model.conv_out.bias": 4}, "no rule"),
    ({"model.diffusion_model.out.2.bias": 5}, "! conv_out/bias"),
    ({"first_stage_model.quant_conv.bias": None}, "- quant_conv/bias"),
    ({"something.else": 3}, "belong to no part .* something.else"),
    ({"edm_mean": 3}, "edm_mean"),
    ({"model.diffusion_model.out.2.bias": np.nan}, "NaN"),
  ],
)
def test_every_tensor_has_a_place(twin, tensors, tmp_path, change, said):
  changed = dict(tensors)
  for name, value in change.items():
    if value is None:
      del changed[name]
    elif isinstance(value, int):
      changed[name] = np.zeros(value, np.float32)
    else:
      changed[name] = changed[name] + np.float32(value)
  refused(write(tmp_path, changed), said, twin.configs)


@pytest.mark.parametrize(
  "names, said",
  [
    (["transformer.x"], "holds no UNet"),
    (["cond_stage_model.model.x"], "is a Stable Diffusion 2.x"),
    (["conditioner.embedders.0.model.x"], "is the refiner"),
    (["cond_stage_model.roberta.x"], "no text encoders"),
  ],
)
def test_other_models_are_named(tmp_path, names, said):
  names = [*names, "model.diffusion_model.x"][: 1 if "UNet" in said else 2]
  tensors = {name: np.zeros(1, np.float32) for name in names}
  refused(write(tmp_path, tensors), said)


@pytest.mark.parametrize("kind", ["xl", "sd1"])
def test_the_base_model_is_told_by_its_names(tmp_path, monkeypatch, kind):
  """And its true sizes are asked for, of which this file has none."""
  seen = []
  monkeypatch.setattr(
    single_file, "_parts", lambda configs: seen.append(configs) or {}
  )
  text = "conditioner.embedders.1.model.x"
  text = text if kind == "xl" else "cond_stage_model.transformer.x"
  names = ("model.diffusion_model.x", text)
  path = write(tmp_path, {n: np.zeros(1, np.float32) for n in names})
  refused(path, "belong to no part")
  want = single_file.SDXL if kind == "xl" else single_file.SD1
  assert seen == [want]


def test_truncated_and_taken(twin, saved, tmp_path):
  whole = saved.read_bytes()
  for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
    path = tmp_path / "short.safetensors"
    path.write_bytes(whole[:size])
    refused(path, "truncated", twin.configs)
  checkpoint = single_file.Checkpoint(twin.configs, twin.params)
  with pytest.raises(errors.UserError, match="is not overwritten"):
    single_file.save(saved, checkpoint)
  bad = dict(twin.params, vae={})
  checkpoint = single_file.Checkpoint(twin.configs, bad)
  with pytest.raises(errors.UserError, match="export of vae"):
    single_file.save(tmp_path / "new.safetensors", checkpoint)
  assert not list(tmp_path.glob("*new*"))


@pytest.mark.parametrize(
  "header",
  [
    '{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
    '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
    '{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    "[" * 100000,
  ],
)
def test_hostile_headers(tmp_path, header):
  path = tmp_path / "odd.safetensors"
  raw = header.encode()
  path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 8)
  refused(path, "truncated or no safetensors file")


class Bomb:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


@pytest.mark.parametrize("load", [single_file.load, controlnet_file.load])
@pytest.mark.parametrize("name", ["x.ckpt", "x.pth", "x.safetensors"])
def test_a_pickle_with_code_never_runs(tmp_path, name, load):
  path = tmp_path / name
  content = {"state_dict": {"a": Bomb(tmp_path / "ran")}}
  path.write_bytes(pickle.dumps(content))
  with pytest.raises(errors.UserError, match=name):
    load(path)
  torch.save(content, path)
  with pytest.raises(errors.UserError, match=name):
    load(path)
  assert not (tmp_path / "ran").exists()


def test_a_ckpt_of_tensors_is_read(twin, tensors, tmp_path):
  path = tmp_path / "model.ckpt"
  torch.save({"state_dict": as_torch(tensors), "global_step": 3}, path)
  same(single_file.load(path, configs=twin.configs).params, twin.params)


@pytest.mark.parametrize(
  "names, said",
  [
    (["lora_controlnet"], "control-LoRA"),
    (["unet.x"], "holds no ControlNet"),
    (["controlnet_cond_embedding.conv_in.weight"], "sizes can be read"),
  ],
)
def test_no_controlnet(tmp_path, names, said):
  path = write(tmp_path, {n: np.zeros(1, np.float32) for n in names})
  with pytest.raises(errors.UserError, match=said):
    controlnet_file.load(path)
