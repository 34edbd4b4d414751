"""Three LoRAs for the mini SDXL: detail, lighting and style.

  python launch/pretrain.py --config configs/pretrain_lora.py \
    --workdir runs/pretrain_lora

Needs the mini SDXL (configs/pretrain_unet.py:more). Ends with the folder
`workdir/loras`, one .safetensors file in kohya's format for each, and a card
that says what each of them changes. `:smoke` takes seconds and learns nothing.
"""

import ml_collections
from ml_collections import config_dict


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the configuration of a preset: "" or "smoke"."""
  if arg not in ("", "smoke"):
    raise ValueError(f"unknown preset {arg!r}: there is :smoke")
  config = ml_collections.ConfigDict()
  config.method = "lora"
  config.dtype = "float32"

  config.data = data = ml_collections.ConfigDict()
  data.kinds = ("detail", "lighting", "style")
  data.num_canvases = 2_000
  data.num_held_out = 64  # Of other people, for sheets and the card.
  data.num_measured = 32  # Of them, drawn with and without.
  data.seed = 0  # Of the drawn world.
  data.processes = 2
  data.cache = "runs/canvases"  # Shared by all networks of stage A.
  data.base = "runs/pretrain_unet_more/sdxl"

  config.model = model = ml_collections.ConfigDict()
  # All of the way up, where colours and lines are decided; the convolutions
  # too, which are most of so small a network.
  model.targets = (
    r"up_blocks_.*/(attn[12]/to_(q|k|v|out_0)|ff/net_.*|proj_(in|out)|conv[12])"
    r"|conv_out"
  )
  model.rank = 3
  model.alpha = 3.0
  model.layout = "kohya"

  config.train = train = ml_collections.ConfigDict()
  train.seed = 1234
  train.muon = False
  train.weight_decay = 0.0
  train.snr_gamma = config_dict.placeholder(float)  # As the UNet.
  train.drop = 0.1
  train.ema = config_dict.placeholder(float)
  train.phases = (
    dict(
      name="windows",
      window=(24, 24),
      stride=(24, 12),
      batch_size=16,
      epochs=2,
      lr=3e-3,
      warmup=0.05,
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
    data.num_measured = 2
    model.rank = 2
    train.phases = (dict(train.phases[0], batch_size=4, epochs=1),)
    train.log_every = train.checkpoint_every = 2
    train.sheet_every = 2
    train.sheet = dict(num=2, steps=2, guidance=2.0)
  return config
