"""The words for light, and the light itself."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Lighting:
  """One condition of light.

  Attributes:
    words: as they stand in a prompt.
    ambient: RGB gain of the light that is everywhere.
    key: RGB gain of the light from one side at its brightest.
    azimuth: from where the key light comes, degrees to the right of the viewer.
    elevation: its height, degrees.
    sky: RGB in 0..255 of what is far away under this light.
    indoor: whether it belongs to rooms.
  """

  words: str
  ambient: tuple[float, float, float]
  key: tuple[float, float, float]
  azimuth: float
  elevation: float
  sky: tuple[float, float, float]
  indoor: bool = False

  def direction(self, turn: float = 0.0) -> tuple[float, float, float]:
    """Returns the unit vector (right, up, nearer) towards the light."""
    a = math.radians(self.azimuth + turn)
    e = math.radians(self.elevation)
    return math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)

  def softened(self, share: float) -> "Lighting":
    """Returns this light mixed with the even one, which gets 1 - share."""
    mix = lambda a, b: tuple(
      share * x + (1.0 - share) * y for x, y in zip(a, b, strict=True)
    )
    return dataclasses.replace(
      self, ambient=mix(self.ambient, EVEN.ambient), key=mix(self.key, EVEN.key)
    )

  @property
  def gain(self) -> np.ndarray:
    """float32 [3]: what this light makes of a white wall, as a factor."""
    return np.asarray(self.ambient, np.float32) + 0.7 * np.asarray(
      self.key, np.float32
    )


EVEN = Lighting(
  "even light", (0.70,) * 3, (0.46,) * 3, -25.0, 35.0, (225, 226, 228)
)
LIGHTINGS: tuple[Lighting, ...] = (
  Lighting(
    "day, sunshine",
    (0.52, 0.54, 0.60),
    (0.92, 0.86, 0.70),
    -55.0,
    40.0,
    (150, 196, 240),
  ),
  Lighting(
    "day, overcast",
    (0.72, 0.76, 0.80),
    (0.22, 0.23, 0.25),
    0.0,
    75.0,
    (196, 204, 212),
  ),
  Lighting(
    "day, rain",
    (0.56, 0.60, 0.66),
    (0.20, 0.22, 0.24),
    10.0,
    70.0,
    (148, 156, 166),
  ),
  Lighting(
    "dawn, soft light",
    (0.66, 0.60, 0.66),
    (0.50, 0.42, 0.36),
    60.0,
    15.0,
    (244, 206, 190),
  ),
  Lighting(
    "dusk",
    (0.46, 0.38, 0.44),
    (0.72, 0.40, 0.18),
    75.0,
    10.0,
    (226, 130, 84),
  ),
  Lighting(
    "night, dark",
    (0.24, 0.26, 0.36),
    (0.22, 0.24, 0.34),
    -30.0,
    60.0,
    (18, 22, 44),
  ),
  Lighting(
    "night, street lamp",
    (0.28, 0.26, 0.26),
    (0.78, 0.58, 0.26),
    35.0,
    65.0,
    (30, 28, 42),
  ),
  Lighting(
    "night, neon",
    (0.36, 0.26, 0.46),
    (0.56, 0.16, 0.60),
    80.0,
    20.0,
    (40, 22, 66),
  ),
  Lighting(
    "indoor, warm light",
    (0.62, 0.54, 0.42),
    (0.46, 0.40, 0.28),
    -20.0,
    70.0,
    (214, 190, 156),
    indoor=True,
  ),
  Lighting(
    "indoor, white light",
    (0.72, 0.74, 0.74),
    (0.34, 0.35, 0.36),
    15.0,
    80.0,
    (222, 226, 228),
    indoor=True,
  ),
)
