"""Who the people are, and the prompts that draw them.

Person `pid` is a pure function of (vocabulary, seed, pid), and no two people
wear the same (upper, lower, footwear) x (type, colour, pattern). The plausible
triples of types have weights that give every type its even share
(`outfits.balance`). Places are numbered: a triple has as many of them as its
weight says, each with other colours. A keyed permutation deals the places to
the pids. So nobody needs to know the others, and asking for more people changes
none of them.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import string

import numpy as np

from dppp_jax import errors
from dppp_jax.geneperson import outfits
from dppp_jax.geneperson import vocabulary as vocabularies

# The paper's template with the tags of the views moved to the front: where a
# text encoder ends after 77 tokens, the canvas must not lose them. The hair is
# said in fewer words than the paper's ("{} hair color, {} hair, {} hair
# texture"), so that all prompts of the shipped words fit.
TEMPLATE = (
  "{gender}, {activity}, multiple views of the same character, multiple views,"
  " front view, side view, back view, simple background, {upper}, {lower},"
  " {footwear}, {lighting}, {body}, {build} build body, {hair_color}"
  " {hair_length} {hair_texture} hair, {hair_style}, {skin} skin"
)
BACKGROUND = "scenery, {place}, {lighting}, realistic, photo background"
NEGATIVE = (
  "text, watermark, deformed, extra limbs, cropped, close-up, blurry, lowres"
)
NEGATIVE_BACKGROUND = "person, people, crowd, text, watermark, blurry, lowres"

_ROUNDS = 6
_TRIES = 100
_NONE = vocabularies.NONE
# Attributes that are chosen together, so that no rule among them objects.
_ASKED = (
  ("gender", *vocabularies.OUTFIT),
  ("gender", *outfits.HAIR),
)
_PARTS = ("upper", "lower", "footwear")


@dataclasses.dataclass(frozen=True)
class Person:
  """One invented person.

  Attributes:
    pid: its number.
    words: a word for "gender", every key of vocabulary.OUTFIT and what else the
      vocabulary lists; "none" for what the person has not, as hair.
  """

  pid: int
  words: Mapping[str, str]

  @property
  def lighting(self) -> str:
    """The light of the prompt, which backgrounds must match."""
    return self.words["lighting"]

  @property
  def attributes(self) -> dict[str, str]:
    """The words as the dataset stores them, "none" for hair of the bald."""
    hair = (self.words["hair_texture"], self.words["hair_style"])
    kept = ("gender", *vocabularies.OUTFIT, "body", "skin")
    return {
      **{key: self.words[key] for key in kept},
      "hair_color": self.words["hair_color"],
      "hair_length": self.words["hair_length"],
      "hair_style": ", ".join(word for word in hair if word != _NONE),
    }

  def prompt(self, template: str = TEMPLATE) -> str:
    """Returns the prompt.

    Args:
      template: with placeholders for words, and {upper}, {lower}, {footwear}.
        What the person has not is left out, and with it the part between two
        commas that speaks of nothing else.

    Raises:
      errors.UserError: a placeholder that there is no word for, or no
        placeholder: all people would have the same prompt.
    """
    if "{" not in template:
      raise errors.UserError(
        f"template {template!r}: has no placeholder, and would be the prompt of"
        " everybody: write {gender} or another attribute into it"
      )
    values = {"build": _NONE, **self.words}
    for part in _PARTS:
      color, pattern, kind = (
        self.words[f"{part}_{what}"] for what in ("color", "pattern", "type")
      )
      middle = "" if pattern == "plain" else f" {pattern}"
      values[part] = f"{color}{middle} {kind}"
    return _fill(template, values)


class People:
  """All people of a vocabulary and a seed.

  Attributes:
    vocabulary: the words.
    seed: of the people.
  """

  def __init__(
    self, seed: int, *, vocabulary: vocabularies.Vocabulary | None = None
  ):
    self.vocabulary = vocabulary or vocabularies.default()
    self.seed = seed

  @property
  def capacity(self) -> int:
    """How many people there are."""
    return outfits.wardrobe(self.vocabulary).num_places

  def __getitem__(self, pid: int) -> Person:
    """Returns a person.

    Raises:
      errors.UserError: the vocabulary has no outfits left.
    """
    wardrobe = outfits.wardrobe(self.vocabulary)
    if not 0 <= pid < wardrobe.num_places:
      raise errors.UserError(
        f"pid {pid}: this vocabulary dresses {wardrobe.num_places} people:"
        " extend it by data_tools/expand_vocabulary.py"
      )
    rng = np.random.default_rng(np.random.SeedSequence((self.seed, 7, pid)))
    known = self.vocabulary
    place = wardrobe.place(self._permute(pid, wardrobe.num_places))
    number = self._permute(
      place.number, place.count, "/".join(place.types.values())
    )
    outfit = {"gender": place.gender, **place.types}
    outfit |= wardrobe.colors(place.types, number)
    hair = outfits.balanced(known, outfits.HAIR, place.gender)
    others = [key for key in known.keys if key not in outfits.HAIR]
    for _ in range(_TRIES):
      patterns = outfits.choose(known, outfits.PATTERNS, outfit, rng)
      if patterns is None:
        break
      words = outfit | patterns | hair.pick(rng.random())
      for key in others:
        values = known.values(key, place.gender)
        words[key] = values[int(rng.integers(len(values)))]
      if known.objection(words, asked=_ASKED) is None:
        order = ("gender", *vocabularies.OUTFIT, *known.keys)
        return Person(pid, known.bare({key: words[key] for key in order}))
    raise errors.UserError(
      f"pid {pid}: the rules object to every combination tried: they leave too"
      " little of the vocabulary"
    )

  def _permute(self, number: int, count: int, key: str = "") -> int:
    """A keyed bijection of 0 .. count - 1 (Feistel network, cycle walked)."""
    half = (max(count - 1, 3).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
      left, right = number >> half, number & mask
      for i in range(_ROUNDS):
        text = f"{self.seed}/{key}/{i}/{right}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
      number = left << half | right
      if number < count:
        return number


def background(place: str, lighting: str, template: str = BACKGROUND) -> str:
  """Returns the prompt of a background.

  Args:
    place: of the vocabulary's "place".
    lighting: the words that the people on it have in their prompts.
    template: with {place} and {lighting}.
  """
  return _fill(template, {"place": place, "lighting": lighting})


def places(
  lighting: str, vocabulary: vocabularies.Vocabulary | None = None
) -> tuple[str, ...]:
  """Returns the places that there are under a light: rooms, or the open."""
  raw = (vocabulary or vocabularies.default()).raw["place"]
  inside = "indoors" in lighting
  return tuple(raw["indoors" if inside else "outdoors"])


def _fill(template: str, values: Mapping[str, str]) -> str:
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise errors.UserError(f"template {template!r}: {error}") from error
  for _, name, form, conversion in parts:
    if name is not None and name not in values:
      raise errors.UserError(
        f"template: {{{name}}} is no attribute: use {', '.join(values)}"
      )
    if form or conversion:
      raise errors.UserError(
        f"template: {{{name}}} takes no format: leave out what is behind it in"
        " the braces"
      )
  parts = []
  for part in template.split(","):
    names = {name for _, name, _, _ in string.Formatter().parse(part)} - {None}
    absent = {name for name in names if values[name] == _NONE}
    text = part.format(**values | dict.fromkeys(absent, ""))
    if absent:
      text = part[: len(part) - len(part.lstrip())] + " ".join(text.split())
    if not absent or absent < names:
      parts.append(text)
  return ",".join(parts).lstrip() if parts else ""
