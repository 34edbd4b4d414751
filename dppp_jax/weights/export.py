"""Checkpoints out: the Hugging Face layout, written whole or not at all."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np
import safetensors.numpy

from dppp_jax import errors, paths, trees, types
from dppp_jax.models import clip as clip_lib
from dppp_jax.weights import convert, rules
from dppp_jax.weights import tokenizer as tokenizer_lib

# What OpenAI normalised its images with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_DTYPES = {"float32": np.float32, "float16": np.float16}


def clip(
  folder: str | pathlib.Path,
  config: clip_lib.Config,
  params: types.Params,
  *,
  dtype: str = "float32",
  tokenizer: Any = None,
  mean: Sequence[float] = CLIP_MEAN,
  std: Sequence[float] = CLIP_STD,
) -> pathlib.Path:
  """Writes a CLIP that `transformers.CLIPModel.from_pretrained` reads.

  Args:
    folder: must not exist; appears only when all is written.
    config: sizes.
    params: the tree of a `CLIP`, without anything else.
    dtype: `float32` or `float16`.
    tokenizer: a CLIPTokenizer whose files shall lie in the folder, or None.
    mean: of the normalisation that the model was trained with, by channel.
    std: likewise.

  Returns:
    The folder.

  Raises:
    errors.UserError: the folder exists, the dtype is another one, or a weight
      is not finite in it.
  """
  trees.merge(clip_lib.param_shapes(config), params, where="export")
  with new_folder(folder) as scratch:
    write_json(scratch / "config.json", config.to_hf())
    write_json(
      scratch / "preprocessor_config.json", _preprocessor(config, mean, std)
    )
    tensors = convert.invert(params, rules.hf_clip(), where="export")
    write_tensors(scratch / "model.safetensors", tensors, dtype=dtype)
    if tokenizer is not None:
      tokenizer_lib.save(tokenizer, scratch)
  return pathlib.Path(folder)


@contextlib.contextmanager
def new_folder(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a scratch folder that becomes `folder` if nothing goes wrong.

  Raises:
    errors.UserError: the folder exists already, or cannot be made.
  """
  folder = paths.expand(folder)
  taken = errors.UserError(
    f"{folder} exists already and is not overwritten: give another name or"
    " remove it"
  )
  if folder.exists():
    raise taken
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(
      tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
    )
  except OSError as error:
    raise errors.UserError(
      f"{folder} cannot be made ({error.strerror}): give another name"
    ) from error
  try:
    yield scratch
    scratch.chmod(0o755)  # mkdtemp's folder is for its owner's eyes only.
    try:
      scratch.rename(folder)
    except OSError as error:  # Somebody else was faster.
      raise taken from error
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def write_tensors(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  *,
  dtype: str,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a .safetensors file, and its bytes to the disk.

  Args:
    path: the file.
    tensors: {name: array}.
    dtype: `float32` or `float16`, of all tensors.
    metadata: texts for the header, beside the format.

  Raises:
    errors.UserError: another dtype, or a number that it cannot hold.
  """
  if dtype not in _DTYPES:
    raise errors.UserError(
      f"dtype {dtype!r} cannot be exported: use one of {', '.join(_DTYPES)}"
    )
  cast = {}
  for name, tensor in tensors.items():
    with np.errstate(over="ignore"):  # Refused below, with the name.
      cast[name] = np.asarray(tensor, _DTYPES[dtype], order="C")
    if not np.isfinite(cast[name]).all():
      raise errors.UserError(
        f"tensor {name} is not finite in {dtype}: export float32, or mend the"
        " weights"
      )
  # transformers reads no file that does not say who may read it.
  header = {"format": "pt", **(metadata or {})}
  safetensors.numpy.save_file(cast, path, metadata=header)
  path.chmod(0o644)  # The library's files are for their owner's eyes only.
  with path.open("rb") as file:
    os.fsync(file.fileno())


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Writes a JSON object for people to read."""
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _preprocessor(
  config: clip_lib.Config, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
  side = config.vision.image_size
  return {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": side},
    "resample": 3,  # PIL's bicubic.
    "do_center_crop": True,
    "crop_size": {"height": side, "width": side},
    "do_convert_rgb": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(mean),
    "image_std": list(std),
  }
