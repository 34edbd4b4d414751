"""The mini CLIP: contrastive pre-training on drawn studio people.

  python launch/pretrain.py --config configs/pretrain_clip.py \
    --workdir runs/pretrain_clip

Under two hours on 2 CPU cores, minutes on a GPU. Ends with the folder
`workdir/clip` in the Hugging Face layout, its card with the measured zero-shot
accuracies, and metrics.json; configs/pretrain_clip_cells.py goes on from there.
`:smoke` takes seconds and learns nothing.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the configuration of a preset: "" or "smoke"."""
  if arg not in ("", "smoke"):
    raise ValueError(f"unknown preset {arg!r}: there is :smoke")
  config = ml_collections.ConfigDict()
  config.method = "clip_pretrain"
  config.dtype = "float32"

  config.data = data = ml_collections.ConfigDict()
  data.num_images = 32_000  # One picture of as many people.
  data.num_held_out = 2_000  # Of other people, for the card.
  data.image_size = (96, 48)
  data.seed = 0  # Of the drawn world.
  data.processes = 2

  config.model = model = ml_collections.ConfigDict()
  model.vocab_size = 1024  # Every word of the captions is one token then.
  model.projection_dim = 128
  model.vision = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    image_size=72,  # Side of the position grid, 6 x 6; pictures are 96 x 48.
    patch_size=12,
  )
  model.text = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=77,
  )

  config.augment = augment = ml_collections.ConfigDict()
  augment.flip = 0.5
  augment.pad = 3
  augment.contrast = (0.8, 1.2)
  augment.mean = (0.5, 0.5, 0.5)
  augment.std = (0.5, 0.5, 0.5)

  config.train = train = ml_collections.ConfigDict()
  train.seed = 1234
  train.batch_size = 128
  train.weight_decay = 0.05
  # Two cosines: the second dwells on the colours of clothes, which Re-ID reads
  # first. Captions are read for a share of a batch.
  train.phases = (
    dict(
      name="contrastive",
      epochs=10,
      lr=1e-3,
      warmup=0.05,
      caption_share=0.5,
      weights=dict(),
    ),
    dict(
      name="colours",
      epochs=6,
      lr=8e-4,
      warmup=0.03,
      caption_share=0.25,
      weights=dict(upper_color=3.0, lower_color=3.0),
    ),
  )
  train.log_every = 25
  train.checkpoint_every = 250
  train.tensorboard = False

  if arg == "smoke":
    data.num_images, data.num_held_out = 64, 32
    train.batch_size = 16
    train.phases = (dict(train.phases[0], epochs=1),)
    model.vision.num_hidden_layers = model.text.num_hidden_layers = 2
  return config
