"""What to do where cells are dropped, by the reason that most of them have."""

import collections
from collections.abc import Iterable, Mapping

_REMEDIES = {
  "empty": (
    "the matting network sees nobody: give another --config.models.u2net, or"
    " the --config.matting.size that it was trained at"
  ),
  "small": (
    "the mattes are small: look at the canvases (steps-*.jpg), give another"
    " --config.models.u2net, or lower --config.rules.min_area"
  ),
  "large": (
    "the mattes take the ground: give another --config.models.u2net, or raise"
    " --config.rules.max_area"
  ),
  "several": (
    "mattes are in pieces: give another --config.models.u2net, or raise"
    " --config.rules.max_second"
  ),
  "cut": (
    "people or mattes touch the borders of their cells: lower"
    " --config.poses.fill, or raise --config.rules.max_border and max_feet"
  ),
  "blurred": (
    "people are not sharp: take more --config.sampler.steps, or lower"
    " --config.rules.min_sharpness"
  ),
  "pose": (
    "people do not stand as their skeletons: raise"
    " --config.control.pose_scale, or lower --config.rules.min_agreement"
  ),
}
_OTHERS = "look at the canvases (steps-*.jpg), or loosen --config.rules"


def of(dropped: Iterable[Mapping[str, int]]) -> str:
  """Returns the counts by reason, most first, and what to do of it.

  Args:
    dropped: number of cells by reason, of each person.
  """
  total = collections.Counter()
  for one in dropped:
    total.update(one)
  if not total:
    return f"no cells were drawn: {_OTHERS}"
  counts = ", ".join(f"{reason} {n:,}" for reason, n in total.most_common())
  (most, _), *_ = total.most_common(1)
  return f"{counts}: {_REMEDIES.get(most, _OTHERS)}"
