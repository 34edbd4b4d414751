"""The same pixels, whatever was killed and whoever else is asked for.

The sampler here mixes its batch on purpose: each of its pictures depends on all
prompts, seeds and skeletons of the batch and on its place. Whoever is drawn
beside others than usual has other pixels.
"""

import hashlib
import json
import os
import signal

import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.data import shards
from dppp_jax.geneperson import (
  backgrounds,
  canvas,
  disk,
  groups,
  maker,
  matting,
  pipeline,
  pose_bank,
  prompts,
  quality,
)

CELL = (32, 16)
LAYOUT = canvas.Layout(rows=1, cols=2, cell=CELL, multiple=16)
SEED, COUNT, BATCH = 3, 5, 2
BANK = pose_bank.default_bank(azimuths=12, elevations=(8,))
# Half of the cells are empty, and all others are kept.
RULES = quality.Rules(
  **dict.fromkeys(quality.Rules.__dataclass_fields__) | {"min_peak": 0.5}
)


class Killed(BaseException):
  """No `except` of the package catches it, as none catches a kill."""


def _mixed(*batch):
  """Returns generators, one for each row, that know the whole batch."""
  digest = hashlib.sha256(repr(batch).encode()).digest()
  words = np.frombuffer(digest, np.uint32).tolist()
  return [np.random.default_rng([*words, i]) for i in range(len(batch[0]))]


class Mixer:
  """A sampler and a matting network; killed at an event of a number.

  Attributes:
    events: pictures begun and files written so far, by name.
  """

  def __init__(self, kill_at=None):
    self.events, self.kill_at = [], kill_at

  def happens(self, name):
    if len(self.events) == self.kill_at:
      raise Killed
    self.events.append(name)

  def draw(self, texts, seeds, *, skeletons, grid):
    assert len(texts) == len(seeds) == len(skeletons) == BATCH
    self.happens("canvases")
    rngs = _mixed(texts, seeds, skeletons.tobytes(), grid.tobytes())
    noise = [rng.integers(0, 256, (*LAYOUT.size, 3), np.uint8) for rng in rngs]
    self.peaks = np.array([rng.random(2) for rng in rngs], np.float32)
    return np.stack(noise)

  def dispatch(self, cells):
    alpha = np.full(cells.shape[:-1], 128, np.uint8)
    return matting.Mattes(alpha, self.peaks)

  def scenery(self, texts, seeds):
    assert len(texts) == len(seeds) == BATCH
    self.happens("backgrounds")
    size = (*LAYOUT.size, 3)
    rngs = _mixed(texts, seeds)
    return np.stack([rng.integers(0, 256, size, np.uint8) for rng in rngs])


@pytest.fixture
def run(monkeypatch):
  """A run of a sampler: (mixer, data_dir, **options) -> Outcome."""
  people = prompts.People(SEED)
  write, sync = disk.write, disk.sync

  def run(mixer, data_dir, *, count=COUNT, tries=3, scenes=2, **options):
    pool = backgrounds.Pool(
      data_dir / "backgrounds",
      mixer.scenery,
      lightings=[people[pid].lighting for pid in range(count)],
      count=scenes,
      size=LAYOUT.size,
      batch_size=BATCH,
      seed=SEED,
      config={},
    )
    made = maker.Maker(
      mixer.draw,
      people=people,
      bank=BANK,
      layout=LAYOUT,
      mattes=mixer,
      pool=pool,
      seed=SEED,
      batch_size=BATCH,
      tries=tries,
      min_images=2,
      rules=RULES,
      fill=0.8,
    )

    def note_write(file, data):
      mixer.happens("write")
      write(file, data)

    def note_sync(path):
      if path.suffix == ".tmp":  # Of a background, or the configuration.
        mixer.happens("sync")
      sync(path)

    monkeypatch.setattr(disk, "write", note_write)
    monkeypatch.setattr(disk, "sync", note_sync)
    return pipeline.run(
      made,
      data_dir=data_dir,
      num_identities=count,
      seed=SEED,
      image_size=CELL,
      source="noise",
      config={"tries": tries},
      sheet_every=0,
      **options,
    )

  return run


def _raw(data_dir):
  held = shards.load(data_dir, verify=True)
  return sorted(held.raw(i) for i in range(len(held)))


def _scenes(data_dir):
  return {p.name: p.read_bytes() for p in data_dir.glob("backgrounds/*/*.png")}


def _manifest(data_dir):
  file = data_dir / "geneperson" / "1.0.0" / "manifest.json"
  told = json.loads(file.read_text())
  return {key: value for key, value in told.items() if key != "commit"}


@pytest.fixture
def whole(run, tmp_path):
  """An undisturbed run: its folder and its events."""
  mixer = Mixer()
  assert run(mixer, tmp_path / "whole").finished
  return tmp_path / "whole", mixer.events


def _equal(one, other):
  assert _raw(one) == _raw(other)
  assert _scenes(one) == _scenes(other)
  assert _manifest(one) == _manifest(other)


def test_killed_anywhere_and_ended_in_other_stripes_it_is_the_same(
  run, whole, tmp_path
):
  path, events = whole
  assert events.count("canvases") > 3  # Somebody was given another one.
  for kill_at, _ in enumerate(events):
    data_dir = tmp_path / str(kill_at)
    with pytest.raises(Killed):
      run(Mixer(kill_at), data_dir)
    # By turns at once, in two stripes, and in three.
    count = kill_at % 3 + 1
    for i in range(count):
      outcome = run(Mixer(), data_dir, shard=(i, count))
    assert outcome.finished
    _equal(data_dir, path)


def test_a_killed_stripe_goes_on_in_another_number_of_them(
  run, whole, tmp_path
):
  path, _ = whole
  for kill_at in range(18, 26, 3):
    data_dir = tmp_path / str(kill_at)
    with pytest.raises(Killed):
      run(Mixer(kill_at), data_dir, shard=(0, 2))
    for i in range(3):
      outcome = run(Mixer(), data_dir, shard=(i, 3))
    assert outcome.finished
    _equal(data_dir, path)


def test_stripes_are_groups_of_people(run, tmp_path):
  assert run(Mixer(), tmp_path, shard=(1, 2)).made == BATCH
  (journal,) = tmp_path.glob("geneperson/*/stripe-00001-of-00002.journal")
  lines = [json.loads(line) for line in journal.read_text().splitlines()]
  assert [line["pid"] for line in lines] == [2, 3]


def test_stripes_of_other_groups_do_not_work_side_by_side(run, tmp_path):
  mixer = Mixer()
  other = pipeline.store_lib.Store(
    tmp_path,
    config=pipeline._whole_config({"tries": 3}, "noise", SEED, 20, 95),
    num_identities=COUNT,
    image_size=CELL,
    shard=(0, 2),
    group_size=BATCH + 1,
  )
  refused = r"other stripes than /2 in groups of 2 .*same --config\.run\.batch"
  with other, pytest.raises(errors.UserError, match=refused):
    run(mixer, tmp_path, shard=(1, 2))
  assert run(mixer, tmp_path).finished


def test_a_trial_run_is_the_beginning_of_the_whole(run, whole, tmp_path):
  """Fewer people, and with them fewer lights and fewer backgrounds of each."""
  path, _ = whole
  run(Mixer(), tmp_path / "trial", count=3)
  trial = _raw(tmp_path / "trial")
  held = shards.load(path)
  assert trial == sorted(held.raw(i) for i in np.flatnonzero(held.pids < 3))
  few, many = _scenes(tmp_path / "trial"), _scenes(path)
  assert few.items() <= many.items()
  run(Mixer(), tmp_path / "more", scenes=7)
  assert many.items() <= _scenes(tmp_path / "more").items()


def test_the_last_group_of_a_vocabulary_is_filled_by_its_own(
  run, whole, tmp_path, monkeypatch
):
  """Nobody follows who could fill it; those before it do not change."""
  path, _ = whole
  get = prompts.People.__getitem__

  def few(people, pid):
    if pid >= COUNT:
      raise errors.UserError(f"pid {pid}: this vocabulary dresses {COUNT}")
    return get(people, pid)

  monkeypatch.setattr(prompts.People, "__getitem__", few)
  run(Mixer(), tmp_path / "few")
  held = [shards.load(path), shards.load(tmp_path / "few")]
  same = [
    [one.raw(i) for i in np.flatnonzero(one.pids < 2 * BATCH)] for one in held
  ]
  assert same[0] == same[1]
  with pytest.raises(errors.UserError, match=r"pid 5: this vocabulary dresses"):
    run(Mixer(), tmp_path / "more", count=COUNT + 1)


def test_another_canvas_for_those_who_need_it(run, whole):
  path, events = whole
  held, told = shards.load(path), _manifest(path)
  kept = np.bincount(held.pids, minlength=COUNT)
  further = {int(pid): len(s) for pid, s in told["further_seeds"].items()}
  assert set(further.values()) == {1, 2}
  for pid in range(COUNT):
    cells = [held.record(i)["cell"] for i in np.flatnonzero(held.pids == pid)]
    canvases = 1 + further.get(pid, 0)
    assert cells == sorted(set(cells)) and max(cells) < 2 * canvases
    # The last canvas was needed, and no other would have been.
    before = sum(cell < 2 * (canvases - 1) for cell in cells)
    assert before < 2 and (kept[pid] >= 2 or canvases == 3)
    seeds = [told["seeds"][str(pid)], *told["further_seeds"].get(str(pid), [])]
    assert len(set(seeds)) == canvases
  drawn = sum(1 + further.get(pid, 0) for pid in range(COUNT))
  assert told["cells"] == 2 * drawn
  most = [
    max(further.get(pid, 0) for pid in some)
    for some in (range(2), range(2, 4), range(4, 5))
  ]
  assert events.count("canvases") == sum(1 + n for n in most)


def test_after_a_signal_nobody_is_given_another_canvas(run, whole, tmp_path):
  """Who needs one is left to the next run, and the same comes of it."""
  path, _ = whole

  class Stopped(Mixer):
    def draw(self, *args, **options):
      os.kill(os.getpid(), signal.SIGTERM)
      return super().draw(*args, **options)

  mixer, further = Stopped(), _manifest(path)["further_seeds"]
  outcome = run(mixer, tmp_path)
  assert outcome.exit_code == 143 and mixer.events.count("canvases") == 1
  assert outcome.made == sum(str(pid) not in further for pid in range(BATCH))
  assert outcome.made < BATCH
  assert run(Mixer(), tmp_path).finished
  _equal(tmp_path, path)


def test_poses_of_another_canvas(run, whole):
  path, _ = whole
  held = shards.load(path)
  records = [held.record(i) for i in range(len(held))]
  further = [record for record in records if record["cell"] >= 2]
  assert further
  people = prompts.People(SEED)
  for record in further:
    words = people[record["pid"]].words
    chosen = BANK.choose(
      2,
      seed=SEED,
      pid=record["pid"],
      body=words["body"],
      activity=words["activity"],
    )
    assert record["pose"] == chosen[record["cell"] % 2].number


def test_people_without_a_picture_are_named(run, tmp_path, capsys):
  outcome = run(Mixer(), tmp_path, tries=1)
  told = _manifest(tmp_path)
  kept = np.bincount(shards.load(tmp_path).pids, minlength=COUNT)
  lost = [str(pid) for pid in np.flatnonzero(kept == 0)]
  assert lost and told["without_images"] == {pid: {"empty": 2} for pid in lost}
  assert outcome.finished and told["identities"] == COUNT - len(lost)
  (said,) = [
    line
    for line in capsys.readouterr().err.splitlines()
    if "have no picture" in line
  ]
  assert f"{len(lost)} of {COUNT} people" in said
  assert f"(pid {', '.join(lost)}): empty {2 * len(lost)}: " in said
  assert "--config.models.u2net" in said and "--config.tries" in said


def test_it_is_said_at_once_that_all_cells_are_dropped(run, tmp_path, capsys):
  class Blind(Mixer):
    def dispatch(self, cells):
      self.peaks[:] = 0
      if self.events.count("canvases") > 8:
        raise Killed
      return super().dispatch(cells)

  with pytest.raises(Killed):
    run(Blind(), tmp_path / "blind")
  said = [
    line for line in capsys.readouterr().err.splitlines() if "lost all" in line
  ]
  assert len(said) == 1
  assert "the first 2 people lost all of their cells" in said[0]
  assert "empty 12: " in said[0] and "--config.models.u2net" in said[0]
  run(Mixer(), tmp_path / "seeing")
  assert "lost all" not in capsys.readouterr().err


def test_split():
  assert list(groups.split([0, 1, 5, 8], 3)) == [
    (range(3), [0, 1]),
    (range(3, 6), [5]),
    (range(6, 9), [8]),
  ]


def test_a_group_is_drawn_once_for_each_number_of_chunks():
  calls = []

  def draw(rows, chunks):
    calls.append((rows.tolist(), chunks))
    rngs = _mixed(rows.tolist(), chunks)
    return np.stack([rng.integers(0, 256, (2, 2, 3), np.uint8) for rng in rngs])

  got = np.asarray(groups.drawn(draw, [2, 1, 2, 0, 3]))
  assert calls == [
    ([1, 1, 1, 1, 1], 1),
    ([0, 0, 2, 0, 0], 2),
    ([4, 4, 4, 4, 4], 3),
  ]
  for row, (rows, chunks) in ((0, calls[1]), (1, calls[0]), (4, calls[2])):
    want = _mixed(rows, chunks)[row].integers(0, 256, (2, 2, 3), np.uint8)
    np.testing.assert_array_equal(got[row], want)
  with pytest.raises(ValueError, match="no row"):
    groups.drawn(draw, [0, 0])
