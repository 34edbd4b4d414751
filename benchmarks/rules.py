"""How well the rules see a missing head or missing legs, and what they cost.

    python benchmarks/rules.py [--num 96] [--page]

The small networks draw canvases in the configuration of :mini. Of each cell
the head, the shins or the legs are painted over with the paper behind them,
and taken off its matte, as a matting network should do. (The small U2-Net has
seen nobody without a head, and imagines one: `matted_anew` says how often.)
What all other rules keep is asked for its agreement with the skeleton: of all
points, and the least of those of all points, of the head and of knees and
ankles. For bounds on both the result says how many whole cells are lost, and
how many of each kind of damage are caught.

What these networks draw by themselves is counted, too: a cell whose matte
covers less than a third of the head, or of the legs, that the drawn figure of
the same skeleton has there. All cells are like drawings: nothing is said of
photographs.

Writes benchmarks/results/rules-*.json and docs/rules.md; with --page only the
page, from the results that are there.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import common
import mini_quality
import numpy as np

from dppp_jax import cli
from dppp_jax.geneperson import poses, quality
from dppp_jax.paperdoll import canvas_corpus
from dppp_jax.pretraining import readback

_SEED = 12  # Of the drawn world; mini_quality has 11, trainings have 0.
_BOUNDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
_COVERED = 1 / 3
_MEASURES = {
  "all_points": quality.agreement,
  "least_of_parts": quality.least_agreement,
}
_AT = poses.INDEX
_KINDS = {
  "whole": "whole",
  "no_head": "head taken off",
  "no_shins": "shins taken off",
  "no_legs": "legs taken off",
  "no_head_matted_anew": "head off, small U2-Net",
  "no_legs_matted_anew": "legs off, small U2-Net",
  "itself_no_head": "no head by itself",
  "itself_no_legs": "no legs by itself",
}
_HEAD = """# What the rules see of a missing head or missing legs

`python benchmarks/rules.py` had {num} canvases drawn by the small networks of
`:mini` (seed {seed}), and took heads, shins or legs off their cells, by
painting paper over them, and off their mattes. `rules.min_agreement` looks at
the share of the skeleton's points that lie in the matte. **All these cells are
like drawings**: on photographs the shares are others, and the bound is to be
looked at again. The small U2-Net has seen nobody without a head, and mattes
one where none is: with it the rule cannot see what lacks.
"""


def bands(points: np.ndarray, height: int) -> dict[str, tuple[int, int]]:
  """Returns {damage: (first row, end)} of what is painted over in a cell."""
  row = lambda *names: points[[_AT[name] for name in names], 1]
  neck = int(row("neck").min())
  knees = int(row("right_knee", "left_knee").max())
  hips = int(row("right_hip", "left_hip").mean())
  return {
    "no_head": (0, neck),
    "no_shins": (knees, height),
    "no_legs": (hips, height),
  }


def painted(cell: np.ndarray, rows: tuple[int, int]) -> np.ndarray:
  """Returns a cell with the paper of its edges over some rows."""
  paper = np.median(np.hstack([cell[:, 2:5], cell[:, -5:-2]]), axis=1)
  changed = cell.copy()
  changed[slice(*rows)] = paper[slice(*rows), None].astype(np.uint8)
  return changed


def judged(
  cells: np.ndarray,
  alphas: np.ndarray,
  figures: Sequence[poses.Keypoints],
) -> list[dict[str, float]]:
  """Returns the measures of the cells that all other rules keep."""
  rules = quality.Rules(min_agreement=None, min_difference=None)
  reasons = quality.judge(cells, alphas, rules=rules)
  return [
    {name: of(figure, alpha >= 128) for name, of in _MEASURES.items()}
    for alpha, figure, reason in zip(alphas, figures, reasons, strict=True)
    if reason is None
  ]


def table(
  groups: dict[str, list[dict[str, float]]], totals: dict[str, int]
) -> dict[str, Any]:
  """Returns for each measure and bound the share of each group that it drops.

  Args:
    groups: measures of the cells of each kind that the other rules keep.
    totals: cells of each kind, with those that the other rules drop.
  """
  found: dict[str, Any] = {
    "cells": totals,
    "dropped_by_other_rules": {
      name: 1 - len(some) / totals[name]
      for name, some in groups.items()
      if totals[name]
    },
  }
  for measure in _MEASURES:
    found[measure] = {
      str(bound): {
        name: float(np.mean([one[measure] < bound for one in some]))
        for name, some in groups.items()
        if some
      }
      for bound in _BOUNDS
    }
  return found


def page(values: Mapping[str, Any]) -> str:
  """Returns docs/rules.md of what `common.write` wrote."""
  results = values["results"]
  kinds = {name: say for name, say in _KINDS.items() if results["cells"][name]}
  parts = [_HEAD.format(**results)]
  rows = [
    [say, str(results["cells"][name]), _percent(results, name)]
    for name, say in kinds.items()
  ]
  parts.append(
    common.markdown(["", "cells", "dropped by the other rules"], rows)
  )
  for measure, title in (
    (
      "least_of_parts",
      "of all points, of the head's or of the legs' the least",
    ),
    ("all_points", "of all points (not what the rule takes)"),
  ):
    parts.append(f"Agreement {title}: dropped of what the other rules keep.\n")
    rows = [
      [f"below {bound}", *(f"{100 * shares[k]:.1f} %" for k in kinds)]
      for bound, shares in results[measure].items()
    ]
    parts.append(common.markdown(["", *kinds.values()], rows))
  parts.append(common.footnote(values["environment"]))
  return "\n".join(parts)


def _percent(results: Mapping[str, Any], name: str) -> str:
  return f"{100 * results['dropped_by_other_rules'][name]:.1f} %"


def write_page() -> None:
  """Writes docs/rules.md from the results."""
  text = page(common.read("rules"))
  (cli.ROOT / "docs/rules.md").write_text(text, encoding="utf-8")


def main() -> None:
  """Draws, damages, judges, prints and writes."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--num", type=int, default=96, help="canvases")
  parser.add_argument("--page", action="store_true", help="only the page")
  parser.add_argument("--cache", default=str(cli.ROOT / "runs/canvases"))
  args = parser.parse_args()
  if args.page:
    write_page()
    return
  drawn = canvas_corpus.draw(
    args.num, seed=_SEED, split="held_out", with_scenes=False, cache=args.cache
  )
  stage = mini_quality.Stage(cli.ROOT / "dppp_jax/assets/mini")
  cells = readback.cut(stage.canvases(drawn))
  alphas = stage.mattes(cells)
  truth = readback.cut(drawn.alphas)
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  points = flat(drawn.keypoints)
  figures = [
    poses.Keypoints(
      xy=one[:, :2].astype(np.float64),
      depth=np.zeros(len(one)),
      visible=one[:, 2] > 0,
    )
    for one in points
  ]
  places = [bands(one, cells.shape[2]) for one in points]
  kinds = {"whole": (flat(cells), flat(alphas), figures)}
  for damage in ("no_head", "no_shins", "no_legs"):
    changed, cut = flat(cells).copy(), flat(alphas).copy()
    for i, place in enumerate(places):
      changed[i] = painted(changed[i], place[damage])
      cut[i, slice(*place[damage])] = 0
    kinds[damage] = (changed, cut, figures)
    if damage != "no_shins":
      anew = flat(stage.mattes(changed.reshape(cells.shape)))
      kinds[f"{damage}_matted_anew"] = (changed, anew, figures)
  # What came out without a head or legs by itself is no whole figure.
  lacking = {"no_head": [], "no_legs": []}
  for damage, which in lacking.items():
    for alpha, goal, place in zip(
      flat(alphas), flat(truth), places, strict=True
    ):
      rows = slice(*place[damage])
      wanted = goal[rows] >= 128
      share = (alpha[rows] >= 128)[wanted].mean() if wanted.any() else 1.0
      which.append(share < _COVERED)
  is_whole = ~(np.array(lacking["no_head"]) | np.array(lacking["no_legs"]))
  pick = lambda kind, which: tuple(
    [part[i] for i in np.flatnonzero(which)] for part in kinds[kind]
  )
  kinds["itself_no_head"] = pick("whole", lacking["no_head"])
  kinds["itself_no_legs"] = pick("whole", lacking["no_legs"])
  for kind in kinds.keys() - {"itself_no_head", "itself_no_legs"}:
    kinds[kind] = pick(kind, is_whole)
  groups = {
    name: judged(np.array(some), np.array(mattes), shapes) if len(some) else []
    for name, (some, mattes, shapes) in kinds.items()
  }
  totals = {name: len(some) for name, (some, _, _) in kinds.items()}
  results = {"num": args.num, "seed": _SEED} | table(groups, totals)
  rows = [
    [f"{measure} < {bound}", *(f"{share:.3f}" for share in shares.values())]
    for measure in _MEASURES
    for bound, shares in results[measure].items()
  ]
  head = ["dropped of", *(name for name, some in groups.items() if some)]
  print(totals, results["dropped_by_other_rules"])
  print(common.table(head, rows))
  print(common.write("rules", results))
  write_page()


if __name__ == "__main__":
  main()
