"""ControlNets in a file of any name, with or without a config.json beside it.

    config, params = controlnet_file.load("OpenPoseXL2.safetensors")

A configuration beside a file is believed where the file's tensors are those of
its network; else it is of another file, and the sizes are read off the tensors.
What no tensor tells is that of the UNet that it was made from, where that is
known, or of the base models: heads are 64 wide (in SD 1.x there are 8).
Pictures are RGB, and residuals are not pooled.
"""

from collections.abc import Mapping, Sequence
import itertools
import pathlib
from typing import Any

from absl import logging
import numpy as np

from dppp_jax import errors, logs, paths, trees, types
from dppp_jax.models import controlnet as controlnet_lib
from dppp_jax.models import controlnet_union, unet_config
from dppp_jax.weights import (
  convert,
  diffusers_folder,
  diffusion_rules,
  hub,
  kinds,
  original,
  single_file,
)

Tensors = Mapping[str, np.ndarray]

_PREFIX = "control_model."
_COND = "controlnet_cond_embedding."
_HEAD = 64
# Of the configuration: what no tensor tells, and what a UNet lends its copies.
_UNTOLD = (
  *("attention_head_dim", "num_attention_heads", "addition_time_embed_dim"),
  *("norm_num_groups", "norm_eps", "act_fn", "flip_sin_to_cos", "freq_shift"),
)


def load(
  path: single_file.Path,
  *,
  config: unet_config.ControlNetConfig | None = None,
  variant: str | None = None,
  stack_from: int = 0,
) -> tuple[unet_config.ControlNetConfig, types.Params]:
  """Loads a ControlNet, or a union of them, from wherever it lies.

  Args:
    path: a file of any name, with diffusers' names or those of the original
      code; a folder is left to `diffusers_folder`.
    config: its sizes; None: what the configuration beside it says, where that
      is of this file, or the tensors.
    variant: of a folder, which of several precisions to read, e.g. "fp16".
    stack_from: transformers at least so deep come stacked.

  Returns:
    The configuration and the parameters of `controlnet_union.build(config)`.

  Raises:
    errors.UserError: no such file, a damaged one, no ControlNet, or a tensor
      that is missing, left over or of another shape.
  """
  if config is None and is_folder(path, variant=variant):
    return diffusers_folder.controlnet(
      path, variant=variant, stack_from=stack_from
    )
  where = str(path)
  config, tensors, is_original = _open(path, config)
  shapes, rules = _network(config)
  if is_original:
    names = original.controlnet(shapes)
    part = single_file.Part(_PREFIX, shapes, rules, names)
    tensors = part.rename(tensors)
  flat = convert.convert(tensors, rules, where=where)
  params = trees.merge(shapes, flat, where=where)
  return config, diffusion_rules.stack_layers(params, stack_from=stack_from)


def read_config(
  path: single_file.Path, *, unet: unet_config.Config | None = None
) -> unet_config.ControlNetConfig:
  """Returns the configuration that `load` would, without the weights.

  Args:
    path: as in `load`.
    unet: the UNet that it is to steer. Where it has the same widths it tells,
      of a file without config.json, what tensors do not: then hand the
      configuration to `load`.

  Raises:
    errors.UserError: as `load`, but for what only the weights show.
  """
  if is_folder(path):
    return diffusers_folder.read_config(path, "controlnet")
  return _open(path, None, unet)[0]


def is_folder(path: single_file.Path, *, variant: str | None = None) -> bool:
  """Tells whether a path is a folder that diffusers wrote."""
  return diffusers_folder.resolve(path, variant=variant).is_dir()


def config_file(path: single_file.Path) -> pathlib.Path | None:
  """Returns the configuration beside a file that is believed, if any.

  Args:
    path: of the file, as in `load`.
  """
  path = paths.expand(path)
  tensors, is_original = _read(path)
  found = None if is_original else _beside(path, tensors)
  return None if found is None else found[0]


def _network(
  config: unet_config.ControlNetConfig,
) -> tuple[types.Params, Sequence[convert.Rule]]:
  """Returns the shapes and the table of a ControlNet or a union."""
  if isinstance(config, unet_config.UnionConfig):
    shapes = controlnet_union.param_shapes(config)
    return shapes, diffusion_rules.controlnet_union(config)
  return controlnet_lib.param_shapes(config), diffusion_rules.controlnet(config)


def _beside(
  path: pathlib.Path, tensors: Tensors
) -> tuple[pathlib.Path, unet_config.ControlNetConfig] | None:
  """Returns the first configuration beside a file that is of this file.

  diffusion_pytorch_model_promax.safetensors goes with config_promax.json, and
  x.safetensors with x.json; a plain config.json may be of any file there.
  """
  stem = path.name.partition(".")[0]
  rest = stem.removeprefix("diffusion_pytorch_model")
  names = [f"config{rest}.json", f"{stem}.json", f"{stem}_config.json"]
  names += [f"{stem}.config.json", "config.json"]
  for name in dict.fromkeys(names):
    file = path.parent / name
    if not file.is_file():
      continue
    config, said = _believe(file, tensors)
    if config is not None:
      return file, config
    logs.say(
      f"{file} {said}: the sizes of {path.name} are read off its tensors"
    )
  return None


def _believe(
  file: pathlib.Path, tensors: Tensors
) -> tuple[unet_config.ControlNetConfig | None, str]:
  """Returns a configuration that fits the tensors, or why it does not."""
  values = hub.read_json(file)
  kind = values.get("_class_name")
  classes = {
    "ControlNetModel": unet_config.ControlNetConfig,
    "ControlNetUnionModel": unet_config.UnionConfig,
  }
  if kind not in classes:
    model = kind or values.get("model_type") or values.get("architectures")
    return None, f"is of a {model or 'network without a name'}, no ControlNet"
  config = classes[kind].from_hf(values)  # Refuses by name what is not built.
  try:
    shapes, rules = _network(config)
    flat = convert.shapes(tensors, rules, where=str(file))
    trees.merge(shapes, flat, where=str(file))
  except errors.UserError as error:
    logging.info("%s", error)
    return None, "is of another ControlNet"
  return config, ""


def _open(
  path: single_file.Path,
  config: unet_config.ControlNetConfig | None,
  unet: unet_config.Config | None = None,
) -> tuple[unet_config.ControlNetConfig, Tensors, bool]:
  """Returns sizes and tensors, and whether those have the original names."""
  path = hub.resolve(path)
  tensors, is_original = _read(path)
  if config is not None:
    return config, tensors, is_original
  if is_original:
    return _SD1, tensors, is_original
  found = _beside(path, tensors)
  if found is not None:
    return found[1], tensors, is_original
  return _read_sizes(tensors, str(path), unet), tensors, is_original


def _read(path: pathlib.Path) -> tuple[Tensors, bool]:
  """Returns the tensors, and whether they have the original names."""
  where = str(path)
  tensors: Tensors = hub.read_tensors(path)
  if "lora_controlnet" in tensors or any(n.endswith(".down") for n in tensors):
    raise errors.UserError(
      f"{where} is a control-LoRA, the difference of a ControlNet to its base"
      " model: use the whole ControlNet"
    )
  own = {
    name.removeprefix(_PREFIX): tensor
    for name, tensor in tensors.items()
    if name.startswith(_PREFIX)
  }
  tensors = own or tensors
  is_original = "time_embed.0.weight" in tensors and not any(
    name.startswith("model.diffusion_model.") for name in tensors
  )
  has_hint = "input_hint_block.0.weight" in tensors if is_original else False
  if not has_hint and f"{_COND}conv_in.weight" not in tensors:
    kind = kinds.called(tensors)
    begins = ", ".join(sorted(tensors)[:3]) or "nothing"
    said = f"is {kind}" if kind else f"begins with {begins}"
    raise errors.UserError(
      f"{where} holds no ControlNet (it {said}): give a ControlNet of SDXL or"
      " SD 1.x"
    )
  return tensors, is_original


_SD1 = unet_config.ControlNetConfig(cross_attention_dim=768)


def _read_sizes(
  tensors: Tensors, where: str, unet: unet_config.Config | None
) -> unet_config.ControlNetConfig:
  """Returns the configuration of tensors with diffusers' names."""
  try:
    fields = _sizes(tensors)
    if unet and unet.block_out_channels == fields["block_out_channels"]:
      fields |= {name: getattr(unet, name) for name in _UNTOLD}
    told = fields.get("projection_class_embeddings_input_dim")
    if told is not None and told <= 6 * fields["addition_time_embed_dim"]:
      raise ValueError(f"{told} numbers of pooled text and sizes")
    if "task_embedding" not in tensors:
      return unet_config.ControlNetConfig(**fields)
    del fields["mid_block_type"]  # A union has only one.
    kinds, width = tensors["task_embedding"].shape
    return unet_config.UnionConfig(
      **fields,
      num_control_type=kinds,
      num_trans_channel=width,
      num_trans_layer=_count(tensors, "transformer_layes.{}.ln_1.weight"),
      num_proj_channel=tensors["spatial_ch_projs.weight"].shape[0],
    )
  except (KeyError, ValueError, IndexError) as error:
    raise errors.UserError(
      f"{where} is no ControlNet whose sizes can be read ({error}): put the"
      " config.json of its repository beside it"
    ) from error


def _sizes(tensors: Tensors) -> dict[str, Any]:
  shape = lambda name: tensors[name].shape
  levels = _count(tensors, "down_blocks.{}.resnets.0.conv1.weight")
  names = [f"down_blocks.{i}." for i in range(levels)]
  widths = tuple(shape(n + "resnets.0.conv1.weight")[0] for n in names)
  layers = [_count(tensors, n + "resnets.{}.conv1.weight") for n in names]
  has_text = [n + "attentions.0.norm.weight" in tensors for n in names]
  attention = "attentions.0.transformer_blocks.{}.norm1.weight"
  depths = [_count(tensors, n + attention) for n in names]
  has_mid_text = "mid_block.attentions.0.norm.weight" in tensors
  if has_mid_text and not has_text[-1]:
    depths[-1] = _count(tensors, "mid_block." + attention)
  # A block without transformers takes any depth: diffusers writes 1.
  depths = [
    depth if cross or (has_mid_text and i == levels - 1) else 1
    for i, (depth, cross) in enumerate(zip(depths, has_text, strict=True))
  ]
  if has_mid_text:
    mid = "UNetMidBlock2DCrossAttn"
  else:
    is_there = "mid_block.resnets.0.conv1.weight" in tensors
    mid = "UNetMidBlock2D" if is_there else None
  proj_in = [n for n in tensors if n.endswith("attentions.0.proj_in.weight")]
  is_linear = any(len(shape(name)) == 2 for name in proj_in)
  is_xl = "add_embedding.linear_1.weight" in tensors
  text = [n for n in tensors if n.endswith("attn2.to_k.weight")]
  steps = _count(tensors, _COND + "blocks.{}.weight")
  hint = [shape(f"{_COND}conv_in.weight")[0]]
  hint += [shape(f"{_COND}blocks.{i}.weight")[0] for i in range(1, steps, 2)]
  fields = dict(
    in_channels=shape("conv_in.weight")[1],
    block_out_channels=widths,
    down_block_types=tuple(
      "CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in has_text
    ),
    mid_block_type=mid,
    layers_per_block=layers[0] if len(set(layers)) == 1 else tuple(layers),
    transformer_layers_per_block=tuple(depths),
    attention_head_dim=(
      tuple(max(1, width // _HEAD) for width in widths)
      if is_xl or is_linear
      else 8
    ),
    use_linear_projection=is_linear,
    conditioning_channels=shape(f"{_COND}conv_in.weight")[1],
    conditioning_embedding_out_channels=tuple(hint),
  )
  if text:
    fields["cross_attention_dim"] = shape(text[0])[1]
  if is_xl:
    fields |= dict(
      addition_embed_type="text_time",
      addition_time_embed_dim=256,
      projection_class_embeddings_input_dim=shape(
        "add_embedding.linear_1.weight"
      )[1],
    )
  return fields


def _count(tensors: Tensors, template: str) -> int:
  counts = itertools.count()
  return next(n for n in counts if template.format(n) not in tensors)
