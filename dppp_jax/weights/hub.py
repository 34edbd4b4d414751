"""From a folder, a file or a hub id to named tensors on the host."""

from collections.abc import Callable, Mapping, Sequence
import fnmatch
import json
import math
import pathlib
import pickle
import re
from typing import Any
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, files, paths

# What is fetched from a hub: repositories also hold the same weights for
# other frameworks, gigabytes of them.
PATTERNS = (
  "*.json",
  "*.txt",
  "model.safetensors",
  "model-*-of-*.safetensors",
  "open_clip_model.safetensors",
)
_PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")

_STEMS = (
  "model",
  "diffusion_pytorch_model",
  "pytorch_model",
  "open_clip_model",
  "open_clip_pytorch_model",
)
_FORMS = (
  ".safetensors",
  ".safetensors.index.json",
  ".fp16.safetensors",
  ".safetensors.index.fp16.json",
  ".bin",
  ".bin.index.json",
)
_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": jnp.bfloat16,
  "F8_E4M3": jnp.float8_e4m3fn,
  "F8_E5M2": jnp.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


def resolve(
  spec: str | pathlib.Path,
  *,
  patterns: Sequence[str] = PATTERNS,
  has_weights: bool = True,
  choose: Callable[[Sequence[str]], Sequence[str]] | None = None,
) -> pathlib.Path:
  """Returns the local folder or file that a user means.

  Args:
    spec: a folder, a file, or the id of a Hugging Face repository
      ("owner/name"), which is fetched into the usual cache. What exists on
      disk goes first.
    patterns: the files of a repository that are fetched.
    has_weights: where none of them are .safetensors, older formats are fetched.
    choose: leaves out of the names of those files what is not needed.

  Raises:
    errors.UserError: there is no such path, and the hub has no such
      repository or cannot be reached.
  """
  path = paths.expand(spec)
  if path.exists():
    return path
  if path.is_symlink():
    raise errors.UserError(
      f"{path} is a link to {path.readlink()}, which does not exist: fetch the"
      " file again, or correct the link"
    )
  text = str(spec)
  parent = path.parent
  is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*", text) is not None
  if not is_id or parent.exists() or files.suffix(path) in _READERS:
    raise errors.UserError(
      f"{text} does not exist: give a folder with config.json and"
      " model.safetensors, a file, or a hub id such as"
      " openai/clip-vit-base-patch16"
    )
  # Slow to import, and not needed for what lies on disk.
  import huggingface_hub

  try:
    if choose is not None:
      patterns = _choose(text, patterns, choose)
    folder = huggingface_hub.snapshot_download(text, allow_patterns=patterns)
    if has_weights and not files.visible(folder, ".safetensors"):
      # Repositories older than safetensors.
      folder = huggingface_hub.snapshot_download(
        text, allow_patterns=[*patterns, *_PICKLES]
      )
  except Exception as error:  # Its own, and those of its library of HTTP.
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise errors.UserError(
      f"{text} is no local path and could not be fetched from the hub"
      f" ({reason}): check the name and the network, or give a local folder"
    ) from error
  return pathlib.Path(folder)


def _choose(
  name: str,
  patterns: Sequence[str],
  choose: Callable[[Sequence[str]], Sequence[str]],
) -> Sequence[str]:
  """Returns the files that are chosen, or patterns where none can be listed."""
  import huggingface_hub

  try:
    files = huggingface_hub.list_repo_files(name)
  except Exception:  # As in `resolve`.
    return patterns  # What was fetched before may still be at hand.
  matches = lambda file: any(fnmatch.fnmatch(file, p) for p in patterns)
  return list(choose([file for file in files if matches(file)]))


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    errors.UserError: the file is missing or holds something else.
  """
  if not path.is_file():
    raise errors.UserError(
      f"{path} does not exist: is {path.parent} a checkpoint folder?"
    )
  values = files.read_json(path)
  if not isinstance(values, dict):
    raise errors.UserError(f"{path} holds no JSON object: fetch it again")
  return values


def read_tensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads all tensors of a file, or of a folder whole or in shards.

  Args:
    path: a .safetensors file, an index of shards, a torch .bin, .pt, .pth or
      .ckpt (only where torch is installed; never executes what it holds), or
      a folder with one of them.

  Returns:
    {name: array} in the dtypes of the file; the arrays may lie in the file
    (memory-mapped, read-only).

  Raises:
    errors.UserError: nothing to read, or it is damaged.
  """
  path = _file(path)
  return _READERS[files.suffix(path)](path)


def metadata(path: str | pathlib.Path) -> dict[str, str]:
  """Returns the texts in the header of a .safetensors file; else none.

  Args:
    path: as of `read_tensors`, which has found it sound; of shards none.
  """
  path = _file(path)
  if files.suffix(path) != ".safetensors":
    return {}
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    values = json.loads(file.read(length)).get("__metadata__")
  return values if isinstance(values, dict) else {}


def weight_files(path: str | pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that `read_tensors` reads: one, or an index and shards.

  Args:
    path: as of `read_tensors`.

  Raises:
    errors.UserError: there is nothing to read.
  """
  path = _file(path)
  is_index = files.suffix(path) == ".json"
  return [path, *_shards(path)] if is_index else [path]


def check(path: str | pathlib.Path) -> None:
  """Refuses damaged weights, where that costs no reading of them.

  A .safetensors file says in its header how long it is; of other formats only
  that the files are there is looked at.

  Args:
    path: as of `read_tensors`.

  Raises:
    errors.UserError: nothing to read, or it is damaged.
  """
  for file in weight_files(path):
    _check_kind(file)
    if files.suffix(file) == ".safetensors":
      _read_safetensors(file)


def _file(path: str | pathlib.Path) -> pathlib.Path:
  """Returns the file that stands for all weights of a path."""
  path = paths.expand(path)
  if path.is_dir():
    path = _weights_in(path)
  if not path.exists():
    raise errors.UserError(f"{path} does not exist: give a checkpoint")
  if files.suffix(path) in _READERS or path.stat().st_size:
    _check_kind(path)
  if files.suffix(path) not in _READERS:
    raise errors.UserError(
      f"{path} is no checkpoint that can be read: give one that ends in"
      f" {', '.join(_READERS)}"
    )
  return path


def _check_kind(path: pathlib.Path) -> None:
  """Refuses what is no file of weights, or of another format than its name."""
  is_index = files.suffix(path) == ".json"
  files.refuse_impostor(path, is_text=is_index)
  if is_index:
    return
  is_safe = files.is_safetensors(path)
  with path.open("rb") as file:
    is_torch = file.read(4).startswith((b"PK\3\4", b"\x80\2"))
  is_named_safe = files.suffix(path) == ".safetensors"
  if is_named_safe and is_torch and not is_safe:
    raise errors.UserError(
      f"{path} is a torch file or a zip archive, no safetensors file, against"
      " its name: rename it to .ckpt (nothing in it is run)"
    )
  if not is_named_safe and is_safe and files.suffix(path) in _READERS:
    raise errors.UserError(
      f"{path} is a safetensors file, against its name: rename it to"
      f" {path.stem}.safetensors"
    )


def _weights_in(folder: pathlib.Path) -> pathlib.Path:
  for form in _FORMS:
    for stem in _STEMS:
      if (path := folder / f"{stem}{form}").is_file():
        return path
  for suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
    found = files.visible(folder, suffix)
    if len(found) == 1:
      return resolve(found[0])  # Says where a broken link leads.
    if found:
      raise errors.UserError(
        f"{folder} holds {len(found)} {suffix} files and none has a usual"
        f" name: name one, e.g. {found[0]}"
      )
  raise errors.UserError(
    f"{folder} holds no weights: a checkpoint folder has model.safetensors (or"
    " its shards with model.safetensors.index.json) beside config.json"
  )


def _weight_map(path: pathlib.Path) -> Mapping[str, Any]:
  weight_map = read_json(path).get("weight_map")
  if not isinstance(weight_map, Mapping) or not weight_map:
    raise errors.UserError(f"{path} lists no shards (weight_map is missing)")
  return weight_map


def _shards(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the shards that an index.json lists."""
  shards = []
  for shard in sorted({str(shard) for shard in _weight_map(path).values()}):
    # The index is data from elsewhere: it may not point out of its folder.
    if pathlib.Path(shard).name != shard:
      raise errors.UserError(
        f"{path} names the shard {shard!r}: not a file name"
      )
    if not (path.parent / shard).is_file():
      raise errors.UserError(
        f"{path.parent / shard} is missing, {path.name} lists it: fetch it"
      )
    shards.append(path.parent / shard)
  return shards


def _read_index(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the shards that an index.json lists, and compares both."""
  weight_map, tensors = _weight_map(path), {}
  for shard in _shards(path):
    tensors |= read_tensors(shard)
  if tensors.keys() != weight_map.keys():
    names = sorted(tensors.keys() ^ weight_map.keys())
    raise errors.UserError(
      f"{path} and its shards differ in {len(names)} tensors, first {names[0]}:"
      " the files are of different checkpoints"
    )
  return tensors


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Maps a .safetensors file.

  The safetensors library has no bfloat16 or float8 for NumPy, so the format,
  8 bytes of length, a JSON header and the raw numbers, is read here.
  """
  size = path.stat().st_size
  raw = np.zeros(0, np.uint8)
  if size:  # An array like any other: what is made of it is in memory.
    raw = np.asarray(np.memmap(path, np.uint8, "r"))
  base = 8 + int.from_bytes(bytes(raw[:8]), "little")
  damaged = lambda why: errors.UserError(
    f"{path} is truncated or no safetensors file ({why}): fetch it again"
  )
  if size < 8 or base > size:
    raise damaged("the header is incomplete")
  tensors = {}
  try:
    header = json.loads(bytes(raw[8:base]), object_pairs_hook=files.unique)
    header.pop("__metadata__", None)
    entries = [
      (name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
      for name, entry in header.items()
    ]
    is_sound = all(
      isinstance(kind, str)
      and all(type(n) is int and n >= 0 for n in (*shape, start, end))
      for _, kind, shape, start, end in entries
    )
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise damaged(f"the header cannot be read, {error}") from error
  except RecursionError as error:
    raise damaged("the header is nested without end") from error
  if not is_sound:
    raise damaged("the header holds something else than sizes")
  for name, kind, shape, start, end in entries:
    if kind not in _DTYPES:
      raise errors.UserError(
        f"{path}: tensor {name} has the type {kind}, which is not supported:"
        " convert it to F16 or F32"
      )
    dtype = np.dtype(_DTYPES[kind])
    if end - start != dtype.itemsize * math.prod(shape):
      raise damaged(f"tensor {name} has another size than its shape")
    if base + end > size:
      raise damaged(f"tensor {name} ends at byte {base + end} of {size}")
    tensors[name] = raw[base + start : base + end].view(dtype).reshape(shape)
  return tensors


def _read_pickle(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a torch file with the loader that unpickles tensors only."""
  recipe = (
    'convert it where torch is: python -c "import torch, safetensors.torch as'
    f" s; s.save_file(torch.load('{path.name}', weights_only=True),"
    " 'model.safetensors')\""
  )
  try:
    import torch
  except ImportError as error:
    raise errors.UserError(
      f"{path} is a torch file and torch is not installed: {recipe}"
    ) from error
  if _is_torchscript(path):
    raise errors.UserError(
      f"{path} is a TorchScript archive, a program and not only tensors: if"
      ' you trust it, convert it: python -c "import torch, safetensors.torch'
      f" as s; d = torch.jit.load('{path.name}', 'cpu').state_dict();"
      " s.save_file({k: v.contiguous() for k, v in d.items()},"
      " 'model.safetensors')\""
    )
  try:
    with warnings.catch_warnings():
      # An older pickle protocol is either read or refused: no third outcome.
      warnings.simplefilter("ignore")
      values = torch.load(path, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    raise errors.UserError(
      f"{path} holds more than tensors, or is no torch file; nothing of it was"
      " run: use the .safetensors of the same model"
    ) from error
  except Exception as error:  # Of damage the loader raises many kinds.
    raise errors.UserError(
      f"{path} is truncated or no torch file"
      f" ({str(error).splitlines()[0] if str(error) else 'empty'}): fetch it"
      " again"
    ) from error
  for key in ("state_dict", "model"):
    if isinstance(values, Mapping) and isinstance(values.get(key), Mapping):
      values = values[key]  # A training checkpoint around the weights.
  if not isinstance(values, Mapping):
    values = {}
  tensors = {
    # OpenCLIP's checkpoints were saved from inside DistributedDataParallel.
    str(name).removeprefix("module."): _to_numpy(
      torch, value, f"{path}: tensor {name}"
    )
    for name, value in values.items()
    if isinstance(value, torch.Tensor)
  }
  if not tensors:
    raise errors.UserError(f"{path} holds no tensors by name: wrong file?")
  return tensors


def _is_torchscript(path: pathlib.Path) -> bool:
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
    return False  # Whether it is damaged, torch says.
  return any(name.endswith("/constants.pkl") for name in names)


def _to_numpy(torch: Any, tensor: Any, where: str) -> np.ndarray:
  unknown = {  # To NumPy under torch: torch's type of equal width, JAX's type.
    torch.bfloat16: (torch.int16, jnp.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, jnp.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, jnp.float8_e5m2),
  }
  try:
    tensor = tensor.detach().contiguous().resolve_neg()
    if tensor.dtype in unknown:
      raw, dtype = unknown[tensor.dtype]
      return tensor.view(raw).numpy().view(dtype)
    array = None if tensor.is_complex() else tensor.numpy()
  except (RuntimeError, TypeError, NotImplementedError):
    array = None
  if array is None:
    raise errors.UserError(
      f"{where} is {tensor.layout} of {tensor.dtype} on {tensor.device}, which"
      " is not supported: convert it to a dense tensor of float16 or float32"
    )
  return array


_READERS = {
  ".safetensors": _read_safetensors,
  ".json": _read_index,
  ".bin": _read_pickle,
  ".pt": _read_pickle,
  ".pth": _read_pickle,
  ".ckpt": _read_pickle,
}
