"""The mini SDXL, and the ControlNet of skeletons that learns beside its UNet.

  python launch/pretrain.py --config configs/pretrain_unet.py \
    --workdir runs/pretrain_unet

Needs the mini VAE (configs/pretrain_vae.py) and the mini CLIP. Ends with the
folders `workdir/sdxl`, which diffusers loads as StableDiffusionXLPipeline, and
`workdir/controlnet-openpose`; samples over held-out drawn canvases lie in
`workdir/sheets`. On a GPU: `--config.dtype=bfloat16`. Presets:

  configs/pretrain_unet.py        from the beginning
  configs/pretrain_unet.py:more   goes on with both where that run ended
  configs/pretrain_unet.py:smoke  takes seconds and learns nothing
"""

import ml_collections
from ml_collections import config_dict

ASSETS = "dppp_jax/assets/mini"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the configuration of a preset: "", "more" or "smoke"."""
  if arg not in ("", "more", "smoke"):
    raise ValueError(f"unknown preset {arg!r}: there are :more and :smoke")
  config = ml_collections.ConfigDict()
  config.method = "unet"
  config.dtype = "float32"
  config.begin = ""  # A run folder to go on from; empty: at random.

  config.data = data = ml_collections.ConfigDict()
  data.num_canvases = 12_000
  data.num_held_out = 64  # Of other people, for sheets and the card.
  data.seed = 0  # Of the drawn world.
  data.processes = 2
  data.cache = "runs/canvases"  # Shared by all networks of stage A.
  data.vae = "runs/pretrain_vae/vae"
  data.clip = f"{ASSETS}/clip"

  config.model = model = ml_collections.ConfigDict()
  model.unet = dict(
    block_out_channels=(64, 96, 128),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=(
      "DownBlock2D",
      "CrossAttnDownBlock2D",
      "CrossAttnDownBlock2D",
    ),
    up_block_types=(
      "CrossAttnUpBlock2D",
      "CrossAttnUpBlock2D",
      "UpBlock2D",
    ),
    transformer_layers_per_block=1,
    attention_head_dim=(1, 3, 4),
    addition_time_embed_dim=16,
  )
  # A ControlNet that learns beside it: told where somebody stands, so small a
  # UNet soon learns what they wear. None: the UNet alone.
  model.control = dict(
    kind="openpose", conditioning_embedding_out_channels=(8, 16, 32)
  )
  # Sizes that differ from the CLIP's text tower; none: it begins as its copy.
  model.text_encoder_2 = ml_collections.ConfigDict()

  config.scheduler = scheduler = ml_collections.ConfigDict()
  scheduler["_class_name"] = "EulerAncestralDiscreteScheduler"
  scheduler.num_train_timesteps = 1000
  # DDPM's, with more noise than SDXL's.
  scheduler.beta_start = 0.0001
  scheduler.beta_end = 0.02
  scheduler.beta_schedule = "linear"
  # From pure noise, or no picture would ever be as dark as a night.
  scheduler.prediction_type = "v_prediction"
  scheduler.rescale_betas_zero_snr = True
  scheduler.timestep_spacing = "trailing"
  scheduler.steps_offset = 0

  config.train = train = ml_collections.ConfigDict()
  train.seed = 1234
  train.muon = True  # More is learned of as many canvases, see docs/design.md.
  train.weight_decay = 0.01
  # No min-SNR weights: with v-prediction they are the SNR where there is little
  # of it, and it is there that colours and figures are decided.
  train.snr_gamma = config_dict.placeholder(float)
  train.drop = 0.1
  train.control_drop = 0.3
  train.zero_dropped = True
  train.ema = config_dict.FieldReference(0.998)  # None: off.
  train.text_lr_factor = 0.3
  # Windows of two cells make more steps of the same work: all cells of a
  # canvas show the same person. Whole canvases teach that they do.
  train.phases = (
    dict(
      name="windows",
      window=(24, 24),
      stride=(24, 12),
      batch_size=16,
      epochs=2,
      lr=2e-3,
      warmup=0.03,
      final=0.3,
    ),
    dict(
      name="canvases",
      window=None,
      batch_size=8,
      epochs=1,
      lr=8e-4,
      warmup=0.02,
      final=0.02,
    ),
  )
  train.log_every = 25
  train.checkpoint_every = 250
  train.sheet_every = 500
  train.sheet = dict(num=8, steps=20, guidance=3.0)
  train.tensorboard = False

  if arg == "more":
    config.begin = "runs/pretrain_unet"
    # The same again, with smaller steps.
    windows, canvases = train.phases
    train.phases = (dict(windows, lr=1e-3), dict(canvases, lr=6e-4, final=0.01))
  if arg == "smoke":
    data.num_canvases, data.num_held_out, data.processes = 8, 8, 1
    model.unet = dict(
      model.unet,
      block_out_channels=(8, 16),
      norm_num_groups=4,
      down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
      up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
      attention_head_dim=(1, 2),
      addition_time_embed_dim=4,
    )
    model.control.conditioning_embedding_out_channels = (4, 8)
    train.phases = (dict(train.phases[0], batch_size=4, epochs=1),)
    train.log_every = train.checkpoint_every = 2
    train.sheet_every = 2
    train.sheet = dict(num=2, steps=2, guidance=2.0)
  return config
