"""A paper doll: person, pose, view and light in, picture and matte out."""

import dataclasses

import cv2
import numpy as np

from dppp_jax.geneperson import poses
from dppp_jax.paperdoll import bags, brush, garments, head, parts, wardrobe
from dppp_jax.paperdoll import lighting as lights


@dataclasses.dataclass(frozen=True)
class Figure:
  """A drawn person without a ground.

  Attributes:
    color: float32 [H, W, 3] premultiplied RGB in 0..255.
    alpha: uint8 [H, W] cover.
    keypoints: the eighteen COCO points.
    placement: where it stands.
  """

  color: np.ndarray
  alpha: np.ndarray
  keypoints: poses.Keypoints
  placement: poses.Placement

  def over(self, ground: np.ndarray) -> np.ndarray:
    """Fuses the figure with a ground by its matte.

    Args:
      ground: uint8 [H, W, 3].

    Returns:
      uint8 [H, W, 3]; where alpha is 0, exactly the ground.
    """
    rest = np.float32(1.0) - self.alpha[..., None] / np.float32(255.0)
    fused = self.color + rest * ground
    return np.rint(fused).astype(np.uint8)


def build(person: wardrobe.Person) -> poses.Build:
  """The proportions of a person."""
  return poses.Build(
    shoulder=person.shoulder * (0.6 + 0.4 * person.girth),
    hip=person.hip * (0.5 + 0.5 * person.girth),
    girth=person.girth,
  )


def render(
  person: wardrobe.Person,
  gait: poses.Gait,
  view: poses.View,
  *,
  size: tuple[int, int],
  placement: poses.Placement,
  lighting: lights.Lighting = lights.EVEN,
  turn: float = 0.0,
  factor: int | None = None,
) -> Figure:
  """Draws a person.

  Args:
    person: who.
    gait: the instant of the walk.
    view: from where.
    size: (height, width), pixels.
    placement: where it stands; its scale is the person's height in pixels.
    lighting: the light on it.
    turn: degrees by which the key light is moved round the scene.
    factor: how much finer it is drawn before scaling down; by default 3 for
      small cells and 2 for large ones.
  """
  cv2.setNumThreads(1)  # Threads cost more than they give on so few pixels.
  if person.attributes["lower_type"] == "long skirt":
    gait = dataclasses.replace(gait, stride=0.6 * gait.stride)
  points = poses.joints(gait, build(person))
  xy, depth = poses.project(points, view, placement=placement)
  canvas = brush.Canvas(
    size,
    light=lighting.direction(turn),
    factor=factor or (3 if size[0] <= 128 else 2),
  )
  doll = parts.Doll(
    canvas=canvas,
    person=person,
    points=points,
    xy=xy,
    depth=depth,
    matrix=poses.rotation(view),
    scale=placement.scale,
  )
  _paint(doll)
  color, alpha = canvas.finish(
    ambient=np.asarray(lighting.ambient), key=np.asarray(lighting.key)
  )
  return Figure(
    color=color,
    alpha=alpha,
    keypoints=poses.seen(points, view, placement=placement),
    placement=placement,
  )


def shadow(
  figure: Figure, ground: np.ndarray, *, strength: float, turn: float = 0.3
) -> np.ndarray:
  """Darkens the ground under the feet: uint8 [H, W, 3] in and out."""
  height, width = ground.shape[:2]
  scale = figure.placement.scale
  mask = np.zeros((height, width), np.uint8)
  center = (
    round((figure.placement.x + 0.10 * turn * scale) * 16),
    round((figure.placement.y - 0.01 * scale) * 16),
  )
  axes = (round(0.17 * scale * 16), round(0.045 * scale * 16))
  cv2.ellipse(mask, center, axes, 0, 0, 360, 255, -1, cv2.LINE_AA, 4)
  blur = max(0.8, 0.02 * scale)
  mask = cv2.GaussianBlur(mask, (0, 0), blur)
  gain = 1.0 - np.float32(strength / 255.0) * mask[..., None]
  return np.rint(ground * gain).astype(np.uint8)


def _paint(doll: parts.Doll) -> None:
  """Paints all parts from far to near."""
  kind = doll.kind
  at = poses.INDEX
  depth = doll.depth
  bag = kind["bag"]
  bag_far = doll.nearer(doll.person.side, 0.0, 0.0) < -0.25
  middle = depth[at["pelvis"]] * 0.5 + depth[at["neck"]] * 0.5
  far_arms, near_arms = [], []
  for side in parts.SIDES:
    mean = 0.5 * (depth[at[f"{side}_elbow"]] + depth[at[f"{side}_wrist"]])
    # Seen from the front an arm beside the trunk lies over it.
    (far_arms if mean > middle + 0.02 else near_arms).append((mean, side))
  for _, side in sorted(far_arms, reverse=True):
    parts.arm(doll, side)
    if bag == "handbag" and bags.carrying(doll) == side:
      bags.handbag(doll)
  if bag == "backpack" and doll.facing > 0:
    bags.backpack(doll)
  if bag == "shoulder bag" and bag_far:
    bags.shoulder_bag(doll)
  head.hair_behind(doll)
  legs = sorted(
    parts.SIDES,
    key=lambda s: -(depth[at[f"{s}_knee"]] + depth[at[f"{s}_hip"]]),
  )
  for side in legs:
    parts.leg(doll, side)
  parts.neck(doll)
  if kind["lower_type"] in ("skirt", "long skirt"):
    garments.skirt(doll, kind["lower_type"])
  if kind["upper_type"] in ("coat", "dress"):
    garments.skirt(doll, kind["upper_type"])
  garments.trunk(doll)
  if bag == "backpack":
    bags.straps(doll)
  if bag == "shoulder bag" and not bag_far:
    bags.shoulder_bag(doll)
  # A head seen from above lies over the shoulders.
  head.head(doll)
  if bag == "backpack" and doll.facing <= 0:
    bags.backpack(doll)
  for _, side in sorted(near_arms, reverse=True):
    parts.arm(doll, side)
    if bag == "handbag" and bags.carrying(doll) == side:
      bags.handbag(doll)
