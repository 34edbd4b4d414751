"""Parameter trees by name: "/"-joined paths, rules over them, strict merge."""

from collections.abc import Iterable, Mapping, Sequence
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors

_SHOWN = 12  # Lines of a diff that a person reads before giving up.


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {"a/b": leaf} for a nested dict, in sorted order of the keys."""
  flat = {}
  for key in sorted(tree):
    if isinstance(tree[key], Mapping):
      flat |= {f"{key}/{k}": v for k, v in flatten(tree[key]).items()}
    else:
      flat[key] = tree[key]
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the nested dict whose `flatten` is `flat`."""
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def match(
  names: Iterable[str], rules: Sequence[tuple[str, Any]]
) -> dict[str, Any]:
  """Gives every name the value of the first rule whose regex matches it all.

  Args:
    names: "/"-joined parameter names.
    rules: (regex, value) pairs, tried in order with `re.fullmatch`.

  Returns:
    {name: value}.

  Raises:
    errors.UserError: a name that no rule matches, or a rule whose regex
      matches no name at all (a typing error that would train nothing).
  """
  names = list(names)
  matched, used = {}, set()
  for name in names:
    for i, (pattern, value) in enumerate(rules):
      if re.fullmatch(pattern, name):
        matched[name] = value
        used.add(i)
        break
    else:
      raise errors.UserError(
        f"parameter {name} is matched by no rule: end the rules with a"
        " catch-all such as ('.*', None)"
      )
  for i, (pattern, _) in enumerate(rules):
    shadowed = any(re.fullmatch(pattern, name) for name in names)
    if i not in used and not shadowed:
      raise errors.UserError(
        f"rule {pattern!r} matches no parameter: the names begin"
        f" {', '.join(names[:3])}"
      )
  return matched


def merge(
  expected: Mapping[str, Any],
  given: Mapping[str, Any],
  *,
  where: str,
  ignore_missing: Sequence[str] = (),
  ignore_extra: Sequence[str] = (),
) -> dict[str, Any]:
  """Puts given tensors in the place of expected ones, and accounts for all.

  Args:
    expected: nested or flat dict of arrays or ShapeDtypeStructs.
    given: nested or flat dict of arrays.
    where: the file or folder that `given` comes from, for the error.
    ignore_missing: regexes of expected names that may be absent; the expected
      leaf is kept.
    ignore_extra: regexes of given names that are dropped.

  Returns:
    A nested dict with the names of `expected`.

  Raises:
    errors.UserError: names or shapes differ; a diff with "-" for what is
      missing, "+" for what is extra and "!" for shapes follows the first line.
  """
  expected, given = flatten(expected), flatten(given)
  is_ignored = lambda name, regexes: any(
    re.fullmatch(regex, name) for regex in regexes
  )
  diff = []
  for name in sorted(expected.keys() | given.keys()):
    if name not in given:
      if not is_ignored(name, ignore_missing):
        diff.append(f"- {name} {tuple(expected[name].shape)}")
    elif name not in expected:
      if not is_ignored(name, ignore_extra):
        diff.append(f"+ {name} {tuple(given[name].shape)}")
    elif tuple(expected[name].shape) != tuple(given[name].shape):
      diff.append(
        f"! {name} expects {tuple(expected[name].shape)},"
        f" holds {tuple(given[name].shape)}"
      )
  if diff:
    more = f"\n  and {len(diff) - _SHOWN} more" if len(diff) > _SHOWN else ""
    raise errors.UserError(
      f"{where}: {len(diff)} tensors do not fit the model (- missing,"
      " + extra, ! shape); is it a checkpoint of another model?\n  "
      + "\n  ".join(diff[:_SHOWN])
      + more
    )
  return unflatten({name: given.get(name, expected[name]) for name in expected})


def to_float32(tree: Any) -> Any:
  """Puts a tree on the device; floats of fewer bits become float32.

  Files hold less than that, and what is trained needs it. Leaf by leaf: no
  float32 copy is left on the host.
  """

  def put(leaf: Any) -> jax.Array:
    # bfloat16 and float8 are foreign to NumPy: they have the kind "V".
    is_float = np.dtype(leaf.dtype).kind in "fV"
    is_small = is_float and leaf.dtype.itemsize < 4
    if isinstance(leaf, jax.Array) and not is_small:
      return leaf
    # A copy always: files may change, and what trains is donated.
    return jnp.array(leaf, jnp.float32 if is_small else None)

  return jax.tree.map(put, tree)


def count(tree: Any) -> int:
  """Returns the number of scalars in all leaves of a tree."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
