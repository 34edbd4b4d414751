"""What stands beside a trained network: its card, its numbers, its config."""

from collections.abc import Iterable, Mapping, Sequence
import pathlib
from typing import Any

from dppp_jax import logs
from dppp_jax.train import run

DRAWN = (
  "Everything it has seen is drawn, and so is everything that it is measured"
  " on; nothing is claimed about photographs."
)


def write(
  folder: pathlib.Path,
  text: str,
  *,
  config: Mapping[str, Any],
  metrics: Mapping[str, Any],
) -> None:
  """Writes README.md, training.json and metrics.json into a folder."""
  run.write_json(folder / "training.json", config)
  run.write_json(folder / "metrics.json", metrics)
  (folder / "README.md").write_text(text)


def text(
  title: str,
  about: str,
  *,
  tags: Sequence[str],
  facts: Mapping[str, str],
  table: Mapping[str, str],
) -> str:
  """Returns a model card.

  Args:
    title: of the card.
    about: a paragraph.
    tags: of the Hugging Face hub.
    facts: data, steps and the like.
    table: what was measured, and the number with its unit.
  """
  lines = [
    "---",
    "license: apache-2.0",
    f"tags: [{', '.join(tags)}]",
    "---",
    "",
    f"# {title}",
    "",
    f"{about} {DRAWN}",
    "",
    *(f"- {name}: {value}" for name, value in facts.items()),
    "- Licence: Apache-2.0",
    "",
    "| measured on held-out drawings | |",
    "|---|---|",
    *(f"| {name} | {value} |" for name, value in table.items()),
  ]
  return "\n".join(lines) + "\n"


def cost(
  workdir: pathlib.Path, phases: Iterable[Mapping[str, Any]]
) -> dict[str, int]:
  """Returns what a training took, from its log.

  Args:
    workdir: run folder.
    phases: of the training, each with "name" and "batch_size".

  Returns:
    {"steps": of all stages, "seconds": spent in them, without compilation}.
  """
  batch_sizes = {phase["name"]: phase["batch_size"] for phase in phases}
  seconds, done, last = 0.0, 0, 0
  for line in logs.read(workdir / "metrics.jsonl"):
    last = max(last, line["step"])
    if "images_per_second" in line:
      pictures = (line["step"] - done) * batch_sizes[line["stage"]]
      seconds += pictures / max(line["images_per_second"], 1e-9)
      done = line["step"]
  return {"steps": last, "seconds": round(seconds)}
