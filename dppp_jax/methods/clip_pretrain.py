"""Contrastive pre-training of CLIP on pictures, captions and class prompts.

Captions are told apart as CLIP does it (Radford et al. 2021, InfoNCE in both
directions). They alone teach attributes slowly, because two captions of a small
batch differ in many words at once. So each picture is also classified as a
zero-shot classifier does it: every attribute by the sentences of its values,
"a person in a red shirt" against "a person in a blue shirt".
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import types
from dppp_jax.data import transforms
from dppp_jax.models import clip
from dppp_jax.train import losses
from dppp_jax.train import stage as stage_lib

_MAX_SCALE = math.log(100.0)  # CLIP clips the logit scale at 100.


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The sentences of every value of every attribute.

  Attributes:
    ids: int32 [V, M, L] token ids, M wordings of each of the V values.
    sizes: number of values of each attribute, in the order of `ids`.
  """

  ids: np.ndarray
  sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """How long and how fast one phase of the training is.

  Attributes:
    name: of the stage.
    epochs: passes.
    lr: peak rate of AdamW; a half cosine takes it to zero.
    warmup: fraction of the steps.
    caption_share: share of the batch whose captions are read; they are soon
      told apart, and cost most of the text tower's time.
    weights: of attributes' losses that are not 1, by place.
    frozen: patterns of the names of parameters that stay as they are.
  """

  name: str
  epochs: int
  lr: float
  warmup: float
  caption_share: float = 1.0
  weights: Mapping[int, float] = dataclasses.field(default_factory=dict)
  frozen: tuple[str, ...] = ()


def stages(
  config: clip.Config,
  captions: np.ndarray,
  attributes: np.ndarray,
  prompts: Prompts,
  *,
  phases: Sequence[Phase],
  batch_size: int,
  weight_decay: float,
  augment: transforms.Augment,
  dtype: Any = "float32",
  begin: types.Params | None = None,
) -> list[stage_lib.Stage]:
  """Returns one stage for each phase; the later ones go on from the first.

  Args:
    config: both towers.
    captions: int32 [N, L] token ids.
    attributes: int32 [N, A], the value of each attribute.
    prompts: the sentences of the A attributes.
    phases: one after the other.
    batch_size: pictures a step.
    weight_decay: of matrices.
    augment: what is done to the pictures.
    dtype: compute dtype.
    begin: nested dict of both towers; None begins at random.
  """
  return [
    stage_lib.Stage(
      name=phase.name,
      init=make_init(config, begin) if phase is phases[0] else _keep,
      loss=make_loss(config, prompts, phase, dtype=dtype),
      rules=(*((name, None) for name in phase.frozen), (".*", phase.lr)),
      batches=stage_lib.Shuffled(batch_size),
      epochs=phase.epochs,
      schedule=stage_lib.warmup_cosine(warmup=phase.warmup),
      augment=augment,
      weight_decay=weight_decay,
      decoupled=True,
      bias_lr_multiplier=1.0,
      clip_norm=1.0,
      extras={"captions": captions, "attributes": attributes},
    )
    for phase in phases
  ]


def _keep(params, collections, rng):
  del rng
  return params, collections


def make_init(
  config: clip.Config, begin: types.Params | None = None
) -> stage_lib.Init:
  """Returns the initialiser of both towers and the logit scale."""

  def init(params, collections, rng):
    del params, collections
    return clip.init_params(config, rng) if begin is None else begin, {}

  return init


def make_loss(
  config: clip.Config, prompts: Prompts, phase: Phase, *, dtype: Any
) -> Callable[..., tuple[jax.Array, stage_lib.Aux]]:
  """Returns the loss over captions and class prompts, see `stages`."""
  vision = clip.VisionTower(config.vision, dtype=dtype)
  text = clip.TextTower(config.text, dtype=dtype)
  read = lambda params, ids: _unit(
    text.apply({"params": params}, ids).projected
  )
  num_values, num_wordings = prompts.ids.shape[:2]

  def loss(params, collections, batch, rng):
    images = vision.apply({"params": params}, batch["image"]).projected
    images = _unit(images)
    scale = jnp.exp(jnp.minimum(params["logit_scale"], _MAX_SCALE))
    part = int(phase.caption_share * len(images))
    captions = read(params, batch["captions"][:part])
    told_apart, accuracy = info_nce(images[:part], captions, scale)
    wording = jax.random.randint(rng, (num_values,), 0, num_wordings)
    ids = jnp.asarray(prompts.ids)[jnp.arange(num_values), wording]
    logits = scale * images @ read(params, ids).T
    classified, hits = classify(
      logits, batch["attributes"], prompts.sizes, weights=phase.weights
    )
    metrics = {
      "loss_captions": told_apart,
      "loss_attributes": classified,
      "accuracy_captions": accuracy,
      "accuracy_attributes": hits,
      "logit_scale": scale,
    }
    return told_apart + classified, stage_lib.Aux(metrics, collections)

  return loss


def info_nce(
  images: jax.Array, texts: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """CLIP's loss: the mean of image-to-text and text-to-image cross-entropy.

  Args:
    images: [B, E] of length 1.
    texts: [B, E] of length 1; row i belongs to image i.
    scale: factor of the cosines.

  Returns:
    (loss, share of images whose text is the nearest).
  """
  logits = scale * images @ texts.T
  labels = jnp.arange(len(images))
  both = [
    losses.cross_entropy(x, labels, label_smoothing=0.0)
    for x in (logits, logits.T)
  ]
  return (both[0] + both[1]) / 2, losses.accuracy(logits, labels)


def classify(
  logits: jax.Array,
  attributes: jax.Array,
  sizes: Sequence[int],
  *,
  weights: Mapping[int, float] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the summed cross-entropy of all attributes, and the mean accuracy.

  Args:
    logits: [B, V], the values of all attributes side by side.
    attributes: int [B, A], the true value of each.
    sizes: number of values of each attribute; they sum to V.
    weights: of attributes whose loss does not count 1, by place.
  """
  weights = weights or {}
  loss, hits, start = 0.0, 0.0, 0
  for i, size in enumerate(sizes):
    part, labels = logits[:, start : start + size], attributes[:, i]
    value = losses.cross_entropy(part, labels, label_smoothing=0.0)
    loss += weights.get(i, 1.0) * value
    hits += losses.accuracy(part, labels) / len(sizes)
    start += size
  return loss, hits


def tokenize(
  tokenizer: Any, texts: Sequence[str], *, max_length: int
) -> np.ndarray:
  """Tokenises N texts, padded to the longest with the end token.

  Args:
    tokenizer: a transformers CLIPTokenizer.
    texts: N strings.
    max_length: positions of the text tower; longer texts are cut before their
      end token.

  Returns:
    int32 [N, L].
  """
  rows = tokenizer(list(texts), truncation=True, max_length=max_length)
  rows = rows["input_ids"]
  length = max(len(row) for row in rows)
  ids = np.full((len(rows), length), tokenizer.eos_token_id, np.int32)
  for i, row in enumerate(rows):
    ids[i, : len(row)] = row
  return ids


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
