"""DPPP's two stages: pseudo-word token learning, then style disentanglement.

PTL (Eq. 13) trains the vision tower together with two inversion networks that
write each picture as a sentence, read by a frozen text tower. PSD (Eq. 16)
trains a projector that draws the picture's feature towards its content words
only; everything that PTL made stays as it is.

Parameters are {"clip", "content_inversion", "style", "style_inversion",
"neck_cls", "neck_projected", "projector", "neck_content"}; a module whose
output no loss reads is not made at all.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import importlib.metadata
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, rngs, types
from dppp_jax.data import transforms
from dppp_jax.methods import dppp_options, prompts
from dppp_jax.models import clip, heads, inversion
from dppp_jax.train import losses
from dppp_jax.train import stage as stage_lib

Options = dppp_options.Options


def stages(
  config: clip.Config,
  params: types.Params,
  tokenizer: Any,
  *,
  num_classes: int,
  batches: stage_lib.PK,
  augment: transforms.Augment,
  options: Options | None = None,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> list[stage_lib.Stage]:
  """Returns [PTL, PSD], without a stage that has no epochs.

  Args:
    config: of the CLIP.
    params: of the CLIP, both towers.
    tokenizer: its CLIPTokenizer.
    num_classes: identities of the training set.
    batches: P identities with K pictures each.
    augment: of the pictures, in both stages.
    options: the paper's by default.
    dtype: of the matrix products; features meet their losses in float32.

  Raises:
    errors.UserError: the prompt does not fit the text tower.
  """
  options = options or Options()
  networks = _Networks(config, params, tokenizer, num_classes, options, dtype)
  common = {
    "batches": batches,
    "augment": augment,
    "weight_decay": options.weight_decay,
    "bias_lr_multiplier": options.bias_lr_multiplier,
    "schedule": stage_lib.step_decay(
      tuple(options.decay_epochs),
      gamma=options.decay,
      warmup_epochs=options.warmup_epochs,
      warmup_factor=options.warmup_factor,
    ),
  }
  encoder_lr = options.encoder_lr if options.train_encoder else None
  encoder = ("clip/(vision_model|visual_projection)/.*", encoder_lr)
  train = lambda names: tuple((f"{name}/.*", options.new_lr) for name in names)
  rest = ((".*", None),)
  psd_modules = ("projector",)
  if options.psd_reid_weight:
    psd_modules += ("neck_content",)
  ptl = stage_lib.Stage(
    name="ptl",
    init=lambda *args: networks.init(options.ptl_modules, *args),
    loss=networks.ptl_loss,
    rules=(encoder, *train(options.ptl_modules), *rest),
    epochs=options.ptl_epochs,
    **common,
  )
  psd = stage_lib.Stage(
    name="psd",
    init=lambda *args: networks.init(psd_modules, *args),
    loss=networks.psd_loss,
    rules=(*train(psd_modules), *rest),
    epochs=options.psd_epochs,
    **common,
  )
  return [stage for stage in (ptl, psd) if stage.epochs]


def extractor_spec(
  config: clip.Config,
  *,
  stage: str,
  image_size: Sequence[int],
  mean: Sequence[float],
  std: Sequence[float],
  interpolation: str = "bilinear",
  feature: Literal["auto", "content", "projected", "concat"] = "auto",
  options: Options | None = None,
) -> dict[str, Any]:
  """Returns what extractor.json says: how to read features off the parameters.

  Args:
    config: of the CLIP.
    stage: the stage that ended last, "ptl" or "psd".
    image_size: (H, W).
    mean: of the normalisation.
    std: of the normalisation.
    interpolation: of the test transform.
    feature: "auto" is the paper's: v_c after PSD, v_g (E) after PTL. "concat"
      is CLIP-ReID's class token and v_g side by side.
    options: the paper's by default.

  Raises:
    errors.UserError: v_c is asked for before PSD has made it.
  """
  options = options or Options()
  if feature == "auto":
    feature = "content" if stage == "psd" else "projected"
  if feature == "content" and stage != "psd":
    raise errors.UserError(
      "feature 'content' needs the projector of stage psd: set"
      " dppp.psd_epochs above 0, or feature to 'projected'"
    )
  projector = None
  if feature == "content":
    projector = _projector_fields(config, options)
  return {
    "dppp_jax": importlib.metadata.version("dppp-jax"),
    "vision": dataclasses.asdict(config.vision),
    "projection_dim": config.projection_dim,
    "feature": feature,
    "projector": projector,
    "image_size": list(image_size),
    "mean": list(mean),
    "std": list(std),
    "interpolation": interpolation,
  }


class _Networks:
  """The modules, and the two losses over their parameters."""

  def __init__(self, config, params, tokenizer, num_classes, options, dtype):
    self._config, self._clip_params = config, params
    self._options = options
    self._vision = clip.VisionTower(config.vision, dtype=dtype)
    self._text = clip.TextTower(config.text, dtype=dtype)
    word, width = config.text.hidden_size, config.projection_dim
    self._modules = {
      "content_inversion": inversion.ContentInversion(
        word,
        hidden=options.content_hidden,
        batch_norm=options.content_batch_norm,
        dtype=dtype,
      ),
      "style": inversion.StyleExtractor(
        width,
        num_tokens=options.num_styles,
        num_selected=options.num_selected,
        order=options.style_order,
        num_layers=options.style_layers,
        num_heads=options.style_heads,
        mlp_ratio=options.style_mlp_ratio,
        qkv_bias=options.style_qkv_bias,
        sigmoid=options.style_sigmoid,
        init_std=options.style_init_std,
        dtype=dtype,
      ),
      "style_inversion": inversion.StyleInversion(
        word,
        hidden=options.style_hidden,
        dropout=options.style_dropout,
        dtype=dtype,
      ),
      "neck_cls": heads.BNNeck(num_classes),
      "neck_projected": heads.BNNeck(num_classes),
      "neck_content": heads.BNNeck(num_classes),
      "projector": heads.Projector(
        **_projector_fields(config, options), dtype=dtype
      ),
    }
    stop = options.full_stop
    self._generic = prompts.generic(tokenizer, full_stop=stop)
    self._content = prompts.content(tokenizer, full_stop=stop)
    self._style_content = prompts.style_content(
      tokenizer, k=options.num_selected, full_stop=stop
    )
    _check_fit(config, options, self._style_content)

  def init(
    self,
    names: Sequence[str],
    params: types.Params,
    collections: types.Collections,
    rng: jax.Array,
  ) -> tuple[types.Params, types.Collections]:
    """Adds the parameters of the named modules, and the CLIP to begin with."""
    params = {"clip": self._clip_params, **params}
    stats = dict(collections.get("batch_stats", {}))
    vision, width = self._config.vision, self._config.projection_dim
    feature = jnp.zeros((1, width))
    inputs = {
      "style": (jnp.zeros((1, 1, vision.hidden_size)), feature),
      "style_inversion": (feature[None],),
      "neck_cls": (jnp.zeros((1, vision.hidden_size)),),
    }

    @jax.jit  # One compilation for all of them.
    def draw(rng):
      drawn = {}
      for name in names:
        # Whether it trains makes no difference to what it begins with.
        flags = {"train": False} if name.startswith("neck_") else {}
        drawn[name] = self._modules[name].init(
          rngs.stream(rng, name), *inputs.get(name, (feature,)), **flags
        )
      return drawn

    for name, variables in draw(rng).items():
      params[name] = variables["params"]
      if "batch_stats" in variables:
        stats[name] = variables["batch_stats"]
    return params, {"batch_stats": stats}

  def ptl_loss(
    self,
    params: types.Params,
    collections: types.Collections,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
  ) -> tuple[jax.Array, stage_lib.Aux]:
    """L_PTL = L1_Re-ID + L1_SupCon + L_Tri-txt (Eq. 13)."""
    options, labels = self._options, batch["label"]
    stats = dict(collections["batch_stats"])
    used = options.ptl_modules
    depth = self._config.vision.num_hidden_layers
    block = depth - (options.style_source == "penultimate")
    image = self._vision.apply(
      {"params": params["clip"]},
      batch["image"],
      patch_blocks=(block,) if "style" in used else (),
    )
    v_g = image.projected
    terms, metrics = [], {}
    if options.reid_weight:
      raw = (image.penultimate_cls, image.cls, v_g)
      normed = {"cls": image.cls, "projected": v_g}
      value, found = self._reid(params, stats, raw, normed, labels)
      terms.append(options.reid_weight * value)
      metrics |= found
    content = None
    if "content_inversion" in used:
      content = self._content_words(params, stats, v_g, train=True)
    words = {}
    # Eq. 9 reads "a photo of a [C*] person", as Table V's content prompt does.
    contrasts_content = options.sup_con_weight and options.prompt == "content"
    if options.tri_txt_weight or contrasts_content:
      words[self._content] = content
    if "style" in used:
      styles = self._modules["style"].apply(
        {"params": params["style"]}, image.patches[block], v_g
      )
      styles = self._modules["style_inversion"].apply(
        {"params": params["style_inversion"]},
        styles,
        train=True,
        rngs={"dropout": rngs.stream(rng, "dropout")},
      )
      words[self._style_content] = jnp.concatenate(
        [styles, content.astype(styles.dtype)], axis=1
      )
    texts = self._read(params, words)
    if options.sup_con_weight:
      if options.prompt == "generic":
        text = self._read_generic(params, len(labels))
      elif options.prompt == "content":
        text = texts[self._content]
      else:
        text = texts[self._style_content]
      value, found = self._contrast(v_g, text, labels)
      terms.append(options.sup_con_weight * value)
      metrics |= found
    if options.tri_txt_weight:
      value = losses.triplet(
        texts[self._content],
        labels,
        margin=options.text_margin,
        squared=options.text_squared,
      )
      terms.append(options.tri_txt_weight * value)
      metrics["tri_txt"] = value
    return sum(terms), stage_lib.Aux(metrics, {"batch_stats": stats})

  def psd_loss(
    self,
    params: types.Params,
    collections: types.Collections,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
  ) -> tuple[jax.Array, stage_lib.Aux]:
    """L_PSD = L2_Re-ID + L2_SupCon (Eq. 16), of the projector alone."""
    del rng  # Nothing here is random: what PTL made is in test mode.
    options, labels = self._options, batch["label"]
    stats = dict(collections["batch_stats"])
    image = self._vision.apply({"params": params["clip"]}, batch["image"])
    v_g = jax.lax.stop_gradient(image.projected)
    v_c = self._modules["projector"].apply({"params": params["projector"]}, v_g)
    terms, metrics = [], {}
    if options.psd_reid_weight:
      value, metrics = self._reid(
        params, stats, (v_c,), {"content": v_c}, labels
      )
      terms.append(options.psd_reid_weight * value)
    if options.psd_sup_con_weight:
      words = self._content_words(params, stats, v_g, train=False)
      text = self._read(params, {self._content: words})[self._content]
      value, found = self._contrast(v_c, jax.lax.stop_gradient(text), labels)
      terms.append(options.psd_sup_con_weight * value)
      metrics |= found
    return sum(terms), stage_lib.Aux(metrics, {"batch_stats": stats})

  def _reid(self, params, stats, raw, normed, labels):
    """Returns triplets of raw + ID of normed features (Eq. 10), summed."""
    options = self._options
    tri_img = sum(
      losses.triplet(
        feature,
        labels,
        margin="soft" if options.soft_margin else options.margin,
        squared=options.squared,
      )
      for feature in raw
    )
    metrics, id_loss = {"tri_img": tri_img}, 0.0
    for name, feature in normed.items():
      neck = f"neck_{name}"
      (_, logits), updates = self._modules[neck].apply(
        {"params": params[neck], "batch_stats": stats[neck]},
        feature,
        train=True,
        mutable=["batch_stats"],
      )
      stats[neck] = updates["batch_stats"]
      id_loss += losses.cross_entropy(
        logits, labels, label_smoothing=options.label_smoothing
      )
      metrics[f"acc_{name}"] = losses.accuracy(logits, labels)
    metrics["id"] = id_loss
    return tri_img + options.id_weight * id_loss, metrics

  def _contrast(self, image, text, labels):
    """Returns Eq. 6 or Eq. 15."""
    options = self._options
    value = losses.symmetric_sup_con(
      image,
      text,
      labels,
      similarity=options.similarity,
      temperature=options.temperature,
    )
    found = losses.retrieval_accuracy(
      image, text, labels, similarity=options.similarity
    )
    return value, {"sup_con": value, "acc_i2t": found}

  def _content_words(self, params, stats, v_g, *, train):
    """Returns the content words [B, 1, D] (Eq. 1)."""
    name = "content_inversion"
    variables = {"params": params[name]}
    module = self._modules[name]
    if name not in stats:
      return module.apply(variables, v_g)[:, None]
    variables["batch_stats"] = stats[name]
    if not train:
      return module.apply(variables, v_g, train=False)[:, None]
    words, updates = module.apply(
      variables, v_g, train=True, mutable=["batch_stats"]
    )
    stats[name] = updates["batch_stats"]
    return words[:, None]

  def _read(self, params, words):
    """Returns {template: text features [B, E]} for {template: [B, S, D]}."""
    if not words:
      return {}
    found = prompts.Prompts(tuple(words)).read(
      self._text, params["clip"], list(words.values())
    )
    return dict(zip(words, found, strict=True))

  def _read_generic(self, params, batch_size):
    """Returns one text feature, [B, E] times the same."""
    ids = np.asarray(self._generic.ids, np.int32)[None]
    text = self._text.apply(
      {"params": params["clip"]}, ids, eot=self._generic.eot
    ).projected
    return jnp.broadcast_to(text, (batch_size, text.shape[-1]))


def _projector_fields(config: clip.Config, options: Options) -> dict[str, Any]:
  return {
    "features": config.projection_dim,
    "hidden": options.projector_hidden,
    "act": options.projector_act,
    "residual": options.projector_residual,
  }


def _check_fit(
  config: clip.Config, options: Options, template: prompts.Template
) -> None:
  """Refuses a prompt or a transformer that the CLIP has no room for."""
  longest = config.text.max_position_embeddings
  if len(template.ids) > longest:
    raise errors.UserError(
      f"config dppp.num_selected {options.num_selected}: the prompt has"
      f" {len(template.ids)} tokens, this CLIP reads {longest} at most"
    )
  if config.vision.hidden_size % options.style_heads:
    raise errors.UserError(
      f"config dppp.style_heads {options.style_heads} does not divide the"
      f" vision width {config.vision.hidden_size}"
    )
