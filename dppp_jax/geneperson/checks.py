"""What a configuration has wrong, said before weights are read.

What files show is looked at where they are found.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from dppp_jax import errors, ranges
from dppp_jax.diffusion import components as components_lib
from dppp_jax.diffusion import conditioning, schedulers
from dppp_jax.geneperson import canvas
from dppp_jax.geneperson import networks as networks_lib

_FACTOR = dataclasses.replace(
  ranges.NON_NEGATIVE, text="a number from 0 to 1000", high=1e3
)
_SCALE = dataclasses.replace(
  ranges.ANY, text="a number from -1000 to 1000", low=-1e3, high=1e3
)
_RULE = dataclasses.replace(
  ranges.ANY, text="a number of at most 1, below 0 for no such rule", high=1
)
# Of a diffusion's configuration; where two numbers have to fit each other,
# `numbers` looks at them.
RANGES = {
  **dict.fromkeys(("rows", "cols", "multiple"), ranges.SIDE),
  **dict.fromkeys(("cell", "matting.size", "image_size"), ranges.PAIR),
  "line_width": dataclasses.replace(ranges.WHOLE, high=ranges.SIDE.high),
  **dict.fromkeys(("batch_size", "decode_batch", "steps"), ranges.COUNT),
  **dict.fromkeys(("num_identities", "cap", "tries"), ranges.COUNT),
  **dict.fromkeys(("min_images", "backgrounds.count"), ranges.COUNT),
  **dict.fromkeys(("num_threads", "stack_from", "devices"), ranges.WHOLE),
  "guidance": _FACTOR,
  "guidance_rescale": ranges.UNIT,
  **dict.fromkeys(("pose_scale", "grid_scale"), _FACTOR),
  **dict.fromkeys(("detail_scale", "lighting_scale", "style_scale"), _SCALE),
  **dict.fromkeys(("min_peak", "min_area", "max_area", "max_second"), _RULE),
  **dict.fromkeys(("max_border", "max_feet", "min_sharpness"), _RULE),
  "min_agreement": _RULE,
  "min_difference": dataclasses.replace(
    ranges.ANY,
    text="a number of at most 255, below 0 for no such rule",
    high=255,
  ),
}


def finite(config: Mapping[str, Any], where: str = "") -> None:
  """Refuses nan and inf, which no comparison finds.

  Args:
    config: of any maker, as nested dicts.
    where: keys before those of config, each with a dot.

  Raises:
    errors.UserError: names the key.
  """
  for key, value in config.items():
    if isinstance(value, Mapping):
      finite(value, f"{where}{key}.")
      continue
    for one in value if isinstance(value, tuple) else (value,):
      if isinstance(one, float) and not math.isfinite(one):
        raise errors.UserError(
          f"--config.{where}{key}={one}: must be a finite number"
        )


def numbers(config: Mapping[str, Any]) -> None:
  """Refuses numbers of a diffusion's configuration that have no meaning.

  Args:
    config: of configs/geneperson.py, as nested dicts.

  Raises:
    errors.UserError: a pair that is none, or a number below 0.
  """
  ranges.check(config, RANGES, where="--config.")
  thresholds = tuple(config["canvas"]["canny"])
  # (a, b, c): a flag given twice is both, one after the other.
  for group, key in (
    ("canvas", "canny"),
    ("backgrounds", "size"),
    ("control", "pose_range"),
    ("control", "grid_range"),
    ("models", "union_kinds"),
  ):
    values = tuple(config[group][key])
    if len(values) != 2 or min(values) < 0:
      raise errors.UserError(
        f"--config.{group}.{key}={values}: write two numbers from 0 on,"
        " once, such as 256,128"
      )
  low, high = (config["rules"][f"{end}_area"] for end in ("min", "max"))
  if 0 <= high < low:
    raise errors.UserError(
      f"--config.rules.min_area={low} is above --config.rules.max_area={high}:"
      " every cell would be dropped"
    )
  if thresholds[0] > thresholds[1]:
    raise errors.UserError(
      f"--config.canvas.canny={thresholds}: write the low threshold first"
    )
  if max(thresholds) >= canvas.STEP:
    raise errors.UserError(
      f"--config.canvas.canny={thresholds}: finds no edge of a black line on"
      f" white: both must be below {canvas.STEP}"
    )
  text = config["prompt"]
  if (least := text["min_chunks"]) < 1:
    raise errors.UserError(f"prompt.min_chunks={least}: must be at least 1")
  if least > 1 and text["long"] != "chunk":
    raise errors.UserError(
      f"--config.prompt.min_chunks={least}: does nothing with"
      f" --config.prompt.long={text['long']}: leave it out, or set"
      " prompt.long=chunk"
    )


def parts(
  config: Mapping[str, Any],
  base: components_lib.Components,
  controls: Sequence[str],
  layout: canvas.Layout,
) -> None:
  """Refuses what the sampler would, before weights are read.

  Args:
    config: of configs/geneperson.py, as nested dicts.
    base: the system without its parameters.
    controls: which ControlNets there are: "pose", "grid".
    layout: of the cells.

  Raises:
    errors.UserError: names the key.
  """
  control, steps = config["control"], config["sampler"]["steps"]
  text, named = config["prompt"], networks_lib.named
  check_text = lambda: conditioning.check(
    base.texts,
    is_xl=base.is_xl,
    clip_skip=text["clip_skip"],
    pooled=text["pooled"],
  )
  named("prompt", check_text)
  named("sampler", lambda: schedulers.init(steps, base.scheduler))
  named("canvas", lambda: components_lib.canvas(base, [], layout.size))
  line_width = config["canvas"]["line_width"]
  named("canvas", lambda: canvas.grid_map(layout, line_width=line_width))
  size = tuple(config["backgrounds"]["size"])
  named("backgrounds.size", lambda: components_lib.canvas(base, [], size))
  if min(size[0] / layout.cell[0], size[1] / layout.cell[1]) < 1:
    raise errors.UserError(
      f"--config.backgrounds.size={size}: is smaller than a cell of"
      f" {layout.cell}"
    )
  for name in controls:
    scale, span = control[f"{name}_scale"], control[f"{name}_range"]
    check = lambda scale=scale, span=span: components_lib.control_scales(
      scale, span, count=1, steps=steps, length=steps
    )
    if scale and not named(f"control.{name}_range", check).any():
      raise errors.UserError(
        f"--config.control.{name}_range={span}: none of {steps} steps lies in"
        " it, so that this ControlNet would never run: widen it, or set"
        f" --config.control.{name}_scale=0"
      )
