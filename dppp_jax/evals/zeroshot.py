"""Zero-shot classification and image-text retrieval with a CLIP."""

from collections.abc import Mapping, Sequence
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import trees
from dppp_jax.data import transforms
from dppp_jax.evals import spec
from dppp_jax.models import clip
from dppp_jax.weights import load as weights


class Encoder:
  """Both towers of a CLIP, for pictures and sentences of any number.

  Args:
    config: of the towers.
    params: nested dict of both.
    tokenizer: a transformers CLIPTokenizer.
    mean, std: normalisation of the pictures.
  """

  def __init__(self, config, params, tokenizer, *, mean, std):
    self._tokenizer = tokenizer
    self._params = params
    vision = clip.VisionTower(config.vision)
    text = clip.TextTower(config.text)
    self._length = config.text.max_position_embeddings

    def encode_images(params, images):
      pixels = transforms.normalize(images, mean=mean, std=std)
      return _unit(vision.apply({"params": params}, pixels).projected)

    def encode_texts(params, ids):
      return _unit(text.apply({"params": params}, ids).projected)

    self._encode_images = jax.jit(encode_images)
    self._encode_texts = jax.jit(encode_texts)

  def images(self, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    """Encodes uint8 [N, H, W, 3] to float32 [N, E] of norm 1."""
    return _in_batches(
      lambda x: self._encode_images(self._params, x), images, batch_size
    )

  def texts(self, texts: Sequence[str], *, batch_size: int = 256) -> np.ndarray:
    """Encodes N sentences to float32 [N, E] of norm 1."""
    ids = self._tokenizer(
      list(texts),
      padding=True,
      truncation=True,
      max_length=self._length,
      return_tensors="np",
    )["input_ids"].astype(np.int32)
    return _in_batches(
      lambda x: self._encode_texts(self._params, x), ids, batch_size
    )

  def classes(
    self, wordings: Mapping[str, Sequence[str]]
  ) -> dict[str, np.ndarray]:
    """Returns class vectors, float32 [E] of norm 1: means over sentences.

    Args:
      wordings: class -> the sentences that say so.
    """
    means = {name: self.texts(v).mean(axis=0) for name, v in wordings.items()}
    return {name: x / np.linalg.norm(x) for name, x in means.items()}


def load(folder: pathlib.Path) -> Encoder:
  """Reads a CLIP folder, its tokenizer, and how its pictures are normalised.

  Raises:
    errors.UserError: see `weights.load.clip`.
  """
  config, params = weights.clip(folder)
  pictures = spec.of_clip(folder, config.vision)
  return Encoder(
    config,
    trees.to_float32(params),
    weights.tokenizer(folder),
    mean=pictures.mean,
    std=pictures.std,
  )


def classify(
  images: np.ndarray,
  prompts: Mapping[str, np.ndarray],
  truth: Sequence[str],
) -> float:
  """Returns the share of pictures whose nearest class is the true one.

  Args:
    images: float32 [N, E] of norm 1.
    prompts: class -> float32 [E] of norm 1.
    truth: the N true classes.
  """
  names = list(prompts)
  table = np.stack([prompts[name] for name in names])
  guesses = np.argmax(images @ table.T, axis=1)
  return float(
    np.mean([names[g] == t for g, t in zip(guesses, truth, strict=True)])
  )


def recall_at_1(images: np.ndarray, texts: np.ndarray) -> tuple[float, float]:
  """Returns image-to-text and text-to-image R@1 of N matching rows."""
  scores = images @ texts.T
  own = np.arange(len(images))
  return (
    float(np.mean(np.argmax(scores, axis=1) == own)),
    float(np.mean(np.argmax(scores, axis=0) == own)),
  )


def _unit(x: jax.Array) -> jax.Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _in_batches(encode, rows: np.ndarray, size: int) -> np.ndarray:
  """Encodes batches of one size: the last one is filled up and cut again."""
  parts = []
  for start in range(0, len(rows), size):
    batch = rows[start : start + size]
    missing = min(size, len(rows)) - len(batch)
    padded = np.concatenate([batch, np.repeat(batch[:1], missing, axis=0)])
    parts.append(np.asarray(encode(padded))[: len(batch)])
  return np.concatenate(parts)
