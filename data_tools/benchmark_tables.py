"""Writes docs/benchmarks.md from benchmarks/results/*.json.

python data_tools/benchmark_tables.py [--check]
"""

from collections.abc import Iterator, Mapping
import json
from typing import Any

from absl import flags

from dppp_jax import cli

_HEAD = """# Benchmarks

Written by `python data_tools/benchmark_tables.py` from `benchmarks/results`.
Each file there comes from `python benchmarks/NAME.py`, which runs this project
and the alternative side by side in one run: ratios count, lone times depend on
the machine and on what else ran on it (`load` is the load average).
"""

# Results with a page of their own: docs/mini.md, docs/gpu.md, docs/rules.md.
_APART = ("mini_quality", "aot", "rules")


def define_flags():
  """Defines whether the page is written or compared."""
  flags.DEFINE_boolean("check", False, "Only say whether the page is current.")


def page() -> str:
  """Returns the page as Markdown."""
  parts = [_HEAD]
  for path in sorted((cli.ROOT / "benchmarks/results").glob("*.json")):
    if path.stem.startswith(_APART):
      continue
    values = json.loads(path.read_text())
    where = values["environment"]
    parts.append(f"\n## {values['benchmark']}, {where['device']}\n")
    packages = where["packages"]
    versions = f"jax {packages['jax']}, torch {packages.get('torch', 'none')}"
    parts.append(
      f"{where['cpu']}, {where['cpu_count']} cores, load {where['load']};"
      f" Python {where['python']}, {versions}; commit {where['commit']},"
      f" {where['date']}.\n"
    )
    results = values["results"]
    results.pop("batches", None)  # Every single run; the table sums them up.
    for rows in (results.pop("table", []), [["", ""], *flatten(results)]):
      rows[1:1] = [["---"] * len(rows[0])] if rows else []
      parts += [f"| {' | '.join(map(str, row))} |" for row in rows] + [""]
  return "\n".join(parts)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple]:
  """Yields (name, text) for every number of a nested result."""
  for key, value in values.items():
    name = f"{prefix}{key}"
    if isinstance(value, Mapping):
      yield from flatten(value, f"{name}, ")
    elif isinstance(value, float):
      yield name, f"{value:.4g}"
    elif isinstance(value, list) and any(isinstance(x, float) for x in value):
      spread = f"{min(value):.4g} to {max(value):.4g}"
      yield name, f"{spread} ({len(value)} in the file)"
    elif isinstance(value, list):
      yield name, " x ".join(map(str, value))
    else:
      yield name, value


def main(args) -> int:
  """Writes the page, or fails where it is out of date."""
  cli.write_page(
    cli.ROOT / "docs" / "benchmarks.md",
    page(),
    check=args.check,
    by="python data_tools/benchmark_tables.py",
  )
  return 0


if __name__ == "__main__":
  cli.run(main, define_flags=define_flags)
