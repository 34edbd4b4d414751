"""What peft says of a LoRA beside its tensors: how strongly it counts.

peft writes it as adapter_config.json beside the file, diffusers into the header
of the file (`lora_adapter_metadata`). Each key is honoured, checked against the
tensors, without effect on the merged weights, or refused by its name.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

from dppp_jax import errors, files

_FILE = "adapter_config.json"
_USUAL = ("adapter_model.safetensors", "adapter_model.bin")
# Read by `Adapter`.
_READ = frozenset(
  (
    "alpha_pattern",
    "exclude_modules",
    "lora_alpha",
    "lora_bias",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
  )
)
# Notes for people, and what counts in training alone.
_NO_EFFECT = frozenset(
  (
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",  # How the factors began.
    "inference_mode",
    "layers_pattern",  # Which layers were trained: the tensors show it.
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # Of use_qalora, which is refused.
    "revision",
    "runtime_config",
    "task_type",
  )
)
# Ways to begin that leave the weights of the base as they are; others (PiSSA,
# OLoRA, CorDA, LoftQ) change them, and their factors mean nothing without.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
# Types of what is read; null is as if nothing stood there.
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
  "r": (int, "a whole number"),
  "lora_alpha": ((int, float), "a number"),
  "use_rslora": (bool, "true or false"),
  "use_dora": (bool, "true or false"),
  "lora_bias": (bool, "true or false"),
  "rank_pattern": (dict, "an object of names and ranks"),
  "alpha_pattern": (dict, "an object of names and numbers"),
  "target_modules": ((list, str), "a list of names or a text"),
  "exclude_modules": ((list, str), "a list of names or a text"),
}
# What peft takes where its file is silent.
_ALPHA = 8


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The values of one adapter.

  Attributes:
    where: the file, for the errors.
    values: {key: value} of peft's LoraConfig.
  """

  where: str
  values: Mapping[str, Any]

  def __post_init__(self):
    kind = self.values.get("peft_type") or "LORA"
    if str(kind).rpartition(".")[2].upper() != "LORA":
      raise errors.UserError(
        f"{self.where} is of the kind {kind} (peft_type), which is not merged"
        " here: use a LoRA"
      )
    if self.values.get("init_lora_weights") not in _BEGINNINGS:
      raise errors.UserError(
        f"{self.where} sets init_lora_weights to"
        f" {self.values['init_lora_weights']!r}, which changes the weights of"
        " the base too: convert it to a plain LoRA with peft"
      )
    for key, (kind, wanted) in _TYPES.items():
      value = self.values.get(key)
      is_strange = isinstance(value, bool) and kind is not bool
      if value is not None and (is_strange or not isinstance(value, kind)):
        raise errors.UserError(
          f"{self.where} sets {key} to {value!r}, where {wanted} is wanted:"
          " write the file again"
        )
    for key, value in self.values.items():
      is_unset = value in (None, False, "none") or value in ({}, [], ())
      if key in _READ | _NO_EFFECT or key == "init_lora_weights" or is_unset:
        continue
      raise errors.UserError(
        f"{self.where} sets {key} to {value!r}, which is not built here: use"
        " another LoRA, or write it without with peft"
      )

  def alpha(self, stem: str, parts: Mapping[str, np.ndarray]) -> np.float32:
    """Returns alpha of a module, to be divided by its rank.

    Args:
      stem: its name with dots, as peft names it.
      parts: of the module.

    Raises:
      errors.UserError: the file and this configuration contradict each other.
    """
    rank = parts["down"].shape[0]
    said = self._of("rank_pattern", stem, self.values.get("r"))
    if said is not None and said != rank:
      raise errors.UserError(
        f"{self.where} gives {stem} the rank {said!r} (r, rank_pattern), and"
        f" the file {rank}: they are of two adapters; put those of one together"
      )
    for key, part in (("use_dora", "magnitude"), ("lora_bias", "up_bias")):
      if key in self.values and bool(self.values[key]) != (part in parts):
        raise errors.UserError(
          f"{self.where} sets {key} to {self.values[key]!r}, and {stem} has"
          f" {'a' if part in parts else 'no'} {part}: they are of two adapters;"
          " put those of one together"
        )
    self._check_trained(stem)
    alpha = self._of("alpha_pattern", stem, self.values.get("lora_alpha"))
    alpha = _ALPHA if alpha is None else alpha
    if type(alpha) not in (int, float):
      raise ValueError(f"alpha {alpha!r}")
    with np.errstate(over="ignore"):
      alpha = np.float32(alpha)
    if not np.isfinite(alpha):
      raise ValueError(f"alpha {alpha}")
    if self.values.get("use_rslora"):  # alpha / sqrt(r), others alpha / r.
      alpha *= np.sqrt(np.float32(rank))
    return alpha

  def _of(self, key: str, stem: str, usual: Any) -> Any:
    """Returns the value of the first pattern that means a module."""
    for pattern, value in (self.values.get(key) or {}).items():
      if _means(pattern, stem, f"{self.where}: {key}"):
        return value
    return usual

  def _check_trained(self, stem: str) -> None:
    """Refuses a module that peft, by its lists of names, would not have."""
    ends = lambda name: f".{stem}".endswith(f".{name}")
    named, barred = (
      self.values.get(key) for key in ("target_modules", "exclude_modules")
    )  # One string is a regex, or "all-linear": the tensors show what it meant.
    missing = isinstance(named, list) and named and not any(map(ends, named))
    if missing or (isinstance(barred, list) and any(map(ends, barred))):
      raise errors.UserError(
        f"{self.where}: its target_modules leave out {stem}, which the file"
        " holds: they are of two adapters; put those of one together"
      )


def of_header(
  text: str | None, owner: str, path: pathlib.Path
) -> Adapter | None:
  """Returns what a file's header says of one component's modules.

  Args:
    text: of `lora_adapter_metadata`.
    owner: of `lora_keys.COMPONENTS`.
    path: of the file.

  Raises:
    errors.UserError: the text is damaged, or asks for what is not built.
  """
  if text is None:
    return None
  where = f"{path}: lora_adapter_metadata in the header"
  wanted = "write the file again"
  try:
    values = files.parse_json(text, where)
    own = {k: v for k, v in values.items() if "." not in k}
    own |= {
      k.removeprefix(f"{owner}."): v
      for k, v in values.items()
      if k.startswith(f"{owner}.")
    }
  except (errors.UserError, AttributeError) as error:
    raise errors.UserError(f"{where} cannot be read: {wanted}") from error
  return Adapter(where, own) if own else None


def beside(path: pathlib.Path) -> pathlib.Path | None:
  """Returns the adapter_config.json that belongs to a file, if any.

  Where peft's own file lies there it is of that one, not of others beside it.
  """
  config = path.parent / _FILE
  others = [name for name in _USUAL if (path.parent / name).is_file()]
  is_own = path.name in others or not others
  return config if is_own and config.is_file() else None


def read(path: pathlib.Path) -> Adapter:
  """Reads an adapter_config.json.

  Raises:
    errors.UserError: it is damaged, or asks for what is not built.
  """
  values = files.read_json(path)
  if not isinstance(values, dict):
    raise errors.UserError(f"{path} holds no JSON object: fetch it again")
  return Adapter(str(path), values)


def _means(pattern: str, stem: str, where: str) -> bool:
  """Tells whether one of peft's patterns, the end of a name, means a module."""
  plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
  if re.fullmatch(r"[\w.]+", plain) is None:
    raise errors.UserError(
      f"{where} {pattern!r} is a regex, where names of modules are wanted:"
      " write the file with save_lora_weights of diffusers"
    )
  is_whole = pattern.startswith("^")
  return stem == plain or (not is_whole and stem.endswith("." + plain))
