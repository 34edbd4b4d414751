"""A whole stage A of random networks, small enough to draw on a CPU in tests.

diffusers and transformers write it: what loads it loads SDXL.
"""

import math
import pathlib

import diffusers
import diffusers_twins as twins
import jax
import numpy as np
import safetensors.numpy
import transformers

from dppp_jax.geneperson import prompts
from dppp_jax.models import u2net
from dppp_jax.weights import tokenizer
from dppp_jax.weights import u2net as u2net_weights

# 2 x 2 cells of 32 x 16 pixels; VAE and UNet shrink by 2 each.
FLAGS = (
  "--config.num_identities=5",
  "--config.cap=3",
  "--config.image_size=32,16",
  "--config.canvas.rows=2",
  "--config.canvas.cols=2",
  "--config.canvas.cell=32,16",
  "--config.canvas.multiple=4",
  "--config.poses.fill=0.8",
  "--config.sampler.steps=2",
  "--config.control.pose_scale=0.9",
  "--config.control.grid_scale=0.4",
  "--config.backgrounds.count=2",
  "--config.matting.size=32,32",
  "--config.run.batch_size=2",
  "--config.run.num_threads=2",
  "--config.loras.style_scale=0.5",
)
# Random networks draw nothing that a rule would keep.
NO_RULES = tuple(
  f"--config.rules.{name}=-1"
  for name in (
    *("min_peak", "min_area", "max_area", "max_second", "max_border"),
    *("max_feet", "min_sharpness", "min_agreement", "min_difference"),
  )
)
_WIDTHS = (16, 32)
_UNET = dict(
  block_out_channels=_WIDTHS,
  layers_per_block=1,
  norm_num_groups=8,
  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
  cross_attention_dim=32,
  transformer_layers_per_block=(1, 1),
  attention_head_dim=(1, 2),
  use_linear_projection=True,
  addition_embed_type="text_time",
  addition_time_embed_dim=8,
  projection_class_embeddings_input_dim=6 * 8 + 16,
  sample_size=16,
)


def write(folder: pathlib.Path) -> dict[str, str]:
  """Writes the networks, and returns the flags that name them, by key."""
  people = prompts.People(0)
  captions = [people[pid].prompt() for pid in range(50)]
  words = folder / "words"
  vocab = tokenizer.train_tokenizer(captions, words, vocab_size=700)
  read = lambda **options: transformers.CLIPTokenizer.from_pretrained(
    words, model_max_length=77, **options
  )
  unet = diffusers.UNet2DConditionModel(**_UNET)
  twins.randomise(unet, 2)
  pipeline = diffusers.StableDiffusionXLPipeline(
    vae=_vae(),
    text_encoder=_text(transformers.CLIPTextModel, vocab, 0),
    text_encoder_2=_text(transformers.CLIPTextModelWithProjection, vocab, 1),
    tokenizer=read(),
    tokenizer_2=read(pad_token="!"),
    unet=unet,
    scheduler=diffusers.EulerDiscreteScheduler(
      beta_start=0.00085,
      beta_end=0.012,
      beta_schedule="scaled_linear",
      timestep_spacing="leading",
      steps_offset=1,
    ),
    add_watermarker=False,
  )
  pipeline.save_pretrained(folder / "base")
  for seed, name in ((5, "pose"), (6, "grid")):
    net = diffusers.ControlNetModel.from_unet(
      unet, conditioning_embedding_out_channels=(4, 8)
    )
    twins.randomise(net, seed).save_pretrained(folder / name)
  _lora(unet, folder / "style.safetensors")
  _u2net(folder / "u2net.safetensors")
  return {
    "models.base": str(folder / "base"),
    "models.pose_controlnet": str(folder / "pose"),
    "models.grid_controlnet": str(folder / "grid"),
    "models.u2net": str(folder / "u2net.safetensors"),
    "loras.style": str(folder / "style.safetensors"),
    "run.compilation_cache": str(folder / "cache"),
  }


def flags(places: dict[str, str]) -> list[str]:
  return [f"--config.{key}={value}" for key, value in places.items()]


def _vae():
  net = diffusers.AutoencoderKL(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=32,
  )
  return twins.randomise(net, 3)


def _text(cls, vocab, seed):
  config = transformers.CLIPTextConfig(
    vocab_size=vocab,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=77,
    projection_dim=16,
    bos_token_id=vocab - 2,
    eos_token_id=vocab - 1,
    pad_token_id=0,
  )
  return twins.randomise(cls(config), seed)


def _lora(unet, path):
  name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
  weight = unet.get_submodule(name).weight
  rng = np.random.default_rng(9)
  down = rng.normal(size=(2, weight.shape[1])).astype(np.float32)
  up = 0.1 * rng.normal(size=(weight.shape[0], 2)).astype(np.float32)
  safetensors.numpy.save_file(
    {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, path
  )


def _u2net(path):
  config = u2net.Config(((2, 2),) * 6, ((2, 2),) * 5)
  rng = np.random.default_rng(4)
  draw = lambda leaf: (
    rng.normal(size=leaf.shape) / math.sqrt(max(np.prod(leaf.shape[:-1]), 1))
  )
  variables = jax.tree.map(draw, u2net_weights.shapes(config))
  stats = jax.tree.map(np.abs, variables["batch_stats"])
  u2net_weights.save(
    path, {"params": variables["params"], "batch_stats": stats}
  )
