"""Stage A whole, through launch/generate.py, with random networks of its kind.

diffusers wrote the networks; see tiny_sdxl.py. Nothing that is drawn shows a
person, so the rules are off; what they drop is shown in maker_test.py.
"""

import importlib.util
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import PIL.Image
import pytest
import tiny_sdxl

from dppp_jax import cli, devices, errors, generation, trees
from dppp_jax.data import images, shards
from dppp_jax.diffusion import sampler as sampler_lib
from dppp_jax.geneperson import (
  backgrounds,
  canvas,
  compose,
  identity,
  matting,
  networks,
  pose_bank,
  prompts,
  store,
)
from dppp_jax.weights import diffusers_folder

_ROOT = pathlib.Path(cli.__file__).parents[1]
_CONFIG = "--config=configs/geneperson.py"
_COUNT = 5


def _module():
  spec = importlib.util.spec_from_file_location(
    "launcher", _ROOT / "launch/generate.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def generate(*words):
  """Runs the launcher in this process and returns its exit code."""
  module = _module()
  with pytest.raises(SystemExit) as info:
    cli.run(
      module.main,
      config="geneperson.py:mini",
      define_flags=module.define_flags,
      argv=["launch/generate.py", *words],
    )
  return info.value.code or 0


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  """Neither reads nor writes what the user's cache holds."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp("cache")
    patch.setenv("XDG_CACHE_HOME", str(folder))
    # Small programs, too, are compiled once for all runs.
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    key = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[key]
    jax.config.update(key, 0)
    yield folder
    jax.config.update(key, before)
  devices.use_compilation_cache(None)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  return tiny_sdxl.write(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def words(places):
  flags = [*tiny_sdxl.flags(places), *tiny_sdxl.FLAGS, *tiny_sdxl.NO_RULES]
  return [_CONFIG, *flags]


class _Made(list):
  """Samplers that the launcher built."""

  def __enter__(self):
    made, self.patch = self, pytest.MonkeyPatch()

    class Spy(sampler_lib.Sampler):
      def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        made.append(self)

    self.patch.setattr(sampler_lib, "Sampler", Spy)
    return self

  def __exit__(self, *_):
    self.patch.undo()


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
  """An undisturbed run: data_dir, sampler, compilations of the matting."""
  path = tmp_path_factory.mktemp("whole")
  before = matting._canvases._cache_size()
  with _Made() as made:
    assert generate(*words, f"--data_dir={path}") == 0
  assert len(made) == 1
  return path, made[0], matting._canvases._cache_size() - before


def _raw(data_dir):
  held = shards.load(data_dir, verify=True)
  return [held.raw(i) for i in range(len(held))]


def _folder(data_dir):
  return data_dir / "geneperson" / "1.0.0"


def _manifest(data_dir):
  return json.loads((_folder(data_dir) / "manifest.json").read_text())


def test_one_program_of_each_kind_draws_everything(whole):
  """Backgrounds with no ControlNet, and the last batch, which is short."""
  _, sampler, mattings = whole
  chunks = _chunks(sampler)
  # These prompts are long; those of backgrounds are not.
  text = len({*chunks, 1})
  assert sampler.traces == {
    "encode": text,
    "begin": 1,
    "denoise": text,
    "decode": 1,
  }
  assert mattings == 1


def _chunks(sampler):
  """Returns the chunks of the people of `whole`, and of who fills the last."""
  people = prompts.People(0)
  return networks.chunks_of(
    sampler.components,
    [people[pid].prompt() for pid in range(_COUNT + 1)],
    negative=prompts.NEGATIVE,
    long="chunk",
  )


def test_the_dataset(whole):
  path, _, _ = whole
  held = shards.load(path)
  people, bank = prompts.People(0), pose_bank.default_bank()
  assert held.pids.tolist() == np.repeat(range(_COUNT), 3).tolist()
  pictures = [held.record(i) for i in range(len(held))]
  for record in pictures:
    person = people[record["pid"]]
    assert record["image"].shape == (32, 16, 3)
    assert record["image"].std() > 10  # Something was drawn.
    assert record["prompt"] == person.prompt()
    pose = bank.numbered(record["pose"])
    assert (pose.view, pose.activity) == (
      record["view"],
      person.words["activity"].split()[0],
    )
  told = _manifest(path)
  assert (told["cells"], told["images"]) == (4 * _COUNT, 3 * _COUNT)
  assert told["dropped"] == {"cap": _COUNT}
  assert told["networks"]["u2net"] == "u2net.safetensors"
  assert told["networks"]["lora_style"] == "style.safetensors"
  assert told["config"]["loras"]["style"]["scale"] == 0.5
  assert {len(x) for x in told["config"]["models"].values()} == {64, 2}
  assert len(set(told["seeds"].values())) == _COUNT
  assert str(path) not in json.dumps(told["config"])


def test_the_backgrounds(whole):
  path, _, _ = whole
  people = prompts.People(0)
  lights = {people[pid].lighting for pid in range(_COUNT)}
  (folder,) = (path / "geneperson_backgrounds").iterdir()
  files = sorted(folder.glob("*.png"))
  assert len(files) == 2 * len(lights)
  found = [np.asarray(PIL.Image.open(file)) for file in files]
  assert {picture.shape for picture in found} == {(64, 32, 3)}
  assert len({picture.tobytes() for picture in found}) == len(files)


def test_each_part_does_its_own(whole, places):
  """Every picture anew from the parts, with no maker and no pool between."""
  path, sampler, _ = whole
  layout = canvas.Layout(rows=2, cols=2, cell=(32, 16), multiple=4)
  common = {"steps": 2, "guidance": 7.0}
  (folder,) = (path / "geneperson_backgrounds").iterdir()
  noise = np.random.default_rng(0).integers(0, 256, (2, 64, 32, 3), np.uint8)
  people, grounds = prompts.People(0), {}
  lights = sorted({people[pid].lighting for pid in range(_COUNT)})
  for light in lights:
    where = prompts.places(light)
    drawn = sampler.sample(
      [prompts.background(place, light) for place in where[:2]],
      seeds=[identity.seed_of("background", 0, light, n) for n in (0, 1)],
      negative_prompts=prompts.NEGATIVE_BACKGROUND,
      control_images=[noise, noise[0]],  # Not looked at.
      control_scales=0,
      **common,
    )
    stem = light.replace(", ", "-").replace(" ", "-")
    for n, picture in enumerate(np.asarray(drawn)):
      (file,) = folder.glob(f"{stem}-{n:05d}-*.png")
      np.testing.assert_array_equal(np.asarray(PIL.Image.open(file)), picture)
      grounds[light, where[n]] = picture
  held, bank = shards.load(path), pose_bank.default_bank()
  mattes = matting.load(places["models.u2net"], size=(32, 32), min_peak=0.0)
  # The last one, and who would follow, unless that prompt has other chunks.
  counts, person = _chunks(sampler), people[4]
  pids = (4, 5) if counts[4] == counts[5] else (4, 4)
  skeletons = []
  for pid in pids:
    chosen = bank.choose(
      4,
      seed=0,
      pid=pid,
      body=people[pid].words["body"],
      activity=people[pid].words["activity"],
    )
    figures = [pose.fit((32, 16), fill=0.8) for pose in chosen]
    skeletons.append(canvas.skeleton_map(figures, layout))
  drawn = sampler.sample(
    [people[pid].prompt() for pid in pids],
    seeds=[identity.seed_of("canvas", 0, pid) for pid in pids],
    negative_prompts=prompts.NEGATIVE,
    control_images=[
      np.stack(skeletons),
      canvas.line_map(canvas.grid_map(layout)),
    ],
    control_scales=[0.9, 0.4],
    **common,
  )
  cells = canvas.cut(np.asarray(drawn)[0], layout)
  alpha = mattes(cells).alpha
  some = [held.record(i) for i in np.flatnonzero(held.pids == 4)]
  assert len(some) == 3
  for record in some:
    i = record["cell"]
    rng = np.random.default_rng([0, backgrounds._STREAM, 4, i])
    rng.integers(2)  # Which of the pool.
    ground = grounds[person.lighting, record["background"]]
    ground = compose.crop(ground, (32, 16), rng=rng)
    fused = compose.fuse(cells[i], alpha[i], background=ground)
    jpeg = images.encode_jpeg(fused, quality=95)
    np.testing.assert_array_equal(record["image"], images.decode(jpeg, name=""))


def test_the_lora_is_merged(whole, places):
  _, plain = diffusers_folder.unet(places["models.base"])
  merged = trees.flatten(whole[1].components.params["unet"])
  changed = [
    name
    for name, value in trees.flatten(plain).items()
    if not np.array_equal(value, merged[name])
  ]
  assert len(changed) == 1 and "to_k" in changed[0]


def test_run_again_it_reads_no_network(whole, words, capsys, monkeypatch):
  path, _, _ = whole
  monkeypatch.setattr(sampler_lib, "Sampler", None)
  monkeypatch.setattr(networks, "chunks", None)  # Nor any prompt.
  monkeypatch.setattr(prompts, "People", None)
  assert generate(*words, f"--data_dir={path}") == 0
  assert "is finished, nobody was left to make" in capsys.readouterr().out


def _start(words, data_dir):
  return subprocess.Popen(
    [
      *(sys.executable, str(_ROOT / "launch/generate.py"), *words),
      f"--data_dir={data_dir}",
    ],
    cwd=data_dir,
    env=os.environ | {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_killed_at_any_moment_nothing_is_lost_or_made_twice(
  whole, places, words, tmp_path
):
  """kill -9 among the backgrounds, then among the people; then to the end.

  In two stripes, the second of which has its networks elsewhere.
  """
  rng = random.Random(time.time_ns())
  first, second = [[*words, f"--shard={i}/2"] for i in (0, 1)]
  pictures = lambda: len(list(tmp_path.glob("geneperson_backgrounds/*/*.png")))
  journal = tmp_path / "geneperson/1.0.0.parts/stripe-00000-of-00002.journal"
  lines = lambda: journal.read_bytes().count(b"\n") if journal.exists() else 0
  for count, enough in ((pictures, rng.randint(1, 5)), (lines, 1)):
    process = _start(first, tmp_path)
    deadline = time.monotonic() + 200
    while count() < enough and process.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), out + err
  base = tmp_path / "elsewhere"
  shutil.copytree(places["models.base"], base)
  second += [f"--config.models.base={base}", "--config.run.num_threads=1"]
  assert generate(*second, f"--data_dir={tmp_path}", "--sheet_every=0") == 0
  assert generate(*first, f"--data_dir={tmp_path}") == 0
  assert sorted(_raw(tmp_path)) == sorted(_raw(whole[0]))
  for key in ("fingerprint", "seeds", "prompts", "dropped", "config"):
    assert _manifest(tmp_path)[key] == _manifest(whole[0])[key]


def _mistake(capsys, *words):
  capsys.readouterr()
  assert generate(*words) == 2
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1].startswith("error: "), lines
  assert not any("Traceback" in line for line in lines)
  return lines[-1]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    # Networks.
    (["models.base={tmp}/no"], r"config\.models\.base: .*no does not exist"),
    (["models.base={tmp}"], r"config\.models.*model_index\.json"),
    (["models.base={pose}"], r"config\.models.*ControlNetModel"),
    (["models.base="], r"models\.base is empty"),
    (["models.pose_controlnet={tmp}/no"], r"pose_controlnet: .*not exist"),
    (["models.u2net={tmp}/u2net.pth"], r"models\.u2net: .*does not exist"),
    (["models.u2net={style}"], r"models\.u2net: .*is no U2-Net"),
    (["models.u2net="], r"models\.u2net is empty"),
    (["loras.style={tmp}/no.safetensors"], r"loras\.style: .*not exist"),
    (["loras.style={u2net}"], r"u2net\.safetensors matches no module"),
    (["prompt.vocabulary={tmp}/no.json"], "no.json cannot be read"),
    (["poses.openpose={tmp}"], "holds no .json file"),
    # Prompts.
    (["prompt.long=error"], r"pid 0 \(and \d+ more\): .*over the .*truncate"),
    (["prompt.long=cut"], r"prompt\.long=cut: choose error, truncate"),
    (["prompt.min_chunks=0"], r"prompt\.min_chunks=0: must be at least 1"),
    (
      ["prompt.min_chunks=2", "prompt.long=truncate"],
      r"min_chunks=2: does nothing with --config\.prompt\.long=truncate",
    ),
    (["canvas.rows=99999999999999999999"], r"canvas\.rows=9+: give a whole"),
    (["canvas.canny=5,3"], "low threshold first"),
    (["matting.size=99999999999,3"], r"matting\.size=.*height and width"),
    (["rules.min_area=2"], r"rules\.min_area=2\.0: give a number of at most 1"),
    (
      ["rules.min_area=0.7", "rules.max_area=0.1"],
      "every cell would be dropped",
    ),
    (["sampler.guidance=1e300"], r"sampler\.guidance=1e\+300"),
    (["control.pose_scale=1e300"], r"control\.pose_scale=1e\+300"),
    (["sampler.guidance_rescale=2"], "from 0 to 1"),
    (["loras.style_scale=1e300"], r"loras\.style_scale=1e\+300"),
    (["tries=0"], "tries=0: give a whole number"),
    (["min_images=0"], "min_images=0: give a whole number"),
    (["prompt.template={{gender}} {{shoes}}"], "shoes} is no attribute"),
    # Canvas.
    (["canvas.cell=30,16", "canvas.multiple=8"], "60 pixels high.*multiple"),
    (["canvas.cell=32,16,8"], r"canvas\.cell=\(32, 16, 8\): give height"),
    (["canvas.rows=0"], "give a whole number from 1"),
    (
      ["canvas.cell=31,16", "canvas.multiple=1", "canvas.rows=1"],
      "config.canv",
    ),
    (["backgrounds.size=16,16"], "smaller than a cell"),
    (["poses.fill=1.4"], r"poses\.fill: .*off the"),
    (["poses.fill=0"], r"poses\.fill: fill 0: must be above 0"),
    (["matting.size=0,0"], r"matting\.size=\(0, 0\): give height and width"),
    (["matting.size=0,48"], r"matting\.size=\(0, 48\): give height and width"),
    # Numbers.
    (["sampler.steps=0"], "steps=0: give a whole number"),
    (["sampler.steps=2000"], r"config\.sampler: "),
    (["sampler.scheduler=heun"], "heun.*choose one of"),
    (["sampler.dtype=float8"], r"sampler\.dtype=float8"),
    (["control.pose_range=0.5,0.1"], r"pose_range: .*0 <= start < end <= 1"),
    (["control.pose_range=0.01,0.02"], "pose_range=.*would never run"),
    (["prompt.template=a person"], "has no placeholder"),
    (["prompt.vocabulary=nope.json"], "nope.json cannot be read .*give a voc"),
    (["run.batch_size=0"], r"run\.batch_size=0"),
    (["run.num_threads=-1"], r"run\.num_threads=-1: give a whole number"),
    (["sampler.guidance_rescale=-1"], r"guidance_rescale=-1\.0: give a number"),
    (["canvas.line_width=-2"], r"canvas\.line_width=-2: give a whole number"),
    (["canvas.canny=100,1020"], r"canvas\.canny=\(100, 1020\): finds no edge"),
    (["canvas.line_width=16"], r"canvas: line_width=16: lines must be narrow"),
    (["poses.fill=nan"], r"config\.poses\.fill=nan: must be a finite number"),
    (["sampler.guidance=nan"], r"sampler\.guidance=nan: must be a finite"),
    (["rules.min_area=nan"], r"rules\.min_area=nan: must be a finite"),
    (["control.grid_range=0.0,1e999"], r"control\.grid_range=inf: must be"),
    (["rules.min_areas=0"], r"did you mean --config\.rules\.min_area"),
  ],
)
def test_mistakes_leave_nothing_behind(
  words, places, tmp_path, capsys, flags, message
):
  data_dir = tmp_path / "data"
  names = {
    "tmp": tmp_path,
    "base": places["models.base"],
    "pose": places["models.pose_controlnet"],
    "style": places["loras.style"],
    "u2net": places["models.u2net"],
  }
  flags = [f"--config.{flag}".format(**names) for flag in flags]
  keys = tuple(flag.split("=")[0] + "=" for flag in flags)
  kept = [word for word in words if not word.startswith(keys)]
  error = _mistake(capsys, *kept, *flags, f"--data_dir={data_dir}")
  assert re.search(message, error), error
  assert not data_dir.exists()


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("quality=0", "quality=0: JPEG knows 1 to 100"),
    ("prompt.clip_skip=99", r"clip_skip=99: must be 0 to 1 for these"),
    ("prompt.clip_skip=-1", r"clip_skip=-1: must be 0 to 1 for these"),
    ("prompt.pooled=frist", r"prompt: pooled=frist: choose one of first, last"),
    ("models.grid_controlnet={pose}", "is no union: give two"),
    ("models.grid_controlnet={base}/vae", r"config\.models: .*vae"),
  ],
)
def test_what_no_weight_tells_is_found_before_they_are_read(
  words, places, tmp_path, capsys, monkeypatch, flag, message
):
  monkeypatch.setattr(networks, "load", lambda *_: pytest.fail("weights read"))
  paths = {
    "base": places["models.base"],
    "pose": places["models.pose_controlnet"],
  }
  flag = f"--config.{flag.format(**paths)}"
  error = _mistake(capsys, *words, flag, f"--data_dir={tmp_path / 'data'}")
  assert re.search(message, error), error
  assert not (tmp_path / "data").exists()


def _config(places, **models):
  """Returns the paper's configuration of the small networks, and their places.

  Args:
    places: of the fixture.
    **models: other ones; "" leaves one out.
  """
  config = cli.load_config("geneperson.py").to_dict()
  given = places | {f"models.{key}": str(at) for key, at in models.items()}
  for key, spec in given.items():
    group, name = key.split(".")
    config[group][name] = spec
  return config, {key: pathlib.Path(at) for key, at in given.items() if at}


def test_what_a_controlnet_is_shown_is_another_dataset(places, tmp_path):
  """One net for the skeletons, for the grid, for both at once, and twice."""
  net = places["models.pose_controlnet"]
  copy = shutil.copytree(net, tmp_path / "copy")
  other = places["models.grid_controlnet"]
  told = []
  for pose, grid in (
    *((net, ""), ("", net), (net, net), (net, copy)),
    *((net, other), (other, net), ("", "")),
  ):
    config, found = _config(places, pose_controlnet=pose, grid_controlnet=grid)
    digests = networks.digests(config, found)
    told.append(generation._told(config, digests, {}))
  assert told[4]["models"]["controls"].keys() == {"pose", "grid"}
  assert len({store.fingerprint(one) for one in told}) == len(told)
  grounds = [generation._told_of_backgrounds(one) for one in told]
  assert len({store.fingerprint(one) for one in grounds}) == 1


def test_backgrounds_depend_on_no_matting_and_no_rule(places):
  def grounds(**changes):
    config, found = _config(places)
    for key, value in changes.items():
      group, name = key.split("__")
      config[group][name] = value
    digests = networks.digests(config, found)
    if config["models"]["u2net"] == "another":
      digests["u2net"] = {"name": "another", "sha256": "0" * 64}
    told = generation._told(config, digests, generation._dtypes(config))
    return store.fingerprint(generation._told_of_backgrounds(told))

  for change in (
    {"matting__dtype": "bfloat16"},
    {"matting__size": (64, 64)},
    {"matting__decontaminate": True},
    {"models__u2net": "another"},
    {"rules__min_area": 0.2},
    {"control__pose_scale": 0.5},
    {"run__batch_size": 3},
    {"prompt__negative": "a crowd"},
  ):
    assert grounds(**change) == grounds(), change
  for change in (
    {"sampler__dtype": "bfloat16"},
    {"sampler__vae_dtype": "bfloat16"},
    {"sampler__steps": 4},
    {"prompt__min_chunks": 2},
    {"backgrounds__negative": "a crowd"},
  ):
    assert grounds(**change) != grounds(), change


def test_without_further_tries_a_dataset_is_as_before_there_were_any(places):
  config, found = _config(places)
  digests = networks.digests(config, found)
  told = generation._told(config, digests, {})
  assert (told["tries"], told["min_images"]) == (3, 4)
  told = generation._told(config | {"tries": 1}, digests, {})
  assert not {"tries", "min_images"} & told.keys()


@pytest.fixture(scope="module")
def parts(places):
  """The small networks' base without its weights."""
  return networks.base(*_config(places))


def test_chunks_are_a_prompts_own(parts):
  long = ", ".join(["a woman in a red coat, front view"] * 12)
  longer = ", ".join([long] * 2)
  count = lambda texts, long="chunk", negative="", least=1: networks.chunks_of(
    parts, texts, negative=negative, long=long, least=least
  )
  one, two, more = count(["a man", long, longer])
  assert one == 1 < two < more
  assert [count([text]) for text in ("a man", long)] == [[one], [two]]
  assert count(["a man", longer], negative=long) == [two, more]
  assert count(["a man", longer], least=two) == [two, more]
  assert count(["a man", long], long="truncate") == [1, 1]
  assert count(["a man", long], long="error") == [1, 0]


def test_a_group_is_drawn_for_each_number_of_chunks(places, parts):
  """By `_draws`: everybody's picture is that of its own number of chunks."""
  long = ", ".join(["a woman in a red coat, front view"] * 12)
  texts = ["a man", long, "a woman"]
  calls = []

  class Sampler:
    def sample(self, texts, *, seeds, control_images, min_chunks, **options):
      calls.append((texts, seeds, control_images[0][:, 0, 0, 0].tolist()))
      shade = np.array(seeds, np.uint8)[:, None, None, None]
      return np.full((3, 2, 2, 3), 10 * min_chunks, np.uint8) + shade

  config, _ = _config(places)
  config["backgrounds"]["size"] = (2, 2)
  config["run"]["batch_size"] = 3
  draw, draw_ground = generation._draws(
    Sampler(),
    config,
    networks.Networks(parts, None, lambda a, b: [a, b], [], ("pose", "grid")),
    canvas.Layout(rows=1, cols=1, cell=(2, 2), multiple=2),
  )
  (two,) = networks.chunks_of(
    parts, [long], negative=config["prompt"]["negative"], long="chunk"
  )
  skeletons = np.arange(3, dtype=np.uint8)[:, None, None, None]
  drawn = draw(
    texts,
    [1, 2, 3],
    skeletons=np.broadcast_to(skeletons, (3, 2, 2, 3)),
    grid=np.zeros((2, 2, 3), np.uint8),
  )
  assert calls == [
    (["a man", "a man", "a woman"], [1, 1, 3], [0, 0, 2]),
    ([long] * 3, [2, 2, 2], [1, 1, 1]),
  ]
  assert np.asarray(drawn)[:, 0, 0, 0].tolist() == [11, 10 * two + 2, 13]
  calls.clear()
  drawn = draw_ground(texts, [1, 2, 3])
  assert np.asarray(drawn)[:, 0, 0, 0].tolist() == [11, 10 * two + 2, 13]
  assert len(calls) == 2


def test_a_networks_name_is_what_the_user_called_it(places, tmp_path):
  """A hub's folder has the name of a commit."""
  snapshot = tmp_path / "snapshots" / "0123abcd"
  shutil.copytree(places["models.base"], snapshot)
  config, found = _config(places, base="owner/sdxl")
  found["models.base"] = snapshot
  given = networks.digests(config, found)
  names = {role: one["name"] for role, one in given.items()}
  assert names == {
    "base": "sdxl",
    "control_pose": "pose",
    "control_grid": "grid",
    "u2net": "u2net.safetensors",
    "lora_style": "style.safetensors",
  }


def test_a_folders_own_karras_sigmas_hold(places, tmp_path):
  base = shutil.copytree(places["models.base"], tmp_path / "base")
  file = base / "scheduler" / "scheduler_config.json"
  given = json.loads(file.read_text()) | {"use_karras_sigmas": True}
  file.write_text(json.dumps(given))
  config, found = _config(places, base=base)
  for scheduler, asked, holds in (
    *(("", False, True), ("euler", False, False), ("euler", True, True)),
    ("euler_ancestral", False, False),
  ):
    config["sampler"] |= {
      "scheduler": scheduler, "k_diffusion": False, "karras": asked
    }  # fmt: skip
    assert networks.base(config, found).scheduler.karras == holds


def test_spacing_is_the_folders_own_or_as_asked_for(places):
  config, found = _config(places)
  config["sampler"] |= {"scheduler": "dpmpp_2m", "k_diffusion": False}
  spacing = lambda: networks.base(config, found).scheduler.timestep_spacing
  own = spacing()
  config["sampler"]["spacing"] = "quadratic"
  assert spacing() == "quadratic" != own
  config["sampler"]["k_diffusion"] = True
  with pytest.raises(errors.UserError, match=r"spacing=quadratic.*k_diffusion"):
    spacing()


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("seed=1", "seed is 0 there and 1 here"),
    ("num_identities=6", "num_identities is 5 there and 6 here"),
    ("sampler.steps=3", r"sampler\.steps is 2 there and 3 here"),
    ("loras.style_scale=0.6", r"style\.scale is 0\.5 there and 0\.6 here"),
    ("loras.style=", r"loras\.style is \{.*there and None here"),
    ("models.grid_controlnet=", r"models\.controls\.grid is '.*None here"),
    ("rules.min_area=0.1", r"rules\.min_area is -1\.0 there and 0\.1 here"),
    ("sampler.dtype=bfloat16", r"dtypes\.sampler\.dtype is 'float32'"),
  ],
)
def test_another_configuration_is_refused(whole, words, capsys, flag, message):
  path = whole[0]
  before = sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*"))
  # Without a network its scale would do nothing.
  idle = {
    "loras.style=": "--config.loras.style_scale",
    "models.grid_controlnet=": "--config.control.grid_scale",
  }.get(flag)
  kept = [word for word in words if word.partition("=")[0] != idle]
  error = _mistake(capsys, *kept, f"--config.{flag}", f"--data_dir={path}")
  assert "another configuration" in error and re.search(message, error), error
  assert before == sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*"))


def test_long_prompts(places, capsys):
  config = cli.load_config("geneperson.py").to_dict()
  found = {key: pathlib.Path(path) for key, path in places.items()}
  parts = networks.base(config, found)
  people = prompts.People(0)
  texts = {f"pid {pid}": people[pid].prompt() for pid in range(20)}
  longest = max(
    len(tokenizer(text)["input_ids"])
    for tokenizer in parts.tokenizers
    for text in texts.values()
  )
  assert longest > 77  # The vocabulary of these networks is small.
  assert networks.chunks(parts, texts, "chunk", 1) == 2
  assert networks.chunks(parts, texts, "chunk", 3) == 3
  assert networks.chunks(parts, {"pid 0": "a man"}, "error", 1) == 1
  with pytest.raises(errors.UserError, match=r"pid \d+ \(and \d+ more\): a pr"):
    networks.chunks(parts, texts, "error", 1)
  capsys.readouterr()
  assert networks.chunks(parts, texts, "truncate", 1) == 1
  said = capsys.readouterr().err
  assert re.search(r"\d+ of 20 prompts are cut at 77 tokens, first", said)


def test_a_small_network_that_is_not_shipped_is_named(tmp_path, capsys):
  gone = f"{generation._MINI}/controlnet-depth"
  error = _mistake(
    capsys,
    f"--data_dir={tmp_path / 'data'}",
    f"--config.models.pose_controlnet={gone}",
  )
  assert f"{gone} is missing" in error
  assert "--config configs/geneperson.py:paperdoll" in error
  assert not (tmp_path / "data").exists()


def test_the_presets_are_complete():
  paper = cli.load_config("geneperson.py").to_dict()
  assert paper["canvas"]["rows"] * paper["canvas"]["cols"] == 42
  assert (paper["num_identities"], paper["cap"]) == (6641, 20)
  mini = cli.load_config("geneperson.py:mini").to_dict()
  assert mini.keys() == paper.keys()
  for key, group in paper.items():
    if isinstance(group, dict):
      assert mini[key].keys() == group.keys()
  assert mini["image_size"] == mini["canvas"]["cell"] == (96, 48)
  assert jax.default_backend() == "cpu"
