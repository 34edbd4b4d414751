"""The mini U2-Net: mattes of people on drawn studio canvases.

  python launch/pretrain.py --config configs/pretrain_u2netp.py \
    --workdir runs/pretrain_u2netp

Needs the mini VAE (configs/pretrain_vae.py), or `--config.data.vae=`. Ends with
the folder `workdir/u2netp`, its card with the measured IoU, and metrics.json;
cells, mattes and what is found lie in `workdir/sheets`. On a GPU:
`--config.dtype=bfloat16`. `:smoke` takes seconds and learns nothing.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the configuration of a preset: "" or "smoke"."""
  if arg not in ("", "smoke"):
    raise ValueError(f"unknown preset {arg!r}: there is :smoke")
  config = ml_collections.ConfigDict()
  config.method = "matting"
  config.dtype = "float32"

  config.data = data = ml_collections.ConfigDict()
  data.num_canvases = 2_000
  data.num_held_out = 96  # Of other people, for the card.
  data.seed = 0  # Of the drawn world.
  data.processes = 2
  data.cache = "runs/canvases"  # Shared by all networks of stage A.
  # Every second canvas is shown as this autoencoder gives it back: generated
  # cells have passed the same decoder. "" for none.
  data.vae = "runs/pretrain_vae/vae"

  config.model = model = ml_collections.ConfigDict()
  # (inside, out) of stage1 .. stage6, and of stage5d .. stage1d.
  model.encoder = ((8, 16), (8, 24), (12, 32), (16, 48), (16, 48), (16, 48))
  model.decoder = ((16, 48), (12, 32), (8, 24), (8, 16), (8, 16))

  config.train = train = ml_collections.ConfigDict()
  train.seed = 1234
  train.batch_size = 24
  train.epochs = 2
  train.lr = 3e-3
  train.warmup = 0.05
  train.final = 0.01
  train.weight_decay = 0.01
  train.log_every = 25
  train.checkpoint_every = 200
  train.sheet_every = 200
  train.tensorboard = False

  if arg == "smoke":
    data.num_canvases, data.num_held_out, data.processes = 3, 3, 1
    data.vae = ""
    model.encoder = ((2, 4),) * 6
    model.decoder = ((2, 4),) * 5
    train.batch_size, train.epochs = 8, 1
  return config
