"""What the tensors of a LoRA file are called, and which modules they mean.

Every trainer writes the same few factors under names of its own: diffusers (two
generations) and peft with dots, kohya's scripts and LyCORIS with underscores
throughout, on diffusers' module names or on those of the original code. A name
with underscores cannot be taken apart again, so nothing is: the modules of the
network at hand are written in each of these ways, and looked up.
"""

from collections.abc import Iterable, Mapping
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from dppp_jax import errors, files, trees, types
from dppp_jax.weights import (
  convert,
  diffusion_rules,
  hub,
  original,
  peft_config,
)

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

# Kohya's, LyCORIS', diffusers' and ComfyUI's; then those of whole checkpoints.
_PREFIXES = (
  *((f"lora_unet{sep}", "unet") for sep in "_."),
  *((f"lora_te{sep}", "text_encoder") for sep in "_."),
  *((f"lora_te1{sep}", "text_encoder") for sep in "_."),
  *((f"lora_te2{sep}", "text_encoder_2") for sep in "_."),
  ("lycoris_", "unet"),
  ("unet.", "unet"),
  ("text_encoder.", "text_encoder"),
  ("text_encoder_2.", "text_encoder_2"),
  ("diffusion_model.", "unet"),
  ("text_encoders.clip_l.", "text_encoder"),
  ("text_encoders.clip_g.", "text_encoder_2"),
  ("clip_l.", "text_encoder"),
  ("clip_g.", "text_encoder_2"),
  ("model.diffusion_model.", "unet"),
  ("cond_stage_model.", "text_encoder"),
  ("conditioner.embedders.0.", "text_encoder"),
  ("conditioner.embedders.1.", "text_encoder_2"),
)
_LORA = r"(?:[._]lora\.{0}|\.lora_linear_layer\.{0}|\.lora_{0}|\.lora_{1})"
_A, _B = (side + r"(?:\.[^.]+)?" for side in "AB")  # With an adapter's name.
# A tensor's part in its module, by the end of its name.
_ROLES = {
  "down": _LORA.format("down", _A) + r"\.weight",
  "up": _LORA.format("up", _B) + r"\.weight",
  "up_bias": _LORA.format("up", _B) + r"\.bias",
  "mid": r"\.lora_mid\.weight",
  "alpha": r"(?:[._]lora|\.lora_linear_layer)?\.alpha",
  "dora": r"\.dora_scale",
  "magnitude": r"\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?",
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
# The name of peft's adapter in the name of a tensor.
_ADAPTER = re.compile(r".*\.lora_[AB]\.([^.]+)\.(?:weight|bias)")
_PEFT = re.compile(r"\.lora_[AB]\.")
_WRAPPED = "base_model.model."  # Before all names in what peft itself writes.
# Parts that change nothing by themselves.
_ASIDE = frozenset(("alpha", "dora", "magnitude", "on_input"))
# Kinds of files that are not merged here, by a part that only they have. The
# other parts of such a module may look like a LoRA's.
_FOREIGN = {
  "OFT or BOFT": r"oft_blocks|oft_diag|oft_[rR]|boft_[Rs]|rescale",
  "GLoRA": r"[abg]m?[12]\.weight",
  "IA3 of peft": r"ia3_l",
  "VeRA": r"vera_lambda_[bd]",
  "AdaLoRA": r"lora_E|ranknum",
  "a LoRA of the words": r"lora_embedding_[AB]",
  "whole weights (modules_to_save)": r"modules_to_save|set_weight",
  "a LyCORIS with a factor of its own": r"scalar",
}
_STRANGE = re.compile(
  r"(.+?)\.(?:"
  + "|".join(f"(?P<k{i}>{v})" for i, v in enumerate(_FOREIGN.values()))
  + r")(?:\..*)?"
)
# OpenCLIP's names of a layer's modules, beside transformers'.
_OPEN_CLIP = {
  "self_attn_out_proj": "attn_out_proj",
  "mlp_fc1": "mlp_c_fc",
  "mlp_fc2": "mlp_c_proj",
  "layer_norm1": "ln_1",
  "layer_norm2": "ln_2",
}
# What diffusers' `save_lora_weights` and peft call the file in a folder.
_USUAL = ("pytorch_lora_weights", "adapter_model")


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
    modules: {module: {part: array}}, in the precision of the file.
    unmatched: names of modules, or of strange tensors, that the networks do
      not have, or of which nothing can be merged.
    metadata: of the header.
    foreign: kinds of modules that are not merged here.
  """

  path: pathlib.Path
  modules: dict[Target, dict[str, np.ndarray]]
  unmatched: list[str]
  metadata: dict[str, str]
  foreign: tuple[str, ...] = ()


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
  metadata = hub.metadata(path)
  modules: dict[Target, dict[str, np.ndarray]] = {}
  spelled: dict[Target, tuple[str, str]] = {}
  strange: dict[Target, str] = {}
  adapters: dict[str, set[str]] = {}
  is_peft: set[Target] = set()
  unmatched = []
  # Only IA3 calls its numbers "weight", and only beside "on_input".
  has_ia3 = {n.removesuffix(".on_input") for n in tensors if "on_input" in n}
  for name, tensor in tensors.items():
    m, kind = _NAME.fullmatch(name), _foreign(name)
    if m is None or (m.lastgroup == "ia3" and m[1] not in has_ia3):
      m = None
    if kind:
      module, kind = kind
    elif m is None:
      unmatched.append(name)
      continue
    else:
      module = m[1]
    owner, stem = _place(module)
    target = names.get((owner, stem.replace(".", "_")))
    if target is None:
      unmatched.append(f"{module} ({kind})" if kind else module)
      continue
    spelled.setdefault(target, (module, stem))
    if kind:
      strange.setdefault(target, kind)
      continue
    if found := _ADAPTER.fullmatch(name):
      adapters.setdefault(owner, set()).add(found[1])
    if _PEFT.search(name):
      is_peft.add(target)
    role = str(m.lastgroup)
    value = _numbers(tensor, role, f"{path}: tensor {name}")
    parts = modules.setdefault(target, {})
    if role in parts and not np.array_equal(parts[role], value):
      _check_adapters(adapters, path)
      raise errors.UserError(
        f"{path}: {name} is the second, and another, {role} for"
        f" {target.component}/{target.path}: remove one of the two"
      )
    parts[role] = value
  _check_adapters(adapters, path)
  for target in [t for t, parts in modules.items() if parts.keys() <= _ASIDE]:
    strange.setdefault(target, f"{' and '.join(sorted(modules[target]))} alone")
  for target, kind in strange.items():
    modules.pop(target, None)
    unmatched.append(f"{spelled[target][0]} ({kind})")
  stems = {t: spelled[t][1] for t in modules if t in is_peft}
  _add_alphas(modules, stems, metadata, path, _config(path, tensors))
  _check_notes(modules, metadata, path)
  foreign = [k for k in _FOREIGN if any(f"({k}:" in name for name in unmatched)]
  return File(path, modules, sorted(set(unmatched)), metadata, tuple(foreign))


def files_of(path: str | pathlib.Path) -> list[pathlib.Path]:
  """Returns all that `read` reads: the file, and peft's configuration of it."""
  path = locate(path)
  config = _config(path, hub.read_tensors(path))
  return [path] if config is None else [config, path]


def _config(path: pathlib.Path, names: Iterable[str]) -> pathlib.Path | None:
  """Returns the adapter_config.json of a file with peft's names, if any."""
  config = peft_config.beside(path)
  is_peft = config and any(
    name.startswith(_WRAPPED) or _PEFT.search(name) for name in names
  )
  return config if is_peft else None


def _foreign(name: str) -> tuple[str, str] | None:
  """Returns module and kind of a tensor that is of a kind not merged here."""
  m = _STRANGE.fullmatch(name)
  if m is None:
    return None
  kind = list(_FOREIGN)[int(str(m.lastgroup)[1:])]
  return m[1], f"{kind}: {m[m.lastgroup]}"


def _check_adapters(
  adapters: Mapping[str, set[str]], path: pathlib.Path
) -> None:
  """Refuses a file with two of peft's adapters for one component."""
  for owner, names in adapters.items():
    if len(names) > 1:
      raise errors.UserError(
        f"{path} holds {len(names)} adapters of the {owner}"
        f" ({', '.join(sorted(names))}): write the one that you mean to a file"
        " of its own"
      )


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
  """Without transformers 4's outer name; early diffusers' and OpenCLIP's."""
  found = [flat.removeprefix("text_model_")]
  m = re.fullmatch(r"text_model_encoder_layers_(\d+)_(.*)", flat)
  if m and m[2] in _OPEN_CLIP:
    found.append(f"transformer_resblocks_{m[1]}_{_OPEN_CLIP[m[2]]}")
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
  stem = stem.removeprefix(_WRAPPED)
  if meant != "unet":  # In whole checkpoints the tower lies in a wrapper.
    for wrapper in ("transformer.text_", "model.transformer."):
      if stem.startswith(wrapper):
        stem = stem.removeprefix(wrapper.partition(".")[0] + ".")
  return meant, stem.replace(".processor", "")


def _numbers(tensor: np.ndarray, role: str, where: str) -> np.ndarray:
  """Returns a tensor; refuses what is no number, and what is quantised."""
  # bfloat16 and float8 are foreign to NumPy: they have the kind "V".
  is_float = tensor.dtype.kind in "fV"
  if not is_float and role not in ("alpha", "on_input"):
    raise errors.UserError(
      f"{where} holds {tensor.dtype.name}, not floats: use the file that was"
      " not quantised"
    )
  if is_float and not convert.is_finite(tensor):
    raise errors.UserError(
      f"{where} holds NaN or infinity: the file is damaged or its training"
      " diverged; use another one"
    )
  return tensor


def locate(path: str | pathlib.Path) -> pathlib.Path:
  """Returns the file that a LoRA is read from; `path` as in `read`."""
  path = hub.resolve(path, patterns=("*.safetensors", "*.json"))
  if not path.is_dir():
    return path
  for suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
    if found := files.visible(path, suffix):
      break
  usual = [file for file in found if file.stem in _USUAL]
  if len(usual) != 1 and len(found) != 1:
    raise errors.UserError(
      f"{path} holds {len(found)} weight files and no {_USUAL[0]}.safetensors:"
      " name the LoRA file itself"
    )
  return (usual or found)[0]


def _add_alphas(
  modules: dict[Target, dict[str, np.ndarray]],
  stems: Mapping[Target, str],
  metadata: Mapping[str, str],
  path: pathlib.Path,
  config: pathlib.Path | None,
) -> None:
  """Gives modules the alpha that stands elsewhere than beside their factors.

  Args:
    modules: of `File`; filled in.
    stems: of those with peft's names: how the file names them.
    metadata: of the header.
    path: of the file.
    config: peft's configuration of it, if any.
  """
  text = metadata.get("lora_adapter_metadata")
  beside = peft_config.read(config) if config else None
  said = {
    owner: peft_config.of_header(text, owner, path) or beside
    for owner in {target.component for target in modules}
  }
  for target, stem in stems.items():
    adapter, parts = said[target.component], modules[target]
    if adapter is None or "alpha" in parts or "down" not in parts:
      continue
    try:
      parts["alpha"] = adapter.alpha(stem, parts)
    except (ValueError, TypeError, AttributeError) as error:
      raise errors.UserError(
        f"{adapter.where} cannot be read ({error}): write the file again"
      ) from error


def _check_notes(
  modules: Mapping[Target, Mapping[str, np.ndarray]],
  metadata: Mapping[str, str],
  path: pathlib.Path,
) -> None:
  """Refuses a file that has lost the alphas that its header speaks of.

  Kohya's scripts and LyCORIS write an alpha beside the factors of each module,
  in which rs_lora is allowed for; the rest of their notes changes nothing.
  """
  alpha, rank = (metadata.get(f"ss_network_{key}") for key in ("alpha", "dim"))
  is_number = all(
    re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?", str(value))
    for value in (alpha, rank)
  )
  is_bare = not any("alpha" in parts for parts in modules.values())
  has_factors = any("down" in parts for parts in modules.values())
  if is_number and has_factors and is_bare and float(alpha) != float(rank):
    raise errors.UserError(
      f"{path}: its header says ss_network_alpha {alpha} for ss_network_dim"
      f" {rank}, and no module has an alpha, which the file has lost: use the"
      " file as it was trained"
    )
