"""launch/train.py, launch/pretrain.py and launch/demo.py, as a user runs them.

Tiny people, a tiny CLIP, few steps: what is proved is the way of the data and
the answer to every mistake, not what is learned.
"""

import importlib.util
import json
import math
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

import dppp_jax
from dppp_jax import checkpoints, cli, demo, logs, trees
from dppp_jax.models import clip
from dppp_jax.paperdoll import benchmark as drawn_benchmark
from dppp_jax.weights import export, hub, load
from dppp_jax.weights import tokenizer as tokenizer_lib

_SMALL_PTL = (
  "--config.dppp.num_styles=3",
  "--config.dppp.num_selected=2",
  "--config.dppp.style_layers=1",
  "--config.dppp.style_hidden=8",
  "--config.dppp.content_hidden=8",
)
_SMALL_PSD = ("--config.dppp.projector_hidden=8",)
_SMALL = (
  "--config.data.image_size=32,16",
  "--config.data.max_ids=0",
  "--config.train.P=2",
  "--config.train.K=2",
  "--config.augment.pad=1",
)
# Of a vision tower's last block, which one row asks: a bias of keys moves all
# of its logits alike.
_NO_GRADIENT = "vision_model/encoder/layers_{}/self_attn/k_proj/bias"
# Less to compile where it does not matter what is learned.
_QUICK = (
  "--config.dppp.psd_epochs=0",
  "--config.dppp.sup_con_weight=0",
  "--config.dppp.tri_txt_weight=0",
)


def launch(capsys, place, *words, default=None):
  """Runs a launcher in this process; returns exit code, stdout, stderr."""
  spec = importlib.util.spec_from_file_location("launcher", cli.ROOT / place)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  with pytest.raises(SystemExit) as info:
    cli.run(
      module.main,
      config=default,
      define_flags=module.define_flags,
      argv=[place, *map(str, words)],
    )
  out = capsys.readouterr()
  return info.value.code or 0, out.out, out.err


def train(capsys, world, *words):
  return launch(
    capsys,
    "launch/train.py",
    "--config=configs/dppp.py:smoke",
    f"--config.clip={world / 'clip'}",
    f"--data_dir={world / 'drawn'}",
    "--config.data.dataset=market1501",
    *_SMALL,
    *(() if "--config.dppp.tri_txt_weight=0" in words else _SMALL_PTL),
    *(() if "--config.dppp.psd_epochs=0" in words else _SMALL_PSD),
    *words,
    default=cli.REQUIRED,
  )


def failing_line(result) -> str:
  """Returns the one line of a run that must have ended with 2."""
  code, _, err = result
  errors = [x for x in err.splitlines() if x.startswith("error: ")]
  assert code == 2, err
  assert len(errors) == 1
  assert "Traceback" not in err
  return errors[0]


def make_clip(folder, *, seed=0, words=("a photo of person style X",)):
  scratch = folder.with_name(f"{folder.name}-words")
  size = tokenizer_lib.train_tokenizer(words, scratch, vocab_size=600)
  tokenizer = load.tokenizer(scratch)
  config = clip.Config(
    vision=clip.VisionConfig(
      hidden_size=8,
      intermediate_size=8,
      num_hidden_layers=2,
      num_attention_heads=2,
      image_size=16,
      patch_size=8,
      projection_dim=6,
    ),
    text=clip.TextConfig(
      vocab_size=size,
      hidden_size=8,
      intermediate_size=8,
      num_hidden_layers=1,
      num_attention_heads=2,
      max_position_embeddings=16,
      projection_dim=6,
      bos_token_id=tokenizer.bos_token_id,
      eos_token_id=tokenizer.eos_token_id,
    ),
    projection_dim=6,
  )
  params = clip.init_params(config, jax.random.key(seed))
  return export.clip(folder, config, params, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """A folder with a tiny CLIP and a tiny drawn benchmark."""
  folder = tmp_path_factory.mktemp("world")
  make_clip(folder / "clip")
  for layout in drawn_benchmark.FOLDERS:
    drawn_benchmark.write(
      layout,
      folder / "drawn",
      train_ids=4,
      test_ids=3,
      images_per_camera=2,
      distractors=2,
      seed=0,
      size=(32, 16),
    )
  return folder


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
  """A run folder of both stages with evaluation."""
  workdir = tmp_path_factory.mktemp("runs") / "run"
  spec = importlib.util.spec_from_file_location(
    "launcher", cli.ROOT / "launch/train.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  with pytest.raises(SystemExit) as info:
    cli.run(
      module.main,
      config=cli.REQUIRED,
      define_flags=module.define_flags,
      argv=[
        "launch/train.py",
        "--config=configs/dppp.py:smoke",
        f"--config.clip={world / 'clip'}",
        f"--data_dir={world / 'drawn'}",
        "--config.data.dataset=market1501",
        *_SMALL,
        *_SMALL_PTL,
        *_SMALL_PSD,
        f"--config.eval.benchmark_root={world / 'drawn'}",
        "--config.eval.benchmarks=('market1501','dukemtmcreid')",
        f"--workdir={workdir}",
      ],
    )
  assert not info.value.code
  return workdir


def test_run_folder_is_complete(world, trained):
  config = json.loads((trained / "config.json").read_text())
  assert config["data"]["dataset"] == "market1501"
  environment = json.loads((trained / "environment.json").read_text())
  assert environment["packages"]["jax"] == jax.__version__
  lines = logs.read(trained / "metrics.jsonl")
  assert {line["stage"] for line in lines} == {"ptl", "psd"}
  measured = [line for line in lines if "market1501/mAP" in line]
  assert [line["stage"] for line in measured] == ["ptl", "psd"]
  assert all(0 <= line["dukemtmcreid/Rank-1"] <= 1 for line in measured)
  for key in ("grad_norm", "images_per_second", "lr_factor", "sup_con"):
    assert all(key in line for line in lines if "loss" in line)


def test_psd_leaves_all_of_ptl_bit_identical(trained):
  steps = sorted(
    int(p.name) for p in (trained / "checkpoints").iterdir() if p.name.isdigit()
  )
  before = trees.flatten(checkpoints.restore_model(trained, steps[0])[1])
  after = trees.flatten(checkpoints.restore_model(trained, steps[-1])[1])
  new = {name.split("/")[0] for name in after.keys() - before.keys()}
  assert new == {"projector", "neck_content"}
  for name, value in before.items():
    np.testing.assert_array_equal(value, after[name], err_msg=name)


def test_ptl_trains_the_encoder_and_freezes_the_text_tower(world, trained):
  steps = [
    int(p.name) for p in (trained / "checkpoints").iterdir() if p.name.isdigit()
  ]
  params = trees.flatten(checkpoints.restore_model(trained, min(steps))[1])
  began = trees.flatten(load.clip(world / "clip")[1])
  for name, value in began.items():
    same = np.array_equal(value, params[f"clip/{name}"])
    trains = name.startswith(("vision_model/", "visual_projection/"))
    trains &= name != _NO_GRADIENT.format(1)  # The last of two blocks.
    assert same != trains, name


def test_extractor_of_a_run_reads_content_features(trained):
  extractor = dppp_jax.load_extractor(trained)
  images = np.random.default_rng(0).integers(0, 255, (3, 32, 16, 3), np.uint8)
  features = extractor(images)
  assert features.shape == (3, 6)
  np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
  # extractor.json is of PSD by now; the checkpoint of PTL has no projector.
  first = min(checkpoints.steps(trained))
  early = dppp_jax.load_extractor(trained, step=first)
  assert early.spec.feature == "projected"
  plain = dppp_jax.load_extractor(trained, feature="projected")(images)
  # PSD leaves the encoder as it was.
  np.testing.assert_array_equal(early(images), plain)
  assert np.abs(features - plain).max() > 1e-3  # P_s does something.


def test_rerun_of_a_finished_run_changes_nothing(capsys, world, trained):
  before = (trained / "metrics.jsonl").read_text()
  words = (
    f"--config.eval.benchmark_root={world / 'drawn'}",
    "--config.eval.benchmarks=('market1501','dukemtmcreid')",
    f"--workdir={trained}",
  )
  code, out, _ = train(capsys, world, *words)
  assert code == 0
  assert "trained" in out
  assert (trained / "metrics.jsonl").read_text() == before


def test_other_configuration_in_the_run_folder(capsys, world, trained):
  line = failing_line(
    train(capsys, world, f"--workdir={trained}", "--config.dppp.margin=0.5")
  )
  assert "dppp.margin" in line
  assert "--workdir" in line


def test_folder_that_is_no_run_is_not_written_to(capsys, world, tmp_path):
  (tmp_path / "thesis.tex").write_text("mine")
  line = failing_line(train(capsys, world, f"--workdir={tmp_path}"))
  assert "not a run folder" in line
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
  ("words", "named"),
  [
    (("--config.dppp.margni=1",), "margni"),
    (("--config.train.P=99",), "P"),
    (("--config.train.K=999",), "K"),
    (("--config.method=resnet",), "resnet"),
    (("--config.dtype=float7",), "float7"),
    (("--config.data.placement=cloud",), "cloud"),
    (("--config.data.dataset=celeba",), "celeba"),
    (("--config.data.dataset=geneperson",), "launch/generate.py"),
    (("--config.clip=nowhere/at/all",), "nowhere/at/all"),
    (("--config.dppp.num_selected=9",), "num_selected"),
    (("--config.dppp.prompt=haiku",), "haiku"),
    (("--config.dppp.projector_act=mish",), "dppp.projector_act"),
    (("--config.dppp.style_heads=0",), "dppp.style_heads"),
    (("--config.dppp.style_heads=-1",), "dppp.style_heads"),
    (
      (
        "--config.dppp.ptl_epochs=0",
        "--config.dppp.psd_epochs=0",
        "--config.dppp.tri_txt_weight=0",
      ),
      "dppp.ptl_epochs",
    ),
    (("--config.dppp.psd_epochs=-1",), "dppp.psd_epochs=-1"),
    (("--config.dppp.encoder_lr=nan",), "dppp.encoder_lr=nan"),
    (("--config.dppp.label_smoothing=1.5",), "dppp.label_smoothing=1.5"),
    (("--config.data.max_ids=-1",), "data.max_ids=-1"),
    (("--config.train.eval_every_epochs=-1",), "train.eval_every_epochs=-1"),
    (("--config.train.seed=99999999999",), "train.seed=99999999999"),
    (
      ("--config.eval.benchmark_root=/nowhere", "--config.eval.dtype=half"),
      "config eval.dtype 'half'",
    ),
    (("--config.dppp.soft_margin", "--config.dppp.margin=1"), "dppp.margin"),
    (("--config.eval.allow_partial",), "eval.allow_partial does nothing"),
    (("--config.data.data_dir=x",), "--data_dir does nothing"),
    (("--config.train.tensorboard", "--workdir="), "--workdir=: is empty"),
    (("--config.train.log_every=0",), "train.log_every"),
    (("--config.train.checkpoint_every=0",), "train.checkpoint_every"),
    (("--config.data.num_threads=-1",), "num_threads"),
    # absl adds to the size that `train` gives.
    (("--config.data.image_size=3",), "config data.image_size=(32, 16, 3)"),
    (("--config.data.interpolation=box",), "config data.interpolation 'box'"),
    (("--config.eval.interpolation=box",), "config eval.interpolation 'box'"),
    (("--config.eval.feature=contnet",), "config eval.feature 'contnet'"),
    (
      ("--config.eval.feature=content", "--config.dppp.psd_epochs=0"),
      "dppp.psd_epochs",
    ),
    (("--config.augment.flip=3",), "flip"),
    (("--config.eval.benchmark_root=/nowhere",), "/nowhere"),
    (
      ("--config.eval.benchmark_root=/nowhere",),
      "--config.eval.benchmarks",
    ),
    (("positional",), "positional"),
  ],
)
def test_mistakes_are_one_line(capsys, world, tmp_path, words, named):
  workdir = tmp_path / "run"
  if "benchmark_root" in words[0]:
    words += ("--config.eval.benchmarks=('market1501',)",)
  line = failing_line(train(capsys, world, *words, f"--workdir={workdir}"))
  assert named in line
  assert not workdir.exists() or not list(workdir.glob("checkpoints/*"))


def test_places_that_cannot_be_a_run_folder(capsys, world, tmp_path):
  file = tmp_path / "file"
  file.write_text("mine")
  for workdir in (file, file / "below"):
    line = failing_line(train(capsys, world, f"--workdir={workdir}"))
    assert str(workdir) in line and "--workdir" in line
  assert file.read_text() == "mine"


def test_start_that_failed_lets_its_remedy_in(capsys, world, tmp_path):
  words = (*_QUICK, f"--workdir={tmp_path / 'run'}")
  line = failing_line(train(capsys, world, *words, "--config.train.P=9"))
  assert "lower P" in line
  code, _, err = train(capsys, world, *words)
  assert code == 0, err
  line = failing_line(train(capsys, world, *words, "--config.train.P=3"))
  assert "holds another configuration" in line
  code, _, err = train(capsys, world, *words, "--config.data.placement=host")
  assert code == 0, err


def test_damaged_config_of_a_run(capsys, world, trained, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  (workdir / "config.json").write_text("")
  line = failing_line(train(capsys, world, f"--workdir={workdir}"))
  assert "config.json: not JSON" in line


def test_folder_of_a_model_is_not_taken_for_a_run(capsys, world, tmp_path):
  folder = shutil.copytree(world / "clip", tmp_path / "clip")
  before = (folder / "config.json").read_text()
  line = failing_line(train(capsys, world, f"--workdir={folder}"))
  assert "another configuration" in line
  assert (folder / "config.json").read_text() == before


def test_feature_may_be_content_and_may_change(capsys, world, tmp_path):
  workdir = tmp_path / "run"
  evaluation = (
    f"--config.eval.benchmark_root={world / 'drawn'}",
    "--config.eval.benchmarks=market1501",
    f"--workdir={workdir}",
  )
  feature = lambda: json.loads((workdir / "extractor.json").read_text())[
    "feature"
  ]
  code, _, err = train(
    capsys, world, *evaluation, "--config.eval.feature=content"
  )
  assert code == 0, err
  assert feature() == "content"
  assert len(logs.by_step(workdir, "market1501/mAP")) == 2
  code, _, err = train(
    capsys, world, *evaluation, "--config.eval.feature=concat"
  )
  assert code == 0, err
  assert feature() == "concat"
  assert len(logs.by_step(workdir, "market1501/mAP")) == 2


def test_truncated_picture_is_named_or_skipped(capsys, world, tmp_path):
  drawn = tmp_path / "drawn"
  shutil.copytree(world / "drawn", drawn)
  victim = sorted(drawn.glob("Market*/bounding_box_train/*.jpg"))[1]
  victim.write_bytes(victim.read_bytes()[:200])
  words = (f"--data_dir={drawn}", *_QUICK)
  line = failing_line(
    train(capsys, world, *words, f"--workdir={tmp_path / 'a'}")
  )
  assert victim.name in line
  code, out, _ = train(
    capsys,
    world,
    *words,
    "--config.data.on_corrupt=skip",
    f"--workdir={tmp_path / 'b'}",
  )
  assert code == 0
  assert "trained" in out


def test_checkpoint_with_nan_is_refused(capsys, world, tmp_path):
  folder = make_clip(tmp_path / "clip")
  tensors = {
    key: np.array(x)
    for key, x in hub.read_tensors(folder / "model.safetensors").items()
  }
  name = "vision_model.post_layernorm.weight"
  tensors[name] = np.full_like(tensors[name], np.nan)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  words = (f"--config.clip={folder}", f"--workdir={tmp_path / 'run'}")
  assert name in failing_line(train(capsys, world, *words))


def test_checkpoint_of_another_model_is_refused(capsys, world, tmp_path):
  folder = make_clip(tmp_path / "clip")
  config = json.loads((folder / "config.json").read_text())
  config["vision_config"]["num_hidden_layers"] = 3
  (folder / "config.json").write_text(json.dumps(config))
  words = (f"--config.clip={folder}", f"--workdir={tmp_path / 'run'}")
  line = failing_line(train(capsys, world, *words))
  assert str(folder) in line


def test_checkpoint_of_another_run_is_refused(capsys, world, trained, tmp_path):
  """A run folder whose checkpoint has other networks than its config says."""
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  config = json.loads((workdir / "config.json").read_text())
  config["dppp"]["content_hidden"] = 16
  (workdir / "config.json").write_text(json.dumps(config))
  words = (
    "--config.dppp.content_hidden=16",
    f"--config.eval.benchmark_root={world / 'drawn'}",
    "--config.eval.benchmarks=('market1501','dukemtmcreid')",
    f"--workdir={workdir}",
  )
  shutil.rmtree(workdir / "checkpoints" / str(_newest(workdir)))
  result = train(capsys, world, *words)
  assert "checkpoint of another model" in failing_line(result)
  assert (
    "! content_inversion/fc1/kernel expects (6, 16), holds (6, 8)"
    in (result[2])
  )
  assert not list((workdir / "checkpoints").glob("damaged-*"))


def _newest(workdir):
  folder = workdir / "checkpoints"
  return max(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_pretraining_ends_with_a_clip_that_loads(capsys, tmp_path):
  workdir = tmp_path / "pretrain"
  words = (
    "--config=configs/pretrain_clip.py:smoke",
    f"--workdir={workdir}",
    "--config.data.image_size=48,24",
    "--config.data.num_images=24",
    "--config.data.num_held_out=8",
    "--config.train.batch_size=8",
  )
  default = "pretrain_clip.py"
  code, out, _ = launch(capsys, "launch/pretrain.py", *words, default=default)
  assert code == 0
  assert "Zero-shot accuracy" in out
  _config, params = load.clip(workdir / "clip")
  step, trained_params = checkpoints.restore_model(workdir)
  assert step == 3  # 24 pictures in batches of 8, one epoch.
  for name, value in trees.flatten(params).items():
    kept = np.asarray(trees.flatten(trained_params)[name])
    np.testing.assert_array_equal(value, kept.astype(np.float16))
  metrics = json.loads((workdir / "clip" / "metrics.json").read_text())
  assert metrics["parameters"] == trees.count(params)
  assert metrics["steps"] == 3 and metrics["seconds"] >= 0
  assert metrics["street"]["num_images"] == 8
  assert load.tokenizer(workdir / "clip")("black jacket")["input_ids"]


def test_pretraining_on_cells_leaves_the_text_tower_as_it_is(capsys, tmp_path):
  begin = cli.ROOT / "dppp_jax/assets/mini/clip"
  words = (
    "--config=configs/pretrain_clip_cells.py:smoke",
    f"--workdir={tmp_path / 'run'}",
    f"--config.begin={begin}",
    f"--config.data.cache={tmp_path / 'drawn'}",
  )
  code, out, _ = launch(
    capsys, "launch/pretrain.py", *words, default="pretrain_clip.py"
  )
  assert code == 0
  assert "| attribute | classes | studio | street | canvases |" in out
  before, after = (
    trees.flatten(load.clip(folder)[1])
    for folder in (begin, tmp_path / "run" / "clip")
  )
  for name, value in before.items():
    is_same = np.array_equal(value, after[name])
    stays = name.startswith("text_")
    stays |= name in ("logit_scale", _NO_GRADIENT.format(5))
    assert is_same == stays, name
  # 64 people, and three cells of each of seven canvases with people.
  assert checkpoints.restore_model(tmp_path / "run")[0] == math.ceil(85 / 16)


def test_demo_table_has_mean_and_spread():
  score = lambda x: {"rank1": x, "mAP": x / 2}
  scores = [
    {m: {b: score(x) for b in ("market1501", "dukemtmcreid")} for m in names}
    for names in [("frozen mini CLIP", "PTL", "PTL + PSD")]
    for x in (0.2, 0.4)
  ]
  header, rows = demo.table(scores)
  assert header[:3] == ["model", "market1501 Rank-1", "mAP"]
  # Mean of 20 and 40 is 30; sample deviation sqrt(200) = 14.1.
  assert rows[1][:3] == ["PTL", "30.0 ± 14.1", "15.0 ± 7.1"]
  assert demo.table(scores[:1])[1][0][1] == "20.0"
  assert "PTL + PSD" in demo.as_text(header, rows)


def test_demo_launcher_refuses_nonsense(capsys):
  assert "seeds" in failing_line(launch(capsys, "launch/demo.py", "--seeds=0"))


def test_pictures_need_not_be_square_nor_of_one_size(world):
  extractor = dppp_jax.load_extractor(world / "clip", image_size=(32, 16))
  rng = np.random.default_rng(1)
  images = [rng.integers(0, 255, s, np.uint8) for s in ((40, 9, 3), (7, 30, 3))]
  resized = [
    np.asarray(
      PIL.Image.fromarray(x).resize((16, 32), PIL.Image.Resampling.BICUBIC)
    )
    for x in images
  ]
  np.testing.assert_allclose(
    extractor(images), extractor(np.stack(resized)), atol=1e-6
  )


def test_page_of_benchmarks_is_what_the_results_say(capsys):
  place = "data_tools/benchmark_tables.py"
  code, _, err = launch(capsys, place, "--check")
  assert code == 0, err
