"""How a CLIP wants its pictures, by the file that lies beside its weights.

transformers writes preprocessor_config.json, OpenCLIP the preprocess_cfg of its
open_clip_config.json. What changes a picture is honoured or refused by name.
"""

from collections.abc import Mapping
import math
import pathlib
from typing import Any, NamedTuple

from dppp_jax import errors, ranges
from dppp_jax.weights import hub

_HF, _OPEN_CLIP = "preprocessor_config.json", "open_clip_config.json"
# PIL's numbers of filters, and OpenCLIP's names.
_FILTERS = {2: "bilinear", 3: "bicubic"}
# Of preprocessor_config.json, read below; then what changes no picture here:
# all are RGB when they arrive, and channels come last.
_READ = frozenset(
  (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std"),
  )
)
_NO_EFFECT = frozenset(
  (
    *("image_processor_type", "feature_extractor_type", "processor_class"),
    *("do_convert_rgb", "data_format", "input_data_format", "return_tensors"),
    *("device", "disable_grouping", "default_to_square"),
  )
)


class Pictures(NamedTuple):
  """What a file says of pictures; None where it is silent.

  Attributes:
    size: (H, W).
    interpolation: of the resize, "bilinear" or "bicubic".
    mean: of the normalisation, by channel.
    std: likewise.
  """

  size: tuple[int, int] | None = None
  interpolation: str | None = None
  mean: tuple[float, float, float] | None = None
  std: tuple[float, float, float] | None = None


def read(folder: pathlib.Path) -> Pictures:
  """Reads what lies in the folder of a CLIP.

  Raises:
    errors.UserError: a file that is damaged, or asks for what is not built.
  """
  if (folder / _HF).is_file():
    return _of_hf(hub.read_json(folder / _HF), str(folder / _HF))
  file = folder / _OPEN_CLIP
  values = hub.read_json(file) if file.is_file() else {}
  config = values.get("preprocess_cfg")
  if config is None:
    return Pictures()
  if not isinstance(config, Mapping):
    raise _refusal(str(file), "preprocess_cfg", config)
  return _of_open_clip(config, f"{file}: preprocess_cfg")


def _of_hf(values: Mapping[str, Any], where: str) -> Pictures:
  for key, value in values.items():
    is_known = key.startswith("_") or key in _READ | _NO_EFFECT
    if not is_known and value not in (None, False):
      raise _refusal(where, key, value)
  for key in ("do_resize", "do_rescale"):
    if values.get(key, True) is not True:
      raise _refusal(where, key, values[key])
  for key in ("do_center_crop", "do_normalize"):
    if values.get(key) not in (None, True, False):
      raise _refusal(where, key, values[key])
  factor = values.get("rescale_factor", 1 / 255)
  if not ranges.ANY.holds(factor) or not math.isclose(
    factor, 1 / 255, rel_tol=1e-5
  ):
    raise _refusal(where, "rescale_factor", factor)
  size = _size(values, "size", where)
  crop = _size(values, "crop_size", where)
  is_cropped = values.get("do_center_crop", True) and None not in (size, crop)
  if is_cropped and size != crop:  # People would lose their heads and feet.
    raise _refusal(where, "crop_size", values["crop_size"])
  resample = values.get("resample")
  if resample is not None and resample not in list(_FILTERS):
    raise _refusal(where, "resample", resample)
  mean, std = (_triple(values, f"image_{k}", where) for k in ("mean", "std"))
  if not values.get("do_normalize", True):
    mean, std = (0.0,) * 3, (1.0,) * 3
  filter_ = None if resample is None else _FILTERS[resample]
  return Pictures(size, filter_, mean, std)


def _of_open_clip(values: Mapping[str, Any], where: str) -> Pictures:
  known = ("mean", "std", "size", "interpolation", "resize_mode", "mode")
  for key, value in values.items():
    if key not in (*known, "fill_color") and value not in (None, False):
      raise _refusal(where, key, value)
  # Of a square both make the same for people, who are not cropped.
  for key, built in (
    ("interpolation", _FILTERS.values()),
    ("resize_mode", ("shortest", "squash")),
    ("mode", ("RGB",)),
  ):
    if values.get(key) is not None and values[key] not in built:
      raise _refusal(where, key, values[key])
  mean, std = (_triple(values, key, where) for key in ("mean", "std"))
  size = _size(values, "size", where)
  return Pictures(size, values.get("interpolation"), mean, std)


def _size(
  values: Mapping[str, Any], key: str, where: str
) -> tuple[int, int] | None:
  """Returns (H, W) of any form in which sizes are written."""
  given = values.get(key)
  if given is None:
    return None
  sides: Any = given
  if isinstance(given, Mapping):
    if given.keys() == {"shortest_edge"}:
      sides = given["shortest_edge"]
    elif given.keys() == {"height", "width"}:
      sides = (given["height"], given["width"])
    else:
      raise _refusal(where, key, given)
  sides = tuple(sides) if isinstance(sides, list | tuple) else (sides, sides)
  if len(sides) == 1:
    sides *= 2
  if not ranges.PAIR.holds(sides):
    raise _refusal(where, key, given)
  return sides


def _triple(
  values: Mapping[str, Any], key: str, where: str
) -> tuple[float, float, float] | None:
  given = values.get(key)
  if given is None:
    return None
  allowed = ranges.SPREAD if key.endswith("std") else ranges.COLOUR
  if not allowed.holds(given):
    raise _refusal(where, key, given)
  return tuple(float(x) for x in given)


def _refusal(where: str, key: str, value: Any) -> errors.UserError:
  return errors.UserError(
    f"{where}: {key} is {value!r}, which is not built here: pictures are"
    " resized whole (bilinear or bicubic), divided by 255 and normalised by"
    " three means and deviations; correct the file, or remove it"
  )
