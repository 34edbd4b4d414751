"""What can be read off canvases that were asked for: is it what was asked?

Four questions, put to generated canvases and to drawn ones alike, so that a
reader's own errors are known: drawn canvases are what is asked for by
construction.

    clothes   a CLIP names them by zero-shot classification; colours are also
              named by histograms inside the matte, without any network
    identity  are cells of a canvas nearer to each other than to other ones
    pose      does the matte cover the figure that the skeleton asked for
    grid      does it keep to its cell
"""

from collections.abc import Mapping, Sequence
import itertools

import cv2
import numpy as np

from dppp_jax.evals import zeroshot
from dppp_jax.geneperson import canvas, poses
from dppp_jax.paperdoll import canvas_corpus, canvases, lighting, wardrobe

# What a prompt says and a CLIP is asked.
ATTRIBUTES = (
  "upper_color", "lower_color", "upper_pattern", "lower_pattern", "hair_color",
  "footwear_color", "gender",
)  # fmt: skip
COLOURED = ("upper", "lower")
_SHORT = ("shorts", "skirt")
_BINS = 8  # Of each colour channel.
_WITNESSES = 100  # How many pixels a person's clothes count for.
_PRIOR = 100  # How many pixels the colour in any pattern counts for.
_RING = 2  # Pixels of a cell's border, half a grid line and one more.


def attributes(
  encoder: zeroshot.Encoder,
  cells: np.ndarray,
  wanted: Sequence[Mapping[str, str]],
  names: Sequence[str] = ATTRIBUTES,
) -> dict[str, dict[str, float]]:
  """Returns how often a CLIP reads what was asked for.

  Args:
    encoder: of the CLIP.
    cells: uint8 [N, cells, h, w, 3].
    wanted: N dicts, attribute -> word.
    names: of the attributes.

  Returns:
    {attribute: {"cell", "canvas"}}: shares of the cells, one by one, and of
    the canvases, whose cells' features are averaged; of those only where the
    clothes are seen.
  """
  features = features_of(encoder, cells)
  means = features.mean(axis=1)
  means /= np.linalg.norm(means, axis=-1, keepdims=True)
  found = {}
  for name in names:
    table = classes(encoder, name)
    seen = [i for i, words in enumerate(wanted) if is_seen(name, words)]
    truth = [wanted[i][name] for i in seen]
    flat = features[seen].reshape(-1, features.shape[-1])
    found[name] = {
      "cell": zeroshot.classify(flat, table, np.repeat(truth, cells.shape[1])),
      "canvas": zeroshot.classify(means[seen], table, truth),
    }
  return found


def is_seen(name: str, words: Mapping[str, str]) -> bool:
  """Returns whether a person's attribute shows.

  Below a coat, shorts and skirts are a strip of a few pixels.

  Args:
    name: e.g. "lower_color".
    words: the person's attributes.
  """
  is_hidden = words["upper_type"] == "coat" and words["lower_type"] in _SHORT
  return not (is_hidden and name.startswith("lower_"))


def classes(encoder: zeroshot.Encoder, name: str) -> dict[str, np.ndarray]:
  """Returns the class vectors of an attribute of the wardrobe."""
  return encoder.classes(
    {value: wardrobe.phrases(name, value) for value in wardrobe.VALUES[name]}
  )


def features_of(encoder: zeroshot.Encoder, cells: np.ndarray) -> np.ndarray:
  """Encodes uint8 [N, cells, h, w, 3] to [N, cells, E] of norm 1."""
  found = encoder.images(cells.reshape(-1, *cells.shape[2:]))
  return found.reshape(*cells.shape[:2], -1)


class Colours:
  """Names the colours of clothes by histograms inside mattes.

  A naive Bayes over the colours of single pixels, learned from drawn canvases:
  p(colour | pixels, pattern) ~ prod p(pixel | colour, pattern). The pattern is
  given, because a grey shirt with white stripes and a white one with grey
  stripes differ in nothing else. So is the light, because white at night is
  grey by day: its colour is divided out.

  Args:
    corpus: of people in known clothes; places are left out.
  """

  def __init__(self, corpus: canvas_corpus.Corpus):
    self._logs = {part: {} for part in COLOURED}
    counts = {
      part: {
        pattern: np.zeros((len(wardrobe.VALUES[f"{part}_color"]), _BINS**3))
        for pattern in wardrobe.VALUES[f"{part}_pattern"]
      }
      for part in COLOURED
    }
    for i in np.flatnonzero(~corpus.is_scene):
      words = corpus.records[i]["attributes"]
      light = corpus.records[i]["words"]["lighting"]
      cells, mattes = cut(corpus.images[[i]])[0], cut(corpus.alphas[[i]])[0]
      cells = evenly_lit(cells, light)
      for part in COLOURED:
        row = wardrobe.VALUES[f"{part}_color"].index(words[f"{part}_color"])
        counts[part][words[f"{part}_pattern"]][row] += _histogram(
          part, cells, mattes, corpus.keypoints[i], words
        )
    for part, tables in counts.items():
      # What was seen of a colour in any pattern stands for what was not.
      whole = sum(tables.values()) + 0.5
      prior = whole / whole.sum(axis=1, keepdims=True)
      for pattern, table in tables.items():
        table = table + _PRIOR * prior
        shares = table / table.sum(axis=1, keepdims=True)
        self._logs[part][pattern] = np.log(shares)

  def read(
    self,
    part: str,
    cells: np.ndarray,
    mattes: np.ndarray,
    keypoints: np.ndarray,
    words: Mapping[str, str],
    light: str,
  ) -> str:
    """Returns the colour of a person's clothes.

    Args:
      part: one of COLOURED.
      cells: uint8 [cells, h, w, 3] of one canvas.
      mattes: uint8 [cells, h, w].
      keypoints: [cells, 18, 3] of `canvas_corpus.Corpus`.
      words: the person's, of which types and patterns are looked at.
      light: the prompt's words for it.
    """
    cells = evenly_lit(cells, light)
    logs = self._logs[part][words[f"{part}_pattern"]]
    counts = _histogram(part, cells, mattes, keypoints, words)
    return wardrobe.VALUES[f"{part}_color"][int(np.argmax(logs @ counts))]

  def agreement(
    self,
    cells: np.ndarray,
    mattes: np.ndarray,
    keypoints: np.ndarray,
    wanted: Sequence[Mapping[str, str]],
    lights: Sequence[str],
  ) -> dict[str, float]:
    """Returns {"upper_color", "lower_color"}: shares of where they are seen.

    Args:
      cells: uint8 [N, cells, h, w, 3].
      mattes: uint8 [N, cells, h, w].
      keypoints: [N, cells, 18, 3].
      wanted: what N persons wear.
      lights: the words for light of N prompts.
    """
    rows = list(zip(cells, mattes, keypoints, wanted, lights, strict=True))
    found = {}
    for part in COLOURED:
      name = f"{part}_color"
      seen = [row for row in rows if is_seen(name, row[3])]
      right = [self.read(part, *row) == row[3][name] for row in seen]
      found[name] = float(np.mean(right))
    return found


def identity_auc(features: np.ndarray) -> float:
  """Returns how well distances tell cells of one canvas from those of others.

  Args:
    features: [N, cells, E] of norm 1.

  Returns:
    The probability that two cells of a canvas are nearer to each other than
    two cells of two canvases, ties counting a half (the area under the ROC).
  """
  num, cells = features.shape[:2]
  flat = features.reshape(num * cells, -1)
  scores = flat @ flat.T
  owner = np.repeat(np.arange(num), cells)
  upper = np.triu_indices(len(flat), k=1)
  same, scores = (owner[:, None] == owner)[upper], scores[upper]
  order = np.sort(scores[~same])
  below = np.searchsorted(order, scores[same], side="left")
  upto = np.searchsorted(order, scores[same], side="right")
  return float(np.mean(below + upto) / (2 * len(order)))


def pose_iou(found: np.ndarray, wanted: np.ndarray) -> float:
  """Returns the mean intersection over union of mattes uint8 [N, h, w]."""
  found, wanted = found > 127, wanted > 127
  both = (found & wanted).sum(axis=(1, 2))
  either = (found | wanted).sum(axis=(1, 2))
  return float(np.mean(both / np.maximum(either, 1)))


def spill(mattes: np.ndarray) -> float:
  """Returns the share of the mattes' area that lies on their cells' borders.

  Args:
    mattes: uint8 [N, h, w]; a person that reaches into the next cell leaves
      area within two pixels of the border on both sides of it.
  """
  inside = mattes > 127
  middle = inside[:, _RING:-_RING, _RING:-_RING].sum()
  return float((inside.sum() - middle) / max(inside.sum(), 1))


def luminance(images: np.ndarray) -> float:
  """Returns the mean luma (BT.601) of uint8 [..., 3], 0 to 255."""
  return float(np.mean(np.asarray(images, np.float64) @ (0.299, 0.587, 0.114)))


def evenly_lit(images: np.ndarray, light: str) -> np.ndarray:
  """Returns uint8 [..., 3] as under even light instead of a prompt's."""
  factor = lighting.EVEN.gain / canvases.studio_light(light).gain
  return np.clip(np.rint(images * factor), 0, 255).astype(np.uint8)


def cut(canvases_: np.ndarray) -> np.ndarray:
  """Cuts [N, H, W(, 3)] into [N, cells, h, w(, 3)]."""
  if canvases_.ndim == 3:
    return canvas.cut(canvases_[..., None], canvases.LAYOUT)[..., 0]
  return canvas.cut(canvases_, canvases.LAYOUT)


def _histogram(part, cells, mattes, keypoints, words) -> np.ndarray:
  """Counts the colours of the pixels that show a part of the clothes."""
  counts = np.zeros(_BINS**3)
  for cell, matte, points in zip(cells, mattes, keypoints, strict=True):
    inside = (_region(part, points, matte.shape, words) > 0) & (matte > 127)
    codes = cell[inside].astype(np.int64) * _BINS // 256
    codes = (codes * (_BINS**2, _BINS, 1)).sum(axis=-1)
    counts += np.bincount(codes, minlength=_BINS**3)
  # Neighbouring pixels say the same: they do not count as witnesses each.
  return counts / max(counts.sum(), 1.0) * _WITNESSES


def _region(part, points, shape, words) -> np.ndarray:
  """Draws where clothes lie that nothing hides: on the trunk, on the legs."""
  at = lambda name: points[poses.INDEX[name], :2].astype(np.float64)
  pixel = lambda x: tuple(np.rint(x).astype(int).tolist())
  mask = np.zeros(shape, np.uint8)
  if part == "upper":
    corners = [at(f"{side}_{name}") for name in ("shoulder", "hip")
               for side in ("right", "left")]  # fmt: skip
    hull = cv2.convexHull(np.rint(np.stack(corners)).astype(np.int32))
    cv2.fillConvexPoly(mask, hull, 255)
    neck, pelvis = np.mean(corners[:2], axis=0), np.mean(corners[2:], axis=0)
    cv2.line(mask, pixel(neck), pixel(pelvis), 255, thickness=3)
    return mask
  # In thighs from the hip on, and shanks from the knee on.
  is_short = words["lower_type"] in _SHORT
  begin, end = (0.35, 0.85) if is_short else (0.35, 1.6)
  if words["upper_type"] == "coat":
    begin, end = (0.7, 1.0) if is_short else (1.0, 1.7)
  for side in ("right", "left"):
    joints = np.stack(
      [at(f"{side}_{name}") for name in ("hip", "knee", "ankle")]
    )
    along = lambda x, joints=joints: [
      np.interp(x, (0, 1, 2), joints[:, axis]) for axis in (0, 1)
    ]
    stops = [begin, *([1.0] if begin < 1 < end else []), end]
    for one, other in itertools.pairwise(stops):
      cv2.line(mask, pixel(along(one)), pixel(along(other)), 255, thickness=3)
  return mask
