"""Where the parts of a text-to-image system lie, before any is read.

A base is a folder of diffusers or a single file. Both are looked at first:
their configurations, and whether their files are there and whole, which costs a
second. Their parameters, gigabytes, are read only when all parts are known to
fit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import pathlib
from typing import Any, NamedTuple, Protocol

from dppp_jax import errors, files, types
from dppp_jax.diffusion import components as components_lib
from dppp_jax.diffusion import schedulers
from dppp_jax.geneperson import digests
from dppp_jax.models import clip, unet_config
from dppp_jax.models import unet as unet_lib
from dppp_jax.models import vae as vae_lib
from dppp_jax.weights import (
  controlnet_file,
  diffusers_folder,
  hub,
  load,
  lora,
  lora_keys,
  single_file,
  u2net,
)

Path = str | pathlib.Path

_PREDICTIONS = ("epsilon", "v_prediction")
_METHODS = ("euler_ancestral", "euler", "ddim", "dpmpp_2m")
_TOKENIZER = "openai/clip-vit-large-patch14"  # Whose words all of them read.
_TOKENIZER_FILES = (
  "tokenizer.json",
  "vocab.json",
  "merges.txt",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
)

_ZEROS = "force_zeros_for_empty_prompt"
# Parts of a pipeline that are read from folders of their own.
_READ = (
  *("unet", "vae", "text_encoder", "text_encoder_2"),
  *("tokenizer", "tokenizer_2", "scheduler"),
)
# What a pipeline's model_index.json may name, and of which class; what else it
# says. None: any class, which is not used here.
_PARTS: dict[str, tuple[str, ...] | None] = {
  "unet": ("UNet2DConditionModel",),
  "vae": ("AutoencoderKL",),
  "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
  "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
  "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
  "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
  "scheduler": None,  # Its own file is read.
  "controlnet": None,
  "safety_checker": None,
  "feature_extractor": None,
  "image_encoder": None,  # Of IP-Adapters.
}
_NOTES = frozenset(
  (
    _ZEROS,  # Read.
    "add_watermarker",
    "requires_safety_checker",
    "is_unet_version_less_0_9_0",
    "is_unet_sample_size_int",
  )
)


class Overrides(NamedTuple):
  """What a user sets against what the base says.

  Attributes:
    vae: folder, file or hub id of another VAE, or of one where it has none.
    prediction_type: `epsilon` or `v_prediction`.
    zero_snr: trained down to pure noise, also where the base does not say so.
  """

  vae: Path | None = None
  prediction_type: str | None = None
  zero_snr: bool = False


NO_OVERRIDES = Overrides()


class Base(Protocol):
  """A base model that is there, and not read yet."""

  def parts(self, *, method: str | None) -> components_lib.Components:
    """Returns all but the parameters and ControlNets of others."""
    ...

  def params(self) -> Iterator[tuple[str, types.Params]]:
    """Opens the parameters of one network after the other."""
    ...

  def controlnets(self) -> list[pathlib.Path]:
    """Returns the ControlNets that came with it."""
    ...

  def describe(self) -> dict[str, digests.Source]:
    """Returns all files that are read, by role."""
    ...


def base(
  spec: Path,
  *,
  variant: str | None = None,
  tokenizers: Sequence[Path] | None = None,
  configs: single_file.Configs | None = None,
  overrides: Overrides = NO_OVERRIDES,
) -> Base:
  """Finds a base model; see `components.load_components`."""
  if overrides.prediction_type not in (None, *_PREDICTIONS):
    raise errors.UserError(
      f"prediction_type {overrides.prediction_type!r} is not built: choose"
      f" {' or '.join(_PREDICTIONS)}, or leave it empty"
    )
  path = diffusers_folder.resolve(spec, variant=variant)
  name = pathlib.Path(spec).name or path.resolve().name
  if path.is_dir():
    if tokenizers is not None:
      raise errors.UserError(
        f"{path} has tokenizers of its own: leave tokenizers out, they are for"
        " a base in a single file"
      )
    return _Folder(path, name, variant, overrides)
  return _File(path, name, tokenizers, configs, overrides)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
  """Puts a path before the errors of who did not know it."""
  try:
    yield
  except errors.UserError as error:
    if str(path) in str(error):
      raise
    raise errors.UserError(f"{path}: {error}") from error


class _Folder:
  """A pipeline that diffusers saved."""

  def __init__(
    self,
    root: pathlib.Path,
    name: str,
    variant: str | None,
    overrides: Overrides,
  ):
    self._root, self._name, self._variant = root, name, variant
    self._index = _read_index(root, overrides)
    self._overrides = overrides
    self._vae = _vae_apart(overrides, variant, lambda: _config(root, "vae"))
    self._texts = ["text_encoder"]
    if (root / "text_encoder_2").is_dir():
      self._texts.append("text_encoder_2")

  def parts(self, *, method: str | None) -> components_lib.Components:
    root = self._root
    file = root / "scheduler" / "scheduler_config.json"
    with named(file):
      steps = schedulers.Config.from_hf(
        hub.read_json(file),
        method=_method(method),
        prediction_type=self._overrides.prediction_type,
      )
    for part in self._own:
      hub.check(self._weights(part))
    configs = {part: _config(root / part, part) for part in self._own}
    size = hub.read_json(root / "unet" / "config.json").get("sample_size")
    texts, tokenizers = [], []
    for part in self._texts:
      with named(root / part):
        texts.append(load.text_config(self._text(part)))
      tokenizers.append(load.tokenizer(root / _tokenizer(part)))
    return components_lib.Components(
      unet=configs["unet"],
      vae=self._vae.config if self._vae else configs["vae"],
      texts=tuple(texts),
      tokenizers=tuple(tokenizers),
      scheduler=dataclasses.replace(
        steps, zero_snr=steps.zero_snr or self._overrides.zero_snr
      ),
      params={},
      zero_negative=self._index.get(_ZEROS, True),
      sample_size=size if isinstance(size, int) else None,
    )

  def params(self) -> Iterator[tuple[str, types.Params]]:
    root, variant = self._root, self._variant
    yield "unet", diffusers_folder.unet(root / "unet", variant=variant)[1]
    if self._vae:
      yield "vae", self._vae.params()
    else:
      yield "vae", diffusers_folder.vae(root / "vae", variant=variant)[1]
    for part in self._texts:
      yield part, load.clip_text(self._text(part))[1]

  def controlnets(self) -> list[pathlib.Path]:
    found, k = [], 0
    while (path := self._root / components_lib.controlnet_name(k)).is_dir():
      found.append(path)
      k += 1
    return found

  def describe(self) -> dict[str, digests.Source]:
    root = self._root
    found = [
      root / "model_index.json",
      root / "scheduler/scheduler_config.json",
    ]
    for part in self._own:
      found += [root / part / "config.json"]
      found += hub.weight_files(self._weights(part))
    for part in self._texts:
      found += [root / part / "config.json"]
      found += hub.weight_files(self._text(part))
      found += _tokenizer_files(root / _tokenizer(part))
    other = {"vae": self._vae.source} if self._vae else {}
    return {"base": _source(self._name, root, found), **other}

  @property
  def _own(self) -> tuple[str, ...]:
    """The networks that are read from this folder, beside text encoders."""
    return ("unet",) if self._vae else ("unet", "vae")

  def _weights(self, part: str) -> pathlib.Path:
    return diffusers_folder.weights(
      self._root / part, part, variant=self._variant
    )

  def _text(self, part: str) -> pathlib.Path:
    """Returns the folder of a text encoder, or the file of the variant."""
    file = self._root / part / f"model.{self._variant}.safetensors"
    return file if file.is_file() else self._root / part


class _File:
  """SDXL or SD 1.x in one file."""

  def __init__(
    self,
    path: pathlib.Path,
    name: str,
    tokenizers: Sequence[Path] | None,
    configs: single_file.Configs | None,
    overrides: Overrides,
  ):
    self._path, self._name, self._configs = path, name, configs
    self._options = {
      "configs": configs,
      "with_vae": overrides.vae is None,
      "prediction_type": overrides.prediction_type,
    }
    found = single_file.peek(path, **self._options)
    self._is_xl = found.configs.text_encoder_2 is not None
    self._found = found
    self._zero_snr = found.zero_snr or overrides.zero_snr
    self._vae = _vae_apart(overrides, None, lambda: found.configs.vae)
    self._tokenizers = self._find_tokenizers(tokenizers)

  def parts(self, *, method: str | None) -> components_lib.Components:
    configs = self._found.configs
    texts = [configs.text_encoder]
    if configs.text_encoder_2 is not None:
      texts.append(configs.text_encoder_2)
    # Such a file says nothing of samplers: SDXL's noise, and "Euler a".
    steps = schedulers.Config(
      method=_method(method) or "euler_ancestral",
      prediction_type=self._found.prediction_type,
      zero_snr=self._zero_snr,
      # What was trained on pure noise must begin there (Lin et al. 2023).
      timestep_spacing="trailing" if self._zero_snr else "leading",
    )
    return components_lib.Components(
      unet=configs.unet,
      vae=self._vae.config if self._vae else configs.vae,
      texts=tuple(texts),
      tokenizers=tuple(
        # The second encoder of SDXL was trained with another filling.
        load.tokenizer(folder, pad="!" if k else None)
        for k, folder in enumerate(self._tokenizers)
      ),
      scheduler=steps,
      params={},
      sample_size=None if self._configs else 128 if self._is_xl else 64,
    )

  def params(self) -> Iterator[tuple[str, types.Params]]:
    yield from single_file.load(self._path, **self._options).params.items()
    if self._vae:
      yield "vae", self._vae.params()

  def controlnets(self) -> list[pathlib.Path]:
    return []

  def describe(self) -> dict[str, digests.Source]:
    found = {"base": digests.Source(self._name, {"": self._path})}
    if self._vae:
      found["vae"] = self._vae.source
    for k, folder in enumerate(self._tokenizers):
      found["tokenizer_2" if k else "tokenizer"] = _source(
        "tokenizer", folder, _tokenizer_files(folder)
      )
    return found

  def _find_tokenizers(
    self, given: Sequence[Path] | None
  ) -> list[pathlib.Path]:
    count = 2 if self._is_xl else 1
    if given is not None:
      if len(given) not in (1, count):
        raise errors.UserError(
          f"{len(given)} tokenizers for {self._path}: give"
          f" {'1 or 2' if self._is_xl else '1'}"
        )
      found = [hub.resolve(p, has_weights=False) for p in given]
      return (found * count)[:count]
    folder = self._path.parent
    beside = [
      path for path in (folder / "tokenizer", folder) if _has_tokenizer(path)
    ][:1]
    if beside and self._is_xl:
      second = folder / "tokenizer_2"
      beside.append(second if _has_tokenizer(second) else beside[0])
    if beside:
      return beside
    try:
      found = hub.resolve(
        _TOKENIZER, patterns=_TOKENIZER_FILES, has_weights=False
      )
    except errors.UserError as error:
      raise errors.UserError(
        f"{self._path} holds no tokenizer, as no such file does, and"
        f" {_TOKENIZER} could not be fetched: put its vocab.json and merges.txt"
        " beside the file, or name their folder in tokenizers"
      ) from error
    return [found] * count


class _Vae:
  """A VAE that is read from elsewhere than the base."""

  def __init__(
    self, spec: Path, variant: str | None, own: Callable[[], vae_lib.Config]
  ):
    path = diffusers_folder.resolve(spec, variant=variant)
    self._path, self._is_folder = path, path.is_dir() or _has_vae_config(path)
    if self._is_folder:
      self.config = _config(path, "vae")
      # A VAE is published apart, often in one precision only.
      weights = diffusers_folder.weights(path, "vae")
      hub.check(weights)
      found = hub.weight_files(weights)
      folder = found[0].parent
      found = [folder / "config.json", *found]
      name = pathlib.Path(spec).name or path.resolve().name
      self.source = _source(name, folder, found)
    else:
      # No tensor tells by how much latents are scaled: as in the base's own.
      self.config = own()
      single_file.check_vae(path, self.config)
      self.source = digests.Source(path.name, {"": path})

  def params(self) -> types.Params:
    """Reads the parameters."""
    if self._is_folder:
      return diffusers_folder.vae(self._path)[1]
    return single_file.vae(self._path, config=self.config)[1]


def _vae_apart(
  overrides: Overrides, variant: str | None, own: Callable[[], vae_lib.Config]
) -> _Vae | None:
  """Returns the VAE of a user, if any; `own` gives the base's configuration."""
  if overrides.vae is None:
    return None
  with named(overrides.vae):
    return _Vae(overrides.vae, variant, own)


def _has_vae_config(path: pathlib.Path) -> bool:
  file = path.parent / "config.json"
  kind = hub.read_json(file).get("_class_name") if file.is_file() else None
  return kind == "AutoencoderKL"


def controlnet_config(
  path: pathlib.Path, unet: unet_config.Config, *, variant: str | None
) -> unet_config.ControlNetConfig:
  """Returns the configuration of a ControlNet; its weights are not read.

  Raises:
    errors.UserError: its files are missing or damaged, or it is none.
  """
  hub.check(_controlnet_weights(path, variant))
  with named(path):
    return controlnet_file.read_config(path, unet=unet)


def controlnet(
  path: pathlib.Path,
  config: unet_config.ControlNetConfig,
  *,
  variant: str | None,
) -> types.Params:
  """Opens the parameters of a ControlNet."""
  is_folder = controlnet_file.is_folder(path)
  return controlnet_file.load(
    path, config=None if is_folder else config, variant=variant
  )[1]


def describe_controlnet(
  spec: Path, path: pathlib.Path, variant: str | None
) -> digests.Source:
  """Returns the files of a ControlNet that are read."""
  found = hub.weight_files(_controlnet_weights(path, variant))
  name = pathlib.Path(spec).name or path.resolve().name
  folder = found[0].parent
  config: pathlib.Path | None = folder / "config.json"
  if not controlnet_file.is_folder(path):
    config = controlnet_file.config_file(path)
  if config is None:
    return digests.Source(name, {"": found[0]})
  return _source(name, folder, [config, *found])


def describe_lora(one: lora.Lora) -> digests.Source:
  """Returns the file of a LoRA, and peft's configuration where it counts."""
  found = lora_keys.files_of(one.path)
  if len(found) == 1:
    return digests.Source(found[0].name, {"": found[0]})
  return _source(found[-1].name, found[-1].parent, found)


def describe_u2net(spec: Path) -> digests.Source:
  """Returns the file, or the shards, of a U2-Net."""
  path = u2net.locate(spec)
  is_onnx = files.suffix(path) == ".onnx"
  found = [path] if is_onnx else hub.weight_files(path)
  if len(found) == 1:
    return digests.Source(found[0].name, {"": found[0]})
  return _source(path.name, found[0].parent, found)


def param_shapes(parts: components_lib.Components) -> types.Params:
  """Returns trees of shapes of what LoRAs may change."""
  shapes = {"unet": unet_lib.param_shapes(parts.unet)}
  for name, text in zip(parts.text_names, parts.texts, strict=True):
    shapes[name] = clip.param_shapes(text)
  return shapes


def _controlnet_weights(
  path: pathlib.Path, variant: str | None
) -> pathlib.Path:
  if not controlnet_file.is_folder(path):
    return path
  return diffusers_folder.weights(path, "controlnet", variant=variant)


def _config(path: pathlib.Path, part: str) -> Any:
  with named(path / "config.json"):
    return diffusers_folder.read_config(path, part)


def _read_index(root: pathlib.Path, overrides: Overrides) -> dict[str, Any]:
  """Reads model_index.json; says what a folder without one is."""
  file = root / "model_index.json"
  if file.is_file():
    index = hub.read_json(file)
    if "unet" not in index:
      raise errors.UserError(
        f"{file} is of a {index.get('_class_name', 'pipeline')} without a UNet:"
        " give a Stable Diffusion 1.x, 2.x or XL"
      )
    left = ("vae",) if overrides.vae is not None else ()
    _check_index({k: v for k, v in index.items() if k not in left}, file)
    _check_named(index, root, left)
    return index
  singles = files.visible(root, ".safetensors")
  if (root / "config.json").is_file():
    kind = hub.read_json(root / "config.json").get("_class_name", "network")
    said = f"is the folder of one {kind}"
  elif len(singles) == 1:
    said = f"is no pipeline; did you mean the file {singles[0]}, or"
  else:
    said = "is no folder of a diffusers pipeline (model_index.json is missing)"
  raise errors.UserError(
    f"{root} {said}: give the folder with model_index.json, unet/ and vae/, or"
    " a single .safetensors file"
  )


def _check_index(index: Mapping[str, Any], file: pathlib.Path) -> None:
  """Refuses parts and settings of a pipeline that would be left aside."""
  for key, value in index.items():
    is_unset = value in (None, False, [None, None])
    if key.startswith("_") or key in _NOTES or is_unset:
      continue
    kind = value[-1] if isinstance(value, list) and value else value
    classes = _PARTS.get(key, ())
    if classes is None or kind in classes:
      continue
    said = f"{key} is {kind!r}"
    if not classes:
      raise errors.UserError(
        f"{file}: {said}, which is not built here: give a Stable Diffusion 1.x,"
        " 2.x or XL"
      )
    raise errors.UserError(
      f"{file}: {said}, where {' or '.join(classes)} is built here: give a"
      " Stable Diffusion 1.x, 2.x or XL"
    )


def _check_named(
  index: Mapping[str, Any], root: pathlib.Path, left: Sequence[str]
) -> None:
  """Refuses folders that model_index.json denies, and strange settings."""
  file = root / "model_index.json"
  for part in _READ:
    is_named = index.get(part) not in (None, False, [None, None])
    if part not in left and not is_named and (root / part).is_dir():
      raise errors.UserError(
        f"{file} names no {part}, and {root / part} is there: they are of two"
        " models; fetch the whole folder again"
      )
  for key, kind in (("_class_name", str), (_ZEROS, bool)):
    if not isinstance(index.get(key, kind()), kind):
      raise errors.UserError(
        f"{file}: {key} is {index[key]!r}, where"
        f" {'true or false' if kind is bool else 'a name'} is wanted: fetch it"
        " again"
      )


def _method(method: str | None) -> Any:
  if method is not None and method not in _METHODS:
    raise errors.UserError(
      f"scheduler {method!r} is not built: choose one of {', '.join(_METHODS)}"
    )
  return method


def _tokenizer(part: str) -> str:
  return part.replace("text_encoder", "tokenizer")


def _has_tokenizer(folder: pathlib.Path) -> bool:
  has = lambda *names: all((folder / name).is_file() for name in names)
  return has("tokenizer.json") or has("vocab.json", "merges.txt")


def _tokenizer_files(folder: pathlib.Path) -> list[pathlib.Path]:
  return [
    folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()
  ]


def _source(
  name: str, folder: pathlib.Path, files: Sequence[pathlib.Path]
) -> digests.Source:
  named_ = {file.relative_to(folder).as_posix(): file for file in files}
  return digests.Source(name, named_)
