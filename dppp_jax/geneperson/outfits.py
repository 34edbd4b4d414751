"""Which garments go together, and how often: even shares, whatever rules say.

A rule that forbids much of what goes with a dress must not make dresses rare.
So types are not drawn until no rule objects: the plausible triples of upper,
lower and footwear are listed, and weighted such that every type has the same
share of its list, by iterative proportional fitting (Deming and Stephan 1940).
"""

from collections.abc import Mapping, Sequence
import functools
from typing import NamedTuple

import numpy as np

from dppp_jax import errors
from dppp_jax.geneperson import vocabulary as vocabularies

TYPES = ("upper_type", "lower_type", "footwear_type")
COLORS = ("upper_color", "lower_color", "footwear_color")
PATTERNS = ("upper_pattern", "lower_pattern", "footwear_pattern")
HAIR = ("hair_length", "hair_texture", "hair_style")
_ROUNDS = 300  # Of the fitting.


class Place(NamedTuple):
  """What a person is given by its number.

  Attributes:
    gender: of the person.
    types: {attribute: word} of upper, lower and footwear.
    number: of the colours, among `count`; no other place of these types has it.
    count: of plausible colours for these types.
  """

  gender: str
  types: Mapping[str, str]
  number: int
  count: int


class Combinations(NamedTuple):
  """Plausible combinations of some attributes, and how often each is met.

  Attributes:
    words: {attribute: word} of each.
    weights: float64 [N], they sum to 1.
  """

  words: tuple[Mapping[str, str], ...]
  weights: np.ndarray

  def pick(self, at: float) -> Mapping[str, str]:
    """Returns the combination at a number in [0, 1)."""
    place = np.searchsorted(np.cumsum(self.weights), at, side="right")
    return self.words[min(int(place), len(self.words) - 1)]


class Wardrobe:
  """All outfits of a vocabulary, as numbered places.

  Attributes:
    num_places: how many people can be dressed.
  """

  def __init__(self, vocabulary: vocabularies.Vocabulary):
    self._vocabulary = vocabulary
    genders = vocabulary.genders
    tables = [balanced(vocabulary, TYPES, gender) for gender in genders]
    # Women and men who wear the same types share the colours between them.
    colors = [
      np.array([self._count(words) for words in table.words])
      for table in tables
    ]
    rooms = [count // len(genders) for count in colors]
    most = min(
      (room / table.weights).min()
      for room, table in zip(rooms, tables, strict=True)
    )
    counts = [
      np.minimum(np.floor(table.weights * most).astype(int), room)
      for room, table in zip(rooms, tables, strict=True)
    ]
    self._entries = [
      (gender, words, int(count))
      for gender, table, some in zip(genders, tables, colors, strict=True)
      for words, count in zip(table.words, some, strict=True)
    ]
    self._ends = np.cumsum(np.concatenate(counts))
    self.num_places = int(self._ends[-1])

  def place(self, number: int) -> Place:
    """Returns a place by its number."""
    at = int(np.searchsorted(self._ends, number, side="right"))
    begin = int(self._ends[at - 1]) if at else 0
    gender, types, count = self._entries[at]
    genders = self._vocabulary.genders
    within = (number - begin) * len(genders) + genders.index(gender)
    return Place(gender, types, within, count)

  def colors(self, types: Mapping[str, str], number: int) -> dict[str, str]:
    """Returns the number-th of the colours that go with these types."""
    mask = self._vocabulary.plausible(COLORS, types)
    return _nth(self._vocabulary, COLORS, mask, number)

  def _count(self, types: Mapping[str, str]) -> int:
    return int(np.count_nonzero(self._vocabulary.plausible(COLORS, types)))


@functools.lru_cache(maxsize=8)
def wardrobe(vocabulary: vocabularies.Vocabulary) -> Wardrobe:
  """Returns the outfits of a vocabulary, worked out once.

  Raises:
    errors.UserError: a type that the rules leave nothing to be worn with.
  """
  return Wardrobe(vocabulary)


@functools.lru_cache(maxsize=32)
def balanced(
  vocabulary: vocabularies.Vocabulary, keys: tuple[str, ...], gender: str
) -> Combinations:
  """Returns what no rule objects to, each word with its even share.

  Raises:
    errors.UserError: a word that is in no plausible combination.
  """
  for key, word in unworn(vocabulary, keys, gender):
    others = " and ".join(other for other in keys if other != key)
    raise errors.UserError(
      f"{key} {word!r} ({gender}): the rules object to every combination with"
      f" a word of {others}: change them, or take it off the list"
    )
  mask = vocabulary.plausible(keys, {"gender": gender}, gender=gender)
  weights = balance(mask)[mask]
  lists = [vocabulary.values(key, gender) for key in keys]
  words = [
    {key: some[i] for key, some, i in zip(keys, lists, at, strict=True)}
    for at in np.argwhere(mask).tolist()
  ]
  return Combinations(tuple(words), weights / weights.sum())


def unworn(
  vocabulary: vocabularies.Vocabulary, keys: Sequence[str], gender: str
) -> list[tuple[str, str]]:
  """Returns (attribute, word) of those that are in no plausible combination."""
  mask = vocabulary.plausible(keys, {"gender": gender}, gender=gender)
  found = []
  for axis, key in enumerate(keys):
    others = tuple(i for i in range(mask.ndim) if i != axis)
    words = vocabulary.values(key, gender)
    found += [(key, words[i]) for i in np.flatnonzero(~mask.any(others))]
  return found


def shares(
  vocabulary: vocabularies.Vocabulary, gender: str
) -> dict[str, dict[str, float]]:
  """Returns {attribute: {word: its share over an even one}} of the types."""
  table = balanced(vocabulary, TYPES, gender)
  found = {
    key: dict.fromkeys(vocabulary.values(key, gender), 0.0) for key in TYPES
  }
  for words, weight in zip(table.words, table.weights, strict=True):
    for key, word in words.items():
      found[key][word] += float(weight) * len(found[key])
  return found


def balance(mask: np.ndarray) -> np.ndarray:
  """Returns weights of what is allowed, with even sums along every axis.

  Where rules leave no such weights, the sums are as near to even as they let.

  Args:
    mask: bool [n, m, ...]; no slice along an axis may be all False.

  Returns:
    float64 of the same shape, 0 where the mask is False; all sum to 1.
  """
  weights = mask / mask.sum()
  for _ in range(_ROUNDS):
    factors = np.ones(mask.shape)
    for axis, size in enumerate(mask.shape):
      others = tuple(i for i in range(mask.ndim) if i != axis)
      sums = weights.sum(others, keepdims=True)
      factors = factors * (1 / size / sums)
    # All axes at once, so that contradictory ones meet half-way.
    weights = weights * factors ** (1 / mask.ndim)
    weights /= weights.sum()
  return weights


def choose(
  vocabulary: vocabularies.Vocabulary,
  keys: Sequence[str],
  known: Mapping[str, str],
  rng: np.random.Generator,
) -> dict[str, str] | None:
  """Draws words that go with known ones; None where no rule leaves any.

  Args:
    vocabulary: the words.
    keys: of the words wanted.
    known: "gender" and other words.
    rng: draws one number, whatever it chooses from.
  """
  gender = known["gender"]
  mask = vocabulary.plausible(keys, known, gender=gender)
  at, count = rng.random(), np.count_nonzero(mask)
  if not count:
    return None
  return _nth(vocabulary, keys, mask, int(at * count), gender)


def _nth(
  vocabulary: vocabularies.Vocabulary,
  keys: Sequence[str],
  mask: np.ndarray,
  number: int,
  gender: str | None = None,
) -> dict[str, str]:
  """Returns the words at the number-th True of a mask."""
  at = np.unravel_index(np.flatnonzero(mask)[number], mask.shape)
  return {
    key: vocabulary.values(key, gender)[i]
    for key, i in zip(keys, at, strict=True)
  }
