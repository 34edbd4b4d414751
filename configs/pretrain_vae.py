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
  model.block_out_channels = (16, 32, 64)
  model.layers_per_block = 1
  # Stripes here are three pixels wide: of the 48 numbers of four by four pixels
  # these many must stay, or they turn grey.
  model.latent_channels = 16
  # Of few channels, groups would lose much of the colours, which are the
  # differences between channels.
  model.norm_num_groups = 1
  model.mid_block_add_attention = False

  config.train = train = ml_collections.ConfigDict()
  train.seed = 1234
  # The kernels of an autoencoder are ill-conditioned: colours vary a tenth as
  # much as brightness, and Adam learns them late.
  train.muon = True
  train.weight_decay = 0.01
  # Windows make more steps of the same work; whole canvases come last,
  # because the norms' statistics are those of the whole picture.
  train.phases = (
    dict(
      name="windows",
      crop=(64, 64),
      batch_size=8,
      epochs=11,
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
