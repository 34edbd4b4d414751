"""What a paper doll may wear and be, the words for it, and who wears what.

The attributes of a person are a pure function of (seed, domain, pid): the same
in every cell, and unchanged when more people are asked for.
"""

from collections.abc import Mapping
import dataclasses

import numpy as np

Color = tuple[float, float, float]

COLORS: dict[str, Color] = {
  "black": (34, 33, 36),
  "white": (238, 238, 236),
  "grey": (134, 135, 138),
  "red": (204, 32, 36),
  "orange": (242, 126, 22),
  "yellow": (242, 208, 42),
  "green": (38, 142, 62),
  "blue": (52, 118, 218),
  "navy": (26, 36, 98),
  "purple": (122, 52, 158),
  "pink": (242, 138, 184),
  "brown": (112, 66, 34),
  "beige": (216, 190, 148),
}
SKINS: dict[str, Color] = {
  "pale": (246, 214, 192),
  "fair": (236, 194, 162),
  "warm beige": (222, 172, 132),
  "tan": (192, 138, 98),
  "brown": (138, 92, 62),
  "dark": (88, 56, 40),
}
HAIR_COLORS: dict[str, Color] = {
  "black": (28, 24, 24),
  "brown": (92, 58, 34),
  "blonde": (222, 184, 98),
  "ginger": (178, 84, 34),
  "grey": (166, 166, 168),
}

GENDERS = ("woman", "man")
BODIES = ("slim", "average", "heavy")
HAIR_LENGTHS = ("short", "shoulder-length", "waist-length")
HAIR_STYLES = ("straight", "curly", "ponytail", "bun", "shaved")
PATTERNS = (
    "plain", "striped", "pinstriped", "plaid", "dotted", "printed",
    "distressed",
)  # fmt: skip
UPPER_PATTERNS = PATTERNS[:6]
LOWER_PATTERNS = ("plain", "striped", "pinstriped", "plaid", "dotted",
                  "distressed")  # fmt: skip
UPPER_TYPES = (
    "t-shirt", "shirt", "sweater", "hoodie", "jacket", "coat", "dress",
)  # fmt: skip
LOWER_TYPES = ("trousers", "jeans", "shorts", "skirt", "long skirt", "dress")
FOOTWEAR_TYPES = ("sneakers", "loafers", "boots", "sandals")
HATS = ("none", "cap", "beanie", "sun hat")
BAGS = ("none", "backpack", "shoulder bag", "handbag")
LIGHT_COLORS = ("white", "yellow", "pink", "beige", "orange", "grey")

# Which values an attribute may take: the classes of a zero-shot test.
VALUES: dict[str, tuple[str, ...]] = {
  "gender": GENDERS,
  "body": BODIES,
  "skin": tuple(SKINS),
  "hair_color": tuple(HAIR_COLORS),
  "hair_length": HAIR_LENGTHS,
  "hair_style": HAIR_STYLES,
  "upper_type": UPPER_TYPES,
  "upper_color": tuple(COLORS),
  "upper_pattern": UPPER_PATTERNS,
  "lower_type": LOWER_TYPES,
  "lower_color": tuple(COLORS),
  "lower_pattern": LOWER_PATTERNS,
  "footwear_type": FOOTWEAR_TYPES,
  "footwear_color": tuple(COLORS),
  "footwear_pattern": ("plain",),
  "hat": HATS,
  "hat_color": ("none", *COLORS),
  "bag": BAGS,
  "bag_color": ("none", *COLORS),
}

_TYPES = {
  "upper": UPPER_TYPES,
  "lower": LOWER_TYPES,
  "footwear": FOOTWEAR_TYPES,
}
_PLURAL = ("trousers", "jeans", "shorts", *FOOTWEAR_TYPES)

# How often streets show each colour: dark and neutral clothes are common, so
# that many people share them and a colour histogram does not tell them apart.
_STREET = {
    "black": 6.0, "white": 4.0, "grey": 4.0, "blue": 3.0, "navy": 3.0,
    "red": 1.6, "green": 1.2, "brown": 1.2, "beige": 1.2, "pink": 1.0,
    "yellow": 0.7, "purple": 0.6, "orange": 0.5,
}  # fmt: skip
_JEANS = ("blue", "navy", "black", "grey", "white")


@dataclasses.dataclass(frozen=True)
class Person:
  """One invented person.

  Attributes:
    attributes: a word for every key of VALUES.
    colors: exact RGB by part: skin, hair, upper, upper_second, lower,
      lower_second, footwear, hat, bag, inner (the shirt under a jacket).
    height: factor on the size in the picture, about 1.
    girth: factor on the width of trunk and limbs.
    shoulder: half the distance between the shoulders, body heights.
    hip: half the distance between the hip joints, body heights.
    starts: where the patterns of upper and lower begin, in periods.
    side: +1 where the bag hangs at the left, -1 at the right.
    details: float [8] in 0..1, free numbers for small details of the cut.
  """

  attributes: dict[str, str]
  colors: dict[str, Color]
  height: float
  girth: float
  shoulder: float
  hip: float
  starts: tuple[float, float]
  side: int
  details: tuple[float, ...]


def person(entropy: tuple[int, ...], *, palette: str = "even") -> Person:
  """Draws a person by lot.

  Args:
    entropy: non-negative integers, e.g. (seed, domain, pid).
    palette: "even" takes every colour equally often, "street" as streets do.
  """
  rng = np.random.default_rng(np.random.SeedSequence(entropy))
  return dressed(_attributes(rng, palette), rng)


def dressed(attributes: dict[str, str], rng: np.random.Generator) -> Person:
  """Returns somebody who wears and is what the words say.

  Args:
    attributes: a word for every key of VALUES.
    rng: of all that words leave open: shades, sizes, cuts.
  """
  woman = attributes["gender"] == "woman"
  girth = {"slim": 0.86, "average": 1.0, "heavy": 1.24}[attributes["body"]]
  colors = {
    "skin": _jitter(SKINS[attributes["skin"]], rng, 5.0),
    "hair": _jitter(HAIR_COLORS[attributes["hair_color"]], rng, 6.0),
  }
  for part in ("upper", "lower", "footwear", "hat", "bag"):
    name = attributes[f"{part}_color"]
    base = COLORS["grey"] if name == "none" else COLORS[name]
    colors[part] = _jitter(base, rng, 8.0)
    pattern = attributes.get(f"{part}_pattern", "plain")
    colors[f"{part}_second"] = _second(name, pattern, rng)
  if attributes["upper_type"] == "dress":
    colors["lower"] = colors["upper"]
    colors["lower_second"] = colors["upper_second"]
  inner = "white" if attributes["upper_color"] != "white" else "grey"
  colors["inner"] = _jitter(COLORS[inner], rng, 8.0)
  return Person(
    attributes=attributes,
    colors=colors,
    height=float(rng.uniform(0.92, 1.0) * (0.965 if woman else 1.0)),
    girth=float(girth * rng.uniform(0.96, 1.04)),
    shoulder=0.094 if woman else 0.110,
    hip=0.050 if woman else 0.046,
    starts=(float(rng.random()), float(rng.random())),
    side=int(rng.choice([-1, 1])),
    details=tuple(rng.random(8).tolist()),
  )


def phrases(attribute: str, value: str) -> tuple[str, ...]:
  """Returns the sentences for one value of one attribute.

  These are the class prompts of zero-shot classification, to be averaged; their
  words are those of `sentence`. A colour or pattern is named with every type of
  garment that can have it.

  Args:
    attribute: a key of VALUES.
    value: one of its values.
  """
  part, _, what = attribute.partition("_")
  if part in _TYPES and what == "type":
    return (worn(part, [], value),)
  if part in _TYPES:
    return tuple(worn(part, [value], kind) for kind in _TYPES[part])
  templates = {
    "gender": "a {}",
    "body": "a person with a {} figure",
    "skin": "a person with {} skin",
    "hair_color": "a person with {} hair",
    "hair_length": "a person with {} hair",
    "hair_style": "a person with {} hair",
    "hat": "a person with a {}",
    "bag": "a person with a {}",
  }
  if value == "none":
    return (f"a person without a {part}",)
  if attribute in ("hat_color", "bag_color"):
    things = HATS[1:] if part == "hat" else BAGS[1:]
    return tuple(f"a person with {_noun([value], thing)}" for thing in things)
  return (templates[attribute].format(value),)


def worn(part: str, adjectives: list[str], kind: str) -> str:
  """Returns e.g. "a person in a red striped shirt".

  Args:
    part: "upper", "lower" or "footwear".
    adjectives: colour and pattern, either may be left out.
    kind: a type of the part.
  """
  return f"a person in {_noun(adjectives, kind)}"


def sentence(
  attributes: Mapping[str, str],
  rng: np.random.Generator,
  *,
  view: str,
  lighting: str,
) -> str:
  """Returns a short sentence that names some of the attributes.

  Beside the long prompts of `caption` these teach a text tower the words of
  `phrases` one by one.

  Args:
    attributes: of the person.
    rng: which attributes are named.
    view: "front", "side" or "back".
    lighting: e.g. "day, sunshine".
  """
  a = attributes
  clothes = []
  for part, share in (("upper", 0.75), ("lower", 0.7), ("footwear", 0.35)):
    if rng.random() > share:
      continue
    if part == "lower" and a["lower_type"] == "dress" and clothes:
      continue
    words = [a[f"{part}_color"]] if rng.random() < 0.85 else []
    if part != "footwear" and rng.random() < 0.6:
      words.append(a[f"{part}_pattern"])
    clothes.append(_noun(words, a[f"{part}_type"]))
  who = a["gender"] if rng.random() < 0.4 else "person"
  text = f"a {who}" + (f" in {' and '.join(clothes)}" if clothes else "")
  traits = []
  if rng.random() < 0.35:
    key = str(rng.choice(["hair_color", "hair_length", "hair_style"]))
    traits.append(f"{a[key]} hair")
  if rng.random() < 0.15:
    traits.append(f"{a['skin']} skin")
  if rng.random() < 0.15:
    traits.append(f"a {a['body']} figure")
  for thing in ("hat", "bag"):
    if rng.random() < 0.4:
      if a[thing] == "none":
        continue
      traits.append(_noun([a[f"{thing}_color"]], a[thing]))
  if traits:
    text += f" with {' and '.join(traits)}"
  for thing in ("hat", "bag"):
    if a[thing] == "none" and rng.random() < 0.1:
      text += f" without a {thing}"
  if rng.random() < 0.4:
    text += f", {view} view"
  if rng.random() < 0.25:
    text += f", {lighting}"
  return text


def caption(
  attributes: Mapping[str, str],
  *,
  activity: str,
  view: str,
  lighting: str,
) -> str:
  """Returns the prompt of a picture after DPPP's template (section III.B).

  The view stands early, so that a short text window keeps it.

  Args:
    attributes: of the person.
    activity: "walking" or "standing".
    view: "front", "side" or "back".
    lighting: e.g. "day, sunshine".
  """
  a = attributes
  upper = f"{a['upper_color']} {a['upper_pattern']} {a['upper_type']}"
  parts = [a["gender"], activity, f"{view} view", upper]
  if a["lower_type"] != "dress":
    parts.append(f"{a['lower_color']} {a['lower_pattern']} {a['lower_type']}")
  parts.append(f"{a['footwear_color']} {a['footwear_type']}")
  parts.append(lighting)
  parts.append(f"{a['body']} figure")
  if a["hair_style"] == "shaved":
    parts.append(f"{a['hair_color']} shaved hair")
  else:
    parts.append(f"{a['hair_color']} {a['hair_length']} {a['hair_style']} hair")
  parts.append(f"{a['skin']} skin")
  for thing in ("hat", "bag"):
    if a[thing] != "none":
      parts.append(f"{a[f'{thing}_color']} {a[thing]}")
  return ", ".join(parts)


def _noun(adjectives: list[str], kind: str) -> str:
  words = " ".join([*adjectives, kind])
  if kind in _PLURAL:
    return words
  return f"an {words}" if words.startswith("orange") else f"a {words}"


def _attributes(rng: np.random.Generator, palette: str) -> dict[str, str]:
  weights = _STREET if palette == "street" else dict.fromkeys(COLORS, 1.0)

  def color(names=tuple(COLORS)):
    shares = np.array([weights[n] for n in names])
    return str(rng.choice(names, p=shares / shares.sum()))

  def one(**shares):
    names = [n.replace("_", " ") for n in shares]
    chances = np.array(list(shares.values()))
    return str(rng.choice(names, p=chances / chances.sum()))

  woman = rng.random() < 0.5
  a = {"gender": "woman" if woman else "man"}
  a["body"] = one(slim=3, average=4, heavy=2)
  a["skin"] = str(rng.choice(list(SKINS)))
  a["hair_color"] = one(black=4, brown=4, blonde=2, ginger=1, grey=1.5)
  if woman:
    a["hair_length"] = str(rng.choice(HAIR_LENGTHS, p=[0.2, 0.4, 0.4]))
    styles = ("straight", "curly", "ponytail", "bun")
    a["hair_style"] = str(
      rng.choice(styles if a["hair_length"] != "short" else styles[:2])
    )
  else:
    a["hair_length"] = str(rng.choice(HAIR_LENGTHS[:2], p=[0.88, 0.12]))
    if a["hair_length"] == "short":
      a["hair_style"] = one(straight=6, curly=2, shaved=2)
    else:
      a["hair_style"] = one(straight=2, curly=1, ponytail=1)
  upper = dict.fromkeys(UPPER_TYPES[:6], 1.0)
  if woman:
    upper["dress"] = 1.4
  a["upper_type"] = str(
    rng.choice(
      list(upper), p=np.array(list(upper.values())) / sum(upper.values())
    )
  )
  a["upper_color"] = color()
  long_coat = a["upper_type"] == "coat"
  a["upper_pattern"] = (
    one(plain=4, plaid=2)
    if long_coat
    else one(plain=3, striped=2, pinstriped=1, plaid=2, dotted=2)
    if a["upper_type"] in ("dress", "shirt", "jacket")
    else one(plain=3, striped=2, pinstriped=1, plaid=1, dotted=1, printed=2)
  )
  if a["upper_type"] == "dress":
    lower = "dress"
    a["lower_type"], a["lower_color"] = lower, a["upper_color"]
    a["lower_pattern"] = a["upper_pattern"]
  else:
    a["lower_type"] = (
      one(trousers=3, jeans=3, shorts=1, skirt=2, long_skirt=1.3)
      if woman
      else one(trousers=4, jeans=4, shorts=2)
    )
    lower = a["lower_type"]
    a["lower_color"] = color(_JEANS) if lower == "jeans" else color()
    a["lower_pattern"] = (
      one(plain=3, distressed=1)
      if lower == "jeans"
      else one(plain=3, striped=1, plaid=1, dotted=1)
      if lower in ("skirt", "long skirt")
      else one(plain=5, pinstriped=1, plaid=1)
    )
  bare = lower in ("shorts", "skirt", "dress")
  a["footwear_type"] = (
    one(sneakers=3, loafers=2, boots=2, sandals=1.5)
    if bare
    else one(sneakers=4, loafers=3, boots=2)
  )
  a["footwear_color"] = color()
  a["footwear_pattern"] = "plain"
  hooded = a["hair_style"] in ("bun", "ponytail")
  a["hat"] = (
    "none"
    if hooded
    else one(none=7, cap=1.5, beanie=1, sun_hat=1 if woman else 0.2)
  )
  a["hat_color"] = color() if a["hat"] != "none" else "none"
  a["bag"] = one(
    none=4, backpack=2, shoulder_bag=1.5, handbag=1.5 if woman else 0.3
  )
  a["bag_color"] = color() if a["bag"] != "none" else "none"
  return a


def _jitter(base: Color, rng: np.random.Generator, amount: float) -> Color:
  # Mostly brighter or darker, a little of another hue: the name stays right.
  shift = amount * rng.uniform(-1, 1) + 0.5 * amount * rng.uniform(-1, 1, 3)
  return tuple(np.clip(np.asarray(base) + shift, 0, 255).tolist())


def _second(name: str, pattern: str, rng: np.random.Generator) -> Color:
  pick = rng.random()
  if pattern == "distressed":
    base = (206, 210, 214) if name != "white" else COLORS["grey"]
  elif pattern == "plaid":
    # White lines would turn a red plaid pink: darker lines keep its name.
    dark = name in ("black", "navy", "brown")
    base = (
      (140, 140, 136)
      if dark
      else tuple(0.38 * c for c in COLORS.get(name, COLORS["grey"]))
    )
  elif name in LIGHT_COLORS:
    base = COLORS["black" if pick < 0.5 else "navy"]
  else:
    base = COLORS["white"] if pick < 0.65 else (205, 205, 196)
  return _jitter(base, rng, 6.0)
