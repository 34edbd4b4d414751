"""Pictures of an evaluation: ranked lists, CMC curves, distances of domains.

Figures are built without pyplot: nothing opens a window, nothing is global.
"""

from collections.abc import Mapping, Sequence
import io
from typing import Literal

from matplotlib import figure as figure_lib
from matplotlib import patches
from matplotlib.backends import backend_agg
import numpy as np
from scipy import stats

from dppp_jax.data import images as images_lib
from dppp_jax.evals import benchmark, retrieval

_RIGHT, _WRONG, _QUERY = "#2e9e4f", "#d43a2f", "#3b4252"
# Blue, orange, green and purple that colour-blind readers tell apart.
_COLOURS = ("#3264a8", "#e08a1e", "#3f9b6c", "#8a5aa8", "#6b6b6b")
_CELL = (128, 64)  # Pixels of a person in the ranked lists, (H, W).


def png(figure: figure_lib.Figure, *, dpi: int = 110) -> bytes:
  """Renders a figure as PNG, which suits lines."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
  return buffer.getvalue()


def jpeg(figure: figure_lib.Figure, *, dpi: int = 110) -> bytes:
  """Renders a figure as JPEG, which suits pictures: a tenth of the bytes."""
  figure.set_dpi(dpi)
  figure.set_facecolor("white")
  canvas = backend_agg.FigureCanvasAgg(figure)
  canvas.draw()
  pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
  return images_lib.encode_jpeg(pixels, quality=88)


def pick_queries(
  result: retrieval.Result, num: int, *, which: Literal["best", "worst"]
) -> np.ndarray:
  """Returns the queries of the highest or lowest AP, int [<= num]."""
  valid = np.flatnonzero(~np.isnan(result.ap))
  order = np.argsort(result.ap[valid], kind="stable")
  order = order[::-1] if which == "best" else order
  return valid[order[:num]]


def ranked_lists(
  evaluation: benchmark.Evaluation,
  *,
  which: Literal["best", "worst"] = "worst",
  num_queries: int = 6,
  k: int = 10,
) -> figure_lib.Figure:
  """Draws queries with their nearest gallery images.

  Green borders are the query's identity, red ones are not; junk is left out as
  the metrics leave it out.

  Args:
    evaluation: whose `final` ranking is shown.
    which: queries of the best or the worst AP.
    num_queries: rows.
    k: length of a list.
  """
  queries = pick_queries(evaluation.final, num_queries, which=which)
  query, gallery = evaluation.query, evaluation.gallery
  indices, hits = retrieval.ranked_lists(
    evaluation.distances(queries),
    query.pids[queries],
    query.camids[queries],
    gallery.pids,
    gallery.camids,
    k=k,
  )
  height, width, gap, label = *_CELL, 10, 26
  size = (k + 1) * (width + gap) + 2 * gap, len(queries) * (height + label)
  figure, axes = _figure(size[0] / 100, size[1] / 100, margins=(0, 0, 1, 1))
  axes.set_xlim(0, size[0])
  axes.set_ylim(size[1], 0)
  axes.set_axis_off()

  def draw(image: np.ndarray, x: float, y: float, colour: str) -> None:
    small = images_lib.resize(image, _CELL, interpolation="bicubic")
    axes.imshow(small, extent=(x, x + width, y + height, y), aspect="auto")
    axes.add_patch(
      patches.Rectangle(
        (x, y), width, height, fill=False, edgecolor=colour, linewidth=2.4
      )
    )

  for row, i in enumerate(queries):
    y = row * (height + label) + label - 4
    title = (
      # Cameras count from 1 in file names, from 0 in camids.
      f"query {query.pids[i]}, camera {query.camids[i] + 1}"
      f"   AP {100 * evaluation.final.ap[i]:.1f} %"
    )
    axes.text(gap, y - 5, title, fontsize=8, color=_QUERY, va="bottom")
    draw(query.read(int(i)), gap, y, _QUERY)
    for lane, (j, hit) in enumerate(zip(indices[row], hits[row], strict=True)):
      if j >= 0:
        x = 2 * gap + (lane + 1) * (width + gap)
        draw(gallery.read(int(j)), x, y, _RIGHT if hit else _WRONG)
  axes.set_xlim(0, size[0])
  axes.set_ylim(size[1], 0)
  return figure


def cmc(curves: Mapping[str, np.ndarray]) -> figure_lib.Figure:
  """Draws CMC curves.

  Args:
    curves: label -> cmc [max_rank], 0 to 1.
  """
  figure, axes = _figure(6.4, 3.6)
  for (label, curve), colour in zip(
    curves.items(), _cycle(len(curves)), strict=True
  ):
    ranks = np.arange(1, len(curve) + 1)
    axes.plot(ranks, 100 * curve, color=colour, linewidth=2, label=label)
  longest = max(len(curve) for curve in curves.values())
  axes.set_xlim(1, max(2, longest))
  axes.set_ylim(top=100.5)
  axes.set_xticks([1, *range(10, longest + 1, 10)])
  axes.set_xlabel("rank")
  axes.set_ylabel("queries matched, %")
  axes.legend(frameon=False, loc="lower right")
  return figure


def distance_distributions(
  distances: Mapping[str, np.ndarray],
) -> figure_lib.Figure:
  """Draws the paper's Fig. 6: how far two domains lie apart for each model.

  Args:
    distances: label -> [num], of `domains.between`.
  """
  columns = 2 if max(map(len, distances)) <= 24 else 1  # Or they run out.
  lines = 1 + -(-len(distances) // columns)  # Of the legend, with its title.
  margins = (0.11, 0.14, 0.97, 1 - 0.075 * lines)
  figure, axes = _figure(6.4, 3.8, margins)
  low = min(values.min() for values in distances.values())
  high = max(values.max() for values in distances.values())
  margin = 0.05 * max(high - low, 1e-3)
  at = np.linspace(low - margin, high + margin, 400)
  for (label, values), colour in zip(
    distances.items(), _cycle(len(distances)), strict=True
  ):
    label = f"{label}: {values.mean():.3f} ± {values.std():.3f}"
    if values.std() < 1e-6:  # A density of a single point does not exist.
      axes.axvline(values.mean(), color=colour, linewidth=2, label=label)
      continue
    density = stats.gaussian_kde(values)(at)
    axes.plot(at, density, color=colour, linewidth=2, label=label)
    axes.fill_between(at, density, color=colour, alpha=0.15, linewidth=0)
    axes.axvline(values.mean(), color=colour, linewidth=1, linestyle="--")
  axes.set_xlim(at[0], at[-1])
  axes.set_ylim(bottom=0)
  axes.set_xlabel("Euclidean distance of normalised features")
  axes.set_ylabel("density")
  # Above the axes: a mean's line may be anywhere in them.
  axes.legend(
    frameon=False,
    title="mean ± std",
    loc="lower center",
    bbox_to_anchor=(0.5, 1),
    ncols=columns,
  )
  return figure


def curves(
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  xlabel: str,
  ylabel: str,
) -> figure_lib.Figure:
  """Draws lines, e.g. losses over steps: label -> (x, y)."""
  figure, axes = _figure(6.4, 3.6)
  for (label, (x, y)), colour in zip(
    series.items(), _cycle(len(series)), strict=True
  ):
    axes.plot(x, y, color=colour, linewidth=1.5, label=label)
  axes.set_xlabel(xlabel)
  axes.set_ylabel(ylabel)
  axes.legend(frameon=False)
  return figure


def _cycle(num: int) -> list[str]:
  return [_COLOURS[i % len(_COLOURS)] for i in range(num)]


def _figure(width, height, margins=(0.11, 0.15, 0.97, 0.96)):
  """Returns a figure of inches, with one plain axes."""
  figure = figure_lib.Figure(figsize=(width, height))
  backend_agg.FigureCanvasAgg(figure)
  left, bottom, right, top = margins
  axes = figure.add_axes((left, bottom, right - left, top - bottom))
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)
  return figure, axes
