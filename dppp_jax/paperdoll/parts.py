"""The clothed body below the head, part by part.

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
_TRUNK_T = np.array([1.07, 1.0, 0.93, 0.84, 0.62, 0.30, 0.02, -0.20])
_TRUNK_A = {
  "man": np.array([0.026, 0.064, 0.124, 0.126, 0.094, 0.080, 0.083, 0.083]),
  "woman": np.array([0.024, 0.054, 0.104, 0.106, 0.082, 0.066, 0.085, 0.087]),
}
_TRUNK_B = np.array([0.026, 0.034, 0.044, 0.056, 0.064, 0.055, 0.060, 0.060])
_LEG_AT = (0.0, 0.2, 0.5, 0.72, 1.0)
_LEG_HALF = (0.058, 0.053, 0.036, 0.035, 0.022)
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
# How far down the leg it reaches and how wide it stands beside the hip.
_SKIRTS = {
  "skirt": (0.42, 1.22),
  "long skirt": (0.88, 1.20),
  "dress": (0.46, 1.26),
  "coat": (0.50, 1.12),
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
          at=_LEG_AT, half=_LEG_HALF, dim=dim)  # fmt: skip
  boots = doll.kind["footwear_type"] == "boots"
  if not boots:
    shoe(doll, side, dim)
  if covered:
    loose = {"trousers": 0.006, "jeans": 0.002, "shorts": 0.012}[kind]
    half = tuple(h + loose for h in _LEG_HALF)
    if kind == "trousers":
      half = (*half[:2], half[2] + 0.004, half[3] + 0.004, half[4] + 0.012)
    elif kind == "jeans":
      half = (*half[:4], half[4] + 0.006)
    _limb(doll, f"{side}_hip", f"{side}_knee", f"{side}_ankle",
          doll.cloth("lower"), at=_LEG_AT, half=half, dim=dim,
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
          brush.Cloth(doll.person.colors["footwear"]), at=_LEG_AT,
          half=tuple(h + 0.012 for h in _LEG_HALF), dim=dim, since=0.76,
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


def skirt(doll: Doll, kind: str) -> None:
  """Paints a skirt, the lower half of a dress, or the tails of a coat."""
  reach, flare = _SKIRTS[kind]
  weights = _bend(reach, reach, 1)[0]
  legs = [
    weights @ doll.xy[[_I[f"{s}_hip"], _I[f"{s}_knee"], _I[f"{s}_ankle"]]]
    for s in SIDES
  ]
  hem = 0.5 * (legs[0] + legs[1])
  a, b = _trunk_axes(doll)
  girth = doll.width(a, b)
  apart = 0.5 * abs(float(legs[0][0] - legs[1][0]))
  half = np.interp(reach, _LEG_AT, _LEG_HALF) * doll.person.girth * doll.scale
  hem_half = max(flare * float(girth[-1]), apart + half + 0.012 * doll.scale)
  pelvis, neck = doll.at("pelvis"), doll.at("neck")
  # Skirts and dresses meet the upper half at the waist, others at the hips.
  high = 0.22 if kind in ("coat", "long skirt") else 0.34
  top = pelvis + high * (neck - pelvis)
  shares = np.array([0.0, 0.3, 0.65, 1.0])
  center = top + shares[:, None] * (hem - top)
  loose = 1.04 if kind == "coat" else 1.02
  widths = np.array(
    [
      float(girth[5]) * loose,
      float(girth[6]) * loose,
      0.45 * float(girth[6]) + 0.55 * hem_half,
      hem_half,
    ]
  )
  part = "upper" if kind in ("coat", "dress") else "lower"
  length = 0.11 + 0.49 * reach
  band = brush.Ribbon(center, widths, 0.24 + shares * length, _seen_lines(doll))
  doll.canvas.ribbon(band, doll.cloth(part), scale=doll.scale)
  down = hem - top
  for share in (-0.5, 0.05, 0.55):
    fold = np.stack(
      [
        top + 0.45 * down + (share * 0.7 * widths[1], 0.0),
        hem + np.array((share * hem_half, -0.01 * doll.scale)),
      ]
    )
    doll.canvas.crease(fold, key=70, width=0.008 * doll.scale)
  if kind == "coat" and doll.facing > -0.1:
    lapel = _surface(doll, 0.0)
    if lapel is not None:
      run = np.stack(
        [
          top + np.array((lapel * widths[0], 0.0)),
          hem + np.array((lapel * widths[-1], 0.0)),
        ]
      )
      doll.canvas.crease(run, key=30, width=0.012 * doll.scale)


def trunk(doll: Doll) -> None:
  """Paints the upper garment on the trunk."""
  kind = doll.kind["upper_type"]
  canvas, scale = doll.canvas, doll.scale
  a, b = _trunk_axes(doll)
  thick = {"hoodie": 0.008, "sweater": 0.006, "jacket": 0.009, "coat": 0.009}
  loose = thick.get(kind, 0.003)
  half = doll.width(a + loose, b + loose)
  pelvis, neck = doll.at("pelvis"), doll.at("neck")
  center = pelvis + _TRUNK_T[:, None] * (neck - pelvis)
  tucked = doll.kind["lower_type"] == "skirt" or kind == "dress"
  count = 7 if tucked else 8
  s = (_TRUNK_T[0] - _TRUNK_T) * poses.TRUNK
  band = brush.Ribbon(
    center[:count], half[:count], s[:count], _seen_lines(doll)
  )
  if kind == "dress":
    # The skirt has painted the hips: stop at the waist.
    band = brush.Ribbon(center[:6], half[:6], s[:6], band.vs)
  canvas.ribbon(band, doll.cloth("upper"), scale=scale)
  up = (neck - pelvis) / np.hypot(*(neck - pelvis))
  right = np.array([-up[1], up[0]])
  _details(doll, kind, center, half, right)
  if doll.kind["upper_pattern"] == "printed":
    _print(doll, center, half, right)
  # Two folds at the waist.
  for share in (-0.45, 0.4):
    start = center[4] + share * half[4] * right
    end = center[5] + 0.2 * share * half[5] * right
    canvas.crease(np.stack([start, end]), key=112, width=0.006 * scale)


def _details(
  doll: Doll,
  kind: str,
  center: np.ndarray,
  half: np.ndarray,
  right: np.ndarray,
) -> None:
  """Collars, buttons, zips, pockets and hems that tell the types apart."""
  canvas, scale, colors = doll.canvas, doll.scale, doll.person.colors
  upper = colors["upper"]
  deep = tuple(0.62 * c for c in upper)
  skin = colors["skin"]
  front = _surface(doll, 0.0)
  place = lambda i, v: center[i] + v * half[i] * right
  if kind in ("sweater", "hoodie", "jacket"):
    hem = np.stack([place(-1, -0.97), place(-1, 0.97)])
    canvas.line(hem, deep, width=0.020 * scale)
  if front is None:
    if kind == "hoodie":
      canvas.disc(
        center[2] * 0.6 + center[1] * 0.4, 0.050 * scale, deep, key=140
      )
    return
  if kind in ("t-shirt", "dress", "sweater"):
    depth = {"t-shirt": 0.030, "dress": 0.036, "sweater": 0.022}[kind]
    canvas.disc(
      center[1] + 0.35 * front * half[1] * right, depth * scale, skin, key=165
    )
    if kind == "sweater":
      canvas.line(
          np.stack([place(1, -0.55), place(2, 0.3 * front), place(1, 0.55)]),
          deep, width=0.010 * scale,
      )  # fmt: skip
  if kind == "hoodie":
    canvas.disc(center[1] + 0.2 * front * half[1] * right, 0.046 * scale,
                deep, key=130)  # fmt: skip
    canvas.disc(center[0] + 0.2 * front * half[0] * right, 0.026 * scale,
                skin, key=160)  # fmt: skip
    low, high = _span(doll, 42.0)
    pocket = np.stack([
        place(5, 0.7 * low), place(5, 0.7 * high),
        place(6, high), place(6, low),
    ])  # fmt: skip
    canvas.polygon(pocket, tuple(0.85 * c for c in upper))
    canvas.crease(pocket[:2], key=40, width=0.008 * scale)
  if kind == "shirt":
    run = np.stack([place(i, front) for i in range(1, len(center))])
    canvas.line(run, deep, width=0.010 * scale)
    pale = tuple(0.5 * c + 118 for c in upper)
    for share in (-1.0, 1.0):
      tip = center[2] + (front + 0.10 * share) * half[2] * right
      canvas.polygon(
          np.stack([center[0] + 0.1 * share * half[0] * right,
                    place(1, 0.75 * share), tip]), pale, key=190,
      )  # fmt: skip
  if kind in ("jacket", "coat"):
    width = 26.0 if kind == "jacket" else 20.0
    low, high = _span(doll, width)
    last = len(center) if kind == "jacket" else 5
    rows = range(1, last)
    taper = lambda i: 1.0 if kind == "jacket" else 1.0 - 0.22 * i
    left = [place(i, front + (low - front) * taper(i)) for i in rows]
    other = [place(i, front + (high - front) * taper(i)) for i in rows]
    opening = np.stack(left + other[::-1])
    canvas.polygon(opening, colors["inner"], key=150)
    for edge in (left, other):
      canvas.line(np.stack(edge), deep, width=0.012 * scale)
    if kind == "coat":
      belt = np.stack([place(5, -0.98), place(5, 0.98)])
      canvas.line(belt, deep, width=0.022 * scale)


def _print(
  doll: Doll, center: np.ndarray, half: np.ndarray, right: np.ndarray
) -> None:
  """A picture on the chest and the back of the upper garment."""
  color = doll.person.colors["upper_second"]
  shape = int(3.99 * doll.person.details[0])
  for angle in (0.0, math.pi):
    v = _surface(doll, angle)
    if v is None or abs(v) > 0.9:
      continue
    narrow = math.sqrt(1.0 - v * v)
    middle = 0.75 * center[4] + 0.25 * center[3]
    middle = middle + v * half[4] * right
    across = right * 0.062 * doll.scale * narrow
    along = np.array([right[1], -right[0]]) * 0.062 * doll.scale
    corners = {
        0: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        1: [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
        2: [(-1.1, 1), (1.1, 1), (0, -1.2)],
        3: [(-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4),
            (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4),
            (-1.2, -0.4), (-0.4, -0.4)],
    }[shape]  # fmt: skip
    points = np.stack([middle + x * across - y * along for x, y in corners])
    doll.canvas.polygon(points, color)


def arm(doll: Doll, side: str) -> None:
  """Paints one arm with its sleeve, its hand and what the hand carries."""
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
  carrying = SIDES[doll.person.side < 0]
  if doll.kind["bag"] == "handbag" and carrying == side:
    _box(
      doll,
      hand + np.array((0.0, 0.066 * doll.scale)),
      0.058,
      0.044,
      handle=hand,
    )


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


def backpack(doll: Doll) -> None:
  """Paints the bag on the back."""
  base, top = doll.at("pelvis"), doll.at("neck")
  behind = doll.offset(0.0, 0.0, -0.088)
  shares = np.array([0.96, 0.88, 0.5, 0.2, 0.14])
  center = base + shares[:, None] * (top - base) + behind
  half = doll.width(
    np.array([0.045, 0.072, 0.080, 0.082, 0.060]),
    np.array([0.020, 0.038, 0.052, 0.054, 0.036]),
  )
  cloth = brush.Cloth(doll.person.colors["bag"])
  doll.canvas.ribbon(
    brush.Ribbon(center, half, shares[::-1] * 0.3), cloth, scale=doll.scale
  )
  if doll.facing < 0:
    flap = np.stack(
      [center[2] - (0.8 * half[2], 0.0), center[2] + (0.8 * half[2], 0.0)]
    )
    doll.canvas.crease(flap, key=50, width=0.012 * doll.scale)


def straps(doll: Doll) -> None:
  """Paints the straps of a backpack over the chest."""
  color = doll.person.colors["bag"]
  a, b = _trunk_axes(doll)
  half = doll.width(a, b)
  pelvis, top = doll.at("pelvis"), doll.at("neck")
  center = pelvis + _TRUNK_T[:, None] * (top - pelvis)
  for angle in (-0.72, 0.72):
    v = _surface(doll, angle)
    if v is None:
      continue
    run = np.stack([center[i] + (v * half[i], 0.0) for i in (2, 3, 4)])
    doll.canvas.line(run, color, width=0.024 * doll.scale)


def shoulder_bag(doll: Doll) -> None:
  """Paints a bag at the hip with a strap across the trunk."""
  side = doll.person.side
  facing = 1.0 if doll.facing > 0 else -1.0
  hip = doll.at("pelvis") + doll.offset(side * 0.115, -0.03, 0.0)
  shoulder = doll.at("neck") + doll.offset(-side * 0.05, -0.005, 0.0)
  chest = 0.5 * (hip + shoulder) + doll.offset(0.0, 0.0, 0.05 * facing)
  near = doll.nearer(side, 0.0, 0.0)
  color = doll.person.colors["bag"]
  run = np.stack([shoulder, chest, hip])
  doll.canvas.line(run, color, width=0.020 * doll.scale)
  if near > -0.75:
    _box(doll, hip, 0.062, 0.056)


def _box(
  doll: Doll,
  middle: np.ndarray,
  across: float,
  tall: float,
  *,
  handle: np.ndarray | None = None,
) -> None:
  """A bag seen from any side; sizes are halves in body heights."""
  color = doll.person.colors["bag"]
  half = float(doll.width(np.array(0.35 * across), np.array(across)))
  height = tall * doll.scale
  if handle is not None:
    run = np.stack([middle + np.array((-0.6 * half, -height)), handle,
                    middle + np.array((0.6 * half, -height))])  # fmt: skip
    doll.canvas.line(run, color, width=0.010 * doll.scale)
  band = brush.Ribbon(
    np.stack([middle - (0.0, height), middle + np.array((0.0, height))]),
    np.array([0.88 * half, half]),
    np.array([0.0, 2 * tall]),
  )
  doll.canvas.ribbon(band, brush.Cloth(color), scale=doll.scale)
  flap = np.stack(
    [middle - (half, 0.1 * height), middle + np.array((half, -0.1 * height))]
  )
  doll.canvas.crease(flap, key=50, width=0.010 * doll.scale)


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
  reach = 0.49 if at is _LEG_AT else 0.315
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
  return _bend(since, until, count), np.interp(places, at, half), places


def _bend(since: float, until: float, count: int) -> np.ndarray:
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


def _trunk_axes(doll: Doll) -> tuple[np.ndarray, np.ndarray]:
  girth = doll.person.girth
  # A heavier person is wider at the waist more than at the shoulders.
  grown = 1.0 + (girth - 1.0) * np.array(
    [0.4, 0.4, 0.5, 0.6, 1.0, 1.5, 1.2, 1.2]
  )
  return _TRUNK_A[doll.kind["gender"]] * grown, _TRUNK_B * grown


def _surface(doll: Doll, angle: float) -> float | None:
  """Where a line down the trunk is seen: v in -1..1, or None if hidden."""
  x, z = 0.09 * math.sin(angle), 0.06 * math.cos(angle)
  c, s = doll.matrix[0, 0], doll.matrix[0, 2]
  # Normal of the ellipse there, towards the viewer?
  nearer = -s * math.sin(angle) / 0.09 + c * math.cos(angle) / 0.06
  if nearer <= 0.0:
    return None
  return (x * c + z * s) / math.hypot(0.09 * c, 0.06 * s)


def _span(doll: Doll, degrees: float) -> tuple[float, float]:
  """Where a strip round the front begins and ends, clipped to what is seen."""
  ends = []
  for angle in (-math.radians(degrees), math.radians(degrees)):
    v = _surface(doll, angle)
    if v is None:
      front = _surface(doll, 0.0) or 0.0
      v = math.copysign(0.98, front)
    ends.append(v)
  return ends[0], ends[1]


def _seen_lines(doll: Doll) -> np.ndarray:
  c, s = doll.matrix[0, 0], doll.matrix[0, 2]
  sine, cosine = np.sin(_AROUND), np.cos(_AROUND)
  v = (0.09 * sine * c + 0.06 * cosine * s) / math.hypot(0.09 * c, 0.06 * s)
  nearer = -s * sine / 0.09 + c * cosine / 0.06
  return np.sort(v[(nearer > 0) & (np.abs(v) < 0.93)])
