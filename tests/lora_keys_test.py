import diffusers
from diffusers.loaders import lora_conversion_utils
import diffusers_twins as twins
import pytest
import torch
import torch_lora

from dppp_jax.models import unet
from dppp_jax.weights import diffusion_rules, lora_keys, original

kohya, layers = torch_lora.kohya, torch_lora.layers
_BY_DIFFUSERS = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers
_BLOCKS = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers


@pytest.fixture(scope="module")
def sdxl():
  """All layers' names and weights' shapes of SDXL, and our table of names."""
  with torch.device("meta"):
    net = diffusers.UNet2DConditionModel(**twins.SDXL)
  config = unet.Config.from_hf(dict(net.config))
  shapes = unet.param_shapes(config, stack_from=2)
  return net, shapes, lora_keys.table({"unet": shapes})


def paths(name):
  """Where a module lies in a tree with stacked transformers."""
  path = diffusion_rules.path(name)
  before, found, after = path.partition("/transformer_blocks_")
  if not found:
    return path, None
  index, _, after = after.partition("/")
  return f"{before}/transformer_blocks/{after}", int(index)


def test_all_of_sdxl_under_diffusers_names(sdxl):
  net, _, table = sdxl
  names = list(layers(net))
  assert len(names) == 794
  for name in names:
    found = table["unet", name.replace(".", "_")]
    assert (found.path, found.index) == paths(name), name


def test_all_of_sdxl_under_the_original_names_as_diffusers_reads_them(sdxl):
  net, shapes, table = sdxl
  names = original.unet(shapes)
  others = {name: original.rename(name, names) for name in layers(net)}
  assert len(set(others.values())) == len(others)
  tensors = {
    f"{kohya(other)}.{k}": torch.tensor([i])
    for i, other in enumerate(others.values())
    for k in ("lora_down.weight", "lora_up.weight", "alpha")
  }
  tensors = _BLOCKS(tensors, net.config)
  tensors, alphas = _BY_DIFFUSERS(tensors)
  assert len(alphas) == len(others)
  seen = {}
  for key, value in tensors.items():
    name = key.removeprefix("unet.").replace(".processor", "")
    if not name.endswith(".up.weight"):
      name = name.replace(".to_out_lora.", ".to_out.0.lora.")
      name = name.replace("_lora.down.", ".lora.down.")
      seen[name.removesuffix(".lora.down.weight")] = value.item()
  assert seen == {name: i for i, name in enumerate(others)}
  for name, other in others.items():
    found = table["unet", other.replace(".", "_")]
    assert (found.path, found.index) == paths(name), other


# Beside each other: what trainers write, and what is meant.
SPELLINGS = {
  "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q":
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
  "lora_unet_output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
  "lora_unet_output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
  "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
  "lora_unet_input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
  "lora_unet_input_blocks_0_0": "conv_in",
  "lora_unet_out_2": "conv_out",
  "lora_unet_time_embed_2": "time_embedding.linear_2",
  "lora_unet_label_emb_0_0": "add_embedding.linear_1",
  "lora_unet_middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
  "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj":
    "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
  "lora_unet_output_blocks_8_0_skip_connection":
    "up_blocks.2.resnets.2.conv_shortcut",
  "lora_unet_input_blocks_7_0_emb_layers_1":
    "down_blocks.2.resnets.0.time_emb_proj",
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_name_of_kohyas_scripts(sdxl, name):
  found = sdxl[2]["unet", name.removeprefix("lora_unet_")]
  assert (found.path, found.index) == paths(SPELLINGS[name])
