"""GenePerson: invented people, written as a TFDS dataset.

  python launch/generate.py --config configs/geneperson.py:paperdoll \
    --data_dir data

Presets behind a colon:

  configs/geneperson.py:paperdoll  drawn people on drawn scenes: no weights, no
                                   accelerator, about a minute on 2 CPU cores;
                                   the control condition of the generated ones
  configs/geneperson.py            people made by diffusion: not there yet
  configs/geneperson.py:mini       the same with the small networks: not yet

The drawn people at the paper's size (6,641 people, 132,820 pictures):

  --config configs/geneperson.py:paperdoll --config.num_identities=6641
    --config.image_size=256,128
"""

import ml_collections

from dppp_jax import errors


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the configuration of a preset: "paperdoll" so far."""
  if arg in ("", "mini"):
    raise errors.UserError(
      f"--config configs/geneperson.py{':' * bool(arg)}{arg}: the diffusion"
      " pipeline is not there yet: use configs/geneperson.py:paperdoll"
    )
  if arg != "paperdoll":
    raise errors.UserError(
      f"--config configs/geneperson.py:{arg}: no such preset: use :paperdoll"
    )
  config = ml_collections.ConfigDict()
  config.maker = "paperdoll"
  # Another seed, other people.
  config.seed = 0
  config.num_identities = 300
  # Pictures drawn of a person, and kept of them: a drawn one is never dropped
  # for its quality, so that more cells than the cap are drawn in vain.
  config.cells = 20
  config.cap = 20
  config.image_size = (96, 48)  # (H, W); the paper's are 256 x 128.
  config.quality = 95  # Of the JPEGs.
  # How fully the light of a scene falls on the person in front of it, 0..1.
  config.person_light = 0.8
  return config
