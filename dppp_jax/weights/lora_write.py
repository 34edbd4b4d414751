"""Trained LoRA factors as a file that WebUIs and diffusers read."""

from collections.abc import Mapping, Sequence
import pathlib

import numpy as np

from dppp_jax import errors, paths, trees, types
from dppp_jax.weights import convert, export

# Names of the two factors, by layout.
_NAMES = {
  "kohya": ("lora_down.weight", "lora_up.weight"),
  "peft": ("lora_A.weight", "lora_B.weight"),
}
_PREFIXES = {
  "unet": ("lora_unet_", "unet."),
  "text_encoder": ("lora_te1_", "text_encoder."),
  "text_encoder_2": ("lora_te2_", "text_encoder_2."),
}


def save(
  path: str | pathlib.Path,
  factors: types.Params,
  rules: Sequence[convert.Rule],
  *,
  alpha: float,
  component: str = "unet",
  layout: str = "kohya",
  dtype: str = "float32",
  metadata: Mapping[str, str] | None = None,
) -> pathlib.Path:
  """Writes a .safetensors file that `lora.merge` and others read.

  Args:
    path: the file; written over.
    factors: {module: {"down": [..., D, r], "up": [r, F]}}, nested by the path
      of the module in the network's tree.
    rules: the network's table, e.g. of `diffusion_rules.unet`.
    alpha: W' = W + alpha / r up down.
    component: which network, a key of `lora_keys.COMPONENTS`.
    layout: `kohya` (WebUIs) or `peft` (diffusers). peft has no place for
      alpha beside its factors, so `up` is scaled by alpha / r.
    dtype: `float32` or `float16`.
    metadata: texts for the header.

  Returns:
    The file.

  Raises:
    errors.UserError: another layout, or modules that the network has not.
  """
  if layout not in _NAMES:
    raise errors.UserError(
      f"lora layout {layout!r}: choose {' or '.join(_NAMES)}"
    )
  down_name, up_name = _NAMES[layout]
  kohya, dotted = _PREFIXES[component]
  flat = trees.flatten(factors)
  tensors = {}
  for key in flat:
    if not key.endswith("/down"):
      continue
    module = key.removesuffix("/down")
    down = np.asarray(flat[key], np.float32)
    up = np.asarray(flat[f"{module}/up"], np.float32)
    rank = up.shape[0]
    name = _name(module, down.ndim, rules)
    prefix = dotted + name + "."
    if layout == "kohya":
      prefix = kohya + name.replace(".", "_") + "."
      tensors[prefix + "alpha"] = np.asarray(alpha, np.float32)
    else:
      up = up * (alpha / rank)
    if down.ndim == 4:  # HWIO to OIHW; `up` is a 1x1 convolution.
      tensors[prefix + down_name] = down.transpose(3, 2, 0, 1)
      tensors[prefix + up_name] = up.T[:, :, None, None]
    else:
      tensors[prefix + down_name] = down.T
      tensors[prefix + up_name] = up.T
  path = paths.expand(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_name(f".{path.name}.tmp")
  export.write_tensors(scratch, tensors, dtype=dtype, metadata=metadata)
  scratch.replace(path)
  return path


def _name(module: str, ndim: int, rules: Sequence[convert.Rule]) -> str:
  """Returns the dotted name of a module, by the table of its network."""
  stand_in = {f"{module}/kernel": np.zeros((1,) * ndim, np.float32)}
  (name,) = convert.invert(stand_in, rules, where="lora")
  return name.removesuffix(".weight")
