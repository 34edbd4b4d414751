"""What the tensors of a LoRA file are called, and which modules they mean.

Every trainer writes the same few factors under names of its own: diffusers (two
generations) and peft with dots, kohya's scripts and LyCORIS with underscores
throughout, on diffusers' module names or on those of the original code. A name
with underscores cannot be taken apart again, so nothing is: the modules of the
network at hand are written in each of these ways, and looked up.
"""

from collections.abc import Mapping
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from dppp_jax import errors, trees, types
from dppp_jax.weights import diffusion_rules, hub, original

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

_PREFIXES = (
  ("lora_unet_", "unet"),
  ("lora_te_", "text_encoder"),
  ("lora_te1_", "text_encoder"),
  ("lora_te2_", "text_encoder_2"),
  ("lycoris_", "unet"),
  ("unet.", "unet"),
  ("text_encoder.", "text_encoder"),
  ("text_encoder_2.", "text_encoder_2"),
)
_LORA = r"(?:[._]lora\.{0}|\.lora_linear_layer\.{0}|\.lora_{0}|\.lora_{1})"
# A tensor's part in its module, by the end of its name.
_ROLES = {
  "down": _LORA.format("down", r"A(?:\.default)?") + r"\.weight",
  "up": _LORA.format("up", r"B(?:\.default)?") + r"\.weight",
  "up_bias": _LORA.format("up", r"B(?:\.default)?") + r"\.bias",
  "mid": r"\.lora_mid\.weight",
  "alpha": r"(?:[._]lora|\.lora_linear_layer)?\.alpha",
  "dora": r"\.dora_scale",
  "magnitude": r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?",
  **{
    name: rf"\.{name}"
    for name in (
      *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
      *("hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b"),
      *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "on_input"),
    )
  },
  "diff": r"\.(?:diff|w_norm)",
  "diff_b": r"\.(?:diff_b|b_norm)",
  "ia3": r"\.weight",
}
# The shortest module name, so the longest ending, wins.
_NAME = re.compile(
  "(.+?)(?:" + "|".join(f"(?P<{k}>{v})" for k, v in _ROLES.items()) + ")"
)
# Where the weights of diffusers' `save_lora_weights` are in a folder.
_USUAL = "pytorch_lora_weights.safetensors"


class Target(NamedTuple):
  """A module in the trees.

  Attributes:
    component: of `COMPONENTS`.
    path: of the module in the component's tree.
    index: which of stacked layers; None where nothing is stacked.
  """

  component: str
  path: str
  index: int | None = None


class File(NamedTuple):
  """What a LoRA file holds.

  Attributes:
    path: of the file.
    modules: {module: {part: float32 array}}.
    unmatched: names of modules, or of strange tensors, that the networks do
      not have.
    metadata: of the header.
  """

  path: pathlib.Path
  modules: dict[Target, dict[str, np.ndarray]]
  unmatched: list[str]
  metadata: dict[str, str]


def table(components: Mapping[str, types.Params]) -> dict[Any, Target]:
  """Returns {(component, name with underscores): module} of all spellings."""
  found: dict[Any, Target] = {}
  aliases: dict[Any, Target] = {}
  for component, params in components.items():
    is_unet = component == "unet"
    names = original.unet(params) if is_unet else {}
    names = {diffusion_rules.path(k): v for k, v in names.items()}
    for target, path in _modules(component, params):
      flat = path.replace("/", "_")
      found[component, flat] = target
      others = _unet_aliases(path, names) if is_unet else _text_aliases(flat)
      for other in others:
        aliases.setdefault((component, other), target)
  return aliases | found


def read(path: str | pathlib.Path, names: Mapping[Any, Target]) -> File:
  """Reads a file and finds the module of each tensor.

  Args:
    path: a file of any name, a folder with one, or a hub id.
    names: of `table`.

  Raises:
    errors.UserError: nothing to read, a damaged file, or two different
      tensors for one part of a module.
  """
  path = locate(path)
  tensors = hub.read_tensors(path)
  metadata = _metadata(path)
  modules: dict[Target, dict[str, np.ndarray]] = {}
  patterns: dict[Target, str] = {}
  unmatched = []
  # Only IA3 calls its numbers "weight", and only beside "on_input".
  has_ia3 = {n.removesuffix(".on_input") for n in tensors if "on_input" in n}
  for name, tensor in tensors.items():
    m = _NAME.fullmatch(name)
    if m is None or (m.lastgroup == "ia3" and m[1] not in has_ia3):
      unmatched.append(name)
      continue
    owner, stem = _place(m[1])
    target = names.get((owner, stem.replace(".", "_")))
    if target is None:
      unmatched.append(m[1])
      continue
    role = str(m.lastgroup)
    value = _numbers(tensor, role, f"{path}: tensor {name}")
    parts = modules.setdefault(target, {})
    if role in parts and not np.array_equal(parts[role], value):
      raise errors.UserError(
        f"{path}: {name} is the second, and another, {role} for"
        f" {target.component}/{target.path}: remove one of the two"
      )
    parts[role] = value
    patterns[target] = stem
  for target, parts in modules.items():
    _add_alpha(parts, patterns[target], target.component, metadata, path)
  return File(path, modules, sorted(set(unmatched)), metadata)


def component(name: str) -> str:
  """Returns the component that the name of a module or tensor means."""
  return _place(name)[0]


def _modules(component: str, params: types.Params) -> list[Any]:
  """Returns (target, path as if nothing were stacked) of what has weights."""
  found = []
  for name, leaf in trees.flatten(params).items():
    path, _, kind = name.rpartition("/")
    if kind not in ("kernel", "scale", "embedding"):
      continue
    before, stacked, after = path.partition("/transformer_blocks/")
    if not stacked:
      found.append((Target(component, path), path))
      continue
    for i in range(leaf.shape[0]):
      single = f"{before}/transformer_blocks_{i}/{after}"
      found.append((Target(component, path, i), single))
  return found


def _unet_aliases(path: str, names: Mapping[str, str]) -> list[str]:
  """In the original code's names; without the number behind `to_out`."""
  found = []
  if (other := original.rename(path, names, sep="/")) is not None:
    found.append(other)
  if path.endswith("to_out_0"):  # Early diffusers' attention processors.
    found.append(path.removesuffix("_0"))
  return [re.sub("[./]", "_", name) for name in found]


def _text_aliases(flat: str) -> list[str]:
  """Without transformers 4's outer name; with early diffusers' inner names."""
  found = [flat.removeprefix("text_model_")]
  if flat.endswith("out_proj"):
    found.append(flat.removesuffix("out_proj") + "to_out")
  elif flat.endswith(("q_proj", "k_proj", "v_proj")):
    found.append(f"{flat[:-6]}to_{flat[-6]}")
  return found


def _place(stem: str) -> tuple[str, str]:
  """Returns the component that a module's name means, and the rest of it."""
  meant = "unet"  # Of names that do not say: diffusers' oldest files.
  for prefix, value in _PREFIXES:
    if stem.startswith(prefix):
      meant, stem = value, stem.removeprefix(prefix)
      break
  stem = stem.removeprefix("base_model.model.")
  return meant, stem.replace(".processor", "")


def _numbers(tensor: np.ndarray, role: str, where: str) -> np.ndarray:
  """Returns float32; refuses what is no number, and what is quantised."""
  # bfloat16 and float8 are foreign to NumPy: they have the kind "V".
  is_float = tensor.dtype.kind in "fV"
  if not is_float and role not in ("alpha", "on_input"):
    raise errors.UserError(
      f"{where} holds {tensor.dtype.name}, not floats: use the file that was"
      " not quantised"
    )
  value = np.asarray(tensor, np.float32)
  if not np.isfinite(value).all():
    raise errors.UserError(
      f"{where} holds NaN or infinity: the file is damaged or its training"
      " diverged; use another one"
    )
  return value


def locate(path: str | pathlib.Path) -> pathlib.Path:
  """Returns the file that a LoRA is read from; `path` as in `read`."""
  path = hub.resolve(path, patterns=("*.safetensors", "*.json"))
  if not path.is_dir():
    return path
  files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
  usual = path / _USUAL
  if usual in files:
    return usual
  if len(files) != 1:
    raise errors.UserError(
      f"{path} holds {len(files)} weight files and no {_USUAL}: name the LoRA"
      " file itself"
    )
  return files[0]


def _metadata(path: pathlib.Path) -> dict[str, str]:
  """Returns the texts in the header of a file that was read already."""
  if path.suffix != ".safetensors":
    return {}
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    values = json.loads(file.read(length)).get("__metadata__")
  return values if isinstance(values, dict) else {}


def _add_alpha(
  parts: dict[str, np.ndarray],
  stem: str,
  owner: str,
  metadata: Mapping[str, str],
  path: pathlib.Path,
) -> None:
  """Gives a module the alpha that peft wrote into the header, not beside it."""
  if "alpha" in parts or "down" not in parts:
    return
  text = metadata.get("lora_adapter_metadata")
  if text is None:
    return
  damaged = errors.UserError(
    f"{path}: lora_adapter_metadata in the header cannot be read: write the"
    " file again"
  )
  try:
    values = json.loads(text)
    of = lambda name: values.get(f"{owner}.{name}", values.get(name))
    alpha, patterns = of("lora_alpha"), of("alpha_pattern") or {}
    for pattern, value in patterns.items():
      if _means(pattern, stem, path):
        alpha = value
        break
    if alpha is None:
      return
    alpha = np.float32(alpha)
    if of("use_rslora"):  # alpha / sqrt(r), where all others have alpha / r.
      alpha *= np.sqrt(np.float32(parts["down"].shape[0]))
  except (ValueError, TypeError, AttributeError) as error:
    raise damaged from error
  parts["alpha"] = alpha


def _means(pattern: str, stem: str, path: pathlib.Path) -> bool:
  """Tells whether one of peft's patterns, the end of a name, means a module."""
  is_whole = pattern.startswith("^")
  pattern = pattern.removeprefix("^")
  if re.fullmatch(r"[\w.]+", pattern) is None:
    raise errors.UserError(
      f"{path}: alpha_pattern {pattern!r} is a regex, where names of modules"
      " are wanted: write the file with save_lora_weights of diffusers"
    )
  return stem == pattern or (not is_whole and stem.endswith("." + pattern))
