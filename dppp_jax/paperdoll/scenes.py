"""Places for people to stand: streets, shops, parks, fields, houses, rooms.

A scene is a strip as tall as a cell and several cells wide, drawn for a light;
a picture takes a window of it. Coordinates are shares of the strip's height.
"""

import cv2
import numpy as np

from dppp_jax.paperdoll import lighting as lights

KINDS = ("street", "shop", "park", "field", "residential", "indoor")
_BITS = 4


class _Strip:
  """A picture painted in shares of its height."""

  def __init__(self, height: int, width: int, rng: np.random.Generator):
    self.rng = rng
    # Apart, so that a place has the same houses by day and by night.
    self.lamp_rng = rng.spawn(1)[0]
    self.unit = float(height)
    self.wide = width / height
    self.image = np.zeros((height, width, 3), np.uint8)

  def _fixed(self, points) -> np.ndarray:
    scaled = np.asarray(points, float) * (self.unit * 16) - 8
    return np.rint(scaled).astype(np.int32)

  def polygon(self, points, color) -> None:
    cv2.fillPoly(
      self.image, [self._fixed(points)], tuple(color), cv2.LINE_AA, _BITS
    )

  def box(self, left, top, right, bottom, color) -> None:
    self.polygon(
      [(left, top), (right, top), (right, bottom), (left, bottom)], color
    )

  def disc(self, x, y, radius, color) -> None:
    (px, py) = self._fixed((x, y)).tolist()
    r = max(1, round(radius * self.unit * 16))
    cv2.circle(self.image, (px, py), r, tuple(color), -1, cv2.LINE_AA, _BITS)

  def line(self, points, color, width) -> None:
    thick = max(1, round(width * self.unit))
    cv2.polylines(
      self.image,
      [self._fixed(points)],
      False,
      tuple(color),
      thick,
      cv2.LINE_AA,
      _BITS,
    )

  def fade(self, top, bottom, upper, lower) -> None:
    """Fills rows with a run of colours from `upper` to `lower`."""
    first, last = round(top * self.unit), round(bottom * self.unit)
    share = np.linspace(0.0, 1.0, max(last - first, 1))[:, None, None]
    run = (1 - share) * np.asarray(upper) + share * np.asarray(lower)
    self.image[first:last] = np.clip(run, 0, 255)[: last - first]

  def tone(self, *bases, spread=14.0):
    """One of some colours, a little changed."""
    base = np.asarray(bases[self.rng.integers(len(bases))], float)
    shift = spread * self.rng.uniform(-1, 1) + self.rng.uniform(-6, 6, 3)
    return tuple(np.clip(base + shift, 0, 255).tolist())

  def grain(self, top, bottom, strength) -> None:
    """Blotches, so that a floor is no flat colour."""
    first, last = round(top * self.unit), round(bottom * self.unit)
    rows = self.image[first:last]
    if rows.size == 0:
      return
    height, width = rows.shape[:2]
    total = np.zeros((height, width), np.float32)
    for cell, weight in ((6, 0.5), (2, 0.5)):
      coarse = self.rng.standard_normal(
        (height // cell + 2, width // cell + 2), np.float32
      )
      total += weight * cv2.resize(
        coarse, (width, height), interpolation=cv2.INTER_LINEAR
      )
    noisy = rows + strength * total[..., None]
    self.image[first:last] = np.clip(noisy, 0, 255)


def strip(
  kind: str,
  entropy: tuple[int, ...],
  *,
  height: int,
  width: int,
  lighting: lights.Lighting,
  horizon: float | None = None,
) -> np.ndarray:
  """Draws a place under a light.

  Args:
    kind: one of KINDS.
    entropy: which place of that kind; the same for every light.
    height: pixels.
    width: pixels.
    lighting: the light.
    horizon: row where the ground begins, share of the height; drawn by lot if
      None. The higher a camera hangs, the higher it lies.

  Returns:
    uint8 [height, width, 3].
  """
  cv2.setNumThreads(1)
  rng = np.random.default_rng(np.random.SeedSequence(entropy))
  place = _Strip(height, width, rng)
  if horizon is None:
    horizon = float(rng.uniform(0.30, 0.62))
  dark = sum(lighting.gain) < 2.2
  _PAINTERS[kind](place, horizon, lighting, dark)
  return place.image


def window(
  scene: np.ndarray, width: int, *, at: float, mirror: bool = False
) -> np.ndarray:
  """Cuts a window [H, width, 3] out of a strip; `at` in 0..1 along it."""
  left = round(at * (scene.shape[1] - width))
  cut = scene[:, left : left + width]
  return np.ascontiguousarray(cut[:, ::-1] if mirror else cut)


def _lit(place: _Strip, lighting: lights.Lighting, top: float) -> None:
  """Puts everything below a row into the light of the scene."""
  first = round(top * place.unit)
  rows = place.image[first:].astype(np.float32)
  rows *= lighting.gain / lights.EVEN.gain
  place.image[first:] = np.clip(rows, 0, 255)


def _sky(place: _Strip, lighting: lights.Lighting, bottom: float) -> None:
  # The whole strip is put into the light later; the sky has its colour already.
  sky = np.asarray(lighting.sky, float) * lights.EVEN.gain / lighting.gain
  place.fade(0.0, bottom, 0.88 * sky, np.minimum(1.08 * sky, 255))


def _facades(place, horizon, dark, *, low, tones) -> list:
  """Houses side by side; returns the lit windows to paint after the light."""
  lamps, x = [], -0.1
  while x < place.wide:
    wide = place.rng.uniform(0.35, 0.8)
    top = horizon - place.rng.uniform(*low)
    color = place.tone(*tones)
    place.box(x, max(top, -0.2), x + wide, horizon, color)
    frame = tuple(0.55 * c for c in color)
    step = place.rng.uniform(0.09, 0.14)
    for wx in np.arange(x + 0.05, x + wide - 0.05, step):
      for wy in np.arange(max(top, -0.2) + 0.04, horizon - 0.10, 0.13):
        pane = (70, 88, 106) if not dark else (34, 38, 48)
        corners = (wx, wy, wx + 0.55 * step, wy + 0.075)
        place.box(wx - 0.008, wy - 0.008, corners[2] + 0.008,
                  corners[3] + 0.008, frame)  # fmt: skip
        place.box(*corners, pane)
        if dark and place.lamp_rng.random() < 0.4:
          lamps.append(corners)
    x += wide + place.rng.choice([0.0, 0.0, 0.08])
  return lamps


def _lamps(place, lamps) -> None:
  for corners in lamps:
    warm = place.lamp_rng.uniform(0.0, 1.0)
    place.box(*corners, (248, 212 + 20 * warm, 130 + 50 * warm))


def _pavement(place, horizon, *, color, lines) -> None:
  """A floor with joints that run to the horizon."""
  place.fade(
    horizon, 1.0, np.asarray(color) * 0.86, np.minimum(np.asarray(color), 255)
  )
  joint = tuple(0.80 * c for c in color)
  depth = 1.0 - horizon
  for share in (0.06, 0.14, 0.26, 0.44, 0.68, 0.96)[:: 1 if lines else 2]:
    y = horizon + share * depth
    place.line([(0, y), (place.wide, y)], joint, 0.004)
  middle = place.wide / 2
  for x in np.arange(-2 * place.wide, 3 * place.wide, 0.35 if lines else 0.9):
    near = middle + (x - middle) * 1.8
    place.line([(x, horizon), (near, 1.0)], joint, 0.004)


def _street(place, horizon, lighting, dark) -> None:
  _sky(place, lighting, horizon)
  lamps = _facades(
    place, horizon, dark, low=(0.25, 0.7),
    tones=((176, 150, 128), (148, 148, 152), (190, 176, 150), (152, 104, 88),
           (120, 128, 140)),
  )  # fmt: skip
  place.fade(horizon, 1.0, (92, 92, 96), (120, 120, 122))
  curb = horizon + 0.30 * (1 - horizon)
  place.box(0, horizon, place.wide, curb, place.tone((168, 164, 158)))
  place.box(0, curb, place.wide, curb + 0.018, (206, 204, 198))
  for x in np.arange(0.0, place.wide, 0.5):
    y = curb + 0.55 * (1 - curb)
    place.box(x, y, x + 0.26, y + 0.022, (222, 222, 214))
  if place.rng.random() < 0.5:
    start = place.rng.uniform(0, place.wide - 0.8)
    for k in range(6):
      x = start + 0.14 * k
      place.polygon(
        [(x, curb + 0.02), (x + 0.07, curb + 0.02), (x + 0.12, 1), (x, 1)],
        (216, 216, 212),
      )
  place.grain(horizon, 1.0, 5.0)
  for _ in range(int(place.wide * 0.5)):
    _car(place, place.rng.uniform(0, place.wide), curb)
  _lit(place, lighting, 0.0)
  _lamps(place, lamps)
  for _ in range(int(place.wide * 0.6)):
    x = place.rng.uniform(0, place.wide)
    place.line([(x, 0.0), (x, curb)], (58, 60, 64), 0.018)


def _car(place, x, base) -> None:
  color = place.tone(
    (170, 30, 34), (40, 70, 140), (226, 226, 224), (40, 42, 46)
  )
  place.polygon(
    [(x, base), (x + 0.02, base - 0.10), (x + 0.14, base - 0.11),
     (x + 0.22, base - 0.20), (x + 0.46, base - 0.20), (x + 0.56, base - 0.11),
     (x + 0.66, base - 0.09), (x + 0.68, base)], color,
  )  # fmt: skip
  place.polygon(
    [(x + 0.18, base - 0.11), (x + 0.24, base - 0.18), (x + 0.44, base - 0.18),
     (x + 0.51, base - 0.11)], (74, 92, 110),
  )  # fmt: skip
  for wheel in (0.14, 0.53):
    place.disc(x + wheel, base, 0.055, (28, 28, 30))
    place.disc(x + wheel, base, 0.025, (150, 150, 152))


def _shop(place, horizon, lighting, dark) -> None:
  place.fade(0.0, horizon, *[place.tone((160, 140, 120), (120, 124, 132))] * 2)
  x, lamps = -0.1, []
  while x < place.wide:
    wide = place.rng.uniform(0.6, 1.1)
    wall = place.tone((150, 60, 54), (60, 96, 84), (60, 70, 104),
                      (198, 186, 160), (84, 62, 54))  # fmt: skip
    place.box(x, -0.1, x + wide - 0.02, horizon, wall)
    pane = (x + 0.06, horizon - 0.42, x + wide - 0.24, horizon - 0.06)
    place.box(*pane, (150, 176, 184) if not dark else (60, 60, 64))
    lamps.append(pane)
    for shelf in range(3):
      y = pane[1] + 0.10 + 0.11 * shelf
      for gx in np.arange(pane[0] + 0.02, pane[2] - 0.04, 0.07):
        place.box(gx, y - 0.06, gx + 0.045, y, place.tone(
          (220, 80, 60), (70, 130, 190), (230, 200, 80), (90, 160, 90),
          (230, 230, 226)))  # fmt: skip
    place.box(x + wide - 0.20, horizon - 0.40, x + wide - 0.06, horizon,
              tuple(0.6 * c for c in wall))  # fmt: skip
    first, second = place.tone((200, 50, 48), (50, 110, 80), (60, 84, 150)), (
      236, 234, 226,
    )  # fmt: skip
    for k, ax in enumerate(np.arange(x, x + wide - 0.06, 0.07)):
      place.polygon(
        [(ax, horizon - 0.52), (ax + 0.07, horizon - 0.52),
         (ax + 0.075, horizon - 0.42), (ax + 0.005, horizon - 0.42)],
        first if k % 2 else second,
      )  # fmt: skip
    x += wide
  _pavement(place, horizon, color=place.tone((176, 172, 166)), lines=True)
  place.grain(horizon, 1.0, 4.0)
  _lit(place, lighting, 0.0)
  if dark:
    for pane in lamps:
      glow = place.image.copy()
      place.box(*pane, (250, 226, 164))
      place.image = cv2.addWeighted(glow, 0.45, place.image, 0.55, 0)


def _park(place, horizon, lighting, dark) -> None:
  del dark
  _sky(place, lighting, horizon)
  place.box(0, horizon - 0.12, place.wide, horizon, place.tone((70, 110, 64)))
  for _ in range(int(place.wide * 2.2)):
    x, size = place.rng.uniform(0, place.wide), place.rng.uniform(0.12, 0.24)
    base = horizon + place.rng.uniform(0.0, 0.08)
    place.line([(x, base), (x, base - 0.38)], (84, 62, 46), 0.035)
    leaf = place.tone((58, 112, 52), (84, 132, 60), (98, 120, 50), spread=20)
    for _ in range(7):
      dx, dy = place.rng.uniform(-1, 1, 2) * size * 0.7
      tint = tuple(c * place.rng.uniform(0.8, 1.15) for c in leaf)
      place.disc(x + dx, base - 0.40 + dy, 0.55 * size, tint)
  place.fade(horizon, 1.0, (96, 132, 70), (112, 150, 78))
  place.grain(horizon, 1.0, 10.0)
  middle = place.wide * place.rng.uniform(0.2, 0.8)
  place.polygon(
    [(0, horizon + 0.22), (place.wide, horizon + 0.12),
     (place.wide, horizon + 0.45), (middle, 1.0), (0, 1.0)],
    place.tone((196, 178, 146)),
  )  # fmt: skip
  for _ in range(int(place.wide * 0.5)):
    x, y = place.rng.uniform(0, place.wide), horizon + 0.12
    for k in range(3):
      place.box(x, y - 0.06 * k - 0.03, x + 0.4, y - 0.06 * k, (120, 80, 50))
    place.box(x + 0.03, y, x + 0.05, y + 0.08, (40, 40, 40))
    place.box(x + 0.35, y, x + 0.37, y + 0.08, (40, 40, 40))
  place.grain(horizon + 0.1, 1.0, 4.0)
  _lit(place, lighting, 0.0)


def _field(place, horizon, lighting, dark) -> None:
  del dark
  _sky(place, lighting, horizon)
  for k in range(2):
    xs = np.linspace(0, place.wide, 24)
    phase = place.rng.uniform(0, 6, 2)
    hill = horizon - 0.06 - 0.05 * k * (
      1 + np.sin(xs * 1.7 + phase[0])
    ) - 0.03 * np.sin(xs * 4.1 + phase[1])  # fmt: skip
    place.polygon(
      [*zip(xs, hill, strict=True), (place.wide, horizon), (0, horizon)],
      place.tone((104, 138, 92), (130, 148, 96)),
    )
  ground = place.tone((150, 168, 80), (200, 180, 96), (108, 150, 70))
  place.fade(horizon, 1.0, np.asarray(ground) * 0.9, ground)
  middle = place.wide / 2
  for x in np.arange(-2 * place.wide, 3 * place.wide, 0.22):
    near = middle + (x - middle) * 2.6
    place.line(
      [(x, horizon), (near, 1.0)], tuple(0.82 * c for c in ground), 0.012
    )
  place.grain(horizon, 1.0, 11.0)
  for _ in range(int(place.wide * 12)):
    x, y = place.rng.uniform(0, place.wide), place.rng.uniform(horizon, 1)
    place.disc(x, y, 0.008, place.tone((240, 220, 90), (236, 236, 230),
                                       (210, 90, 110)))  # fmt: skip
  _lit(place, lighting, 0.0)


def _residential(place, horizon, lighting, dark) -> None:
  _sky(place, lighting, horizon)
  x, lamps = -0.2, []
  while x < place.wide:
    wide = place.rng.uniform(0.6, 0.9)
    wall = place.tone((214, 202, 178), (186, 120, 96), (176, 186, 190),
                      (226, 220, 206))  # fmt: skip
    top = horizon - place.rng.uniform(0.26, 0.40)
    place.polygon(
      [(x - 0.05, top), (x + wide / 2, top - 0.22), (x + wide + 0.05, top)],
      place.tone((120, 62, 50), (84, 84, 92)),
    )
    place.box(x, top, x + wide, horizon, wall)
    for wx in (0.12, 0.62):
      pane = (x + wx * wide, top + 0.06, x + (wx + 0.22) * wide, top + 0.20)
      place.box(*pane, (92, 112, 128) if not dark else (36, 40, 48))
      lamps.append(pane)
    door = place.tone((120, 50, 40), (50, 70, 96), (70, 96, 70))
    place.box(x + 0.42 * wide, horizon - 0.20, x + 0.56 * wide, horizon, door)
    x += wide + place.rng.uniform(0.1, 0.4)
  fence = place.tone((230, 228, 220), (132, 96, 66))
  for fx in np.arange(0, place.wide, 0.06):
    place.box(fx, horizon - 0.10, fx + 0.03, horizon + 0.02, fence)
  _pavement(place, horizon + 0.02, color=place.tone((182, 176, 168)),
            lines=False)  # fmt: skip
  place.box(0, horizon + 0.02, place.wide, horizon + 0.10, (104, 140, 80))
  place.grain(horizon, 1.0, 5.0)
  _lit(place, lighting, 0.0)
  if dark:
    _lamps(place, lamps[::3])


def _indoor(place, horizon, lighting, dark) -> None:
  del dark
  wall = place.tone((222, 216, 204), (196, 206, 212), (210, 196, 176))
  place.fade(0.0, horizon, wall, 0.94 * np.asarray(wall))
  x = 0.1
  while x < place.wide:
    what = place.rng.integers(3)
    if what == 0:
      place.box(x, horizon - 0.58, x + 0.26, horizon,
                place.tone((140, 100, 70), (110, 120, 130)))  # fmt: skip
      place.disc(x + 0.22, horizon - 0.26, 0.012, (220, 200, 120))
    elif what == 1:
      place.box(x, horizon - 0.50, x + 0.34, horizon - 0.24, (60, 56, 54))
      place.box(x + 0.02, horizon - 0.48, x + 0.32, horizon - 0.26,
                place.tone((200, 90, 70), (70, 130, 170), (220, 190, 90),
                           (90, 150, 110), spread=25))  # fmt: skip
    else:
      for k in range(4):
        y = horizon - 0.10 - 0.12 * k
        place.box(x, y, x + 0.4, y + 0.015, (112, 84, 60))
        for bx in np.arange(x + 0.01, x + 0.38, 0.035):
          place.box(bx, y - place.rng.uniform(0.05, 0.09), bx + 0.028, y,
                    place.tone((180, 70, 60), (70, 100, 150), (210, 190, 130),
                               (90, 120, 90)))  # fmt: skip
    x += place.rng.uniform(0.45, 0.8)
  _pavement(place, horizon, color=place.tone((188, 172, 150), (176, 178, 182)),
            lines=True)  # fmt: skip
  place.box(0, horizon - 0.02, place.wide, horizon + 0.005, (236, 232, 224))
  place.grain(0.0, 1.0, 2.5)
  _lit(place, lighting, 0.0)


_PAINTERS = {
  "street": _street,
  "shop": _shop,
  "park": _park,
  "field": _field,
  "residential": _residential,
  "indoor": _indoor,
}
