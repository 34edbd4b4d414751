"""A text-to-image system from the files that its makers published.

parts = components.load_components(
  "sd_xl_base_1.0.safetensors",
  controlnets=["OpenPoseXL2.safetensors", "controlnet-canny-sdxl-1.0"],
  loras=[lora.Lora("style.safetensors", scale=0.7)],
)
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from dppp_jax import logs, trees, types
from dppp_jax.diffusion import components as components_lib
from dppp_jax.diffusion import schedulers
from dppp_jax.geneperson import digests as digests_lib
from dppp_jax.geneperson import sources
from dppp_jax.weights import (
  diffusers_folder,
  diffusion_rules,
  lora,
  lora_keys,
  single_file,
)

Path = str | pathlib.Path
Place = Callable[[str, types.Array], types.Array]


class Found(NamedTuple):
  """A system whose parts are known to fit each other, and not read yet.

  Attributes:
    base: reads the parameters.
    controlnets: their files and folders.
    parts: all but the parameters.
  """

  base: sources.Base
  controlnets: list[pathlib.Path]
  parts: components_lib.Components


def find_components(
  base: Path,
  *,
  controlnets: Sequence[Path] | None = None,
  scheduler: str | None = None,
  k_diffusion: bool = False,
  variant: str | None = None,
  tokenizers: Sequence[Path] | None = None,
  configs: single_file.Configs | None = None,
  overrides: sources.Overrides = sources.NO_OVERRIDES,
) -> Found:
  """Looks at all files but those of LoRAs; arguments of `load_components`.

  Raises:
    errors.UserError: a part is missing, damaged, or for another model.
  """
  found = sources.base(
    base,
    variant=variant,
    tokenizers=tokenizers,
    configs=configs,
    overrides=overrides,
  )
  nets = _resolve(found, controlnets, variant)
  parts = found.parts(method=scheduler)
  steps = parts.scheduler
  parts = dataclasses.replace(
    parts,
    controlnets=tuple(
      sources.controlnet_config(path, parts.unet, variant=variant)
      for path in nets
    ),
    scheduler=schedulers.k_diffusion(steps) if k_diffusion else steps,
  )
  with sources.named(base):
    components_lib.check(parts, controlnets=nets)
  return Found(found, nets, parts)


def load_components(
  base: Path,
  *,
  controlnets: Sequence[Path] | None = None,
  loras: Sequence[lora.Lora] = (),
  scheduler: str | None = None,
  k_diffusion: bool = False,
  variant: str | None = None,
  stack_from: int = 0,
  tokenizers: Sequence[Path] | None = None,
  configs: single_file.Configs | None = None,
  allow_unmatched: bool = False,
  place: Place | None = None,
  overrides: sources.Overrides = sources.NO_OVERRIDES,
) -> components_lib.Components:
  """Loads a Stable Diffusion 1.x, 2.x or XL with ControlNets and LoRAs.

  What can be found wrong without reading the weights (missing and truncated
  files, parts of different base models, LoRAs for another one) is found before
  they are read.

  Files are mapped into memory, and their weights keep the files' precision. A
  system that is too large for the host's memory goes to the device leaf by
  leaf, with `place`.

  Args:
    base: folder of a diffusers pipeline (model_index.json, unet/, vae/,
      text_encoder/ ...), a hub id of one, or SDXL or SD 1.x in a single file of
      any name.
    controlnets: folders, files of any name or hub ids, unions among them;
      None: those in the folder, if any.
    loras: merged into UNet and text encoders; see also `merge_loras`.
    scheduler: `euler_ancestral`, `euler`, `ddim` or `dpmpp_2m`, on the betas
      of the base; None: the folder's own, of a single file `euler_ancestral`.
    k_diffusion: place the steps as k-diffusion (the WebUI) does, not as
      diffusers does.
    variant: of folders, which of several precisions to read, e.g. "fp16".
    stack_from: transformers at least so deep are compiled as one loop.
    tokenizers: for a single file, which holds none: one or two folders or hub
      ids. None: what lies beside the file, in `tokenizer/` or with it, or else
      that of CLIP from the hub.
    configs: of a single file whose networks are not those of the base models.
    allow_unmatched: merge what fits of LoRAs with modules that the networks do
      not have.
    place: (name, leaf) -> what stands for the leaf, called as soon as it is
      read; see `sampler.Placement`. None: the leaf itself, in the file.
    overrides: another VAE, and what the UNet predicts, against what the base
      says.

  Returns:
    Components, in the precision of the files, or float32 where LoRAs are merged
    into them; or what `place` made of them.

  Raises:
    errors.UserError: a part is missing, damaged, or for another model.
  """
  found, nets, parts = find_components(
    base,
    controlnets=controlnets,
    scheduler=scheduler,
    k_diffusion=k_diffusion,
    variant=variant,
    tokenizers=tokenizers,
    configs=configs,
    overrides=overrides,
  )
  parts = dataclasses.replace(parts, stack_from=stack_from)
  merging = None
  if loras:
    merging = lora.Merge(
      sources.param_shapes(parts), loras, allow_unmatched=allow_unmatched
    )

  def networks() -> Iterator[tuple[str, types.Params]]:
    yield from found.params()
    for k, (path, net) in enumerate(zip(nets, parts.controlnets, strict=True)):
      name = components_lib.controlnet_name(k)
      yield name, sources.controlnet(path, net, variant=variant)

  params = {
    name: _placed(name, tree, merging, place, stack_from=stack_from)
    for name, tree in networks()
  }
  if merging:
    _say_merged(loras, merging.reports())
  return dataclasses.replace(parts, params=params)


def _placed(
  component: str,
  params: types.Params,
  merging: lora.Merge | None,
  place: Place | None,
  *,
  stack_from: int,
) -> types.Params:
  """Merges, stacks and places one leaf after the other."""
  flat = trees.flatten(params)
  names = diffusion_rules.stacked_names(flat, stack_from=stack_from)
  leaf = lambda name: flat[name]
  if merging:
    leaf = lambda name: merging.leaf(component, name, flat)
  placed = {}
  total = sum(value.nbytes for value in flat.values())
  with logs.progress_of_bytes(total, desc=f"loading {component}") as bar:
    for name, layers in names.items():
      value = np.stack([leaf(n) for n in layers]) if layers else leaf(name)
      if place:
        # Waiting here bounds what is under way.
        value = jax.block_until_ready(place(f"{component}/{name}", value))
      placed[name] = value
      bar.update(sum(flat[n].nbytes for n in layers or (name,)))
  return trees.unflatten(placed)


def merge_loras(
  params: types.Params,
  loras: Sequence[lora.Lora],
  *,
  allow_unmatched: bool = False,
) -> types.Params:
  """Returns the parameters of Components with LoRAs merged into them.

  What became of each file, how many modules were merged and which were not, is
  said on the console.

  Args:
    params: as `Components.params`, without LoRAs; not changed.
    loras: any number; another set is other numbers for the same program.
    allow_unmatched: merge what fits, where a file has modules that the
      networks do not have.

  Raises:
    errors.UserError: a file that is damaged or for another base model.
  """
  if not loras:
    return params
  some = {name: params[name] for name in lora_keys.COMPONENTS if name in params}
  merged, reports = lora.merge(some, loras, allow_unmatched=allow_unmatched)
  _say_merged(loras, reports)
  return params | merged


def _say_merged(
  loras: Sequence[lora.Lora], reports: Sequence[lora.Report]
) -> None:
  for one, report in zip(loras, reports, strict=True):
    scales = {part: f"{one.scale_of(part):g}" for part in report.matched}
    factor = " and ".join(sorted(set(scales.values()))) or "0"
    logs.say(f"LoRA {report}, scale {factor}")
    if report.unmatched:
      logs.say(f"LoRA {report.path}: left out {', '.join(report.unmatched)}")


def digests(
  base: Path,
  *,
  controlnets: Sequence[Path] | None = None,
  loras: Sequence[lora.Lora] = (),
  u2net: Path | None = None,
  variant: str | None = None,
  tokenizers: Sequence[Path] | None = None,
  configs: single_file.Configs | None = None,
  overrides: sources.Overrides = sources.NO_OVERRIDES,
  cache: Path | None = None,
) -> dict[str, dict[str, str]]:
  """Returns which weights a run depends on, for its configuration.

  The same files give the same digests on every machine, wherever they lie.

  Args:
    base: as in `load_components`, like all that is not listed here.
    controlnets: likewise.
    loras: likewise; their scales are no part of the digests.
    u2net: file of the matting network.
    variant: likewise.
    tokenizers: likewise.
    configs: likewise.
    overrides: likewise.
    cache: JSON file of what was hashed before; None: one in the user's cache
      folder.

  Returns:
    {role: {"name": of the file or folder, "sha256": ...}} with the roles
    `base`, `vae` (of another one), `tokenizer`, `tokenizer_2` (of a single
    file), `controlnet`, `controlnet_1` ..., `lora`, `lora_1` ... and `u2net`;
    see `digests.describe`.

  Raises:
    errors.UserError: a file is missing.
  """
  found = sources.base(
    base,
    variant=variant,
    tokenizers=tokenizers,
    configs=configs,
    overrides=overrides,
  )
  every = found.describe()
  nets = _resolve(found, controlnets, variant)
  specs = nets if controlnets is None else controlnets
  for k, (spec, path) in enumerate(zip(specs, nets, strict=True)):
    every[components_lib.controlnet_name(k)] = sources.describe_controlnet(
      spec, path, variant
    )
  for k, one in enumerate(loras):
    every[f"lora_{k}" if k else "lora"] = sources.describe_lora(one)
  if u2net is not None:
    every["u2net"] = sources.describe_u2net(u2net)
  return digests_lib.describe(every, cache=cache)


def _resolve(
  found: sources.Base,
  controlnets: Sequence[Path] | None,
  variant: str | None,
) -> list[pathlib.Path]:
  if controlnets is None:
    return found.controlnets()
  return [
    diffusers_folder.resolve(path, variant=variant) for path in controlnets
  ]
