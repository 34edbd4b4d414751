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
from dppp_jax.weights import lora_keys

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
    New trees, in which the leaves that no file changes are those given; and a
    report for each file.

  Raises:
    errors.UserError: a file that is damaged, that is made for another base
      model, or of which modules would go unused. Nothing is merged then.
  """
  for name in components:
    if name not in lora_keys.COMPONENTS:
      raise ValueError(f"{name} is none of {lora_keys.COMPONENTS}")
  names = lora_keys.table(components)
  files = [lora_keys.read(lora.path, names) for lora in loras]
  given = {name: trees.flatten(tree) for name, tree in components.items()}
  merged: dict[tuple[str, str], np.ndarray] = {}
  reports = []
  for lora, file in zip(loras, files, strict=True):
    _check_matched(lora, file, allow_unmatched)
    reports.append(_merge_file(lora, file, given, merged))
    logging.info("LoRA %s", reports[-1])
  for (component, name), leaf in merged.items():
    given[component][name] = leaf.astype(given[component][name].dtype)
  return {k: trees.unflatten(flat) for k, flat in given.items()}, reports


def check(
  components: Mapping[str, types.Params],
  loras: Sequence[Lora],
  *,
  allow_unmatched: bool = False,
) -> None:
  """Refuses what `merge` refuses by names alone, before weights are read.

  Args:
    components: trees of the shapes of all components of the pipeline, as
      `param_shapes` of the networks gives them.
    loras: the files.
    allow_unmatched: as in `merge`.

  Raises:
    errors.UserError: as `merge`; factors of other sizes show only there.
  """
  names = lora_keys.table(components)
  for lora in loras:
    _check_matched(lora, lora_keys.read(lora.path, names), allow_unmatched)


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
    raise errors.UserError(
      f"{file.path} matches no module of this base model (it holds"
      f" {', '.join(file.unmatched[:_SHOWN]) or 'nothing'}): is it a LoRA, and"
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


def _merge_file(
  lora: Lora,
  file: lora_keys.File,
  given: Mapping[str, Mapping[str, np.ndarray]],
  merged: dict[tuple[str, str], np.ndarray],
) -> Report:
  """Adds one file's deltas to `merged`, which begins as copies of `given`."""
  matched: dict[str, int] = {}
  kinds: dict[str, int] = {}
  misfits = []
  skipped, is_empty = 0, True
  desc = f"merging {file.path.name}"
  for target, parts in logs.progress(file.modules.items(), desc=desc):
    scale = lora.scale_of(target.component)
    if scale == 0:
      skipped += 1
      continue
    flat = given[target.component]
    where = f"{file.path}: {target.component}/{target.path}"
    leaf = next(n for k in _LEAVES if (n := f"{target.path}/{k}") in flat)
    weight = _torch_view(np.asarray(flat[leaf]), leaf, target.index)
    kind, delta, bias = _delta(parts, weight, where)
    for name, value in ((leaf, delta), (f"{target.path}/bias", bias)):
      if value is None:
        continue
      is_empty = is_empty and not np.any(value)
      shape = None
      if name in flat:
        whole = merged.get((target.component, name), flat[name])
        shape = _torch_view(whole, name, target.index).shape
      if shape is None or not _fits(value.shape, shape):
        misfits.append(f"{target.path} wants {shape} and gets {value.shape}")
        continue
      if (target.component, name) not in merged:
        whole = np.array(flat[name], np.float32)
        merged[target.component, name] = whole
      view = _torch_view(whole, name, target.index)
      view += np.float32(scale) * value.reshape(shape)
    matched[target.component] = matched.get(target.component, 0) + 1
    kinds[kind] = kinds.get(kind, 0) + 1
  if misfits:
    raise errors.UserError(
      f"{file.path} is made for another base model: {len(misfits)} of"
      f" {len(file.modules)} modules have other shapes, first"
      f" {misfits[0]}{_base(file)}"
    )
  if matched and is_empty:
    raise errors.UserError(
      f"{file.path} changes nothing: all that it would add is 0; it was never"
      " trained, or is damaged: use another one, or leave it out"
    )
  return Report(file.path, matched, kinds, tuple(file.unmatched), skipped)


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
    weight: W in torch's layout.
    where: file and module, for the errors.

  Raises:
    errors.UserError: parts are missing or left over, or do not go together.
  """
  left = dict(parts)
  bias = left.pop("diff_b", None)
  kind, delta = "bias", None
  try:
    for name, marks, product in _KINDS:
      if not any(mark in left for mark in marks):
        continue
      if delta is not None:
        raise ValueError(f"{kind} and {name} at once")
      kind = name
      factor, delta = product(left, weight)
      if "up_bias" in left:
        more = factor * left.pop("up_bias")
        bias = more if bias is None else bias + more
      delta = np.asarray(factor * delta, np.float32)
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
  return np.float32(1), weight * factor.reshape(shape)


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
  whole = np.asarray(weight, np.float32) + delta
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
