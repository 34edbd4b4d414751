"""One self-contained report.html: tables, figures and words, nothing linked.

report.write(path, "Direct transfer", [
report.Section("Scores", report.table(header, rows)),
report.Section("CMC", report.figure(png_bytes, "All queries.")),
])
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import html
import json
import os
import pathlib
from typing import Any

from dppp_jax import errors
from dppp_jax.evals import benchmark, domains, figures

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
  color: #23272f; background: #f5f6f8; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 0 0 .8rem; }
.sub { color: #6b7280; margin: 0 0 1.6rem; }
nav { margin: 0 0 1.6rem; font-size: .92rem; }
nav a { color: #3264a8; text-decoration: none; margin-right: 1.1rem;
  white-space: nowrap; }
section { background: #fff; border: 1px solid #e3e6ea; border-radius: 10px;
  padding: 1.4rem 1.6rem; margin: 0 0 1.3rem; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .95rem; }
th { text-align: right; color: #6b7280; font-weight: 600;
  border-bottom: 2px solid #d7dbe0; }
td { text-align: right; border-bottom: 1px solid #eceef1; }
th, td { padding: .42rem .9rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
table.facts td { text-align: left; white-space: normal; }
table.facts td:first-child { color: #6b7280; white-space: nowrap; }
figure { margin: .6rem 0 1rem; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: #6b7280; font-size: .9rem; margin-top: .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
""".strip()


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the report: `body` is HTML made by the functions below."""

  title: str
  body: str


def paragraph(text: str) -> str:
  """Returns words as HTML; they are escaped."""
  return f"<p>{html.escape(text)}</p>\n"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a table as HTML, the first column left, the others right."""
  cells = lambda row, tag: "".join(
    f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row
  )
  body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
  return (
    f"<table><thead><tr>{cells(header, 'th')}</tr></thead>\n"
    f"<tbody>{body}</tbody></table>\n"
  )


def facts(values: Mapping[str, Any]) -> str:
  """Returns names and values as a two-column table."""
  rows = "\n".join(
    f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td>"
    "</tr>"
    for name, value in values.items()
  )
  return f'<table class="facts"><tbody>{rows}</tbody></table>\n'


def figure(image: bytes, caption: str = "") -> str:
  """Returns an embedded PNG or JPEG as HTML, with its caption as alt text."""
  kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
  data = base64.b64encode(image).decode()
  caption = html.escape(caption, quote=True)
  below = f"<figcaption>{caption}</figcaption>" if caption else ""
  source = f"data:image/{kind};base64,{data}"
  return f'<figure><img src="{source}" alt="{caption}">{below}</figure>\n'


def render(
  title: str, sections: Sequence[Section], *, subtitle: str = ""
) -> str:
  """Returns the whole page."""
  links = "".join(
    f'<a href="#s{i}">{html.escape(section.title)}</a>'
    for i, section in enumerate(sections)
  )
  parts = "\n".join(
    f'<section id="s{i}"><h2>{html.escape(section.title)}</h2>\n'
    f"{section.body}</section>"
    for i, section in enumerate(sections)
  )
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{_STYLE}
</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
<p class="sub">{html.escape(subtitle)}</p>
<nav>{links}</nav>
{parts}
</main>
</body>
</html>
"""


def write(
  path: str | os.PathLike,
  title: str,
  sections: Sequence[Section],
  *,
  subtitle: str = "",
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes report.html, whole or not at all.

  Args:
    path: the file.
    title: heading.
    sections: in order.
    subtitle: one line below the heading; today's date by default.
    overwrite: replace an existing file.

  Raises:
    errors.UserError: the file exists and `overwrite` is not set.
  """
  subtitle = subtitle or datetime.date.today().isoformat()
  page = render(title, sections, subtitle=subtitle)
  return _write(pathlib.Path(path), page, overwrite)


def write_json(
  path: str | os.PathLike, values: Mapping[str, Any], *, overwrite: bool = False
) -> pathlib.Path:
  """Writes JSON, whole or not at all; raises as `write` does."""
  text = json.dumps(values, indent=2, allow_nan=False) + "\n"
  return _write(pathlib.Path(path), text, overwrite)


def refuse_existing(*paths: pathlib.Path, overwrite: bool = False) -> None:
  """Raises UserError where no result can be written, before hours of work."""
  for path in paths:
    if path.exists() and not overwrite:
      raise errors.UserError(
        f"{path} exists already: give another --out, or --overwrite"
      )
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
      raise errors.UserError(
        f"{folder}: no folder that can be written to: give another --out"
      )


def results(
  evaluations: Sequence[benchmark.Evaluation],
  *,
  distances: Mapping[str, domains.Comparison] | None = None,
) -> dict[str, Any]:
  """Returns what evaluation.json says; arguments as `evaluation_sections`."""
  values = {"evaluations": [each.to_json() for each in evaluations]}
  if distances:
    values["domain_distances"] = {
      title: compared.to_json() for title, compared in distances.items()
    }
  return values


def evaluation_sections(
  evaluations: Sequence[benchmark.Evaluation],
  *,
  distances: Mapping[str, domains.Comparison] | None = None,
) -> list[Section]:
  """Returns the sections that every evaluation has.

  Args:
    evaluations: one for each benchmark.
    distances: title of a benchmark -> models compared on pairs of it and the
      training domain, or None.
  """
  curves = {}
  for evaluation in evaluations:
    title = evaluation.benchmark.title
    curves[title] = evaluation.result.cmc
    if evaluation.reranked is not None:
      curves[f"{title} re-ranked"] = evaluation.reranked.cmc
  note = "Percent. A query without a match from another camera is skipped."
  scores = table(*benchmark.rows(evaluations)) + paragraph(note)
  parts = [
    Section("Scores", scores),
    Section(
      "CMC curve",
      figure(
        figures.png(figures.cmc(curves)),
        "Share of queries with a match among the first k images.",
      ),
    ),
  ]
  for title, compared in (distances or {}).items():
    parts.append(distance_section(f"Distance to {title}", compared))
  for evaluation in evaluations:
    body = ""
    for which in ("best", "worst"):
      lists = figures.ranked_lists(evaluation, which=which)
      body += figure(
        figures.jpeg(lists),
        f"Queries of the {which} average precision. Green: the same person,"
        " red: another.",
      )
    name = f"Ranked lists, {evaluation.benchmark.title}"
    parts.append(Section(name, body))
  for evaluation in evaluations:
    name = f"How it was measured, {evaluation.benchmark.title}"
    parts.append(Section(name, facts(_readable(evaluation))))
  return parts


def distance_section(title: str, compared: domains.Comparison) -> Section:
  """Returns the paper's Fig. 6 with what was compared below it."""
  image = figures.png(figures.distance_distributions(compared.distances))
  return Section(title, figure(image, compared.caption))


def _readable(evaluation: benchmark.Evaluation) -> dict[str, str]:
  values = dict(evaluation.facts)
  for key in ("counts", "published_counts"):
    values[key] = "; ".join(
      f"{side}: {found['images']:,} images of {found['ids']:,} persons"
      for side, found in values[key].items()
    )
  values["corrupt_images"] = sum(values["corrupt_images"].values())
  values["reranking"] = values["reranking"] or "none"
  values["images_per_second"] = f"{values['images_per_second']:.0f}"
  values["image_size"] = " x ".join(map(str, values["image_size"]))
  return {name.replace("_", " "): str(v) for name, v in values.items()}


def _write(path: pathlib.Path, text: str, overwrite: bool) -> pathlib.Path:
  refuse_existing(path, overwrite=overwrite)
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_name(f".{path.name}.tmp")
  scratch.write_text(text, "utf-8")
  scratch.replace(path)
  return path
