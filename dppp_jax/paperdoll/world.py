"""The drawn world: people in the studio, people on scenes, people on streets.

Everything is a pure function of integers: the same seed gives the same pixels.
People of different uses never meet, because the use is part of their entropy.
"""

from collections.abc import Mapping
import dataclasses

import numpy as np

from dppp_jax.geneperson import poses
from dppp_jax.paperdoll import figure as figures
from dppp_jax.paperdoll import lighting as lights
from dppp_jax.paperdoll import wardrobe

# The uses of people. Their numbers stand in the entropy: never change them.
DOMAINS = {
  "studio": 1,
  "geneperson": 2,
  "market1501": 3,
  "dukemtmcreid": 4,
  "held_out": 5,
}
_PERSON, _CELL = 0, 1  # What the entropy is for.
_GOLDEN = 137.50776405003785  # Degrees: any number of views spreads evenly.


@dataclasses.dataclass(frozen=True)
class Sample:
  """A picture of one person and all that is known of it.

  Attributes:
    image: uint8 [H, W, 3].
    alpha: uint8 [H, W], the matte of the person.
    skeleton: uint8 [H, W, 3], the OpenPose drawing.
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
  skeleton: np.ndarray
  caption: str
  attributes: Mapping[str, str]
  view: str
  pose: int
  activity: str
  lighting: str
  keypoints: poses.Keypoints


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
  rng = np.random.default_rng(
    np.random.SeedSequence((seed, DOMAINS[domain], _CELL, pid, cell))
  )
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
  ground = _backdrop(size, light, rng)
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
    skeleton=poses.draw(drawn.keypoints, size=size),
    caption=caption,
    attributes=who.attributes,
    view=view.name,
    pose=pose,
    activity=activity,
    lighting=words,
    keypoints=drawn.keypoints,
  )


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


def _backdrop(
  size: tuple[int, int], light: lights.Lighting, rng: np.random.Generator
) -> np.ndarray:
  """Plain paper: one tone, a little darker towards the floor."""
  height, width = size
  tone = rng.uniform(175.0, 225.0) + rng.uniform(-5.0, 5.0, 3)
  rows = np.linspace(1.02, 0.94, height, dtype=np.float32)[:, None]
  color = np.clip(tone * light.gain / lights.EVEN.gain, 0, 255)
  plain = np.clip(rows * color.astype(np.float32), 0, 255)
  return np.repeat(np.rint(plain).astype(np.uint8)[:, None], width, axis=1)
