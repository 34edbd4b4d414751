"""The networks of stage A, read from files, and what they are told by.

Which key of the configuration a file belongs to is part of every complaint.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dppp_jax import errors, logs
from dppp_jax.diffusion import components as components_lib
from dppp_jax.diffusion import conditioning
from dppp_jax.geneperson import components, matting, sources
from dppp_jax.geneperson import digests as digests_lib
from dppp_jax.models import controlnet_union
from dppp_jax.weights import lora

SLOTS = ("detail", "lighting", "style")  # Of the paper's LoRAs.
USUAL_KINDS = (0, 3)  # Of configs/geneperson.py.

T = TypeVar("T")


class Networks(NamedTuple):
  """Everything that was read from files.

  Attributes:
    parts: with the LoRAs merged.
    mattes: the matting network.
    arrange: (skeletons, grid) -> control images.
    kinds: of the sampler.
    controls: the two ControlNets that there are: "pose", "grid".
  """

  parts: components_lib.Components
  mattes: matting.Matting
  arrange: Callable[[np.ndarray, np.ndarray], list[Any]]
  kinds: list[tuple[int, ...] | None]
  controls: tuple[str, ...]


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


def digests(
  config: Mapping[str, Any], places: Mapping[str, pathlib.Path]
) -> dict[str, dict[str, str]]:
  """Returns {role: {"name", "sha256"}}; reads no weights.

  ControlNets have the role of what they are shown: `control_pose` and
  `control_grid`, or `control_pose_grid` for one union of both.

  Args:
    config: of configs/geneperson.py, as nested dicts.
    places: files and folders by their keys in it.

  Raises:
    errors.UserError: a file is missing.
  """
  given = named("models", lambda: components.digests(**_base(config, places)))
  controls = _controls(places)
  shown = ("pose_grid",) if controls.both else controls.names
  for k, name in enumerate(shown):
    given[f"control_{name}"] = given.pop(components_lib.controlnet_name(k))
  given |= named(
    "models.u2net",
    lambda: digests_lib.describe(
      {"u2net": sources.describe_u2net(places["models.u2net"])}
    ),
  )
  loras = {
    f"lora_{slot}": sources.describe_lora(one)
    for slot, one in _loras(config, places).items()
  }
  given |= named("loras", lambda: digests_lib.describe(loras))
  models = config["models"]
  specs = {
    "base": models["base"],
    "vae": models["vae"],
    "control_pose": models["pose_controlnet"],
    "control_grid": models["grid_controlnet"],
    "control_pose_grid": models["pose_controlnet"],
    "u2net": models["u2net"],
    **{f"lora_{slot}": config["loras"][slot] for slot in SLOTS},
  }
  for role in given.keys() & specs.keys():
    # In a hub's cache a folder has the name of a commit.
    given[role]["name"] = pathlib.Path(specs[role]).name or given[role]["name"]
  return given


def base(
  config: Mapping[str, Any], places: Mapping[str, pathlib.Path]
) -> components_lib.Components:
  """Returns the base and the ControlNets as they will be loaded, unread.

  Raises:
    errors.UserError: a file that is missing or truncated, parts that do not fit
      each other, or a sampler that is not built.
  """
  found = named(
    "models",
    lambda: components.find_components(
      **_base(config, places),
      scheduler=config["sampler"]["scheduler"] or None,
      k_diffusion=config["sampler"]["k_diffusion"],
    ),
  )
  parts = found.parts
  _arrange(_controls(places), parts, tuple(config["models"]["union_kinds"]))
  return spaced(config, parts)


def control_names(places: Mapping[str, pathlib.Path]) -> tuple[str, ...]:
  """Returns which ControlNets there are: "pose", "grid", both or none."""
  return _controls(places).names


def load(
  config: Mapping[str, Any],
  places: Mapping[str, pathlib.Path],
  dtypes: Mapping[str, Any],
  *,
  place: components.Place | None = None,
) -> Networks:
  """Reads every network; the small one first.

  Args:
    config: of configs/geneperson.py, as nested dicts.
    places: files and folders by their keys in it.
    dtypes: likewise.
    place: of `components.load_components`.

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
  parts = named(
    "models",
    lambda: components.load_components(
      **_base(config, places),
      loras=list(_loras(config, places).values()),
      scheduler=config["sampler"]["scheduler"] or None,
      k_diffusion=config["sampler"]["k_diffusion"],
      stack_from=config["run"]["stack_from"],
      allow_unmatched=config["loras"]["allow_unmatched"],
      place=place,
    ),
  )
  controls = _controls(places)
  arrange, kinds = _arrange(
    controls, parts, tuple(config["models"]["union_kinds"])
  )
  parts = spaced(config, parts)
  return Networks(parts, mattes, arrange, kinds, controls.names)


def spaced(
  config: Mapping[str, Any], parts: components_lib.Components
) -> components_lib.Components:
  """Sets where steps lie: as asked for, or as a folder's own sampler has it.

  Raises:
    errors.UserError: a spacing beside k-diffusion's own.
  """
  given, steps = config["sampler"], parts.scheduler
  is_own = not given["scheduler"] and steps.karras
  steps = dataclasses.replace(steps, karras=given["karras"] or is_own)
  if spacing := given["spacing"]:
    if given["k_diffusion"]:
      raise errors.UserError(
        f"--config.sampler.spacing={spacing}: k-diffusion has its own: leave it"
        " empty, or add --config.sampler.k_diffusion=False"
      )
    steps = dataclasses.replace(steps, timestep_spacing=spacing)
  return dataclasses.replace(parts, scheduler=steps)


def _base(
  config: Mapping[str, Any], places: Mapping[str, pathlib.Path]
) -> dict[str, Any]:
  """Returns what finding, describing and loading a base have in common."""
  words, sampler = places.get("models.tokenizer"), config["sampler"]
  return {
    "base": places["models.base"],
    "controlnets": _controls(places).files,
    "variant": config["models"]["variant"] or None,
    "tokenizers": None if words is None else [words],
    "overrides": sources.Overrides(
      places.get("models.vae"),
      sampler["prediction_type"] or None,
      sampler["zero_snr"],
    ),
  }


def _loras(
  config: Mapping[str, Any], places: Mapping[str, pathlib.Path]
) -> dict[str, lora.Lora]:
  return {
    slot: lora.Lora(
      places[f"loras.{slot}"], scale=config["loras"][f"{slot}_scale"]
    )
    for slot in SLOTS
    if f"loras.{slot}" in places
  }


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
    errors.UserError: one network for both, which is no union, kinds that a
      union does not know, or kinds of a union where there is none.
  """
  unions = [
    isinstance(net, controlnet_union.Config) for net in parts.controlnets
  ]
  check = lambda given: named(
    "models.union_kinds",
    lambda: components_lib.check_kinds(parts.controlnets, given),
  )
  if controls.both:
    if not unions[0]:
      raise errors.UserError(
        "--config.models.pose_controlnet and grid_controlnet are the same"
        f" ({controls.files[0]}), and it is no union: give two"
      )
    return lambda skeletons, grid: [[skeletons, grid]], check([kinds])
  if not any(unions) and kinds != USUAL_KINDS:
    raise errors.UserError(
      f"--config.models.union_kinds={kinds} does nothing here: no ControlNet of"
      " this run is a union; leave it out"
    )
  places = [("pose", "grid").index(name) for name in controls.names]

  def arrange(skeletons: np.ndarray, grid: np.ndarray) -> list[Any]:
    images = [(skeletons, grid)[i] for i in places]
    return [
      [image] if union else image
      for image, union in zip(images, unions, strict=True)
    ]

  own = [
    (kinds[i],) if union else None
    for i, union in zip(places, unions, strict=True)
  ]
  return arrange, check(own)


def chunks(
  parts: components_lib.Components,
  texts: Mapping[str, str],
  long: str,
  least: int,
) -> int:
  """Looks at all prompts before anything is drawn.

  Returns:
    The chunks of the longest; see `chunks_of` for those of each.

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


def chunks_of(
  parts: components_lib.Components,
  texts: Sequence[str],
  *,
  negative: str,
  long: str,
  least: int = 1,
) -> list[int]:
  """Returns the chunks of each prompt: they depend on no other prompt.

  Args:
    parts: whose tokenizers count.
    texts: the prompts.
    negative: has as many chunks as the prompt beside it, so the longer counts.
    long: `prompt.long`; without "chunk" all that fit have one.
    least: `prompt.min_chunks`.

  Returns:
    Numbers from 1 on; 0 where `long` is "error" and a prompt is too long.
  """
  if long == "truncate":
    return [1] * len(texts)
  *counts, other = conditioning.tokenize(
    parts.tokenizers,
    [*texts, negative],
    limit=parts.max_tokens,
    long="chunk",
  ).counts.tolist()
  if long == "error":
    return [int(count == 1) for count in counts]
  return [max(count, other, least) for count in counts]


def named(key: str, call: Callable[[], T]) -> T:
  """Calls, and puts the config key in front of what is wrong."""
  try:
    return call()
  except errors.UserError as error:
    raise errors.UserError(f"--config.{key}: {error}") from error
