"""What a file of weights is called, told by the names of its tensors.

Who is given a LoRA where a checkpoint is wanted should hear "LoRA", not the
names of tensors that fit nowhere.
"""

from collections.abc import Iterable
import re

# The first that some name matches. Names that begin with model.diffusion_model.
# are of whole checkpoints and come last.
_KINDS = (
  (r"lora_controlnet", "a control-LoRA"),
  (r"lllite_.*", "a ControlNet-LLLite"),
  (
    r"lora_(?:unet|transformer)_(?:double|single|joint)_.*"
    r"|(?:transformer\.)?(?:single_transformer|double|joint)_blocks\..*lora.*"
    r"|transformer\.(?:single_)?transformer_blocks\..*",
    "a LoRA of Flux, SD3 or another transformer",
  ),
  (
    r".*[._]lora[._](?:up|down|[AB])\..*|.*\.lora_(?:up|down|mid)\..*"
    r"|.*\.(?:hada_w1_a|hada_w1_b|lokr_w[12](?:_a)?)",
    "a LoRA",
  ),
  (r".*\.(?:oft_blocks|oft_diag|boft_R.*|a1\.weight)", "an OFT, BOFT or GLoRA"),
  (
    r"control_model\..*|controlnet_cond_embedding\..*|input_hint_block\..*",
    "a ControlNet",
  ),
  (r"(?:image_proj|ip_adapter)\..*", "an IP-Adapter"),
  (r"(?:adapter\.)?body\.0\.(?:block1|resnets|in_conv)\..*", "a T2I-Adapter"),
  (r"emb_params|clip_l|clip_g|string_to_param.*", "a textual inversion"),
  (r".*\.motion_modules\..*", "a motion module of AnimateDiff"),
  (r".*\b(?:double_blocks|single_transformer_blocks)\..*", "a Flux"),
  (r".*\bjoint_blocks\..*", "a Stable Diffusion 3"),
  (r".*\.time_stack\..*|.*\.temporal_transformer_blocks\..*", "a video model"),
  (r"stage1\.rebnconvin\..*", "a U-2-Net or a kin of it"),
  (r"bb\..*|squeeze_module\..*", "a BiRefNet"),
  (r".*\.absmax|.*\.quant_map|.*\.qweight", "quantised weights"),
)
_LATER = (
  (r"down_blocks\.0\..*", "a UNet alone, with the names of diffusers"),
  (r"input_blocks\.0\..*", "a UNet alone"),
  (
    r"(?:first_stage_model\.|vae\.)?(?:encoder|decoder)\.conv_in\..*",
    "a VAE alone",
  ),
  (
    r"vision_model\..*|visual\.conv1\..*|.*image_encoder.*",
    "a CLIP or its vision tower",
  ),
  (r"text_model\..*|token_embedding\..*", "a text encoder alone"),
)


def called(names: Iterable[str]) -> str | None:
  """Returns what a file is, such as "a LoRA"; None where nothing tells it.

  Args:
    names: of its tensors.
  """
  names = list(names)
  is_whole = any(name.startswith("model.diffusion_model.") for name in names)
  kinds = _KINDS if is_whole else _KINDS + _LATER
  for pattern, kind in kinds:
    regex = re.compile(pattern)
    if any(regex.fullmatch(name) for name in names):
      return kind
  return "a checkpoint of Stable Diffusion" if is_whole else None
