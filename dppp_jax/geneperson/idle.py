"""Which keys of a generation change nothing beside the others."""

from collections.abc import Mapping
from typing import Any


def keys(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns what a generation does not read, for `cli.refuse_idle`.

  Args:
    config: of configs/geneperson.py, as nested dicts.

  Returns:
    flag or "config.key" -> why it does nothing.
  """
  if config["maker"] != "diffusion" or "models" not in config:
    return {}
  models, sampler, loras = config["models"], config["sampler"], config["loras"]
  found = {"num_processes": "only the maker paperdoll draws in processes"}
  slots = [key for key in loras if f"{key}_scale" in loras]
  for slot in slots:
    if not loras[slot]:
      found[f"config.loras.{slot}_scale"] = f"config.loras.{slot} is empty"
    elif not loras[f"{slot}_scale"]:
      why = f"config.loras.{slot}_scale is 0"
      found |= {f"config.loras.{key}": why for key in (slot, f"{slot}_scale")}
  if not any(loras[slot] for slot in slots):
    found["config.loras.allow_unmatched"] = "there is no LoRA"
  for name, more in (("pose", ()), ("grid", ("line_width", "canny"))):
    if not models[f"{name}_controlnet"]:
      why = f"config.models.{name}_controlnet is empty"
      for key in ("scale", "range"):
        found[f"config.control.{name}_{key}"] = why
      found |= {f"config.canvas.{key}": why for key in more}
    elif not config["control"][f"{name}_scale"]:
      why = f"config.control.{name}_scale is 0"
      found[f"config.control.{name}_range"] = why
  if not models["pose_controlnet"] and not models["grid_controlnet"]:
    why = "there is no ControlNet"
    found |= {"config.sampler.guess": why, "config.models.union_kinds": why}
  if config["tries"] == 1:
    found["config.min_images"] = "config.tries is 1: there is no other canvas"
  if config["prompt"]["long"] != "chunk":
    why = "without config.prompt.long=chunk each prompt is one chunk"
    found["config.prompt.pooled"] = why
  if sampler["guidance"] <= 1:
    why = "without guidance (config.sampler.guidance above 1) it is not read"
    for key in ("sampler.guidance_rescale", "prompt.negative"):
      found[f"config.{key}"] = why
    found["config.backgrounds.negative"] = why
  return found
