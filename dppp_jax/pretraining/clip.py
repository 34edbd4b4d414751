"""From a configuration of `configs/pretrain_clip.py` to a CLIP folder."""

from collections.abc import Mapping, Sequence
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np

from dppp_jax import trees
from dppp_jax.data import source as source_lib
from dppp_jax.data import transforms
from dppp_jax.evals import zeroshot
from dppp_jax.geneperson import canvas
from dppp_jax.methods import clip_pretrain
from dppp_jax.models import clip
from dppp_jax.paperdoll import canvases, wardrobe
from dppp_jax.paperdoll import corpus as corpus_lib
from dppp_jax.pretraining import cards, corpora, readback
from dppp_jax.train import loop, run
from dppp_jax.weights import export, load
from dppp_jax.weights import tokenizer as tokenizer_lib

# Attributes whose zero-shot accuracy the card reports.
_REPORTED = (
  "gender", "body", "skin", "hair_color", "hair_length", "upper_type",
  "upper_color", "upper_pattern", "lower_type", "lower_color",
  "lower_pattern", "footwear_type", "footwear_color", "hat", "bag",
)  # fmt: skip
_DOMAINS = {
  "studio": "studio pictures",
  "street": "street pictures",
  "canvases": "cells of canvases",
}


def train(config: Mapping[str, Any], workdir: str) -> pathlib.Path | None:
  """Pre-trains a CLIP on studio people, exports it, and measures it.

  Args:
    config: the resolved configuration as a nested dict; it begins with the
      CLIP of `begin`, or at random.
    workdir: run folder.

  Returns:
    The folder `workdir/clip`, or None where a signal stopped the training.

  Raises:
    errors.UserError: see `train.run.prepare` and `train.loop.fit`.
  """
  beginning = config.get("begin", "")
  begin = load.clip(beginning) if beginning else None
  folder = run.prepare(workdir, config)
  target = folder / "clip"
  data, train = config["data"], config["train"]
  cache = data.get("cache", folder)
  corpus = _training(data, cache)
  attributes = _attributes()
  if begin:
    tokenizer, (clip_config, params) = load.tokenizer(beginning), begin
  else:
    words = folder / "tokenizer"
    vocab_size = tokenizer_lib.train_tokenizer(
      [*corpus.captions, *(text for group in _sentences() for text in group)],
      words,
      vocab_size=config["model"]["vocab_size"],
    )
    tokenizer, params = load.tokenizer(words), None
    clip_config = make_config(config["model"], tokenizer, vocab_size)
  length = clip_config.text.max_position_embeddings
  augment = transforms.Augment(**config["augment"])
  stages = clip_pretrain.stages(
    clip_config,
    clip_pretrain.tokenize(tokenizer, corpus.captions, max_length=length),
    _values(corpus, attributes),
    class_prompts(tokenizer, max_length=length),
    phases=phases(train),
    batch_size=train["batch_size"],
    weight_decay=train["weight_decay"],
    augment=augment,
    dtype=jnp.dtype(config["dtype"]),
    begin=params,
  )
  outcome = loop.fit(
    stages,
    source_lib.Arrays(corpus.images, np.arange(len(corpus.images))),
    workdir=folder,
    options=loop.Options(
      seed=train["seed"],
      image_size=tuple(data["image_size"]),
      mean=augment.mean,
      std=augment.std,
      log_every=train["log_every"],
      checkpoint_every=train["checkpoint_every"],
      tensorboard=train["tensorboard"],
    ),
  )
  if not outcome.finished:
    return None
  if target.exists():
    shutil.rmtree(target)  # Ours, and rebuilt from the checkpoint.
  export.clip(
    target,
    clip_config,
    outcome.params,
    dtype="float16",
    tokenizer=tokenizer,
    mean=augment.mean,
    std=augment.std,
  )
  batch = {"batch_size": train["batch_size"]}
  cost = cards.cost(folder, [phase | batch for phase in train["phases"]])
  metrics = measure(target, config, cache) | cost
  run.write_json(target / "training.json", config)
  run.write_json(target / "metrics.json", metrics)
  (target / "README.md").write_text(card(config, metrics))
  return target


def make_config(
  model: Mapping[str, Any], tokenizer: Any, vocab_size: int
) -> clip.Config:
  """Returns the configuration of both towers for a vocabulary."""
  size = model["projection_dim"]
  return clip.Config(
    vision=clip.VisionConfig(**model["vision"], projection_dim=size),
    text=clip.TextConfig(
      **model["text"],
      projection_dim=size,
      vocab_size=vocab_size,
      bos_token_id=tokenizer.bos_token_id,
      eos_token_id=tokenizer.eos_token_id,
      pad_token_id=tokenizer.pad_token_id,
    ),
    projection_dim=size,
  )


def phases(train: Mapping[str, Any]) -> list[clip_pretrain.Phase]:
  """Returns the phases of a configuration's `train`."""
  return [_phase(phase, _attributes()) for phase in train["phases"]]


def class_prompts(tokenizer: Any, *, max_length: int) -> clip_pretrain.Prompts:
  """Returns the sentences of all values of all attributes that differ.

  Args:
    tokenizer: a transformers CLIPTokenizer.
    max_length: positions of the text tower.
  """
  return clip_pretrain.Prompts(
    _wordings(tokenizer, _sentences(), max_length),
    tuple(len(wardrobe.VALUES[name]) for name in _attributes()),
  )


def measure(
  folder: pathlib.Path, config: Mapping[str, Any], cache: pathlib.Path
) -> dict[str, Any]:
  """Measures a CLIP folder on people that its training has not seen.

  Returns:
    {"studio" | "street": {"zero_shot": {attribute: accuracy}, "num_images"},
    "parameters"}, and for the studio "image_to_text_R@1" and
    "text_to_image_R@1" of the full captions among all its pictures; "canvases"
    of their cells, where it was trained on some.
  """
  encoder = zeroshot.load(folder)
  data, found = config["data"], {}
  corpora = {
    "studio": _draw(data, "held_out", data["num_held_out"], cache),
    "street": _draw(data, "street", data["num_held_out"], cache),
  }
  if num := data.get("num_held_out_canvases"):
    corpora["canvases"] = _cells(data, "held_out", num)
  for name, corpus in corpora.items():
    images = encoder.images(corpus.images)
    found[name] = {
      "num_images": len(images),
      "zero_shot": {
        attribute: zeroshot.classify(
          images,
          readback.classes(encoder, attribute),
          [person[attribute] for person in corpus.attributes],
        )
        for attribute in _REPORTED
      },
    }
    if name == "studio":
      texts = encoder.texts(corpus.captions)
      recall = zeroshot.recall_at_1(images, texts)
      found[name]["image_to_text_R@1"], found[name]["text_to_image_R@1"] = (
        recall
      )
  return {**found, "parameters": trees.count(load.clip(folder)[1])}


def card(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
  """Returns the model card; every number in it is measured."""
  data, settings = config["data"], config["train"]
  domains = [name for name in _DOMAINS if name in metrics]
  cells = data.get("num_canvases", 0)
  title = "pretrain_clip_cells" if cells else "pretrain_clip"
  lines = [
    "---",
    "license: apache-2.0",
    "tags: [clip, person-re-identification, synthetic]",
    "---",
    "",
    "# Mini CLIP of the paper-doll world",
    "",
    "A small CLIP trained by `launch/pretrain.py --config"
    f" configs/{title}.py` on drawn people and their prompts. It has seen"
    " no photograph, and nothing here is measured on photographs.",
    "",
    f"- Data: {data['num_images']} drawn studio pictures of as many"
    f" people, world seed {data['seed']}"
    + (f", and cells of {cells} drawn canvases" if cells else ""),
    f"- Parameters: {metrics['parameters']:,}, stored in float16",
    f"- Training: {metrics['steps']:,} steps of {settings['batch_size']}"
    f" in {metrics['seconds']:,} seconds, seed {settings['seed']}"
    + (", after those of `configs/pretrain_clip.py`" if cells else ""),
    "- Input: 96 x 48 (H x W), mean = std = 0.5; position grid 6 x 6, resized",
    "- Licence: Apache-2.0",
    "",
    "Zero-shot accuracy on people that the training has not seen ("
    + ", ".join(
      f"{metrics[name]['num_images']} {_DOMAINS[name]}" for name in domains
    )
    + "):",
    "",
    f"| attribute | classes | {' | '.join(domains)} |",
    "|---" * (2 + len(domains)) + "|",
  ]
  for name in _REPORTED:
    shares = [f"{metrics[d]['zero_shot'][name]:.1%}" for d in domains]
    count = len(wardrobe.VALUES[name])
    lines.append(f"| {name} | {count} | {' | '.join(shares)} |")
  for key in ("image_to_text_R@1", "text_to_image_R@1"):
    rest = " |" * len(domains)
    lines.append(f"| {key} | | {metrics['studio'][key]:.1%}{rest}")
  return "\n".join(lines) + "\n"


def _attributes() -> list[str]:
  """Returns the attributes that people differ in."""
  return [name for name, v in wardrobe.VALUES.items() if len(v) > 1]


def _sentences() -> list[Sequence[str]]:
  """Returns the wordings of each value of each attribute."""
  return [
    wardrobe.phrases(name, value)
    for name in _attributes()
    for value in wardrobe.VALUES[name]
  ]


def _phase(
  values: Mapping[str, Any], names: Sequence[str]
) -> clip_pretrain.Phase:
  weights = {names.index(name): w for name, w in values["weights"].items()}
  return clip_pretrain.Phase(**{**values, "weights": weights})


def _values(corpus: corpus_lib.Corpus, names: Sequence[str]) -> np.ndarray:
  """Returns int32 [N, A], the place of everybody's value in VALUES."""
  rows = [
    [wardrobe.VALUES[name].index(person[name]) for name in names]
    for person in corpus.attributes
  ]
  return np.array(rows, np.int32)


def _wordings(
  tokenizer: Any, sentences: Sequence[Sequence[str]], length: int
) -> np.ndarray:
  """Returns int32 [V, M, L]; values with fewer wordings repeat theirs."""
  most = max(len(group) for group in sentences)
  texts = [group[i % len(group)] for group in sentences for i in range(most)]
  ids = clip_pretrain.tokenize(tokenizer, texts, max_length=length)
  return ids.reshape(len(sentences), most, -1)


def _training(data, cache) -> corpus_lib.Corpus:
  """Draws studio people and, where asked for, cells of canvases."""
  studio = _draw(data, "studio", data["num_images"], cache)
  if not data.get("num_canvases"):
    return studio
  cells = _cells(data, "train", data["num_canvases"])
  return corpus_lib.Corpus(
    np.concatenate([studio.images, cells.images]),
    studio.captions + cells.captions,
    studio.attributes + cells.attributes,
  )


def _cells(data, split, num) -> corpus_lib.Corpus:
  """Cuts every second cell, in turns, of canvases of people."""
  drawn = corpora.draw(data, split, num)
  images, records = [], []
  for i in np.flatnonzero(~drawn.is_scene):
    cells = canvas.cut(drawn.images[i], canvases.LAYOUT)[i % 2 :: 2]
    images.append(cells)
    records += [drawn.records[i]] * len(cells)
  return corpus_lib.Corpus(
    np.concatenate(images),
    [record["prompt"] for record in records],
    [record["attributes"] for record in records],
  )


def _draw(data, domain, num, cache) -> corpus_lib.Corpus:
  return corpus_lib.draw(
    num,
    seed=data["seed"],
    size=tuple(data["image_size"]),
    domain=domain,
    processes=data["processes"],
    cache=cache,
  )
