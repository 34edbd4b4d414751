"""One PTL step of the full ViT-B/16 here and in PyTorch, side by side.

    python benchmarks/train_step.py [--model mini] [--rounds 7] [--no_compile]

Forward, backward and Adam update at the paper's recipe (256 x 128 pictures, the
paper's number of identities, random weights): 64 pictures in bfloat16 on a
GPU, 4 in float32 on a CPU. Pictures come as uint8 and are normalised within
the step, which returns the loss and the gradient norm, since a run logs both;
augmentation is left out on both sides. PyTorch reads prompts at
CLIP's 77 tokens, as CLIP-ReID does, and at their own length, which gives the
same numbers; this project always does the latter.

Both sides start from the same weights, and before anything is timed the loss
and the gradient norm of the first steps are compared in float32: a benchmark
of different mathematics would be worthless. They have a process each and take
turns. `cpu s` is processor time: where it is far below seconds times cores,
other work had its share of the machine. Where PyTorch cannot run, on a GPU that
it was not built for, this project's step is measured alone.
"""

import argparse
from collections.abc import Iterator
import contextlib
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import common
import flops
import jax
import ptl
import remote

_RTOL = 1e-4  # Of the comparison: float32 sums in another order.
_TEXTS = ("prompt's length", "77 tokens")
_COMPILED = "compiled"


@contextlib.contextmanager
def _sides(
  setting: ptl.Setting, notes: list[str]
) -> Iterator[tuple[remote.Remote, remote.Remote | None]]:
  """Gives both sides, with the same weights; None where PyTorch cannot run."""
  with contextlib.ExitStack() as stack:
    scratch = stack.enter_context(tempfile.TemporaryDirectory())
    folder = str(pathlib.Path(scratch) / "clip")
    ours = remote.Remote("ptl:Side", folder, setting)
    stack.enter_context(contextlib.closing(ours))
    theirs, given = None, (folder, ours.new_modules(), setting.batch(), setting)
    try:
      theirs = remote.Remote("torch_ptl:Side", *given)
      stack.enter_context(contextlib.closing(theirs))
    except remote.Failed as error:
      note = f"torch: {error}"
      print(note, flush=True)
      if note not in notes:
        notes.append(note)
    yield ours, theirs


def _check(ours: Any, theirs: Any) -> list[dict[str, Any]]:
  """Compares both sides.

  Raises:
    SystemExit: they do not compute the same.
  """
  rows = ptl.compare(ours, theirs, _TEXTS)
  for row in rows:
    print(
      f"float32, {row['variant']}: loss %.6f | %.6f, gradient norm %.5f | %.5f"
      % (*row["loss"], *row["grad_norm"]),
      flush=True,
    )
  worst = max(row["difference"] for row in rows)
  if not worst <= _RTOL:
    sys.exit(f"the two sides differ by {worst:.1e}: nothing is measured")
  return rows


def _measure(
  ours: Any, theirs: Any | None, *, rounds: int, steps: int, compiled: bool
) -> tuple[dict[str, dict[str, Any]], list[str]]:
  """Times all variants in turns.

  Returns:
    ({variant: {"times", "cpu", "first"}} in seconds, notes on what failed).
  """
  sides: dict[str, Any] = {"ours": ours}
  if theirs is not None:
    sides |= {f"torch, {text}": theirs for text in _TEXTS}
  if compiled and theirs is not None:
    sides |= {f"torch {_COMPILED}, {text}": theirs for text in _TEXTS}
  found, notes = {}, []
  for name, side in sides.items():
    try:
      found[name] = {"first": side.prepare(name), "times": [], "cpu": []}
    except remote.Failed as error:
      if side is ours:
        raise
      notes.append(f"{name}: {error}")
  for _ in range(rounds):
    for name, row in found.items():
      seconds, cpu = sides[name].time(name, steps)
      row["times"].append(seconds)
      row["cpu"].append(cpu)
  return found, notes


def _report(
  found: dict[str, dict[str, Any]],
  setting: ptl.Setting,
  *,
  needed: float,
  peak: float | None,
) -> dict[str, dict[str, Any]]:
  """Returns {variant: the numbers of its row}."""
  report = {}
  for name, row in found.items():
    median = statistics.median(row["times"])
    report[name] = {
      "median_s": median,
      "min_s": min(row["times"]),
      "times_s": row["times"],
      "cpu_s": statistics.median(row["cpu"]),
      "images_per_s": setting.batch_size / median,
      "share_of_peak": needed / min(row["times"]) / peak if peak else None,
      "first_call_s": row["first"],
    }
  return report


def _ratios(report: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """Returns how many times faster ours is than the better PyTorch variant."""
  torch = {name: row for name, row in report.items() if name != "ours"}
  if not torch:
    return {}
  best = min(torch, key=lambda name: torch[name]["median_s"])
  ours, theirs = report["ours"], torch[best]
  pairs = zip(theirs["times_s"], ours["times_s"], strict=True)
  return {
    "better_pytorch": best,
    # Of each round, whose two steps saw about the same machine.
    "times_faster": statistics.median(a / b for a, b in pairs),
    "times_faster_by_min": theirs["min_s"] / ours["min_s"],
    "times_faster_by_cpu_time": theirs["cpu_s"] / ours["cpu_s"],
  }


def _run(args: argparse.Namespace, *, gpu: bool) -> dict[str, Any]:
  """Checks and measures one model."""
  setting = ptl.settings(gpu=gpu)[args.model]
  parts, notes = flops.ptl_step(setting), []
  with contextlib.ExitStack() as stack:
    ours, theirs = stack.enter_context(_sides(setting, notes))
    checks = _check(ours, theirs) if theirs is not None else []
    if gpu:
      # The float32 steps would count as the peak of memory.
      stack.close()
      ours, theirs = stack.enter_context(_sides(setting, notes))
    device = theirs.device_name() if theirs is not None else None
    found, failed = _measure(
      ours,
      theirs,
      rounds=args.rounds,
      steps=args.steps or (10 if gpu else 1),
      compiled=not args.no_compile,
    )
    sides = {"ours": ours, "torch": theirs}
    sides = {name: side for name, side in sides.items() if side is not None}
    memory = lambda x: x.device_memory() if gpu else x.host_memory()
    peak_memory = {name: memory(side) for name, side in sides.items()}
    if gpu:
      peak = flops.bfloat16_peak(jax.devices()[0].device_kind)
    else:
      peak = max(side.matmul_flops() for side in sides.values())
  report = _report(found, setting, needed=sum(parts.values()), peak=peak)
  # PyTorch cannot be told apart by variant: they share one process.
  return {
    "model": args.model,
    "batch_size": setting.batch_size,
    "dtype": "bfloat16" if gpu else "float32",
    "torch_device": device,
    "threads": os.cpu_count(),
    "largest_difference": max(
      (row["difference"] for row in checks), default=None
    ),
    "flops": parts,
    "peak_flops_per_s": peak,
    "peak_memory_bytes": peak_memory,
    "variants": report,
    **_ratios(report),
    "notes": notes + failed,
  }


def _print(results: dict[str, Any]) -> None:
  rows = [
    [
      name,
      row["median_s"] * 1e3,
      row["min_s"] * 1e3,
      row["cpu_s"],
      row["images_per_s"],
      row["share_of_peak"] if row["share_of_peak"] is not None else "unknown",
      row["first_call_s"],
    ]
    for name, row in results["variants"].items()
  ]
  header = ["", "ms", "min ms", "cpu s", "images/s", "of peak", "compile s"]
  print()
  print(common.table(header, rows))
  memory = results["peak_memory_bytes"]
  if "times_faster" in results:
    print(
      f"\n{results['times_faster']:.2f} times the speed of"
      f" {results['better_pytorch']} (minima"
      f" {results['times_faster_by_min']:.2f}, processor time"
      f" {results['times_faster_by_cpu_time']:.2f})"
    )
  print("memory", " | ".join(f"{x / 1e9:.2f} GB" for x in memory.values()))
  for note in results["notes"]:
    print(note)


def main() -> None:
  """Measures, prints and writes results/train_step-*.json."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  models = list(ptl.settings(gpu=False))
  parser.add_argument("--model", choices=models, default=models[0])
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--steps", type=int, help="in a row, of each round")
  parser.add_argument(
    "--no_compile", action="store_true", help="leave torch.compile out"
  )
  args = parser.parse_args()
  # Read by the processes that are started below: both shall fit on a device.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  results = _run(args, gpu=jax.default_backend() == "gpu")
  _print(results)
  name = "train_step"
  if args.model != models[0]:
    name += f"_{args.model}"
  print(common.write(name, results))


if __name__ == "__main__":
  main()
