"""The tables of diffusers' UNets, ControlNets and VAEs, and stacked layers."""

from collections.abc import Iterable, Mapping
import re
from typing import Any

import numpy as np

from dppp_jax import trees
from dppp_jax.models import unet_config
from dppp_jax.weights import convert

Rule = convert.Rule

_LAYER = re.compile(r"((?:.*/)?transformer_blocks)_(\d+)/(.*)")
_STACK = re.compile(r"((?:.*/)?transformer_blocks)/(.*)")
# The VAE's linear layers, where a file of before 2023 has 1x1 convolutions.
_POINTWISE = convert.Transform(
  lambda x: x.reshape(x.shape[:2]).transpose(1, 0),
  lambda x: x.transpose(1, 0),
)


def unet(config: unet_config.Config) -> list[Rule]:
  """Returns the table of a UNet2DConditionModel."""
  return [
    *_backbone(config),
    *_linear("encoder_hid_proj"),
    *_norm("conv_norm_out"),
    *_conv("conv_out"),
  ]


def controlnet(config: unet_config.ControlNetConfig) -> list[Rule]:
  """Returns the table of a ControlNetModel."""
  return [
    *_backbone(config),
    *_conv("controlnet_cond_embedding.{side:conv_in|conv_out}"),
    *_conv("controlnet_cond_embedding.blocks.{i}"),
    *_conv("controlnet_down_blocks.{i}"),
    *_conv("controlnet_mid_block"),
  ]


def controlnet_union(config: unet_config.UnionConfig) -> list[Rule]:
  """Returns the table of a ControlNetUnionModel."""
  layer = "transformer_layes.{i}."
  fused = lambda leaf: tuple(
    f"transformer_layes_{{i}}/attn/{name}_proj/{leaf}" for name in "qkv"
  )
  split = convert.split
  return [
    *controlnet(config),
    Rule("task_embedding", "task_embedding"),
    *_linear("spatial_ch_projs"),
    *_linear("control_add_embedding.{n:linear_1|linear_2}"),
    Rule(
      layer + "attn.in_proj_weight",
      fused("kernel"),
      split(3, convert.LINEAR),
    ),
    Rule(layer + "attn.in_proj_bias", fused("bias"), split(3, convert.SAME)),
    *_linear(layer + "attn.out_proj"),
    *_linear(layer + "mlp.{n:c_fc|c_proj}", "transformer_layes_{i}/mlp_{n}"),
    *_norm(layer + "{norm:ln_1|ln_2}"),
  ]


def autoencoder(*, is_old: bool = False) -> list[Rule]:
  """Returns the table of an AutoencoderKL.

  Args:
    is_old: the attention has the names of before diffusers 0.18.
  """
  blocks = "{part:encoder|decoder}.{side:down|up}_blocks.{i}."
  middle = "{part:encoder|decoder}.mid_block."
  attention = middle + "attentions.{j}."
  target = "{part}/mid_block/attentions_{j}/"
  if is_old:
    linear = [
      rule
      for old, new in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out_0"),
      )
      for rule in _linear(attention + old, target + new, _POINTWISE)
    ]
  else:
    linear = [
      *_linear(attention + "{name:to_q|to_k|to_v}"),
      *_linear(attention + "to_out.0"),
    ]
  return [
    *_conv("{part:encoder|decoder}.{name:conv_in|conv_out}"),
    *_norm("{part:encoder|decoder}.conv_norm_out"),
    *_resnets(blocks, with_time=False),
    *_conv(blocks + "{kind:downsamplers|upsamplers}.0.conv"),
    *_resnets(middle, with_time=False),
    *_norm(attention + "group_norm"),
    *linear,
    *_conv("{name:quant_conv|post_quant_conv}"),
  ]


def stack_layers(
  params: Mapping[str, Any], *, stack_from: int
) -> dict[str, Any]:
  """Stacks the transformer blocks of deep transformers, for `nn.scan`.

  Args:
    params: nested or flat tree with `transformer_blocks_0` and so on.
    stack_from: the depth from which on a transformer is stacked; 0: none.

  Returns:
    The nested tree with `transformer_blocks`, leaves [depth, ...] of NumPy.
  """
  flat = trees.flatten(params)
  return trees.unflatten(
    {
      name: np.stack([flat[n] for n in layers]) if layers else flat[name]
      for name, layers in stacked_names(flat, stack_from=stack_from).items()
    }
  )


def stacked_names(
  names: Iterable[str], *, stack_from: int
) -> dict[str, tuple[str, ...]]:
  """Returns {leaf: the leaves that are stacked in it}, () for all others.

  Args:
    names: of the leaves with `transformer_blocks_0` and so on.
    stack_from: as in `stack_layers`.
  """
  groups: dict[str, dict[int, str]] = {}
  for name in names:
    if m := _LAYER.fullmatch(name):
      groups.setdefault(f"{m[1]}/{m[3]}", {})[int(m[2])] = name
    else:
      groups[name] = {}
  found: dict[str, tuple[str, ...]] = {}
  for stacked, layers in groups.items():
    if not layers or 0 < stack_from <= len(layers):
      found[stacked] = tuple(layers[i] for i in range(len(layers)))
    else:
      found |= dict.fromkeys(layers.values(), ())
  return found


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested tree with `transformer_blocks_0` and so on again."""
  flat = {}
  for name, leaf in trees.flatten(params).items():
    if m := _STACK.fullmatch(name):
      for i, layer in enumerate(leaf):
        flat[f"{m[1]}_{i}/{m[2]}"] = layer
    else:
      flat[name] = leaf
  return trees.unflatten(flat)


def _backbone(config: unet_config.BackboneConfig) -> list[Rule]:
  """Returns what UNets and ControlNets share."""
  if config.class_embed_type is None:
    classes = [Rule("class_embedding.weight", "class_embedding/embedding")]
  elif config.class_embed_type == "simple_projection":
    classes = _linear("class_embedding")
  else:
    classes = _linear("class_embedding.{n:linear_1|linear_2}")
  project = _linear if config.use_linear_projection else _conv
  rules = [
    *_conv("conv_in"),
    *_linear("time_embedding.{n:linear_1|linear_2|cond_proj}"),
    *_linear("add_embedding.{n:linear_1|linear_2}"),
    *classes,
    *_conv("{side:down|up}_blocks.{i}.{kind:downsamplers|upsamplers}.0.conv"),
  ]
  for block in ("{side:down|up}_blocks.{i}.", "mid_block."):
    attention = block + "attentions.{j}."
    layer = attention + "transformer_blocks.{k}."
    rules += [
      *_resnets(block, with_time=True),
      *_norm(attention + "norm"),
      *project(attention + "{name:proj_in|proj_out}"),
      *_norm(layer + "{norm:norm1|norm2|norm3}"),
      *_linear(layer + "{attn:attn1|attn2}.{name:to_q|to_k|to_v}"),
      *_linear(layer + "{attn:attn1|attn2}.to_out.0"),
      *_linear(layer + "ff.net.0.proj"),
      *_linear(layer + "ff.net.2"),
    ]
  return rules


def _resnets(block: str, *, with_time: bool) -> list[Rule]:
  resnet = block + "resnets.{j}."
  return [
    *_norm(resnet + "{norm:norm1|norm2}"),
    *_conv(resnet + "{conv:conv1|conv2|conv_shortcut}"),
    *(_linear(resnet + "time_emb_proj") if with_time else ()),
  ]


def _linear(
  source: str,
  target: str | None = None,
  transform: convert.Transform = convert.LINEAR,
) -> list[Rule]:
  target = target or path(source)
  return [
    Rule(source + ".weight", target + "/kernel", transform),
    Rule(source + ".bias", target + "/bias"),
  ]


def _conv(source: str) -> list[Rule]:
  return _linear(source, transform=convert.CONV)


def _norm(source: str) -> list[Rule]:
  target = path(source)
  return [
    Rule(source + ".weight", target + "/scale"),
    Rule(source + ".bias", target + "/bias"),
  ]


def path(source: str) -> str:
  """Returns the place in the tree of a module of a torch network.

  "a.0.b" is a_0/b: numbers belong to the name before them.

  Args:
    source: the module's name; may hold placeholders of `convert.Rule`.
  """
  target = re.sub(r"\{(\w+):[^{}]*\}", r"{\1}", source)
  target = re.sub(r"\.(\d+|\{[ijk]\})(?=\.|$)", r"_\1", target)
  return target.replace(".", "/")
