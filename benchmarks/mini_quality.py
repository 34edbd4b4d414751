"""What the small networks of assets/mini can do, in numbers.

    python benchmarks/mini_quality.py [--num 256] [--assets FOLDER]

Prompts and skeletons that no training has seen are drawn: people of the same
kind as in training (`held_out`), and people whose clothes are combined as
nobody's were (`new`). The same readers read what is generated and what is drawn
for the same prompts: `drawn` is the best that a reader can say. Everything here
is drawn or made by networks that saw drawings; nothing is said of photographs.

Writes benchmarks/results/mini_quality-*.json, docs/mini_canvases.png and, by
mini_page.py, docs/mini.md.
"""

import argparse
from collections.abc import Mapping
import itertools
import json
import pathlib
import time
from typing import Any

import common
import mini_page
import numpy as np
import PIL.Image

from dppp_jax import cli, devices, logs, process, types
from dppp_jax.data import images as images_lib
from dppp_jax.diffusion import sampler as sampler_lib
from dppp_jax.evals import zeroshot
from dppp_jax.geneperson import components, matting, networks, prompts
from dppp_jax.paperdoll import canvas_corpus, canvases, lexicon
from dppp_jax.paperdoll import lighting as lights
from dppp_jax.pretraining import readback
from dppp_jax.weights import lora

_SEED = 11  # Of the drawn world; trainings have 0, their cards too.
_BATCH = 4
_TAUGHT = 5_000  # Drawn canvases that the histograms are learned from.
_PLACES = 8  # Pictures of each light.
_SHOWN = 6  # Canvases in each of two rows of docs/mini_canvases.png.


class Stage:
  """The shipped networks, and canvases drawn with them.

  Args:
    assets: folder of sdxl/, controlnet-openpose/, controlnet-canny/, u2netp/,
      clip/ and, for `merged`, loras/.

  Attributes:
    settings: "steps" and "guidance", of configs/geneperson.py:mini, whose
      sampler and spacing hold, too.
    spacing: where the steps lie.
    encoder: of the CLIP.
  """

  def __init__(self, assets: pathlib.Path):
    config = cli.load_config("geneperson.py:mini")
    sampler = config.sampler
    self.settings = {"steps": sampler.steps, "guidance": sampler.guidance}
    controls = [assets / f"controlnet-{kind}" for kind in ("openpose", "canny")]
    parts = components.load_components(
      assets / "sdxl",
      controlnets=controls,
      scheduler=sampler.scheduler or None,
      k_diffusion=sampler.k_diffusion,
    )
    parts = networks.spaced(config, parts)
    self.spacing = parts.scheduler.timestep_spacing
    self._assets, self._params = assets, parts.params
    self._sampler = sampler_lib.Sampler(
      parts, devices=devices.share(0, batch_size=_BATCH)
    )
    self._mattes = matting.load(
      assets / "u2netp", size=canvases.LAYOUT.cell, batch_size=48
    )
    self.encoder = zeroshot.load(assets / "clip")

  def merged(self, scales: Mapping[str, float]) -> types.Params:
    """Returns the parameters with LoRAs merged, {name: scale}."""
    folder = self._assets / "loras"
    given = [
      lora.Lora(folder / f"{name}.safetensors", scale=scale)
      for name, scale in scales.items()
    ]
    return self._sampler.place(components.merge_loras(self._params, given))

  def canvases(
    self,
    drawn: canvas_corpus.Corpus,
    *,
    pose: float = 1.0,
    grid: float = 1.0,
    params: types.Params | None = None,
  ) -> np.ndarray:
    """Generates a canvas for each prompt and skeleton of drawn ones.

    Args:
      drawn: N canvases of people.
      pose: how much the skeletons count.
      grid: how much the grid counts.
      params: of `merged`; None: those of the base.

    Returns:
      uint8 [N, H, W, 3].
    """
    skeletons = np.stack(list(drawn.skeletons()))
    lines = canvases.grid_lines()
    return self._draw(drawn.prompts, skeletons, lines, pose, grid, params)

  def places(self, prompts: list[str]) -> np.ndarray:
    """Generates places without people."""
    blank = np.zeros((*canvases.LAYOUT.size, 3), np.uint8)
    return self._draw(
      prompts, np.stack([blank] * len(prompts)), blank, 0.0, 0.0
    )

  def mattes(self, cells: np.ndarray) -> np.ndarray:
    """Returns the mattes uint8 [N, cells, h, w] of [N, cells, h, w, 3]."""
    found = self._mattes(cells.reshape(-1, *cells.shape[2:])).alpha
    return found.reshape(cells.shape[:4])

  def _draw(self, prompts, skeletons, grid, pose, strength, params=None):
    parts = []
    for start in logs.progress(
      range(0, len(prompts), _BATCH), desc="generating", unit="batch"
    ):
      some = list(range(start, start + _BATCH))
      places = [min(i, len(prompts) - 1) for i in some]
      made = self._sampler.sample(
        [prompts[i] for i in places],
        seeds=[_SEED * 100_000 + i for i in some],
        control_images=[skeletons[places], grid],
        control_scales=[pose, strength],
        size=canvases.LAYOUT.size,
        params=params,
        **self.settings,
      )
      parts.append(np.asarray(made))
    return np.concatenate(parts)[: len(prompts)]


def read(
  images: np.ndarray,
  mattes: np.ndarray,
  drawn: canvas_corpus.Corpus,
  encoder: zeroshot.Encoder,
  colours: readback.Colours,
) -> dict[str, Any]:
  """Reads canvases that were asked for in the words of drawn ones.

  Args:
    images: uint8 [N, H, W, 3].
    mattes: uint8 [N, cells, h, w].
    drawn: N canvases of the same prompts and skeletons.
    encoder: of the mini CLIP.
    colours: a histogram reader.
  """
  cells = readback.cut(images)
  wanted = [record["attributes"] for record in drawn.records]
  lit = [record["words"]["lighting"] for record in drawn.records]
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  features = readback.features_of(encoder, cells)
  return {
    "zero_shot": readback.attributes(encoder, cells, wanted),
    "histogram": colours.agreement(cells, mattes, drawn.keypoints, wanted, lit),
    "identity_auc": readback.identity_auc(features),
    "pose_iou": readback.pose_iou(
      flat(mattes), flat(readback.cut(drawn.alphas))
    ),
    "spill": readback.spill(flat(mattes)),
  }


def luminances(stage: Stage) -> dict[str, dict[str, float]]:
  """Returns the mean luma of generated places, by words for light and hour."""
  found: dict[str, float] = {}
  for light in lights.LIGHTINGS:
    words = lexicon.said(light)
    where = itertools.cycle(prompts.places(words, lexicon.vocabulary()))
    asked = [
      prompts.background(place, words, lexicon.BACKGROUND)
      for place in itertools.islice(where, _PLACES)
    ]
    found[words] = readback.luminance(stage.places(asked))
  hours = ("day", "dusk", "night")
  return {
    "words": found,
    "hours": {
      hour: float(np.mean([v for k, v in found.items() if k.startswith(hour)]))
      for hour in hours
    },
  }


def cards(assets: pathlib.Path) -> dict[str, Any]:
  """Returns what the cards of the networks measured."""
  names = {
    "vae": "sdxl/vae",
    "u2netp": "u2netp",
    "loras": "loras",
    "clip": "clip",
  }
  return {
    name: json.loads((assets / place / "metrics.json").read_text())
    for name, place in names.items()
    if (assets / place / "metrics.json").is_file()
  }


def main() -> None:
  """Draws, reads, prints and writes."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--num", type=int, default=256, help="canvases of each kind"
  )
  parser.add_argument(
    "--assets", default=str(cli.ROOT / "dppp_jax/assets/mini")
  )
  parser.add_argument("--cache", default=str(cli.ROOT / "runs/canvases"))
  args = parser.parse_args()
  process.tune_memory()
  assets = pathlib.Path(args.assets)
  draw = lambda num, **options: canvas_corpus.draw(
    num, with_scenes=False, cache=args.cache, **options
  )
  colours = readback.Colours(draw(_TAUGHT, seed=_SEED + 1))
  stage = Stage(assets)
  asked = {"seed": _SEED, "num": args.num, "spacing": stage.spacing}
  results: dict[str, Any] = asked | stage.settings
  for split in ("held_out", "new"):
    drawn = draw(args.num, seed=_SEED, split=split)
    reading = lambda images, mattes, drawn=drawn: read(
      images, mattes, drawn, stage.encoder, colours
    )
    begin = time.perf_counter()
    made = stage.canvases(drawn)
    results.setdefault(
      "seconds_per_canvas", (time.perf_counter() - begin) / len(made)
    )
    if split == "held_out":
      shown = images_lib.contact_sheet(
        [made[:_SHOWN], made[_SHOWN : 2 * _SHOWN]], max_height=192
      )
      PIL.Image.fromarray(shown).save(cli.ROOT / "docs/mini_canvases.png")
    found = reading(made, stage.mattes(readback.cut(made)))
    results[split] = {
      "generated": found,
      "drawn": reading(drawn.images, readback.cut(drawn.alphas)),
    }
    if split == "held_out":
      free = stage.canvases(drawn, pose=0.0)
      mattes = stage.mattes(readback.cut(free))
      found["pose_iou_without_controlnet"] = readback.pose_iou(
        mattes.reshape(-1, *mattes.shape[2:]),
        readback.cut(drawn.alphas).reshape(-1, *mattes.shape[2:]),
      )
  results["luminance"] = luminances(stage)
  results["cards"] = cards(assets)
  print(common.table(*mini_page.readings(results)))
  print(common.write("mini_quality", results))
  mini_page.write(check=False)


if __name__ == "__main__":
  main()
