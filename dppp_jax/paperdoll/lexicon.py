"""The words of the small stage A: what the wardrobe can draw, as a vocabulary.

Stage A asks in the words of a `geneperson.vocabulary`; the paper dolls wear
what `wardrobe` has. This module is between the two: it lists the wardrobe's
words in the format of a vocabulary, and reads a person of that vocabulary back
as attributes of a doll. So the small networks are trained on the prompts that
stage A will ask them.
"""

from collections.abc import Mapping
import functools
import json
import pathlib
from typing import Any

from dppp_jax.geneperson import vocabulary as vocabularies
from dppp_jax.paperdoll import lighting as lights
from dppp_jax.paperdoll import wardrobe

PATH = pathlib.Path(__file__).parents[1] / "assets/mini/vocabulary.json"

# Shorter than the paper's template: its 115 tokens would not fit into the 77
# of the mini CLIP, these do, with all that can be drawn and nothing else.
TEMPLATE = (
  "{gender}, {activity}, front view, side view, back view, {upper}, {lower},"
  " {footwear}, {lighting}, {body}, {hair_color} {hair_length} {hair_texture}"
  " hair, {hair_style}, {skin} skin"
)
BACKGROUND = "scenery, {place}, {lighting}"

# The kinds of scenes, by the words for them.
PLACES = {
  "outdoors, street, building": "street",
  "outdoors, shop, storefront": "shop",
  "outdoors, park, tree, path": "park",
  "outdoors, field, grass, sky": "field",
  "outdoors, residential area, house": "residential",
  "indoors, room, door, shelves": "indoor",
}
# A dress is not among them: its skirt is of the upper part's words, and a
# prompt that names a lower part as well would speak of cloth that nobody sees.
_UPPER = tuple(kind for kind in wardrobe.UPPER_TYPES if kind != "dress")
_LOWER = tuple(kind for kind in wardrobe.LOWER_TYPES if kind != "dress")
_SKIRTS = ("skirt", "long skirt")
_JEANS_COLORS = ("black", "white", "grey", "blue", "navy")
_LOOSE = "loose hair"
_STYLES = {
  "woman": (_LOOSE, "ponytail", "bun"),
  "man": (_LOOSE, "ponytail", "shaved"),
}
_LENGTHS = {
  "woman": wardrobe.HAIR_LENGTHS,
  "man": wardrobe.HAIR_LENGTHS[:2],
}


def words() -> dict[str, Any]:
  """Returns the vocabulary's JSON object."""
  return {
    "about": "What the paper dolls of the embedded default may look like:"
    " written by data_tools/mini_vocabulary.py from the drawn wardrobe. The"
    " small networks know these words and no others.",
    "gender": list(wardrobe.GENDERS),
    "color": list(wardrobe.COLORS),
    "upper_type": list(_UPPER),
    "upper_pattern": list(wardrobe.UPPER_PATTERNS),
    "lower_type": {
      "woman": list(_LOWER),
      "man": [kind for kind in _LOWER if kind not in _SKIRTS],
    },
    "lower_pattern": list(wardrobe.LOWER_PATTERNS),
    "footwear_type": list(wardrobe.FOOTWEAR_TYPES),
    "footwear_pattern": ["plain"],
    "body": [f"{body} figure" for body in wardrobe.BODIES],
    "skin": list(wardrobe.SKINS),
    "hair_color": list(wardrobe.HAIR_COLORS),
    "hair_length": {key: list(value) for key, value in _LENGTHS.items()},
    "hair_texture": ["straight", "curly"],
    "hair_style": {key: list(value) for key, value in _STYLES.items()},
    "activity": ["walking", "standing"],
    "lighting": [said(light) for light in lights.LIGHTINGS],
    "place": {
      where: [place for place in PLACES if place.startswith(where)]
      for where in ("outdoors", "indoors")
    },
    "forbidden": list(vocabularies.default().raw["forbidden"]),
    "rules": _rules(),
  }


def text() -> str:
  """Returns the vocabulary file."""
  return json.dumps(words(), indent=1) + "\n"


@functools.cache
def vocabulary() -> vocabularies.Vocabulary:
  """Returns the vocabulary of the embedded default."""
  return vocabularies.Vocabulary(words(), where="the wardrobe's words")


def attributes(person: Mapping[str, str]) -> dict[str, str]:
  """Reads the words of a person of this vocabulary as a doll's attributes.

  Args:
    person: `prompts.Person.words`.

  Returns:
    A word for every key of wardrobe.VALUES.
  """
  same = ("gender", "skin", "hair_color", "hair_length", *vocabularies.OUTFIT)
  is_loose = person["hair_style"] == _LOOSE
  return {
    **{key: person[key] for key in same},
    "body": person["body"].removesuffix(" figure"),
    "hair_style": person["hair_texture" if is_loose else "hair_style"],
    # Stage A's template has no place for these.
    **dict.fromkeys(("hat", "hat_color", "bag", "bag_color"), "none"),
  }


def light(phrase: str) -> lights.Lighting:
  """Returns the light of the vocabulary's words.

  Raises:
    KeyError: no light has these words.
  """
  return {said(light): light for light in lights.LIGHTINGS}[phrase]


def said(light: lights.Lighting) -> str:
  """A light in the words of a vocabulary, which says "indoors"."""
  return light.words.replace("indoor,", "indoors,")


def _rules() -> list[dict[str, Any]]:
  bare = ["shorts", "skirt"]
  return [
    {
      "why": "coats are plain or plaid",
      "when": {"upper_type": ["coat"]},
      "only": {"upper_pattern": ["plain", "plaid"]},
    },
    {
      "why": "prints are on jersey and wool",
      "when": {"upper_pattern": ["printed"]},
      "only": {"upper_type": ["t-shirt", "sweater", "hoodie"]},
    },
    {
      "why": "only jeans are distressed, and they have no other pattern",
      "when": {"lower_type": ["jeans"]},
      "only": {"lower_pattern": ["plain", "distressed"]},
    },
    {
      "why": "only jeans are distressed",
      "when": {"lower_pattern": ["distressed"]},
      "only": {"lower_type": ["jeans"]},
    },
    {
      "why": "jeans are of denim's colours",
      "when": {"lower_type": ["jeans"]},
      "only": {"lower_color": list(_JEANS_COLORS)},
    },
    {
      "why": "skirts have no pinstripes",
      "when": {"lower_type": list(_SKIRTS)},
      "only": {"lower_pattern": ["plain", "striped", "plaid", "dotted"]},
    },
    {
      "why": "trousers and shorts are plain, pinstriped or plaid",
      "when": {"lower_type": ["trousers", "shorts"]},
      "only": {"lower_pattern": ["plain", "pinstriped", "plaid"]},
    },
    {
      "why": "sandals go with bare legs",
      "when": {"footwear_type": ["sandals"]},
      "only": {"lower_type": bare},
    },
    {
      "why": "tied and shaved hair shows no curls",
      "when": {"hair_style": ["ponytail", "bun", "shaved"]},
      "only": {"hair_texture": ["straight"]},
    },
    {
      "why": "short hair cannot be tied",
      "when": {"hair_length": ["short"]},
      "not": {"hair_style": ["ponytail", "bun"]},
    },
    {
      "why": "shaved hair is short",
      "when": {"hair_style": ["shaved"]},
      "only": {"hair_length": ["short"]},
    },
  ]
