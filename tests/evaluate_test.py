"""Runs launch/evaluate.py and launch/export.py on tiny folders."""

import dataclasses
import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest

from dppp_jax import checkpoints, cli, errors
from dppp_jax.data import benchmarks, images, shards
from dppp_jax.data import source as source_lib
from dppp_jax.evals import domains, extractor, retrieval
from dppp_jax.evals import export as evals_export
from dppp_jax.evals import spec as spec_lib
from dppp_jax.models import clip, heads
from dppp_jax.weights import export

CONFIG = clip.Config(
  vision=clip.VisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
  ),
  text=clip.TextConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=4,
    bos_token_id=8,
    eos_token_id=9,
  ),
  projection_dim=6,
)


def launch(capsys, name, *words):
  """Runs a launcher; returns its exit code, stdout and stderr."""
  location = cli.ROOT / name
  module_spec = importlib.util.spec_from_file_location("launcher", location)
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  with pytest.raises(SystemExit) as info:
    cli.run(
      module.main,
      define_flags=module.define_flags,
      argv=[name, *map(str, words)],
    )
  out, err = capsys.readouterr()
  return info.value.code or 0, out, err


def evaluate(capsys, *words):
  return launch(
    capsys, "launch/evaluate.py", "--batch_size=16", "--allow_partial", *words
  )


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
    clip.param_shapes(CONFIG),
  )


@pytest.fixture(scope="module")
def clip_folder(params, tmp_path_factory):
  return export.clip(tmp_path_factory.mktemp("clip") / "tiny", CONFIG, params)


@pytest.fixture(scope="module")
def run_folder(params, tmp_path_factory):
  """A run that has trained a projector."""
  workdir = tmp_path_factory.mktemp("runs") / "dppp"
  shapes = jax.eval_shape(
    heads.Projector(6).init, jax.random.key(1), np.ones((1, 6), np.float32)
  )
  rng = np.random.default_rng(1)
  projector = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
  )
  tree = {"clip": params, "projector": projector["params"]}
  manager = checkpoints.Manager(workdir)
  manager.save(5, params=tree, collections={}, opt={"n": np.zeros(1)}, data={})
  manager.close()
  spec = spec_lib.Spec(
    vision=CONFIG.vision,
    projector={
      "features": 6,
      "hidden": 512,
      "act": "relu",
      "residual": False,
    },
    feature="content",
    image_size=(24, 16),
  )
  (workdir / "extractor.json").write_text(json.dumps(spec.to_json()))
  return workdir


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Both benchmarks, eight persons before two cameras."""
  root = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  names = {
    "Market-1501-v15.09.15": "{:04d}_c{}s1_{:06d}_00.jpg",
    "DukeMTMC-reID": "{:04d}_c{}_f{:07d}.jpg",
  }
  for folder, pattern in names.items():
    for subset, pids, cameras, shots in (
      ("bounding_box_train", (1, 2), (1, 2), 1),
      ("query", range(11, 19), (1,), 1),
      ("bounding_box_test", range(11, 19), (1, 2), 2),
    ):
      (root / folder / subset).mkdir(parents=True)
      for pid in pids:
        for camera in cameras:
          for shot in range(shots):
            colour = np.random.default_rng(pid).integers(0, 256, (6, 2, 3))
            noisy = np.kron(colour, np.ones((5, 8, 1)))
            noisy += rng.normal(0, 40, noisy.shape)
            data = images.encode_jpeg(np.clip(noisy, 0, 255).astype(np.uint8))
            frame = shot + 10 * (subset == "query")
            name = pattern.format(pid, camera, frame)
            (root / folder / subset / name).write_bytes(data)
  return root


def test_clip_folder_on_both_benchmarks(clip_folder, root, tmp_path, capsys):
  out = tmp_path / "out"
  code, said, _ = evaluate(
    capsys,
    f"--model={clip_folder}",
    "--benchmark=market1501",
    "--benchmark=dukemtmcreid",
    f"--benchmark_root={root}",
    "--feature=concat",
    f"--out={out}",
  )
  assert code == 0
  assert [line.split()[0] for line in said.splitlines()[2:4]] == [
    "Market-1501",
    "DukeMTMC-reID",
  ]
  values = json.loads((out / "evaluation.json").read_text())
  assert {path.name for path in out.iterdir()} == {
    "evaluation.json",
    "report.html",
  }
  model = extractor.load_extractor(clip_folder, feature="concat", batch_size=16)
  for found, name in zip(
    values["evaluations"], ("market1501", "dukemtmcreid"), strict=True
  ):
    data = benchmarks.load(name, root, allow_partial=True)
    labelled = [
      (model(side.paths), side.pids, side.camids)
      for side in (data.query, data.gallery)
    ]
    expected = retrieval.evaluate(*labelled[0], *labelled[1])
    assert found["scores"] == pytest.approx(expected.summary(), abs=1e-12)
    assert found["benchmark"] == name
    assert found["feature"] == "concat" and found["feature_width"] == 14
    assert found["metric"] == "cosine" and found["reranking"] is None
    assert found["image_size"] == [24, 12]
    assert found["is_whole"] is False
    assert found["counts"]["gallery"] == {"images": 32, "ids": 8}
    assert found["published_counts"]["query"]["images"] in (3368, 2228)
    assert found["commit"]
    table = next(x for x in said.splitlines() if data.title in x).split()
    assert table[1] == f"{100 * expected.cmc[0]:.1f}"
    assert table[4] == f"{100 * expected.mAP:.1f}"
    assert table[-2:] == ["8", "0"]
  code, _, err = evaluate(
    capsys, f"--model={clip_folder}", f"--benchmark_root={root}", f"--out={out}"
  )
  assert code == 2 and "evaluation.json exists already" in err


def test_run_with_reranking_and_distances(
  run_folder, root, tmp_path, capsys, monkeypatch
):
  rng = np.random.default_rng(0)
  virtual = source_lib.Arrays(
    rng.integers(0, 256, (9, 24, 16, 3), dtype=np.uint8), np.arange(9)
  )
  monkeypatch.setattr(shards, "load", lambda data_dir: virtual)
  out = tmp_path / "out"
  code, said, _ = evaluate(
    capsys,
    f"--workdir={run_folder}",
    f"--benchmark_root={root}",
    "--rerank",
    "--data_dir=shards",
    f"--out={out}",
  )
  assert code == 0 and "Market-1501 re-ranked" in said
  values = json.loads((out / "evaluation.json").read_text())
  (found,) = values["evaluations"]
  assert found["reranking"] == {"k1": 20, "k2": 6, "weight": 0.3}
  assert found["feature"] == "content" and "step 5" in found["model"]
  assert found["reranked_scores"]["num_valid_queries"] == 8
  distances = values["domain_distances"]["Market-1501"]
  assert list(distances) == ["projected", "content"]
  assert distances["content"]["pairs"] == 10_000
  assert 0 < distances["content"]["mean"] < 2
  assert "Distance to Market-1501" in (out / "report.html").read_text()


def test_any_two_models_in_the_figure(
  run_folder, clip_folder, root, tmp_path, capsys, monkeypatch
):
  rng = np.random.default_rng(0)
  virtual = source_lib.Arrays(
    rng.integers(0, 256, (9, 24, 16, 3), dtype=np.uint8), np.arange(9)
  )
  monkeypatch.setattr(shards, "load", lambda data_dir: virtual)
  words = (f"--workdir={run_folder}", f"--benchmark_root={root}")
  out = tmp_path / "out"
  code, _, err = evaluate(
    capsys, *words, "--data_dir=x", f"--baseline={clip_folder}", f"--out={out}"
  )
  assert code == 0, err
  values = json.loads((out / "evaluation.json").read_text())
  first, second = values["domain_distances"]["Market-1501"].items()
  assert first[0] == "baseline tiny, projected"
  assert second[0] == "dppp, content"
  assert first[1]["model"] == str(clip_folder)
  assert first[1]["image_size"] == [24, 12]
  assert second[1]["image_size"] == [24, 16]
  data = benchmarks.load("market1501", root, allow_partial=True)
  model = extractor.load_extractor(clip_folder, batch_size=16)
  expected = domains.between({"a": model}, data.gallery, virtual)["a"]
  assert first[1]["mean"] == pytest.approx(float(expected.mean()), abs=1e-9)
  page = (out / "report.html").read_text()
  assert "baseline tiny, projected: feature projected of 24 x 12" in page
  code, _, err = evaluate(
    capsys, *words, f"--baseline={clip_folder}", f"--out={tmp_path / 'b'}"
  )
  assert code == 2 and "--baseline does nothing here: Fig. 6 needs" in err


def test_features_are_float32_unless_asked(run_folder, root, tmp_path, capsys):
  scores = {}
  for dtype, words in (
    ("float32", ()),
    ("bfloat16", ("--dtype=bfloat16",)),
  ):
    out = tmp_path / dtype
    code, _, _ = evaluate(
      capsys,
      f"--workdir={run_folder}",
      f"--benchmark_root={root}",
      f"--out={out}",
      *words,
    )
    assert code == 0
    (found,) = json.loads((out / "evaluation.json").read_text())["evaluations"]
    assert found["dtype"] == dtype
    assert dtype in (out / "report.html").read_text()
    scores[dtype] = found["scores"]
  assert scores["float32"] != scores["bfloat16"]


def test_a_checkpoint_gives_the_feature_of_its_stage(run_folder, tmp_path):
  """A run that has gone on to PSD; the older checkpoint has no projector."""
  workdir = tmp_path / "run"
  _, params = checkpoints.restore_model(run_folder)
  manager = checkpoints.Manager(workdir)
  for step, tree in ((2, {"clip": params["clip"]}), (5, params)):
    manager.save(
      step, params=tree, collections={}, opt={"n": np.zeros(1)}, data={}
    )
  manager.close()
  shutil.copy(run_folder / "extractor.json", workdir)
  load = lambda **words: extractor.load_extractor(workdir, **words).spec.feature
  assert load() == load(step=5) == "content"
  assert load(step=2) == load(step=2, feature="projected") == "projected"
  with pytest.raises(errors.UserError, match=r"stage ptl.*'projected'"):
    load(step=2, feature="content")
  # The newest one is damaged: the one before it is of PTL.
  shutil.rmtree(workdir / "checkpoints/5/model")
  assert load() == "projected"


def test_export_then_evaluate(run_folder, root, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(evals_export, "program", lambda model: b"")
  folder = tmp_path / "extractor"
  words = (f"--workdir={run_folder}", f"--out={folder}")
  code, said, _ = launch(capsys, "launch/export.py", *words)
  assert code == 0 and "content features of width 6" in said
  code, _, err = launch(capsys, "launch/export.py", *words)
  assert code == 2 and "exists already" in err
  scores = []
  for source in (f"--model={folder}", f"--workdir={run_folder}"):
    out = tmp_path / f"out{len(scores)}"
    code, _, _ = evaluate(
      capsys, source, f"--benchmark_root={root}", f"--out={out}"
    )
    assert code == 0
    values = json.loads((out / "evaluation.json").read_text())
    scores.append(values["evaluations"][0]["scores"])
  assert scores[0] == pytest.approx(scores[1], abs=1e-12)


def test_corrupt_image_is_named_or_counted(clip_folder, root, tmp_path, capsys):
  victim = sorted((root / "DukeMTMC-reID/bounding_box_test").iterdir())[3]
  data = victim.read_bytes()
  words = (
    f"--model={clip_folder}",
    "--benchmark=dukemtmcreid",
    f"--benchmark_root={root}",
    f"--out={tmp_path / 'out'}",
  )
  victim.write_bytes(data[: len(data) // 2])
  try:
    code, _, err = evaluate(capsys, *words)
    assert code == 2 and victim.name in err
    assert not (tmp_path / "out").exists()
    code, _, _ = evaluate(capsys, *words, "--skip_corrupt")
  finally:
    victim.write_bytes(data)
  assert code == 0
  values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
  assert values["evaluations"][0]["corrupt_images"] == {
    "query": 0,
    "gallery": 1,
  }


def spoilt(run_folder, tmp_path, change):
  """Returns a copy of the run whose parameters or spec were changed."""
  step, params = checkpoints.restore_model(run_folder)
  params = jax.tree.map(lambda x: np.array(x), params)
  spec = spec_lib.Spec.from_json(run_folder / "extractor.json")
  if change == "nan":
    params["clip"]["visual_projection"]["kernel"][0, 0] = np.nan
  else:
    vision = dataclasses.replace(spec.vision, hidden_size=16)
    spec = dataclasses.replace(spec, vision=vision)
  workdir = tmp_path / change
  manager = checkpoints.Manager(workdir)
  manager.save(
    step, params=params, collections={}, opt={"n": np.zeros(1)}, data={}
  )
  manager.close()
  (workdir / "extractor.json").write_text(json.dumps(spec.to_json()))
  return workdir


@pytest.mark.parametrize(
  "case, message",
  [
    ("both", "give one of --workdir and --model"),
    ("no model", "nowhere does not exist"),
    ("no benchmark", "no such folder"),
    ("partial", "go on with --allow_partial"),
    ("content of a clip", "needs the projector"),
    ("no step", "no step 4"),
    ("no batch", "batch_size"),
    ("step of a clip", "--step does nothing here"),
    ("nan", "visual_projection/kernel holds NaN"),
    ("other", "is it a checkpoint of another model"),
    ("no root", "benchmark_root"),
    ("unknown flag", "Unknown command line flag"),
  ],
)
def test_bad_input_ends_with_one_line(
  case, message, clip_folder, run_folder, root, tmp_path, capsys
):
  model, data = f"--model={clip_folder}", f"--benchmark_root={root}"
  words = {
    "both": (model, f"--workdir={run_folder}", data),
    "no model": (f"--model={tmp_path / 'nowhere'}", data),
    "no benchmark": (model, f"--benchmark_root={tmp_path / 'none'}"),
    "partial": (model, data, "--noallow_partial"),
    "content of a clip": (model, data, "--feature=content"),
    "no step": (f"--workdir={run_folder}", "--step=4", data),
    "no batch": (model, data, "--batch_size=0"),
    "step of a clip": (model, data, "--step=4"),
    "no root": (model,),
    "unknown flag": (model, data, "--colour=1"),
  }.get(case)
  if words is None:
    words = (f"--workdir={spoilt(run_folder, tmp_path, case)}", data)
  out = tmp_path / "out"
  code, _, err = evaluate(capsys, *words, f"--out={out}")
  (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
  assert code == 2 and message in line
  assert not out.exists()
