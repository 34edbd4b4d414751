"""Users' files as they come: hidden doubles, marks, wrong names."""

import gzip
import json

import numpy as np
import pytest
import safetensors.numpy
import torch

from dppp_jax import errors, files
from dppp_jax.geneperson import openpose, pose_bank
from dppp_jax.weights import hub, lora_keys, u2net

DOUBLE = b"\0\5\26\7\0\2\0\0Mac OS X        " + bytes(64)
POSE = {
  "people": [
    {
      "pose_keypoints_2d": [
        float(v) for i in range(18) for v in (100 + 5 * i, 100 + 20 * i, 1)
      ]
    }
  ]
}


def save(path):
  safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, path)
  return path


def test_what_a_folder_shows(tmp_path):
  for name in ("b.JSON", "a.json", "._a.json", ".DS_Store", "a.json.part"):
    (tmp_path / name).write_text("{}")
  (tmp_path / "folder.json").mkdir()
  names = [path.name for path in files.visible(tmp_path, ".json")]
  assert names == ["a.json", "b.JSON"]
  assert len(files.visible(tmp_path)) == 3
  # A link that leads nowhere is not passed over: its reader names it.
  (tmp_path / "c.json").symlink_to(tmp_path / "gone.json")
  link = files.visible(tmp_path, ".json")[-1]
  with pytest.raises(errors.UserError, match=r"c\.json cannot be read"):
    files.read_json(link)
  link.unlink()
  assert [p.name for p in files.visible(tmp_path, ".json", ".part")] == [
    "a.json",
    "a.json.part",
    "b.JSON",
  ]


@pytest.mark.parametrize(
  "name, read",
  [
    ("x.safetensors", hub.weight_files),
    ("x.SafeTensors", hub.read_tensors),
    ("x.safetensors", lora_keys.locate),
    ("U2NET.ONNX", u2net.locate),
    ("a.json", pose_bank.read_openpose),
  ],
)
def test_doubles_of_a_mac_are_not_there(tmp_path, name, read):
  if name.endswith("json"):
    (tmp_path / name).write_text(json.dumps(POSE))
  else:
    save(tmp_path / name)
  read(tmp_path)
  (tmp_path / f"._{name}").write_bytes(DOUBLE)
  (tmp_path / ".DS_Store").write_bytes(b"x")
  read(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_of_any_encoding(tmp_path, encoding):
  path = tmp_path / "x.json"
  path.write_text(json.dumps(POSE), encoding=encoding)
  assert files.read_json(path) == POSE == hub.read_json(path)
  assert openpose.read(path).points[0] == (100.0, 100.0)


@pytest.mark.parametrize(
  "data, said",
  [
    (b'{"a": 1, "a": 2}', "'a' stands in it twice"),
    (b"{", "is not JSON"),
    (b"[" * 100000, "is not JSON"),
    (b"\xff\xfe\xfd", "is not JSON"),
    (b"<!DOCTYPE html><html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"", "0 bytes"),
    (b'{"a": 1' + b"1" * 5000 + b"}", "is not JSON"),
  ],
)
def test_what_is_no_json(tmp_path, data, said):
  path = tmp_path / "config.json"
  path.write_bytes(data)
  for read in (files.read_json, hub.read_json):
    with pytest.raises(errors.UserError, match=said) as caught:
      read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


IMPOSTORS = {
  "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha",
  "web page": b"\n<!DOCTYPE html>\n<html><head>",
  "is a text that begins 'Invalid username": b"Invalid username or password.",
  "0 bytes": b"",
  "gzip": gzip.compress(b"x" * 99),
  "GGUF": b"GGUF\3\0\0\0" + bytes(99),
  "the double that a Mac": DOUBLE,
  "7z": b"7z\xbc\xaf\x27\x1c" + bytes(9),
  "tar": bytes(257) + b"ustar\0" + bytes(300),
  "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99),
  "a picture": b"\x89PNG\r\n\x1a\n" + bytes(99),
  "torch file or a zip": b"PK\3\4" + bytes(99),
  "truncated": bytes(range(99)),
}


@pytest.mark.parametrize("said", IMPOSTORS)
@pytest.mark.parametrize("name", ["x.safetensors", "x.SAFETENSORS"])
def test_a_wrong_file_is_called_by_its_right_name(tmp_path, said, name):
  path = tmp_path / name
  path.write_bytes(IMPOSTORS[said])
  for read in (hub.read_tensors, hub.check):
    with pytest.raises(errors.UserError, match=said) as caught:
      read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("said", ["gzip", "web page", "GGUF", "a picture"])
def test_also_under_other_names(tmp_path, said):
  for name in ("x.ckpt", "x.onnx", "x.gguf", "x"):
    path = tmp_path / name
    path.write_bytes(IMPOSTORS[said])
    with pytest.raises(errors.UserError, match=said):
      u2net.load(path) if name == "x.onnx" else hub.read_tensors(path)


def test_formats_against_their_names(tmp_path):
  other = save(tmp_path / "x.safetensors").rename(tmp_path / "x.ckpt")
  with pytest.raises(errors.UserError, match="is a safetensors file, against"):
    hub.read_tensors(other)
  path = tmp_path / "y.safetensors"
  torch.save({"a": torch.ones(2)}, path)
  with pytest.raises(errors.UserError, match="is a torch file"):
    hub.read_tensors(path)


@pytest.mark.parametrize("start", [b"\x80\2", b"\x1f\x8b", b"BZh"])
def test_a_length_that_looks_like_a_mark(tmp_path, start):
  """The first bytes of a .safetensors file are the length of its header."""
  path = tmp_path / "x.safetensors"
  length = int.from_bytes(start, "little")
  header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
  data = length.to_bytes(8, "little") + header.ljust(length) + bytes(4)
  path.write_bytes(data)
  assert hub.read_tensors(path)["a"].tolist() == [0]


def test_a_tensor_that_stands_twice(tmp_path):
  one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
  header = f"{{{one},{one}}}".encode()
  path = tmp_path / "x.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  with pytest.raises(errors.UserError, match="'a' stands in it twice"):
    hub.read_tensors(path)


def test_folders_and_links(tmp_path, monkeypatch):
  (tmp_path / "x.safetensors").mkdir()
  with pytest.raises(errors.UserError, match="holds no weights"):
    hub.read_tensors(tmp_path / "x.safetensors")
  (tmp_path / "x.safetensors" / "model.safetensors").symlink_to("blob")
  for path in (tmp_path / "x.safetensors", "model.safetensors"):
    path = tmp_path / "x.safetensors" / path
    with pytest.raises(errors.UserError, match="is a link to blob"):
      hub.read_tensors(hub.resolve(path))
  monkeypatch.setenv("HOME", str(tmp_path))
  save(tmp_path / "y.safetensors")
  assert list(hub.read_tensors("~/y.safetensors")) == ["a"]
  assert hub.weight_files("~/y.safetensors") == [tmp_path / "y.safetensors"]
