"""Whole pictures against diffusers' pipelines, from folders that it wrote.

diffusers is handed our noise: the generator is not what is tested here.
"""

import contextlib
import dataclasses
from unittest import mock

import diffusers
from diffusers.schedulers import scheduling_euler_ancestral_discrete
import diffusers_twins as twins
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from dppp_jax import devices, errors, trees
from dppp_jax.diffusion import components as components_lib
from dppp_jax.diffusion import conditioning, schedulers
from dppp_jax.diffusion import sampler as sampler_lib
from dppp_jax.geneperson import components
from dppp_jax.weights import lora, tokenizer

# diffusers hands torch tensors to numpy in a way that numpy 2 discourages.
pytestmark = pytest.mark.filterwarnings(
  "ignore:__array__ implementation:DeprecationWarning"
)

# float32 on both sides, over all steps; half a grey level is 2e-3.
TOLERANCE = 2e-6
PROMPTS = ["a woman in a red coat, front view", "a man with a blue bag"]
SEEDS = [7, 2**40 + 5]
# Compiles quickly rather than well.
OPTIONS = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
_UNION = (
  *("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
  *("unet", "controlnet", "scheduler"),
)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def _text(cls, vocab, seed, **options):
  config = transformers.CLIPTextConfig(
    vocab_size=vocab,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    max_position_embeddings=24,
    projection_dim=32,
    bos_token_id=vocab - 2,
    pad_token_id=0,
    **options,
  )
  return twins.randomise(cls(config), seed)


def _vae(widths, **options):
  net = diffusers.AutoencoderKL(
    block_out_channels=widths,
    down_block_types=("DownEncoderBlock2D",) * len(widths),
    up_block_types=("UpDecoderBlock2D",) * len(widths),
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=4,
    **options,
  )
  return twins.randomise(net, 3)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
  """Two tokenisers, of which the second pads with "!" as SDXL's does."""
  folder = tmp_path_factory.mktemp("tokenizer")
  vocab = tokenizer.train_tokenizer(PROMPTS, folder, vocab_size=540)
  load = lambda **options: transformers.CLIPTokenizer.from_pretrained(
    folder, model_max_length=24, **options
  )
  return vocab, load(), load(pad_token="!")


@pytest.fixture(scope="session")
def xl(tokenizers, tmp_path_factory):
  """diffusers' SDXL with two ControlNets, and the folder it was saved in."""
  vocab, first, second = tokenizers
  text = transformers.CLIPTextModel
  projected = transformers.CLIPTextModelWithProjection
  unet = diffusers.UNet2DConditionModel(**twins.XL, sample_size=8)
  unet = twins.randomise(unet, 2)
  nets = []
  for seed in (5, 6):
    net = diffusers.ControlNetModel.from_unet(
      unet,
      conditioning_embedding_out_channels=(4, 8),
      controlnet_conditioning_channel_order=("rgb", "bgr")[seed % 2],
    )
    nets.append(twins.randomise(net, seed))
  pipeline = diffusers.StableDiffusionXLControlNetPipeline(
    vae=_vae((8, 16), scaling_factor=0.13025, sample_size=64),
    text_encoder=_text(text, vocab, 0, num_hidden_layers=3, eos_token_id=2),
    text_encoder_2=_text(
      projected,
      vocab,
      1,
      num_hidden_layers=4,
      eos_token_id=vocab - 1,
      hidden_act="gelu",
    ),
    tokenizer=first,
    tokenizer_2=second,
    unet=unet,
    controlnet=nets,
    scheduler=diffusers.EulerAncestralDiscreteScheduler(
      **BETAS, timestep_spacing="leading", steps_offset=1
    ),
    add_watermarker=False,
  )
  folder = tmp_path_factory.mktemp("xl")
  pipeline.save_pretrained(folder)
  pipeline.set_progress_bar_config(disable=True)
  return pipeline, folder


@pytest.fixture(scope="session")
def sampler(xl):
  parts = components.load_components(xl[1])
  return sampler_lib.Sampler(parts, compiler_options=OPTIONS)


def _images(seed=0, batch=2, size=(24, 16)):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (batch, *size, 3), np.uint8)


def _noise(seeds, i, shape):
  return np.asarray(
    schedulers.draw(
      jax.random.wrap_key_data(
        np.array([[s >> 32, s & 0xFFFFFFFF] for s in seeds], np.uint32),
        impl="threefry2x32",
      ),
      i,
      shape=shape,
    )
  )


def _diffusers(pipeline, *, steps, size, images=None, seeds=None, **options):
  """Latents and pictures of diffusers' pipeline, with our noise."""
  shape, dtype = (size[0] // 2, size[1] // 2, 4), pipeline.unet.dtype
  seeds = seeds or SEEDS[: len(options["prompt"])]
  drawn = iter(range(steps))
  draw = lambda *a, **k: twins.nchw(_noise(seeds, next(drawn), shape))
  module = scheduling_euler_ancestral_discrete
  if images is not None:
    images = [twins.nchw(x.astype(np.float32) / 255) for x in images]
    options |= {"image": images} if len(images) > 1 else {"image": images[0]}
  with torch.no_grad(), mock.patch.object(module, "randn_tensor", draw):
    latents = pipeline(
      num_inference_steps=steps,
      latents=twins.nchw(_noise(seeds, -1, shape)).to(dtype),
      output_type="latent",
      **({} if "control_image" in options else _sides(size)),
      **options,
    ).images
    z = latents / pipeline.vae.config.scaling_factor
    pictures = pipeline.image_processor.postprocess(
      pipeline.vae.decode(z).sample, output_type="np"
    )
  return twins.nhwc(latents), (pictures * 255).round().astype(np.uint8)


@contextlib.contextmanager
def _wide(pipeline):
  """diffusers in float64: then the distance is our own rounding alone.

  Guidance g is u + g (c - u), in which the rounding of both halves counts g
  times: two float32 computations may be further apart than either is off.
  """
  try:
    yield pipeline.to(torch.float64)
  finally:
    pipeline.to(torch.float32)


def _sides(size):
  return {"height": size[0], "width": size[1]}


def _compare(sampler, want, prompts, **options):
  seeds = SEEDS[: len(prompts)]
  latents = sampler.latents(prompts, seeds=seeds, **options)
  assert latents.dtype == np.float32
  assert twins.distance(latents, want[0]) < TOLERANCE
  got = np.asarray(sampler.decode(latents, params=options.get("params")))
  assert got.dtype == np.uint8 and got.std() > 10
  difference = np.abs(got.astype(int) - want[1].astype(int))
  assert difference.max() <= 1
  assert (difference > 0).mean() < 1e-3


@contextlib.contextmanager
def _no_compilation():
  """Fails if XLA compiles anything at all."""
  names = []
  listener = lambda name, *a, **k: names.append(name)
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)
  assert not [name for name in names if "backend_compile" in name]


# Other numbers than those of the first test, wherever there is a number.
OTHERS = dict(
  seeds=[2**64 - 1, 0],
  negative_prompts=["blurry", "two people, night"],
  control_images=[_images(2), _images(3)],
  control_scales=0.3,
  control_ranges=(0.5, 1),
  steps=3,
  guidance=[1.0, 7.5],
  guidance_rescale=0.7,
  scheduler=schedulers.k_diffusion(schedulers.Config(method="dpmpp_2m")),
  sizes=conditioning.Sizes(original=(512, 400), crop=(3, 5)),
)


def test_sdxl_with_two_controlnets_equals_diffusers(xl, sampler):
  images = [_images(0), _images(1)]
  want = _diffusers(
    xl[0],
    steps=4,
    size=(24, 16),
    images=images,
    prompt=PROMPTS,
    guidance_scale=5.0,
    controlnet_conditioning_scale=[0.8, 0.5],
    control_guidance_start=[0.0, 0.25],
    control_guidance_end=[0.5, 1.0],
  )
  _compare(
    sampler,
    want,
    PROMPTS,
    steps=4,
    control_images=images,
    control_scales=[0.8, 0.5],
    control_ranges=[(0, 0.5), (0.25, 1)],
  )


def test_sizes_of_the_negative_half_equal_diffusers(xl, sampler):
  images = [_images(6), _images(7)]
  sizes = conditioning.Sizes((512, 400), (3, 5), (1024, 512))
  negative = conditioning.Sizes((100, 64), (40, 2), (24, 16))
  # Of several prompts diffusers mixes up whose sizes are whose: each alone.
  parts = [
    _diffusers(
      xl[0],
      steps=3,
      size=(24, 16),
      images=[image[i : i + 1] for image in images],
      seeds=SEEDS[i : i + 1],
      prompt=PROMPTS[i : i + 1],
      negative_prompt=["blurry"],
      guidance_scale=2.0,
      original_size=sizes.original,
      crops_coords_top_left=sizes.crop,
      target_size=sizes.target,
      negative_original_size=negative.original,
      negative_crops_coords_top_left=negative.crop,
      negative_target_size=negative.target,
    )
    for i in range(2)
  ]
  want = [np.concatenate(both) for both in zip(*parts, strict=True)]
  options = dict(
    negative_prompts=["blurry"] * 2,
    steps=3,
    guidance=2.0,
    control_images=images,
    sizes=sizes,
  )
  _compare(sampler, want, PROMPTS, negative_sizes=negative, **options)
  same = sampler.latents(PROMPTS, seeds=SEEDS, **options)
  assert twins.distance(same, want[0]) > 1e-3


def _lora(pipeline, folder):
  """Writes a LoRA; returns its file, and the weights that it changes."""
  layer = "encoder.layers.0.self_attn.q_proj"
  names = {
    "unet": "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "text_encoder": "text_model." + layer,
    "text_encoder_2": "text_model." + layer,
  }
  rng = np.random.default_rng(9)
  tensors, changes = {}, []
  for part, name in names.items():
    net = getattr(pipeline, part)
    inner = name if part != "text_encoder" else layer
    weight = net.get_submodule(inner).weight
    down = rng.normal(size=(2, weight.shape[1])).astype(np.float32)
    up = 0.1 * rng.normal(size=(weight.shape[0], 2)).astype(np.float32)
    tensors[f"{part}.{name}.lora_A.weight"] = down
    tensors[f"{part}.{name}.lora_B.weight"] = up
    changes.append((weight, torch.from_numpy(up @ down)))
  safetensors.numpy.save_file(tensors, folder / "style.safetensors")
  return folder / "style.safetensors", changes


def test_sdxl_with_lora_negatives_and_sizes_equals_diffusers(
  xl, sampler, tmp_path
):
  pipeline, _ = xl
  images = [_images(4), _images(5)]
  negative = ["blurry, two people", ""]
  trailing = dict(timestep_spacing="trailing", prediction_type="v_prediction")
  scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS, **trailing)
  file, changes = _lora(pipeline, tmp_path)
  for weight, delta in changes:
    weight.data += 0.8 * delta
  with mock.patch.object(pipeline, "scheduler", scheduler):
    want = _diffusers(
      pipeline,
      steps=3,
      size=(24, 16),
      images=images,
      prompt=PROMPTS[::-1],
      negative_prompt=negative,
      guidance_scale=2.5,
      controlnet_conditioning_scale=[0.0, 1.0],
      original_size=(512, 400),
      crops_coords_top_left=(3, 5),
      target_size=(1024, 512),
    )
  for weight, delta in changes:
    weight.data -= 0.8 * delta
  options = dict(
    negative_prompts=negative,
    steps=3,
    guidance=2.5,
    control_images=images,
    control_scales=[0, 1],
    scheduler=schedulers.Config(**trailing),
    sizes=conditioning.Sizes((512, 400), (3, 5), (1024, 512)),
  )
  params = components.merge_loras(
    sampler.components.params, [lora.Lora(file, scale=0.8)]
  )
  params = sampler.place(params)
  _compare(sampler, want, PROMPTS[::-1], params=params, **options)
  plain = sampler.latents(PROMPTS[::-1], seeds=SEEDS, **options)
  assert twins.distance(plain, want[0]) > 1e-2


def test_one_program_serves_everything(sampler):
  first = dict(control_images=[_images(0), _images(1)], steps=4)
  first = sampler.sample(PROMPTS, seeds=SEEDS, **first)
  params = sampler.place(
    jax.tree.map(lambda x: 1.01 * x, sampler.components.params)
  )
  before = dict(sampler.traces)
  with _no_compilation():
    second = sampler.sample(["a dog", ""], **OTHERS)
    third = sampler.sample(["a dog", ""], **OTHERS, params=params)
  assert sampler.traces == before
  assert set(before.values()) == {1}
  for a, b in ((first, second), (second, third)):
    difference = np.abs(np.asarray(a).astype(int) - np.asarray(b))
    assert all(difference[i].mean() > 1 for i in range(2))


def test_picture_does_not_depend_on_its_batch(sampler):
  both = np.asarray(sampler.latents(PROMPTS, **OTHERS))
  flip = lambda x: x[::-1] if isinstance(x, (list, np.ndarray)) else x
  others = {k: flip(v) for k, v in OTHERS.items()}
  others["control_images"] = [x[::-1] for x in OTHERS["control_images"]]
  swapped = np.asarray(sampler.latents(PROMPTS[::-1], **others))
  np.testing.assert_array_equal(swapped[::-1], both)
  others["seeds"] = [0, 5]
  others["control_images"] = [
    np.stack([x[1], x[1]]) for x in OTHERS["control_images"]
  ]
  mixed = np.asarray(sampler.latents([PROMPTS[1], "a dog"], **others))
  np.testing.assert_array_equal(mixed[0], both[1])
  assert twins.distance(mixed[1], both[0]) > 0.1


@pytest.mark.parametrize(
  "options, is_run",
  [
    (dict(control_scales=[0.7, 0]), False),
    (dict(control_ranges=[(0, 1), (0.3, 0.4)]), False),
    (dict(control_ranges=[(0, 1), (0.7, 1)]), True),
  ],
)
def test_inactive_controlnet_is_not_run(sampler, options, is_run):
  """Its weights are no numbers, and nobody notices."""
  params = dict(sampler.params)
  params["controlnet_1"] = jax.tree.map(
    lambda x: np.full(x.shape, np.nan, x.dtype), params["controlnet_1"]
  )
  images = [_images(0), _images(1)]
  options = dict(control_images=images, seeds=SEEDS, steps=4) | options
  got = np.asarray(sampler.latents(PROMPTS, params=params, **options))
  assert np.isfinite(got).all() != is_run


def test_noise_may_be_given_and_latents_are_donated(sampler):
  options = dict(control_images=[_images(0), _images(1)], steps=2)
  drawn, copies = [], []
  begin = sampler.programs["begin"]

  def spy(*args, **kwargs):
    drawn.append(begin(*args, **kwargs))
    copies.append(np.array(drawn[-1]))
    return drawn[-1]

  with mock.patch.dict(sampler.programs, begin=spy):
    want = sampler.latents(PROMPTS, seeds=SEEDS, **options)
  assert drawn[0].is_deleted()
  noise = jnp.asarray(copies[0])
  got = sampler.latents(PROMPTS, seeds=SEEDS, noise=noise, **options)
  np.testing.assert_array_equal(got, want)
  assert not noise.is_deleted()


def test_devices_share_a_batch_and_draw_the_same(sampler):
  split = sampler_lib.Sampler(
    sampler.components, devices=jax.devices()[:2], compiler_options=OPTIONS
  )
  prompts, seeds = [*PROMPTS, "a dog", ""], [1, 2, 3, 4]
  poses, grid = _images(0, batch=4), _images(1)[0]
  negatives, guidance = ["night", "", "blurry", "a"], [1.5, 2.0, 2.5, 3.0]

  def draw(sampler, rows):
    return sampler.latents(
      prompts[rows],
      seeds=seeds[rows],
      control_images=[poses[rows], grid],
      control_scales=[1.0, 0.5],
      guidance=guidance[rows],
      guidance_rescale=0.3,
      negative_prompts=negatives[rows],
      steps=3,
    )

  got = draw(split, slice(4))
  assert {shard.data.shape[0] for shard in got.addressable_shards} == {2}
  parts = [draw(sampler, slice(0, 2)), draw(sampler, slice(2, 4))]
  assert twins.distance(got, np.concatenate(parts)) < TOLERANCE
  pictures = split.decode(got)
  assert len(pictures.sharding.device_set) == 2
  wanted = np.asarray(sampler.decode(np.asarray(got)), int)
  assert np.abs(wanted - pictures).max() <= 1  # Halves may be rounded up.
  # One cannot be divided: the first device draws it.
  alone = draw(split, slice(1))
  assert alone.devices() == {jax.devices()[0]}
  assert twins.distance(alone, draw(sampler, slice(1))) < TOLERANCE


def test_decode_in_parts_equals_whole(sampler):
  latents = np.random.default_rng(0).normal(size=(2, 12, 8, 4))
  latents = latents.astype(np.float32)
  whole = np.asarray(sampler.decode(latents))
  decode_batch, sampler._decode_batch = sampler._decode_batch, 1
  try:
    parts = jax.jit(sampler._decode)(sampler.params["vae"], latents)
  finally:
    sampler._decode_batch = decode_batch
    sampler.traces["decode"] -= 1
  difference = np.abs(whole.astype(int) - np.asarray(parts))
  assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(prompts=["red " * 23, ""]), '1 over the encoder\'s 24, and "red"'),
    (dict(control_images=[_images(0)]), "1 control_images for 2 ControlNets"),
    (
      dict(control_images=[_images(0), _images(1, size=(16, 24))]),
      r"control_images\[1\] is 16x24 \(HxW\) and the canvas 24x16",
    ),
    (
      dict(control_images=[_images(0), _images(0, batch=3)]),
      r"control_images\[1\] is \(3, 24, 16, 3\): give",
    ),
    (
      dict(control_images=[255.0 * _images(0)] * 2),
      r"control_images\[0\] is float64 and not in \[0, 1\]",
    ),
    (
      dict(control_images=[_images(0, size=(25, 16))] * 2),
      r"canvas 25x16 \(HxW\): both sides must be multiples of 2",
    ),
    (dict(size=(16, 16)), "24x16 .* and the canvas 16x16"),
    (dict(seeds=[1]), "1 seeds for 2 prompts"),
    (dict(seeds=[1, 2**64]), "seed 18446744073709551616"),
    (dict(negative_prompts=["a"]), "1 negative_prompts for 2 prompts"),
    (dict(control_ranges=(0.5, 0.5)), r"range \(0.5, 0.5\)"),
    (dict(control_scales=[1, 1, 1]), "each of the 2 ControlNets"),
    (dict(steps=0), "num_steps=0"),
    (dict(guidance=[1, 2, 3]), "3 guidance for 2 prompts"),
    (dict(noise=np.zeros((2, 4, 4, 4))), "the canvas needs"),
    (
      dict(scheduler=schedulers.Config(method="heun")),
      "sampler 'heun' is not built",
    ),
  ],
)
def test_bad_request_is_one_line(sampler, options, words):
  options = dict(prompts=PROMPTS, seeds=SEEDS) | options
  options.setdefault("control_images", [_images(0), _images(1)])
  with pytest.raises(errors.UserError, match=words) as caught:
    sampler.sample(**options)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(texts=1), "wants 2 text encoders and there are 1"),
    (dict(unet=dict(in_channels=9)), "takes 9 channels and the VAE makes 4"),
    (dict(unet=dict(time_cond_proj_dim=8)), "consistency model"),
    (dict(unet=dict(cross_attention_dim=65)), "give 64 .* UNet reads 65"),
    (dict(unet=dict(addition_time_embed_dim=16)), "80 numbers .* are 128"),
    (
      dict(unet=dict(block_out_channels=(32, 64, 256))),
      r"ControlNet 1 is for another base model \(block_out_channels",
    ),
    (dict(vae=dict(latent_channels=8)), "the VAE makes 8"),
  ],
)
def test_parts_that_do_not_fit_are_refused(sampler, change, words):
  parts = sampler.components
  for name, value in change.items():
    old = getattr(parts, name)
    new = old[:value] if name == "texts" else dataclasses.replace(old, **value)
    parts = dataclasses.replace(parts, **{name: new})
  with pytest.raises(errors.UserError, match=words):
    components_lib.check(parts)


def test_bad_folders_are_refused(xl, tmp_path):
  _, folder = xl
  load = components.load_components
  with pytest.raises(errors.UserError, match="scheduler 'heun' is not built"):
    load(folder, scheduler="heun")
  with pytest.raises(errors.UserError, match=r"model_index\.json is missing"):
    load(tmp_path)
  with pytest.raises(errors.UserError, match="no_such does not exist"):
    load(folder, controlnets=[folder / "no_such"])


def test_compiled_programs_are_kept_on_disk(tmp_path):
  old = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  try:
    devices.use_compilation_cache(tmp_path / "cache")
    jax.jit(lambda x: jnp.sin(x) + 3)(np.float32(1)).block_until_ready()
    assert list((tmp_path / "cache").iterdir())
  finally:
    devices.use_compilation_cache(None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", old)


@pytest.fixture(scope="session")
def sd1(tokenizers, tmp_path_factory):
  """diffusers' SD 1.x with a ControlNet beside it, and both on disk."""
  vocab, first, _ = tokenizers
  unet = diffusers.UNet2DConditionModel(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=32,
    attention_head_dim=4,
    sample_size=8,
  )
  unet = twins.randomise(unet, 2)
  pipeline = diffusers.StableDiffusionPipeline(
    vae=_vae((8, 16), latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
    text_encoder=_text(
      transformers.CLIPTextModel, vocab, 0, num_hidden_layers=3, eos_token_id=2
    ),
    tokenizer=first,
    unet=unet,
    scheduler=diffusers.DDIMScheduler(
      **BETAS,
      steps_offset=1,
      clip_sample=False,
      set_alpha_to_one=False,
      prediction_type="v_prediction",
    ),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )
  pipeline.set_progress_bar_config(disable=True)
  folder = tmp_path_factory.mktemp("sd1")
  pipeline.save_pretrained(folder)
  net = diffusers.ControlNetModel.from_unet(
    unet, conditioning_embedding_out_channels=(4, 8)
  )
  net = twins.randomise(net, 4)
  net.save_pretrained(folder / "pose")
  return pipeline, net, folder


def test_sd1_equals_diffusers_and_bfloat16_is_near(sd1, monkeypatch):
  pipeline, _, folder = sd1
  # diffusers looks for the norm where transformers had it before version 5.
  monkeypatch.setattr(
    transformers.CLIPTextModel,
    "text_model",
    property(lambda self: self),
    raising=False,
  )
  with _wide(pipeline):
    want = _diffusers(
      pipeline,
      steps=3,
      size=(16, 16),
      prompt=PROMPTS,
      negative_prompt=["night", "blurry"],
      guidance_scale=7.5,
      guidance_rescale=0.3,
      clip_skip=1,
    )
  parts = components.load_components(folder)
  options = dict(clip_skip=1, compiler_options=OPTIONS)
  request = dict(
    negative_prompts=["night", "blurry"],
    steps=3,
    guidance=7.5,
    guidance_rescale=0.3,
  )
  sampler = sampler_lib.Sampler(parts, **options)
  _compare(sampler, want, PROMPTS, **request)
  assert sampler.sample(PROMPTS, seeds=SEEDS, steps=1).shape == (2, 16, 16, 3)
  # Half the work where nothing is guided; one more program for it.
  alone = _diffusers(
    pipeline,
    steps=2,
    size=(16, 16),
    prompt=PROMPTS,
    guidance_scale=1.0,
    clip_skip=1,
  )
  _compare(sampler, alone, PROMPTS, steps=2, guidance=0.5)
  assert sampler.traces["denoise"] == 2

  half = sampler_lib.Sampler(parts, dtype=jnp.bfloat16, **options)
  dtypes = {k: v.dtype for k, v in trees.flatten(half.params).items()}
  assert dtypes["unet/conv_in/kernel"] == jnp.bfloat16
  assert dtypes["vae/decoder/conv_in/kernel"] == jnp.bfloat16
  for name in (
    "unet/conv_out/kernel",
    "unet/time_embedding/linear_1/kernel",
    "unet/conv_norm_out/scale",
    "vae/post_quant_conv/kernel",
  ):
    assert dtypes[name] == np.float32
  latents = half.latents(PROMPTS, seeds=SEEDS, **request)
  assert latents.dtype == np.float32
  assert 1e-4 < twins.distance(latents, want[0]) < 0.05
  difference = np.asarray(half.decode(latents)).astype(int) - want[1]
  assert np.abs(difference).mean() < 3
  narrow = sampler_lib.Sampler(parts, dtype=jnp.float16)
  kernel = narrow.params["vae"]["decoder"]["conv_in"]["kernel"]
  assert kernel.dtype == np.float32  # force_upcast


def test_guess_mode_equals_diffusers(sd1):
  pipeline, net, folder = sd1
  images = [_images(0, size=(16, 16))]
  parts = {k: v for k, v in pipeline.components.items() if k != "image_encoder"}
  controlled = diffusers.StableDiffusionControlNetPipeline(
    **parts, controlnet=net, requires_safety_checker=False
  )
  controlled.set_progress_bar_config(disable=True)
  want = _diffusers(
    controlled,
    steps=2,
    size=(16, 16),
    images=images,
    prompt=PROMPTS,
    guidance_scale=3.0,
    guess_mode=True,
    controlnet_conditioning_scale=0.9,
  )
  loaded = components.load_components(folder, controlnets=[folder / "pose"])
  sampler = sampler_lib.Sampler(loaded, guess=True, compiler_options=OPTIONS)
  _compare(
    sampler,
    want,
    PROMPTS,
    steps=2,
    guidance=3.0,
    control_images=images,
    control_scales=0.9,
  )


def test_union_equals_diffusers(xl, tmp_path):
  pipeline, folder = xl
  values = {k: v for k, v in twins.XL.items() if k != "up_block_types"}
  net = diffusers.ControlNetUnionModel(
    **values,
    conditioning_embedding_out_channels=(4, 8),
    num_trans_channel=32,
    num_trans_head=2,
    num_proj_channel=32,
  )
  net = twins.randomise(net, 7)
  net.save_pretrained(tmp_path)
  parts = pipeline.components | {"controlnet": net}
  union = diffusers.StableDiffusionXLControlNetUnionPipeline(
    **{k: parts[k] for k in parts if k in _UNION}, add_watermarker=False
  )
  union.set_progress_bar_config(disable=True)
  images = [_images(0, batch=1), _images(1, batch=1)]
  want = _diffusers(
    union,
    steps=2,
    size=(24, 16),
    prompt=PROMPTS[:1],
    guidance_scale=3.0,
    control_image=[twins.nchw(x.astype(np.float32) / 255) for x in images],
    control_mode=[4, 1],
    controlnet_conditioning_scale=0.9,
  )
  loaded = components.load_components(folder, controlnets=[tmp_path])
  with pytest.raises(errors.UserError, match="takes kinds of 0 to 5"):
    sampler_lib.Sampler(loaded)
  sampler = sampler_lib.Sampler(
    loaded, kinds=[(4, 1)], compiler_options=OPTIONS
  )
  _compare(
    sampler,
    want,
    PROMPTS[:1],
    steps=2,
    guidance=3.0,
    control_images=[images],
    control_scales=0.9,
  )
