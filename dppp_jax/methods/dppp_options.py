"""What can be chosen in DPPP: the paper's defaults, and what it left open."""

import dataclasses
from typing import Literal

from dppp_jax import errors, ranges
from dppp_jax.models import inversion, layers
from dppp_jax.train import losses

RANGES = {
  **dict.fromkeys(
    (
      "sup_con_weight", "reid_weight", "tri_txt_weight", "psd_reid_weight",
      "psd_sup_con_weight", "id_weight", "margin", "text_margin",
      "style_init_std", "encoder_lr", "new_lr", "weight_decay",
      "bias_lr_multiplier",
    ),
    ranges.NON_NEGATIVE,
  ),
  "temperature": ranges.POSITIVE,
  "label_smoothing": ranges.SHARE,
  "style_dropout": ranges.SHARE,
  **dict.fromkeys(
    (
      "num_styles", "num_selected", "style_layers", "style_heads",
      "style_mlp_ratio", "style_hidden", "content_hidden", "projector_hidden",
    ),
    ranges.COUNT,
  ),
  **dict.fromkeys(
    ("ptl_epochs", "psd_epochs", "warmup_epochs"), ranges.WHOLE
  ),
  "decay_epochs": ranges.COUNTS,
  "decay": ranges.UNIT,
  "warmup_factor": ranges.UNIT,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The recipe of both stages; every default is the paper's, or argued for it.

  Attributes:
    prompt: what PTL's contrastive loss reads (Table V): "generic", "content"
      or "style_content".
    sup_con_weight: of Eq. 6 in PTL (Table IV a); 0 drops any of these terms.
    reid_weight: of Eq. 10 (Table IV b).
    tri_txt_weight: of Eq. 9 (Table IV c).
    psd_reid_weight: of L2_Re-ID (Table IV d).
    psd_sup_con_weight: of Eq. 15 (Table IV e).
    id_weight: of the identity loss within both Re-ID losses (CLIP-ReID: .25).
    similarity: "dot" or "cosine", in both contrastive losses.
    temperature: tau; with "cosine" take .07.
    label_smoothing: of the identity losses.
    margin: alpha of Eq. 11.
    soft_margin: log(1 + exp(d_p - d_n)) instead of Eq. 11's hinge.
    squared: squared distances in Eq. 11.
    text_margin: delta of Eq. 9.
    text_squared: squared distances in Eq. 9, as printed (CLIP-ReID: not).
    num_styles: n, learnable style tokens.
    num_selected: k, style words in the prompt; n is "without the filter".
    style_order: "score" or "slot", of the style words in the prompt.
    style_source: "penultimate" block's patches, raw, or the "last" one's.
    style_layers: layers of the style transformer.
    style_heads: its heads.
    style_mlp_ratio: its MLPs' width, in widths.
    style_qkv_bias: whether its queries, keys and values have a bias.
    style_sigmoid: squash the style features to (0, 1).
    style_init_std: of the learnable tokens.
    style_hidden: hidden width of f_phi.
    style_dropout: dropout rate of f_phi.
    content_hidden: hidden width of f_theta.
    content_batch_norm: batch normalisation behind f_theta.
    full_stop: end the prompts with " .".
    projector_hidden: hidden width of P_s.
    projector_act: its activation.
    projector_residual: v_c = v_g + P_s(v_g).
    train_encoder: whether PTL trains the vision tower.
    encoder_lr: Adam's rate of the vision tower.
    new_lr: Adam's rate of everything that begins at random.
    weight_decay: coupled, as in torch.optim.Adam.
    bias_lr_multiplier: of the rates of biases.
    ptl_epochs: epochs of the first stage; 0 leaves it out.
    psd_epochs: epochs of the second stage; 0 leaves it out.
    decay_epochs: epochs, from 1, at whose beginning rates shrink.
    decay: factor of each of them.
    warmup_epochs: linear warm-up.
    warmup_factor: where it begins.
  """

  prompt: Literal["generic", "content", "style_content"] = "style_content"
  sup_con_weight: float = 1.0
  reid_weight: float = 1.0
  tri_txt_weight: float = 1.0
  psd_reid_weight: float = 1.0
  psd_sup_con_weight: float = 1.0
  id_weight: float = 1.0
  similarity: losses.Similarity = "dot"
  temperature: float = 1.0
  label_smoothing: float = 0.1
  margin: float = 0.3
  soft_margin: bool = False
  squared: bool = False
  text_margin: float = 0.3
  text_squared: bool = True
  num_styles: int = 24
  num_selected: int = 6
  style_order: inversion.Order = "score"
  style_source: Literal["penultimate", "last"] = "penultimate"
  style_layers: int = 3
  style_heads: int = 1
  style_mlp_ratio: int = 2
  style_qkv_bias: bool = False
  style_sigmoid: bool = False
  style_init_std: float = 0.02
  style_hidden: int = 2048
  style_dropout: float = 0.0
  content_hidden: int = 512
  content_batch_norm: bool = False
  full_stop: bool = False
  projector_hidden: int = 512
  projector_act: str = "relu"
  projector_residual: bool = False
  train_encoder: bool = True
  encoder_lr: float = 5e-6
  new_lr: float = 5e-5
  weight_decay: float = 1e-4
  bias_lr_multiplier: float = 2.0
  ptl_epochs: int = 20
  psd_epochs: int = 20
  decay_epochs: tuple[int, ...] = (15, 20)
  decay: float = 0.1
  warmup_epochs: int = 0
  warmup_factor: float = 0.1

  def __post_init__(self):
    _check(self)

  @property
  def ptl_modules(self) -> tuple[str, ...]:
    """Names of the new modules that a loss of PTL reads."""
    contrasts = self.sup_con_weight > 0
    names = []
    if self.tri_txt_weight or (contrasts and self.prompt != "generic"):
      names.append("content_inversion")
    if contrasts and self.prompt == "style_content":
      names += ["style", "style_inversion"]
    if self.reid_weight:
      names += ["neck_cls", "neck_projected"]
    return tuple(names)


def _check(options: Options) -> None:
  """Refuses options that contradict each other."""
  refuse = lambda text: errors.UserError(f"config dppp.{text}")
  for field, allowed in (
    ("prompt", ("generic", "content", "style_content")),
    ("similarity", ("dot", "cosine")),
    ("style_order", ("score", "slot")),
    ("style_source", ("penultimate", "last")),
  ):
    if getattr(options, field) not in allowed:
      raise refuse(
        f"{field} {getattr(options, field)!r}: choose one of"
        f" {', '.join(allowed)}"
      )
  ranges.check(options, RANGES, where="config dppp.")
  try:
    layers.activation(options.projector_act)
  except errors.UserError as error:
    raise refuse(f"projector_act: {error}") from error
  if not 1 <= options.num_selected <= options.num_styles:
    raise refuse(
      f"num_selected {options.num_selected} must lie in 1..num_styles"
      f" ({options.num_styles})"
    )
  if options.prompt == "generic" and options.tri_txt_weight:
    raise refuse(
      "prompt 'generic' has no content words: set dppp.tri_txt_weight to 0"
    )
  if not options.ptl_epochs and not options.psd_epochs:
    raise refuse("ptl_epochs and dppp.psd_epochs are both 0: set one above 0")
  ptl_weights = (
    options.sup_con_weight,
    options.reid_weight,
    options.tri_txt_weight,
  )
  if options.ptl_epochs and not any(ptl_weights):
    raise refuse("ptl_epochs is above 0 but all weights of PTL are 0")
  if not options.psd_epochs:
    return
  if not (options.psd_reid_weight or options.psd_sup_con_weight):
    raise refuse("psd_epochs is above 0 but all weights of PSD are 0")
  learned = options.ptl_epochs and "content_inversion" in options.ptl_modules
  if options.psd_sup_con_weight and not learned:
    raise refuse(
      "psd_sup_con_weight needs content words that PTL has learned: set"
      " it or dppp.psd_epochs to 0"
    )


_STYLE = (
  "num_styles", "num_selected", "style_order", "style_source", "style_layers",
  "style_heads", "style_mlp_ratio", "style_qkv_bias", "style_sigmoid",
  "style_init_std", "style_hidden", "style_dropout",
)  # fmt: skip
_PROJECTOR = ("projector_hidden", "projector_act", "projector_residual")
_PTL = (
  "prompt", "sup_con_weight", "reid_weight", "tri_txt_weight", "train_encoder",
  "encoder_lr",
)  # fmt: skip
_PSD = ("psd_reid_weight", "psd_sup_con_weight")


def idle(options: Options) -> dict[str, str]:
  """Returns the options that change nothing beside the others, and why."""
  ptl, psd = options.ptl_epochs > 0, options.psd_epochs > 0
  used = options.ptl_modules if ptl else ()
  contrasts = (ptl and options.sup_con_weight > 0) or (
    psd and options.psd_sup_con_weight > 0
  )
  reid = (ptl and options.reid_weight > 0) or (
    psd and options.psd_reid_weight > 0
  )
  reads_prompts = ptl and (
    options.sup_con_weight > 0 or options.tri_txt_weight > 0
  )
  rows = (
    (not ptl, _PTL, "dppp.ptl_epochs is 0"),
    (not psd, (*_PSD, *_PROJECTOR), "dppp.psd_epochs is 0"),
    ("style" not in used, _STYLE, "no loss reads style words"),
    (
      "content_inversion" not in used,
      ("content_hidden", "content_batch_norm"),
      "no loss reads content words",
    ),
    (not options.sup_con_weight, ("prompt",), "dppp.sup_con_weight is 0"),
    (not contrasts, ("similarity", "temperature"), "no loss contrasts"),
    (
      not (ptl and options.tri_txt_weight),
      ("text_margin", "text_squared"),
      "no triplets of texts are read",
    ),
    (
      not reid,
      ("id_weight", "label_smoothing", "margin", "soft_margin", "squared"),
      "both Re-ID weights are 0",
    ),
    (not options.id_weight, ("label_smoothing",), "dppp.id_weight is 0"),
    (options.soft_margin, ("margin",), "dppp.soft_margin has none"),
    (not reads_prompts, ("full_stop",), "no loss reads prompts in PTL"),
    (not options.train_encoder, ("encoder_lr",), "dppp.train_encoder is off"),
    (not options.decay_epochs, ("decay",), "dppp.decay_epochs is empty"),
    (not options.warmup_epochs, ("warmup_factor",), "dppp.warmup_epochs is 0"),
  )
  found: dict[str, str] = {}
  for is_idle, keys, why in rows:
    if is_idle:
      found = {**dict.fromkeys(keys, why), **found}
  return found
