"""The mini VAE: an AutoencoderKL on drawn studio canvases and places.

  python launch/pretrain.py --config configs/pretrain_vae.py \
    --workdir runs/pretrain_vae

Ends with the folder `workdir/vae` in diffusers' layout, its card with the
measured PSNR, and metrics.json; pictures over reconstructions lie in
`workdir/sheets`. On a GPU: `--config.dtype=bfloat16`. `:smoke` takes seconds
and learns nothing.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the configuration of a preset: "" or "smoke"."""
  if arg not in ("", "smoke"):
    raise ValueError(f"unknown preset {arg!r}: there is :smoke")
  config = ml_collections.ConfigDict()
  config.method = "autoencoder"
  config.dtype = "float32"

  config.data = data = ml_collections.ConfigDict()
  data.num_canvases = 1_200
  data.num_held_out = 96  # Of other people, for the card.
  data.seed = 0  # Of the drawn world.
  data.processes = 2
  data.cache = "runs/canvases"  # Shared by all networks of stage A.

  config.model = model = ml_collections.ConfigDict()
  # Narrow where the picture is large: the decoder runs for every canvas.
  # Smaller by two only: a decoder that repeats pixels and convolves cannot tell
  # them apart again, and stripes here are three pixels wide.
  model.block_out_channels = (16, 32)
  model.layers_per_block = 1
  # Of four pixels the brightness of each, and one colour.
  model.latent_channels = 6
  # Of few channels, groups would lose much of the colours, which are the
  # differences between channels.
  model.norm_num_groups = 1
  model.mid_block_add_attention = False

  config.train = train = ml_collections.ConfigDict()
  train.seed = 1234
  train.muon = True
  train.weight_decay = 0.01
  # Windows make more steps of the same work; whole canvases come last,
  # because the norms' statistics are those of the whole picture.
  train.phases = (
    dict(
      name="windows",
      crop=(64, 64),
      batch_size=8,
      epochs=12,
      lr=2e-3,
      warmup=0.01,
      final=0.05,
      weights=dict(
        square=2.0, chroma=5.0, gradient=0.1, laplacian=0.1, kl=1e-4
      ),
    ),
    dict(
      name="canvases",
      crop=None,
      batch_size=8,
      epochs=2,
      lr=5e-4,
      warmup=0.02,
      final=0.02,
      weights=dict(
        square=4.0, chroma=2.0, gradient=0.2, laplacian=0.2, kl=1e-4
      ),
    ),
  )
  train.log_every = 25
  train.checkpoint_every = 200
  train.sheet_every = 400
  train.tensorboard = False

  if arg == "smoke":
    data.num_canvases, data.num_held_out, data.processes = 8, 8, 1
    model.block_out_channels = (8, 8)
    train.phases = tuple(
      dict(phase, batch_size=4, epochs=1) for phase in train.phases
    )
    train.sheet_every = 2
  return config
