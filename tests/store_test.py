"""Nothing lost, nothing twice: the store against kills and full disks."""

import errno
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.data import shards
from dppp_jax.geneperson import dataset, disk, pipeline
from dppp_jax.geneperson import store as store_lib

_SIZE = (16, 8)
_TESTS = str(pathlib.Path(__file__).parent)
_ENV = os.environ | {"PYTHONPATH": str(pathlib.Path(_TESTS).parent)}
_WORDS = {"gender": "woman", "upper_color": "red", "hat": "none"}


def make_identity(pid, cells=4):
  """A stub for the drawers of people: noise that depends on the pid alone."""
  rng = np.random.default_rng(pid)
  return [
    {
      "image": rng.integers(0, 256, (*_SIZE, 3), np.uint8),
      "pid": pid,
      "cell": cell,
      "pose": int(rng.integers(9)),
      "view": dataset.VIEWS[cell % 3],
      "lighting": "dusk" if cell % 2 else "day",
      "background": "street",
      "prompt": f"person {pid}",
      "attributes": _WORDS,
    }
    for cell in range(cells)
  ]


def run(data_dir, *, make=make_identity, num_identities=6, **kwargs):
  defaults = {
    "seed": 0,
    "image_size": _SIZE,
    "source": "noise",
    "config": {"cells": 4},
    "sheet_every": 0,
  }
  return pipeline.run(
    make,
    data_dir=data_dir,
    num_identities=num_identities,
    **(defaults | kwargs),
  )


def contents(data_dir):
  """The bytes of every file of a finished dataset."""
  folder = pathlib.Path(data_dir) / "geneperson" / "1.0.0"
  files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
  # Somebody may commit while the tests run.
  manifest = re.sub(rb'"commit": .*', b"", files["manifest.json"])
  return files | {"manifest.json": manifest}


def manifest_of(data_dir):
  folder = pathlib.Path(data_dir) / "geneperson" / "1.0.0"
  return json.loads((folder / "manifest.json").read_text())


def identities(data_dir):
  """{pid: cells in the order of the shards}."""
  held = shards.load(data_dir, verify=True)
  found = {}
  for i in range(len(held)):
    record = held.record(i)
    found.setdefault(record["pid"], []).append(record["cell"])
  return found


# A process that a test may kill: `worker DATA_DIR COUNT SECONDS SHARD`.
_WORKER = """
import sys, time
sys.path.insert(0, {tests!r})
import store_test
from dppp_jax.geneperson import store as store_lib

def make(pid):
  time.sleep(float(sys.argv[3]))
  return store_test.make_identity(pid)

outcome = store_test.run(
  sys.argv[1], make=make, num_identities=int(sys.argv[2]),
  shard=store_lib.parse_shard(sys.argv[4]))
print("finished" if outcome.finished else "waiting", outcome.made)
sys.exit(outcome.exit_code)
"""


def start(data_dir, count, seconds=0.0, shard="0/1"):
  script = _WORKER.format(tests=_TESTS)
  words = [str(data_dir), str(count), str(seconds), shard]
  return subprocess.Popen(
    [sys.executable, "-c", script, *words],
    env=_ENV,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _journal_lines(data_dir):
  parts = pathlib.Path(data_dir) / "geneperson" / "1.0.0.parts"
  return sum(p.read_bytes().count(b"\n") for p in parts.glob("*.journal"))


def _wait_for(condition, process, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "nothing happened"
    if process.poll() is not None:
      return
    time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run of 60 people that nobody disturbed."""
  data_dir = tmp_path_factory.mktemp("whole")
  outcome = run(data_dir, num_identities=60)
  assert outcome.finished and outcome.made == 60
  return data_dir


def test_an_undisturbed_run_holds_everyone_in_order(whole):
  found = identities(whole)
  assert list(found) == list(range(60))
  assert all(cells == [0, 1, 2, 3] for cells in found.values())
  names = set(contents(whole))
  assert names == {
    "dataset_info.json",
    "features.json",
    "manifest.json",
    "view.labels.txt",
    "geneperson-train.tfrecord-00000-of-00001",
    "geneperson-train.array_record-00000-of-00001",
  }
  assert not (whole / "geneperson" / "1.0.0.parts").exists()


def test_the_manifest_says_what_was_made(whole):
  manifest = manifest_of(whole)
  assert manifest["source"] == "noise" and manifest["seed"] == 0
  assert manifest["identities"] == 60 and manifest["images"] == 240
  assert manifest["images_per_view"] == {"front": 120, "side": 60, "back": 60}
  assert manifest["images_per_lighting"] == {"day": 120, "dusk": 120}
  assert manifest["prompts"]["17"] == "person 17"
  assert manifest["config"]["cells"] == 4
  assert manifest["fingerprint"] == store_lib.fingerprint(manifest["config"])
  assert manifest["versions"]["numpy"] == np.__version__


def test_kill_at_random_moments(whole, tmp_path):
  moments = random.Random(1)
  kills = 0
  for _ in range(6):
    before = _journal_lines(tmp_path)
    process = start(tmp_path, 60, 0.004)
    _wait_for(lambda n=before: _journal_lines(tmp_path) > n, process)
    time.sleep(moments.uniform(0, 0.06))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kills += process.returncode == -signal.SIGKILL
  assert kills >= 4, "the runs were over before they could be killed"
  assert 0 < _journal_lines(tmp_path) < 60
  out, _ = start(tmp_path, 60).communicate()
  assert out.startswith("finished") and int(out.split()[1]) < 60
  assert contents(tmp_path) == contents(whole)


def test_two_stripes_at_once_and_one_of_them_killed(whole, tmp_path):
  victim = start(tmp_path, 60, 0.01, "0/2")
  other = start(tmp_path, 60, 0.01, "1/2")
  _wait_for(lambda: _journal_lines(tmp_path) > 10, victim)
  victim.kill()
  victim.communicate()
  assert other.communicate()[0] == "waiting 30\n"
  out, err = start(tmp_path, 60, 0, "0/2").communicate()
  assert out.startswith("finished"), err
  found = identities(tmp_path)
  assert sorted(found) == list(range(60))
  assert all(cells == [0, 1, 2, 3] for cells in found.values())
  # The same records as one process makes, in the order of the stripes.
  assert sorted(found) == sorted(identities(whole))
  one, two = shards.load(whole), shards.load(tmp_path)
  assert sorted(one.raw(i) for i in range(240)) == sorted(
    two.raw(i) for i in range(240)
  )


def test_two_stripes_that_end_together_finalise_once(tmp_path):
  processes = [start(tmp_path, 12, 0, f"{i}/2") for i in range(2)]
  outputs = [process.communicate() for process in processes]
  assert any(out.startswith("finished") for out, _ in outputs), outputs
  assert [process.returncode for process in processes] == [0, 0]
  assert sorted(identities(tmp_path)) == list(range(12))


def test_the_second_of_two_stripes_counts_what_the_first_wrote(
  tmp_path, monkeypatch
):
  missing = store_lib.Store.missing

  def meanwhile(store):
    monkeypatch.setattr(store_lib.Store, "missing", missing)
    assert run(tmp_path, num_identities=4, shard=(1, 2)).finished
    return missing(store)

  monkeypatch.setattr(store_lib.Store, "missing", meanwhile)
  outcome = run(tmp_path, num_identities=4, shard=(0, 2))
  assert outcome.finished and outcome.made == 2
  assert (outcome.cells, outcome.images) == (16, 16)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_ends_between_two_people(whole, tmp_path, number):
  process = start(tmp_path, 60, 0.02)
  _wait_for(lambda: _journal_lines(tmp_path) >= 2, process)
  process.send_signal(number)
  out, err = process.communicate()
  assert process.returncode == 128 + number, err
  assert "Traceback" not in err
  made = int(out.split()[1])
  assert out.startswith("waiting") and made == _journal_lines(tmp_path)
  assert run(tmp_path, num_identities=60).made == 60 - made
  assert contents(tmp_path) == contents(whole)


def _half_made(data_dir, count=4, total=6):
  """A store in which a run made `count` people and was killed in the next."""

  def make(pid):
    if pid == count + 1:  # The one before it is being encoded.
      raise KeyboardInterrupt
    return make_identity(pid)

  with pytest.raises(KeyboardInterrupt):
    run(data_dir, make=make, num_identities=total)
  return data_dir / "geneperson" / "1.0.0.parts"


@pytest.mark.parametrize("cut", [1, 9, 700])
def test_torn_tails_are_cut(tmp_path, cut):
  whole, torn = tmp_path / "whole", tmp_path / "torn"
  run(whole)
  parts = _half_made(torn)
  (part,) = parts.glob("*.tfrecord")
  (journal,) = parts.glob("*.journal")
  # What a kill leaves: records without their line, half a record, half a line.
  record = shards.frame(b"x" * 800)
  with part.open("ab") as file:
    file.write(record + record[:cut])
  with journal.open("ab") as file:
    file.write(b'{"pid": 4, "part": "stri')
  outcome = run(torn)
  assert outcome.finished
  assert contents(torn) == contents(whole)


def test_a_disk_that_lied_costs_only_the_last_people(tmp_path):
  whole, torn = tmp_path / "whole", tmp_path / "torn"
  run(whole)
  parts = _half_made(torn)
  (part,) = parts.glob("*.tfrecord")
  os.truncate(part, part.stat().st_size - 5)
  outcome = run(torn)
  assert outcome.finished and outcome.made == 6 - 3
  assert contents(torn) == contents(whole)


def test_a_damaged_journal_is_named(tmp_path):
  (journal,) = _half_made(tmp_path).glob("*.journal")
  lines = journal.read_bytes().splitlines(keepends=True)
  lines[1] = lines[1].replace(b"{", b"#", 1)
  journal.write_bytes(b"".join(lines))
  with pytest.raises(errors.UserError, match=r"\.journal: line 2 is damaged"):
    run(tmp_path)


def test_parts_roll_over_and_become_shards(tmp_path):
  kwargs = {
    "config": {},
    "num_identities": 5,
    "image_size": _SIZE,
    "max_part_bytes": 2000,
  }
  spec = dataset.features(_SIZE)
  for begin, end in ((0, 2), (2, 5)):  # The second opens the first's parts.
    with store_lib.Store(tmp_path, **kwargs) as store:
      assert store.todo == list(range(begin, 5))
      for pid in range(begin, end):
        records = [pipeline._encode(r, pid, _SIZE, 95) for r in
                   make_identity(pid)]  # fmt: skip
        store.append(pid, [dataset.serialize(r, spec) for r in records], {})
      if end == 5:
        store.finalize(lambda entries: {"pids": [e.pid for e in entries]})
  assert sum("tfrecord" in name for name in contents(tmp_path)) == 5
  assert identities(tmp_path) == {pid: [0, 1, 2, 3] for pid in range(5)}
  assert manifest_of(tmp_path)["pids"] == [*range(5)]


def test_an_identity_whose_cells_were_all_dropped(tmp_path):
  def make(pid):
    if pid == 1:
      return pipeline.Identity([], {"empty matte": 4})
    return pipeline.Identity(make_identity(pid), {"blur": 1})

  run(tmp_path, make=make, num_identities=3)
  manifest = manifest_of(tmp_path)
  assert manifest["identities"] == 2
  assert manifest["identities_without_images"] == 1
  assert manifest["dropped"] == {"blur": 2, "empty matte": 4}
  assert sorted(identities(tmp_path)) == [0, 2]


def test_all_dropped_everywhere_is_said(tmp_path):
  with pytest.raises(errors.UserError, match=r"every picture .* was dropped"):
    run(tmp_path, make=lambda pid: [])


def test_cap_keeps_the_same_cells_for_the_same_seed(tmp_path):
  chosen = []
  for i, seed in enumerate((3, 3, 4)):
    run(
      tmp_path / str(i),
      make=lambda pid: make_identity(pid, cells=30),
      cap=5,
      seed=seed,
    )
    chosen.append(identities(tmp_path / str(i)))
    manifest = manifest_of(tmp_path / str(i))
    assert manifest["dropped"] == {"cap": 25 * 6}
  assert chosen[0] == chosen[1] != chosen[2]
  cells = chosen[0][0]
  assert len(set(cells)) == 5 and cells == sorted(cells)
  assert chosen[0][0] != chosen[0][1]


def test_a_finished_dataset_is_left_alone(whole):
  before = contents(whole)
  outcome = run(whole, num_identities=60, make=lambda pid: pytest.fail("ran"))
  assert outcome.finished and outcome.made == 0
  assert contents(whole) == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_is_refused(tmp_path, finished):
  if finished:
    run(tmp_path)
  else:
    _half_made(tmp_path)
  before = {p: p.stat() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
  for change, message in [
    ({"config": {"cells": 5}}, "cells is 4 there and 5 here"),
    ({"seed": 1}, "seed is 0 there and 1 here"),
    ({"num_identities": 7}, "num_identities is 6 there and 7 here"),
    ({"image_size": (32, 16)}, "image_size is"),
    ({"source": "photographs"}, "source is 'noise' there"),
  ]:
    with pytest.raises(errors.UserError, match=message) as info:
      run(tmp_path, **change)
    assert "choose another --data_dir" in str(info.value)
    assert "\n" not in str(info.value)
  after = {p: p.stat() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
  same = lambda stats: {p: (s.st_size, s.st_mtime_ns) for p, s in stats.items()}
  assert same(after) == same(before)


def test_a_configuration_that_nobody_was_made_with_may_be_changed(tmp_path):
  def open_(cells):
    return store_lib.Store(
      tmp_path, config={"cells": cells}, num_identities=2, image_size=_SIZE
    )

  refused = lambda text: pytest.raises(errors.UserError, match=text)
  # Somebody may be about to make the first.
  with open_(99), refused("cells is 99 there and 4 here"):
    open_(4)
  given = {"num_identities": 2, "image_size": _SIZE}
  assert not store_lib.is_finished(tmp_path, config={"cells": 4}, **given)
  with open_(4) as store:
    store.append(0, [b"x"], {})
  with refused("cells is 4 there and 99 here"):
    open_(99)
  with refused("cells is 4 there and 99 here"):
    store_lib.is_finished(tmp_path, config={"cells": 99}, **given)


def test_a_strangers_folder_is_refused(tmp_path):
  stranger = tmp_path / "geneperson" / "1.0.0"
  stranger.mkdir(parents=True)
  (stranger / "mine.txt").write_text("dear")
  with pytest.raises(errors.UserError, match="did not write"):
    run(tmp_path)
  assert (stranger / "mine.txt").read_text() == "dear"


def test_a_file_in_the_place_of_the_data_dir(tmp_path):
  (tmp_path / "data").write_text("")
  with pytest.raises(errors.UserError, match=r"data.*cannot be written"):
    run(tmp_path / "data")


def test_a_stripe_has_one_owner(tmp_path):
  kwargs = {"config": {}, "num_identities": 4, "image_size": _SIZE}
  with store_lib.Store(tmp_path, shard=(0, 2), **kwargs):
    with pytest.raises(errors.UserError, match="stripe 0/2 is being made by"):
      store_lib.Store(tmp_path, shard=(0, 2), **kwargs)
    with pytest.raises(errors.UserError, match="other stripes than /3"):
      store_lib.Store(tmp_path, shard=(0, 3), **kwargs)
    with store_lib.Store(tmp_path, shard=(1, 2), **kwargs) as other:
      assert other.todo == [1, 3]
  with store_lib.Store(tmp_path, shard=(2, 3), **kwargs) as later:
    assert later.todo == [2]  # N may change when nobody is at work.


def test_changing_the_stripes_loses_no_one_and_cuts_their_tails(tmp_path):
  kwargs = {"num_identities": 6, "config": {"cells": 4}}
  run(tmp_path, shard=(0, 2), **kwargs)
  (part,) = (tmp_path / "geneperson/1.0.0.parts").glob("*.tfrecord")
  with part.open("ab") as file:
    file.write(b"half a rec")  # Its owner was killed and never runs again.
  outcome = run(tmp_path, **kwargs)
  assert outcome.finished and outcome.made == 3
  assert identities(tmp_path) == {pid: [0, 1, 2, 3] for pid in range(6)}


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "1/0", "1/2/3"])
def test_bad_stripes(text):
  with pytest.raises(errors.UserError, match="write i/N"):
    store_lib.parse_shard(text)


def _full(*_, **__):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", [3, 4, 5])
def test_no_space_left_while_appending(tmp_path, monkeypatch, call):
  """The n-th write stops half way: in a part, or in a journal."""
  whole = tmp_path / "whole"
  run(whole)
  real, calls = disk.write, []

  def write(file, data):
    calls.append(file)
    if len(calls) == call:
      os.write(file, data[: len(data) // 2])
      _full()
    real(file, data)

  monkeypatch.setattr(disk, "write", write)
  with pytest.raises(errors.UserError, match="no space left") as info:
    run(tmp_path / "full")
  assert "\n" not in str(info.value)
  assert "nothing that was finished is lost" in str(info.value)
  monkeypatch.undo()
  outcome = run(tmp_path / "full")
  assert outcome.made == 6 - (call - 1) // 2
  assert contents(tmp_path / "full") == contents(whole)


def test_a_store_goes_on_after_a_full_disk(tmp_path, monkeypatch):
  """What half a write left is gone before the next one."""
  spec = dataset.features(_SIZE)
  records = lambda pid: [
    dataset.serialize(pipeline._encode(record, pid, _SIZE, 95), spec)
    for record in make_identity(pid)
  ]
  kwargs = {"config": {}, "num_identities": 2, "image_size": _SIZE}
  real = disk.write
  with store_lib.Store(tmp_path, **kwargs) as store:
    for torn in (1, 2):  # The records, then the line of the journal.
      calls = []

      def write(file, data, torn=torn, calls=calls):
        calls.append(file)
        if len(calls) == torn:
          os.write(file, data[:20])
          _full()
        real(file, data)

      monkeypatch.setattr(disk, "write", write)
      with pytest.raises(errors.UserError, match="no space left"):
        store.append(0, records(0), {})
    monkeypatch.undo()
    for pid in (0, 1):
      store.append(pid, records(pid), {})
    store.finalize(lambda entries: {"pids": [e.pid for e in entries]})
  assert manifest_of(tmp_path)["pids"] == [0, 1]
  assert identities(tmp_path) == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}


@pytest.mark.parametrize(
  "where", ["link", "fsync", "rename", "write_folder", "rmtree"]
)
def test_a_crash_at_any_step_of_the_end(tmp_path, monkeypatch, where):
  whole = tmp_path / "whole"
  run(whole)
  module, name = {
    "link": (os, "link"),
    "fsync": (disk, "sync"),
    "rename": (pathlib.Path, "rename"),
    "write_folder": (dataset, "_write_metadata"),
    "rmtree": (store_lib.shutil, "rmtree"),
  }[where]
  parts = _half_made(tmp_path / "torn", count=3, total=6)
  real = getattr(module, name)

  def crash(*args, **kwargs):
    if any(".parts" in str(arg) for arg in args) and where == "fsync":
      return real(*args, **kwargs)  # Only what comes after the people.
    raise KeyboardInterrupt  # As a kill: nothing handles it.

  monkeypatch.setattr(module, name, crash)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / "torn")
  monkeypatch.undo()
  assert where == "rmtree" or parts.exists()
  assert run(tmp_path / "torn").finished
  assert contents(tmp_path / "torn") == contents(whole)
  assert not parts.exists()
  assert {p.name for p in (tmp_path / "torn/geneperson").iterdir()} == {
    "1.0.0",
    ".1.0.0.lock",
  }


def test_no_space_left_at_the_end(tmp_path, monkeypatch):
  usage = store_lib.shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    dataset.shutil, "disk_usage", lambda _: usage._replace(free=100)
  )
  with pytest.raises(errors.UserError, match=r"no space left .*MB needed"):
    run(tmp_path)
  monkeypatch.undo()
  outcome = run(tmp_path)
  assert outcome.finished and outcome.made == 0


def test_the_same_record_gives_the_same_bytes_in_every_process():
  script = f"""
import sys, hashlib
sys.path.insert(0, {_TESTS!r})
import store_test
from dppp_jax.geneperson import dataset, pipeline

record = pipeline._encode(store_test.make_identity(5)[0], 5, (16, 8), 95)
data = dataset.serialize(record, dataset.features((16, 8)))
print(hashlib.sha256(data).hexdigest())
"""
  digests = {
    subprocess.run(
      [sys.executable, "-c", script],
      env=_ENV,
      capture_output=True,
      check=True,
    ).stdout
    for _ in range(3)
  }
  assert len(digests) == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"pid": 9}, "asked for pid 0"),
    ({"image": np.zeros((8, 8, 3), np.uint8)}, "a picture of"),
    ({"view": "above"}, "above"),
    ({"attributes": {"colour": "red"}}, "colour"),
    ({"extra": 1}, "extra"),
  ],
)
def test_a_maker_that_breaks_the_contract(tmp_path, change, message):
  make = lambda pid: [make_identity(pid)[0] | change]
  with pytest.raises((ValueError, KeyError), match=message):
    run(tmp_path, make=make)


@pytest.mark.parametrize(
  "bad",
  [{"num_identities": 0}, {"cap": 0}, {"quality": 0}, {"num_threads": -1}],
)
def test_bad_numbers_name_their_key(tmp_path, bad):
  with pytest.raises(errors.UserError, match=next(iter(bad))):
    run(tmp_path, **bad)
