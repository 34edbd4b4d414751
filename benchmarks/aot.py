"""Compiles for an NVIDIA H200 what a GPU user meets; no GPU is needed.

    make gpu-check
    python benchmarks/aot.py [--programs ptl,psd] [--list] [--again] [--write]
        [--processes 2]

XLA and the CUDA plugin compile ahead of time for the device that
benchmarks/h200_target.txt describes. Of each program of aot_programs.py it is
asserted that it compiles, that all that is donated is written in place, that
its memory stays below a bound, that hardly any product is of float32, how many
attentions run in cuDNN, and of some how many bytes they move. What breaks an
assertion is said in one line, and the exit code is 1.

As many programs compile at once as there are processors (--processes): XLA
compiles a program on one. Results are kept in benchmarks/results as each
program ends. A program is not compiled again while it lowers to the same text
for the same target and versions and its bytes are counted by the same code;
--again compiles it all the same. --write puts the table into
docs/gpu.md, of what is kept.

Nothing is run. Memory is what XLA assigned; FLOP and bytes are counted from the
HLO (hlo_cost.py) and are estimates, as are the milliseconds that they would
take at the peak of an H200. Kernels are not autotuned without a device.
"""

import argparse
from collections.abc import Iterator
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import sys
import time
from typing import Any

if __name__ == "__main__":
  # Before JAX is imported: a device that is there is not needed.
  os.environ["JAX_PLATFORMS"] = "cpu"

import aot_programs
import common
import flops
import hlo_cost
import jax
from jax.experimental import topologies

from dppp_jax import devices, errors

_ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGET = _ROOT / "benchmarks" / "h200_target.txt"
RESULTS = _ROOT / "benchmarks" / "results" / "aot-nvidia_h200.json"
PAGE = _ROOT / "docs" / "gpu.md"
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"
_CARDS = (24, 80)  # GB.
_USABLE = 0.92  # Of a card, for XLA.
_BANDWIDTH = 4.8e12  # Bytes a second, NVIDIA's data sheet of the H200.
_PACKAGES = (
  "jax", "jaxlib", "jax-cuda12-plugin", "nvidia-cudnn-cu12",
  "nvidia-cublas-cu12", "nvidia-cuda-nvcc-cu12", "flax", "optax",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def topology() -> Any:
  """Returns the H200 that there is not.

  Raises:
    errors.UserError: JAX's CUDA plugin is not installed.
  """
  try:
    return topologies.get_topology_desc(
      platform="cuda", topology="1x1x1", target_config=TARGET.read_text()
    )
  except Exception as error:  # Of PJRT, in many ways.
    line = str(error).splitlines()[0][:120]
    raise errors.UserError(
      f"JAX cannot compile for CUDA here ({line}): run make gpu-check, which"
      " installs jax[cuda12] in .venv-gpu"
    ) from error


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]


def compile_program(
  program: aot_programs.Program,
  device: jax.Device,
  before: dict[str, Any] | None = None,
  *,
  hlo: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Compiles a program and returns its facts.

  Args:
    program: which.
    device: of `topology`.
    before: facts of an earlier time; they are returned where the program
      lowers to the same text.
    hlo: folder for the HLO text, or None.
  """
  sharding = jax.sharding.SingleDeviceSharding(device)
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  begin = time.perf_counter()
  job = program.build(False)
  with devices.traced_for("gpu"):
    lowered = job.trace(put).lower()
  counter = pathlib.Path(hlo_cost.__file__).read_bytes()
  digests = {
    "lowered": _digest(lowered.as_text().encode()),
    "counted_by": _digest(counter),
  }
  if before is not None and digests.items() <= before.items():
    return {**before, "commit": common.commit()}
  traced, cpu = time.perf_counter(), time.process_time()
  compiled = lowered.compile(compiler_options=dict(program.options) or None)
  ended = time.perf_counter()
  text = compiled.as_text()
  if hlo is not None:
    hlo.mkdir(parents=True, exist_ok=True)
    (hlo / f"{program.name}.hlo").write_text(text)
  cost, memory = hlo_cost.count(text), compiled.memory_analysis()
  sizes = {
    name: getattr(memory, f"{name}_size_in_bytes")
    for name in ("argument", "output", "temp", "alias")
  }
  return {
    **digests,
    "commit": common.commit(),
    "donated": job.donated,
    **sizes,
    "peak": sum(sizes.values()) - 2 * sizes["alias"],
    "flops": cost.flops,
    "bytes": cost.nbytes,
    "bytes_left_out": cost.left_out,
    "kernels": cost.kernels,
    "unknown_loops": cost.unknown_loops,
    "wide_share": cost.wide_share,
    "trace_s": round(traced - begin, 1),
    "compile_s": round(ended - traced, 1),
    "compile_cpu_s": round(time.process_time() - cpu, 1),
  }


def violations(
  program: aot_programs.Program, facts: dict[str, Any]
) -> list[str]:
  """Returns what a program's facts break, in one line each."""
  if "error" in facts:
    return [f"{program.name}: does not compile: {facts['error']}"]
  found = []
  if facts["alias"] < facts["donated"]:
    found.append(
      f"{facts['donated'] / 1e9:.3f} GB are donated, and"
      f" {facts['alias'] / 1e9:.3f} written in place"
    )
  if facts["peak"] > 1e9 * program.peak:
    found.append(
      f"needs {facts['peak'] / 1e9:.2f} GB, its bound is {program.peak:g}"
    )
  if program.wide is not None and facts["wide_share"] > program.wide:
    found.append(
      f"{facts['wide_share']:.2%} of its FLOP are float32, at most"
      f" {program.wide:.2%} may be"
    )
  if facts["kernels"]["attention"] != program.attentions:
    found.append(
      f"{facts['kernels']['attention']} attentions in cuDNN, expected are"
      f" {program.attentions}"
    )
  if program.moved is not None and facts["bytes"] > 1e9 * program.moved:
    found.append(
      f"moves {facts['bytes'] / 1e9:.2f} GB, its bound is {program.moved:g}"
    )
  return [f"{program.name}: {line}" for line in found]


def chosen(names: str) -> list[aot_programs.Program]:
  """Returns the programs whose names begin with one of some, or all.

  Raises:
    errors.UserError: no program is called so.
  """
  programs = aot_programs.programs()
  if not names:
    return list(programs)
  starts = [name for name in names.split(",") if name]
  for start in starts:
    if not any(program.name.startswith(start) for program in programs):
      raise errors.UserError(
        f"--programs {start}: no such program; --list names them"
      )
  return [p for p in programs if p.name.startswith(tuple(starts))]


def read() -> dict[str, Any]:
  """Returns what is kept: {"benchmark", "environment", "results"}."""
  if RESULTS.is_file():
    return json.loads(RESULTS.read_text())
  return {"benchmark": "aot", "environment": {}, "results": {}}


def environment() -> dict[str, Any]:
  """Returns what the results depend on, and no machine's name."""
  return {
    "target": re.search(
      r'device_description_str: "(.*)"', TARGET.read_text()
    ).group(1),
    "target_sha256": _digest(TARGET.read_bytes()),
    "packages": common.versions(_PACKAGES),
  }


def keep(name: str, facts: dict[str, Any]) -> None:
  """Writes a program's facts beside those of the others.

  A reader sees the old file or the new one. What was compiled by other versions
  is dropped.
  """
  kept, where = read(), environment()
  results = kept["results"] if kept["environment"] == where else {}
  results = {**results, name: facts}
  order = [p.name for p in aot_programs.programs() if p.name in results]
  kept = {
    "benchmark": "aot",
    "environment": where,
    "results": {name: results[name] for name in order},
  }
  scratch = RESULTS.with_name(f".{RESULTS.name}.tmp")
  scratch.write_text(json.dumps(kept, indent=2) + "\n")
  scratch.replace(RESULTS)


def _facts(name: str, before: dict[str, Any] | None, hlo: str) -> Any:
  """Returns a program's facts and the seconds that they took.

  One program shall not keep the others back: an error is a fact, too.
  """
  (program,) = [p for p in aot_programs.programs() if p.name == name]
  begin = time.perf_counter()
  folder = pathlib.Path(hlo) if hlo else None
  try:
    device = topology().devices[0]
    facts = compile_program(program, device, before, hlo=folder)
  except Exception as error:
    lines = str(error).splitlines() or [""]
    facts = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
  jax.clear_caches()
  return facts, time.perf_counter() - begin


def _compiled(
  jobs: list[tuple[str, dict[str, Any] | None, str]], processes: int
) -> Iterator[tuple[str, Any]]:
  """Yields each job's name and `_facts` as it ends."""
  if processes == 1:
    yield from ((job[0], _facts(*job)) for job in jobs)
    return
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
    names = {pool.submit(_facts, *job): job[0] for job in jobs}
    try:
      for future in concurrent.futures.as_completed(names):
        yield names[future], future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
      raise errors.UserError(
        "a process that compiles was killed: is there memory? Go on with"
        " --processes 1; what has ended is kept"
      ) from error
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def run(args: argparse.Namespace) -> list[str]:
  """Compiles what was chosen; returns what is wrong, in one line each."""
  programs, wrong = {p.name: p for p in chosen(args.programs)}, []
  topology()  # Or one line says what is missing.
  kept = read()
  same = kept["environment"] == environment()
  known = kept["results"] if same and not args.again else {}
  # Those that take longest begin first; how long new ones take, nobody knows.
  seconds_before = lambda name: (
    kept["results"].get(name, {}).get("compile_s", 1e9)
  )
  order = sorted(programs, key=seconds_before, reverse=True)
  jobs = [(name, known.get(name), args.hlo) for name in order]
  print(f"{len(jobs)} programs, {args.processes} at a time", flush=True)
  results = _compiled(jobs, args.processes)
  for number, (name, (facts, seconds)) in enumerate(results, 1):
    keep(name, facts)
    broken = violations(programs[name], facts)
    wrong += broken
    what = "WRONG" if broken else "good"
    before = known.get(name)
    if before and facts.get("compile_s") == before.get("compile_s"):
      what += ", as before"
    peak = f", {facts['peak'] / 1e9:.2f} GB" if "peak" in facts else ""
    label = f"[{number}/{len(jobs)}] {name}: {programs[name].about}"
    print(f"{label}: {what}{peak}, {seconds:.0f} s", flush=True)
  return wrong


def table(kept: dict[str, Any]) -> str:
  """Returns the Markdown of all programs that are kept."""
  peak = flops.bfloat16_peak(kept["environment"]["target"])
  header = [
    "program", "what", "arguments", "temporary", "peak (bound), GB", "TFLOP",
    "GB moved (bound)", "ms by FLOP", "ms by bytes", "attentions",
    "convolutions", "products", "other kernels", "compile cpu s",
  ]  # fmt: skip
  rows = []
  for program in aot_programs.programs():
    facts = kept["results"].get(program.name)
    if facts is None:
      continue
    if "error" in facts:
      said = f"does not compile: {facts['error'][:100]}"
      rows.append([f"`{program.name}`", said, *[""] * (len(header) - 2)])
      continue
    total, kernels = sum(facts["flops"].values()), facts["kernels"]
    # Of float32 a GPU makes TF32 where it may, at half the rate.
    wide = facts["wide_share"] * total
    gigabytes = lambda key, facts=facts: f"{facts[key] / 1e9:.2f}"
    unit = "" if program.unit == "a call" else f", {program.unit}"
    unit += "; without Triton's products" if program.options else ""
    bound = "" if program.moved is None else f" ({program.moved:g})"
    rows.append(
      [
        f"`{program.name}`",
        f"{program.about}{unit}",
        gigabytes("argument"),
        gigabytes("temp"),
        f"{gigabytes('peak')} ({program.peak:g})",
        f"{total / 1e12:.3g}",
        f"{facts['bytes'] / 1e9:.3g}{bound}",
        f"{1e3 * (total + wide) / peak:.2g}",
        f"{1e3 * facts['bytes'] / _BANDWIDTH:.2g}",
        *(str(kernels[kind]) for kind in ("attention", "convolution")),
        str(kernels["product"]),
        str(kernels["fusion"] + kernels["other"]),
        f"{facts['compile_cpu_s']:.0f}",
      ]
    )
  return common.markdown(header, rows)


def fits(kept: dict[str, Any]) -> str:
  """Returns the Markdown of what cards of two sizes can run, by memory.

  A step of training needs its state whatever the batch is, and temporaries in
  proportion to it. Generation holds all its networks; a batch is denoised while
  the one before is decoded and matted, so that temporaries of all three count.
  """
  results = kept["results"]
  sizes = {card: card * _USABLE for card in _CARDS}
  rows = []
  for name in ("ptl_device", "ptl_host", "psd_device", "psd_host"):
    facts = results.get(name, {})
    if "peak" not in facts:
      continue
    of_one = facts["temp"] / 64
    state = facts["peak"] - facts["temp"]
    texts = []
    for usable in sizes.values():
      most = int((1e9 * usable - state) / of_one) // 8 * 8
      texts.append(f"{min(most, 1024)} pictures" if most >= 8 else "no")
    rows.append([f"`{name}`", f"{facts['peak'] / 1e9:.1f} GB at 64", *texts])
  for model in ("canvas", "sdxl"):
    for dtype in ("f32", "bf16"):
      needs = _generation(results, model, f"matting_{dtype}")
      if not needs:
        continue
      texts = []
      for usable in sizes.values():
        good = [b for b, need in needs.items() if need <= 1e9 * usable]
        texts.append(f"batch {max(good)}" if good else "no")
      each = ", ".join(f"{x / 1e9:.1f} at {b}" for b, x in needs.items())
      what = f"`{model}`, matting in {dtype}"
      rows.append([what, f"{each} GB", *texts])
  header = ["what", "needs", *(f"{card} GB" for card in _CARDS)]
  return common.markdown(header, rows)


def _generation(
  results: dict[str, Any], model: str, matting: str
) -> dict[int, float]:
  """Returns {batch: bytes} of all that generation holds at once."""
  found = {}
  for batch in (1, 4, 8):
    names = [f"{model}_denoise_{batch}", f"{model}_decode_{batch}"]
    names += [f"canvas_encode_{batch}", matting]
    facts = [results.get(name, {}) for name in names]
    if all("peak" in one for one in facts):
      held = sum(one["argument"] for one in facts)
      waits = [one["temp"] for one in facts if one is not facts[2]]
      found[batch] = held + sum(waits)
  return found


def section(kept: dict[str, Any]) -> str:
  """Returns the part of docs/gpu.md that this script writes."""
  where, results = kept["environment"], kept["results"]
  versions = ", ".join(f"{k} {v}" for k, v in where["packages"].items())
  commits = sorted({x["commit"] for x in results.values() if "commit" in x})
  note = (
    f"Compiled for {where['target']} with {versions}; commit"
    f" {', '.join(commits)}. All figures are estimates: nothing was run.\n"
  )
  about = (
    "What fits, with"
    f" `XLA_PYTHON_CLIENT_MEM_FRACTION={_USABLE:g}` (JAX takes 0.75 of a card"
    " otherwise). Training: the largest batch, at most 1024. Generation: the"
    " largest of batches 1, 4 and 8.\n"
  )
  names = [f"`{p.name}`" for p in aot_programs.programs()]
  missing = [name for name in names if name.strip("`") not in results]
  lacks = f"Not compiled yet: {', '.join(missing)}.\n" if missing else ""
  parts = [_BEGIN, note, table(kept), lacks, about, fits(kept)]
  parts = [part for part in parts if part]
  return "\n\n".join(part.strip("\n") for part in parts) + f"\n\n{_END}"


def page(text: str, kept: dict[str, Any]) -> str:
  """Returns docs/gpu.md with the table of what is kept.

  Args:
    text: of the page as it is.
    kept: of `read`.
  """
  before, rest = text.split(_BEGIN)
  return before + section(kept) + rest.split(_END)[1]


def main() -> int:
  """Compiles, or writes the page; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--programs", default="", help="beginnings of names")
  parser.add_argument("--list", action="store_true", help="name all programs")
  parser.add_argument("--again", action="store_true", help="compile anew")
  parser.add_argument("--write", action="store_true", help="write docs/gpu.md")
  parser.add_argument(
    "--processes",
    type=int,
    default=min(os.cpu_count() or 1, 4),
    help="programs at a time; each needs some 5 GB of memory",
  )
  parser.add_argument("--hlo", default="", help="folder for the HLO texts")
  args = parser.parse_args()
  if args.processes < 1:
    parser.error(f"--processes {args.processes}: give 1 or more")
  if args.list:
    for program in aot_programs.programs():
      print(f"{program.name:24} {program.about}")
    return 0
  if args.write:
    PAGE.write_text(page(PAGE.read_text(), read()))
    print(PAGE)
    return 0
  try:
    wrong = run(args)
  except errors.UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  for line in wrong:
    print(line, file=sys.stderr)
  return 1 if wrong else 0


if __name__ == "__main__":
  sys.exit(main())
