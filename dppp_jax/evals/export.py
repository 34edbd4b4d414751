"""An extractor as files that stand alone.

The folder holds `config.json` and `model.safetensors`, which
`dppp_jax.load_extractor` reads, and `features.jaxexport`, a compiled-anywhere
program with the weights inside, which needs nothing but JAX:

    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    features = exported.call(images)            # uint8 [B, H, W, 3], any B
"""

import os
import pathlib

import jax
from jax import export as jax_export
import numpy as np

from dppp_jax import errors, trees
from dppp_jax.evals import extractor as extractor_lib
from dppp_jax.weights import export as export_lib

PROGRAM_FILE = "features.jaxexport"
PLATFORMS = ("cpu", "cuda")


def save(
  extractor: extractor_lib.Extractor, folder: str | os.PathLike
) -> pathlib.Path:
  """Writes an export folder.

  Args:
    extractor: what to write; its parameters are kept in float32.
    folder: must not exist; appears only when all is written.

  Returns:
    The folder.

  Raises:
    errors.UserError: the folder exists.
  """
  with export_lib.new_folder(folder) as scratch:
    export_lib.write_json(
      scratch / extractor_lib.EXPORT_FILE, extractor.spec.to_json()
    )
    export_lib.write_tensors(
      scratch / extractor_lib.WEIGHTS_FILE,
      trees.flatten(extractor.params),
      dtype="float32",
    )
    (scratch / PROGRAM_FILE).write_bytes(program(extractor))
  return pathlib.Path(folder)


def program(extractor: extractor_lib.Extractor) -> bytes:
  """Returns the serialised program: uint8 [B, H, W, 3] -> float32 [B, D].

  B is symbolic, the compute dtype float32, the platforms `PLATFORMS`.
  """
  forward = extractor_lib.make_forward(extractor.spec, "float32")
  (batch,) = jax_export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct(
    (batch, *extractor.spec.image_size, 3), np.uint8
  )
  # Mapped over single images: Python's len(), which modules may ask of a
  # batch, cannot be a symbol.
  one = lambda image: forward(extractor.params, image[None])[0]
  with_weights = jax.jit(jax.vmap(one))
  exported = jax_export.export(with_weights, platforms=PLATFORMS)(images)
  return bytes(exported.serialize())


def load_program(path: str | os.PathLike) -> jax_export.Exported:
  """Reads a program back; `.call(images)` runs it.

  Raises:
    errors.UserError: no file, or not such a program.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise errors.UserError(
      f"{path}: cannot be read ({error.strerror}): give a {PROGRAM_FILE}"
    ) from error
  try:
    return jax_export.deserialize(bytearray(data))
  except Exception as error:  # The reader of the format raises what it likes.
    raise errors.UserError(
      f"{path}: not a program that this JAX reads: export again"
    ) from error
