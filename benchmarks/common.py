"""What every benchmark shares: the machine's name, timing, tables, JSON.

Benchmarks are run as `python benchmarks/x.py`, so that they say
`import common`; each prints a table and leaves benchmarks/results/x-*.json, or
leaves it in the folder that $BENCHMARK_RESULTS names.
"""

from collections.abc import Callable, Mapping, Sequence
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time
from typing import Any

import jax

_HERE = pathlib.Path(__file__).resolve().parent
_RESULTS = pathlib.Path(os.environ.get("BENCHMARK_RESULTS", _HERE / "results"))
# Arguments of git: the whole checkout but for what scripts write.
_CODE = ("--", ":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs")
_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "grain",
  "numpy",
  "opencv-python-headless",
  "pillow",
  "torch",
  "transformers",
  "diffusers",
)


def environment() -> dict[str, Any]:
  """Returns what a number depends on: machine, versions, commit, date.

  `load` is the system's load average of the last minute: a number taken beside
  other work is not the machine's own.
  """
  return {
    "cpu": _cpu_name(),
    "cpu_count": _cpu_count(),
    "memory_gib": _memory_gib(),
    "load": round(os.getloadavg()[0], 2),
    "device": _device(),
    "device_count": jax.device_count(),
    "system": platform.system(),
    "python": platform.python_version(),
    "packages": versions(_PACKAGES),
    "commit": commit(),
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
  }


def measure(
  fn: Callable[[], Any], *, warmup: int = 1, repeats: int = 5
) -> dict[str, float]:
  """Times a call, waiting for whatever arrays it returns.

  Args:
    fn: called without arguments; arrays in what it returns are waited for.
    warmup: calls that are not timed (compilation, caches).
    repeats: calls that are timed.

  Returns:
    {"min", "median"}: seconds of one call. The minimum is the figure that
    other work on the machine disturbs least; the median shows how much it did.
  """
  for _ in range(warmup):
    jax.block_until_ready(fn())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(fn())
    seconds.append(time.perf_counter() - start)
  return {"min": min(seconds), "median": statistics.median(seconds)}


def write(name: str, results: Mapping[str, Any]) -> pathlib.Path:
  """Writes results/{name}-{device}.json with the environment beside it.

  Args:
    name: of the benchmark, e.g. "input_pipeline".
    results: anything that JSON can hold; name the seed and the sizes in it.

  Returns:
    The path written.
  """
  found, place = environment(), path(name)
  place.parent.mkdir(parents=True, exist_ok=True)
  whole = {"benchmark": name, "environment": found, "results": dict(results)}
  place.write_text(json.dumps(whole, indent=2) + "\n")
  return place


def path(name: str) -> pathlib.Path:
  """Returns the file of a benchmark's results on this device."""
  slug = re.sub(r"[^a-z0-9]+", "-", _device().lower()).strip("-")
  return _RESULTS / f"{name}-{slug}.json"


def read(name: str) -> dict[str, Any] | None:
  """Returns what `write` wrote last, or None."""
  place = path(name)
  return json.loads(place.read_text()) if place.is_file() else None


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a plain text table, the first column left, the others right."""
  cells = [list(header), *([_show(x) for x in row] for row in rows)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  lines = [
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in cells
  ]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table of texts as Markdown."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def footnote(where: Mapping[str, Any]) -> str:
  """Returns what a page says of the machine: one line of `environment`."""
  return (
    f"{where['cpu']}, {where['cpu_count']} cores, {where['device']}; Python"
    f" {where['python']}, jax {where['packages']['jax']}; commit"
    f" {where['commit']}, {where['date']}.\n"
  )


def _show(value: Any) -> str:
  if not isinstance(value, float):
    return str(value)
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _device() -> str:
  device = jax.devices()[0]
  return device.device_kind if device.platform != "cpu" else "cpu"


def _cpu_name() -> str:
  try:
    found = re.search(
      r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text()
    )
  except OSError:
    found = None
  return found.group(1) if found else platform.processor() or "unknown"


def _cpu_count() -> int:
  # What this process may use, where the system can say so.
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _memory_gib() -> float:
  pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return round(pages / 2**30, 1)


def versions(packages: Sequence[str]) -> dict[str, str]:
  """Returns {package: version} of those that are installed."""
  found = {}
  for package in packages:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def commit() -> str:
  """Returns the short commit, with "+" where files differ from it.

  Not where results and pages do, which scripts write one after the other.
  """
  git = ["git", "-C", str(_HERE)]
  try:
    run = lambda *words: subprocess.run(
      [*git, *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    dirty = run("status", "--porcelain", "--untracked-files=no", *_CODE)
    return run("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
