"""GenePerson: invented people, written as a TFDS dataset.

  python launch/generate.py --config configs/geneperson.py --data_dir data \
    --config.models.base=stable-diffusion-xl-base-1.0 \
    --config.models.pose_controlnet=controlnet-openpose-sdxl-1.0 \
    --config.models.grid_controlnet=controlnet-canny-sdxl-1.0 \
    --config.models.u2net=u2net_human_seg.pth \
    --config.loras.detail=detail.safetensors

Presets behind a colon:

  configs/geneperson.py            the paper's recipe: SDXL, two ControlNets,
                                   LoRAs and a U2-Net, for a GPU
  configs/geneperson.py:mini       the same with the small networks that this
                                   project ships, for any machine
  configs/geneperson.py:paperdoll  drawn people on drawn scenes: no weights, no
                                   accelerator, about a minute on 2 CPU cores;
                                   the control condition of the generated ones

The drawn people at the paper's size (6,641 people, 132,820 pictures):

  --config configs/geneperson.py:paperdoll --config.num_identities=6641
    --config.cells=20 --config.cap=20 --config.image_size=256,128

What each field does: docs/generation.md. The paper gives neither checkpoints
nor canvas, steps, guidance, scales or rules; what stands here for those is a
choice, and the manifest beside a dataset repeats it.
"""

import ml_collections

from dppp_jax import errors
from dppp_jax.geneperson import prompts
from dppp_jax.paperdoll import lexicon

_MINI = "dppp_jax/assets/mini"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the configuration of a preset."""
  presets = {"": _paper, "mini": _mini, "paperdoll": _paperdoll}
  if arg not in presets:
    raise errors.UserError(
      f"--config configs/geneperson.py:{arg}: no such preset: use :mini or"
      " :paperdoll, or none for the paper's recipe"
    )
  return presets[arg]()


def _paper() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.maker = "diffusion"
  # Another seed, other people.
  config.seed = 0
  config.num_identities = 6641
  config.cap = 20  # Kept of a person; the paper's 130,519 / 6,641 is 19.7.
  # Who keeps fewer cells than min_images is given another canvas, of another
  # seed; tries in all. 4: a batch of training (train.K = 8 pictures of each
  # person) then shows none more than twice.
  config.tries = 3
  config.min_images = 4
  config.image_size = (256, 128)  # (H, W).
  config.quality = 95  # Of the JPEGs.

  # Folders, files or hub ids.
  config.models = models = ml_collections.ConfigDict()
  models.base = "stabilityai/stable-diffusion-xl-base-1.0"
  models.vae = ""  # Another VAE than the base's own, or that of one without.
  models.tokenizer = ""  # Folder; for a base in one file that has none beside.
  models.variant = ""  # Which of several precisions, e.g. fp16.
  # Empty: without this ControlNet. Twice the same union: run once.
  models.pose_controlnet = "xinsir/controlnet-openpose-sdxl-1.0"
  models.grid_controlnet = "diffusers/controlnet-canny-sdxl-1.0"
  models.union_kinds = (0, 3)  # Of a union: the skeletons' and the edges'.
  models.u2net = "u2net_human_seg.pth"

  # The paper's three, which it does not name; empty: without it.
  config.loras = loras = ml_collections.ConfigDict()
  loras.detail, loras.detail_scale = "", 0.8
  loras.lighting, loras.lighting_scale = "", 0.8
  loras.style, loras.style_scale = "", 0.8
  loras.allow_unmatched = False  # Merge what fits of one for another base.

  config.canvas = canvas = ml_collections.ConfigDict()
  canvas.rows, canvas.cols = 6, 7
  canvas.cell = (256, 128)  # (H, W): a canvas of 1536 x 896.
  canvas.multiple = 32  # Of both sides: the VAE shrinks by 8, the UNet by 4.
  canvas.line_width = 2  # Of the grid, pixels.
  canvas.canny = (100, 200)  # Low and high threshold of its edges.

  config.poses = poses = ml_collections.ConfigDict()
  poses.openpose = ""  # Folder of OpenPose JSON files instead of our own.
  poses.fill = 0.93  # Share of a cell's height that a skeleton takes.

  config.prompt = prompt = ml_collections.ConfigDict()
  prompt.template = prompts.TEMPLATE
  prompt.negative = prompts.NEGATIVE  # Empty: nothing, SDXL's zeros.
  prompt.vocabulary = ""  # A JSON file instead of the shipped words.
  # Over 77 tokens, as no prompt of the shipped words: error, truncate or chunk.
  prompt.long = "chunk"
  prompt.min_chunks = 1  # With chunk: of every prompt.
  prompt.pooled = "first"  # Chunk whose pooled vector is used, or last.
  prompt.clip_skip = 0

  config.sampler = sampler = ml_collections.ConfigDict()
  sampler.scheduler = "euler_ancestral"  # The paper's "Euler a" ...
  sampler.k_diffusion = True  # ... with the steps of the tools of that name.
  sampler.karras = False
  sampler.spacing = ""  # leading, trailing, linspace, quadratic; the folder's.
  # What the base predicts, where its files do not say so, or say it wrongly:
  sampler.prediction_type = ""  # epsilon or v_prediction.
  sampler.zero_snr = False  # It was trained down to pure noise.
  sampler.steps = 30
  sampler.guidance = 7.0
  sampler.guidance_rescale = 0.0
  sampler.guess = False
  sampler.dtype = "auto"  # bfloat16 on a GPU, float32 elsewhere.
  sampler.vae_dtype = "auto"  # As dtype.

  config.control = control = ml_collections.ConfigDict()
  control.pose_scale, control.grid_scale = 1.0, 1.0
  control.pose_range = (0.0, 1.0)  # Part of the steps in which it counts.
  control.grid_range = (0.0, 1.0)

  config.backgrounds = backgrounds = ml_collections.ConfigDict()
  backgrounds.count = 64  # Pictures of each light.
  backgrounds.size = (0, 0)  # (H, W); 0: the canvas's, one program for both.
  backgrounds.template = prompts.BACKGROUND
  backgrounds.negative = prompts.NEGATIVE_BACKGROUND

  config.matting = matting = ml_collections.ConfigDict()
  matting.size = (320, 320)  # At which U2-Net looks at a cell.
  matting.dtype = "float32"
  matting.decontaminate = False  # Take the old ground's colour out of hems.

  # Bounds of a good cell, geneperson/quality.py; below 0: no such rule.
  config.rules = rules = ml_collections.ConfigDict()
  rules.min_peak = 0.5
  rules.min_area, rules.max_area = 0.08, 0.75
  rules.max_second = 0.12
  rules.max_border, rules.max_feet = 0.1, 0.5
  rules.min_sharpness = 0.025
  # With the skeleton, of all points, head and legs the least: who lacks one of
  # them is dropped. Chosen on cells that are like drawings: docs/rules.md.
  rules.min_agreement = 0.6
  rules.min_difference = 3.0

  # May differ between runs: no picture depends on it by more than rounding.
  config.run = run = ml_collections.ConfigDict()
  # Canvases at once, of people with consecutive numbers; the same in all
  # stripes that run at one time.
  run.batch_size = 8
  run.decode_batch = 4  # Of them, that the VAE decodes at once.
  run.devices = 1  # That share a batch; 0: as many cores as divide it, or one
  # accelerator. Each holds all networks: for small ones.
  run.num_threads = 0  # Of the host; 0: as there are cores, 16 at most.
  run.stack_from = 0  # Transformers so deep are compiled as a loop; 0: none.
  run.compilation_cache = "~/.cache/dppp_jax/xla"  # Empty: none.
  return config


def _mini() -> ml_collections.ConfigDict:
  config = _paper()
  config.num_identities = 40
  config.cap = 6
  config.image_size = (96, 48)
  config.models.base = f"{_MINI}/sdxl"
  config.models.pose_controlnet = f"{_MINI}/controlnet-openpose"
  config.models.grid_controlnet = f"{_MINI}/controlnet-canny"
  config.models.u2net = f"{_MINI}/u2netp"
  config.canvas.rows, config.canvas.cols = 2, 3
  config.canvas.cell = (96, 48)
  config.canvas.multiple = 16
  config.poses.fill = 0.9  # What the small networks were trained on.
  config.prompt.template = lexicon.TEMPLATE
  config.prompt.vocabulary = f"{_MINI}/vocabulary.json"
  config.prompt.negative = ""
  config.prompt.long = "error"
  config.sampler.scheduler = "dpmpp_2m"  # Needs few steps,
  config.sampler.k_diffusion = False
  config.sampler.spacing = "quadratic"  # and of these 8 for the folder's 12.
  config.sampler.steps = 8
  config.sampler.guidance = 2.0
  config.backgrounds.count = 4  # One batch of each light.
  config.backgrounds.template = lexicon.BACKGROUND
  config.backgrounds.negative = ""
  config.matting.size = (96, 48)
  config.run.batch_size = 4
  config.run.devices = 0
  return config


def _paperdoll() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.maker = "paperdoll"
  # Another seed, other people.
  config.seed = 0
  config.num_identities = 160
  # Pictures drawn of a person, and kept of them: a drawn one is never dropped
  # for its quality, so that more cells than the cap are drawn in vain.
  config.cells = 6
  config.cap = 6
  config.image_size = (96, 48)  # (H, W); the paper's are 256 x 128.
  config.quality = 95  # Of the JPEGs.
  # How fully the light of a scene falls on the person in front of it, 0..1.
  config.person_light = 0.8
  return config
