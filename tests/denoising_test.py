"""Training of UNet, ControlNet and LoRA against diffusers and transformers.

The system is one of ours, at random, written as a folder that diffusers reads:
so the folder is tested with everything else.
"""

import dataclasses
from unittest import mock

import diffusers
from diffusers.schedulers import scheduling_euler_ancestral_discrete
import diffusers_twins as twins
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax import errors, rngs, trees
from dppp_jax.diffusion import conditioning, objective, schedulers
from dppp_jax.diffusion import sampler as sampler_lib
from dppp_jax.geneperson import components
from dppp_jax.methods import adapters, beginnings, denoising
from dppp_jax.models import clip, unet, unet_config, vae
from dppp_jax.weights import (
  diffusers_folder,
  diffusion_rules,
  load,
  lora,
  lora_write,
  pipeline_folder,
  tokenizer,
)

# diffusers hands torch tensors to numpy in a way that numpy 2 discourages.
pytestmark = pytest.mark.filterwarnings(
  "ignore:__array__ implementation:DeprecationWarning"
)

PROMPTS = ["a woman in a red coat, front view", "a man with a blue bag"]
SIZE = (16, 8)  # Of the latents; pictures are twice as large.
SCHEDULER = {
  "_class_name": "EulerAncestralDiscreteScheduler",
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "prediction_type": "v_prediction",
  "timestep_spacing": "trailing",
  "rescale_betas_zero_snr": True,
  "steps_offset": 0,
}
# SDXL with two levels, the finer of which has no text.
SMALL = twins.XL | dict(
  block_out_channels=(16, 32),
  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
  transformer_layers_per_block=1,
  attention_head_dim=(1, 2),
)
OPTIONS = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


LOSS = denoising.Options(snr_gamma=5.0, drop=0.5)
RNG = jax.random.key(8)  # Drops the second prompt, not the first.


def _randomised(params, seed):
  """Random norms, biases and zero convolutions too: they would hide faults."""
  rng = np.random.default_rng(seed)
  flat = {}
  for name, leaf in trees.flatten(params).items():
    if leaf.ndim < 2:
      value = rng.uniform(-0.5, 0.5, leaf.shape) + name.endswith("scale")
    else:
      value = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
    flat[name] = value.astype(np.float32)
  return trees.unflatten(flat)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """A system with its parameters, and its folder."""
  folder = tmp_path_factory.mktemp("denoising")
  vocab = tokenizer.train_tokenizer(PROMPTS, folder / "words", vocab_size=540)
  words = load.tokenizer(folder / "words")
  text = clip.TextConfig(
    vocab_size=vocab,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=24,
    projection_dim=32,
    bos_token_id=vocab - 2,
    eos_token_id=vocab - 1,
    pad_token_id=vocab - 1,
  )
  system = denoising.System(
    unet=unet_config.Config(**SMALL),
    texts=(text, text),
    vae=vae.Config(
      down_block_types=("DownEncoderBlock2D",) * 2,
      up_block_types=("UpDecoderBlock2D",) * 2,
      block_out_channels=(8, 16),
      norm_num_groups=4,
      scaling_factor=0.7,
      mid_block_add_attention=False,
    ),
    schedule=schedulers.Config.from_hf(SCHEDULER),
  )
  shapes = {
    "unet": unet.param_shapes(system.unet),
    "vae": vae.param_shapes(system.vae),
    "text_encoder": clip.param_shapes(text),
    "text_encoder_2": clip.param_shapes(text),
  }
  params = {k: _randomised(v, i) for i, (k, v) in enumerate(shapes.items())}
  pipeline_folder.save_xl(
    folder / "sdxl",
    unet=(system.unet, params["unet"]),
    vae=(system.vae, params["vae"]),
    texts=[
      pipeline_folder.Text(text, params[name], words)
      for name in system.text_names
    ],
    scheduler=SCHEDULER,
    sample_size=16,
    dtype="float32",
  )
  return system, params, words, folder / "sdxl"


@pytest.fixture(scope="module")
def pipeline(world):
  found = diffusers.StableDiffusionXLPipeline.from_pretrained(
    world[3], add_watermarker=False
  )
  found.set_progress_bar_config(disable=True)
  return found


def _data(system, words, seed=0, **options):
  rng = np.random.default_rng(seed)
  moments = rng.normal(size=(2, *SIZE, 8)).astype(np.float32)
  ids = [conditioning.time_ids((32, 16), conditioning.Sizes())] * 2
  return denoising.extras(
    system,
    [words, words],
    PROMPTS,
    moments=moments,
    time_ids=np.stack(ids),
    **options,
  )


def _drawn(system, batch, rng, share):
  """Repeats the loss' draws: posterior, noise, timesteps, dropped prompts."""
  key = lambda name: rngs.stream(rng, name)
  mean, logvar = np.split(np.asarray(batch["moments"]), 2, axis=-1)
  normal = jax.random.normal(key("posterior"), mean.shape)
  x0 = (mean + np.exp(0.5 * logvar) * normal) * system.vae.scaling_factor
  return (
    np.asarray(x0),
    np.asarray(jax.random.normal(key("noise"), mean.shape)),
    np.asarray(objective.timesteps(key("timesteps"), len(mean), num=1000)),
    np.asarray(objective.dropped(key("drop"), len(mean), share=share)),
  )


def test_folder_draws_what_diffusers_draws(world, pipeline):
  parts = components.load_components(world[3])
  sampler = sampler_lib.Sampler(parts, compiler_options=OPTIONS)
  shape, steps, seeds = (*SIZE, 4), 4, [3, 4]
  noise = np.random.default_rng(5).normal(size=(steps + 1, 2, *shape))
  noise = noise.astype(np.float32)
  drawn = iter(noise[1:])
  module = scheduling_euler_ancestral_discrete
  give = lambda *a, **k: twins.nchw(next(drawn))
  with torch.no_grad(), mock.patch.object(module, "randn_tensor", give):
    want = pipeline(
      PROMPTS,
      num_inference_steps=steps,
      guidance_scale=3.0,
      height=32,
      width=16,
      latents=twins.nchw(noise[0]),
      output_type="np",
    ).images
  draw = lambda keys, i, *, shape: jnp.asarray(noise[1:])[i]
  with mock.patch.object(schedulers, "draw", draw):
    got = sampler.sample(
      PROMPTS, seeds=seeds, steps=steps, guidance=3.0, noise=noise[0],
      size=(32, 16),
    )  # fmt: skip
  difference = np.abs(np.asarray(got).astype(int) - (want * 255).round())
  assert np.asarray(got).std() > 10
  assert difference.max() <= 2


@pytest.fixture(scope="module")
def losses(world):
  """{zero_dropped: (value, aux)} of the loss with the draws of RNG."""
  found = {}
  for zero in (True, False):
    system = denoising.System(**{**vars(world[0]), "zero_dropped": zero})
    empty = denoising.empty_ids(system, [world[2]] * 2)
    loss = denoising.make_loss(system, LOSS, empty=empty)
    batch = _data(system, world[2])
    found[zero] = twins.run(loss, world[1], {}, batch, RNG)
  return found


@pytest.mark.parametrize("zero", [True, False])
def test_loss_is_that_of_diffusers_training(world, pipeline, losses, zero):
  """As train_text_to_image_sdxl.py takes it, with our draws."""
  batch = _data(world[0], world[2])
  x0, noise, t, drop = _drawn(world[0], batch, RNG, LOSS.drop)
  assert drop.tolist() == [False, True]
  got, aux = losses[zero]
  scheduler = diffusers.DDPMScheduler(
    **{k: v for k, v in SCHEDULER.items() if k != "_class_name"}
  )
  prompts = [
    "" if gone and not zero else text
    for gone, text in zip(drop, PROMPTS, strict=True)
  ]
  with torch.no_grad():
    context, _, pooled, _ = pipeline.encode_prompt(
      prompts, do_classifier_free_guidance=False
    )
    if zero:
      context[1], pooled[1] = 0, 0
    times = torch.from_numpy(t.astype(np.int64))
    noisy = scheduler.add_noise(twins.nchw(x0), twins.nchw(noise), times)
    output = pipeline.unet(
      noisy,
      times,
      context,
      added_cond_kwargs={
        "text_embeds": pooled,
        "time_ids": torch.tensor([[32.0, 16, 0, 0, 32, 16]] * 2),
      },
    ).sample
    target = scheduler.get_velocity(twins.nchw(x0), twins.nchw(noise), times)
    bar = scheduler.alphas_cumprod[times].double()
    snr = bar / (1 - bar)
    every = (output - target).square().mean((1, 2, 3))
    want = (torch.clamp(snr, max=5) / (snr + 1) * every).mean()
  np.testing.assert_allclose(got, want, rtol=2e-5)
  np.testing.assert_allclose(aux.metrics["mse"], every.mean(), rtol=2e-5)


def test_window_is_cut_everywhere_and_told(world):
  system, words = world[0], world[2]
  control = np.random.default_rng(1).integers(0, 256, (2, 32, 16, 3), np.uint8)
  batch = {k: jnp.asarray(x) for k, x in _data(system, words).items()}
  batch["control"] = jnp.asarray(control)
  corners = set()
  cut_window = jax.jit(
    lambda key: denoising.cut_window(
      batch, key, size=(8, 4), stride=(4, 2), factor=2
    )
  )
  for seed in range(40):
    cut = cut_window(jax.random.key(seed))
    ids = np.asarray(cut["time_ids"])
    np.testing.assert_array_equal(ids[:, :2], [[32, 16]] * 2)
    np.testing.assert_array_equal(ids[:, 4:], [[16, 8]] * 2)
    y, x = ids[0, 2:4].astype(int)
    corners.add((y, x))
    np.testing.assert_array_equal(
      cut["control"], control[:, y : y + 16, x : x + 8]
    )
    want = np.asarray(batch["moments"])[
      :, y // 2 : y // 2 + 8, x // 2 : x // 2 + 4
    ]
    np.testing.assert_array_equal(cut["moments"], want)
  assert corners == {(y, x) for y in (0, 8, 16) for x in (0, 4, 8)}


@pytest.fixture(scope="module")
def control(world):
  """A system with a ControlNet, and the parameters that it begins with."""
  base, params = world[:2]
  config = beginnings.control_config(base.unet, widths=(4, 8))
  system = denoising.System(**{**vars(base), "control": config})
  given = {k: v for k, v in params.items() if k != "vae"}
  begin = beginnings.controlnet_init(system, given)
  return system, begin({}, {}, jax.random.key(0))[0]


def test_controlnet_begins_as_diffusers_does(control, pipeline, tmp_path):
  theirs = diffusers.ControlNetModel.from_unet(
    pipeline.unet, conditioning_embedding_out_channels=(4, 8)
  )
  system, begun = control
  ours = begun["controlnet"]
  diffusers_folder.save(tmp_path / "ours", system.control, ours)
  read = diffusers.ControlNetModel.from_pretrained(tmp_path / "ours")
  wanted, got = theirs.state_dict(), read.state_dict()
  assert wanted.keys() == got.keys()
  fresh = [k for k in wanted if "cond_embedding" in k and "conv_out" not in k]
  assert len(fresh) == 6
  for name in wanted.keys() - set(fresh):
    assert torch.equal(wanted[name], got[name]), name
  numbers = lambda net: {
    k: tuple(v) if isinstance(v, list) else v
    for k, v in net.config.items()
    if k[0] != "_" and k not in ("upcast_attention", "encoder_hid_dim_type")
  }
  ours_said, theirs_said = numbers(read), numbers(theirs)
  differs = {k for k in theirs_said if ours_said[k] != theirs_said[k]}
  assert differs <= {"num_attention_heads"}


def test_controlnet_without_attention_copies_the_rest(world, tmp_path):
  system, params = world[:2]
  config = beginnings.control_config(
    system.unet, widths=(4, 8), attention=False
  )
  net = beginnings.from_unet(params["unet"], config, jax.random.key(0))
  flat, theirs = trees.flatten(net), trees.flatten(params["unet"])
  assert not [name for name in flat if "attentions" in name]
  assert len(flat.keys() & theirs.keys()) > 20
  for name in flat.keys() & theirs.keys():
    np.testing.assert_array_equal(flat[name], theirs[name])
  diffusers_folder.save(tmp_path / "net", config, net)
  read = diffusers.ControlNetModel.from_pretrained(tmp_path / "net")
  assert {type(block).__name__ for block in read.down_blocks} == {"DownBlock2D"}
  assert type(read.mid_block).__name__ == "UNetMidBlock2D"


TARGETS = r".*/(attn[12]/to_(q|k|v|out_0)|resnets_0/conv1|conv_shortcut)"


@pytest.fixture(scope="module")
def factors(world):
  """Fresh factors, random ones, and the networks with the one and the other."""
  net = world[1]["unet"]
  fresh = adapters.init_params(net, jax.random.key(0), targets=TARGETS, rank=4)
  fresh = jax.tree.map(np.asarray, fresh)
  changed = _randomised(fresh, 3)
  merge = jax.jit(lambda factors: adapters.merge(net, factors, scale=1.5))
  return fresh, changed, merge(fresh), merge(changed)


def test_fresh_factors_change_nothing(world, factors):
  before = trees.flatten(world[1]["unet"])
  for name, leaf in trees.flatten(factors[2]).items():
    np.testing.assert_array_equal(leaf, before[name])


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_merged_file_is_what_was_trained(world, factors, tmp_path, layout):
  system, params = world[:2]
  trained, before = trees.flatten(factors[3]), trees.flatten(params["unet"])
  path = lora_write.save(
    tmp_path / "one.safetensors",
    factors[1],
    diffusion_rules.unet(system.unet),
    alpha=6.0,  # 1.5 times the rank.
    layout=layout,
  )
  merged, (report,) = lora.merge({"unet": params["unet"]}, [lora.Lora(path)])
  assert not report.unmatched
  assert report.matched["unet"] == len(trees.flatten(factors[1])) // 2 > 10
  changed = 0
  for name, leaf in trees.flatten(merged["unet"]).items():
    np.testing.assert_allclose(leaf, trained[name], atol=2e-6)
    changed += np.abs(leaf - before[name]).max() > 1e-3
  assert changed == report.matched["unet"]


def test_fresh_controlnet_and_lora_change_nothing_and_learn(
  world, control, losses
):
  """Both begin at zero, where the gradient reaches their last factors only."""
  system, begun = control
  images = np.random.default_rng(1).integers(0, 256, (2, 32, 16, 3), np.uint8)
  batch = _data(system, world[2], control=images)
  init = beginnings.lora_init(begun, targets=r".*attn2/to_k", rank=2)
  begun, _ = init({}, {}, jax.random.key(0))
  trained = {k: begun.pop(k) for k in ("controlnet", "lora")}
  loss = denoising.make_loss(system, LOSS)
  of_both = lambda x: loss({**begun, **x}, {}, batch, RNG)[0]
  value, grads = twins.run(jax.value_and_grad(of_both), trained)
  np.testing.assert_allclose(value, losses[True][0], rtol=1e-6)
  for name, grad in trees.flatten(grads).items():
    zero = "/controlnet_" in name and "cond_embedding" not in name
    last = zero or name.endswith("/up") or "cond_embedding/conv_out" in name
    if "cond_embedding" in name:  # Behind two zero layers, so to speak.
      last = False
    assert (np.abs(grad).max() > 0) == last, name


def test_a_controlnet_is_dropped_for_its_share(world, control):
  system, begun = control
  images = np.random.default_rng(1).integers(0, 256, (2, 32, 16, 3), np.uint8)
  batch = _data(system, world[2], control=images)
  loud = jax.tree.map(lambda x: x + 0.05, begun["controlnet"])

  def value(net, share):
    options = dataclasses.replace(LOSS, control_drop=share)
    loss = denoising.make_loss(system, options)
    of = lambda net: loss({**begun, "controlnet": net}, {}, batch, RNG)[0]
    return float(twins.run(of, net))

  silent = value(begun["controlnet"], 0.0)  # Its last layers are zero.
  assert abs(value(loud, 0.0) - silent) > 1e-3
  np.testing.assert_allclose(value(loud, 1.0), silent, rtol=1e-6)
  # As the key falls, of both examples one is left alone.
  key = rngs.stream(RNG, "control")
  alone = [objective.dropped(key, 2, share=s).sum() for s in (0.3, 0.5, 0.7)]
  share = dict(zip(map(int, alone), (0.3, 0.5, 0.7), strict=True)).get(1)
  if share is not None:
    mixed = value(loud, share)
    assert min(abs(mixed - silent), abs(mixed - value(loud, 0.0))) > 1e-4


@pytest.mark.parametrize(
  ("targets", "rank", "words"),
  [("nothing", 4, "match no module"), (TARGETS, 0, "rank 0")],
)
def test_bad_lora_is_one_line(world, targets, rank, words):
  with pytest.raises(errors.UserError, match=words):
    adapters.init_params(
      world[1]["unet"], jax.random.key(0), targets=targets, rank=rank
    )


def test_fresh_parameters_have_the_spread_of_flax(world):
  shapes = unet.param_shapes(world[0].unet)
  zero = r"conv_out/kernel"
  got = beginnings.fresh(shapes, jax.random.key(3), zero=zero)
  seen = set()
  for name, leaf in trees.flatten(got).items():
    leaf = np.asarray(leaf)
    assert leaf.shape == trees.flatten(shapes)[name].shape
    if not name.endswith("/kernel") or name == "conv_out/kernel":
      np.testing.assert_array_equal(leaf, float(name.endswith("/scale")))
    elif leaf.size > 2000:
      want = 1 / np.sqrt(np.prod(leaf.shape[:-1]))
      np.testing.assert_allclose(leaf.std(), want, rtol=0.08)
      assert leaf[0].tobytes() not in seen
      seen.add(leaf[0].tobytes())
  assert len(seen) > 10
