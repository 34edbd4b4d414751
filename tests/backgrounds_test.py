"""The pool of backgrounds: drawn once, kept, matched to the light."""

import errno
import pathlib
import threading
import time

import numpy as np
import PIL.Image
import pytest

from dppp_jax import errors
from dppp_jax.geneperson import backgrounds, disk, prompts

LIGHTS = ("day, sunshine", "night, dark", "indoors, fluorescent light")
SIZE = (40, 60)


class Painter:
  """A sampler: noise of the seed. Remembers what it was asked for."""

  def __init__(self, fail_at=None):
    self.batches, self.fail_at = [], fail_at

  def __call__(self, texts, seeds):
    if len(self.batches) == self.fail_at:
      raise InterruptedError("the plug was pulled")
    self.batches.append(list(zip(texts, seeds, strict=True)))
    draw = lambda seed: np.random.default_rng(seed).integers(
      0, 256, (*SIZE, 3), np.uint8
    )
    return np.stack([draw(seed) for seed in seeds])


def _pool(root, painter=None, **options):
  options = {
    "lightings": LIGHTS,
    "count": 3,
    "size": SIZE,
    "batch_size": 2,
    "seed": 5,
    "config": {"unet": "1234"},
  } | options
  return backgrounds.Pool(root, painter or Painter(), **options)


def _files(pool):
  return {p.name: p.read_bytes() for p in pool.folder.glob("*.png")}


def test_every_light_gets_its_places_and_all_batches_are_full(tmp_path):
  painter = Painter()
  pool = _pool(tmp_path, painter)
  pool.prepare()
  assert [len(batch) for batch in painter.batches] == [2] * 6
  drawn = dict(pair for batch in painter.batches for pair in batch)
  # Of the last one of each light the one that would follow fills its batch.
  assert len(set(drawn.values())) == 12 and len(_files(pool)) == 9
  for lighting in LIGHTS:
    allowed = prompts.places(lighting)
    for number, scene in enumerate(pool.scenes[lighting]):
      assert scene.place == allowed[number]
      assert scene.prompt == (
        f"scenery, {scene.place}, {lighting}, realistic, photo background"
      )
      assert drawn[scene.prompt] == scene.seed
      (path,) = pool.folder.glob(f"{scene.stem}-*.png")
      picture = np.random.default_rng(scene.seed).integers(
        0, 256, (*SIZE, 3), np.uint8
      )
      np.testing.assert_array_equal(np.asarray(PIL.Image.open(path)), picture)
  assert "indoors" in pool.scenes[LIGHTS[2]][0].place
  assert "outdoors" in pool.scenes[LIGHTS[1]][0].place


def test_waiting_for_another_process_ends_with_a_signal(tmp_path, capsys):
  painter = Painter()
  pool = _pool(tmp_path, painter)
  pool.folder.mkdir(parents=True)
  asked = []
  with disk.locked(pool.folder / ".lock") as is_held:
    assert is_held
    pool.prepare(stopped=lambda: bool(asked) or asked.append(1))
  assert not painter.batches and not _files(pool)
  assert "waiting for another process" in capsys.readouterr().err
  pool.prepare()  # Nobody holds it any more.
  assert len(_files(pool)) == 9


def test_drawn_once_and_reused(tmp_path):
  first = _pool(tmp_path)
  first.prepare()
  before = _files(first)
  painter = Painter()
  second = _pool(tmp_path, painter)
  second.prepare()
  assert not painter.batches and _files(second) == before
  # More pictures change none of the first, and another batch size neither.
  more = _pool(tmp_path, painter, count=4, batch_size=5)
  more.prepare()
  assert len(painter.batches) == 3 and len(_files(more)) == 12
  assert before.items() <= _files(more).items()


@pytest.mark.parametrize(
  "options",
  [
    {"seed": 6},
    {"size": (60, 40)},
    {"config": {"unet": "5678"}},
    {"template": "scenery, {place}, {lighting}"},
  ],
)
def test_another_configuration_is_another_pool(tmp_path, options):
  assert _pool(tmp_path, **options).folder != _pool(tmp_path).folder


def test_stopped_or_killed_it_goes_on_and_draws_the_same(tmp_path):
  whole = _pool(tmp_path / "whole")
  whole.prepare()
  broken = _pool(tmp_path / "broken", Painter(fail_at=2))
  with pytest.raises(errors.UserError, match="plug"):
    broken.prepare()
  # One batch was being drawn and one was not fetched yet.
  assert len(_files(broken)) == 2
  (broken.folder / ".torn.tmp").write_bytes(b"half a pic")
  calls = iter([False, True])
  stopped = _pool(tmp_path / "broken")
  stopped.prepare(stopped=lambda: next(calls))
  assert len(_files(stopped)) == 3  # The last group of a light, of which one.
  painter = Painter()
  last = _pool(tmp_path / "broken", painter)
  last.prepare()
  # Two groups were there. Of each group that is drawn both are.
  assert [len(batch) for batch in painter.batches] == [2] * 4
  assert _files(last) == _files(whole)


@pytest.mark.parametrize("damage", ["cut", "flip", "swap"])
def test_a_damaged_file_is_named_and_drawn_anew(tmp_path, damage):
  pool = _pool(tmp_path)
  pool.prepare()
  before = _files(pool)
  path, other = sorted(pool.folder.glob("*.png"))[1:3]
  data = bytearray(path.read_bytes())
  if damage == "cut":
    del data[-20:]
  elif damage == "flip":
    data[len(data) // 2] ^= 1
  else:  # A whole picture, but not this one.
    data = other.read_bytes()
  path.write_bytes(data)
  with pytest.raises(errors.UserError, match="damaged: remove it") as info:
    _pool(tmp_path).prepare()
  assert str(path) in str(info.value) and "\n" not in str(info.value)
  path.unlink()
  painter = Painter()
  _pool(tmp_path, painter).prepare()
  assert len(painter.batches) == 1 and _files(pool) == before


def test_a_file_that_goes_while_people_are_made(tmp_path):
  pool = _pool(tmp_path)
  pool.prepare()
  scene, rng = pool.choose(LIGHTS[0], pid=0, cell=0)
  for path in pool.folder.glob("*.png"):
    path.unlink()
  with pytest.raises(errors.UserError, match="is gone"):
    pool.crop(scene, (20, 10), rng=rng)


def test_choice_and_crop_are_functions_of_seed_pid_and_cell(tmp_path):
  pool = _pool(tmp_path)
  pool.prepare()
  choices = {}
  for pid in range(12):
    for cell in range(6):
      for lighting in LIGHTS:
        scene, rng = pool.choose(lighting, pid=pid, cell=cell)
        assert scene.lighting == lighting
        crop = pool.crop(scene, (20, 10), rng=rng)
        assert crop.shape == (20, 10, 3) and crop.dtype == np.uint8
        choices[lighting, pid, cell] = (scene.number, crop.tobytes())
  # All are used, about equally, and hardly two crops are the same.
  numbers = [number for number, _ in choices.values()]
  assert np.bincount(numbers).min() > 0.2 * len(numbers)
  assert len({crop for _, crop in choices.values()}) > 0.95 * len(choices)
  again = _pool(tmp_path)
  again.prepare()
  scene, rng = again.choose(LIGHTS[1], pid=7, cell=3)
  assert choices[LIGHTS[1], 7, 3] == (
    scene.number,
    again.crop(scene, (20, 10), rng=rng).tobytes(),
  )
  other = _pool(tmp_path, seed=6)
  assert any(
    other.choose(LIGHTS[0], pid=pid, cell=0)[0].number
    != pool.choose(LIGHTS[0], pid=pid, cell=0)[0].number
    for pid in range(12)
  )


def test_no_space_left(tmp_path, monkeypatch):
  pool, count, sync = _pool(tmp_path), iter(range(100)), disk.sync

  def full(path):
    if next(count) >= 4:
      raise OSError(errno.ENOSPC, "No space left on device")
    sync(path)

  monkeypatch.setattr(disk, "sync", full)
  with pytest.raises(errors.UserError, match=r"no space left.*nothing that"):
    pool.prepare()
  monkeypatch.undo()
  assert 0 < len(_files(pool)) < 9
  _pool(tmp_path).prepare()
  assert len(_files(pool)) == 9


def test_one_process_draws_and_the_others_wait(tmp_path):
  begun = threading.Event()

  class Slow(Painter):
    def __call__(self, texts, seeds):
      begun.set()
      time.sleep(0.05)
      return super().__call__(texts, seeds)

  first = threading.Thread(target=_pool(tmp_path, Slow()).prepare)
  first.start()
  begun.wait()
  painter = Painter()
  pool = _pool(tmp_path, painter)
  pool.prepare()
  assert not painter.batches and len(_files(pool)) == 9
  first.join()


def test_next_batch_is_begun_before_the_last_is_fetched(tmp_path):
  events = []

  class Promise:
    def __init__(self, number, pictures):
      self.number, self.pictures = number, pictures

    def __array__(self, dtype=None, copy=None):
      events.append(f"fetch {self.number}")
      return self.pictures

  class Later(Painter):
    def __call__(self, texts, seeds):
      events.append(f"begin {len(self.batches)}")
      return Promise(len(self.batches), super().__call__(texts, seeds))

  _pool(tmp_path, Later(), lightings=LIGHTS[:1], count=6).prepare()
  assert events == [
    *("begin 0", "begin 1", "fetch 0", "begin 2", "fetch 1", "fetch 2")
  ]


def test_folder_names_are_harmless(tmp_path):
  pool = _pool(tmp_path, lightings=["Night, ../street lights"], count=1)
  stem = pool.scenes["Night, ../street lights"][0].stem
  assert stem == "night-street-lights-00000"
  assert pathlib.Path(stem).name == stem
