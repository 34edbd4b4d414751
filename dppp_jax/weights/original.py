"""The module names of Stable Diffusion's original code, beside diffusers'.

Single-file checkpoints have them, and so have the LoRAs that were trained on
such files. A table is a dict of prefixes, {diffusers' name: original name}, for
one network: the numbers of the original's blocks depend on its depth.

    names = original.unet(tree)
    original.rename("input_blocks.4.1.proj_in.bias", original.swap(names))
"""

from collections.abc import Mapping
import itertools

from dppp_jax import trees, types
from dppp_jax.weights import diffusion_rules

_RESNET = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}
# The names that diffusers gave the VAE's attention at first: what is a linear
# layer there is a 1x1 convolution here, as `autoencoder(is_old=True)` knows.
_VAE_ATTENTION = {
  "group_norm": "norm",
  "query": "q",
  "key": "k",
  "value": "v",
  "proj_attn": "proj_out",
}


def unet(params: types.Params) -> dict[str, str]:
  """Returns the table of a UNet.

  Args:
    params: its tree, or the tree of its shapes; only names are looked at.
  """
  tree = _modules(params)
  names = _down(tree) | {"conv_norm_out": "out.0", "conv_out": "out.2"}
  n = 0
  for i in _while(tree, "up_blocks.{}.resnets.0"):
    block = f"up_blocks.{i}"
    for j in _while(tree, block + ".resnets.{}"):
      names |= _layer(tree, block, j, f"output_blocks.{n}")
      n += 1
    # The upsampling stands in the block of the last layer, behind its parts.
    place = 2 if _has(tree, f"{block}.attentions.{j}") else 1
    if _has(tree, f"{block}.upsamplers.0"):
      upsampler = f"output_blocks.{n - 1}.{place}.conv"
      names[f"{block}.upsamplers.0.conv"] = upsampler
  return names


def controlnet(params: types.Params) -> dict[str, str]:
  """Returns the table of a ControlNet, as `unet` that of a UNet."""
  tree = _modules(params)
  names = _down(tree) | {"controlnet_mid_block": "middle_block_out.0"}
  for i in _while(tree, "controlnet_down_blocks.{}"):
    names[f"controlnet_down_blocks.{i}"] = f"zero_convs.{i}.0"
  # Convolutions and activations take turns in one sequence.
  hint = "controlnet_cond_embedding"
  blocks = [f"{hint}.blocks.{i}" for i in _while(tree, hint + ".blocks.{}")]
  for i, name in enumerate([f"{hint}.conv_in", *blocks, f"{hint}.conv_out"]):
    names[name] = f"input_hint_block.{2 * i}"
  return names


def vae(params: types.Params) -> dict[str, str]:
  """Returns the table of a VAE, as `unet` that of a UNet.

  Diffusers' names are those of its old files; see `_VAE_ATTENTION`.
  """
  tree = _modules(params)
  names = {}
  for part in ("encoder", "decoder"):
    side = "down" if part == "encoder" else "up"
    blocks = _while(tree, f"{part}.{side}_blocks.{{}}")
    for i in blocks:
      block = f"{part}.{side}_blocks.{i}"
      # The original counts the decoder's levels from the finest one.
      level = i if part == "encoder" else len(blocks) - 1 - i
      other = f"{part}.{side}.{level}"
      for j in _while(tree, block + ".resnets.{}"):
        names[f"{block}.resnets.{j}"] = f"{other}.block.{j}"
        shortcut = f"{other}.block.{j}.nin_shortcut"
        names[f"{block}.resnets.{j}.conv_shortcut"] = shortcut
      names[f"{block}.{side}samplers.0"] = f"{other}.{side}sample"
    for j in range(2):
      names[f"{part}.mid_block.resnets.{j}"] = f"{part}.mid.block_{j + 1}"
    for name, old in _VAE_ATTENTION.items():
      attention = f"{part}.mid_block.attentions.0.{name}"
      names[attention] = f"{part}.mid.attn_1.{old}"
    names[f"{part}.conv_in"] = f"{part}.conv_in"
    names[f"{part}.conv_norm_out"] = f"{part}.norm_out"
    names[f"{part}.conv_out"] = f"{part}.conv_out"
  return names | {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
  }


def swap(names: Mapping[str, str]) -> dict[str, str]:
  """Returns the table for the other direction."""
  return {new: old for old, new in names.items()}


def rename(
  name: str, names: Mapping[str, str], *, sep: str = "."
) -> str | None:
  """Exchanges the longest prefix of a name that a table knows.

  Args:
    name: of a module or tensor.
    names: {prefix: other prefix}.
    sep: what ends a prefix.

  Returns:
    The other name; None where the table knows no prefix.
  """
  end = len(name)
  while end > 0:
    if (other := names.get(name[:end])) is not None:
      return other + name[end:]
    end = name.rfind(sep, 0, end)
  return None


def _down(tree: set[str]) -> dict[str, str]:
  """Returns the table of what UNets and ControlNets share."""
  names = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
  }
  n = 1
  for i in _while(tree, "down_blocks.{}.resnets.0"):
    block = f"down_blocks.{i}"
    for j in _while(tree, block + ".resnets.{}"):
      names |= _layer(tree, block, j, f"input_blocks.{n}")
      n += 1
    if _has(tree, f"{block}.downsamplers.0"):
      names[f"{block}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
      n += 1
  names |= _resnet("mid_block.resnets.0", "middle_block.0")
  names["mid_block.attentions.0"] = "middle_block.1"
  return names | _resnet("mid_block.resnets.1", "middle_block.2")


def _layer(tree: set[str], block: str, j: int, other: str) -> dict[str, str]:
  names = _resnet(f"{block}.resnets.{j}", f"{other}.0")
  if _has(tree, f"{block}.attentions.{j}"):
    names[f"{block}.attentions.{j}"] = f"{other}.1"
  return names


def _resnet(name: str, other: str) -> dict[str, str]:
  return {f"{name}.{k}": f"{other}.{v}" for k, v in _RESNET.items()}


def _modules(params: types.Params) -> set[str]:
  """Returns the paths of all modules, and of what they lie in."""
  found = set()
  for path in trees.flatten(params):
    parts = path.split("/")
    found |= {"/".join(parts[:n]) for n in range(1, len(parts))}
  return found


def _has(tree: set[str], name: str) -> bool:
  return diffusion_rules.path(name) in tree


def _while(tree: set[str], template: str) -> range:
  """Returns the numbers from 0 on for which the tree has the module."""
  counts = itertools.count()
  return range(next(n for n in counts if not _has(tree, template.format(n))))
