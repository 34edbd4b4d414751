"""The networks of stage A, read from files, and what they are told by.

Which key of the configuration a file belongs to is part of every complaint.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dppp_jax import errors, logs
from dppp_jax.diffusion import components as components_lib
from dppp_jax.diffusion import conditioning
from dppp_jax.geneperson import components, manifest, matting
from dppp_jax.models import controlnet_union
from dppp_jax.weights import hub, lora

SLOTS = ("detail", "lighting", "style")  # Of the paper's LoRAs.

T = TypeVar("T")


class Networks(NamedTuple):
  """Everything that was read from files.

  Attributes:
    parts: with the LoRAs merged.
    mattes: the matting network.
    arrange: (skeletons, grid) -> control images.
    kinds: of the sampler.
    controls: the two ControlNets that there are: "pose", "grid".
    digests: of each network, and of each LoRA file.
  """

  parts: components_lib.Components
  mattes: matting.Matting
  arrange: Callable[[np.ndarray, np.ndarray], list[Any]]
  kinds: list[tuple[int, ...] | None]
  controls: tuple[str, ...]
  digests: dict[str, Any]


class _Controls(NamedTuple):
  """Which ControlNets there are, and what each of them is shown.

  Attributes:
    files: in the order of the sampler.
    names: "pose" and "grid", those that there are; of one union for both the
      first, whose scale and range count.
    both: whether one union takes both images.
  """

  files: list[pathlib.Path]
  names: tuple[str, ...]
  both: bool


def load(
  config: Mapping[str, Any],
  places: Mapping[str, pathlib.Path],
  dtypes: Mapping[str, Any],
) -> Networks:
  """Reads every network; the small one first.

  Args:
    config: of configs/geneperson.py, as nested dicts.
    places: files and folders by their keys in it.
    dtypes: likewise.

  Raises:
    errors.UserError: a file that is damaged, or for another network.
  """
  mattes = named(
    "models.u2net",
    lambda: matting.load(
      places["models.u2net"],
      dtype=dtypes["matting.dtype"],
      size=tuple(config["matting"]["size"]),
      min_peak=max(config["rules"]["min_peak"], 0.0),
    ),
  )
  controls = _controls(places)
  parts = named(
    "models",
    lambda: components.load_components(
      places["models.base"],
      controlnets=controls.files,
      scheduler=config["sampler"]["scheduler"],
      k_diffusion=config["sampler"]["k_diffusion"],
      variant=config["models"]["variant"] or None,
      stack_from=config["run"]["stack_from"],
    ),
  )
  arrange, kinds = _arrange(
    controls, parts, tuple(config["models"]["union_kinds"])
  )
  # Before the LoRAs: their sums may round differently on another machine.
  digests = {name: manifest.digest(p) for name, p in parts.params.items()}
  digests["u2net"] = manifest.digest(mattes.variables)
  digests["configuration"] = _text_digest(
    (parts.unet, parts.vae, parts.texts, parts.zero_negative),
    *map(_words, parts.tokenizers),
  )
  digests["controlnet_configuration"] = _text_digest(*parts.controlnets)
  files = {s: places[f"loras.{s}"] for s in SLOTS if f"loras.{s}" in places}
  scales = {slot: config["loras"][f"{slot}_scale"] for slot in files}
  loras = [lora.Lora(file, scale=scales[s]) for s, file in files.items()]
  params = named("loras", lambda: components.merge_loras(parts.params, loras))
  digests["loras"] = {
    slot: {"sha256": _file_digest(file), "scale": scales[slot]}
    for slot, file in files.items()
  }
  steps = dataclasses.replace(
    parts.scheduler, karras=config["sampler"]["karras"]
  )
  parts = dataclasses.replace(parts, params=params, scheduler=steps)
  return Networks(parts, mattes, arrange, kinds, controls.names, digests)


def _controls(places: Mapping[str, pathlib.Path]) -> _Controls:
  nets = {
    name: places[f"models.{name}_controlnet"]
    for name in ("pose", "grid")
    if f"models.{name}_controlnet" in places
  }
  files, names = list(nets.values()), tuple(nets)
  if len(nets) == 2 and files[0] == files[1]:
    return _Controls(files[:1], names[:1], True)
  return _Controls(files, names, False)


def _arrange(
  controls: _Controls, parts: components_lib.Components, kinds: tuple[int, ...]
) -> tuple[Callable[..., list[Any]], list[tuple[int, ...] | None]]:
  """Returns how the two images go to the ControlNets, and the unions' kinds.

  Raises:
    errors.UserError: one network for both, which is no union.
  """
  unions = [
    isinstance(net, controlnet_union.Config) for net in parts.controlnets
  ]
  if controls.both:
    if not unions[0]:
      raise errors.UserError(
        "--config.models.pose_controlnet and grid_controlnet are the same"
        f" ({controls.files[0]}), and it is no union: give two"
      )
    return lambda skeletons, grid: [[skeletons, grid]], [kinds]
  places = [("pose", "grid").index(name) for name in controls.names]

  def arrange(skeletons: np.ndarray, grid: np.ndarray) -> list[Any]:
    images = [(skeletons, grid)[i] for i in places]
    return [
      [image] if union else image
      for image, union in zip(images, unions, strict=True)
    ]

  return arrange, [
    (kinds[i],) if union else None
    for i, union in zip(places, unions, strict=True)
  ]


def _words(tokenizer: Any) -> tuple[Any, ...]:
  ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
  return sorted(tokenizer.get_vocab().items()), ids, tokenizer.model_max_length


def _text_digest(*values: Any) -> str:
  """Returns the SHA-256 of what Python writes of values."""
  return hashlib.sha256(repr(values).encode()).hexdigest()


def _file_digest(path: pathlib.Path) -> str:
  if path.is_dir():
    return manifest.digest(hub.read_tensors(path))
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def chunks(
  parts: components_lib.Components,
  texts: Mapping[str, str],
  long: str,
  least: int,
) -> int:
  """Returns the chunks that every prompt gets, so that all run one program.

  Raises:
    errors.UserError: a prompt is too long and nobody said what then.
  """
  count = functools.partial(
    conditioning.tokenize, parts.tokenizers, limit=parts.max_tokens
  )
  if long not in ("error", "truncate", "chunk"):
    raise errors.UserError(
      f"--config.prompt.long={long}: choose error, truncate or chunk"
    )
  counts = count(list(texts.values()), long="chunk").counts
  over = [name for name, n in zip(texts, counts, strict=True) if n > 1]
  if long == "chunk":
    return max(least, int(counts.max()))
  if not over:
    return 1
  if long == "error":
    others = f" (and {len(over) - 1} more)" if over[1:] else ""
    try:
      count([texts[over[0]]], long="error")
    except errors.UserError as error:
      raise errors.UserError(
        f"{over[0]}{others}: {error} by --config.prompt.long"
      ) from error
  logs.say(
    f"{len(over)} of {len(texts)} prompts are cut at {parts.max_tokens} tokens,"
    f" first that of {over[0]}"
  )
  return 1


def named(key: str, call: Callable[[], T]) -> T:
  """Calls, and puts the config key in front of what is wrong."""
  try:
    return call()
  except errors.UserError as error:
    raise errors.UserError(f"--config.{key}: {error}") from error
