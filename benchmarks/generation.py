"""Canvases of SDXL here and in PyTorch diffusers, side by side.

    python benchmarks/generation.py [--model canvas|sdxl|mini] [--mini]
        [--batches 1,4,8] [--limit 540] [--no_compile]

`canvas` is 896 x 1536 with two ControlNets, `sdxl` 1024 x 1024 without, both
with random weights in bfloat16 on a GPU, 30 steps with guidance. `mini`, and
all there is on a CPU, is the small system of assets/mini in float32 (of its
sizes with random weights where it is not shipped): there both sides are first
given the same noise, and must draw the same picture.

A draw is everything from prompts to pictures on the host. Both sides have a
process each and take turns; `cpu s` is processor time, which other work on the
machine disturbs less. Compiled programs are kept in --cache: `cold` is the time
from the start of a process to its first picture with an empty one (--cold
empties it), `warm` with a full one.

What fails, or would begin after --limit seconds, becomes a note; what is
measured is written at once, and joins what an earlier run of the same commit
measured. A sweep may so be made in several commands of bounded time:

    for n in 1 4 8; do
      timeout 600 python benchmarks/generation.py --model canvas --batches $n
    done
"""

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from typing import Any

import common
import flops
import generation_setting
import jax
import numpy as np
import remote
import traced_flops

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_OURS = "ours"
_EAGER, _COMPILED = "torch eager", "torch compiled"
_VARIANT = {_OURS: "", _EAGER: "eager", _COMPILED: "compiled"}
_MOST = 2  # Grey levels that pictures of both sides may differ by.


class _Notes(list):
  """What went wrong, in one line each; printed as it happens."""

  def add(self, text: str) -> None:
    print(text, flush=True)
    self.append(text)

  @contextlib.contextmanager
  def instead(self, what: str) -> Any:
    """Turns a failure into a note."""
    try:
      yield
    except Exception as error:
      lines = str(error).splitlines() or [""]
      self.add(f"{what}: {type(error).__name__}: {lines[0][:200]}")


def _start(
  side: str, setting: Any, args: argparse.Namespace, cache: pathlib.Path
) -> remote.Remote:
  if side == _OURS:
    largest = max(_sizes(args))
    return remote.Remote("flax_generation:Side", setting, str(cache), largest)
  return remote.Remote("torch_generation:Side", setting, args.mode)


def _sizes(args: argparse.Namespace) -> list[int]:
  return [int(batch) for batch in args.batches.split(",")]


def _mini(setting: Any, scratch: str) -> Any:
  """Returns the setting with folders: the shipped ones, or random weights."""
  found = generation_setting.shipped()
  if found is None:
    writer = remote.Remote("torch_generation:Writer")
    with contextlib.closing(writer):
      found = writer.write(scratch, generation_setting.mini_networks())
  return dataclasses.replace(setting, folder=found[0], controlnets=found[1])


def _check(ours: Any, theirs: Any) -> dict[str, float]:
  """Draws the same picture on both sides.

  Raises:
    SystemExit: they differ.
  """
  a = ours.draw("", 1).astype(np.int32)
  b = theirs.draw("eager", 1, ours.noise(1)).astype(np.int32)
  worst = int(np.abs(a - b).max())
  print(
    f"the same picture: {worst} of 255 at most, spread {a.std():.1f}",
    flush=True,
  )
  if worst > _MOST or a.std() < 1:
    sys.exit(f"the two sides differ by {worst} of 255: nothing is measured")
  return {"largest_difference": worst, "spread": float(a.std())}


def _first(
  setting: Any,
  args: argparse.Namespace,
  cache: pathlib.Path,
  batch: int,
  notes: _Notes,
) -> dict[str, float]:
  """Returns seconds from the start of our process to its first picture."""
  if args.cold:
    shutil.rmtree(cache, ignore_errors=True)
  names = ["warm"] if cache.exists() else ["cold", "warm"]
  found: dict[str, float] = {"batch": batch}
  for name in names:
    with notes.instead(f"first canvas, {name}"):
      begin = time.perf_counter()
      side = _start(_OURS, setting, args, cache)
      with contextlib.closing(side):
        found[f"{name}_ready_s"] = time.perf_counter() - begin
        side.draw("", batch)
        found[f"{name}_s"] = time.perf_counter() - begin
        # The cold one holds the compiler's own memory too.
        memory = side.memory()
        found |= {f"{name}_{k}_bytes": v for k, v in memory.items()}
  return found


def _measure(
  sides: dict[str, Any],
  batch: int,
  args: argparse.Namespace,
  until: float,
  notes: _Notes,
) -> dict[str, dict[str, Any]]:
  """Times all variants in turns at one batch size."""
  found: dict[str, dict[str, Any]] = {}
  for name, side in sides.items():
    if time.perf_counter() > until:
      notes.add(f"batch {batch}, {name}: left out, --limit is over")
      continue
    with notes.instead(f"batch {batch}, {name}"):
      seconds, _ = side.time(_VARIANT[name], batch)
      found[name] = {"first_s": seconds, "times_s": [], "cpus_s": []}
      # Of compiling: PyTorch's works in processes of its own, ours in this one.
      found[name]["first_host_bytes"] = side.forget_peak()
  for _ in range(args.rounds):
    for name in list(found):
      row = found[name]
      if row["times_s"] and time.perf_counter() > until:
        continue
      with notes.instead(f"batch {batch}, {name}"):
        seconds, cpu = sides[name].time(_VARIANT[name], batch)
        row["times_s"].append(seconds / batch)
        row["cpus_s"].append(cpu / batch)
  for name in [name for name, row in found.items() if not row["times_s"]]:
    del found[name]
  for row in found.values():
    row["s_per_canvas"] = min(row["times_s"])
    row["median_s_per_canvas"] = statistics.median(row["times_s"])
    row["cpu_s_per_canvas"] = min(row.pop("cpus_s"))
    row["images_per_s"] = 1 / row["s_per_canvas"]
  return found


def _ratios(batches: dict[str, Any]) -> dict[str, Any]:
  """Returns how many times faster ours is than the best of PyTorch's."""
  rows = [
    (row["s_per_canvas"], row["cpu_s_per_canvas"], name, batch)
    for batch, found in batches.items()
    for name, row in found.items()
  ]
  mine = [row for row in rows if row[2] == _OURS]
  theirs = [row for row in rows if row[2] != _OURS]
  if not mine or not theirs:
    return {}
  a, b = min(mine), min(theirs)
  return {
    "best_ours": f"batch {a[3]}",
    "best_pytorch": f"{b[2]}, batch {b[3]}",
    "times_faster": b[0] / a[0],
    "times_faster_by_cpu_time": min(row[1] for row in theirs)
    / min(row[1] for row in mine),
  }


def _peak(setting: Any, sides: dict[str, Any]) -> float | None:
  """Returns FLOP/s: the data sheet's, or a CPU's at a large product."""
  if setting.gpu:
    return flops.bfloat16_peak(jax.devices()[0].device_kind)
  return max(side.matmul_flops() for side in sides.values())


def _matting(ours: Any, batches: dict[str, Any]) -> dict[str, float]:
  """Returns what U2-Net takes for a canvas, and which share that is."""
  found = ours.matting()
  rows = [found[_OURS] for found in batches.values() if _OURS in found]
  fastest = min(rows, key=lambda row: row["s_per_canvas"])
  found["share_of_canvas"] = found["s"] / fastest["s_per_canvas"]
  return found


def run(
  setting: Any,
  args: argparse.Namespace,
  notes: _Notes,
  until: float,
  save: Callable[[dict[str, Any]], Any],
) -> None:
  """Checks and measures one model, and saves what is known ever again."""
  results: dict[str, Any] = {
    "model": setting.name,
    "size": list(setting.size),
    "steps": setting.steps,
    "seed": generation_setting.SEED,
    "dtype": "bfloat16" if setting.gpu else "float32",
    "threads": len(os.sched_getaffinity(0)),
    "batches": {},
    "notes": notes,
  }
  with contextlib.ExitStack() as stack:
    scratch = stack.enter_context(tempfile.TemporaryDirectory())
    if setting.name == "mini":
      shipped = generation_setting.shipped() is not None
      results["weights"] = "assets/mini" if shipped else "random"
      setting = _mini(setting, scratch)
    results["controlnets"] = len(setting.controlnets)
    cache = pathlib.Path(args.cache) / setting.name
    batches = _sizes(args)
    if not args.no_first:
      results["first_canvas"] = _first(setting, args, cache, batches[0], notes)
      save(results)
    close = lambda side: stack.enter_context(contextlib.closing(side))
    sides: dict[str, Any] = {}
    ours = sides[_OURS] = close(_start(_OURS, setting, args, cache))
    parts = ours.flops()
    needed = traced_flops.canvas(
      parts, steps=setting.steps, controlnets=len(setting.controlnets)
    )
    results["flops"] = parts | {"canvas": needed}
    with notes.instead("torch"):
      sides[_EAGER] = theirs = close(_start(_EAGER, setting, args, cache))
      if setting.folder and not setting.gpu:
        results["check"] = _check(ours, theirs)
      if not args.no_compile:
        sides[_COMPILED] = theirs
    results["peak_flops_per_s"] = peak = _peak(setting, sides)
    for batch in batches:
      found = _measure(sides, batch, args, until, notes)
      for row in found.values():
        share = needed / row["s_per_canvas"] / peak if peak else None
        row["share_of_peak"] = share
      results["batches"][str(batch)] = found
      for name in (_OURS, _EAGER):
        with notes.instead(f"memory of {name}"):
          memory = results.setdefault("peak_memory_bytes", {})
          memory[name.split()[0]] = sides[name].memory()
      save(results)
    with notes.instead("matting"):
      results["matting"] = _matting(ours, results["batches"])
    save(results)


def _joined(title: str, results: dict[str, Any]) -> dict[str, Any]:
  """Adds what an earlier run of the same commit found at other batch sizes."""
  earlier = common.read(title)
  same = ("model", "size", "steps", "controlnets", "threads")
  batches = dict(results["batches"])
  if (
    earlier is not None
    and earlier["environment"]["commit"] == common.environment()["commit"]
    and all(earlier["results"].get(k) == results.get(k) for k in same)
  ):
    results = earlier["results"] | results
    batches = earlier["results"]["batches"] | batches
  # What the page of all results shows; the rest of it is for programs.
  results = results | {"batches": batches, "table": _table(batches)}
  return results | _ratios(batches)


def _table(batches: dict[str, Any]) -> list[list[Any]]:
  """Returns a header and a row for each batch size and variant."""
  columns = {
    "s/canvas": "s_per_canvas",
    "median": "median_s_per_canvas",
    "cpu s": "cpu_s_per_canvas",
    "canvases/s": "images_per_s",
    "of peak": "share_of_peak",
    "first s": "first_s",
  }
  show = lambda value: "-" if value is None else f"{value:.3g}"
  rows = [
    [f"{name}, batch {batch}", *(show(row[key]) for key in columns.values())]
    for batch, found in batches.items()
    for name, row in found.items()
  ]
  return [["", *columns], *rows]


def _print(results: dict[str, Any]) -> None:
  header, *rows = results["table"]
  print()
  print(common.table(header, rows))
  for name in ("first_canvas", "matting", "peak_memory_bytes", "check"):
    print(f"{name}: {results.get(name)}")
  if "times_faster" in results:
    print(
      f"{results['times_faster']:.2f} times the speed of"
      f" {results['best_pytorch']} (processor time"
      f" {results['times_faster_by_cpu_time']:.2f})"
    )


def main() -> None:
  """Measures, prints and writes results/generation*-*.json."""
  # Read by this process and those that it starts: all shall fit on a device.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  gpu = jax.default_backend() == "gpu"
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  models = list(generation_setting.settings(gpu=gpu))
  parser.add_argument("--model", choices=models, default=models[0])
  parser.add_argument("--mini", action="store_true", help="--model mini")
  parser.add_argument("--batches", default="1,4,8" if gpu else "1,4")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, help="of the sampler")
  parser.add_argument(
    "--limit", type=float, default=540, help="seconds; 0 for no end"
  )
  parser.add_argument("--cache", default=str(_ROOT / "runs" / "xla_cache"))
  parser.add_argument("--mode", default="", help="of torch.compile")
  parser.add_argument("--stack_from", type=int, default=0)
  parser.add_argument(
    "--no_compile", action="store_true", help="leave torch.compile out"
  )
  parser.add_argument(
    "--cold", action="store_true", help="empty the cache of programs first"
  )
  parser.add_argument(
    "--no_first", action="store_true", help="leave cold and warm starts out"
  )
  args = parser.parse_args()
  name = "mini" if args.mini else args.model
  setting = generation_setting.settings(gpu=gpu)[name]
  setting = dataclasses.replace(
    setting, stack_from=args.stack_from, steps=args.steps or setting.steps
  )
  os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(pathlib.Path(args.cache) / "inductor")
  )
  until = time.perf_counter() + (args.limit or float("inf"))
  title = "generation" if name == models[0] else f"generation_{name}"
  save = lambda results: common.write(title, _joined(title, results))
  run(setting, args, _Notes(), until, save)
  _print(common.read(title)["results"])
  print(common.path(title))


if __name__ == "__main__":
  main()
