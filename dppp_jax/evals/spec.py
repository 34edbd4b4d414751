"""How to read features off a trained network: what extractor.json says."""

from collections.abc import Mapping
import dataclasses
import importlib.metadata
import pathlib
from typing import Any, Literal

from dppp_jax import errors, ranges
from dppp_jax.data import images
from dppp_jax.models import clip, layers
from dppp_jax.weights import export, hub, preprocessing

FEATURES = ("content", "projected", "concat")
MARK = "dppp_jax"  # The key by which an export differs from a CLIP folder.

RANGES = {
  "mean": ranges.COLOUR,
  "std": ranges.SPREAD,
  "features": ranges.COUNT,
  "hidden": ranges.COUNT,
}

Feature = Literal["content", "projected", "concat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """What extractor.json says.

  Attributes:
    vision: sizes of the vision tower.
    projector: arguments of `heads.Projector`, or None where there is none.
    feature: "content" (v_c = P_s(v_g), DPPP's), "projected" (v_g) or "concat"
      (class token and v_g, CLIP-ReID's).
    image_size: (H, W) of the network's input.
    mean: of the normalisation, per channel.
    std: of the normalisation, per channel.
    interpolation: of the resize, "bilinear" or "bicubic".
  """

  vision: clip.VisionConfig
  projector: Mapping[str, Any] | None = None
  feature: Feature = "projected"
  image_size: tuple[int, int] = (256, 128)
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  interpolation: str = "bilinear"

  def __post_init__(self):
    ranges.check({"mean": self.mean, "std": self.std}, RANGES)
    images.check_resize(self.image_size, self.interpolation)
    for key in ("image_size", "mean", "std"):  # Lists, too, are taken.
      object.__setattr__(self, key, tuple(getattr(self, key)))
    if self.feature not in FEATURES:
      raise errors.UserError(
        f"feature {self.feature!r} is unknown: use one of {', '.join(FEATURES)}"
      )
    if self.feature == "content" and self.projector is None:
      raise errors.UserError(
        "feature 'content' needs the projector that stage psd trains, and this"
        " model has none: use 'projected' or 'concat'"
      )
    if self.projector is not None:
      _check_projector(self.projector)
    self.vision.grid(*self.image_size)

  @property
  def width(self) -> int:
    """Width of a feature."""
    projected = self.vision.projection_dim
    if self.feature == "content":
      return self.projector["features"]
    more = self.vision.hidden_size if self.feature == "concat" else 0
    return projected + more

  @classmethod
  def from_json(cls, path: pathlib.Path) -> "Spec":
    """Reads extractor.json, or the config.json of an export.

    Raises:
      errors.UserError: a key is missing, unknown or holds nonsense.
    """
    values = hub.read_json(path)
    values.pop(MARK, None)
    width = values.pop("projection_dim", None)
    known = {field.name for field in dataclasses.fields(cls)}
    if missing := known - values.keys():
      raise errors.UserError(
        f"{path}: the key {sorted(missing)[0]!r} is missing: export again"
      )
    if unknown := values.keys() - known:
      raise errors.UserError(
        f"{path}: the key {sorted(unknown)[0]!r} is unknown: it was written by"
        " another version of dppp_jax"
      )
    try:
      values["vision"] = clip.VisionConfig(
        **(values["vision"] | ({"projection_dim": width} if width else {}))
      )
      return cls(**values)
    except errors.UserError as error:
      raise errors.UserError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
      raise errors.UserError(f"{path}: {error}: export again") from error

  def to_json(self) -> dict[str, Any]:
    """Returns what `from_json` reads."""
    return {
      MARK: importlib.metadata.version("dppp-jax"),
      "projection_dim": self.vision.projection_dim,
      **dataclasses.asdict(self),
    }


def _check_projector(fields: Any) -> None:
  """Refuses what no `heads.Projector` can be made of."""
  known = {"features", "hidden", "act", "residual"}
  if not isinstance(fields, Mapping) or set(fields) != known:
    raise errors.UserError(
      f"projector {fields!r}: give {', '.join(sorted(known))}"
    )
  ranges.check(fields, RANGES, where="projector.")
  layers.activation(fields["act"])
  if not isinstance(fields["residual"], bool):
    raise errors.UserError(
      f"projector.residual={fields['residual']!r}: give true or false"
    )


def of_clip(folder: pathlib.Path, vision: clip.VisionConfig) -> Spec:
  """Returns how a plain CLIP, a folder or a file in it, is used on people.

  Args:
    folder: of the CLIP; the files beside its weights say how it normalises and
      resizes pictures.
    vision: sizes of its vision tower.

  Raises:
    errors.UserError: those files ask for what is not built.
  """
  folder = folder if folder.is_dir() else folder.parent
  told = preprocessing.read(folder)
  size = told.size or (vision.image_size,) * 2
  if size[0] == size[1]:
    # Trained on squares: people are twice as high as wide, and not cropped.
    height = min(256, size[0] * 3 // 2)
    size = (height, height // 2)
  return Spec(
    vision=vision,
    image_size=size,
    mean=told.mean or export.CLIP_MEAN,
    std=told.std or export.CLIP_STD,
    interpolation=told.interpolation or Spec.interpolation,
  )
