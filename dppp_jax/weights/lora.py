"""LoRAs and their kin, merged into the weights before anything is compiled.

    trees, reports = lora.merge(
      {"unet": unet, "text_encoder": te1, "text_encoder_2": te2},
      [lora.Lora("enhance.safetensors", scale=0.8), lora.Lora("style.pt")],
    )

A merged network costs nothing at run time, and another set of LoRAs is only
other numbers for the same program. All deltas refer to the weights W as they
were given, so the order of the files does not matter, DoRAs included:

    W' = W + sum_k s_k delta_k(W)
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import Any

from absl import logging
import numpy as np

from dppp_jax import errors, logs, trees, types
from dppp_jax.weights import convert, kinds, lora_keys

_SHOWN = 3  # Names in an error.
_LEAVES = ("kernel", "scale", "embedding")


@dataclasses.dataclass(frozen=True)
class Lora:
  """One file, and how strongly it counts.

  Attributes:
    path: a file of any name, a folder with one, or a hub id.
    scale: s of all its deltas; negative takes away what the file adds.
    unet_scale: for the UNet instead of `scale`.
    text_scale: for the text encoders instead of `scale`; 0 leaves them as
      they are.
  """

  path: str | pathlib.Path
  scale: float = 1.0
  unet_scale: float | None = None
  text_scale: float | None = None

  def __post_init__(self):
    for name in ("scale", "unet_scale", "text_scale"):
      value = getattr(self, name)
      if value is not None and not math.isfinite(value):
        raise errors.UserError(
          f"LoRA {self.path}: {name} is {value}: give a finite number"
        )

  def scale_of(self, component: str) -> float:
    """Returns s for a component."""
    own = self.unet_scale if component == "unet" else self.text_scale
    return self.scale if own is None else own


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of a file.

  Attributes:
    path: of the file.
    matched: number of merged modules by component.
    kinds: number of merged modules by kind of delta ("lora", "loha", ...).
    unmatched: what the networks do not have.
    skipped: modules of components whose scale is 0.
  """

  path: pathlib.Path
  matched: Mapping[str, int]
  kinds: Mapping[str, int]
  unmatched: tuple[str, ...]
  skipped: int

  def __str__(self) -> str:
    list_ = lambda counts: ", ".join(f"{n} {k}" for k, n in counts.items())
    return (
      f"{self.path}: merged {list_(self.matched) or 'nothing'}"
      f" ({list_(self.kinds)}); {len(self.unmatched)} unmatched,"
      f" {self.skipped} skipped"
    )


def merge(
  components: Mapping[str, types.Params],
  loras: Sequence[Lora],
  *,
  allow_unmatched: bool = False,
) -> tuple[dict[str, types.Params], list[Report]]:
  """Merges LoRA files into the weights of a pipeline, in float32.

  Args:
    components: trees of `unet`, `text_encoder` and `text_encoder_2`, or of
      some of them; transformers stacked or not.
    loras: the files.
    allow_unmatched: merge what fits, where a file has modules that the
      networks do not have; the report names them.

  Returns:
    New trees, in which the leaves that no file changes are those given, and
    the others float32 (or the dtype given, if that has more bits): they are
    rounded once, by whoever makes them less. And a report for each file.

  Raises:
    errors.UserError: a file that is damaged, that is made for another base
      model, or of which modules would go unused. Nothing is merged then.
  """
  merging = Merge(components, loras, allow_unmatched=allow_unmatched)
  merged = {}
  for component, tree in components.items():
    flat = trees.flatten(tree)
    names = logs.progress(flat, desc=f"merging into {component}")
    merged[component] = trees.unflatten(
      {name: merging.leaf(component, name, flat) for name in names}
    )
  return merged, merging.reports()


class Merge:
  """Files that are open, and merged into one leaf after the other.

  A network of which each leaf goes to the device at once needs no float32
  copy of itself.
  """

  def __init__(
    self,
    components: Mapping[str, types.Params],
    loras: Sequence[Lora],
    *,
    allow_unmatched: bool = False,
  ):
    """Opens the files, and refuses what their names alone show to be wrong.

    Args:
      components: trees of shapes or of weights, as in `merge`.
      loras: the files.
      allow_unmatched: as in `merge`.

    Raises:
      errors.UserError: as `merge`; factors of other sizes show only there.
    """
    for name in components:
      if name not in lora_keys.COMPONENTS:
        raise ValueError(f"{name} is none of {lora_keys.COMPONENTS}")
    names = lora_keys.table(components)
    self._states = []
    self._modules: dict[tuple[str, str], list[Any]] = {}
    for lora in loras:
      state = _State(lora, lora_keys.read(lora.path, names))
      _check_matched(lora, state.file, allow_unmatched)
      self._states.append(state)
      for target in state.file.modules:
        if lora.scale_of(target.component) == 0:
          state.skipped += 1
          continue
        key = (target.component, target.path)
        self._modules.setdefault(key, []).append((state, target))

  def leaf(
    self, component: str, name: str, flat: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    """Returns a leaf with all deltas, the leaf itself where there are none.

    Args:
      component: of which tree.
      name: of the leaf.
      flat: the tree as it was before any delta.
    """
    path, _, kind = name.rpartition("/")
    leaf = flat[name]
    merged = None
    for state, target in self._modules.get((component, path), ()):
      parts = state.file.modules[target]
      if kind == "bias" and not {"diff_b", "up_bias"} & parts.keys():
        continue
      main = next(n for k in _LEAVES if (n := f"{path}/{k}") in flat)
      weight = _torch_view(np.asarray(flat[main]), main, target.index)
      where = f"{state.file.path}: {component}/{path}"
      found, delta, bias = _delta(parts, weight, where)
      if name == main:
        state.count(component, found)
        if bias is not None and f"{path}/bias" not in flat:
          state.misfits.append(f"{path} wants None and gets {bias.shape}")
      value = bias if kind == "bias" else delta
      if value is None:
        continue
      state.is_empty = state.is_empty and not np.any(value)
      shape = _torch_view(leaf, name, target.index).shape
      if not _fits(value.shape, shape):
        state.misfits.append(f"{path} wants {shape} and gets {value.shape}")
        continue
      if merged is None:  # In the order of the file, and so of the deltas.
        merged = np.array(leaf, np.float32, order="K")
      view = _torch_view(merged, name, target.index)
      view += np.float32(state.lora.scale_of(component)) * value.reshape(shape)
    if merged is None:
      return leaf
    return merged.astype(leaf.dtype) if leaf.dtype.itemsize > 4 else merged

  def reports(self) -> list[Report]:
    """Returns a report for each file, when all leaves were asked for.

    Raises:
      errors.UserError: a file whose factors have other sizes.
    """
    for state in self._states:
      state.check()
      logging.info("LoRA %s", state.report())
    return [state.report() for state in self._states]


@dataclasses.dataclass
class _State:
  """A file in the making.

  Attributes:
    lora: its scales.
    file: its tensors.
    matched: as in `Report`.
    kinds: as in `Report`.
    misfits: modules of other shapes.
    skipped: as in `Report`.
    is_empty: whether all deltas so far are 0.
  """

  lora: Lora
  file: lora_keys.File
  matched: dict[str, int] = dataclasses.field(default_factory=dict)
  kinds: dict[str, int] = dataclasses.field(default_factory=dict)
  misfits: list[str] = dataclasses.field(default_factory=list)
  skipped: int = 0
  is_empty: bool = True

  def count(self, component: str, kind: str) -> None:
    """Counts a merged module."""
    self.matched[component] = self.matched.get(component, 0) + 1
    self.kinds[kind] = self.kinds.get(kind, 0) + 1

  def check(self) -> None:
    """Refuses modules of other shapes, and a file that changes nothing."""
    if self.misfits:
      raise errors.UserError(
        f"{self.file.path} is made for another base model:"
        f" {len(self.misfits)} of {len(self.file.modules)} modules have other"
        f" shapes, first {self.misfits[0]}{_base(self.file)}"
      )
    if self.matched and self.is_empty:
      raise errors.UserError(
        f"{self.file.path} changes nothing: all that it would add is 0; it was"
        " never trained, or is damaged: use another one, or leave it out"
      )

  def report(self) -> Report:
    """Returns what became of it."""
    # Components in the order of the file, not in that of the leaves.
    order = dict.fromkeys(target.component for target in self.file.modules)
    return Report(
      self.file.path,
      {name: self.matched[name] for name in order if name in self.matched},
      self.kinds,
      tuple(self.file.unmatched),
      self.skipped,
    )


def _check_matched(lora: Lora, file: lora_keys.File, allow: bool) -> None:
  """Refuses a file of which something would silently be left out."""
  unmatched = [
    name
    for name in file.unmatched
    if lora.scale_of(lora_keys.component(name)) != 0
  ]
  count = len(file.modules) + len(unmatched)
  if not file.modules and file.foreign:
    raise errors.UserError(
      f"{file.path} holds {', '.join(file.foreign)}, which is not merged here"
      f" ({len(file.unmatched)} modules, first"
      f" {', '.join(file.unmatched[:_SHOWN])}): use a LoRA, LoHa or LoKr of the"
      " same"
    )
  if not file.modules:
    kind = kinds.called(file.unmatched)
    said = f"{kind}; " if kind else ""
    raise errors.UserError(
      f"{file.path} matches no module of this base model (it holds {said}"
      f"{', '.join(file.unmatched[:_SHOWN]) or 'nothing'}): is it a LoRA, and"
      " for this kind of Stable Diffusion?"
    )
  if unmatched and not allow:
    raise errors.UserError(
      f"{file.path}: {len(unmatched)} of {count} modules are not in this base"
      f" model, first {', '.join(unmatched[:_SHOWN])}{_base(file)}: use a LoRA"
      " for this base, or allow unmatched modules"
    )


def _base(file: lora_keys.File) -> str:
  """Returns what kohya's scripts note about the base, for the errors."""
  base = file.metadata.get("ss_base_model_version")
  return f" (it says it is for {base})" if base else ""


def _torch_view(leaf: np.ndarray, name: str, index: int | None) -> np.ndarray:
  """Returns a view of a leaf, or of one of its layers, in torch's layout."""
  if index is not None:
    leaf = leaf[index]
  if not name.endswith("/kernel"):
    return leaf
  return leaf.T if leaf.ndim == 2 else leaf.transpose(3, 2, 0, 1)


def _fits(delta: tuple[int, ...], weight: tuple[int, ...]) -> bool:
  """Tells whether a delta is the weight's shape, or the same flattened.

  Linear layers and 1x1 convolutions stand for each other; LyCORIS writes the
  factors of convolutions as matrices [out, in * height * width].
  """
  squeeze = lambda shape: shape[:2] + tuple(n for n in shape[2:] if n != 1)
  flat = (weight[0], math.prod(weight[1:]))
  return squeeze(delta) == squeeze(weight) or (
    len(weight) == 4 and delta == flat
  )


def _delta(
  parts: Mapping[str, np.ndarray], weight: np.ndarray, where: str
) -> tuple[str, np.ndarray | None, np.ndarray | None]:
  """Returns the kind, and what is added to weight and bias at scale 1.

  Args:
    parts: of `lora_keys.File`.
    weight: W in torch's layout and in any precision.
    where: file and module, for the errors.

  Raises:
    errors.UserError: parts are missing or left over, or do not go together.
  """
  left = {name: np.asarray(part, np.float32) for name, part in parts.items()}
  bias = left.pop("diff_b", None)
  kind, delta = "bias", None
  try:
    for name, marks, product in _KINDS:
      if not any(mark in left for mark in marks):
        continue
      if delta is not None:
        raise ValueError(f"{kind} and {name} at once")
      kind = name
      with np.errstate(over="ignore", invalid="ignore"):  # Looked at below.
        factor, delta = product(left, weight)
        if factor != 1:
          delta = factor * delta
        delta = np.asarray(delta, np.float32)
      if "up_bias" in left:
        more = factor * left.pop("up_bias")
        bias = more if bias is None else bias + more
    magnitude = left.pop("dora", None)
    is_per_output = "magnitude" in left
    magnitude = left.pop("magnitude", magnitude)
    if delta is not None and magnitude is not None:
      kind = f"dora of {kind}"
      if _fits(delta.shape, weight.shape):
        delta = delta.reshape(weight.shape)
        delta = _decompose(weight, delta, magnitude, is_per_output)
  except KeyError as error:
    raise errors.UserError(
      f"{where} is incomplete: {error.args[0]} is missing; the file was not"
      " written to its end"
    ) from error
  except (ValueError, IndexError) as error:
    raise errors.UserError(
      f"{where}: its factors do not go together"
      f" ({str(error).splitlines()[0]}): the file is damaged"
    ) from error
  for part in (delta, bias):
    if part is not None and not convert.is_finite(part):
      raise errors.UserError(
        f"{where}: the product of its factors is not finite: its training"
        " diverged, or the file is damaged; use another one"
      )
  left.pop("alpha", None)
  if left:
    raise errors.UserError(
      f"{where} has the parts {', '.join(sorted(left))}, which do not belong"
      f" to the others ({kind}): the file is damaged"
    )
  return kind, delta, bias


def _ratio(left: dict[str, Any], rank: int | None) -> np.float32:
  """Returns alpha / r, 1 where a file gives no alpha."""
  alpha = left.pop("alpha", None)
  if alpha is None or rank is None:
    return np.float32(1)
  if not rank:
    raise ValueError("their rank is 0")
  return np.float32(np.asarray(alpha).reshape(()) / rank)


def _lora(left: dict[str, Any], weight: np.ndarray) -> Any:
  """B A, between which a convolution's Tucker core may stand (LoCon)."""
  del weight
  up, down = left.pop("up"), left.pop("down")
  core = left.pop("mid", None)
  rank = down.shape[0]
  matrix = up.reshape(up.shape[0], -1)
  if core is not None:
    delta = _tucker(core, matrix.T, down.reshape(rank, -1))
  else:
    flat = matrix @ down.reshape(rank, -1)
    delta = flat.reshape(up.shape[0], *down.shape[1:])
  return _ratio(left, rank), delta


def _loha(left: dict[str, Any], weight: np.ndarray) -> Any:
  """(W1a W1b) * (W2a W2b), elementwise (FedPara)."""
  del weight
  rank = left["hada_w1_b"].shape[0]
  halves = []
  for n in "12":
    a, b = left.pop(f"hada_w{n}_a"), left.pop(f"hada_w{n}_b")
    core = left.pop(f"hada_t{n}", None)
    halves.append(a @ b if core is None else _tucker(core, a, b))
  if halves[0].shape != halves[1].shape:
    raise ValueError(f"{halves[0].shape} and {halves[1].shape}")
  return _ratio(left, rank), halves[0] * halves[1]


def _lokr(left: dict[str, Any], weight: np.ndarray) -> Any:
  """W1 (x) W2, Kronecker, each of them whole or a product."""
  del weight
  factors, rank = [], None
  for n in "12":
    whole = left.pop(f"lokr_w{n}", None)
    if whole is None:
      a, b = left.pop(f"lokr_w{n}_a"), left.pop(f"lokr_w{n}_b")
      core = left.pop("lokr_t2", None) if n == "2" else None
      rank = b.shape[0]
      whole = a @ b if core is None else _tucker(core, a, b)
    factors.append(whole)
  first, second = factors
  ones = (1,) * (second.ndim - first.ndim)
  # Where both are whole there is no rank, and LyCORIS ignores its alpha.
  return _ratio(left, rank), np.kron(first.reshape(first.shape + ones), second)


def _full(left: dict[str, Any], weight: np.ndarray) -> Any:
  """All of the difference."""
  del weight
  left.pop("alpha", None)
  return np.float32(1), left.pop("diff")


def _ia3(left: dict[str, Any], weight: np.ndarray) -> Any:
  """A factor for each input or output."""
  factor, on_input = left.pop("ia3"), left.pop("on_input")
  left.pop("alpha", None)
  axis = 1 if on_input.any() else 0
  if factor.size != weight.shape[axis]:
    return np.float32(1), factor  # Reported as a misfit.
  shape = [1] * weight.ndim
  shape[axis] = -1
  return np.float32(1), np.asarray(weight, np.float32) * factor.reshape(shape)


def _tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns sum_ij core[i, j, ...] a[i, out] b[j, in]: [out, in, ...]."""
  return np.einsum("ij...,ip,jr->pr...", core, a, b, optimize=True)


def _decompose(
  weight: np.ndarray,
  delta: np.ndarray,
  magnitude: np.ndarray,
  is_per_output: bool,
) -> np.ndarray:
  """Returns what DoRA adds: m V / |V| - W for V = W + delta.

  The norm is over the inputs of each output (the paper, peft), or over the
  outputs of each input (LyCORIS' first versions, dora_scale [1, in]).
  """
  weight = np.asarray(weight, np.float32)
  whole = weight + delta
  is_row = magnitude.ndim > 1 and magnitude.shape[0] == 1 != weight.shape[0]
  axis = 1 if is_row and not is_per_output else 0
  shape = [1] * weight.ndim
  shape[axis] = weight.shape[axis]
  others = tuple(n for n in range(weight.ndim) if n != axis)
  norm = np.sqrt(np.square(whole).sum(others, keepdims=True))
  tiny = np.finfo(np.float32).eps
  return magnitude.reshape(shape) * whole / np.maximum(norm, tiny) - weight


# Name, parts that show it, and (parts, W) -> (alpha / r, delta); the parts that
# it uses are taken out.
_KINDS = (
  ("lora", ("up", "down", "mid", "up_bias"), _lora),
  ("loha", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha),
  ("lokr", ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"), _lokr),
  ("full", ("diff",), _full),
  ("ia3", ("ia3", "on_input"), _ia3),
)
