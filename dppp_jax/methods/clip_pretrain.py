"""Contrastive pre-training of CLIP (Radford et al. 2021) on pictures and words.

Each picture comes with two kinds of text: full captions, and short phrases
about one or two attributes ("a person in red upper clothes"), which are what a
zero-shot classifier asks with. The picture is encoded once for both.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax.data import transforms
from dppp_jax.models import clip
from dppp_jax.train import losses
from dppp_jax.train import stage as stage_lib

_MAX_SCALE = math.log(100.0)  # CLIP clips the logit scale at 100.


def stages(
  config: clip.Config,
  texts: Mapping[str, np.ndarray],
  *,
  batch_size: int,
  epochs: int,
  lr: float,
  weight_decay: float,
  warmup: float,
  augment: transforms.Augment,
  short_weight: float = 1.0,
  dtype: str = "float32",
) -> list[stage_lib.Stage]:
  """Returns the one stage of contrastive pre-training.

  Args:
    config: both towers.
    texts: "full" int32 [N, C, L] and "short" int32 [N, C, L] token ids; the
      loss draws one of the C texts of each picture at every step.
    batch_size: pictures a step, hence negatives + 1.
    epochs: passes.
    lr: peak rate of AdamW.
    weight_decay: of matrices.
    warmup: fraction of the steps.
    augment: what is done to the pictures.
    short_weight: weight of the short phrases' loss against the captions'.
    dtype: compute dtype.
  """
  stage = stage_lib.Stage(
    name="contrastive",
    init=make_init(config),
    loss=make_loss(config, short_weight=short_weight, dtype=dtype),
    rules=((".*", lr),),
    batches=stage_lib.Shuffled(batch_size),
    epochs=epochs,
    schedule=stage_lib.warmup_cosine(warmup=warmup),
    augment=augment,
    weight_decay=weight_decay,
    decoupled=True,
    bias_lr_multiplier=1.0,
    clip_norm=1.0,
    extras=texts,
  )
  return [stage]


def make_init(config: clip.Config) -> stage_lib.Init:
  """Returns the initialiser of both towers and the logit scale."""

  def init(params, collections, rng):
    del params, collections
    return clip.init_params(config, rng), {}

  return init


def make_loss(
  config: clip.Config, *, short_weight: float, dtype: str
) -> Callable[..., tuple[jax.Array, stage_lib.Aux]]:
  """Returns the symmetric InfoNCE loss over captions and short phrases."""
  vision = clip.VisionTower(config.vision, dtype=dtype)
  text = clip.TextTower(config.text, dtype=dtype)

  def loss(params, collections, batch, rng):
    images = vision.apply({"params": params}, batch["image"]).projected
    scale = jnp.exp(jnp.minimum(params["logit_scale"], _MAX_SCALE))
    total, metrics = 0.0, {}
    for kind, weight in (("full", 1.0), ("short", short_weight)):
      texts = batch[kind]
      rng, key = jax.random.split(rng)
      choice = jax.random.randint(key, (len(texts),), 0, texts.shape[1])
      ids = texts[jnp.arange(len(texts)), choice]
      words = text.apply({"params": params}, ids).projected
      value, accuracy = info_nce(images, words, scale)
      total += weight * value
      metrics[f"loss_{kind}"] = value
      metrics[f"accuracy_{kind}"] = accuracy
    metrics["logit_scale"] = scale
    return total, stage_lib.Aux(metrics, collections)

  return loss


def info_nce(
  images: jax.Array, texts: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """CLIP's loss: the mean of image-to-text and text-to-image cross-entropy.

  Args:
    images: [B, E], any length.
    texts: [B, E], row i belongs to image i.
    scale: factor of the cosines.

  Returns:
    (loss, share of images whose text is the nearest).
  """
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  logits = scale * unit(images) @ unit(texts).T
  labels = jnp.arange(len(images))
  both = [
    losses.cross_entropy(x, labels, label_smoothing=0.0)
    for x in (logits, logits.T)
  ]
  accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels)
  return (both[0] + both[1]) / 2, accuracy


def tokenize(
  tokenizer: Any, texts: Sequence[Sequence[str]], *, max_length: int
) -> np.ndarray:
  """Tokenises C texts for each of N pictures, padded to the longest.

  Args:
    tokenizer: a transformers CLIPTokenizer.
    texts: N lists of C strings.
    max_length: positions of the text tower; longer texts are cut before their
      end token.

  Returns:
    int32 [N, C, L], padded with the end token.
  """
  flat = [text for group in texts for text in group]
  unique = {text: i for i, text in enumerate(dict.fromkeys(flat))}
  encoded = tokenizer(list(unique), truncation=True, max_length=max_length)
  rows = encoded["input_ids"]
  length = max(len(row) for row in rows)
  table = np.full((len(rows), length), tokenizer.eos_token_id, np.int32)
  for i, row in enumerate(rows):
    table[i, : len(row)] = row
  order = np.array([unique[text] for text in flat])
  return table[order].reshape(len(texts), len(texts[0]), length)
