"""Trains LoRAs on the mini SDXL, each towards a change that can be measured.

Each LoRA is taught by the canvases of the corpus, changed:

    detail    sharper: the difference to a blurred picture is added
    lighting  the light of the prompt's words, at its full strength
    style     an old print: blacks lifted, colours faded and warm
"""

from collections.abc import Callable, Mapping
import pathlib
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, trees, types
from dppp_jax.methods import adapters, beginnings
from dppp_jax.paperdoll import canvas_corpus, lexicon
from dppp_jax.pretraining import cards, controlnet, corpora, latents
from dppp_jax.pretraining import stack as stack_lib
from dppp_jax.train import run
from dppp_jax.train import stage as stage_lib
from dppp_jax.weights import diffusion_rules, lora_write

_SOFTENED = 0.35  # Share of a canvas' own light, see `canvases.draw`.
_PRINT = ((0.75, 0.68, 0.55), (52.0, 42.0, 34.0))  # Gain and lift of R, G, B.


def train(config: Mapping[str, Any], workdir: str) -> pathlib.Path | None:
  """Trains, exports and measures LoRAs, one after the other.

  Args:
    config: the resolved configuration as a nested dict; `data.kinds` names
      them.
    workdir: run folder; each LoRA has its own inside.

  Returns:
    The folder `workdir/loras` with a .safetensors file for each; None where a
    signal stopped the training.

  Raises:
    errors.UserError: see `train.run.prepare` and `train.loop.fit`; no such
      kind; or no pipeline where the configuration looks.
  """
  data = config["data"]
  for kind in data["kinds"]:
    if kind not in CHANGES:
      raise errors.UserError(
        f"config data.kinds {kind!r}: choose among {', '.join(CHANGES)}"
      )
  stack = controlnet.from_pipeline(config["data"]["base"])
  folder = run.prepare(workdir, config)
  target = folder / "loras"
  target.mkdir(exist_ok=True)
  found = {}
  for kind in data["kinds"]:
    metrics = _train_one(kind, stack, config, folder / kind, target)
    if metrics is None:
      return None
    found[kind] = metrics
  cards.write(target, card(config, found), config=config, metrics=found)
  return target


def _train_one(kind, stack, config, folder, target) -> dict[str, Any] | None:
  data, model, settings = config["data"], config["model"], config["train"]
  drawn = corpora.draw(data, "train", data["num_canvases"])
  held_out = corpora.draw(data, "held_out", data["num_held_out"])
  scale = model["alpha"] / model["rank"]
  of = lambda corpus: stack_lib.examples(
    stack,
    corpus,
    data,
    transform=_transform(kind, corpus),
    label=kind,
  )
  merged = lambda params: {
    **params,
    "unet": adapters.merge(params["unet"], params["lora"], scale=scale),
  }
  watch = stack_lib.watcher(
    stack,
    held_out,
    folder / "sheets",
    settings["sheet"],
    dtype=jnp.dtype(config["dtype"]),
    merged=merged,
  )
  outcome = stack_lib.fit(
    stages(stack, config, of(drawn)), len(drawn), config, folder, watch
  )
  if not outcome.finished:
    return None
  lora_write.save(
    target / f"{kind}.safetensors",
    outcome.params["lora"],
    diffusion_rules.unet(stack.system.unet),
    alpha=model["alpha"],
    layout=model["layout"],
    dtype="float16",
    metadata={"ss_network_dim": str(model["rank"])},
  )
  # Factors of zeros are none.
  none = jax.tree.map(np.zeros_like, outcome.params["lora"])
  states = [outcome.params, {**outcome.params, "lora": none}]
  errors_of = stack_lib.held_out_errors(
    stack, states, of(held_out), config, lora_scale=scale
  )
  return {
    **measure(kind, stack, merged(outcome.params), held_out, config),
    "held_out_mse": errors_of[0],
    "held_out_mse_without": errors_of[1],
    **cards.cost(folder, settings["phases"]),
    "parameters": trees.count(outcome.params["lora"]),
  }


def stages(
  stack: stack_lib.Stack,
  config: Mapping[str, Any],
  data: Mapping[str, Any],
) -> list[stage_lib.Stage]:
  """Returns a stage for each phase of a resolved configuration.

  Args:
    stack: of the base.
    config: see `train`.
    data: of `stack.examples`.
  """
  model = config["model"]
  return stack_lib.phases(
    stack,
    config,
    init=beginnings.lora_init(
      stack.given, targets=model["targets"], rank=model["rank"]
    ),
    rules=lambda rate: (("lora/.*", rate), (".*", None)),
    data=data,
    lora_scale=model["alpha"] / model["rank"],
  )


def detail(image: np.ndarray, words: Mapping[str, str]) -> np.ndarray:
  """Returns uint8 [H, W, 3], sharper: twice the difference to its blur."""
  del words
  blurred = cv2.GaussianBlur(image, (0, 0), 1.0).astype(np.float32)
  return _bytes(image + 1.0 * (image - blurred))


def lighting(image: np.ndarray, words: Mapping[str, str]) -> np.ndarray:
  """Returns uint8 [H, W, 3] under the whole light that the prompt names."""
  light = lexicon.light(words["lighting"])
  return _bytes(image * (light.gain / light.softened(_SOFTENED).gain))


def style(image: np.ndarray, words: Mapping[str, str]) -> np.ndarray:
  """Returns uint8 [H, W, 3] as an old print: lifted, faded and warm."""
  del words
  gain, lift = np.array(_PRINT)
  return _bytes(image * gain + lift)


CHANGES: dict[str, Callable[[np.ndarray, Mapping[str, str]], np.ndarray]] = {
  "detail": detail,
  "lighting": lighting,
  "style": style,
}


def sharpness(images: np.ndarray) -> float:
  """Returns the mean absolute Laplacian of uint8 [N, H, W, 3]."""
  return float(
    np.mean([np.abs(cv2.Laplacian(x, cv2.CV_32F)).mean() for x in images])
  )


def light_range(images: np.ndarray, words: list[Mapping[str, str]]) -> float:
  """Returns how far pictures of bright words are above those of dark words.

  Args:
    images: uint8 [N, H, W, 3].
    words: of each, with "lighting".

  Returns:
    Slope of the mean grey level over the gain of the light; 0 if all have
    the same light.
  """
  gains = np.array([lexicon.light(w["lighting"]).gain.mean() for w in words])
  greys = images.reshape(len(images), -1).mean(axis=1)
  centred = gains - gains.mean()
  spread = np.square(centred).sum()
  return float((centred * greys).sum() / spread) if spread > 0 else 0.0


def warmth(images: np.ndarray) -> float:
  """Returns by how much red is above blue in uint8 [N, H, W, 3]."""
  red, _, blue = images.reshape(-1, 3).mean(axis=0)
  return float(red - blue)


def reading(
  kind: str, words: list[Mapping[str, str]]
) -> Callable[[np.ndarray], float]:
  """Returns what a LoRA is measured by: uint8 [N, H, W, 3] -> a number.

  Args:
    kind: of `CHANGES`.
    words: of each picture, with "lighting".
  """
  return {
    "detail": sharpness,
    "lighting": lambda images: light_range(images, words),
    "style": warmth,
  }[kind]


def measure(
  kind: str,
  stack: stack_lib.Stack,
  params: types.Params,
  held_out: canvas_corpus.Corpus,
  config: Mapping[str, Any],
) -> dict[str, float]:
  """Draws held-out prompts with and without a LoRA, from the same seeds.

  Returns:
    "with" and "without" it: `sharpness`, `light_range` or `warmth`; and
    "wanted", that of the pictures it was taught by.
  """
  sheet = config["train"]["sheet"]
  num = min(config["data"]["num_measured"], len(held_out))
  num -= num % sheet["num"]  # Whole batches.
  sampler = stack.sampler(jnp.dtype(config["dtype"]))
  words = [held_out.records[i]["words"] for i in range(num)]
  value = reading(kind, words)

  def draw(net):
    placed = sampler.place({**stack.params, "unet": net})
    parts = [
      sampler.sample(
        held_out.prompts[start : start + sheet["num"]],
        seeds=list(range(start, start + sheet["num"])),
        steps=sheet["steps"],
        guidance=sheet["guidance"],
        size=held_out.images.shape[1:3],
        params=placed,
      )
      for start in range(0, num, sheet["num"])
    ]
    return np.concatenate([np.asarray(part) for part in parts])

  change = _transform(kind, held_out)
  wanted = [change(i, held_out.images[i]) for i in range(len(words))]
  return {
    "without": value(draw(stack.params["unet"])),
    "with": value(draw(params["unet"])),
    "wanted": value(np.stack(wanted)),
  }


def card(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
  """Returns the model card; every number in it is measured."""
  data, model, settings = config["data"], config["model"], config["train"]
  named = {
    "detail": "detail: mean absolute Laplacian of what is drawn",
    "lighting": "lighting: grey levels per unit of the light's gain",
    "style": "style: grey levels of red above blue",
  }
  any_one = next(iter(metrics.values()))
  return cards.text(
    "Mini LoRAs of the paper-doll world",
    "LoRAs trained by `launch/pretrain.py --config configs/pretrain_lora.py` on"
    f" the mini SDXL beside them, in {model['layout']}'s format.",
    tags=("lora", "person-re-identification", "synthetic"),
    facts={
      "Data": f"{data['num_canvases']:,} drawn canvases of 192 x 144 pixels,"
      f" changed as each LoRA shall learn it, world seed {data['seed']}",
      "Size": f"rank {model['rank']}, alpha {model['alpha']:g},"
      f" {any_one['parameters']:,} parameters each, stored in float16",
      "Training": f"{any_one['steps']:,} steps each, seed {settings['seed']}",
    },
    table={
      named[kind]: f"{one['without']:.3f} without, {one['with']:.3f} with"
      f" (taught by {one['wanted']:.3f})"
      for kind, one in metrics.items()
    },
  )


def _transform(kind: str, drawn: canvas_corpus.Corpus) -> latents.Transform:
  """Returns a LoRA's change; places stay, but for their sharpness and style."""

  def change(i: int, image: np.ndarray) -> np.ndarray:
    record = drawn.records[i]
    if kind == "lighting" and record["is_scene"]:
      return np.asarray(image)  # Under its whole light already.
    return CHANGES[kind](np.asarray(image), record["words"])

  return change


def _bytes(x: np.ndarray) -> np.ndarray:
  return np.clip(np.rint(x), 0, 255).astype(np.uint8)
