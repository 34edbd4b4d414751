"""A ControlNet (openpose) for a mini SDXL that was trained without.

The shipped one learns beside its UNet, in configs/pretrain_unet.py.

  python launch/pretrain.py --config configs/pretrain_controlnet_openpose.py \
    --workdir runs/pretrain_controlnet_openpose

Needs the mini SDXL (configs/pretrain_unet.py:more). Ends with the folder
`workdir/controlnet-openpose` in diffusers' layout. On a GPU:
`--config.dtype=bfloat16`. `:smoke` takes seconds and learns nothing.
"""

import ml_collections
from ml_collections import config_dict


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the configuration of a preset: "" or "smoke"."""
  if arg not in ("", "smoke"):
    raise ValueError(f"unknown preset {arg!r}: there is :smoke")
  config = ml_collections.ConfigDict()
  config.method = "controlnet"
  config.dtype = "float32"

  config.data = data = ml_collections.ConfigDict()
  data.kind = "openpose"
  data.num_canvases = 6_000
  data.num_held_out = 64  # Of other people, for sheets and the card.
  data.seed = 0  # Of the drawn world.
  data.processes = 2
  data.cache = "runs/canvases"  # Shared by all networks of stage A.
  data.base = "runs/pretrain_unet_more/sdxl"

  config.model = model = ml_collections.ConfigDict()
  model.conditioning_embedding_out_channels = (8, 16, 32)
  model.attention = True

  config.train = train = ml_collections.ConfigDict()
  train.seed = 1234
  train.muon = False
  train.weight_decay = 0.01
  train.snr_gamma = config_dict.placeholder(float)  # As the UNet.
  train.drop = 0.1
  train.ema = config_dict.FieldReference(0.998)  # None: off.
  train.phases = (
    dict(
      name="windows",
      window=(24, 24),
      stride=(24, 12),
      batch_size=16,
      epochs=4,
      lr=8e-4,
      warmup=0.03,
      final=0.3,
    ),
    dict(
      name="canvases",
      window=None,
      batch_size=8,
      epochs=1,
      lr=3e-4,
      warmup=0.0,
      final=0.02,
    ),
  )
  train.log_every = 25
  train.checkpoint_every = 250
  train.sheet_every = 250
  train.sheet = dict(num=8, steps=20, guidance=3.0)
  train.tensorboard = False

  if arg == "smoke":
    data.num_canvases, data.num_held_out, data.processes = 8, 8, 1
    model.conditioning_embedding_out_channels = (4, 8)
    train.phases = (dict(train.phases[0], batch_size=4, epochs=1),)
    train.log_every = train.checkpoint_every = 2
    train.sheet_every = 2
    train.sheet = dict(num=2, steps=2, guidance=2.0)
  return config
