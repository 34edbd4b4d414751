"""The words for people and places: read, checked, and extended by answers."""

from collections.abc import Iterable, Mapping, Sequence
import functools
import hashlib
import json
import pathlib
import re
from typing import Any

from dppp_jax import errors

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
_PLAIN = ("gender", "forbidden")
_MAX_CHARS, _MAX_WORDS = 40, 5
# Long phrases on purpose: tags of a background, of a light.
_PHRASES = ("place", "lighting")


class Vocabulary:
  """Lists of words, and rules about which do not go together.

  Attributes:
    raw: the JSON object.
    digest: hex digest of it; the people are a function of (digest, seed, pid).
    genders: the values of "gender".
  """

  def __init__(self, raw: Mapping[str, Any], *, where: str = "vocabulary"):
    _check(raw, where)
    self.raw = raw
    text = json.dumps(raw, sort_keys=True, ensure_ascii=False)
    self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    self.genders = tuple(raw["gender"])
    self._rules = [
      tuple(
        {key: frozenset(words) for key, words in rule.get(part, {}).items()}
        for part in ("when", "only", "not")
      )
      for rule in raw["rules"]
    ]

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

  def objection(self, words: Mapping[str, str]) -> str | None:
    """Says why a combination is implausible, or None.

    Args:
      words: {attribute: word}; a rule about an absent attribute is silent.
    """
    for rule, (when, only, never) in zip(
      self.raw["rules"], self._rules, strict=True
    ):
      if all(words.get(key) in values for key, values in when.items()) and (
        any(words.get(key, None) in values for key, values in never.items())
        or any(
          key in words and words[key] not in values
          for key, values in only.items()
        )
      ):
        return rule["why"]
    return None


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
  try:
    raw = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{path} cannot be read as a vocabulary ({error})"
    ) from error
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
  refused = {}
  for word in words:
    fault = _fault(word, raw["forbidden"])
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


def _is_words(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _check(raw: Any, where: str) -> None:
  """Raises a UserError for a vocabulary that cannot be drawn from."""
  if not isinstance(raw, Mapping):
    raise errors.UserError(f"{where} holds no JSON object: begin from {PATH}")
  if missing := [k for k in (*_LISTS, "rules") if k not in raw]:
    raise errors.UserError(f"{where} lacks the lists {', '.join(missing)}")
  keys = dict.fromkeys((*_LISTS, *(key for key in OUTFIT if key in raw)))
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
  if not isinstance(raw["rules"], list):
    raise errors.UserError(f"{where}: rules should be a list")
  for rule in raw["rules"]:
    known = {"why", "when", "only", "not"}
    if not isinstance(rule, Mapping) or not {"why"} <= rule.keys() <= known:
      raise errors.UserError(
        f"{where}: a rule has why, when, and only or not, not"
        f" {list(rule) if isinstance(rule, Mapping) else rule!r}"
      )
    for part in ("when", "only", "not"):
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
        lists = lists.values() if isinstance(lists, Mapping) else [lists]
        unknown = set(words) - {word for words in lists for word in words}
        if unknown:
          raise errors.UserError(
            f"{where}: the rule {rule['why']!r} speaks of {key}"
            f" {sorted(unknown)[0]!r}, which is in no list"
          )
