"""Which numbers have a meaning: one table beside each set of options.

    RANGES = {"margin": ranges.NON_NEGATIVE, "label_smoothing": ranges.SHARE}
    ranges.check(options, RANGES, where="config dppp.")

A number is always finite, and fits into the 32 bits that the device holds it
in. Nothing below zero stands for "all" or "none" unless a range says so, and
None is a number only for `or_none`.
"""

from collections.abc import Mapping
import dataclasses
import math
import numbers
import typing
from typing import Any

from dppp_jax import errors

_LARGEST = 2**31 - 1
# Of float32: the largest, rounded down, and what is not yet rounded to 0.
_LARGEST_FLOAT, _SMALLEST_FLOAT = 3e38, 1.2e-38


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers that an option may have.

  Attributes:
    text: what to give, for the message.
    low: the least.
    high: the greatest.
    open_low: `low` itself is left out.
    open_high: `high` itself is left out.
    whole: of integers.
    length: of a tuple of such numbers; None for one number, 0 for any length.
    none: None is taken too.
  """

  text: str
  low: float = -math.inf
  high: float = math.inf
  open_low: bool = False
  open_high: bool = False
  whole: bool = False
  length: int | None = None
  none: bool = False

  def holds(self, value: Any) -> bool:
    """Whether a value is one of these numbers."""
    if value is None:
      return self.none
    if self.length is not None:
      one = dataclasses.replace(self, length=None, none=False)
      return (
        isinstance(value, (tuple, list))
        and len(value) in (self.length or len(value),)
        and all(map(one.holds, value))
      )
    kind = numbers.Integral if self.whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
      return False
    above = value > self.low if self.open_low else value >= self.low
    below = value < self.high if self.open_high else value <= self.high
    fits = value == 0 or _SMALLEST_FLOAT <= abs(value) <= _LARGEST_FLOAT
    return fits and above and below


ANY = Range("a finite number")
POSITIVE = Range("a number above 0", low=0, open_low=True)
NON_NEGATIVE = Range("a number of at least 0", low=0)
UNIT = Range("a number from 0 to 1", low=0, high=1)
SHARE = Range("a number from 0, below 1", low=0, high=1, open_high=True)
FACTOR = Range("a number above 0, at most 1", low=0, high=1, open_low=True)
COUNT = Range("a whole number of at least 1", low=1, high=_LARGEST, whole=True)
WHOLE = Range("a whole number of at least 0", low=0, high=_LARGEST, whole=True)
COUNTS = dataclasses.replace(
  COUNT, text="whole numbers of at least 1", length=0
)
SIDE = dataclasses.replace(
  COUNT, text="a whole number from 1 to 16384", high=2**14
)
PAIR = dataclasses.replace(
  COUNT, text="height and width, such as 256,128", high=2**14, length=2
)
BOUNDS = dataclasses.replace(
  NON_NEGATIVE, text="a lower and an upper bound from 0 on", length=2
)
COLOUR = dataclasses.replace(ANY, text="three finite numbers", length=3)
SPREAD = dataclasses.replace(POSITIVE, text="three numbers above 0", length=3)


def or_none(allowed: Range) -> Range:
  """Returns a range that takes None too, which switches something off."""
  text = f"{allowed.text}, or None"
  return dataclasses.replace(allowed, text=text, none=True)


def check(values: Any, table: Mapping[str, Range], *, where: str = "") -> None:
  """Refuses numbers without meaning, before anything is compiled.

  Of a dataclass, fields that are declared bool or str must hold one.

  Args:
    values: a dataclass, or nested mappings and sequences of mappings.
    table: the end of a key ("lr", or "vision.image_size" where "image_size"
      alone is something else) -> the numbers it may have, or those that all
      below it may have. Other numbers must be finite.
    where: what stands before the key in the message, with its dot.

  Raises:
    errors.UserError: names the key, the value and the remedy.
  """
  if dataclasses.is_dataclass(values):
    hints = typing.get_type_hints(type(values))
    values = {
      field.name: getattr(values, field.name)
      for field in dataclasses.fields(values)
    }
    for key, value in values.items():
      kind(f"{where}{key}", value, hints[key])
  for key, value in values.items():
    _check_key(where, key, value, table)


def _check_key(
  where: str, path: str, value: Any, table: Mapping[str, Range]
) -> None:
  parts = path.split(".")
  ends = (".".join(parts[start:]) for start in range(len(parts)))
  allowed = next((table[end] for end in ends if end in table), None)
  items = value if isinstance(value, (tuple, list)) else (value,)
  if isinstance(value, Mapping):
    inside = dict.fromkeys(value, allowed) if allowed else {}
    for key, item in value.items():
      _check_key(where, f"{path}.{key}", item, {**table, **inside})
  elif any(isinstance(item, Mapping) for item in items):
    for number, item in enumerate(items):
      _check_key(where, f"{path}[{number}]", item, table)
  elif allowed:
    one(f"{where}{path}", value, allowed)
  else:
    for item in items:
      if isinstance(item, float):
        one(f"{where}{path}", item, ANY)


def one(name: str, value: Any, allowed: Range) -> None:
  """Refuses one number; see `check`."""
  if not allowed.holds(value):
    raise errors.UserError(f"{name}={value!r}: give {allowed.text}")


def kind(name: str, value: Any, expected: Any) -> None:
  """Refuses another kind of value where a switch or a text is expected.

  Args:
    name: of the value, for the message.
    value: e.g. "false", which would switch something on, as a text does.
    expected: bool or str; any other kind is not looked at.
  """
  for one_kind, text in ((bool, "True or False"), (str, "a text")):
    if expected is one_kind and not isinstance(value, one_kind):
      raise errors.UserError(f"{name}={value!r}: give {text}")
