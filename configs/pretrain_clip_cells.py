"""The mini CLIP's further lessons, on the cells of stage A.

  python launch/pretrain.py --config configs/pretrain_clip_cells.py \
    --workdir runs/pretrain_clip_cells

Goes on from the CLIP of configs/pretrain_clip.py, whose studio people are
mostly plain: on canvases all patterns are as frequent, and the light is softer.
Only the vision tower learns; the text tower, which the mini SDXL begins with a
copy of, stays as it is. Ends with the folder `workdir/clip`, which is shipped
as assets/mini/clip. `:smoke` takes seconds and learns nothing.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the configuration of a preset: "" or "smoke"."""
  if arg not in ("", "smoke"):
    raise ValueError(f"unknown preset {arg!r}: there is :smoke")
  config = ml_collections.ConfigDict()
  config.method = "clip_pretrain"
  config.dtype = "float32"
  config.begin = "runs/pretrain_clip/clip"  # A CLIP folder.

  config.data = data = ml_collections.ConfigDict()
  data.num_images = 32_000  # Studio people, as in the first lessons.
  data.num_canvases = 12_000  # Of the other networks of stage A.
  data.num_held_out = 2_000  # Studio and street people, for the card.
  data.num_held_out_canvases = 800
  data.image_size = (96, 48)
  data.seed = 0  # Of the drawn world.
  data.processes = 2
  data.cache = "runs/canvases"  # Shared by all networks of stage A.

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
  train.phases = (
    dict(
      name="cells",
      epochs=5,
      lr=6e-4,
      warmup=0.03,
      caption_share=0.25,
      frozen=("text_.*", "logit_scale"),
      weights=dict(
        upper_color=3.0, lower_color=3.0, upper_pattern=3.0, lower_pattern=3.0
      ),
    ),
  )
  train.log_every = 25
  train.checkpoint_every = 250
  train.tensorboard = False

  if arg == "smoke":
    data.num_images, data.num_held_out, data.processes = 64, 32, 1
    data.num_canvases = data.num_held_out_canvases = 8
    train.batch_size = 16
    train.phases = (dict(train.phases[0], epochs=1),)
  return config
