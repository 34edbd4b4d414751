"""U2-Net's checkpoints: the published .pth, .safetensors, and rembg's .onnx."""

from collections.abc import Mapping, Sequence
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, files, paths, trees
from dppp_jax.models import u2net
from dppp_jax.weights import convert, export, hub, onnx

Rule = convert.Rule
# Of what is fetched; the first one that there is, torch's last.
_SUFFIXES = (".safetensors", ".onnx", ".pth", ".pt", ".bin")
_EPSILON = 1e-5  # Of the batch norms.


def rules() -> list[Rule]:
  """Returns the table of the published state dict."""
  conv = "{stage:stage[1-6]d?}.{name:rebnconv(?:in|[1-7]d?)}."
  place = "{stage}/{name}/"
  norm = conv + "bn_s1."
  alone = "{side:side[1-6]|outconv}"
  return [
      Rule(conv + "conv_s1.weight", f"params/{place}conv_s1/kernel",
           convert.CONV),
      Rule(conv + "conv_s1.bias", f"params/{place}conv_s1/bias"),
      Rule(norm + "weight", f"params/{place}bn_s1/scale"),
      Rule(norm + "bias", f"params/{place}bn_s1/bias"),
      Rule(norm + "running_mean", f"batch_stats/{place}bn_s1/mean"),
      Rule(norm + "running_var", f"batch_stats/{place}bn_s1/var"),
      Rule(norm + "num_batches_tracked", None),
      Rule(alone + ".weight", "params/{side}/kernel", convert.CONV),
      Rule(alone + ".bias", "params/{side}/bias"),
  ]  # fmt: skip


def load(
  spec: str | pathlib.Path,
) -> tuple[u2net.Config, dict[str, Any]]:
  """Loads a U2-Net of any width.

  Args:
    spec: a .pth (tensors only; nothing in it is run), .safetensors or .onnx
      file, a folder with one, or a hub id.

  Returns:
    The widths, and {"params": ..., "batch_stats": ...} in the precision of the
    file.

  Raises:
    errors.UserError: it is no U2-Net, or damaged.
  """
  path = locate(spec)
  is_onnx = files.suffix(path) == ".onnx"
  tensors = _from_onnx(path) if is_onnx else hub.read_tensors(path)
  config = _config(tensors, path)
  given = convert.convert(tensors, rules(), where=str(path))
  return config, trees.merge(shapes(config), given, where=str(path))


def resolve(spec: str | pathlib.Path) -> pathlib.Path:
  """Returns the local file or folder; of a hub's, one format is fetched.

  Raises:
    errors.UserError: see `hub.resolve`.
  """
  return hub.resolve(
    spec,
    patterns=["*.json", *(f"*{suffix}" for suffix in _SUFFIXES)],
    has_weights=False,
    choose=_one_format,
  )


def _one_format(files: Sequence[str]) -> list[str]:
  for suffix in _SUFFIXES:
    if any(file.endswith(suffix) for file in files):
      return [file for file in files if file.endswith((suffix, ".json"))]
  return list(files)


def locate(spec: str | pathlib.Path) -> pathlib.Path:
  """Returns the file or folder that `load` reads.

  Raises:
    errors.UserError: see `resolve`; or a folder with several .onnx files.
  """
  path = resolve(spec)
  if not path.is_dir() or files.visible(path, ".safetensors"):
    return path
  found = files.visible(path, ".onnx")
  if len(found) > 1:
    names = ", ".join(file.name for file in found)
    raise errors.UserError(
      f"{path} holds {len(found)} .onnx files ({names}): name one, e.g."
      f" {found[0]}"
    )
  return found[0] if found else path


def save(
  path: str | pathlib.Path,
  variables: Mapping[str, Any],
  *,
  dtype: str = "float32",
) -> None:
  """Writes a .safetensors file under the published names.

  Args:
    path: the file.
    variables: {"params": ..., "batch_stats": ...}.
    dtype: `float32` or `float16`.

  Raises:
    errors.UserError: another dtype, or a weight that is not finite in it.
  """
  variables = {key: variables[key] for key in ("params", "batch_stats")}
  variables = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
  tensors = convert.invert(variables, rules(), where=str(path))
  export.write_tensors(paths.expand(path), tensors, dtype=dtype)


@functools.lru_cache(maxsize=4)
def shapes(config: u2net.Config) -> dict[str, Any]:
  """Returns the shapes of all variables; computes nothing."""
  net = u2net.U2Net(config)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  return jax.eval_shape(net.init, jax.random.key(0), image)


def _config(
  tensors: Mapping[str, np.ndarray], path: pathlib.Path
) -> u2net.Config:
  """Reads the widths off the shapes."""
  if (kind := _other_kind(tensors)) is not None:
    raise errors.UserError(
      f"{path} is {kind}, no U2-Net of people: give u2net.pth, u2netp.pth or"
      " u2net_human_seg.pth, or their .onnx"
    )

  def channels(name: str) -> int:
    kernel = tensors.get(f"{name}.conv_s1.weight")
    if kernel is None or kernel.ndim != 4:
      raise errors.UserError(
        f"{path} is no U2-Net (it has no kernel {name}.conv_s1.weight): give"
        " u2net.pth, u2netp.pth or u2net_human_seg.pth, or their .onnx"
      )
    return kernel.shape[0]

  width = lambda stage: (
    channels(f"{stage}.rebnconv1"),
    channels(f"{stage}.rebnconvin"),
  )
  return u2net.Config(
    tuple(map(width, u2net.ENCODER)), tuple(map(width, u2net.DECODER))
  )


def _other_kind(tensors: Mapping[str, np.ndarray]) -> str | None:
  """Returns what a network for the same purpose is called, if it is one."""
  has = lambda *starts: any(name.startswith(starts) for name in tensors)
  if has("conv_in.") and has("stage1.") and not has("outconv."):
    return "an ISNet (DIS, RMBG 1.4)"
  if has("bb.", "squeeze_module."):
    return "a BiRefNet (RMBG 2.0)"
  if has("backbone.model.features.", "lr_branch."):
    return "a MODNet"
  last = tensors.get("outconv.weight")
  if last is not None and last.ndim == 4 and last.shape[0] != 1:
    return f"a U2-Net of {last.shape[0]} classes (of clothes?)"
  return None


def _in_order() -> list[str]:
  """Returns the names of all convolutions as the network runs them."""
  names = []
  for stage in u2net.ENCODER + u2net.DECODER:
    depth = {"1": 7, "2": 6, "3": 5}.get(stage[5], 4)
    down = ["in", *(str(i) for i in range(1, depth + 1))]
    up = [f"{i}d" for i in range(depth - 1, 0, -1)]
    names += [f"{stage}.rebnconv{part}" for part in down + up]
  return [*names, *(f"side{i}" for i in range(1, 7)), "outconv"]


def _from_onnx(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors under the published names.

  The exporter folds the norms of a network in eval mode: those become the
  identity, and the convolution keeps what it was given.
  """
  convs, names = onnx.read_convs(path), _in_order()
  said = None
  if len(convs) != len(names):
    said = f"it has {len(convs)} convolutions, a U2-Net {len(names)}"
  elif convs[-1].weight.shape[1:] != (6, 1, 1):
    said = "it does not end by joining 6 maps; is it an ISNet?"
  if said is not None:
    raise errors.UserError(
      f"{path} is an ONNX file of another network than a U2-Net ({said}): give"
      " u2net.onnx, u2netp.onnx or u2net_human_seg.onnx"
    )
  tensors = {}
  for name, conv in zip(names, convs, strict=True):
    out = conv.weight.shape[0]
    bias = np.zeros(out, np.float32) if conv.bias is None else conv.bias
    is_alone = "." not in name
    stem = name if is_alone else f"{name}.conv_s1"
    tensors |= {f"{stem}.weight": conv.weight, f"{stem}.bias": bias}
    if is_alone:
      continue
    identity = [np.full(out, v, np.float32) for v in (1, 0, 0, 1 - _EPSILON)]
    parts = ("weight", "bias", "running_mean", "running_var")
    for part, value in zip(parts, conv.norm or identity, strict=True):
      tensors[f"{name}.bn_s1.{part}"] = value
  return tensors
