"""Writes docs/mini.md from benchmarks/results/mini_quality-*.json.

python benchmarks/mini_page.py [--check]
"""

from collections.abc import Mapping
import json
from typing import Any

from absl import flags
import common

from dppp_jax import cli, errors

_HEAD = """# The small networks

`dppp_jax/assets/mini` holds a whole stage A for machines without a GPU, a
network or weights: an SDXL-type pipeline that diffusers loads, two ControlNets,
three LoRAs, a U2-Net and a CLIP. They draw paper dolls, because they have
seen nothing else: **every number here is measured on drawings**, and none says
how such networks do on photographs. `make pretrain` trains them again.

![Canvases of prompts that no training has seen](mini_canvases.png)

Written by `python benchmarks/mini_page.py` from what `python
benchmarks/mini_quality.py` measured.
"""
_READ = """
## What was asked, and what is seen

{num} prompts with new people of the kinds that training saw (`held out`), and
{num} whose clothes are combined as nobody's were in training (`new`), each with
six skeletons; {steps} steps ({spacing}), guidance {guidance}, seed {seed}. The
same readers are put to the canvases that the renderer draws for the same
prompts: what they say of `drawn` is the best they can say. Shorts and skirts
below a coat, which hides them but for a strip of a few pixels, are not asked
for.

- *by CLIP*: zero-shot class of the six cells' mean feature, by the mini CLIP,
  which has seen drawn canvases and studio people, none of them these.
- *by histogram*: naive Bayes over the colours of pixels inside the matte, where
  the skeleton says that the clothes are, with the colour of the light that was
  asked for divided out; no network.
- *identity*: probability that two cells of one canvas are nearer to each other
  than cells of two canvases (AUC, the same CLIP's features).
- *pose*: IoU of the generated cell's matte and the drawn matte of the same
  skeleton.
- *spill*: share of the mattes' area within two pixels of their cells' borders.
"""
# (title, path in a split's readings, bar of held-out canvases, whether above).
_LINES = (
  ("upper colour, by CLIP", "zero_shot upper_color canvas", 0.9, True),
  ("upper colour, by histogram", "histogram upper_color", 0.9, True),
  ("lower colour, by CLIP", "zero_shot lower_color canvas", 0.9, True),
  ("lower colour, by histogram", "histogram lower_color", 0.9, True),
  ("upper pattern, by CLIP", "zero_shot upper_pattern canvas", 0.8, True),
  ("lower pattern, by CLIP", "zero_shot lower_pattern canvas", 0.8, True),
  ("hair colour, by CLIP", "zero_shot hair_color canvas", 0.8, True),
  ("identity, AUC", "identity_auc", 0.97, True),
  ("pose, IoU", "pose_iou", 0.6, True),
  ("pose, IoU without the ControlNet", "pose_iou_without_controlnet", None, 0),
  ("spill", "spill", 0.02, False),
)


def define_flags():
  """Defines whether the page is written or compared."""
  flags.DEFINE_boolean("check", False, "Only say whether the page is current.")


def page(values: Mapping[str, Any]) -> str:
  """Returns the page as Markdown."""
  results, where = values["results"], values["environment"]
  parts = [_HEAD, _READ.format(**results)]
  parts.append(common.markdown(*readings(results)))
  light = results["luminance"]
  parts.append("## Light\n\nMean luma (0 to 255) of generated places.\n")
  rows = [[words, f"{x:.1f}"] for words, x in light["words"].items()]
  parts.append(common.markdown(["asked for", "luma"], rows))
  hours = ", ".join(f"{k} {x:.1f}" for k, x in light["hours"].items())
  parts.append(f"Means by hour: {hours}.\n")
  parts.append("## From the cards\n")
  parts.append(common.markdown(["", ""], _cards(results["cards"])))
  parts.append(common.footnote(where))
  return "\n".join(parts)


def readings(
  results: Mapping[str, Any],
) -> tuple[list[str], list[list[str]]]:
  """Returns header and rows: what is read of generated and drawn canvases."""
  columns = [
    (s, k) for s in ("held_out", "new") for k in ("generated", "drawn")
  ]
  rows = []
  for title, path, bar, above in _LINES:
    found = [_at(results[split][kind], path) for split, kind in columns]
    sign = "" if bar is None else f"{'at least' if above else 'at most'} {bar}"
    cells = ["" if x is None else f"{x:.3f}" for x in found]
    rows.append([title, sign, *cells])
  header = ["", "bar (held out)", "held out", "drawn", "new", "drawn"]
  return header, rows


def _cards(cards: Mapping[str, Any]) -> list[list[str]]:
  """Returns the numbers that the networks' own cards measured."""
  vae, matting = cards["vae"], cards["u2netp"]
  rows = [
    ["VAE, PSNR of canvases (bar 26)", f"{vae['psnr_canvases']:.2f} dB"],
    ["VAE, PSNR inside the mattes", f"{vae['psnr_people']:.2f} dB"],
  ]
  for kind in ("drawn", "degraded", "reconstructed"):
    rows.append(
      [f"U2-Net, IoU of {kind} cells (bar 0.93)",
       f"{matting[f'iou_{kind}']:.4f}"]
    )  # fmt: skip
  for kind, found in cards.get("loras", {}).items():
    rows.append(
      [f"LoRA {kind}: without, with, taught by",
       ", ".join(f"{found[k]:.3f}" for k in ("without", "with", "wanted"))]
    )  # fmt: skip
  return rows


def _at(values: Any, path: str) -> Any:
  """Returns what lies at a path of keys, or None."""
  for key in path.split():
    values = values.get(key) if isinstance(values, Mapping) else None
  return values


def write(*, check: bool) -> None:
  """Writes the page, or with `check` fails where it is out of date."""
  source = cli.ROOT / "benchmarks/results/mini_quality-cpu.json"
  target = cli.ROOT / "docs" / "mini.md"
  if not source.is_file():
    raise errors.UserError(
      f"{source}: is not there: run python benchmarks/mini_quality.py"
    )
  text = page(json.loads(source.read_text()))
  cli.write_page(target, text, check=check, by="python benchmarks/mini_page.py")


def main(args) -> None:
  """Writes the page, or compares it."""
  write(check=args.check)


if __name__ == "__main__":
  cli.run(main, define_flags=define_flags)
