"""The drawn world: people in the studio, people on scenes, people on streets.

Everything is a pure function of integers: the same seed gives the same pixels.
People of different uses never meet, because the use is part of their entropy.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
from typing import Any

import numpy as np

from dppp_jax.geneperson import poses
from dppp_jax.paperdoll import cameras, scenes, wardrobe
from dppp_jax.paperdoll import figure as figures
from dppp_jax.paperdoll import lighting as lights

# The uses of people. Their numbers stand in the entropy: never change them.
DOMAINS = {
  "studio": 1,
  "geneperson": 2,
  "market1501": 3,
  "dukemtmcreid": 4,
  "held_out": 5,
}
# What the entropy is for.
_PERSON, _CELL, _PASSAGE, _FRAME, _PLACE = range(5)
_STRIP = 6.0  # Width of a place in heights: many windows fit.
_GOLDEN = 137.50776405003785  # Degrees: any number of views spreads evenly.


@dataclasses.dataclass(frozen=True)
class Sample:
  """A picture of one person and all that is known of it.

  Attributes:
    image: uint8 [H, W, 3].
    alpha: uint8 [H, W], the matte of the person.
    caption: the prompt.
    attributes: a word for every key of wardrobe.VALUES.
    view: "front", "side" or "back".
    pose: index into poses.POSES.
    activity: "walking" or "standing".
    lighting: the words for the light.
    keypoints: the COCO points.
  """

  image: np.ndarray
  alpha: np.ndarray
  caption: str
  attributes: Mapping[str, str]
  view: str
  pose: int
  activity: str
  lighting: str
  keypoints: poses.Keypoints

  @functools.cached_property
  def skeleton(self) -> np.ndarray:
    """uint8 [H, W, 3], the OpenPose drawing; drawn when it is asked for."""
    return poses.draw(self.keypoints, size=self.alpha.shape)


@functools.lru_cache(maxsize=4096)
def person(
  pid: int, *, seed: int, domain: str = "studio", palette: str = "even"
) -> wardrobe.Person:
  """Returns the person of a number: the same for every picture of it."""
  entropy = (seed, DOMAINS[domain], _PERSON, pid)
  return wardrobe.person(entropy, palette=palette)


def studio(
  pid: int,
  cell: int,
  *,
  seed: int,
  size: tuple[int, int] = (96, 48),
  domain: str = "studio",
  sentences: float = 0.35,
) -> Sample:
  """Draws a person before a plain, evenly lit ground.

  The word for the light is in the caption and shows gently on the person and
  on the ground.

  Args:
    pid: whose picture, >= 0.
    cell: which picture of the person, >= 0; views spread evenly over cells.
    seed: of the world.
    size: (height, width), pixels.
    domain: which people: "studio", or "held_out" for people that no training
      has seen.
    sentences: share of the pictures whose caption is a short sentence
      (wardrobe.sentence) instead of the full prompt.
  """
  who = person(pid, seed=seed, domain=domain)
  rng = _rng(seed, domain, _CELL, pid, cell)
  light = lights.LIGHTINGS[rng.integers(len(lights.LIGHTINGS))].softened(0.35)
  view, pose, gait = _stance(who, cell, rng)
  placement = poses.fit(
    size,
    view,
    fill=float(0.94 * who.height * rng.uniform(0.93, 1.0)),
    shift=tuple(rng.uniform(-0.03, 0.03, 2).tolist()),
  )
  drawn = figures.render(
      who, gait, view, size=size, placement=placement, lighting=light,
      turn=float(rng.uniform(-20, 20)),
  )  # fmt: skip
  ground = backdrop(size, light, rng)
  ground = figures.shadow(drawn, ground, strength=0.25)
  words = light.words
  activity = poses.POSES[pose][0]
  if rng.random() < sentences:
    caption = wardrobe.sentence(
      who.attributes, rng, view=view.name, lighting=words
    )
  else:
    caption = wardrobe.caption(
      who.attributes, activity=activity, view=view.name, lighting=words
    )
  return Sample(
    image=drawn.over(ground),
    alpha=drawn.alpha,
    caption=caption,
    attributes=who.attributes,
    view=view.name,
    pose=pose,
    activity=activity,
    lighting=words,
    keypoints=drawn.keypoints,
  )


def make_identity(
  pid: int,
  *,
  seed: int,
  size: tuple[int, int] = (96, 48),
  cells: int = 42,
  domain: str = "geneperson",
  person_light: float = 0.8,
) -> Iterator[dict[str, Any]]:
  """Yields the records of one identity of the drawn dataset.

  Each cell is a person as the studio draws it, in the light of its prompt,
  fused by its matte with a scene of the same light.

  Args:
    pid: whose pictures.
    seed: of the world.
    size: (height, width), pixels.
    cells: number of pictures.
    domain: which people.
    person_light: how fully the light of the scene falls on the person, 0..1;
      the matte of a person that was drawn in a studio never fits exactly.

  Yields:
    {"image": uint8 [H, W, 3], "pid", "cell", "pose", "view", "lighting",
    "background", "prompt", "attributes"}.
  """
  who = person(pid, seed=seed, domain=domain)
  for cell in range(cells):
    rng = _rng(seed, domain, _CELL, pid, cell)
    indoor = rng.random() < 0.2
    usable = [x for x in lights.LIGHTINGS if x.indoor == indoor]
    light = usable[rng.integers(len(usable))]
    outdoor = [k for k in scenes.KINDS if k != "indoor"]
    background = "indoor" if indoor else str(rng.choice(outdoor))
    view, pose, gait = _stance(who, cell, rng)
    placement = poses.fit(
      size,
      view,
      fill=float(0.94 * who.height * rng.uniform(0.88, 1.0)),
      shift=tuple(rng.uniform(-0.04, 0.04, 2).tolist()),
    )
    turn = float(rng.uniform(-30, 30))
    drawn = figures.render(
      who, gait, view, size=size, placement=placement,
      lighting=light.softened(person_light), turn=turn,
    )  # fmt: skip
    scene = scenes.strip(
      background, (seed, DOMAINS[domain], _PLACE, int(rng.integers(2**31))),
      height=size[0], width=2 * size[1], lighting=light,
    )  # fmt: skip
    ground = scenes.window(scene, size[1], at=rng.random())
    ground = figures.shadow(drawn, ground, strength=0.35)
    activity = poses.POSES[pose][0]
    yield {
      "image": drawn.over(ground),
      "pid": pid,
      "cell": cell,
      "pose": pose,
      "view": view.name,
      "lighting": light.words,
      "background": background,
      "prompt": wardrobe.caption(
        who.attributes,
        activity=activity,
        view=view.name,
        lighting=light.words,
      ),
      "attributes": dict(who.attributes),
    }


def street(
  pid: int,
  camera: int,
  frame: int,
  *,
  benchmark: str,
  seed: int,
  size: tuple[int, int] = (96, 48),
  crop: float = 1.0,
  severity: float = cameras.SEVERITY,
) -> np.ndarray:
  """Shows how a street camera sees a person.

  Args:
    pid: whose picture; -1 for a picture of the place with nobody in it.
    camera: number of the camera, from 1 as benchmarks count.
    frame: which picture of this person before this camera.
    benchmark: "market1501" or "dukemtmcreid": people, places and cameras.
    seed: of the world.
    size: (height, width), pixels.
    crop: factor on the error of the box around the person; a detector's bad
      boxes have 5 and more.
    severity: how much cameras and lights change pictures, 0 (little) to 1.

  Returns:
    uint8 [H, W, 3], before the camera's JPEG.
  """
  here = cameras.softened(cameras.SETS[benchmark][camera - 1], severity)
  # A person passes a camera at one hour, in one direction.
  passage = _rng(seed, benchmark, _PASSAGE, pid + 1, camera)
  light_index = int(passage.choice(here.lightings))
  light = lights.LIGHTINGS[light_index].softened(severity)
  azimuth = here.heading + 180.0 * passage.integers(2) + passage.normal(0, 25)
  at = passage.random()
  rng = _rng(seed, benchmark, _FRAME, pid + 1, camera, frame)
  place = _place(benchmark, camera, light_index, severity, seed, size[0])
  at = float(np.clip(at + rng.normal(0.0, 0.06), 0.0, 1.0))
  image = scenes.window(place, size[1], at=at)
  if pid >= 0:
    who = person(pid, seed=seed, domain=benchmark, palette="street")
    elevation = float(np.clip(here.elevation + rng.normal(0, 3), 0, 40))
    view = poses.View(azimuth + float(rng.normal(0, 12)), elevation)
    shift = crop * here.jitter * rng.standard_normal(3)
    placement = poses.fit(
      size, view,
      fill=float(here.fill * (0.5 + 0.5 * who.height) * (1.0 + shift[0])),
      shift=(float(shift[1]), float(shift[2])),
    )  # fmt: skip
    pose = poses.POSES[int(rng.integers(len(poses.POSES)))][1]
    drawn = figures.render(
      who, dataclasses.replace(pose, phase=float(rng.random())), view,
      size=size, placement=placement, lighting=light,
      turn=40.0 * camera + float(rng.normal(0, 10)),
    )  # fmt: skip
    image = figures.shadow(drawn, image, strength=0.4)
    image = drawn.over(image)
  if rng.random() < here.occluded:
    image = cameras.occlude(image, light.gain / lights.EVEN.gain, rng)
  return cameras.expose(image, here, rng)


@functools.lru_cache(maxsize=64)
def _place(
  benchmark: str,
  camera: int,
  light: int,
  severity: float,
  seed: int,
  height: int,
) -> np.ndarray:
  here = cameras.SETS[benchmark][camera - 1]
  return scenes.strip(
    here.scene,
    (seed, DOMAINS[benchmark], _PLACE, camera),
    height=height,
    width=round(_STRIP * height),
    lighting=lights.LIGHTINGS[light].softened(severity),
    # The steeper a camera looks down, the more ground is in its pictures.
    horizon=max(0.04, 0.55 - 0.02 * here.elevation),
  )


def _rng(seed: int, domain: str, *numbers: int) -> np.random.Generator:
  entropy = (seed, DOMAINS[domain], *numbers)
  return np.random.default_rng(np.random.SeedSequence(entropy))


def _stance(
  who: wardrobe.Person, cell: int, rng: np.random.Generator
) -> tuple[poses.View, int, poses.Gait]:
  """From where a cell sees its person, and how the person stands."""
  azimuth = (360.0 * who.details[7] + _GOLDEN * cell) % 360.0
  view = poses.View(azimuth, float(rng.uniform(0.0, 18.0)))
  pose = int(rng.integers(len(poses.POSES)))
  gait = poses.POSES[pose][1]
  gait = dataclasses.replace(
    gait,
    phase=gait.phase + float(rng.uniform(-0.05, 0.05)),
    stride=gait.stride * float(rng.uniform(0.75, 1.1)),
    spread=gait.spread + float(rng.uniform(-2.0, 3.0)),
    elbow=gait.elbow + float(rng.uniform(-6.0, 14.0)),
  )
  return view, pose, gait


def backdrop(
  size: tuple[int, int], light: lights.Lighting, rng: np.random.Generator
) -> np.ndarray:
  """Draws plain paper: one tone, a little darker towards the floor.

  Args:
    size: (height, width), pixels.
    light: that falls on it.
    rng: of the tone.

  Returns:
    uint8 [H, W, 3].
  """
  height, width = size
  tone = rng.uniform(175.0, 225.0) + rng.uniform(-5.0, 5.0, 3)
  rows = np.linspace(1.02, 0.94, height, dtype=np.float32)[:, None]
  color = np.clip(tone * light.gain / lights.EVEN.gain, 0, 255)
  plain = np.clip(rows * color.astype(np.float32), 0, 255)
  return np.repeat(np.rint(plain).astype(np.uint8)[:, None], width, axis=1)
