"""Street cameras: where each hangs, what it sees, and what it does to pictures.

Two sets that share no camera and no place: one stands for Market-1501 (six
cameras before a supermarket), one for DukeMTMC-reID (eight on a campus).
"""

import dataclasses
import functools

import cv2
import numpy as np


@dataclasses.dataclass(frozen=True)
class Camera:
  """One camera.

  Attributes:
    name: for people.
    scene: kind of place, one of scenes.KINDS.
    lightings: indices into lighting.LIGHTINGS of its hours.
    heading: degrees; people cross its view about along this azimuth, in both
      directions.
    elevation: how steeply it looks down, degrees.
    tint: gains of red, green and blue.
    gamma: exponent on the values; above 1 darkens.
    saturation: factor on the distance from grey.
    contrast: factor on the distance from middle grey.
    blur: standard deviation, pixels at a height of 96.
    noise: standard deviation, grey levels.
    tilt: standard deviation of the roll, degrees.
    fill: share of the crop's height that a person takes, on average.
    resolution: share of the pixels that the sensor has.
    quality: of its JPEG files.
    jitter: standard deviation of the crop's error, share of its size.
    occluded: share of the pictures with something before the person.
  """

  name: str
  scene: str
  lightings: tuple[int, ...]
  heading: float
  elevation: float
  tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
  gamma: float = 1.0
  saturation: float = 1.0
  contrast: float = 1.0
  blur: float = 0.4
  noise: float = 3.0
  tilt: float = 1.5
  fill: float = 0.92
  resolution: float = 1.0
  quality: int = 85
  jitter: float = 0.03
  occluded: float = 0.08


MARKET1501: tuple[Camera, ...] = (
  Camera("gate", "shop", (0, 1), 20.0, 10.0, tint=(1.06, 1.0, 0.92),
         contrast=1.10, noise=4.0, occluded=0.10),
  Camera("arcade", "shop", (1, 9), 75.0, 14.0, tint=(0.90, 1.0, 1.10),
         gamma=1.25, saturation=0.75, blur=0.6, quality=75),
  Camera("square", "street", (0, 3), 110.0, 8.0, tint=(1.02, 1.04, 0.94),
         gamma=0.78, saturation=1.15, noise=5.0, tilt=3.0),
  Camera("lane", "residential", (1, 2), 160.0, 16.0, tint=(0.94, 1.04, 0.98),
         gamma=1.12, contrast=0.82, saturation=0.65, blur=0.7, jitter=0.05),
  Camera("crossing", "street", (4, 6), 45.0, 12.0, tint=(1.04, 0.98, 0.96),
         gamma=0.85, noise=7.0, quality=70, occluded=0.15),
  Camera("far corner", "park", (0, 1), 100.0, 20.0, tint=(0.96, 1.0, 1.06),
         gamma=1.0, saturation=0.85, resolution=0.55, quality=70, fill=0.86,
         jitter=0.06, occluded=0.12),
)  # fmt: skip

DUKEMTMCREID: tuple[Camera, ...] = (
  Camera("library", "residential", (0, 3), 10.0, 18.0, tint=(1.05, 1.0, 0.95),
         contrast=1.12, saturation=1.1),
  Camera("chapel lawn", "field", (1, 2), 60.0, 22.0, tint=(0.95, 1.0, 1.05),
         gamma=1.2, saturation=0.7, fill=0.84, blur=0.6),
  Camera("bus stop", "street", (2, 1), 95.0, 14.0, tint=(0.92, 0.98, 1.12),
         gamma=1.1, contrast=0.85, noise=5.0, occluded=0.22),
  Camera("hall", "indoor", (8,), 140.0, 12.0, tint=(1.10, 1.0, 0.84),
         gamma=0.9, noise=4.0, jitter=0.05),
  Camera("stairs", "indoor", (9,), 30.0, 24.0, tint=(0.96, 1.05, 0.98),
         gamma=1.0, saturation=0.8, tilt=3.0, quality=75),
  Camera("avenue", "park", (0, 4), 120.0, 16.0, tint=(1.0, 1.0, 0.98),
         gamma=0.85, contrast=1.15, saturation=1.1, occluded=0.15),
  Camera("car park", "street", (5, 6), 80.0, 18.0, tint=(1.02, 1.0, 1.0),
         gamma=0.72, noise=9.0, blur=0.6, quality=70),
  Camera("overlook", "field", (0, 1), 165.0, 28.0, tint=(0.98, 1.03, 1.0),
         gamma=1.1, saturation=0.85, resolution=0.5, fill=0.80, quality=75,
         jitter=0.05, occluded=0.12),
)  # fmt: skip

# Share of their full strength at which cameras and lights work. At 1 pictures
# resemble each other by camera alone, at 0 a histogram of colours finds people.
SEVERITY = 0.5

SETS = {"market1501": MARKET1501, "dukemtmcreid": DUKEMTMCREID}


@functools.cache
def softened(camera: Camera, share: float) -> Camera:
  """Returns a camera between a neutral one (share 0) and itself (share 1)."""
  near = lambda value: 1.0 + share * (value - 1.0)
  return dataclasses.replace(
    camera,
    tint=tuple(near(t) for t in camera.tint),
    gamma=near(camera.gamma),
    saturation=near(camera.saturation),
    contrast=near(camera.contrast),
    blur=camera.blur * (0.4 + 0.6 * share),
    noise=camera.noise * (0.3 + 0.7 * share),
  )


def occlude(
  image: np.ndarray, lighting_gain: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Puts a post, a railing, a bush or a parked thing before the person.

  Args:
    image: uint8 [H, W, 3].
    lighting_gain: float [3] of the scene's light against the even one.
    rng: which thing and where.

  Returns:
    uint8 [H, W, 3].
  """
  image = image.copy()
  height, width = image.shape[:2]
  shade = lambda *rgb: tuple(
    float(c) for c in np.clip(np.asarray(rgb) * lighting_gain, 0, 255)
  )
  kind = rng.integers(4)
  if kind == 0:
    x, wide = rng.uniform(0.1, 0.9) * width, rng.uniform(0.05, 0.12) * width
    cv2.rectangle(
      image, (round(x - wide), 0), (round(x + wide), height), shade(84, 86, 90),
      -1,
    )  # fmt: skip
  elif kind == 1:
    top = rng.uniform(0.68, 0.84) * height
    step = max(2, round(0.13 * width))
    for x in range(0, width, step):
      cv2.line(image, (x, round(top)), (x, height), shade(60, 64, 70), 1)
    thick = max(1, round(0.02 * height))
    cv2.line(
      image, (0, round(top)), (width, round(top)), shade(60, 64, 70), thick
    )
  elif kind == 2:
    green = rng.uniform(80, 120)
    for _ in range(14):
      x, y = rng.uniform(0, width), height * rng.uniform(0.84, 1.0)
      cv2.circle(
        image, (round(x), round(y)), round(0.09 * height),
        shade(0.55 * green, green, 0.5 * green), -1, cv2.LINE_AA,
      )  # fmt: skip
  else:
    left = rng.choice([-0.35, 0.5]) * width
    top = rng.uniform(0.58, 0.74) * height
    color = rng.uniform(40, 220, 3)
    cv2.rectangle(
      image, (round(left), round(top)), (round(left + 0.85 * width), height),
      shade(*color), -1,
    )  # fmt: skip
    cv2.rectangle(
      image, (round(left), round(top)),
      (round(left + 0.85 * width), round(top + 0.07 * height)),
      shade(*(0.6 * color)), -1,
    )  # fmt: skip
  return image


def expose(
  image: np.ndarray, camera: Camera, rng: np.random.Generator
) -> np.ndarray:
  """What lens and sensor make of a scene; the JPEG is left to the writer.

  Args:
    image: uint8 [H, W, 3].
    camera: whose lens and sensor.
    rng: roll, focus, exposure and noise of this picture.

  Returns:
    uint8 [H, W, 3].
  """
  height, width = image.shape[:2]
  roll = float(rng.normal(0.0, camera.tilt))
  turn = cv2.getRotationMatrix2D((width / 2, height / 2), roll, 1.0)
  image = cv2.warpAffine(
    image, turn, (width, height), flags=cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_REFLECT,
  )  # fmt: skip
  if camera.resolution < 1.0:
    few = (
      max(8, round(camera.resolution * width)),
      max(16, round(camera.resolution * height)),
    )
    image = cv2.resize(image, few, interpolation=cv2.INTER_AREA)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
  sigma = camera.blur * height / 96.0 * float(rng.uniform(0.7, 1.5))
  image = cv2.GaussianBlur(image, (0, 0), max(sigma, 0.05))
  gain = float(rng.uniform(0.90, 1.10))
  values = np.linspace(0.0, 1.0, 256)[:, None] * (
    gain * np.asarray(camera.tint)
  )
  values = np.clip(values, 0.0, 1.0) ** camera.gamma
  values = 0.5 + camera.contrast * (values - 0.5)
  table = np.clip(np.rint(255.0 * values), 0, 255).astype(np.uint8)
  image = cv2.LUT(image, table[None])
  grey = (1.0 - camera.saturation) * np.array([0.299, 0.587, 0.114])
  mixed = cv2.transform(
    image.astype(np.float32), np.eye(3) * camera.saturation + grey[None]
  )
  mixed += camera.noise * rng.standard_normal(image.shape, np.float32)
  return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
