"""From canvases to pictures, with a sampler whose people and mattes are known.

The canvases are of paper dolls, so that what must be kept, what must be thrown
away and every fused pixel are known beforehand.
"""

import errno
import json
import os
import signal
import threading
import types

import cv2
import jax
import numpy as np
import pytest

from dppp_jax import cli, errors
from dppp_jax.data import images, shards
from dppp_jax.geneperson import (
  backgrounds,
  canvas,
  disk,
  identity,
  maker,
  matting,
  networks,
  pipeline,
  pose_bank,
  prompts,
  quality,
  watch,
)
from dppp_jax.models import controlnet_union as unions
from dppp_jax.paperdoll import world

CELL = (96, 48)
LAYOUT = canvas.Layout(rows=2, cols=3, cell=CELL, multiple=16)
SEED, COUNT, BATCH = 3, 5, 2
BANK = pose_bank.default_bank(azimuths=12, elevations=(8,))
# What the cells of every canvas are, and what becomes of them.
FATES = (None, "empty", "several", "duplicate", "blurred", None)


def _cells(pid):
  """Returns cells [6, H, W, 3], mattes [6, H, W] and peaks [6]."""
  one, two = (world.studio(pid, k, seed=1, size=CELL) for k in (0, 1))
  ground = np.full((*CELL, 3), 200, np.uint8)
  small = cv2.resize(one.image, (24, 48), interpolation=cv2.INTER_AREA)
  half = cv2.resize(one.alpha, (24, 48), interpolation=cv2.INTER_AREA)
  pair, pair_alpha = ground.copy(), np.zeros(CELL, np.uint8)
  for left in (0, 24):
    pair[24:72, left : left + 24] = small
    pair_alpha[24:72, left : left + 24] = half
  blurred = cv2.GaussianBlur(two.image, (0, 0), 5)
  cells = [one.image, ground, pair, one.image, blurred, two.image]
  alpha = [one.alpha, one.alpha, pair_alpha]  # The second sees a ghost.
  alpha += [one.alpha, two.alpha, two.alpha]
  peaks = [0.99, 0.2, 0.9, 0.99, 0.9, 0.98]
  return np.stack(cells), np.stack(alpha), np.array(peaks, np.float32)


class Studio:
  """A sampler and a matting network that know what they do by the seeds."""

  def __init__(self, people):
    self.pids = {
      identity.seed_of("canvas", SEED, pid): pid for pid in range(COUNT + 1)
    }
    self.people, self.calls, self.events = people, [], []
    self.hook = lambda: None

  def draw(self, texts, seeds, *, skeletons, grid):
    self.hook()
    self.events.append(f"begin {len(self.calls)}")
    self.calls.append((list(texts), list(seeds), skeletons, grid))
    self.found = [_cells(self.pids[seed]) for seed in seeds]
    return canvas.join(np.stack([cells for cells, _, _ in self.found]), LAYOUT)

  def dispatch(self, cells):
    assert cells.shape == (BATCH, 6, *CELL, 3)
    number, studio = len(self.calls) - 1, self
    want = np.stack([cells for cells, _, _ in self.found])
    np.testing.assert_array_equal(cells, want)

    class Promise:
      def __init__(self, value):
        self.value = value

      def __array__(self, dtype=None, copy=None):
        studio.events.append(f"fetch {number}")
        return self.value

    _, alpha, peak = (np.stack(x) for x in zip(*self.found, strict=True))
    return matting.Mattes(Promise(alpha), peak)

  def scenery(self, texts, seeds):
    draw = lambda seed: np.random.default_rng(seed).integers(
      0, 256, (*LAYOUT.size, 3), np.uint8
    )
    return np.stack([draw(seed) for seed in seeds])


@pytest.fixture
def studio():
  return Studio(prompts.People(SEED))


def _pool(studio, root):
  lightings = [studio.people[pid].lighting for pid in range(COUNT)]
  return backgrounds.Pool(
    root,
    studio.scenery,
    lightings=lightings,
    count=3,
    size=LAYOUT.size,
    batch_size=BATCH,
    seed=SEED,
    config={},
  )


def _maker(studio, root, *, is_prepared=True, **options):
  made = maker.Maker(
    studio.draw,
    people=studio.people,
    bank=BANK,
    layout=LAYOUT,
    mattes=studio,
    pool=_pool(studio, root),
    seed=SEED,
    batch_size=BATCH,
    **options,
  )
  if is_prepared:
    made.prepare(stopped=lambda: False)
  return made


def _run(studio, data_dir, **options):
  made = _maker(studio, data_dir / "backgrounds")
  return pipeline.run(
    made,
    data_dir=data_dir,
    num_identities=COUNT,
    seed=SEED,
    image_size=CELL,
    source="paper dolls in place of generated people",
    config={"maker": "test"},
    **options,
  )


def test_kept_cells_match_and_reasons_are_right(studio, tmp_path):
  outcome = _run(studio, tmp_path, about={"networks": {"unet": "none"}})
  assert outcome.finished and (outcome.cells, outcome.images) == (30, 10)
  assert "of 30 cells 10 were kept" in outcome.summary()
  held = shards.load(tmp_path, verify=True)
  assert len(held) == 2 * COUNT
  pool = _pool(studio, tmp_path / "backgrounds")
  pool.prepare()
  for n in range(len(held)):
    record = held.record(n)
    pid, cell = record["pid"], record["cell"]
    assert (pid, cell) == (n // 2, (0, 5)[n % 2])
    person = studio.people[pid]
    cells, alpha, _ = _cells(pid)
    scene, rng = pool.choose(person.lighting, pid=pid, cell=cell)
    ground = pool.crop(scene, CELL, rng=rng)
    cover = alpha[cell][..., None] / 255
    fused = np.rint(cover * cells[cell] + (1 - cover) * ground)
    jpeg = images.encode_jpeg(fused.astype(np.uint8), quality=95)
    want = images.decode(jpeg, name="")
    apart = np.abs(record["image"].astype(int) - want)
    assert apart.mean() < 0.05  # A rounded half may go either way.
    chosen = BANK.choose(
      6,
      seed=SEED,
      pid=pid,
      body=person.words["body"],
      activity=person.words["activity"],
    )[cell]
    assert record["pose"] == chosen.number and record["view"] == chosen.view
    assert record["lighting"] == person.lighting == scene.lighting
    assert record["background"] == scene.place
    assert record["prompt"] == person.prompt()
    told = {k: v for k, v in record["attributes"].items() if v}
    assert told == person.attributes


def test_the_manifest_tells_counts_reasons_seeds_and_prompts(studio, tmp_path):
  outcome = _run(studio, tmp_path, about={"networks": {"unet": "none"}})
  told = json.loads((outcome.folder / "manifest.json").read_text())
  assert told["dropped"] == {
    reason: COUNT for reason in FATES if reason is not None
  }
  assert (told["cells"], told["images"], told["identities"]) == (30, 10, 5)
  assert told["networks"] == {"unet": "none"}
  assert told["seeds"] == {
    str(pid): identity.seed_of("canvas", SEED, pid) for pid in range(COUNT)
  }
  assert told["prompts"]["4"] == studio.people[4].prompt()
  assert {"jax", "flax"} <= told["versions"].keys()
  assert (outcome.folder / "contact_sheet-000000.png").exists()
  (sheet,) = outcome.folder.glob("steps-*.jpg")
  assert sheet.name == "steps-000000.jpg"
  _, sheet, _, _ = np.split(images.decode(sheet.read_bytes(), name=""), 4, 1)
  want = canvas.join(_cells(0)[0], LAYOUT)
  assert np.abs(sheet.astype(int) - want).mean() < 4


def test_what_the_sampler_is_given(studio, tmp_path):
  made = _maker(studio, tmp_path)
  list(made.people(range(3)))
  (texts, seeds, skeletons, grid), (last, _, again, _) = studio.calls
  assert texts == [studio.people[pid].prompt() for pid in (0, 1)]
  assert seeds == [identity.seed_of("canvas", SEED, pid) for pid in (0, 1)]
  edges = canvas.line_map(canvas.grid_map(LAYOUT))
  np.testing.assert_array_equal(grid, edges)
  for pid, drawn in zip((0, 1), skeletons, strict=True):
    person = studio.people[pid]
    chosen = BANK.choose(
      6,
      seed=SEED,
      pid=pid,
      body=person.words["body"],
      activity=person.words["activity"],
    )
    figures = [pose.fit(CELL) for pose in chosen]
    np.testing.assert_array_equal(drawn, canvas.skeleton_map(figures, LAYOUT))
  # The last batch is filled up with those who would follow.
  assert last == [studio.people[pid].prompt() for pid in (2, 3)]
  np.testing.assert_array_equal(again[1], made.plan(3).skeletons)


def test_device_begins_the_next_batch_before_the_host_fetches(studio, tmp_path):
  made = _maker(studio, tmp_path)
  pids = [pid for pid, _ in made.people(range(COUNT))]
  assert pids == list(range(COUNT))
  assert studio.events == [
    *("begin 0", "begin 1", "fetch 0", "begin 2", "fetch 1", "fetch 2")
  ]


def test_a_person_depends_on_nobody_else(studio, tmp_path):
  made = _maker(studio, tmp_path)
  together = dict(made.people(range(COUNT)))
  alone = dict(made.people([4, 1]))
  for pid, person in alone.items():
    assert person.dropped == together[pid].dropped
    for one, other in zip(person.records, together[pid].records, strict=True):
      assert {k: v for k, v in one.items() if k != "image"} == {
        k: v for k, v in other.items() if k != "image"
      }
      np.testing.assert_array_equal(one["image"](), other["image"]())


def test_steps_show_skeletons_canvas_mattes_and_pictures(studio, tmp_path):
  made = _maker(studio, tmp_path)
  (_, person), *_ = made.people([3])
  cells, alpha, _ = _cells(3)
  skeletons, drawn, mattes, fused = np.split(person.steps(), 4, axis=1)
  np.testing.assert_array_equal(skeletons, made.plan(3).skeletons)
  np.testing.assert_array_equal(canvas.cut(drawn, LAYOUT), cells)
  for channel in np.moveaxis(canvas.cut(mattes, LAYOUT), -1, 0):
    np.testing.assert_array_equal(channel, alpha)
  fused = canvas.cut(fused, LAYOUT)
  assert [(x == 255).all() for x in fused] == [bool(x) for x in FATES]
  for record in person.records:
    np.testing.assert_array_equal(fused[record["cell"]], record["image"]())


def test_steps_show_pictures_at_the_size_of_cells(studio, tmp_path):
  made = _maker(studio, tmp_path, image_size=(48, 24))
  ((_, person),) = made.people([0])
  assert person.records[0]["image"]().shape == (48, 24, 3)
  *_, fused = np.split(person.steps(), 4, axis=1)
  first = canvas.cut(fused, LAYOUT)[0]
  want = images.resize(person.records[0]["image"](), CELL)
  np.testing.assert_array_equal(first, want)


def test_rules_and_the_skeleton(studio, tmp_path):
  off = dict.fromkeys(quality.Rules.__dataclass_fields__)
  made = _maker(studio, tmp_path, rules=quality.Rules(**off))
  ((_, person),) = made.people([0])
  assert len(person.records) == 6 and not person.dropped
  off["min_agreement"] = 1.01  # Nobody can be so good.
  made = _maker(studio, tmp_path, rules=quality.Rules(**off))
  ((_, person),) = made.people([0])
  assert not person.records and person.dropped == {"pose": 6}
  assert person.prompt == studio.people[0].prompt()


def test_each_cell_is_judged_by_its_own_skeleton(studio, tmp_path):
  class Obedient(Studio):
    def dispatch(self, cells):
      drawn = canvas.cut(self.calls[-1][2], LAYOUT).max(-1) > 0
      wide = [cv2.dilate(x.astype(np.uint8), np.ones((3, 3))) for x in drawn[0]]
      alpha = np.stack([255 * np.stack(wide)] * BATCH)
      return matting.Mattes(alpha, np.ones(alpha.shape[:2], np.float32))

  off = dict.fromkeys(quality.Rules.__dataclass_fields__)
  rules = quality.Rules(**off | {"min_agreement": 0.99})
  made = _maker(Obedient(studio.people), tmp_path, rules=rules)
  ((_, person),) = made.people([0])
  assert len(person.records) == 6


def test_other_sizes_of_pictures(studio, tmp_path):
  made = _maker(studio, tmp_path, image_size=(64, 32), decontaminate=True)
  ((_, person),) = made.people([0])
  assert person.records[0]["image"]().shape == (64, 32, 3)


@pytest.mark.parametrize("when", [0, 1])
def test_a_signal_ends_it_after_what_is_begun(studio, tmp_path, when):
  assert threading.current_thread() is threading.main_thread()

  def pull():
    if len(studio.calls) == when:
      os.kill(os.getpid(), signal.SIGTERM)

  studio.hook = pull
  outcome = _run(studio, tmp_path)
  # The batch that was begun, and with it the one before, are made.
  assert outcome.made == BATCH * (when + 1) and not outcome.finished
  assert outcome.exit_code == 143 and "again to go on" in outcome.summary()
  studio.hook = lambda: None
  outcome = _run(studio, tmp_path)
  assert outcome.finished and outcome.made == COUNT - BATCH * (when + 1)
  whole = Studio(studio.people)
  assert _run(whole, tmp_path / "whole").finished
  one, two = shards.load(tmp_path), shards.load(tmp_path / "whole")
  assert [one.raw(i) for i in range(10)] == [two.raw(i) for i in range(10)]


def test_a_signal_while_the_backgrounds_are_drawn(studio, tmp_path):
  scenery, asked = studio.scenery, []

  def pull(texts, seeds):
    asked.append(texts)
    os.kill(os.getpid(), signal.SIGTERM)
    return scenery(texts, seeds)

  studio.scenery = pull
  made = maker.Maker(
    studio.draw,
    people=studio.people,
    bank=BANK,
    layout=LAYOUT,
    mattes=studio,
    pool=_pool(studio, tmp_path / "backgrounds"),
    seed=SEED,
    batch_size=BATCH,
  )
  outcome = pipeline.run(
    made,
    data_dir=tmp_path,
    num_identities=COUNT,
    seed=SEED,
    image_size=CELL,
    source="",
    config={},
  )
  assert outcome.exit_code == 143 and outcome.made == 0
  assert len(asked) == 1 and not studio.calls
  assert len(list(tmp_path.glob("backgrounds/*/*.png"))) == BATCH


def test_no_space_left_in_the_middle(studio, tmp_path, monkeypatch):
  calls, write = iter(range(1000)), disk.write

  def full(file, data):
    if next(calls) >= 5:  # Two people have their records and their lines.
      raise OSError(errno.ENOSPC, "No space left on device")
    write(file, data)

  monkeypatch.setattr(disk, "write", full)
  with pytest.raises(errors.UserError, match=r"no space left.*nothing that"):
    _run(studio, tmp_path)
  monkeypatch.undo()
  assert _run(studio, tmp_path).made == COUNT - 2
  assert _run(Studio(studio.people), tmp_path / "whole").finished
  one, two = shards.load(tmp_path), shards.load(tmp_path / "whole")
  assert [one.raw(i) for i in range(10)] == [two.raw(i) for i in range(10)]


def test_unions_and_plain_networks_get_their_images():
  """One union for both, a union beside a plain one, and only one of them."""
  is_union, plain = object.__new__(unions.Config), object()
  parts = lambda *nets: types.SimpleNamespace(controlnets=nets)
  arrange = lambda given, *nets, kinds=(0, 3): networks._arrange(
    networks._controls({f"models.{k}_controlnet": v for k, v in given}),
    parts(*nets),
    kinds,
  )
  images, kinds = arrange([("pose", "a"), ("grid", "a")], is_union)
  assert images("P", "G") == [["P", "G"]] and kinds == [(0, 3)]
  images, kinds = arrange([("pose", "a"), ("grid", "b")], plain, is_union)
  assert images("P", "G") == ["P", ["G"]] and kinds == [None, (3,)]
  images, kinds = arrange([("pose", "a"), ("grid", "b")], plain, plain)
  assert images("P", "G") == ["P", "G"] and kinds == [None, None]
  images, kinds = arrange([("grid", "b")], plain)
  assert images("P", "G") == ["G"] and kinds == [None]
  images, kinds = arrange([])
  assert images("P", "G") == [] and kinds == []
  with pytest.raises(errors.UserError, match="no union: give two"):
    arrange([("pose", "a"), ("grid", "a")], plain)
  with pytest.raises(errors.UserError, match=r"union_kinds: kinds\[0\] is \(9"):
    arrange([("grid", "a")], is_union, kinds=(0, 9))
  with pytest.raises(errors.UserError, match="no ControlNet of this run is a"):
    arrange([("grid", "a")], plain, kinds=(0, 1))
  config = cli.load_config("geneperson.py")
  assert config.models.union_kinds == networks.USUAL_KINDS


def test_too_little_memory_on_the_device(studio, tmp_path):
  made = _maker(studio, tmp_path)

  def fail():
    raise jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: Out of memory\nallocating 3 GiB"
    )

  studio.hook = fail
  with pytest.raises(
    errors.UserError, match=r"smaller --config\.run\.batch_size"
  ):
    list(made.people([0]))


def test_progress_tells_rates_and_drops(monkeypatch, capsys):
  now = iter([0.0, 10.0, 10.0, 50.0, 50.0, 50.0])
  bar = watch.Progress(4, 6, unit="canvases", clock=lambda: next(now))
  bar.update(20, 22)
  bar.update(16, 26)
  line = capsys.readouterr().err
  assert "2 of 6 canvases, 0.04 canvases/s, 0.7 images/s, 57% dropped" in line
  assert "01:40 left" in line
