"""DPPP (PTL, then PSD) on GenePerson: the paper's recipe.

  python launch/train.py --config configs/dppp.py \
    --config.clip=DIR_OF_CLIP_VIT_B_16 --config.data.data_dir=data \
    --config.eval.benchmark_root=DIR --workdir runs/dppp

CLIP ViT-B/16 in the Hugging Face layout (openai/clip-vit-base-patch16), the
dataset `geneperson` in data/, Market-1501 and DukeMTMC-reID below DIR. 40
epochs of about 1,660 steps with 64 pictures. The paper reports, transferred
directly (Rank-1 / Rank-5 / mAP, its Table III; not yet reproduced here):

  Market-1501 57.7 / 73.0 / 32.6      DukeMTMC-reID 57.5 / 71.3 / 37.2

Presets behind a colon:

  configs/dppp.py:mini   the shipped mini CLIP on 160 generated or drawn people,
                         96 x 48 pixels, about 2 minutes on 2 CPU cores
  configs/dppp.py:smoke  as :mini with 8 identities and 1 + 1 epochs, seconds

The paper's ablations are switches. Table IV, each row on top of the last:

  a  --config.dppp.reid_weight=0 --config.dppp.tri_txt_weight=0
     --config.dppp.psd_epochs=0
  b  --config.dppp.tri_txt_weight=0 --config.dppp.psd_epochs=0
  c  --config.dppp.psd_epochs=0
  d  --config.dppp.psd_sup_con_weight=0
  e  nothing

Table V is row c with another prompt:

  --config.dppp.psd_epochs=0 --config.dppp.prompt=content
  --config.dppp.psd_epochs=0 --config.dppp.prompt=generic
     --config.dppp.tri_txt_weight=0

Table VI is --config.dppp.num_selected=4, 6, 8, 10, 12, or 24 (no filter).
"""

import ml_collections
from ml_collections import config_dict


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the configuration of a preset: "", "mini" or "smoke"."""
  if arg not in ("", "mini", "smoke"):
    raise ValueError(f"unknown preset {arg!r}: there are :mini and :smoke")
  config = ml_collections.ConfigDict()
  config.method = "dppp"
  # A folder in the Hugging Face layout, or a hub id where there is a network.
  config.clip = "openai/clip-vit-base-patch16"
  # Of the matrix products; "auto" is bfloat16 on a GPU, float32 on a CPU.
  config.dtype = "auto"

  config.data = data = ml_collections.ConfigDict()
  # "geneperson", or the training split of "market1501" or "dukemtmcreid".
  data.dataset = "geneperson"
  # Where it lies; the launcher's --data_dir where this is not given.
  data.data_dir = config_dict.placeholder(str)
  data.image_size = (256, 128)  # (H, W).
  data.interpolation = "bicubic"
  # "device" keeps all pictures in the accelerator's memory as uint8 (13 GB for
  # the paper's 130,519), "host" decodes beside the training.
  data.placement = "device"
  data.on_corrupt = "error"  # Or "skip", which counts.
  data.num_threads = 8
  data.max_ids = 0  # Only the first so many identities; 0 is all.

  config.augment = augment = ml_collections.ConfigDict()
  augment.flip = 0.5
  augment.pad = 10  # Then a random crop.
  augment.contrast = config_dict.FieldReference((0.5, 1.5))  # None: off.
  # Of each channel, as between cameras; the paper has none: e.g. (0.7, 1.3).
  augment.gain = config_dict.placeholder(tuple)
  augment.mean = (0.5, 0.5, 0.5)
  augment.std = (0.5, 0.5, 0.5)
  augment.erasing = 0.0

  config.train = train = ml_collections.ConfigDict()
  train.seed = 1234
  train.P = 8  # Identities in a batch,
  train.K = 8  # and pictures of each.
  train.log_every = 50
  train.checkpoint_every = 1000
  train.eval_every_epochs = 5  # 0 is at the end of each stage only.
  train.tensorboard = False

  config.eval = evaluation = ml_collections.ConfigDict()
  evaluation.benchmarks = ("market1501", "dukemtmcreid")
  # Parent folder of both; without it nothing is evaluated while training.
  evaluation.benchmark_root = config_dict.placeholder(str)
  evaluation.allow_partial = False  # Go on with other counts than published.
  evaluation.interpolation = "bilinear"  # CLIP-ReID's test transform.
  # Of the scores in the log: float32, as published rows are. Or bfloat16.
  evaluation.dtype = "float32"
  # "auto" is v_c after PSD and v_g after PTL; "projected" is v_g, "concat"
  # CLIP-ReID's class token and v_g side by side.
  evaluation.feature = "auto"

  config.dppp = dppp = ml_collections.ConfigDict()
  # What the first stage's contrast reads: generic, content, style_content.
  dppp.prompt = "style_content"
  # Weights of Eq. 13's terms, then of Eq. 16's; 0 drops one.
  dppp.sup_con_weight = 1.0
  dppp.reid_weight = 1.0
  dppp.tri_txt_weight = 1.0
  dppp.psd_reid_weight = 1.0
  dppp.psd_sup_con_weight = 1.0
  # Of the identity loss within both Re-ID losses; CLIP-ReID has 0.25.
  dppp.id_weight = 1.0
  # "dot" at tau 1 is CLIP-ReID's; "cosine" needs a small tau such as 0.07.
  dppp.similarity = "dot"
  dppp.temperature = 1.0
  dppp.label_smoothing = 0.1
  dppp.margin = 0.3  # Alpha of Eq. 11.
  dppp.soft_margin = False
  dppp.squared = False
  dppp.text_margin = 0.3  # Delta of Eq. 9,
  dppp.text_squared = True  # whose distances are squared in print.
  # n style tokens gather, the k best are kept; k = n is without the filter.
  dppp.num_styles = 24
  dppp.num_selected = 6
  dppp.style_order = "score"  # Of the words in the prompt; or "slot".
  dppp.style_source = "penultimate"  # Block of the patches; or "last".
  dppp.style_layers = 3
  dppp.style_heads = 1
  dppp.style_mlp_ratio = 2
  dppp.style_qkv_bias = False
  dppp.style_sigmoid = False
  dppp.style_init_std = 0.02
  dppp.style_hidden = 2048
  dppp.style_dropout = 0.0
  dppp.content_hidden = 512
  dppp.content_batch_norm = False
  dppp.full_stop = False  # At the end of the prompts.
  dppp.projector_hidden = 512
  dppp.projector_act = "relu"
  dppp.projector_residual = False
  dppp.train_encoder = True  # In the first stage; never in the second.
  dppp.encoder_lr = 5e-6
  dppp.new_lr = 5e-5
  dppp.weight_decay = 1e-4  # Coupled, as in torch's Adam.
  dppp.bias_lr_multiplier = 2.0
  dppp.ptl_epochs = 20
  dppp.psd_epochs = 20
  # Epochs count from 1: 15 to 19 run at a tenth, 20 at a hundredth.
  dppp.decay_epochs = (15, 20)
  dppp.decay = 0.1
  dppp.warmup_epochs = 0  # CLIP-ReID has 10.
  dppp.warmup_factor = 0.1

  if arg:
    _shrink(config)
  if arg == "smoke":
    data.max_ids = 8
    train.P, train.K = 4, 4
    train.log_every = 1
    dppp.ptl_epochs = dppp.psd_epochs = 1
    evaluation.benchmarks = ()
  return config


def _shrink(config: ml_collections.ConfigDict) -> None:
  """Fits the recipe to the mini CLIP, small pictures and a CPU."""
  config.clip = "dppp_jax/assets/mini/clip"
  config.dtype = "float32"
  config.data.image_size = (96, 48)
  config.data.num_threads = 2
  config.augment.pad = 4
  # All pictures of a generated person are of one light and one canvas, the
  # cameras of the street are not: without this PTL learns much less.
  config.augment.gain = (0.6, 1.4)
  # A canvas has six cells, not the paper's eight pictures of a person.
  config.train.P, config.train.K = 16, 4
  config.train.log_every = 10
  config.train.checkpoint_every = 200
  config.train.eval_every_epochs = 0
  config.eval.allow_partial = True
  # The networks keep the paper's shape at the mini CLIP's widths.
  config.dppp.content_hidden = 128
  config.dppp.style_hidden = 512
  config.dppp.projector_hidden = 128
  # So few people cannot teach a projector what to keep: it begins with all, and
  # learns less of their words, which fit nobody else.
  config.dppp.projector_residual = True
  config.dppp.psd_sup_con_weight = 0.2
  # Small networks and few steps want larger rates.
  config.dppp.encoder_lr = 1.5e-4
  config.dppp.new_lr = 1e-3
  config.dppp.ptl_epochs = 30
  config.dppp.psd_epochs = 30
  config.dppp.decay_epochs = (27,)
