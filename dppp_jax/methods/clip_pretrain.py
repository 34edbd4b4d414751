"""Contrastive pre-training of CLIP (Radford et al. 2021) on pictures and words.

Each picture comes with two kinds of text: full captions, and short sentences
about a garment or an attribute ("a person in a red shirt"), which are what a
zero-shot classifier asks with. A short sentence is true of many pictures of a
batch: all of them are its positives (Yang et al. 2022, UniCL, Eq. 3). The
picture is encoded once for both.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax.data import transforms
from dppp_jax.models import clip
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
  full_share: float = 1.0,
  dtype: str = "float32",
) -> list[stage_lib.Stage]:
  """Returns the one stage of contrastive pre-training.

  Args:
    config: both towers.
    texts: per picture, see `make_loss`; the loss draws one of the C texts of
      each kind at every step.
    batch_size: pictures a step, hence negatives + 1.
    epochs: passes.
    lr: peak rate of AdamW.
    weight_decay: of matrices.
    warmup: fraction of the steps.
    augment: what is done to the pictures.
    short_weight: weight of the short texts' loss against the captions'.
    full_share: share of the batch whose captions are read.
    dtype: compute dtype.
  """
  stage = stage_lib.Stage(
    name="contrastive",
    init=make_init(config),
    loss=make_loss(
      config,
      short_weight=short_weight,
      full_share=full_share,
      dtype=dtype,
    ),
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
  config: clip.Config, *, short_weight: float, full_share: float, dtype: Any
) -> Callable[..., tuple[jax.Array, stage_lib.Aux]]:
  """Returns the symmetric contrastive loss over captions and sentences.

  The batch holds "full" int [B, C, L], "short" int [B, C, L], "mentions" bool
  [B, C, A], which attributes a short text names, and "attributes" int [B, A],
  the values of the person.
  """
  vision = clip.VisionTower(config.vision, dtype=dtype)
  text = clip.TextTower(config.text, dtype=dtype)
  read = lambda params, ids: text.apply({"params": params}, ids).projected

  def loss(params, collections, batch, rng):
    images = vision.apply({"params": params}, batch["image"]).projected
    scale = jnp.exp(jnp.minimum(params["logit_scale"], _MAX_SCALE))
    keys = jax.random.split(rng)
    # Captions are soon told apart: a part of the batch is enough for them.
    part = int(full_share * len(images))
    ids = _choose(batch["full"][:part], keys[0])
    full, accuracy_full = contrast(
      images[:part], read(params, ids), scale, jnp.eye(part, dtype=bool)
    )
    ids, mentions = (
      _choose(batch[key], keys[1]) for key in ("short", "mentions")
    )
    short, accuracy_short = contrast(
      images, read(params, ids), scale, is_true(batch["attributes"], mentions)
    )
    metrics = {
      "loss_full": full,
      "loss_short": short,
      "accuracy_full": accuracy_full,
      "accuracy_short": accuracy_short,
      "logit_scale": scale,
    }
    return full + short_weight * short, stage_lib.Aux(metrics, collections)

  return loss


def is_true(attributes: jax.Array, mentions: jax.Array) -> jax.Array:
  """Returns bool [B, B]: whether text j, written for person j, fits person i.

  Args:
    attributes: int [B, A], the value of each attribute.
    mentions: bool [B, A], what text j names.
  """
  same = attributes[:, None] == attributes[None]
  return jnp.all(same | ~mentions[None], axis=-1)


def contrast(
  images: jax.Array, texts: jax.Array, scale: jax.Array, matches: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """CLIP's loss with any number of positives.

  The mean of image-to-text and text-to-image cross-entropy against the uniform
  distribution over the positives; with one positive each it is InfoNCE.

  Args:
    images: [B, E], any length.
    texts: [B, E], likewise.
    scale: factor of the cosines.
    matches: bool [B, B], whether text j is true of image i; at least one in
      every row and column.

  Returns:
    (loss, share of images whose nearest text is true of them).
  """
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  logits = scale * (unit(images) @ unit(texts).T).astype(jnp.float32)
  both = []
  for scores, positive in ((logits, matches), (logits.T, matches.T)):
    log_p = jax.nn.log_softmax(scores, axis=1)
    mean = jnp.sum(log_p, axis=1, where=positive) / jnp.sum(positive, axis=1)
    both.append(-jnp.mean(mean))
  nearest = jnp.argmax(logits, axis=1)
  hits = jnp.take_along_axis(matches, nearest[:, None], axis=1)
  return (both[0] + both[1]) / 2, jnp.mean(hits)


def _choose(texts: jax.Array, rng: jax.Array) -> jax.Array:
  """Returns one of the C rows of each [B, C, L], drawn with one key."""
  choice = jax.random.randint(rng, (len(texts),), 0, texts.shape[1])
  return texts[jnp.arange(len(texts)), choice]


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
