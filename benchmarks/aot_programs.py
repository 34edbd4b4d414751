"""The programs that a GPU user meets, as functions and shapes of arguments.

No weight is made: parameters are ShapeDtypeStructs, so that SDXL takes no
memory. Sizes are those of the shipped configs; `tiny` ones are for tests.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import pathlib
import runpy
from typing import Any

import flax_generation
import generation_setting
import jax
import jax.numpy as jnp
import numpy as np
import ptl
import retrieval

from dppp_jax import trees
from dppp_jax.data import transforms
from dppp_jax.diffusion import conditioning, schedulers
from dppp_jax.diffusion import sampler as sampler_lib
from dppp_jax.evals import counting, export
from dppp_jax.evals import extractor as extractor_lib
from dppp_jax.evals import spec as spec_lib
from dppp_jax.geneperson import matting
from dppp_jax.methods import clip_pretrain, denoising, dppp
from dppp_jax.models import clip, u2net
from dppp_jax.pretraining import autoencoder, controlnet, lora
from dppp_jax.pretraining import clip as clip_pretraining
from dppp_jax.pretraining import matting as matting_pretraining
from dppp_jax.pretraining import unet as unet_pretraining
from dppp_jax.train import optim
from dppp_jax.train import stage as stage_lib
from dppp_jax.train import step as step_lib
from dppp_jax.weights import load
from dppp_jax.weights import u2net as u2net_weights

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_MINI = generation_setting.MINI
_STEPS = 30
_TABLE = 64  # Rows of the step table, of which the first 30 count.
_PICTURES = 130_519  # Of GenePerson in the paper.

# XLA puts the products of q, k and v together, and finds no tile for what comes
# out ("Couldn't find output tile sizes"). With a device it would try several.
_NO_TRITON = {"xla_gpu_enable_triton_gemm": False}

# Model, part, batch, bound in GB, attentions in cuDNN (of a step).
_CANVASES = (
  ("canvas", "encode", 1, 2.0, 42),
  ("canvas", "encode", 4, 2.2, 42),
  ("canvas", "encode", 8, 2.4, 42),
  ("canvas", "decode", 1, 2.0, 0),
  ("canvas", "decode", 4, 7.5, 0),
  ("canvas", "decode", 8, 7.6, 0),
  ("sdxl", "decode", 1, 1.6, 0),
  ("sdxl", "decode", 4, 5.8, 0),
  ("sdxl", "decode", 8, 5.9, 0),
  ("canvas", "denoise", 1, 13.5, 276),
  ("canvas", "denoise", 4, 14.8, 276),
  ("canvas", "denoise", 8, 17.5, 276),
  ("sdxl", "denoise", 1, 6.9, 140),
  ("sdxl", "denoise", 4, 7.5, 140),
  ("sdxl", "denoise", 8, 8.8, 140),
)

_TINY_TEXT = dict(
  hidden_size=16,
  intermediate_size=32,
  num_hidden_layers=2,
  num_attention_heads=2,
  hidden_act="gelu",
  projection_dim=16,
)
_TINY_SDXL: dict[str, Any] = {
  "unet": dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32,
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 16,
  ),
  "vae": dict(
    block_out_channels=(8, 8),
    norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=4,
  ),
  "hint": (4, 8),
  "texts": (_TINY_TEXT, _TINY_TEXT),
  "scheduler": {},
}


@dataclasses.dataclass(frozen=True)
class Job:
  """A function that is to be compiled.

  Attributes:
    function: of `args` and `kwargs`; or jitted already.
    args: trees of arrays and ShapeDtypeStructs.
    kwargs: same as `args`; values that are not arrays are static.
    donated: bytes of what is donated: all of it must be written in place.
    donate: places of `args` that are donated; of a jitted function none.
  """

  function: Callable[..., Any]
  args: tuple[Any, ...] = ()
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  donated: int = 0
  donate: tuple[int, ...] = ()

  def trace(self, put: Callable[[Any], Any] = lambda x: x) -> Any:
    """Traces the function; `put` says on which device each array lies."""
    place = lambda tree: jax.tree.map(
      lambda x: put(x) if hasattr(x, "shape") else x, tree
    )
    function = self.function
    if not hasattr(function, "trace"):
      function = jax.jit(function, donate_argnums=self.donate)
    return function.trace(*place(self.args), **place(dict(self.kwargs)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A program, and what is asserted of it when it is compiled for an H200.

  Attributes:
    name: of the table.
    about: what it is, in words.
    build: tiny -> Job.
    peak: GB that it may need at most, with its arguments.
    attentions: of cuDNN, in one round of loops of unknown length.
    wide: share of the FLOP that may be float32; None where all are.
    moved: GB that it may move at most; None: any.
    unit: what its FLOP and bytes are of.
    options: of XLA, where it does not compile without a device otherwise.
  """

  name: str
  about: str
  build: Callable[[bool], Job]
  peak: float
  attentions: int = 0
  wide: float | None = 0.01
  moved: float | None = None
  unit: str = "a call"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def shape(dims: Sequence[int], dtype: Any = jnp.float32) -> Any:
  """Returns what stands for an array."""
  return jax.ShapeDtypeStruct(tuple(dims), dtype)


def nbytes(tree: Any) -> int:
  """Returns the bytes of all arrays of a tree."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def random_params(shapes: Any) -> Any:
  """Returns parameters of given shapes; norms are near the identity."""
  rng = np.random.default_rng(0)
  return trees.unflatten(
    {
      name: 0.02 * rng.standard_normal(x.shape, np.float32)
      + np.float32(name.endswith("scale"))
      for name, x in trees.flatten(shapes).items()
    }
  )


def config(name: str, arg: str = "") -> dict[str, Any]:
  """Returns a configuration of configs/ as nested dicts."""
  path = _ROOT / "configs" / f"{name}.py"
  return runpy.run_path(str(path))["get_config"](arg).to_dict()


def _train(
  stage: stage_lib.Stage,
  begun: tuple[Any, Any],
  *,
  rows: int,
  dataset: Mapping[str, Any] | None = None,
  feed: Mapping[str, Any] | None = None,
  mean: Sequence[float] = (0.5,) * 3,
  std: Sequence[float] = (0.5,) * 3,
) -> Job:
  """Returns the step of a stage, as `train/loop.py` compiles it.

  Args:
    stage: what is trained.
    begun: shapes of parameters and collections at its beginning.
    rows: examples of the dataset.
    dataset: what lies on the device, beside the labels.
    feed: what is sent with each batch, beside its places in the dataset.
    mean: normalisation of a stage without augmentation.
    std: likewise.
  """
  params, collections = begun
  trainable, frozen, rates = optim.split(params, stage.rules)
  opt = jax.eval_shape(step_lib.make_tx(stage, rates).init, trainable)
  if stage.ema is not None:
    wide = {name: shape(x.shape) for name, x in trainable.items()}
    collections = {**collections, "ema": trees.unflatten(wide)}
  step, _ = step_lib.make_step(
    stage, rates, seed=0, mean=tuple(mean), std=tuple(std)
  )
  state = (trainable, collections, opt)
  batch = stage.batches.batch_size
  arguments = (
    state,
    frozen,
    {"label": shape((rows,), jnp.int32), **(dataset or {})},
    {"index": shape((batch,), jnp.int32), **(feed or {})},
    shape((), jnp.int32),
    shape(()),
  )
  return Job(step, arguments, donated=nbytes(state), donate=(0,))


def _begun(stage: stage_lib.Stage) -> tuple[Any, Any]:
  """Returns shapes of what the first stage of a method begins with."""
  begin = lambda key: stage.init({}, {}, key)
  return jax.eval_shape(begin, jax.random.key(0))


def paper_setting(tiny: bool) -> ptl.Setting:
  """Returns the sizes of configs/dppp.py, for a GPU."""
  if tiny:
    return ptl.settings(gpu=True)["tiny"]
  given = config("dppp")
  options, net = dppp.Options(**given["dppp"]), clip.VARIANTS["ViT-B/16"]
  size, people = tuple(given["data"]["image_size"]), 6641
  P, K = given["train"]["P"], given["train"]["K"]
  return ptl.Setting(net, size, P, K, people, options, True)


def _paper(tiny: bool, *, name: str, placement: str = "device") -> Job:
  """Returns a step of PTL or PSD at the paper's sizes."""
  setting, rows = paper_setting(tiny), 9 if tiny else _PICTURES
  size, net = setting.image_size, setting.config
  augment = transforms.Augment(**config("dppp")["augment"])

  def stages(params: Any) -> list[stage_lib.Stage]:
    return dppp.stages(
      net,
      params,
      setting.tokenizer,
      num_classes=setting.num_classes,
      batches=stage_lib.PK(setting.P, setting.K),
      augment=augment,
      options=setting.options,
      dtype=jnp.bfloat16,
    )

  number = [stage.name for stage in stages(None)].index(name)

  def begin(clip_params: Any, key: jax.Array) -> tuple[Any, Any]:
    found = {}, {}
    for stage in stages(clip_params)[: number + 1]:
      found = stage.init(*found, key)
    return found

  begun = jax.eval_shape(begin, clip.param_shapes(net), jax.random.key(0))
  lies = {"image": shape((rows, *size, 3), jnp.uint8)}
  comes = {"image": shape((setting.batch_size, *size, 3), jnp.uint8)}
  parts = {"dataset": lies} if placement == "device" else {"feed": comes}
  return _train(stages(None)[number], begun, rows=rows, **parts)


def _clip(tiny: bool) -> Job:
  """Returns a step of pretrain_clip's first phase."""
  given = config("pretrain_clip", "smoke" if tiny else "")
  data, model = given["data"], given["model"]
  tokenizer = load.tokenizer(_MINI / "clip")
  net = clip_pretraining.make_config(model, tokenizer, model["vocab_size"])
  length, rows = net.text.max_position_embeddings, data["num_images"]
  prompts = clip_pretraining.class_prompts(tokenizer, max_length=length)
  extras = {
    "captions": shape((rows, length), jnp.int32),
    "attributes": shape((rows, len(prompts.sizes)), jnp.int32),
  }
  stage, *_ = clip_pretrain.stages(
    net,
    **extras,
    prompts=prompts,
    phases=clip_pretraining.phases(given["train"]),
    batch_size=given["train"]["batch_size"],
    weight_decay=given["train"]["weight_decay"],
    augment=transforms.Augment(**given["augment"]),
    dtype=jnp.bfloat16,
  )
  images = {"image": shape((rows, *data["image_size"], 3), jnp.uint8)}
  return _train(stage, _begun(stage), rows=rows, dataset=images | extras)


def _diffusion(tiny: bool, *, name: str) -> Job:
  """Returns a step of the last phase of a part of the mini SDXL."""
  given = config(f"pretrain_{name}", "smoke" if tiny else "")
  given["dtype"] = "bfloat16"
  if tiny and name != "lora":  # The shipped VAE shrinks twice.
    model = given["model"]
    model = model["control"] if name == "unet" else model
    model["conditioning_embedding_out_channels"] = (4, 8, 8)
  base = _MINI / "sdxl"
  if name == "unet":
    given["data"] |= {"vae": base / "vae", "clip": _MINI / "clip"}
    stack = unet_pretraining.begin(given)
    stages = unet_pretraining.stages
  elif name == "lora":
    stack, stages = controlnet.from_pipeline(base), lora.stages
  else:
    given["data"]["base"] = base
    stack, stages = controlnet.begin(given), controlnet.stages
  first, *rest = stages(stack, given, {})
  stage = rest[-1] if rest else first
  system, canvas, rows = stack.system, (192, 144), given["data"]["num_canvases"]
  latents = [side // system.vae.factor for side in canvas]
  control = None
  if system.control is not None:
    control = np.zeros((1, *canvas, 3), np.uint8)
  examples = denoising.extras(
    system,
    stack.tokenizers,
    [""],
    moments=np.zeros((1, *latents, 2 * system.vae.latent_channels), np.float16),
    time_ids=np.zeros((1, 6), np.float32),
    control=control,
  )
  # Latents and control images stay on the disk, and come with each batch.
  of = lambda n, names: {
    k: shape((n, *examples[k].shape[1:]), examples[k].dtype) for k in names
  }
  on_disk = examples.keys() & {"moments", "control"}
  return _train(
    stage,
    _begun(first),
    rows=rows,
    dataset=of(rows, examples.keys() - on_disk),
    feed=of(stage.batches.batch_size, on_disk),
  )


def _vae(tiny: bool) -> Job:
  """Returns a step of pretrain_vae's last phase, of whole canvases."""
  given = config("pretrain_vae", "smoke" if tiny else "")
  given["dtype"] = "bfloat16"
  stages, rows = autoencoder.stages(given), given["data"]["num_canvases"]
  images = {"image": shape((rows, 192, 144, 3), jnp.uint8)}
  return _train(stages[-1], _begun(stages[0]), rows=rows, dataset=images)


def _u2net_training(tiny: bool) -> Job:
  """Returns a step of pretrain_u2netp."""
  given = config("pretrain_u2netp", "smoke" if tiny else "")
  given["dtype"] = "bfloat16"
  rows = 6 * given["data"]["num_canvases"]  # Cells.
  mattes = shape((rows, 96, 48), jnp.uint8)
  stage = matting_pretraining.stage(given, mattes)
  # It is drawn on the host, in the host's widths, and small.
  begun = stage.init({}, {}, jax.random.key(0))
  begun = jax.tree.map(lambda x: shape(x.shape), begun)
  pictures = {"image": shape((rows, 96, 48, 3), jnp.uint8), "matte": mattes}
  return _train(stage, begun, rows=rows, dataset=pictures)


def _spec(tiny: bool) -> spec_lib.Spec:
  """Returns how DPPP's content features are read."""
  net = ptl.TINY if tiny else clip.VARIANTS["ViT-B/16"]
  size = (32, 16) if tiny else config("dppp")["data"]["image_size"]
  found = dppp.extractor_spec(
    net, stage="psd", image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3
  )
  vision = dataclasses.replace(net.vision, projection_dim=net.projection_dim)
  known = {field.name for field in dataclasses.fields(spec_lib.Spec)}
  found = {k: v for k, v in found.items() if k in known}
  for name in ("image_size", "mean", "std"):
    found[name] = tuple(found[name])
  return spec_lib.Spec(**found | {"vision": vision})


def extractor(tiny: bool, *, dtype: str) -> Job:
  """Returns the extractor, 64 pictures at once."""
  spec = _spec(tiny)
  images = shape((4 if tiny else 64, *spec.image_size, 3), jnp.uint8)
  params = extractor_lib.param_shapes(spec)
  return Job(extractor_lib.make_forward(spec, dtype), (params, images))


def _export(tiny: bool) -> Job:
  """Returns the exported program, read back, for 64 pictures."""
  spec = _spec(tiny)
  params = random_params(extractor_lib.param_shapes(spec))
  exported = jax.export.deserialize(
    bytearray(export.program(extractor_lib.Extractor(spec, params)))
  )
  images = shape((4 if tiny else 64, *spec.image_size, 3), jnp.uint8)
  return Job(exported.call, (images,))


@functools.cache
def _sampler(tiny: bool, model: str) -> sampler_lib.Sampler:
  setting = generation_setting.settings(gpu=True)[model]
  if tiny:
    setting = dataclasses.replace(setting, networks=_TINY_SDXL)
  parts = flax_generation.structure(setting)
  found = sampler_lib.Sampler(
    dataclasses.replace(parts, params={}), dtype=jnp.bfloat16
  )
  flat = trees.flatten(parts.params)
  found.params = trees.unflatten(
    {name: shape(x.shape, found.dtype_of(name)) for name, x in flat.items()}
  )
  return found


def _canvas(tiny: bool, *, model: str, part: str, batch: int) -> Job:
  """Returns a program of the sampler, guided.

  Args:
    tiny: see `Program`.
    model: of `generation_setting.settings`.
    part: "encode", "denoise" or "decode".
    batch: canvases at once.
  """
  sampler = _sampler(tiny, model)
  size = (896, 1536) if model == "canvas" else (1024, 1024)
  size = (16, 24) if tiny else size
  parts, params, rows = sampler.components, sampler.params, 2 * batch
  tokens = conditioning.tokenize(
    parts.tokenizers, ["a"] * rows, limit=parts.max_tokens
  )
  is_prompt = np.arange(rows) >= batch
  read = Job(
    sampler.programs["encode"],
    (
      {name: params[name] for name in parts.text_names},
      tokens.ids,
      tokens.counts,
      is_prompt,
      is_prompt,
    ),
  )
  if part == "encode":
    return read
  small = [side // parts.vae.factor for side in size]
  latents = shape((batch, *small, parts.unet.in_channels))
  if part == "decode":
    return Job(sampler.programs["decode"], (params["vae"], latents))
  pictures = (batch, *size, 3)
  # Skeletons differ from canvas to canvas, the grid does not.
  images = ((pictures,), ((1, *size, 3),))[: len(parts.controlnets)]
  arguments = {
    "latents": latents,
    "keys": shape((batch, 2), jnp.uint32),
    "table": schedulers.init(_STEPS, parts.scheduler, length=_TABLE),
    "text": jax.eval_shape(read.function, *read.args),
    "time_ids": shape((rows, 6)),
    "images": tuple(
      tuple(shape(one, jnp.uint8) for one in some) for some in images
    ),
    "scales": shape((_TABLE, len(images))),
    "guidance": shape((batch,)),
    "rescale": shape(()),
    "guided": True,
  }
  return Job(
    sampler.programs["denoise"], (params,), arguments, donated=nbytes(latents)
  )


def _matting(tiny: bool, *, dtype: str, canvases: int) -> Job:
  """Returns the mattes of 42 cells each of some canvases."""
  net = u2net.FULL
  if tiny:
    net = matting_pretraining.make_config(
      config("pretrain_u2netp", "smoke")["model"]
    )
  module = u2net.U2Net(net, jnp.dtype(dtype))
  network = lambda variables, images: module.apply(variables, images).fused
  given = config("geneperson")
  size = (32, 32) if tiny else tuple(given["matting"]["size"])
  cell = (32, 16) if tiny else tuple(given["canvas"]["cell"])
  count = 2 if tiny else given["canvas"]["rows"] * given["canvas"]["cols"]
  cells = shape((canvases, count, *cell, 3), jnp.uint8)

  def run(variables: Any, cells: Any) -> matting.Mattes:
    return matting.Matting(network, variables, size=size).dispatch(cells)

  return Job(run, (u2net_weights.shapes(net), cells))


def _retrieval(tiny: bool) -> Job:
  """Returns the ranking of a tile of MSMT17's queries."""
  query, gallery, identities, *_ = retrieval.SIZES["msmt17"]
  if tiny:
    query, gallery, identities = 20, 50, 5
  rows = min(counting.tile_rows(gallery), query)
  most = 4 * gallery // identities  # Pictures of one person, about.
  function = functools.partial(counting.count_tile, metric="cosine")
  features = [(rows, retrieval.WIDTH), (gallery, retrieval.WIDTH)]
  return Job(function, (*map(shape, features), shape((rows, most), jnp.int32)))


def programs() -> tuple[Program, ...]:
  """Returns all programs, the small ones first."""
  of = functools.partial
  found = [
    Program(
      name="retrieval",
      about="a tile of MSMT17's queries ranked",
      build=_retrieval,
      peak=0.3,
      wide=None,
    ),
    *(
      Program(
        name=f"extractor_{name}",
        about=f"features of 64 pictures, ViT-B/16, {dtype}",
        build=of(extractor, dtype=dtype),
        peak=0.65,
        attentions=11 if name == "bf16" else 0,
        wide=0.01 if name == "bf16" else None,
      )
      for name, dtype in (("bf16", "bfloat16"), ("f32", "float32"))
    ),
    Program(
      name="export",
      about="the exported program, 64 pictures, float32, its weights inside",
      build=_export,
      peak=0.3,
      wide=None,
      options=_NO_TRITON,
    ),
    *(
      Program(
        name=f"matting_{name}",
        about=f"U2-Net and mattes of 42 cells, {dtype}",
        build=of(_matting, dtype=dtype, canvases=1),
        peak=peak,
        wide=wide,
      )
      for name, dtype, peak, wide in (
        ("f32", "float32", 7.5, None),
        ("bf16", "bfloat16", 3.5, 0.01),
      )
    ),
    Program(
      name="matting_8",
      about="the same of 8 canvases in turn, float32",
      build=of(_matting, dtype="float32", canvases=8),
      peak=7.7,
      wide=None,
      unit="8 canvases",
    ),
    Program(
      name="pretrain_clip",
      about="step of configs/pretrain_clip.py, bfloat16",
      build=_clip,
      peak=0.8,
      attentions=18,
    ),
    Program(
      name="pretrain_vae",
      about="step of configs/pretrain_vae.py, bfloat16",
      build=_vae,
      peak=0.5,
      wide=0.04,  # Muon makes its products in float32.
    ),
    Program(
      name="pretrain_u2netp",
      about="step of configs/pretrain_u2netp.py, bfloat16",
      build=_u2net_training,
      peak=0.4,
    ),
    *(
      Program(
        name=f"pretrain_{name}",
        about=f"step of configs/pretrain_{name}.py, bfloat16",
        build=of(_diffusion, name=name),
        peak=peak,
        attentions=attentions,
        wide=wide,
      )
      for name, peak, attentions, wide in (
        # Muon makes its products in float32.
        ("unet", 0.6, 46, 0.2),
        ("controlnet_canny", 0.25, 26, 0.01),
        # Factors are merged in float32, whose products are few.
        ("lora", 0.2, 26, 0.02),
      )
    ),
    Program(
      name="psd_device",
      about="step of PSD, 64 pictures, all pictures on the device",
      build=of(_paper, name="psd"),
      peak=14.0,
      attentions=11,
      unit="a step",
    ),
    Program(
      name="psd_host",
      about="step of PSD, pictures sent by the host",
      build=of(_paper, name="psd", placement="host"),
      peak=1.0,
      attentions=11,
      unit="a step",
    ),
    Program(
      name="ptl_device",
      about="step of PTL, 64 pictures, all pictures on the device",
      build=of(_paper, name="ptl"),
      peak=19.0,
      attentions=22,
      moved=34.0,
      unit="a step",
    ),
    Program(
      name="ptl_host",
      about="step of PTL, pictures sent by the host",
      build=of(_paper, name="ptl", placement="host"),
      peak=6.0,
      attentions=22,
      moved=34.0,
      unit="a step",
    ),
  ]
  for model, part, batch, peak, attentions in _CANVASES:
    size = "896 x 1536" if model == "canvas" else "1024 x 1024"
    about = {
      "encode": f"SDXL's text encoders, {batch} guided",
      "decode": f"SDXL's decoder, {batch} of {size}",
      "denoise": f"SDXL, {batch} of {size}, guided",
    }[part]
    if part == "denoise" and model == "canvas":
      about += ", two ControlNets"
    found.append(
      Program(
        name=f"{model}_{part}_{batch}",
        about=about,
        build=of(_canvas, model=model, part=part, batch=batch),
        peak=peak,
        attentions=attentions,
        unit="a step" if part == "denoise" else "a call",
      )
    )
  return tuple(found)
