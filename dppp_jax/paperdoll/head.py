"""Head, face, hair and hats.

The head is an ellipsoid. A face, a cap or a hairline is a round patch on it:
all points within an angle of a direction. So every one turns with the head.
"""

import functools
import math

import numpy as np

from dppp_jax.paperdoll import brush, parts

RADII = np.array([0.055, 0.071, 0.063])  # across, up, ahead; body heights
_TURNS = np.linspace(0.0, 2.0 * np.pi, 21)[:-1]
_RING = np.stack([np.cos(_TURNS), np.sin(_TURNS)], 1)


def hair_behind(doll: parts.Doll) -> None:
  """Paints the hair that hangs behind a head that faces the viewer."""
  if doll.facing > -0.15:
    _hanging(doll)


def head(doll: parts.Doll) -> None:
  """Paints skull, face, hair and hat, and hair that hangs before the trunk."""
  kind = doll.kind
  if doll.facing <= -0.15:
    _hanging(doll)
  skin = doll.person.colors["skin"]
  hair = doll.person.colors["hair"]
  style, length = kind["hair_style"], kind["hair_length"]
  shaved = style == "shaved"
  if shaved:
    # A shaved head still shows the colour of the hair as a shadow.
    hair = tuple(0.45 * h + 0.55 * s for h, s in zip(hair, skin, strict=True))
  middle = doll.at("head")
  full = {"curly": 1.22, "straight": 1.08, "shaved": 1.0}.get(style, 1.07)
  if style in ("ponytail", "bun") and doll.facing > 0.2:
    _knot(doll, hair)
  # Skin first (jaw and nape), then hair over the upper part of the skull.
  _skull(doll, skin, 1.0, np.zeros(2))
  lift = doll.offset(0.0, 0.010, -0.006)
  if length == "short" and style != "curly":
    # Short hair leaves the nape bare: a cap of hair tipped backward.
    _patch(doll, hair, np.array([0.0, 0.62, -0.78]), 100.0, full, both=True)
  else:
    _skull(doll, hair, full, lift)
    if style == "curly":
      _curls(doll, hair, middle + lift, full)
  brow = {"short": 0.20, "shoulder-length": 0.30, "waist-length": 0.30}[length]
  fringe = doll.person.details[1] > 0.55 and not shaved
  ahead = np.array([0.0, -brow - (0.22 if fringe else 0.04), 1.0])
  _patch(doll, skin, ahead, 56.0 if length != "short" else 61.0, 1.0)
  if length == "short" or style in ("ponytail", "bun"):
    _ears(doll, skin)
  _face(doll, skin)
  if style in ("ponytail", "bun") and doll.facing <= 0.2:
    _knot(doll, hair)
  if length != "short" and style not in ("ponytail", "bun"):
    _locks(doll, hair)
  if kind["hat"] != "none":
    _hat(doll)


def _skull(
  doll: parts.Doll, color: brush.Color, grown: float, shift: np.ndarray
) -> None:
  rx, ry, angle = _silhouette(doll)
  del angle
  middle = doll.at("head") + shift
  outline = middle + _RING * (grown * rx, grown * ry)
  doll.canvas.polygon(outline, color, key=160)
  light = np.sign(doll.canvas.light[0]) or 1.0
  shade = _RING[(_RING[:, 0] * light) < -0.05]
  if len(shade) > 2:
    doll.canvas.crease(
        middle + shade[np.argsort(shade[:, 1])] * (grown * rx, grown * ry),
        key=95, width=0.014 * doll.scale,
    )  # fmt: skip


def _silhouette(doll: parts.Doll) -> tuple[float, float, float]:
  """Half-axes in pixels of the head's outline."""
  m = doll.matrix
  rx = math.sqrt(sum((RADII[i] * m[0, i]) ** 2 for i in range(3)))
  ry = math.sqrt(sum((RADII[i] * m[1, i]) ** 2 for i in range(3)))
  return rx * doll.scale, ry * doll.scale, 0.0


@functools.lru_cache(maxsize=64)
def _cone(direction: tuple[float, float, float], degrees: float) -> np.ndarray:
  """Unit vectors [20, 3] at an angle from a direction."""
  ahead = np.asarray(direction) / np.linalg.norm(direction)
  across = np.array([1.0, 0.0, 0.0])
  across = across - ahead * (across @ ahead)
  across = across / np.linalg.norm(across)
  up = np.cross(ahead, across)
  c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  return c * ahead + s * (_RING[:, :1] * across + _RING[:, 1:] * up)


def _patch(
  doll: parts.Doll,
  color: brush.Color,
  direction: np.ndarray,
  degrees: float,
  grown: float,
  *,
  both: bool = False,
) -> None:
  """Fills the part of the head within an angle of a direction.

  Args:
    doll: whose head.
    color: RGB.
    direction: [3] in the body frame.
    degrees: the angle.
    grown: factor on the head's radii.
    both: whether the patch goes round to the far side of the outline, as hair
      and hats do, or ends there, as a face does.
  """
  rim = _cone(tuple(direction.tolist()), degrees)
  seen = (rim * RADII) @ doll.matrix.T * (grown * doll.scale)
  flat = seen[:, :2] * (1.0, -1.0)
  rx, ry, _ = _silhouette(doll)
  outline = _RING * (grown * rx, grown * ry)
  # Nearness of the surface over a point of the outline follows the direction:
  # the outline belongs to the patch where its own normal is within the angle.
  normals = _RING[:, :1] * doll.matrix[0] - _RING[:, 1:] * doll.matrix[1]
  ahead = direction / np.linalg.norm(direction)
  inside = normals @ ahead > math.cos(math.radians(degrees))
  if both:
    points = np.concatenate([flat, outline[inside]])
  else:
    visible = seen[:, 2] > 0
    if not visible.any():
      return
    points = np.concatenate([flat[visible], outline[inside]])
  if len(points) < 3:
    return
  doll.canvas.hull(doll.at("head") + points, color)


def _ears(doll: parts.Doll, skin: brush.Color) -> None:
  for side, x in (("left", 1.0), ("right", -1.0)):
    if doll.nearer(x, 0.0, 0.0) > -0.35:
      doll.canvas.disc(
        doll.at(f"{side}_ear"),
        0.014 * doll.scale,
        tuple(0.92 * c for c in skin),
        key=150,
      )


def _face(doll: parts.Doll, skin: brush.Color) -> None:
  canvas, scale = doll.canvas, doll.scale
  dark, lip = (
    (38, 28, 26),
    tuple(0.7 * c + 0.3 * r for c, r in zip(skin, (170, 40, 50), strict=True)),
  )
  for side, x in (("left", 0.4), ("right", -0.4)):
    if doll.nearer(x, 0.0, 1.0) > 0.12:
      eye = doll.at(f"{side}_eye")
      if scale > 130:
        canvas.disc(eye, 0.0105 * scale, (244, 244, 240))
        canvas.disc(eye, 0.0065 * scale, dark)
      else:
        canvas.disc(eye, 0.0085 * scale, dark)
      brow = eye + doll.offset(0.0, 0.017, 0.004)
      reach = doll.offset(0.013, 0.0, -0.003)
      canvas.line(
        np.stack([brow - reach, brow + reach]),
        tuple(0.6 * c for c in doll.person.colors["hair"]),
        width=0.006 * scale,
      )
  nose = doll.at("nose")
  if doll.nearer(0.0, 0.0, 1.0) > -0.25:
    canvas.disc(nose, 0.010 * scale, tuple(0.86 * c for c in skin), key=175)
  if doll.nearer(0.0, 0.0, 1.0) > 0.1:
    mouth = doll.at("head") + doll.offset(0.0, -0.036, 0.050)
    reach = doll.offset(0.015, 0.0, -0.004)
    canvas.line(
      np.stack([mouth - reach, mouth + reach]), lip, width=0.009 * scale
    )


def _hanging(doll: parts.Doll) -> None:
  """Long hair down the back."""
  kind = doll.kind
  if kind["hair_length"] == "short" or kind["hair_style"] in (
      "ponytail", "bun",
  ):  # fmt: skip
    return
  hair = brush.Cloth(doll.person.colors["hair"])
  drop = 0.155 if kind["hair_length"] == "shoulder-length" else 0.37
  wide = 1.22 if kind["hair_style"] == "curly" else 1.0
  steps = np.array([0.045, -0.03, -0.09, -0.5 * drop - 0.03, -drop])
  back = np.array([-0.012, -0.030, -0.045, -0.062, -0.070])
  start = doll.at("head")
  center = np.stack(
    [start + doll.offset(0.0, y, z) for y, z in zip(steps, back, strict=True)]
  )
  half = doll.width(
    wide * np.array([0.048, 0.060, 0.066, 0.072, 0.058]),
    wide * np.array([0.050, 0.048, 0.038, 0.034, 0.024]),
  )
  band = brush.Ribbon(center, half, 0.045 - steps)
  doll.canvas.ribbon(band, hair, scale=doll.scale, caps=(False, False))
  if kind["hair_style"] == "curly":
    for i, turn in ((2, -0.9), (2, 0.9), (3, -0.95), (3, 0.95), (4, -0.6),
                    (4, 0.0), (4, 0.6)):  # fmt: skip
      doll.canvas.disc(
        center[i] + (turn * half[i], 0.0),
        0.024 * doll.scale,
        hair.color,
        key=135,
      )
  else:
    for turn in (-0.45, 0.05, 0.5):
      doll.canvas.crease(
        center[1:] + (turn * half[1:])[:, None] * np.array([1.0, 0.0]),
        key=110,
        width=0.008 * doll.scale,
      )


def _locks(doll: parts.Doll, hair: brush.Color) -> None:
  """Hair at both sides of the face, down to the shoulders or the chest."""
  if doll.facing < -0.3:
    return
  drop = 0.115 if doll.kind["hair_length"] == "shoulder-length" else 0.22
  for x in (-1.0, 1.0):
    if doll.nearer(x, 0.0, 0.4) < -0.6:
      continue
    start = doll.at("head")
    center = np.stack(
      [
        start + doll.offset(x * 0.046, 0.015, 0.012),
        start + doll.offset(x * 0.054, -0.045, 0.012),
        start + doll.offset(x * 0.056, -drop, 0.030),
      ]
    )
    half = doll.scale * np.array([0.014, 0.019, 0.014])
    band = brush.Ribbon(center, half, np.array([0.0, 0.06, drop]))
    doll.canvas.ribbon(
        band, brush.Cloth(hair), scale=doll.scale, outline=False,
        caps=(False, True),
    )  # fmt: skip


def _knot(doll: parts.Doll, hair: brush.Color) -> None:
  start = doll.at("head")
  if doll.kind["hair_style"] == "bun":
    doll.canvas.disc(
        start + doll.offset(0.0, 0.058, -0.045), 0.036 * doll.scale, hair,
        key=140,
    )  # fmt: skip
    return
  drop = {"short": 0.07, "shoulder-length": 0.15, "waist-length": 0.30}[
    doll.kind["hair_length"]
  ]
  center = np.stack(
    [
      start + doll.offset(0.0, 0.035, -0.055),
      start + doll.offset(0.0, 0.010, -0.088),
      start + doll.offset(0.0, -0.5 * drop, -0.098),
      start + doll.offset(0.0, -drop, -0.092),
    ]
  )
  half = doll.scale * np.array([0.016, 0.024, 0.026, 0.010])
  band = brush.Ribbon(center, half, np.array([0.0, 0.03, 0.5 * drop, drop]))
  doll.canvas.ribbon(
    band, brush.Cloth(hair), scale=doll.scale, caps=(True, True)
  )


def _curls(
  doll: parts.Doll, hair: brush.Color, middle: np.ndarray, grown: float
) -> None:
  rx, ry, _ = _silhouette(doll)
  for i in range(10, 20):
    spot = middle + _RING[i] * (0.94 * grown * rx, 0.94 * grown * ry)
    doll.canvas.disc(spot, 0.022 * doll.scale, hair, key=130 if i % 2 else 175)


def _hat(doll: parts.Doll) -> None:
  canvas, scale = doll.canvas, doll.scale
  kind = doll.kind["hat"]
  color = doll.person.colors["hat"]
  deep = tuple(0.68 * c for c in color)
  up = np.array([0.0, 1.0, -0.12 if kind != "cap" else 0.0])
  middle = doll.at("head")
  brim_at = doll.offset(0.0, 0.030, 0.0)
  if kind == "sun hat":
    rx = doll.width(np.array(0.118), np.array(0.118))
    ry = max(0.118 * abs(doll.matrix[1, 2]), 0.018) * scale
    canvas.polygon(middle + brim_at + _RING * (rx, ry), color, key=120)
  peak = doll.nearer(0.0, 0.0, 1.0)
  if kind == "cap" and peak < 0.3:
    _peak(doll, deep, brim_at)
  grown = {"cap": 1.10, "beanie": 1.16, "sun hat": 1.12}[kind]
  _patch(doll, color, up, 66.0 if kind != "beanie" else 74.0, grown, both=True)
  if kind == "cap" and peak >= 0.3:
    _peak(doll, deep, brim_at)
  if kind == "beanie":
    rx, _, _ = _silhouette(doll)
    band = doll.offset(0.0, 0.018, 0.0)
    canvas.line(
        np.stack([
            middle + band - (0.95 * grown * rx, 0.0),
            middle + band + (0.95 * grown * rx, 0.0),
        ]),
        deep, width=0.022 * scale,
    )  # fmt: skip
    canvas.disc(
      middle + doll.offset(0.0, 0.082, -0.006), 0.016 * scale, deep, key=170
    )


def _peak(doll: parts.Doll, color: brush.Color, brim: np.ndarray) -> None:
  start = doll.at("head") + brim
  points = [
    start + doll.offset(x, y, z)
    for x, y, z in (
      (-0.046, 0.006, 0.030),
      (0.046, 0.006, 0.030),
      (0.040, -0.012, 0.100),
      (0.0, -0.014, 0.112),
      (-0.040, -0.012, 0.100),
      (-0.046, -0.012, 0.040),
      (0.046, -0.012, 0.040),
    )
  ]
  doll.canvas.hull(np.stack(points), color)
