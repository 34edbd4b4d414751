"""A doll, its neck and its limbs with sleeves, trousers and shoes.

Every function paints one part of a `Doll`; figure.py knows their order.
"""

import dataclasses
import functools
import math

import numpy as np

from dppp_jax.geneperson import poses
from dppp_jax.paperdoll import brush, wardrobe

_I = poses.INDEX
SIDES = ("left", "right")

# Sections of the trunk from the neck down: share of the way from the pelvis up
# to the neck, half-width across and half-depth, body heights.
TRUNK_T = np.array([1.07, 1.0, 0.93, 0.84, 0.62, 0.30, 0.02, -0.20])
_TRUNK_A = {
  "man": np.array([0.026, 0.064, 0.124, 0.126, 0.094, 0.080, 0.083, 0.083]),
  "woman": np.array([0.024, 0.054, 0.104, 0.106, 0.082, 0.066, 0.085, 0.087]),
}
_TRUNK_B = np.array([0.026, 0.034, 0.044, 0.056, 0.064, 0.055, 0.060, 0.060])
LEG_AT = (0.0, 0.2, 0.5, 0.72, 1.0)
LEG_HALF = (0.058, 0.053, 0.036, 0.035, 0.022)
_ARM_AT = (0.0, 0.25, 0.5, 0.7, 1.0)
_ARM_HALF = (0.022, 0.027, 0.022, 0.022, 0.016)
# Directions round the trunk (0 = front, 90 = left) of lines along the cloth.
_AROUND = np.radians(np.arange(-180.0, 180.0, 22.5) + 11.25)

_SLEEVES = {
  "t-shirt": (0.44, 0.010),
  "dress": (0.30, 0.008),
  "shirt": (0.97, 0.007),
  "sweater": (1.0, 0.011),
  "hoodie": (1.0, 0.013),
  "jacket": (1.0, 0.013),
  "coat": (1.0, 0.014),
}


@dataclasses.dataclass
class Doll:
  """A person in a pose before a viewer, and the canvas.

  Attributes:
    canvas: where it is painted.
    person: who it is.
    points: float [26, 3] joints in the body frame.
    xy: float [26, 2] their pixels.
    depth: float [26] their distance, body heights.
    matrix: float [3, 3] body frame -> (right, up, nearer).
    scale: pixels for one body height.
  """

  canvas: brush.Canvas
  person: wardrobe.Person
  points: np.ndarray
  xy: np.ndarray
  depth: np.ndarray
  matrix: np.ndarray
  scale: float

  def at(self, name: str) -> np.ndarray:
    """The pixel [2] of a named joint."""
    return self.xy[_I[name]]

  def offset(self, x: float, y: float, z: float) -> np.ndarray:
    """What a vector of the body frame is in the picture, pixels [2]."""
    m = self.matrix
    return np.array(
      [
        self.scale * (m[0, 0] * x + m[0, 1] * y + m[0, 2] * z),
        -self.scale * (m[1, 0] * x + m[1, 1] * y + m[1, 2] * z),
      ]
    )

  def nearer(self, x: float, y: float, z: float) -> float:
    """How far a vector of the body frame points at the viewer."""
    m = self.matrix[2]
    return float(m[0] * x + m[1] * y + m[2] * z)

  def width(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Half-width in pixels of ellipses with half-axes a (x) and b (z)."""
    c, s = self.matrix[0, 0], self.matrix[0, 2]
    return self.scale * np.sqrt((a * c) ** 2 + (b * s) ** 2)

  @property
  def facing(self) -> float:
    """1 where the face looks at the viewer, -1 where the back does."""
    return self.matrix[2, 2] / math.hypot(self.matrix[2, 2], self.matrix[2, 0])

  @property
  def kind(self) -> dict[str, str]:
    """The words for the person."""
    return self.person.attributes

  def cloth(self, part: str) -> brush.Cloth:
    """The cloth of "upper" or "lower"."""
    person = self.person
    return brush.Cloth(
      color=person.colors[part],
      second=person.colors[f"{part}_second"],
      pattern=person.attributes[f"{part}_pattern"],
      start=person.starts[part == "lower"],
    )

  def dim(self, name: str) -> float:
    """Limbs behind the trunk stand in its shade."""
    behind = self.depth[_I[name]] - self.depth[_I["pelvis"]]
    return float(min(1.0, max(0.80, 1.0 - 1.6 * max(0.0, behind))))


def leg(doll: Doll, side: str) -> None:
  """Paints one leg: skin, shoe, and trousers, jeans or shorts."""
  kind = doll.kind["lower_type"]
  dim = doll.dim(f"{side}_knee")
  skin = brush.Cloth(doll.person.colors["skin"])
  covered = {"trousers": 0.97, "jeans": 0.96, "shorts": 0.46}.get(kind, 0.0)
  if covered < 0.9:
    _limb(doll, f"{side}_hip", f"{side}_knee", f"{side}_ankle", skin,
          at=LEG_AT, half=LEG_HALF, dim=dim)  # fmt: skip
  boots = doll.kind["footwear_type"] == "boots"
  if not boots:
    shoe(doll, side, dim)
  if covered:
    loose = {"trousers": 0.006, "jeans": 0.002, "shorts": 0.012}[kind]
    half = tuple(h + loose for h in LEG_HALF)
    if kind == "trousers":
      half = (*half[:2], half[2] + 0.004, half[3] + 0.004, half[4] + 0.012)
    elif kind == "jeans":
      half = (*half[:4], half[4] + 0.006)
    _limb(doll, f"{side}_hip", f"{side}_knee", f"{side}_ankle",
          doll.cloth("lower"), at=LEG_AT, half=half, dim=dim,
          until=covered, start=0.34)  # fmt: skip
    if kind == "jeans":
      _faded(doll, side)
  if boots:
    shoe(doll, side, dim)


def _faded(doll: Doll, side: str) -> None:
  """Jeans are lighter along the thigh and darker behind the knee."""
  hip, knee = doll.at(f"{side}_hip"), doll.at(f"{side}_knee")
  run = np.stack([hip + 0.35 * (knee - hip), hip + 0.95 * (knee - hip)])
  doll.canvas.crease(run, key=255, width=0.022 * doll.scale)


def shoe(doll: Doll, side: str, dim: float) -> None:
  """Paints one foot in its shoe."""
  canvas, scale = doll.canvas, doll.scale
  color = tuple(dim * c for c in doll.person.colors["footwear"])
  skin = tuple(dim * c for c in doll.person.colors["skin"])
  kind = doll.kind["footwear_type"]
  heel, toe = doll.at(f"{side}_heel"), doll.at(f"{side}_toe")
  ankle = doll.at(f"{side}_ankle")
  radius = 0.024 * scale
  if kind == "boots":
    _limb(doll, f"{side}_hip", f"{side}_knee", f"{side}_ankle",
          brush.Cloth(doll.person.colors["footwear"]), at=LEG_AT,
          half=tuple(h + 0.012 for h in LEG_HALF), dim=dim, since=0.76,
          until=1.0)  # fmt: skip
  upper = skin if kind == "sandals" else color
  _capsule(canvas, heel, toe, radius, upper, key=170)
  if kind in ("boots", "sneakers"):
    canvas.disc(ankle, 0.026 * scale, color, key=165)
  elif kind == "loafers":
    canvas.disc(0.5 * (heel + ankle), 0.020 * scale, color, key=165)
    canvas.disc(ankle + 0.25 * (toe - heel), 0.016 * scale, skin, key=160)
  down = np.array([0.0, 0.016 * scale])
  sole = {"sneakers": (236, 236, 232), "sandals": color}.get(kind)
  if sole is None:
    sole = tuple(0.35 * c for c in color)
  sole = tuple(dim * c for c in sole)
  canvas.line(np.stack([heel + down, toe + down]), sole, width=0.011 * scale)
  if kind == "sandals":
    across = np.array([0.0, -0.022 * scale])
    for share in (0.45, 0.8):
      middle = heel + share * (toe - heel)
      canvas.line(
          np.stack([middle + across, middle - across]), color,
          width=0.014 * scale,
      )  # fmt: skip


def arm(doll: Doll, side: str) -> None:
  """Paints one arm with its sleeve and its hand."""
  kind = doll.kind["upper_type"]
  dim = doll.dim(f"{side}_elbow")
  until, loose = _SLEEVES[kind]
  skin = brush.Cloth(doll.person.colors["skin"])
  wrist, hand = doll.at(f"{side}_wrist"), doll.at(f"{side}_hand")
  flesh = tuple(dim * c for c in skin.color)
  _capsule(
      doll.canvas, wrist, wrist + 0.75 * (hand - wrist), 0.018 * doll.scale,
      flesh, key=165,
  )  # fmt: skip
  names = (f"{side}_shoulder", f"{side}_elbow", f"{side}_wrist")
  if until < 0.95:
    _limb(doll, *names, skin, at=_ARM_AT, half=_ARM_HALF, dim=dim)
  half = tuple(h + loose for h in _ARM_HALF)
  _limb(doll, *names, doll.cloth("upper"), at=_ARM_AT, half=half, dim=dim,
        until=until, cap=True)  # fmt: skip


def neck(doll: Doll) -> None:
  """Paints the neck."""
  low, head = doll.at("neck"), doll.at("head")
  top = low + 0.75 * (head - low)
  low = low - 0.25 * (head - low)
  half = 0.027 * doll.scale * (0.9 + 0.1 * doll.person.girth)
  band = brush.Ribbon(
    np.stack([top, low]), np.array([half, 1.1 * half]), np.array([0.0, 0.1])
  )
  cloth = brush.Cloth(tuple(0.93 * c for c in doll.person.colors["skin"]))
  doll.canvas.ribbon(band, cloth, scale=doll.scale)


def _limb(
  doll: Doll,
  root: str,
  middle: str,
  tip: str,
  cloth: brush.Cloth,
  *,
  at: tuple[float, ...],
  half: tuple[float, ...],
  dim: float,
  since: float = 0.0,
  until: float = 1.0,
  start: float = 0.0,
  cap: bool = False,
) -> None:
  """Paints a part of an arm or leg between two shares of its length."""
  weights, widths, places = _sections(since, until, at, half)
  points = doll.xy[[_I[root], _I[middle], _I[tip]]]
  reach = 0.49 if at is LEG_AT else 0.315
  band = brush.Ribbon(
    weights @ points,
    widths * (doll.scale * doll.person.girth),
    start + places * reach,
  )
  doll.canvas.ribbon(band, cloth, scale=doll.scale, dim=dim, caps=(cap, False))


@functools.cache
def _sections(
  since: float, until: float, at: tuple[float, ...], half: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  count = 7 if until - since > 0.5 else 4
  places = np.linspace(since, until, count)
  return bend(since, until, count), np.interp(places, at, half), places


def bend(since: float, until: float, count: int) -> np.ndarray:
  """Weights [count, 3] of root, middle and tip along a rounded bend."""
  u = np.linspace(since, until, count)
  # A knee is no corner: a parabola of this half-length replaces it.
  soft = 0.12
  gap = np.abs(u - 0.5)
  blend = np.where(gap < soft, (soft - gap) ** 2 / (4 * soft), 0.0) * 2
  root = np.maximum(0.5 - u, 0.0) * 2 + blend
  tip = np.maximum(u - 0.5, 0.0) * 2 + blend
  return np.stack([root, 1.0 - root - tip, tip], 1)


def _capsule(
  canvas: brush.Canvas,
  start: np.ndarray,
  end: np.ndarray,
  radius: float,
  color: brush.Color,
  *,
  key: int,
) -> None:
  along = end - start
  length = math.hypot(*along)
  canvas.disc(start, radius, color, key=key)
  if length > 0.3:
    across = np.array([-along[1], along[0]]) * (radius / length)
    canvas.polygon(
        np.stack([start - across, start + across, end + 0.85 * across,
                  end - 0.85 * across]), color, key=key,
    )  # fmt: skip
  canvas.disc(end, 0.85 * radius, color, key=key)


def trunk_axes(doll: Doll) -> tuple[np.ndarray, np.ndarray]:
  """The trunk's half-axes across and in depth at TRUNK_T, body heights."""
  girth = doll.person.girth
  # A heavier person is wider at the waist more than at the shoulders.
  grown = 1.0 + (girth - 1.0) * np.array(
    [0.4, 0.4, 0.5, 0.6, 1.0, 1.5, 1.2, 1.2]
  )
  return _TRUNK_A[doll.kind["gender"]] * grown, _TRUNK_B * grown


def surface(doll: Doll, angle: float) -> float | None:
  """Where a line down the trunk is seen: v in -1..1, or None if hidden."""
  x, z = 0.09 * math.sin(angle), 0.06 * math.cos(angle)
  c, s = doll.matrix[0, 0], doll.matrix[0, 2]
  # Normal of the ellipse there, towards the viewer?
  nearer = -s * math.sin(angle) / 0.09 + c * math.cos(angle) / 0.06
  if nearer <= 0.0:
    return None
  return (x * c + z * s) / math.hypot(0.09 * c, 0.06 * s)


def seen_lines(doll: Doll) -> np.ndarray:
  """Where lines down the trunk are seen: v in (-1, 1), increasing."""
  c, s = doll.matrix[0, 0], doll.matrix[0, 2]
  sine, cosine = np.sin(_AROUND), np.cos(_AROUND)
  v = (0.09 * sine * c + 0.06 * cosine * s) / math.hypot(0.09 * c, 0.06 * s)
  nearer = -s * sine / 0.09 + c * cosine / 0.06
  return np.sort(v[(nearer > 0) & (np.abs(v) < 0.93)])
