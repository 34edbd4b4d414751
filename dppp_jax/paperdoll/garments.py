"""What hangs on the trunk: upper garments with their details, and skirts."""

import math

import numpy as np

from dppp_jax.geneperson import poses
from dppp_jax.paperdoll import brush, parts

# How far down the leg it reaches and how wide it stands beside the hip.
_SKIRTS = {
  "skirt": (0.42, 1.22),
  "long skirt": (0.88, 1.20),
  "dress": (0.46, 1.26),
  "coat": (0.50, 1.12),
}


def skirt(doll: parts.Doll, kind: str) -> None:
  """Paints a skirt, the lower half of a dress, or the tails of a coat."""
  reach, flare = _SKIRTS[kind]
  weights = parts.bend(reach, reach, 1)[0]
  legs = [
    weights
    @ doll.xy[
      [
        poses.INDEX[f"{s}_hip"],
        poses.INDEX[f"{s}_knee"],
        poses.INDEX[f"{s}_ankle"],
      ]
    ]
    for s in parts.SIDES
  ]
  hem = 0.5 * (legs[0] + legs[1])
  a, b = parts.trunk_axes(doll)
  girth = doll.width(a, b)
  apart = 0.5 * abs(float(legs[0][0] - legs[1][0]))
  half = (
    np.interp(reach, parts.LEG_AT, parts.LEG_HALF)
    * doll.person.girth
    * doll.scale
  )
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
  band = brush.Ribbon(
    center, widths, 0.24 + shares * length, parts.seen_lines(doll)
  )
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
    lapel = parts.surface(doll, 0.0)
    if lapel is not None:
      run = np.stack(
        [
          top + np.array((lapel * widths[0], 0.0)),
          hem + np.array((lapel * widths[-1], 0.0)),
        ]
      )
      doll.canvas.crease(run, key=30, width=0.012 * doll.scale)


def trunk(doll: parts.Doll) -> None:
  """Paints the upper garment on the trunk."""
  kind = doll.kind["upper_type"]
  canvas, scale = doll.canvas, doll.scale
  a, b = parts.trunk_axes(doll)
  thick = {"hoodie": 0.008, "sweater": 0.006, "jacket": 0.009, "coat": 0.009}
  loose = thick.get(kind, 0.003)
  half = doll.width(a + loose, b + loose)
  pelvis, neck = doll.at("pelvis"), doll.at("neck")
  center = pelvis + parts.TRUNK_T[:, None] * (neck - pelvis)
  tucked = doll.kind["lower_type"] == "skirt" or kind == "dress"
  count = 7 if tucked else 8
  s = (parts.TRUNK_T[0] - parts.TRUNK_T) * poses.TRUNK
  band = brush.Ribbon(
    center[:count], half[:count], s[:count], parts.seen_lines(doll)
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
  doll: parts.Doll,
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
  front = parts.surface(doll, 0.0)
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
  doll: parts.Doll, center: np.ndarray, half: np.ndarray, right: np.ndarray
) -> None:
  """A picture on the chest and the back of the upper garment."""
  color = doll.person.colors["upper_second"]
  shape = int(3.99 * doll.person.details[0])
  for angle in (0.0, math.pi):
    v = parts.surface(doll, angle)
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


def _span(doll: parts.Doll, degrees: float) -> tuple[float, float]:
  """Where a strip round the front begins and ends, clipped to what is seen."""
  ends = []
  for angle in (-math.radians(degrees), math.radians(degrees)):
    v = parts.surface(doll, angle)
    if v is None:
      front = parts.surface(doll, 0.0) or 0.0
      v = math.copysign(0.98, front)
    ends.append(v)
  return ends[0], ends[1]
