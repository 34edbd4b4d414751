"""Who the people are, and the prompts that draw them.

Person `pid` is a pure function of (vocabulary, seed, pid), and no two people
wear the same (upper, lower, footwear) x (type, colour, pattern): all outfits
are numbered, a keyed permutation shuffles the numbers, and every pid owns a
block of them, of which it takes the first that no rule objects to. So nobody
needs to know the others, and asking for more people changes none of them.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import math
import string

import numpy as np

from dppp_jax import errors
from dppp_jax.geneperson import vocabulary as vocabularies

# The paper's template with the tags of the views moved to the front: where a
# text encoder ends after 77 tokens, the canvas must not lose them.
TEMPLATE = (
  "{gender}, {activity}, multiple views of the same character, multiple views,"
  " front view, side view, back view, simple background, {upper}, {lower},"
  " {footwear}, {lighting}, {body}, {hair_color} hair color, {hair_length}"
  " hair, {hair_texture} hair texture, {hair_style}, {skin} skin"
)
BACKGROUND = "scenery, {place}, {lighting}, realistic, photo background"
NEGATIVE = (
  "text, watermark, deformed, extra limbs, cropped, close-up, blurry, lowres"
)
NEGATIVE_BACKGROUND = "person, people, crowd, text, watermark, blurry, lowres"

_BLOCK = 1024  # Outfits that a pid may choose from.
_ROUNDS = 6
_PARTS = ("upper", "lower", "footwear")


@dataclasses.dataclass(frozen=True)
class Person:
  """One invented person.

  Attributes:
    pid: its number.
    words: a word for "gender" and every key of vocabulary.OUTFIT and EXTRAS.
  """

  pid: int
  words: Mapping[str, str]

  @property
  def lighting(self) -> str:
    """The light of the prompt, which backgrounds must match."""
    return self.words["lighting"]

  @property
  def attributes(self) -> dict[str, str]:
    """The words as the dataset stores them."""
    texture, style = self.words["hair_texture"], self.words["hair_style"]
    kept = ("gender", *vocabularies.OUTFIT, "body", "skin")
    return {
      **{key: self.words[key] for key in kept},
      "hair_color": self.words["hair_color"],
      "hair_length": self.words["hair_length"],
      "hair_style": f"{texture}, {style}",
    }

  def prompt(self, template: str = TEMPLATE) -> str:
    """Returns the prompt.

    Args:
      template: with placeholders for words, and {upper}, {lower}, {footwear}.

    Raises:
      errors.UserError: a placeholder that there is no word for.
    """
    values = dict(self.words)
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
    capacity: how many there are.
  """

  def __init__(
    self, seed: int, *, vocabulary: vocabularies.Vocabulary | None = None
  ):
    self.vocabulary = vocabulary or vocabularies.default()
    self.seed = seed
    self._radices = [self.vocabulary.values(key) for key in vocabularies.OUTFIT]
    self._outfits = math.prod(len(words) for words in self._radices)
    self._half = (max(self._outfits - 1, 3).bit_length() + 1) // 2
    self.capacity = self._outfits // _BLOCK

  def __getitem__(self, pid: int) -> Person:
    """Returns a person.

    Raises:
      errors.UserError: the vocabulary has no outfits left.
    """
    if not 0 <= pid < self.capacity:
      raise errors.UserError(
        f"pid {pid}: this vocabulary dresses {self.capacity} people: extend it"
        " by data_tools/expand_vocabulary.py"
      )
    rng = np.random.default_rng(np.random.SeedSequence((self.seed, 7, pid)))
    pick = lambda words: words[int(rng.integers(len(words)))]
    gender = pick(self.vocabulary.genders)
    allowed = {
      f"{part}_type": set(self.vocabulary.values(f"{part}_type", gender))
      for part in _PARTS
    }
    extras = {
      key: self.vocabulary.values(key, gender) for key in vocabularies.EXTRAS
    }
    for i in range(pid * _BLOCK, (pid + 1) * _BLOCK):
      outfit = self._outfit(self._permute(i))
      if any(outfit[key] not in words for key, words in allowed.items()):
        continue
      if self.vocabulary.objection(outfit) is not None:
        continue
      for _ in range(100):
        words = {"gender": gender, **outfit}
        words |= {key: pick(values) for key, values in extras.items()}
        if self.vocabulary.objection(words) is None:
          return Person(pid, words)
    raise errors.UserError(
      f"pid {pid}: the rules object to every combination tried: they leave too"
      " little of the vocabulary"
    )

  def _outfit(self, number: int) -> dict[str, str]:
    """Returns the outfit of a number, digit by digit."""
    words = {}
    for key, values in zip(vocabularies.OUTFIT, self._radices, strict=True):
      number, digit = divmod(number, len(values))
      words[key] = values[digit]
    return words

  def _permute(self, number: int) -> int:
    """A keyed bijection of 0 .. outfits - 1 (Feistel network, cycle walked)."""
    mask = (1 << self._half) - 1
    while True:
      left, right = number >> self._half, number & mask
      for i in range(_ROUNDS):
        key = f"{self.seed}/{i}/{right}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
      number = left << self._half | right
      if number < self._outfits:
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
  return template.format(**values)
