import threading
import time
import unittest.mock

from absl import logging
import jax
import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.data import images, loader, sampler
from dppp_jax.data import source as source_lib

SIZE = (8, 6)
PIDS = np.repeat([4, 9, 2], [5, 4, 3])


def make_pictures(shape=(12, 10)):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (len(PIDS), *shape, 3), dtype=np.uint8)


class Flaky(source_lib.Arrays):
  """Pictures in memory, some of which raise; counts the reads."""

  def __init__(self, corrupt=(), error=None, delay=0.0):
    super().__init__(make_pictures(), PIDS, label="flaky")
    self.corrupt, self.error, self.delay = set(corrupt), error, delay
    self.reads = []

  def read(self, i):
    self.reads.append(i)
    # Threads overtake one another in another order every time.
    time.sleep(self.delay * (i % 3))
    if i in self.corrupt:
      raise self.error or images.CorruptImageError(f"{self.name(i)}: broken")
    return super().read(i)


def expected(index, interpolation="bicubic"):
  picture = make_pictures()[index]
  return images.resize(picture, SIZE, interpolation=interpolation)


def make_plan(epochs=4, P=2, K=3):
  return sampler.pk(PIDS, P=P, K=K, epochs=epochs, seed=0)


def batches(source, plan=None, **kwargs):
  plan = make_plan() if plan is None else plan
  return loader.host_batches(source, plan, **(dict(size=SIZE) | kwargs))


def within(seconds, fn):
  """Returns or raises what fn does, and fails where it hangs."""
  result = {}

  def run():
    try:
      result["value"] = fn()
    except BaseException as error:
      result["error"] = error

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  assert not thread.is_alive(), f"hangs for more than {seconds} s"
  if "error" in result:
    raise result["error"]
  return result["value"]


@pytest.fixture
def warnings():
  found = []
  log = lambda message, *args: found.append(message % args)
  with unittest.mock.patch.object(logging, "warning", log):
    yield found


@pytest.mark.parametrize("num_threads", [0, 1, 3])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_whole_data_set(num_threads, interpolation, monkeypatch):
  monkeypatch.setattr(loader, "_CHUNK", 2)
  pixels, kept = loader.load_images(
    Flaky(delay=1e-3),
    size=SIZE,
    interpolation=interpolation,
    num_threads=num_threads,
  )
  assert pixels.dtype == np.uint8 and kept.dtype == np.int64
  assert kept.tolist() == list(range(len(PIDS)))
  for i in range(len(PIDS)):
    np.testing.assert_array_equal(pixels[i], expected(i, interpolation))


def test_whole_data_set_stops_at_a_corrupt_picture(monkeypatch):
  monkeypatch.setattr(loader, "_CHUNK", 1)
  source = Flaky(corrupt=[1], delay=0.01)
  with pytest.raises(images.CorruptImageError, match=r"flaky\[1\]"):
    loader.load_images(source, size=SIZE, num_threads=1)
  assert len(source.reads) < len(PIDS)  # The rest is not read first.


def test_whole_data_set_skips_and_counts(warnings, monkeypatch):
  monkeypatch.setattr(loader, "_CHUNK", 2)
  pixels, kept = loader.load_images(
    Flaky(corrupt=[7, 0]), size=SIZE, on_corrupt="skip", num_threads=3
  )
  assert kept.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
  assert len(pixels) == 10
  for picture, i in zip(pixels, kept, strict=True):
    np.testing.assert_array_equal(picture, expected(i))
  assert warnings == [
    "skipped: flaky[0]: broken",
    "skipped: flaky[7]: broken",
    "skipped 2 of 12 images",
  ]


def test_a_person_without_pictures_is_an_error(warnings):
  whole = Flaky(corrupt=[9, 10, 11])
  says = r"no image is left of 1 persons, the first is 2: flaky\[9\]"
  with pytest.raises(errors.UserError, match=says):
    loader.load_images(whole, size=SIZE, on_corrupt="skip")
  with pytest.raises(errors.UserError, match="no image of person 2 can be"):
    within(20, lambda: list(batches(whole, on_corrupt="skip", num_threads=2)))


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_batches_are_those_of_the_plan(num_threads):
  plan = make_plan()
  found = list(batches(Flaky(delay=1e-3), plan, num_threads=num_threads))
  assert len(found) == len(plan)
  for batch, row in zip(found, plan.indices, strict=True):
    assert batch["image"].dtype == np.uint8
    assert batch["index"].dtype == np.int32
    np.testing.assert_array_equal(batch["index"], row)
    for picture, i in zip(batch["image"], row, strict=True):
      np.testing.assert_array_equal(picture, expected(i))


@pytest.mark.parametrize("on_corrupt", ["error", "skip"])
def test_resuming_is_slicing_for_any_number_of_threads(on_corrupt, warnings):
  corrupt = [5, 6] if on_corrupt == "skip" else []
  make = lambda **kwargs: list(
    batches(Flaky(corrupt, delay=1e-3), on_corrupt=on_corrupt, **kwargs)
  )
  whole = make(num_threads=0)
  for start_step, num_threads in ((0, 3), (2, 0), (3, 2), (len(whole), 2)):
    rest = make(start_step=start_step, num_threads=num_threads)
    assert len(rest) == len(whole) - start_step
    for ours, theirs in zip(rest, whole[start_step:], strict=True):
      for key in ("image", "index"):
        np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_corrupt_picture_is_named_by_next(num_threads):
  plan = make_plan()
  at = plan.indices[2][0]
  first = int(np.flatnonzero((plan.indices == at).any(axis=1))[0])
  iterator = batches(Flaky([at]), plan, num_threads=num_threads)
  for _ in range(first):  # What came before it is delivered.
    within(20, lambda: next(iterator))
  with pytest.raises(images.CorruptImageError, match=rf"flaky\[{at}\]: broken"):
    within(20, lambda: next(iterator))


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(3), OSError])
def test_a_dead_thread_raises_in_the_loop(error):
  kind = error if isinstance(error, type) else type(error)
  for on_corrupt in ("error", "skip"):  # Only corrupt pictures are skipped.
    source = Flaky(range(len(PIDS)), error=error)
    iterator = batches(source, num_threads=2, on_corrupt=on_corrupt)
    with pytest.raises(kind):
      within(20, lambda iterator=iterator: next(iterator))
    iterator.close()
  with pytest.raises(kind):
    within(20, lambda: loader.load_images(source, size=SIZE, num_threads=2))


@pytest.mark.parametrize("num_threads", [0, 3])
def test_skipped_pictures_are_replaced_by_the_same_person(
  num_threads, warnings
):
  corrupt, plan = {5, 6, 0}, make_plan(epochs=10)
  iterator = batches(
    Flaky(corrupt, delay=1e-3),
    plan,
    on_corrupt="skip",
    num_threads=num_threads,
  )
  found = list(iterator)
  for batch, row in zip(found, plan.indices, strict=True):
    index = batch["index"]
    np.testing.assert_array_equal(PIDS[index], PIDS[row])
    assert not corrupt & set(index.tolist())
    kept = ~np.isin(row, list(corrupt))
    np.testing.assert_array_equal(index[kept], row[kept])
    for picture, i in zip(batch["image"], index, strict=True):
      np.testing.assert_array_equal(picture, expected(i))
    # Person 4 has five pictures, four of them sound: no need to repeat one.
    mine = index[PIDS[index] == 4]
    assert len(set(mine.tolist())) == len(mine)
  # Person 9 has sound pictures 7 and 8 only.
  assert any(set(b["index"].tolist()) >= {7, 8} for b in found)
  assert iterator.num_corrupt == 3
  # One line a file, however often it was met, and one for all of them.
  assert sorted(warnings[:-1]) == [
    f"replaced: flaky[{i}]: broken" for i in sorted(corrupt)
  ]
  assert warnings[-1].startswith("3 corrupt images were replaced")


def test_reading_ahead_is_bounded_and_stops_with_close():
  source, plan = Flaky(), make_plan(epochs=200)
  iterator = batches(source, plan, num_threads=1, prefetch=2)
  next(iterator)
  time.sleep(0.2)
  # One delivered, two ready; grain may have begun one more.
  assert len(source.reads) <= 4 * plan.batch_size
  iterator.close()
  time.sleep(0.05)
  at_close = len(source.reads)
  time.sleep(0.1)
  assert len(source.reads) == at_close


def test_bad_arguments():
  source, plan = Flaky(), make_plan()
  with pytest.raises(errors.UserError, match="on_corrupt = 'ignore'"):
    batches(source, plan, on_corrupt="ignore")
  with pytest.raises(errors.UserError, match="on_corrupt = 'ignore'"):
    loader.load_images(source, size=SIZE, on_corrupt="ignore")
  with pytest.raises(errors.UserError, match="num_threads = -1"):
    batches(source, plan, num_threads=-1)
  with pytest.raises(errors.UserError, match="interpolation 'cubic'"):
    next(batches(source, plan, interpolation="cubic"))
  with pytest.raises(ValueError, match="start_step"):
    batches(source, plan, start_step=len(plan) + 1)
  with pytest.raises(ValueError, match="beyond the 12 images"):
    batches(source, sampler.Plan(plan.indices + 8, plan.epochs))
  with pytest.raises(errors.UserError, match="empty"):
    nothing = source_lib.Arrays(make_pictures()[:0], PIDS[:0])
    loader.load_images(nothing, size=SIZE)


def test_device_prefetch_keeps_order_and_runs_ahead():
  put = []

  def recorded(batch):
    put.append(int(batch["index"]))
    return jax.device_put(batch)

  source = ({"index": np.int32(i)} for i in range(6))
  ahead = loader.device_prefetch(source, size=2, put=recorded)
  first = next(ahead)
  assert isinstance(first["index"], jax.Array) and first["index"] == 0
  assert put == [0, 1, 2]
  assert [int(b["index"]) for b in ahead] == [1, 2, 3, 4, 5]
  assert [int(b) for b in loader.device_prefetch(iter(np.arange(2)), 8)] == [
    0,
    1,
  ]


def test_device_prefetch_closes_what_it_reads_from():
  iterator = batches(Flaky(), num_threads=1)
  ahead = loader.device_prefetch(iterator)
  np.testing.assert_array_equal(next(ahead)["index"], make_plan().indices[0])
  with unittest.mock.patch.object(iterator, "close", wraps=iterator.close) as c:
    ahead.close()
  assert c.called


def test_errors_pass_through_device_prefetch():
  ahead = loader.device_prefetch(batches(Flaky(range(12)), num_threads=2))
  with pytest.raises(images.CorruptImageError):
    within(20, lambda: list(ahead))
