"""UNets, ControlNets and VAEs from and to the folders of diffusers.

    config, params = diffusers_folder.unet("stable-diffusion-xl-base-1.0/unet")

The folder is that of the network (config.json and weights, whole or in shards,
of any variant) or that of a pipeline, with `unet/`, `vae/` and `controlnet/` in
it. Parameters are nested dicts of NumPy arrays in the precision of the file,
views of the file itself (`trees.to_float32` makes them float32).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
import re
from typing import Any, NamedTuple

from dppp_jax import errors, trees, types
from dppp_jax.models import controlnet as controlnet_lib
from dppp_jax.models import controlnet_union, unet_config
from dppp_jax.models import unet as unet_lib
from dppp_jax.models import vae as vae_lib
from dppp_jax.weights import convert, diffusion_rules, export, hub

Path = str | pathlib.Path


class _Kind(NamedTuple):
  """What is different between the networks.

  Attributes:
    config: its dataclass.
    shapes: (config) -> tree of shapes.
    rules: (config) -> table.
  """

  config: type[Any]
  shapes: Callable[[Any], types.Params]
  rules: Callable[[Any], Sequence[convert.Rule]]


_KINDS = {
  "UNet2DConditionModel": _Kind(
    unet_config.Config, unet_lib.param_shapes, diffusion_rules.unet
  ),
  "ControlNetModel": _Kind(
    unet_config.ControlNetConfig,
    controlnet_lib.param_shapes,
    diffusion_rules.controlnet,
  ),
  "ControlNetUnionModel": _Kind(
    unet_config.UnionConfig,
    controlnet_union.param_shapes,
    diffusion_rules.controlnet_union,
  ),
  "AutoencoderKL": _Kind(
    vae_lib.Config,
    vae_lib.param_shapes,
    lambda _: diffusion_rules.autoencoder(),
  ),
}

_CLASSES = {
  "unet": ("UNet2DConditionModel",),
  "vae": ("AutoencoderKL",),
  "controlnet": ("ControlNetModel", "ControlNetUnionModel"),
}

_STEM = "diffusion_pytorch_model"
# A file of weights, or the index of its shards, its precision and format.
_WEIGHTS = re.compile(
  rf"({_STEM}|(pytorch_)?model)(\.(?P<a>[^.-]+))?(-\d+-of-\d+)?"
  r"\.(?P<form>safetensors|bin)(\.index(\.(?P<b>[^.]+))?\.json)?"
)
# Of a hub repository: the configurations and weights.
_PATTERNS = (
  "*.json",
  "*/*.json",
  "*.txt",
  "*/*.txt",
  "*.safetensors",
  "*/*.safetensors",
  "*pytorch_model*.bin",
)


def resolve(path: Path, *, variant: str | None = None) -> pathlib.Path:
  """Returns the local folder or file of a pipeline or of a network.

  Of a hub's repository one precision is fetched, and of a pipeline's no other
  file of weights than those of its parts: SDXL's holds the same ones five
  times, in files for other programs.

  Args:
    path: a folder, a file or a hub id.
    variant: the precision, e.g. "fp16"; None: the plain one, or the only one.

  Raises:
    errors.UserError: see `hub.resolve`.
  """
  choose = functools.partial(_needed, variant=variant)
  # The weights of a pipeline lie below: those missing are found out later.
  return hub.resolve(path, patterns=_PATTERNS, has_weights=False, choose=choose)


def _needed(files: Sequence[str], *, variant: str | None) -> list[str]:
  is_pipeline = "model_index.json" in files
  kept, folders = [], {}
  for file in files:
    folder, _, name = file.rpartition("/")
    found = _WEIGHTS.fullmatch(name)
    if found:
      precisions = folders.setdefault((folder, found["form"]), {})
      precisions.setdefault(found["a"] or found["b"], []).append(file)
    elif folder or not is_pipeline or not name.endswith(".safetensors"):
      kept.append(file)
  is_safe = lambda file: file.endswith(".safetensors")
  safe = {file.rpartition("/")[0] for file in filter(is_safe, files)}
  for (folder, form), precisions in folders.items():
    if form == "bin" and folder in safe:
      continue  # The same weights.
    wanted = variant if variant in precisions else None
    # None of both: whoever reads them says what there is.
    every = [file for some in precisions.values() for file in some]
    kept += precisions.get(wanted, every)
  return kept


def unet(
  path: Path, *, variant: str | None = None, stack_from: int = 0
) -> tuple[unet_config.Config, types.Params]:
  """Loads a UNet2DConditionModel.

  Args:
    path: folder of the network or of a pipeline, or a hub id; or one weight
      file with config.json beside it.
    variant: which of several precisions to read, e.g. "fp16"; None: the
      plain one, or else the only one.
    stack_from: transformers at least so deep come stacked, as
      `UNet(stack_from=)` wants them.

  Returns:
    The configuration and parameters of `unet.UNet`.

  Raises:
    errors.UserError: no such folder, a damaged file, a configuration that is
      not built here, or weights that do not fit it.
  """
  return _load(path, "unet", variant, stack_from)


def controlnet(
  path: Path, *, variant: str | None = None, stack_from: int = 0
) -> tuple[unet_config.ControlNetConfig, types.Params]:
  """Loads a ControlNetModel or a ControlNetUnionModel.

  Args:
    path: as in `unet`; of a pipeline its first ControlNet.
    variant: as in `unet`; where it is absent, what there is is read.
    stack_from: as in `unet`.

  Returns:
    The configuration, a `unet_config.UnionConfig` for a union, and the
    parameters of `controlnet_union.build(config)`.

  Raises:
    errors.UserError: as in `unet`.
  """
  return _load(path, "controlnet", variant, stack_from)


def controlnets(
  path: Path, *, variant: str | None = None, stack_from: int = 0
) -> list[tuple[unet_config.ControlNetConfig, types.Params]]:
  """Loads all ControlNets of a pipeline: `controlnet`, `controlnet_1` ...

  Args:
    path: folder of a pipeline.
    variant: as in `controlnet`.
    stack_from: as in `unet`.

  Returns:
    One pair for each, as `controlnet` gives them.

  Raises:
    errors.UserError: as in `unet`, or the pipeline has none.
  """
  root = resolve(path, variant=variant)
  folders = [root / "controlnet"]
  while (root / f"controlnet_{len(folders)}").is_dir():
    folders.append(root / f"controlnet_{len(folders)}")
  return [
    controlnet(folder, variant=variant, stack_from=stack_from)
    for folder in folders
  ]


def vae(
  path: Path, *, variant: str | None = None
) -> tuple[vae_lib.Config, types.Params]:
  """Loads an AutoencoderKL.

  Args:
    path: as in `unet`.
    variant: as in `unet`.

  Returns:
    The configuration and parameters of `vae.VAE`.

  Raises:
    errors.UserError: as in `unet`.
  """
  return _load(path, "vae", variant, 0)


def read_config(path: Path, component: str) -> Any:
  """Returns the configuration that loading would, without the weights.

  Args:
    path: as in `unet`.
    component: `unet`, `vae` or `controlnet`.

  Raises:
    errors.UserError: as in `unet`.
  """
  _, values = _find(path, component)
  return _kind(values, _CLASSES[component]).config.from_hf(values)


def weights(
  path: Path, component: str, *, variant: str | None = None
) -> pathlib.Path:
  """Returns the file or folder that `hub.read_tensors` is given.

  Args:
    path: as in `unet`.
    component: `unet`, `vae` or `controlnet`.
    variant: as in `unet` or `controlnet`.

  Raises:
    errors.UserError: no such folder, or not in this variant.
  """
  found, _ = _find(path, component, variant)
  return _variant(found, component, variant)


def save(
  folder: Path, config: Any, params: types.Params, *, dtype: str = "float32"
) -> pathlib.Path:
  """Writes a network that diffusers' `from_pretrained` reads.

  Args:
    folder: must not exist; appears only when all is written.
    config: of a UNet, ControlNet, union or VAE.
    params: its parameters, transformers stacked or not.
    dtype: `float32` or `float16`.

  Returns:
    The folder.

  Raises:
    errors.UserError: the folder exists, the parameters are not those of the
      configuration, or a weight is not finite in the dtype.
  """
  ((name, kind),) = [
    pair for pair in _KINDS.items() if pair[1].config is type(config)
  ]
  params = diffusion_rules.unstack_layers(params)
  trees.merge(kind.shapes(config), params, where="export")
  tensors = convert.invert(params, kind.rules(config), where="export")
  with export.new_folder(folder) as scratch:
    values = {"_class_name": name, **dataclasses.asdict(config)}
    if name == "ControlNetUnionModel":
      del values["mid_block_type"]  # It has only one, and no such key.
    export.write_json(scratch / "config.json", values)
    export.write_tensors(scratch / f"{_STEM}.safetensors", tensors, dtype=dtype)
  return pathlib.Path(folder)


def _find(
  path: Path, component: str, variant: str | None = None
) -> tuple[pathlib.Path, dict[str, Any]]:
  """Returns the folder or file with the weights, and its config.json."""
  found = resolve(path, variant=variant)
  if found.is_dir() and not (found / "config.json").is_file():
    inner = found / component
    if not inner.is_dir():
      raise errors.UserError(
        f"{found} has neither config.json nor {component}/: give the folder of"
        f" the {component} or of a pipeline that diffusers saved"
      )
    found = inner
  folder = found if found.is_dir() else found.parent
  return found, hub.read_json(folder / "config.json")


def _kind(values: dict[str, Any], names: Sequence[str]) -> _Kind:
  given = values.get("_class_name")
  # A class that is not among the names is refused by `from_hf`.
  return _KINDS[given if given in names else names[0]]


def _load(
  path: Path, component: str, variant: str | None, stack_from: int
) -> tuple[Any, types.Params]:
  """Reads, renames and compares; all tensors fit, or none are returned."""
  found, values = _find(path, component, variant)
  kind = _kind(values, _CLASSES[component])
  config = kind.config.from_hf(values)
  file = _variant(found, component, variant)
  tensors = hub.read_tensors(file)
  rules = kind.rules(config)
  if component == "vae" and any(".query." in name for name in tensors):
    rules = diffusion_rules.autoencoder(is_old=True)
  flat = convert.convert(tensors, rules, where=str(file))
  params = trees.merge(kind.shapes(config), flat, where=str(file))
  return config, diffusion_rules.stack_layers(params, stack_from=stack_from)


def _variant(
  folder: pathlib.Path, component: str, variant: str | None
) -> pathlib.Path:
  """Returns the file of a precision; the folder, or a file, as it is else."""
  if variant is None or not folder.is_dir():
    return folder
  names = (
    f"{_STEM}.{variant}.safetensors",
    f"{_STEM}.safetensors.index.{variant}.json",
  )
  for name in names:
    if (folder / name).is_file():
      return folder / name
  if component == "controlnet":
    return folder  # Each is published apart, many in one precision only.
  raise errors.UserError(
    f"{folder} has no variant {variant!r}: {names[0]} is missing; leave the"
    " variant out to read what is there"
  )
