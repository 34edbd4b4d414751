import base64
import io
import json
import re
import types

from matplotlib import colors
import numpy as np
import PIL.Image
import pytest

from dppp_jax import errors
from dppp_jax.data import source as source_lib
from dppp_jax.evals import benchmark, domains, figures, report, retrieval


def features_of(values):
  return np.stack([np.cos(values), np.sin(values)], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def evaluation():
  """Three queries before a gallery on a quarter circle."""
  rng = np.random.default_rng(0)
  pictures = lambda n: rng.integers(0, 256, (n, 40, 20, 3), dtype=np.uint8)
  query = source_lib.Arrays(
    pictures(3), np.array([1, 2, 9]), camids=np.array([0, 0, 0])
  )
  gallery = source_lib.Arrays(
    pictures(5), np.array([2, 1, 1, 2, 0]), camids=np.array([1, 1, 0, 1, 1])
  )
  qf = features_of([0.0, 0.06, 0.7])
  gf = features_of([0.1, 0.2, 0.01, 0.3, 0.9])
  result = retrieval.evaluate(
    qf, query.pids, query.camids, gf, gallery.pids, gallery.camids, max_rank=4
  )
  counts = {"query": {"images": 3, "ids": 3}}
  facts = {
    "metric": "cosine",
    "counts": counts,
    "published_counts": counts,
    "corrupt_images": {"query": 0, "gallery": 1},
    "reranking": None,
    "images_per_second": 12.3,
    "image_size": [40, 20],
    "model": "<run>",
  }
  return benchmark.Evaluation(
    benchmark=types.SimpleNamespace(name="market1501", title="Market <1501>"),
    query=query,
    gallery=gallery,
    query_features=qf,
    gallery_features=gf,
    result=result,
    reranked=None,
    ranker=None,
    facts=facts,
  )


def test_table_of_scores(evaluation):
  header, rows = benchmark.rows([evaluation])
  assert header[1:6] == ["R1", "R5", "R10", "mAP", "mINP"]
  # Query 0: junk first, then the wrong image 0, then its own: AP 1/2.
  # Query 1: images 0, 2, 1, 3 and hits at ranks 1 and 4: AP 3/4.
  mean_ap = 100 * (1 / 2 + (1 + 2 / 4) / 2) / 2
  assert rows == [
    ["Market <1501>", "50.0", "-", "-", f"{mean_ap:.1f}", "50.0", 2, 1]
  ]
  lines = benchmark.text(header, rows).splitlines()
  assert lines[0].index("mAP") + 3 == lines[2].index(f"{mean_ap:.1f}") + 4
  assert len({len(line) for line in lines}) == 1


def test_queries_are_picked_by_ap(evaluation):
  pick = lambda n, which: list(
    figures.pick_queries(evaluation.result, n, which=which)
  )
  assert pick(5, "best") == [1, 0]  # Query 2 has no match and no AP.
  assert pick(5, "worst") == [0, 1]
  assert pick(1, "worst") == [0]


def test_ranked_lists_have_the_right_borders(evaluation):
  figure = figures.ranked_lists(evaluation, which="worst", k=4)
  borders = [
    colors.to_hex(patch.get_edgecolor()) for patch in figure.axes[0].patches
  ]
  blue, green, red = "#3b4252", "#2e9e4f", "#d43a2f"
  # Query 0 without its junk image 2: images 0, 1, 3, 4.
  assert borders[:5] == [blue, red, green, red, red]
  assert borders[5:] == [blue, green, red, red, green]
  shown = figure.axes[0].images
  assert len(shown) == 10
  texts = [text.get_text() for text in figure.axes[0].texts]
  assert texts[0].startswith("query 1, camera 1   AP 50.0")


def test_pairs_are_uniform_and_the_same_for_all():
  pairs = domains.draw_pairs(7, 30, num=10_000)
  np.testing.assert_array_equal(pairs, domains.draw_pairs(7, 30, num=10_000))
  assert (pairs != domains.draw_pairs(7, 30, num=10_000, seed=1)).any()
  for column, num in zip(pairs.T, (7, 30), strict=True):
    counts = np.bincount(column, minlength=num)
    assert len(counts) == num
    np.testing.assert_allclose(counts, 10_000 / num, rtol=0.25)
  assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.03
  with pytest.raises(errors.UserError, match="7 and 0"):
    domains.draw_pairs(7, 0)


def test_distances_are_of_normalised_features():
  target, source = np.array([[2.0, 0], [0, 5]]), np.array([[0, 3.0], [-1, 0]])
  pairs = np.array([[0, 0], [1, 0], [0, 1]])
  np.testing.assert_allclose(
    domains.distances(target, source, pairs), [np.sqrt(2), 0, 2], atol=1e-7
  )


def test_between_extracts_only_what_the_pairs_need():
  rng = np.random.default_rng(0)
  target, source = (
    source_lib.Arrays(
      rng.integers(0, 255, (n, 4, 2, 3), dtype=np.uint8), np.arange(n)
    )
    for n in (3, 500)
  )
  seen = []

  class Model:
    def extract(self, images, desc):
      seen.append(len(images))
      rows = [images.read(i).ravel() for i in range(len(images))]
      return np.array(rows, np.float64), None

  found = domains.between({"a": Model()}, target, source, num=40)["a"]
  flat = lambda whole: whole.images.reshape(len(whole), -1).astype(float)
  pairs = domains.draw_pairs(3, 500, num=40)
  expected = domains.distances(flat(target), flat(source), pairs)
  np.testing.assert_allclose(found, expected, atol=1e-12)
  assert seen[0] == 3 and seen[1] <= 40


def test_distributions_name_mean_and_std():
  rng = np.random.default_rng(0)
  by_model = {
    "before": rng.normal(1.2, 0.1, 2000),
    "after": rng.normal(0.9, 0.05, 2000),
    "constant": np.full(2000, 1.0),
  }
  axes = figures.distance_distributions(by_model).axes[0]
  labels = [text.get_text() for text in axes.get_legend().get_texts()]
  before = by_model["before"]
  assert labels[0] == f"before: {before.mean():.3f} ± {before.std():.3f}"
  assert labels[2] == "constant: 1.000 ± 0.000"
  x, density = axes.lines[0].get_data()
  assert abs(x[np.argmax(density)] - 1.2) < 0.05
  assert np.trapezoid(density, x) == pytest.approx(1, abs=0.01)


def test_curves_hold_the_data():
  axes = figures.cmc({"a": np.array([0.5, 0.75])}).axes[0]
  np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 50], [2, 75]])
  series = {"loss": ([1, 2, 3], [3.0, 2.0, 1.0])}
  axes = figures.curves(series, xlabel="step", ylabel="loss").axes[0]
  np.testing.assert_array_equal(axes.lines[0].get_ydata(), [3, 2, 1])


def compared(**distances):
  """Returns a comparison of models that are called as their distances are."""
  about = {
    "model": "a run",
    "feature": "projected",
    "image_size": [8, 4],
    "dtype": "float32",
  }
  return domains.Comparison(
    distances=distances,
    models=dict.fromkeys(distances, about),
    target="a Market image",
    source="a training image",
  )


def test_caption_says_what_was_compared():
  values = np.linspace(0.8, 1.2, 50)
  found = compared(before=values, after=values)
  assert "50 uniform pairs of a Market image and a training" in found.caption
  for label in ("before", "after"):
    assert f"{label}: feature projected of 8 x 4 pixels" in found.caption
  assert found.caption in report.distance_section("Fig. 6", found).body


def test_report_is_self_contained(evaluation, tmp_path):
  pairs = {"Market <1501>": compared(v_g=np.linspace(0.8, 1.2, 50))}
  sections = report.evaluation_sections([evaluation], distances=pairs)
  sections.append(
    report.Section("Extra & more", report.paragraph("1 < 2 & so on"))
  )
  path = report.write(tmp_path / "a" / "report.html", "T <1>", sections)
  page = path.read_text()
  assert "T &lt;1&gt;" in page and "Market &lt;1501&gt;" in page
  assert "<1501>" not in page and "1 &lt; 2 &amp; so on" in page
  assert not re.search(r"(src|href)=\"(?!data:|#)", page)
  assert "http" not in page.replace("http-equiv", "")
  found = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', page)
  assert [kind for kind, _ in found] == ["png", "png", "jpeg", "jpeg"]
  for kind, data in found:
    image = PIL.Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    assert image.format.lower() == kind and min(image.size) > 100
  anchors = set(re.findall(r'href="#(\w+)"', page))
  assert anchors == set(re.findall(r'<section id="(\w+)"', page))
  assert len(anchors) == len(sections) == 6


def test_nothing_is_overwritten_unasked(tmp_path):
  path = tmp_path / "report.html"
  path.write_text("precious")
  with pytest.raises(errors.UserError, match=r"report\.html exists already"):
    report.write(path, "t", [])
  with pytest.raises(errors.UserError, match="exists already"):
    report.refuse_existing(tmp_path / "no", path)
  with pytest.raises(errors.UserError, match="exists already"):
    report.write_json(path, {})
  with pytest.raises(errors.UserError, match=r"report\.html: no folder"):
    report.refuse_existing(path / "below" / "evaluation.json")
  assert path.read_text() == "precious"
  report.write(path, "t", [], overwrite=True)
  assert "<html" in path.read_text()
  report.write_json(tmp_path / "new.json", {"a": 1})
  assert json.loads((tmp_path / "new.json").read_text()) == {"a": 1}
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "new.json",
    "report.html",
  ]


def test_json_of_results(evaluation):
  distances = {"Market": compared(v_g=np.array([1.0, 3.0]))}
  values = report.results([evaluation], distances=distances)
  json.dumps(values, allow_nan=False)
  (first,) = values["evaluations"]
  assert first["benchmark"] == "market1501"
  assert first["scores"]["num_skipped_queries"] == 1
  assert first["model"] == "<run>"
  assert values["domain_distances"]["Market"]["v_g"] == {
    "mean": 2.0,
    "std": 1.0,
    "pairs": 2,
    "model": "a run",
    "feature": "projected",
    "image_size": [8, 4],
    "dtype": "float32",
  }
