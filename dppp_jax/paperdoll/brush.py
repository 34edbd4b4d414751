"""A canvas of flat colour, cover and light, and ribbons painted upon it.

A ribbon is a bent band with a centre line and a half-width at each section. It
stands for something round: s runs along it in body heights, v across it from -1
to 1, to the right where it runs down. Patterns are drawn in (s, v), so that
they follow the cloth.
"""

import dataclasses

import cv2
import numpy as np

Color = tuple[float, float, float]

_BITS = 4  # of cv2's fixed-point coordinates
_ONE = 1 << _BITS
# Borders and centres of the strips in which a ribbon is lit.
_EDGES = np.array([-1.0, -0.62, -0.2, 0.2, 0.62, 1.0])
_MIDS = 0.5 * (_EDGES[1:] + _EDGES[:-1])
_TOWARD = np.sqrt(1.0 - _MIDS**2)
_ROUND_VS = np.sin(np.radians([-66.0, -40.0, -14.0, 14.0, 40.0, 66.0]))
_OCTAGON = np.stack(
  [np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], 1
)


@dataclasses.dataclass(frozen=True)
class Cloth:
  """What a part is made of.

  Attributes:
    color: RGB in 0..255.
    second: RGB of the pattern.
    pattern: one of wardrobe.PATTERNS.
    start: where the pattern begins, in 0..1 periods.
  """

  color: Color
  second: Color = (255.0, 255.0, 255.0)
  pattern: str = "plain"
  start: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ribbon:
  """A band across the canvas.

  Attributes:
    center: float [N, 2], pixels of the finished picture.
    half: float [N] half-widths, pixels.
    s: float [N] place along the cloth, body heights, increasing.
    vs: float [M] where lines along the cloth are seen, increasing, in (-1, 1);
      None stands for a limb.
  """

  center: np.ndarray
  half: np.ndarray
  s: np.ndarray
  vs: np.ndarray | None = None


class Canvas:
  """Draws at a multiple of the finished size and scales down by area."""

  def __init__(
    self,
    size: tuple[int, int],
    *,
    light: tuple[float, float, float],
    factor: int,
  ):
    """Begins an empty canvas.

    Args:
      size: (height, width) of the finished picture, pixels.
      light: unit vector towards the light: right, up, towards the viewer.
      factor: how many times finer the drawing is.
    """
    self.size = size
    self.factor = factor
    self.light = light
    height, width = size[0] * factor, size[1] * factor
    # Premultiplied colour and cover in one: anti-aliased edges stay exact.
    self._rgba = np.zeros((height, width, 4), np.uint8)
    self._key = np.full((height, width), 150, np.uint8)

  def fixed(self, points: np.ndarray) -> np.ndarray:
    """Pixels of the finished picture -> cv2's fixed-point int32."""
    scaled = points * (self.factor * _ONE) - 0.5 * _ONE
    return np.rint(scaled).astype(np.int32)

  def polygon(self, points: np.ndarray, color: Color, *, key: int = -1) -> None:
    """Fills a polygon [N, 2]; `key` >= 0 also sets how lit it is (0..255)."""
    self._fill([self.fixed(points)], color)
    if key >= 0:
      cv2.fillPoly(self._key, [self.fixed(points)], key, cv2.LINE_8, _BITS)

  def hull(self, points: np.ndarray, color: Color) -> None:
    """Fills the convex hull of points [N, 2]."""
    hull = cv2.convexHull(self.fixed(points))
    cv2.fillConvexPoly(self._rgba, hull, (*color, 255), cv2.LINE_AA, _BITS)

  def disc(
    self, center: np.ndarray, radius: float, color: Color, *, key: int = -1
  ) -> None:
    """Fills a circle; radius in pixels."""
    x, y = self.fixed(np.asarray(center)).tolist()
    r = max(1, round(radius * self.factor * _ONE))
    cv2.circle(self._rgba, (x, y), r, (*color, 255), -1, cv2.LINE_AA, _BITS)
    if key >= 0:
      cv2.circle(self._key, (x, y), r, key, -1, cv2.LINE_8, _BITS)

  def line(self, points: np.ndarray, color: Color, *, width: float) -> None:
    """Draws an open line [N, 2]; width in pixels, at least one fine pixel."""
    thickness = max(1, round(width * self.factor))
    cv2.polylines(
        self._rgba, [self.fixed(points)], False, (*color, 255), thickness,
        cv2.LINE_AA, _BITS,
    )  # fmt: skip

  def crease(self, points: np.ndarray, *, key: int, width: float) -> None:
    """Darkens or lights a line without touching its colour."""
    thickness = max(1, round(width * self.factor))
    cv2.polylines(
        self._key, [self.fixed(points)], False, key, thickness, cv2.LINE_8,
        _BITS,
    )  # fmt: skip

  def ribbon(
    self,
    band: Ribbon,
    cloth: Cloth,
    *,
    scale: float,
    dim: float = 1.0,
    caps: tuple[bool, bool] = (False, False),
    outline: bool = True,
  ) -> None:
    """Paints a ribbon: colour, pattern, light across it, dark edges.

    Args:
      band: its shape.
      cloth: its colour and pattern.
      scale: pixels for one body height.
      dim: factor on the colour; limbs behind the trunk are darker.
      caps: whether the start and the end are round.
      outline: whether the long edges are dark.
    """
    center, half = band.center, band.half
    along = np.empty_like(center)
    along[1:-1] = center[2:] - center[:-2]
    along[0], along[-1] = center[1] - center[0], center[-1] - center[-2]
    length = np.sqrt((along * along).sum(1)) + 1e-9
    normal = np.stack([along[:, 1], -along[:, 0]], 1) / length[:, None]
    side = normal * half[:, None]
    color = tuple(dim * c for c in cloth.color)
    edges = self.fixed(center[None] + _EDGES[:, None, None] * side[None])
    strips = np.concatenate([edges[:-1], edges[1:, ::-1]], 1)
    mean = normal.mean(0)
    lx, ly, lt = self.light
    lit = _MIDS * (mean[0] * lx - mean[1] * ly) + _TOWARD * lt
    keys = np.clip(255.0 * dim * (0.5 + 0.5 * lit), 0, 255).astype(int).tolist()
    for end, index in zip(caps, (0, -1), strict=True):
      if end:
        self.disc(center[index], float(half[index]), color, key=keys[2])
    self._fill([np.concatenate([edges[0], edges[-1, ::-1]])], color)
    if cloth.pattern != "plain":
      shapes = _pattern(band, cloth, side)
      second = tuple(dim * c for c in cloth.second)
      for weight, polygons in shapes:
        mixed = tuple(
          weight * b + (1 - weight) * a
          for a, b in zip(color, second, strict=True)
        )
        self._fill(list(self.fixed(polygons)), mixed)
    for strip, key in zip(strips, keys, strict=True):
      cv2.fillPoly(self._key, [strip], key, cv2.LINE_8, _BITS)
    if outline:
      thickness = max(1, round(0.010 * scale * self.factor))
      cv2.polylines(
          self._key, [edges[0], edges[-1]], False, int(0.45 * min(keys)),
          thickness, cv2.LINE_8, _BITS,
      )  # fmt: skip

  def finish(
    self, *, ambient: np.ndarray, key: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Scales down and lights the drawing.

    Args:
      ambient: float [3] RGB of the light that is everywhere.
      key: float [3] RGB of the light from one side.

    Returns:
      float32 [H, W, 3] premultiplied colour in 0..255, and uint8 [H, W] cover.
    """
    height, width = self.size
    target = (width, height)
    rgba = cv2.resize(self._rgba, target, interpolation=cv2.INTER_AREA)
    lit = cv2.resize(self._key, target, interpolation=cv2.INTER_AREA)
    alpha = rgba[..., 3]
    gain = ambient.astype(np.float32) + key.astype(np.float32) * (
      lit[..., None].astype(np.float32) / np.float32(255.0)
    )
    color = rgba[..., :3].astype(np.float32) * gain
    # Light beyond white would shine through the cover's edge.
    return np.minimum(color, alpha[..., None]), alpha

  def _fill(self, polygons: list[np.ndarray], color: Color) -> None:
    cv2.fillPoly(self._rgba, polygons, (*color, 255), cv2.LINE_AA, _BITS)


def _pattern(
  band: Ribbon, cloth: Cloth, side: np.ndarray
) -> list[tuple[float, np.ndarray]]:
  """Returns [(share of the second colour, polygons [M, K, 2])] of a pattern."""
  kind = cloth.pattern
  if kind == "striped":
    return [(1.0, _bands(band, side, cloth.start, 0.056, 0.021))]
  if kind == "pinstriped":
    return [(1.0, _lengthwise(band, side, 0.085))]
  if kind == "plaid":
    return [
      (0.35, _bands(band, side, cloth.start, 0.072, 0.026)),
      (0.35, _lengthwise(band, side, 0.14, every=2)),
      (1.0, _bands(band, side, cloth.start + 0.65, 0.072, 0.009)),
      (1.0, _lengthwise(band, side, 0.04, every=2, first=1)),
    ]
  if kind == "dotted":
    return [(1.0, _dots(band, side, cloth.start, 0.042, 0.0135))]
  if kind == "distressed":
    return [(0.9, _slits(band, side, cloth.start))]
  return []  # A print lies on the chest only: garments.py draws it.


def _bands(
  band: Ribbon, side: np.ndarray, start: float, period: float, width: float
) -> np.ndarray:
  first = np.ceil((band.s[0] - width) / period - start)
  begin = (np.arange(first, band.s[-1] / period - start) + start) * period
  ends = np.clip(
    np.stack([begin, begin + width], 1), band.s[0], band.s[-1]
  ).ravel()
  left, right = (
    _at(band, band.center - side, ends),
    _at(band, band.center + side, ends),
  )
  left, right = left.reshape(-1, 2, 2), right.reshape(-1, 2, 2)
  return np.concatenate([left, right[:, ::-1]], 1)


def _lengthwise(
  band: Ribbon,
  side: np.ndarray,
  width: float,
  *,
  every: int = 1,
  first: int = 0,
) -> np.ndarray:
  vs = _ROUND_VS if band.vs is None else band.vs
  vs = vs[first::every]
  # Lines narrow towards the edge as they turn away.
  half = 0.5 * width * np.sqrt(np.maximum(1.0 - vs * vs, 0.05))
  low = band.center + (vs - half)[:, None, None] * side
  high = band.center + (vs + half)[:, None, None] * side
  return np.concatenate([low, high[:, ::-1]], 1)


def _dots(
  band: Ribbon, side: np.ndarray, start: float, period: float, radius: float
) -> np.ndarray:
  vs = _ROUND_VS if band.vs is None else band.vs
  rows = np.arange(
    np.ceil(band.s[0] / period - start), band.s[-1] / period - start
  )
  place, across = np.meshgrid(rows, np.arange(len(vs)), indexing="ij")
  kept = (place + across) % 2 == 0
  s, v = ((place + start) * period)[kept], vs[across[kept]]
  center = _at(band, band.center, s)
  offset = _at(band, side, s)
  size = np.hypot(offset[:, 0], offset[:, 1]) + 1e-9
  # Pixels for a body height, from the length that the ribbon has.
  run = np.hypot(*(band.center[-1] - band.center[0]))
  unit = max(run, 1e-3) / max(band.s[-1] - band.s[0], 1e-3)
  across_axis = offset / size[:, None]
  along_axis = np.stack([-across_axis[:, 1], across_axis[:, 0]], 1)
  flat = np.sqrt(np.maximum(1.0 - v * v, 0.1)) * radius * unit
  middle = center + offset * v[:, None]
  return (
    middle[:, None]
    + _OCTAGON[None, :, :1] * (across_axis * flat[:, None])[:, None]
    + _OCTAGON[None, :, 1:] * (along_axis * radius * unit)[:, None]
  )


def _slits(band: Ribbon, side: np.ndarray, start: float) -> np.ndarray:
  """Worn places: short pale bars over thigh and knee."""
  s = band.s[0] + 0.09 + 0.03 * start + np.array([0.0, 0.030, 0.105, 0.135])
  middle = _at(band, band.center, s)
  half = _at(band, side, s) * np.array([0.5, 0.7, 0.75, 0.55])[:, None]
  down = (
    0.5 * 0.014 * (band.center[-1] - band.center[0]) / (band.s[-1] - band.s[0])
  )
  return np.stack(
      [middle - half - down, middle + half - down, middle + half + down,
       middle - half + down], 1,
  )  # fmt: skip


def _at(band: Ribbon, values: np.ndarray, s: np.ndarray) -> np.ndarray:
  return np.stack(
    [np.interp(s, band.s, values[:, 0]), np.interp(s, band.s, values[:, 1])],
    1,
  )
