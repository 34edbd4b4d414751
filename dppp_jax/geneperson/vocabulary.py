"""The words for people and places: read, checked, and extended by answers.

A rule says of some words which others do not go with them. It speaks of words,
or of kinds of words ("upper_type_kind": ["dress"]): a vocabulary lists for each
kind the words and the endings of words that are of it, so that a rule about
coats holds for a coat that was added later.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
import hashlib
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from dppp_jax import errors, files, paths

PATH = pathlib.Path(__file__).with_name("vocabulary.json")
OUTFIT = tuple(
  f"{part}_{what}"
  for part in ("upper", "lower", "footwear")
  for what in ("type", "color", "pattern")
)
EXTRAS = (
  "body", "skin", "hair_color", "hair_length", "hair_texture", "hair_style",
  "activity", "lighting",
)  # fmt: skip
_LISTS = (
  "gender", "place", "forbidden", "color", "hair_color",
  *(key for key in OUTFIT + EXTRAS if not key.endswith("_color")),
)  # fmt: skip
_OPTIONAL = ("build",)  # Not in every vocabulary.
_PLAIN = ("gender", "forbidden")
_KIND = "_kind"  # Ends the name of an attribute's kind.
NONE = "none"  # In place of a word for what somebody has not.
# What a rule may say that somebody has not.
_SPARED = ("body", "skin", "hair_color", "hair_length", "hair_texture")
_PARTS = ("when", "only", "not")  # Of a rule: words by attribute.
_MAX_CHARS, _MAX_WORDS = 40, 5
# Long phrases on purpose: tags of a background, of a light.
_PHRASES = ("place", "lighting")


class _Rule(NamedTuple):
  """Where all of `when` hold, `only` and `never` must; sets of words by name.

  A name is that of an attribute or of its kind.
  """

  when: Mapping[str, frozenset[str]]
  only: Mapping[str, frozenset[str]]
  never: Mapping[str, frozenset[str]]

  @property
  def names(self) -> frozenset[str]:
    """All that it speaks of."""
    return frozenset().union(*self)

  def without(self, names: Iterable[str]) -> "_Rule":
    """Returns what it says of other names."""
    return _Rule(
      *({k: v for k, v in part.items() if k not in names} for part in self)
    )

  def holds(self, known: Mapping[str, str]) -> bool:
    """Whether its condition is met."""
    return all(known.get(name) in words for name, words in self.when.items())

  def is_broken(self, known: Mapping[str, str]) -> bool:
    """Whether known words break it, should its condition be met."""
    return any(
      known.get(name) in words for name, words in self.never.items()
    ) or any(
      name in known and known[name] not in words
      for name, words in self.only.items()
    )


class Vocabulary:
  """Lists of words, and rules about which do not go together.

  Attributes:
    raw: the JSON object.
    digest: hex digest of it; the people are a function of (digest, seed, pid).
    genders: the values of "gender".
    keys: attributes of a person beside gender and clothes.
  """

  def __init__(self, raw: Mapping[str, Any], *, where: str = "vocabulary"):
    _check(raw, where)
    self.raw = raw
    text = json.dumps(raw, sort_keys=True, ensure_ascii=False)
    self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    self.genders = tuple(raw["gender"])
    self.keys = (*EXTRAS, *(key for key in _OPTIONAL if key in raw))
    self._kinds = _kinds(raw)
    self._rules = [
      _Rule(
        *(
          {key: frozenset(words) for key, words in rule.get(part, {}).items()}
          for part in _PARTS
        )
      )
      for rule in raw["rules"]
    ]
    self._lacking = [
      (rule, frozenset(said["none"]))
      for rule, said in zip(self._rules, raw["rules"], strict=True)
      if "none" in said
    ]
    self._about: dict[Any, list[Any]] = {}
    self._masks: dict[Any, np.ndarray] = {}

  def values(self, key: str, gender: str | None = None) -> tuple[str, ...]:
    """Returns the words for an attribute: of one gender, or of all."""
    words = self.raw.get(key, self.raw["color"])  # All clothes share colours.
    if not isinstance(words, Mapping):
      return tuple(words)
    if gender is not None:
      return tuple(words[gender])
    # In the order of their first appearance.
    return tuple(
      dict.fromkeys(word for part in words.values() for word in part)
    )

  def objection(
    self,
    words: Mapping[str, str],
    *,
    asked: Sequence[Sequence[str]] = (),
  ) -> str | None:
    """Says why a combination is implausible, or None.

    Args:
      words: {attribute: word}; a rule about an absent attribute is silent.
      asked: groups of attributes that were chosen by `plausible`: a rule that
        speaks of one group alone is not asked again.
    """
    rules = self._beyond(tuple(map(tuple, asked)))
    known = self._with_kinds(words) if rules else {}
    for i in rules:
      if self._rules[i].holds(known) and self._rules[i].is_broken(known):
        return self.raw["rules"][i]["why"]
    return None

  def bare(self, words: Mapping[str, str]) -> dict[str, str]:
    """Returns the words, NONE for what a rule says that somebody has not."""
    known, bare = self._with_kinds(words), dict(words)
    for rule, lacking in self._lacking:
      if rule.holds(known):
        bare |= dict.fromkeys(lacking & words.keys(), NONE)
    return bare

  def plausible(
    self,
    keys: Sequence[str],
    known: Mapping[str, str],
    *,
    gender: str | None = None,
  ) -> np.ndarray:
    """Says which combinations of words no rule objects to, all at once.

    Args:
      keys: attributes, one for each axis.
      known: words of other attributes; the rules see no others.
      gender: whose words; None: of all.

    Returns:
      bool [n, ...] in the order of `values` of each key. Do not write to it.
    """
    speaking = self._speaking(tuple(keys))
    told = self._with_kinds(known) if speaking else {}
    # Whether what is known breaks a rule, should its condition hold.
    open_rules = tuple(
      (i, rule.is_broken(told)) for i, rule in speaking if rule.holds(told)
    )
    case = (tuple(keys), gender, open_rules)
    if case not in self._masks:
      self._masks[case] = self._mask(keys, gender, open_rules)
    return self._masks[case]

  def _speaking(self, keys: tuple[str, ...]) -> list[tuple[int, "_Rule"]]:
    """Returns the rules that speak of some attributes: what else they say."""
    if keys not in self._about:
      names = _names(keys)
      self._about[keys] = [
        (i, rule.without(names))
        for i, rule in enumerate(self._rules)
        if rule.names & names
      ]
    return self._about[keys]

  def _beyond(self, groups: tuple[tuple[str, ...], ...]) -> list[int]:
    """Returns which rules do not speak of one group (and the gender) alone."""
    if groups not in self._about:
      alone = [_names(keys) for keys in groups]
      self._about[groups] = [
        i
        for i, rule in enumerate(self._rules)
        if not any(set() < rule.names - {"gender"} <= names for names in alone)
      ]
    return self._about[groups]

  def _mask(
    self, keys: Sequence[str], gender: str | None, open_rules: Sequence[Any]
  ) -> np.ndarray:
    lists = [self.values(key, gender) for key in keys]

    def among(name: str, allowed: frozenset[str]) -> np.ndarray:
      axis = list(keys).index(name.removesuffix(_KIND))
      kinds = [self._kinds.get((name, word), word) for word in lists[axis]]
      shape = [1] * len(keys)
      shape[axis] = -1
      return np.array([kind in allowed for kind in kinds]).reshape(shape)

    names = _names(keys)
    mask = np.ones([len(words) for words in lists], bool)
    for i, is_broken in open_rules:
      rule = self._rules[i]
      when, only, never = rule.without(rule.names - names)
      breaks = np.array(is_broken)
      for name, words in never.items():
        breaks = breaks | among(name, words)
      for name, words in only.items():
        breaks = breaks | ~among(name, words)
      for name, words in when.items():
        breaks = breaks & among(name, words)
      mask &= ~breaks
    return mask

  def _with_kinds(self, words: Mapping[str, str]) -> dict[str, str]:
    """Returns the words and their kinds, without what somebody has not."""
    known = {key: word for key, word in words.items() if word != NONE}
    for key, word in list(known.items()):
      if kind := self._kinds.get((key + _KIND, word)):
        known[key + _KIND] = kind
    return known


@functools.cache
def default() -> Vocabulary:
  """Returns the vocabulary that this package ships."""
  return load(PATH)


def load(path: str | pathlib.Path) -> Vocabulary:
  """Reads a vocabulary file.

  Raises:
    errors.UserError: no such file, not JSON, lists missing, forbidden or
      repeated words, or rules about words that are in no list.
  """
  wanted = f"give a vocabulary, written as {PATH.name} of this package is"
  raw = files.read_json(paths.expand(path), wanted=wanted)
  return Vocabulary(raw, where=str(path))


def parse_answer(text: str) -> list[str]:
  """Returns the items of a language model's list, in lower case.

  Takes a JSON array, or lines with bullets or numbers; a remark behind a colon
  or a dash, bold marks and a closing full stop are dropped, and so are lines
  that introduce the list.
  """
  for found in re.findall(r"\[[^\[\]]*\]", text):
    try:
      items = json.loads(found)
    except ValueError:
      continue
    if items and _is_words(items):  # And no footnote.
      return [item.strip().lower() for item in items]
  items = []
  for line in text.splitlines():
    m = re.match(r"\s*(?:[-*\u2022]|\d+[.)])\s+(.*)", line)
    if m:
      item = re.split(r":|\s[-\u2013\u2014]\s|\(", m[1].replace("**", ""))[0]
      items.append(item.strip().rstrip(".").lower())
  return items


def merge(
  raw: Mapping[str, Any],
  key: str,
  words: Iterable[str],
  *,
  gender: str | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
  """Adds words to one list, and says of each that is not taken why.

  Args:
    raw: the JSON object; left as it is.
    key: of the list.
    words: what to add.
    gender: whose list, where there is one for each.

  Returns:
    The new JSON object, and {refused word: reason}.
  """
  raw = json.loads(json.dumps(raw))
  target = raw[key] if gender is None else raw[key][gender]
  kinds = raw.get("kinds", {}).get(key)
  refused = {}
  for word in words:
    fault = _fault(word, raw["forbidden"])
    if fault is None and kinds is not None and _kind(word, kinds) is None:
      fault = f"is of no kind that rules know: add its last word to kinds.{key}"
    if fault is None and _bare(word) in {_bare(known) for known in target}:
      fault = "is there already"
    if fault is None:
      target.append(word)
    else:
      refused[word] = fault
  return raw, refused


def _fault(word: str, forbidden: Sequence[str]) -> str | None:
  """Says what is wrong with a word by itself, or None."""
  if not re.fullmatch(r"[a-z][a-z' -]*[a-z]", word):
    return "is not of lower-case letters, blanks and hyphens"
  if len(word) > _MAX_CHARS or len(word.split()) > _MAX_WORDS:
    return f"is longer than {_MAX_WORDS} words or {_MAX_CHARS} letters"
  for taboo in forbidden:
    if re.search(rf"\b{re.escape(taboo)}s?\b", word):
      return f"holds the forbidden word {taboo!r}"
  return None


def _bare(word: str) -> str:
  """Spelling without what makes no other word: T shirt, t-shirts, T-Shirt."""
  return re.sub(r"[^a-z]", "", word.lower()).removesuffix("s")


def _names(keys: Iterable[str]) -> frozenset[str]:
  """Returns the names by which rules call some attributes."""
  return frozenset(name for key in keys for name in (key, key + _KIND))


def _kind(word: str, kinds: Mapping[str, Sequence[str]]) -> str | None:
  """Returns the kind that lists the longest ending of a word, or None."""
  known = {
    _bare(ending): kind for kind, ends in kinds.items() for ending in ends
  }
  parts = word.split()
  for i in range(len(parts)):
    if kind := known.get(_bare(" ".join(parts[i:]))):
      return kind
  return None


def _kinds(raw: Mapping[str, Any]) -> dict[tuple[str, str], str]:
  """Returns {(attribute's kind, word): kind} of a vocabulary's words."""
  found = {}
  for key, kinds in raw.get("kinds", {}).items():
    lists = raw[key].values() if isinstance(raw[key], Mapping) else [raw[key]]
    for word in dict.fromkeys(word for words in lists for word in words):
      if kind := _kind(word, kinds):
        found[key + _KIND, word] = kind
  return found


def _is_words(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _check(raw: Any, where: str) -> None:
  """Raises a UserError for a vocabulary that cannot be drawn from."""
  if not isinstance(raw, Mapping):
    raise errors.UserError(f"{where} holds no JSON object: begin from {PATH}")
  if missing := [k for k in (*_LISTS, "rules") if k not in raw]:
    raise errors.UserError(f"{where} lacks the lists {', '.join(missing)}")
  others = (key for key in (*OUTFIT, *_OPTIONAL) if key in raw)
  keys = dict.fromkeys((*_LISTS, *others))
  for key in keys:  # Of them "gender" is the first.
    parts = raw[key] if isinstance(raw[key], Mapping) else {"": raw[key]}
    if not all(map(_is_words, parts.values())):
      raise errors.UserError(f"{where}: {key} should be a list of words")
    wanted = ["outdoors", "indoors"] if key == "place" else raw["gender"]
    is_plain = parts.keys() == {""} and key != "place"
    if not is_plain and (key in _PLAIN or parts.keys() != set(wanted)):
      form = "a list" if key in _PLAIN else f"for {', '.join(wanted)}"
      raise errors.UserError(
        f"{where}: {key} is for {', '.join(parts) or 'nothing'} and should be"
        f" {form}"
      )
    for words in parts.values():
      known = [_bare(word) for word in words]
      if not words or len(set(known)) < len(known):
        raise errors.UserError(
          f"{where}: {key} is empty or names something twice"
        )
      for word in words if key != "forbidden" else ():
        tags = word.split(", ") if key in _PHRASES else [word]
        for fault in (_fault(tag, raw["forbidden"]) for tag in tags):
          if fault:
            raise errors.UserError(f"{where}: {key}: {word!r} {fault}")
  _check_kinds(raw, keys, where)
  _check_rules(raw, keys, where)


def _check_kinds(raw: Mapping[str, Any], keys: Iterable[str], where: str):
  """Raises a UserError for kinds that do not tell the words apart."""
  for key, kinds in _mapping(raw.get("kinds", {}), f"{where}: kinds").items():
    name = f"{where}: kinds.{key}"
    if key not in keys or key in _PLAIN:
      raise errors.UserError(f"{name}: there is no such list of words")
    if not all(map(_is_words, _mapping(kinds, name).values())):
      raise errors.UserError(f"{name} should give a list of words by kind")
    ends = [set(map(_bare, words)) for words in kinds.values()]
    for end in set().union(*ends):
      if sum(end in some for some in ends) > 1:
        raise errors.UserError(f"{name}: {end!r} is of two kinds")
    lists = raw[key].values() if isinstance(raw[key], Mapping) else [raw[key]]
    for word in (word for words in lists for word in words):
      if _kind(word, kinds) is None:
        raise errors.UserError(
          f"{name}: {word!r} is of no kind: list it, or its last word"
        )


def _check_rules(raw: Mapping[str, Any], keys: Iterable[str], where: str):
  """Raises a UserError for rules about words that there are not."""
  if not isinstance(raw["rules"], list):
    raise errors.UserError(f"{where}: rules should be a list")
  for rule in raw["rules"]:
    known = {"why", *_PARTS, "none"}
    if not isinstance(rule, Mapping) or not {"why"} <= rule.keys() <= known:
      raise errors.UserError(
        f"{where}: a rule has why, when, and only, not or none, not"
        f" {list(rule) if isinstance(rule, Mapping) else rule!r}"
      )
    name = f"{where}: the rule {rule['why']!r}"
    spared = rule.get("none", [])
    if not _is_words(spared) or set(spared) - set(_SPARED):
      raise errors.UserError(
        f"{name} says of {spared!r} that somebody has none: that can be said"
        f" of {', '.join(_SPARED)}"
      )
    for part in _PARTS:
      given = rule.get(part, {})
      if not isinstance(given, Mapping) or not all(
        map(_is_words, given.values())
      ):
        raise errors.UserError(
          f"{where}: {part} of the rule {rule['why']!r} should give lists of"
          " words by attribute"
        )
      for key, words in given.items():
        lists = raw[key] if key in keys else ()
        if key in OUTFIT and key not in keys:
          lists = raw["color"]
        if key.endswith(_KIND):
          lists = list(raw.get("kinds", {}).get(key.removesuffix(_KIND), {}))
        lists = lists.values() if isinstance(lists, Mapping) else [lists]
        unknown = set(words) - {word for words in lists for word in words}
        if unknown:
          raise errors.UserError(
            f"{name} speaks of {key} {sorted(unknown)[0]!r}, which is in no"
            " list"
          )
    named = {key for part in _PARTS for key in rule.get(part, {})}
    if "gender" in named and any(
      key in named for key in OUTFIT if key.endswith("_color")
    ):
      raise errors.UserError(
        f"{name} speaks of gender and of a colour of clothes: colours are the"
        " same for all, so that no outfit is worn twice"
      )


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
  if not isinstance(value, Mapping):
    raise errors.UserError(f"{name} should be an object, not {value!r}")
  return value
