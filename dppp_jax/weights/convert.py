"""Names and layouts of tensors, by tables that read in both directions.

A rule pairs the name that a tensor has in a checkpoint with the path that it
has in a parameter tree. Both are written with the same placeholders:

    Rule("layers.{i}.{fc:fc1|fc2}.weight", "layers_{i}/{fc}/kernel", LINEAR)

`{i}` stands for a number, `{fc:fc1|fc2}` for whatever the regex behind the
colon matches; all else stands for itself. One table therefore serves to load
and to export. Nothing is guessed: exactly one rule must match each tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import pathlib
import re
from typing import Any

import numpy as np

from dppp_jax import errors, logs, trees

_SHOWN = 12  # Lines of a list that a person reads before giving up.
_BLOCK = 1 << 22  # Numbers that are looked at together.
# The bits that are all set in what is not finite.
_EXPONENTS = {"float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}
_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


@dataclasses.dataclass(frozen=True)
class Transform:
  """How the numbers change their places.

  Attributes:
    forward: the checkpoint's array to the tree's, or to a tuple of them.
    inverse: back; takes as many arrays as `forward` returns.
  """

  forward: Callable[[np.ndarray], Any]
  inverse: Callable[..., np.ndarray]


def _axes(*order: int) -> Transform:
  back = tuple(np.argsort(order))
  return Transform(lambda x: x.transpose(order), lambda x: x.transpose(back))


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = _axes(1, 0)  # torch [out, in] to flax [in, out].
CONV = _axes(2, 3, 1, 0)  # torch OIHW to flax HWIO.
SCALAR = Transform(lambda x: x.reshape(()), lambda x: x.reshape(()))


def split(parts: int, each: Transform) -> Transform:
  """Returns what cuts the first axis in equal parts (fused q, k and v)."""
  return Transform(
    lambda x: tuple(each.forward(y) for y in np.split(x, parts)),
    lambda *ys: np.concatenate([each.inverse(y) for y in ys]),
  )


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of a table.

  Attributes:
    source: template of the names in the checkpoint, with the regexes.
    target: template of the path in the tree, several for a `split`, or None
      for what is left out on purpose.
    transform: how the numbers move.
  """

  source: str
  target: str | tuple[str, ...] | None
  transform: Transform = SAME

  @property
  def targets(self) -> tuple[str, ...]:
    """All target templates, none for a rule that leaves out."""
    if self.target is None:
      return ()
    return (self.target,) if isinstance(self.target, str) else self.target


def convert(
  tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], *, where: str
) -> dict[str, np.ndarray]:
  """Renames and rearranges the tensors of a checkpoint; copies none.

  Args:
    tensors: {name: array of any float type}; integers only where a rule
      leaves them out.
    rules: the table; exactly one rule must match each name.
    where: the file or folder, for the error.

  Returns:
    {path: array}, to be compared with the model by `trees.merge`: views of the
    tensors in the precision of the file, which may lie in it (memory-mapped,
    read-only).

  Raises:
    errors.UserError: a name that no rule or several rules match, two tensors
      for one path, a tensor that is not float, or one that is not finite.
  """

  def read(name: str) -> np.ndarray:
    _check_numbers(tensors[name], f"{where}: tensor {name}")
    return tensors[name]

  names = _reading(tensors, where)
  return _moved(tensors, rules, where, names=names, read=read)


def shapes(
  tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], *, where: str
) -> dict[str, np.ndarray]:
  """Returns arrays of the shapes of `convert`'s, without reading a number.

  Args:
    tensors: as of `convert`; only names and shapes are looked at.
    rules: as of `convert`.
    where: as of `convert`.

  Returns:
    {path: array of zeros that takes no memory}.

  Raises:
    errors.UserError: a name that no rule or several rules match, two tensors
      for one path, or a tensor of a wrong number of dimensions.
  """
  empty = lambda name: np.broadcast_to(np.float32(0), tensors[name].shape)
  return _moved(tensors, rules, where, names=sorted(tensors), read=empty)


def _moved(
  tensors: Mapping[str, np.ndarray],
  rules: Sequence[Rule],
  where: str,
  *,
  names: Iterable[str],
  read: Callable[[str], np.ndarray],
) -> dict[str, np.ndarray]:
  """Reads each tensor that has a place in the model, and puts it there."""
  params, origin, faults = {}, {}, []
  for name in names:
    found = [
      (rule, m)
      for rule in rules
      if (m := _match(rule.source, name)) is not None
    ]
    if len(found) != 1:
      said = "no rule" if not found else f"{len(found)} rules"
      faults.append(f"+ {name} {tuple(tensors[name].shape)}: {said}")
      continue
    ((rule, groups),) = found
    if rule.target is None:
      continue
    array = read(name)
    try:
      moved = rule.transform.forward(array)
    except (ValueError, IndexError):
      faults.append(f"! {name} {array.shape}: a wrong number of dimensions")
      continue
    parts = moved if isinstance(moved, tuple) else (moved,)
    for template, part in zip(rule.targets, parts, strict=True):
      path = _fill(template, groups)
      if path in params:
        faults.append(f"+ {name}: {path} is already filled by {origin[path]}")
      params[path], origin[path] = part, name
  if faults:
    _refuse(where, "tensors have no place in the model", faults)
  return params


def invert(
  params: Mapping[str, Any], rules: Sequence[Rule], *, where: str
) -> dict[str, np.ndarray]:
  """Gives the parameters back the names and layouts of a checkpoint.

  Args:
    params: nested or flat tree, all of whose leaves some rule covers.
    rules: the table that `convert` would read the result with.
    where: what is being written, for the error.

  Returns:
    {name: array} in the dtypes of `params`.

  Raises:
    errors.UserError: a leaf that no rule or several rules cover, or a split
      rule of which parts are missing.
  """
  flat = trees.flatten(params)
  parts: dict[tuple[str, Rule], dict[int, np.ndarray]] = {}
  faults = []
  for path, leaf in flat.items():
    found = [
      (rule, index, groups)
      for rule in rules
      for index, template in enumerate(rule.targets)
      if (groups := _match(_with_regexes(template, rule.source), path))
      is not None
    ]
    if len(found) != 1:
      said = "no rule" if not found else f"{len(found)} rules"
      faults.append(f"+ {path} {tuple(leaf.shape)}: {said}")
      continue
    ((rule, index, groups),) = found
    name = _fill(rule.source, groups)
    parts.setdefault((name, rule), {})[index] = np.asarray(leaf)
  tensors = {}
  for (name, rule), pieces in parts.items():
    if len(pieces) != len(rule.targets):
      faults.append(f"- {name}: {len(pieces)} of {len(rule.targets)} parts")
      continue
    ordered = [pieces[index] for index in sorted(pieces)]
    tensors[name] = np.asarray(rule.transform.inverse(*ordered), order="C")
  if faults:
    _refuse(where, "parameters have no name in the checkpoint", faults)
  return tensors


def is_finite(array: np.ndarray) -> bool:
  """Tells whether all numbers are finite; makes no copy of them."""
  flat = array.ravel(order="K")  # A view: what lies in a file is contiguous.
  blocks = (flat[i : i + _BLOCK] for i in range(0, flat.size, _BLOCK))
  exponent = _EXPONENTS.get(array.dtype.name)
  if exponent is not None:  # Six times as fast as np.isfinite.
    return all(
      np.all((block.view(np.uint16) & exponent) != exponent) for block in blocks
    )
  if array.dtype.itemsize == 1:  # float8: NumPy has no test for it.
    blocks = (np.asarray(block, np.float32) for block in blocks)
  return all(np.all(np.isfinite(block)) for block in blocks)


def _reading(tensors: Mapping[str, np.ndarray], where: str) -> Iterator[str]:
  """Gives the names, with a bar where looking at the numbers takes long."""
  total = sum(tensor.nbytes for tensor in tensors.values())
  desc = f"reading {pathlib.Path(where).name}"
  with logs.progress_of_bytes(total, desc=desc) as bar:
    for name in sorted(tensors):
      yield name
      bar.update(tensors[name].nbytes)


def _check_numbers(array: np.ndarray, where: str) -> None:
  """Refuses what is no number."""
  kind = np.dtype(array.dtype)
  # bfloat16 and float8 are foreign to NumPy: they have the kind "V".
  if kind.kind not in "fV":
    raise errors.UserError(
      f"{where} holds {kind.name}, not floats: is it a quantised checkpoint?"
      " Use the original one"
    )
  if not is_finite(array):
    raise errors.UserError(
      f"{where} holds NaN or infinity: the checkpoint is damaged or its"
      " training diverged; use another one"
    )


@functools.lru_cache(maxsize=4096)
def _regex(template: str) -> re.Pattern[str]:
  """Compiles a template; a placeholder that comes again must repeat itself."""
  pattern, end, seen = "", 0, set()
  for m in _PLACEHOLDER.finditer(template):
    pattern += re.escape(template[end : m.start()])
    name, body = m.groups()
    pattern += (
      f"(?P={name})" if name in seen else f"(?P<{name}>{body or '[0-9]+'})"
    )
    seen.add(name)
    end = m.end()
  return re.compile(pattern + re.escape(template[end:]))


def _match(template: str, name: str) -> dict[str, str] | None:
  """Returns the placeholders' texts (perhaps none), or None without a match."""
  m = _regex(template).fullmatch(name)
  return None if m is None else m.groupdict()


def _fill(template: str, groups: Mapping[str, str]) -> str:
  return _PLACEHOLDER.sub(lambda m: groups[m[1]], template)


@functools.lru_cache(maxsize=4096)
def _with_regexes(target: str, source: str) -> str:
  """Gives the target's placeholders the regexes that stand in the source."""
  bodies = {m[1]: m[0] for m in reversed([*_PLACEHOLDER.finditer(source)])}
  return _PLACEHOLDER.sub(lambda m: bodies[m[1]], target)


def _refuse(where: str, what: str, faults: Sequence[str]) -> None:
  more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
  raise errors.UserError(
    f"{where}: {len(faults)} {what}; is it a checkpoint of another model?\n  "
    + "\n  ".join(faults[:_SHOWN])
    + more
  )
