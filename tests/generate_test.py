"""launch/generate.py and data_tools/inspect_shards.py as a user runs them."""

import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from dppp_jax import cli
from dppp_jax.data import images, shards
from dppp_jax.geneperson import dataset
from dppp_jax.paperdoll import world

_ROOT = pathlib.Path(cli.__file__).parents[1]
_DOLLS = "--config=configs/geneperson.py:paperdoll"
_SMALL = (
  "--config.num_identities=3",
  "--config.cells=4",
  "--config.image_size=32,16",
)


def _module(place):
  spec = importlib.util.spec_from_file_location("launcher", _ROOT / place)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _call(place, *words, **kwargs):
  """Runs a launcher in this process and returns its exit code."""
  module = _module(place)
  with pytest.raises(SystemExit) as info:
    cli.run(
      module.main,
      define_flags=module.define_flags,
      argv=[place, *words],
      **kwargs,
    )
  return info.value.code or 0


def generate(*words):
  return _call(
    "launch/generate.py",
    "--num_processes=0",
    *words,
    config="geneperson.py:paperdoll",
  )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """What the real command makes, with two drawing processes."""
  path = tmp_path_factory.mktemp("generate")
  command = [sys.executable, str(_ROOT / "launch/generate.py")]
  command += ["--config", "configs/geneperson.py:paperdoll"]
  done = subprocess.run(
    [*command, *_SMALL, "--data_dir", str(path), "--num_processes=2"],
    cwd=path,  # Not the root: the config is found all the same.
    env=os.environ | {"PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "finished, 3 people made in this run" in done.stdout
  assert "load it: tfds.load('geneperson', split='train', data" in done.stdout
  return path


def test_the_pictures_are_the_dolls(data_dir):
  held = shards.load(data_dir, verify=True)
  assert held.pids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
  drawn = [
    record
    for pid in range(3)
    for record in world.make_identity(
      pid, seed=0, size=(32, 16), cells=4, person_light=0.8
    )
  ]
  for i, wanted in enumerate(drawn):
    record = held.record(i)
    jpeg = images.encode_jpeg(wanted.pop("image"), quality=95)
    image = images.decode(jpeg, name="")
    np.testing.assert_array_equal(record.pop("image"), image)
    assert record == wanted
  # Every word that dolls are described by has a place in the dataset.
  assert set(drawn[0]["attributes"]) == set(dataset.ATTRIBUTES)


def test_the_manifest_says_that_they_are_drawn(data_dir):
  path = data_dir / "geneperson" / "1.0.0" / "manifest.json"
  manifest = json.loads(path.read_text())
  assert "drawn" in manifest["source"]
  assert "not photographed" in manifest["source"]
  assert manifest["seed"] == 0 and manifest["images"] == 12
  assert manifest["config"]["maker"] == "paperdoll"
  assert sorted(manifest["prompts"]) == ["0", "1", "2"]


def test_in_one_process_and_in_stripes_the_same_people(data_dir, tmp_path):
  for shard in ("1/2", "0/2"):
    words = (f"--data_dir={tmp_path}", f"--shard={shard}", *_SMALL)
    assert generate(*words) == 0
  one, two = shards.load(data_dir), shards.load(tmp_path)
  assert sorted(one.raw(i) for i in range(12)) == sorted(
    two.raw(i) for i in range(12)
  )


def test_run_again_it_says_so(data_dir, capsys):
  assert generate(f"--data_dir={data_dir}", *_SMALL) == 0
  assert "is finished, nobody was left to make" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--config.num_identities=4"], "num_identities is 3 there and 4 here"),
    (["--config.seed=1"], "seed is 0 there and 1 here"),
    (["--config.quality=50"], "quality is 95 there and 50 here"),
    (["--config.person_light=0.5"], "person_light is 0.8 there and 0.5 here"),
    (["--config.seed=-1"], "seed=-1"),
    (["--config.cells=0"], "cells=0"),
    (["--config.person_light=1.5"], "person_light=1.5: give a number from 0"),
    (["--sheet_every=-1"], "sheet_every"),
    (["--data_dir="], "--data_dir=: is empty: give a path"),
    (["--config.maker=diffusion"], "this preset is of the other maker"),
    (["--config.num_identities=0"], "num_identities=0"),
    (["--config.cap=0"], "cap=0"),
    (["--config.quality=101"], "quality=101"),
    (["--config.image_size=32"], "image_size=.*height,width"),
    (["--config.image_size=2,1"], "image_size=.*8 pixels or more"),
    (["--config.maker=photographs"], "maker=photographs.*paperdoll, diffusion"),
    (["--config.sed=1"], "did you mean --config.seed"),
    (["--shard=2/2"], "--shard 2/2: write i/N"),
    (["--num_processes=-1"], "num_processes"),
    (["--config=configs/geneperson.py:dolls"], "no such preset"),
    (["--config=geneperson.yaml"], "geneperson.yaml: no such file"),
    (["data"], "unexpected word 'data'"),
  ],
)
def test_mistakes(data_dir, capsys, words, message):
  before = sorted((p, p.stat().st_mtime_ns) for p in data_dir.rglob("*"))
  assert generate(f"--data_dir={data_dir}", *_SMALL, *words) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and err.count("\n") == 1, err
  assert re.search(message, err), err
  after = sorted((p, p.stat().st_mtime_ns) for p in data_dir.rglob("*"))
  assert after == before


def test_ctrl_c_on_a_terminal_reaches_all_and_is_answered_once(tmp_path):
  """Right at the start, when the drawing processes still import."""
  command = [sys.executable, str(_ROOT / "launch/generate.py"), _DOLLS]
  command += _SMALL
  process = subprocess.Popen(
    [*command, f"--data_dir={tmp_path}", "--num_processes=2"],
    env=os.environ | {"PYTHONPATH": str(_ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  children = pathlib.Path(f"/proc/{process.pid}/task")
  born = lambda: sum(
    len(task.read_text().split()) for task in children.glob("*/children")
  )
  if not list(children.glob("*/children")):
    process.kill()
    pytest.skip("this system does not list the children of a process")
  _wait_until(lambda: born() >= 3)  # Two, and multiprocessing's own tracker.
  os.killpg(process.pid, signal.SIGINT)
  out, err = process.communicate()
  assert "Traceback" not in err
  assert (process.returncode, "run the same command again" in out) in [
    (130, True),
    (0, False),  # All three were drawn already.
  ], err


def test_a_killed_parent_leaves_no_one_behind(tmp_path):
  """kill -9 of the launcher: its drawing processes end by themselves."""
  command = [sys.executable, str(_ROOT / "launch/generate.py"), _DOLLS]
  command += ["--config.num_identities=500", "--config.image_size=32,16"]
  process = subprocess.Popen(
    [*command, f"--data_dir={tmp_path}", "--num_processes=1"],
    env=os.environ | {"PYTHONPATH": str(_ROOT)},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  if not children.exists():
    process.kill()
    pytest.skip("this system does not list the children of a process")
  parts = tmp_path / "geneperson" / "1.0.0.parts"
  journals = lambda: sum(p.stat().st_size for p in parts.glob("*.journal"))
  _wait_until(lambda: journals() > 0)
  tasks = list(children.parent.parent.glob("*/children"))
  workers = [pid for task in tasks for pid in task.read_text().split()]
  assert workers
  process.send_signal(signal.SIGKILL)
  process.wait()
  alive = lambda pid: (
    pathlib.Path(f"/proc/{pid}").exists()
    and (pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z")
  )
  _wait_until(lambda: not any(alive(pid) for pid in workers))


def _wait_until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "nothing happened"
    time.sleep(0.05)


def inspect(*words):
  return _call("data_tools/inspect_shards.py", *words)


def test_inspection(data_dir, tmp_path, capsys):
  sheet = tmp_path / "sheet.png"
  words = (f"--data_dir={data_dir}", f"--sheet={sheet}", "--rows=2")
  assert inspect(*words) == 0
  out = capsys.readouterr().out
  assert "every CRC is right" in out
  assert "12 pictures of 3 people, 4 to 4 of each" in out
  genders = [
    next(world.make_identity(pid, seed=0, cells=1))["attributes"]["gender"]
    for pid in range(3)
  ]
  share = genders.count("woman") / 3
  assert re.search(rf"gender .*woman {share:.1%}", out) or not share
  assert np.asarray(PIL.Image.open(sheet)).shape == (2 * 32, 4 * 16, 3)


def test_inspection_of_nothing(tmp_path, capsys):
  assert inspect(f"--data_dir={tmp_path}") == 2
  assert "no such dataset: run `python launch" in capsys.readouterr().err


def test_inspection_with_nowhere_to_draw(data_dir, tmp_path, capsys):
  sheet = tmp_path / "no" / "sheet.png"
  assert inspect(f"--data_dir={data_dir}", f"--sheet={sheet}") == 2
  assert "name a .png" in capsys.readouterr().err
