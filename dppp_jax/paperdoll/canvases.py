"""Studio canvases: what the small networks of stage A are trained on.

A canvas is what stage A asks its networks for: one person in several poses,
one in each cell, before plain paper, with the prompt, the skeletons and the
grid that ask for it. Some numbers are places without anybody instead, as the
backgrounds are. Everything is a pure function of (seed, number, split).
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json

import numpy as np

from dppp_jax.geneperson import canvas, poses, prompts
from dppp_jax.paperdoll import figure, lexicon, scenes, wardrobe, world
from dppp_jax.paperdoll import lighting as lights

# 2 x 3 cells as large as the mini CLIP's pictures; the VAE shrinks by 4, and
# the UNet by 4 more.
LAYOUT = canvas.Layout(rows=2, cols=3, cell=(96, 48), multiple=16)

# Whose canvases: "train"; "held_out" for other people of the same kind; "new"
# for people whose clothes are combined as no training has seen. The numbers
# stand in the entropy: never change them.
SPLITS = {"train": 1, "held_out": 2, "new": 3}
_TRIPLE = ("upper_type", "upper_color", "lower_color")
_NEW = 20  # One of so many triples is kept from training: 5 %.
_SCENES = 8  # One of so many numbers is a place.
_PLAIN = 5  # One of so many canvases of people has no grid.
_TURN = 20.0  # Degrees that the light turns to either side.


@dataclasses.dataclass(frozen=True)
class Sample:
  """A canvas and all that is known of it.

  Attributes:
    image: uint8 [H, W, 3].
    alpha: uint8 [H, W], the mattes; zero where nobody or a grid line is.
    keypoints: of the figure of each cell, in pixels of the cell; none of a
      place.
    has_grid: whether grid lines are drawn.
    prompt: what stage A would ask.
    words: of the vocabulary; of a place "place" and "lighting" only.
    attributes: a word for every key of wardrobe.VALUES; none of a place.
    layout: of the cells.
  """

  image: np.ndarray
  alpha: np.ndarray
  keypoints: tuple[poses.Keypoints, ...]
  has_grid: bool
  prompt: str
  words: Mapping[str, str]
  attributes: Mapping[str, str]
  layout: canvas.Layout = LAYOUT

  @property
  def is_scene(self) -> bool:
    """Whether this is a place without people."""
    return not self.keypoints

  @functools.cached_property
  def skeleton(self) -> np.ndarray:
    """uint8 [H, W, 3], the OpenPose drawing; black for a place."""
    return skeleton(self.keypoints, self.layout)

  @property
  def lines(self) -> np.ndarray:
    """uint8 [H, W, 3], Canny's edges of the grid; black without a grid."""
    lines = grid_lines(self.layout)
    return lines if self.has_grid else np.zeros_like(lines)


def draw(
  seed: int,
  number: int,
  *,
  split: str = "train",
  layout: canvas.Layout = LAYOUT,
  with_scenes: bool = True,
) -> Sample:
  """Draws a canvas.

  Args:
    seed: of the world.
    number: of the canvas, >= 0; each has another person.
    split: a key of SPLITS.
    layout: of the cells.
    with_scenes: whether one number of eight is a place.
  """
  rng = np.random.default_rng(
    np.random.SeedSequence((seed, SPLITS[split], 71, number))
  )
  if with_scenes and number % _SCENES == _SCENES - 1:
    return _place(rng, layout)
  who = person(seed, number, split=split)
  attributes = lexicon.attributes(who.words)
  doll = wardrobe.dressed(attributes, rng)
  light = studio_light(who.lighting)
  paper = world.backdrop(layout.cell, light, rng)
  turn = float(rng.uniform(-_TURN, _TURN))
  fill = float(rng.uniform(0.84, 0.95))
  first = float(rng.uniform(0.0, 360.0))
  order = rng.permutation(layout.num_cells)
  cells, mattes, keypoints = [], [], []
  for place in order.tolist():
    azimuth = first + 360.0 * (place + rng.uniform(-0.4, 0.4)) / len(order)
    drawn = _figure(doll, azimuth % 360.0, fill, light, turn, rng, layout.cell)
    ground = figure.shadow(drawn, paper, strength=0.25)
    cells.append(drawn.over(ground))
    mattes.append(drawn.alpha)
    keypoints.append(drawn.keypoints)
  image = canvas.join(np.stack(cells), layout)
  alpha = canvas.join(np.stack(mattes)[..., None], layout)[..., 0]
  has_grid = bool(rng.integers(_PLAIN))
  if has_grid:
    grid = canvas.grid_map(layout)
    image = np.minimum(image, grid)
    alpha = np.minimum(alpha, grid[..., 0])
  return Sample(
    image=image,
    alpha=alpha,
    keypoints=tuple(keypoints),
    has_grid=has_grid,
    prompt=who.prompt(lexicon.TEMPLATE),
    words=who.words,
    attributes=attributes,
    layout=layout,
  )


def person(seed: int, number: int, *, split: str) -> prompts.Person:
  """Returns the person of a canvas.

  Training skips the people whose combination of clothes is new; "new" takes
  no others.
  """
  for attempt in range(1000):
    who = _people(seed, split, attempt, number)
    if is_new(who.words) == (split == "new") or split == "held_out":
      return who
  raise AssertionError("a twentieth of all people are new")


def is_new(words: Mapping[str, str]) -> bool:
  """Whether training sees nobody with these clothes in these colours.

  Args:
    words: with "upper_type", "upper_color" and "lower_color"; every twentieth
      of their combinations is new, by a hash.
  """
  text = "/".join(words[key] for key in _TRIPLE)
  digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little") % _NEW == 0


@functools.lru_cache(maxsize=4)
def grid_lines(layout: canvas.Layout = LAYOUT) -> np.ndarray:
  """Returns uint8 [H, W, 3], the Canny map of the grid. Do not write to it."""
  return canvas.line_map(canvas.grid_map(layout))


def skeleton(
  keypoints: tuple[poses.Keypoints, ...], layout: canvas.Layout = LAYOUT
) -> np.ndarray:
  """Returns uint8 [H, W, 3]: the skeletons, or black where there are none."""
  if not keypoints:
    return np.zeros((*layout.size, 3), np.uint8)
  return canvas.skeleton_map(keypoints, layout)


def _people(seed, split, attempt, number) -> prompts.Person:
  # Other people for each split and each attempt, and enough for any number.
  house = _house(seed, split, attempt, 0)
  block, pid = divmod(number, house.capacity)
  return _house(seed, split, attempt, block)[pid] if block else house[pid]


@functools.lru_cache(maxsize=256)
def _house(seed, split, attempt, block) -> prompts.People:
  key = json.dumps(["canvases", seed, split, attempt, block]).encode()
  digest = hashlib.blake2b(key, digest_size=6).digest()
  return prompts.People(
    int.from_bytes(digest, "little"), vocabulary=lexicon.vocabulary()
  )


def studio_light(words: str) -> lights.Lighting:
  """Returns the light on a canvas for the words of its prompt.

  It is much nearer to even light than that of a place: it must not hide what
  colour clothes have.
  """
  return lexicon.light(words).softened(0.35)


def _figure(doll, azimuth, fill, light, turn, rng, cell) -> figure.Figure:
  view = poses.View(azimuth, float(rng.uniform(0.0, 15.0)))
  # Of any activity: it is the skeleton that says how somebody stands.
  gait = poses.POSES[int(rng.integers(len(poses.POSES)))][1]
  gait = dataclasses.replace(
    gait,
    phase=gait.phase + float(rng.uniform(-0.06, 0.06)),
    stride=gait.stride * float(rng.uniform(0.6, 1.1)),
    spread=gait.spread + float(rng.uniform(-3.0, 6.0)),
    elbow=gait.elbow + float(rng.uniform(-6.0, 20.0)),
  )
  shift = tuple(rng.uniform(-0.015, 0.015, 2).tolist())
  return figure.render(
    doll, gait, view, size=cell,
    placement=poses.fit(cell, view, fill=fill, shift=shift),
    lighting=light, turn=turn,
  )  # fmt: skip


def _place(rng: np.random.Generator, layout: canvas.Layout) -> Sample:
  height, width = layout.size
  place = list(lexicon.PLACES)[int(rng.integers(len(lexicon.PLACES)))]
  indoor = lexicon.PLACES[place] == "indoor"
  usable = [light for light in lights.LIGHTINGS if light.indoor == indoor]
  light = usable[int(rng.integers(len(usable)))]
  scene = scenes.strip(
    lexicon.PLACES[place], tuple(rng.integers(2**31, size=2).tolist()),
    height=height, width=2 * width, lighting=light,
  )  # fmt: skip
  image = scenes.window(
    scene, width, at=float(rng.random()), mirror=bool(rng.integers(2))
  )
  words = {"place": place, "lighting": lexicon.said(light)}
  return Sample(
    image=image,
    alpha=np.zeros(layout.size, np.uint8),
    keypoints=(),
    has_grid=False,
    prompt=prompts.background(**words, template=lexicon.BACKGROUND),
    words=words,
    attributes={},
    layout=layout,
  )
