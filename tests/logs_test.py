"""Metrics on disk: JSONL that survives a kill, TensorBoard on request."""

import json
import re
import struct
import sys
import threading
import types

import pytest

from dppp_jax import errors, logs


def test_lines_are_read_back(tmp_path):
  writer = logs.Writer(tmp_path)
  writer.write(3, "ptl", {"loss": 0.5})
  writer.write(6, "ptl", {"loss": 0.25, "acc": 1})
  writer.close()
  assert logs.read(tmp_path / "metrics.jsonl") == [
    {"step": 3, "stage": "ptl", "loss": 0.5},
    {"step": 6, "stage": "ptl", "loss": 0.25, "acc": 1.0},
  ]


def test_resuming_cuts_what_lies_beyond_and_a_torn_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = [json.dumps({"step": s, "stage": "ptl"}) for s in (2, 4, 6)]
  path.write_text("\n".join(lines) + '\n{"step": 8, "sta')
  assert [x["step"] for x in logs.read(path)] == [2, 4, 6]
  writer = logs.Writer(tmp_path, resume_step=4)
  writer.write(6, "psd", {})
  writer.close()
  assert [(x["step"], x["stage"]) for x in logs.read(path)] == [
    (2, "ptl"),
    (4, "ptl"),
    (6, "psd"),
  ]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(errors.UserError, match=r"train\.tensorboard.*install"):
    logs.Writer(tmp_path, tensorboard=True)


def test_tensorboard_holds_the_same_numbers(tmp_path):
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  writer = logs.Writer(tmp_path, tensorboard=True)
  writer.write(7, "psd", {"loss": 0.5})
  writer.close()
  (path,) = tmp_path.glob("events.out.tfevents.*")
  data, found = path.read_bytes(), []
  while data:  # TFRecord frames: length, its CRC, record, its CRC.
    (length,) = struct.unpack("<Q", data[:8])
    event = event_pb2.Event.FromString(data[12 : 12 + length])
    found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    data = data[12 + length + 4 :]
  assert found == [(7, "psd/loss", 0.5)]


def test_long_waits_are_spoken_of_until_they_end(monkeypatch):
  said, twice = [], threading.Event()

  def say(text):
    said.append(text)
    if len(said) == 2:
      twice.set()

  monkeypatch.setattr(logs, "say", say)
  with logs.waiting("compiling", first=0.0, every=0.0):
    assert twice.wait(60)
  count = len(said)
  assert all(re.fullmatch(r"compiling: \d+ s so far", one) for one in said)
  with pytest.raises(KeyError), logs.waiting("reading"):
    raise KeyError  # What ends soon is not spoken of.
  assert len(said) == count
  # Where a bar is seen, the bar is enough.
  monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True))
  with logs.waiting("loading", has_bar=True, first=0.0, every=0.0):
    assert not any(t.name == "waiting" for t in threading.enumerate())
  assert len(said) == count
