"""What people carry: backpacks, shoulder bags and handbags."""

import numpy as np

from dppp_jax.paperdoll import brush, parts


def handbag(doll: parts.Doll) -> None:
  """Paints the bag in the hand of its side."""
  hand = doll.at(f"{carrying(doll)}_hand")
  middle = hand + np.array((0.0, 0.066 * doll.scale))
  _box(doll, middle, 0.058, 0.044, handle=hand)


def carrying(doll: parts.Doll) -> str:
  """The side at which a bag hangs."""
  return parts.SIDES[doll.person.side < 0]


def backpack(doll: parts.Doll) -> None:
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


def straps(doll: parts.Doll) -> None:
  """Paints the straps of a backpack over the chest."""
  color = doll.person.colors["bag"]
  a, b = parts.trunk_axes(doll)
  half = doll.width(a, b)
  pelvis, top = doll.at("pelvis"), doll.at("neck")
  center = pelvis + parts.TRUNK_T[:, None] * (top - pelvis)
  for angle in (-0.72, 0.72):
    v = parts.surface(doll, angle)
    if v is None:
      continue
    run = np.stack([center[i] + (v * half[i], 0.0) for i in (2, 3, 4)])
    doll.canvas.line(run, color, width=0.024 * doll.scale)


def shoulder_bag(doll: parts.Doll) -> None:
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
  doll: parts.Doll,
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
