"""The dataset on disk: TFDS with and without TensorFlow, and our own reader."""

import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys

import google_crc32c
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from dppp_jax import errors
from dppp_jax.data import images, shards, source
from dppp_jax.geneperson import dataset, pipeline

_SIZE = (24, 12)
_COLORS = ("red", "green", "blue")


def make_identity(pid):
  """Flat colours with a white stripe where the cell says."""
  records = []
  for cell in range(3):
    image = np.zeros((*_SIZE, 3), np.uint8)
    image[..., pid % 3] = 200
    image[8 * cell : 8 * cell + 4] = 255
    records.append(
      {
        "image": image,
        "pid": pid,
        "cell": cell,
        "pose": 10 * pid + cell,
        "view": ("back", "front", "side")[cell],
        "lighting": "night dark",
        "background": f"street {cell}",
        "prompt": f"a person — № {pid}",
        "attributes": {
          name: f"{name} of {pid}" for name in dataset.ATTRIBUTES[:-1]
        }
        | {"upper_color": _COLORS[pid % 3]},
      }
    )
  return records


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp("data")
  pipeline.run(
    make_identity,
    data_dir=path,
    num_identities=6,
    seed=0,
    image_size=_SIZE,
    source="flat colours",
    config={},
    sheet_every=3,
  )
  # Whatever else a run may leave there must not disturb TFDS.
  (path / "geneperson" / "1.0.0.parts" / "extras").mkdir(parents=True)
  (path / "geneperson" / "incomplete.1.0.0").mkdir()
  return path


@pytest.fixture
def copy(data_dir, tmp_path):
  """A copy that a test may damage, and its folder with the files."""
  shutil.copytree(data_dir, tmp_path / "data")
  return tmp_path / "data", tmp_path / "data" / "geneperson" / "1.0.0"


def test_reader_gives_back_every_feature(data_dir):
  held = shards.load(data_dir, verify=True)
  assert isinstance(held, source.Source) and len(held) == 18
  assert held.pids.dtype == np.int64
  assert held.pids.tolist() == np.repeat(np.arange(6), 3).tolist()
  assert held.camids.tolist() == [0] * 18
  for i in (0, 7, 17):
    wanted = make_identity(i // 3)[i % 3]
    record = held.record(i)
    assert set(record) == set(dataset.RECORD_KEYS)
    jpeg = images.encode_jpeg(wanted.pop("image"), quality=95)
    image = images.decode(jpeg, name="")
    np.testing.assert_array_equal(record.pop("image"), image)
    np.testing.assert_array_equal(held.read(i), image)
    wanted["attributes"]["bag_color"] = ""  # Absent in what was made.
    assert record == wanted
  assert held.name(17).endswith("geneperson-train.tfrecord-00000-of-00001:17")
  with pytest.raises(IndexError):
    held.read(18)


def test_reader_can_be_sent_to_a_worker(data_dir):
  held = shards.load(data_dir)
  twin = pickle.loads(pickle.dumps(held))
  np.testing.assert_array_equal(twin.read(5), held.read(5))
  assert twin.name(5) == held.name(5)


def test_several_shards_are_read_as_one(tmp_path):
  spec = dataset.features(_SIZE)
  parts, records = {}, []
  for number, pids in enumerate(((0,), (1, 2), (3,))):
    part = tmp_path / f"part-{number}"
    made = [r for pid in pids for r in make_identity(pid)]
    made = [r | {"image": images.encode_jpeg(r["image"])} for r in made]
    records += made
    part.write_bytes(
      b"".join(shards.frame(dataset.serialize(r, spec)) for r in made)
    )
    parts[part] = len(made)
  folder = tmp_path / "geneperson" / "1.0.0"
  folder.mkdir(parents=True)
  dataset.write_folder(folder, parts, image_size=_SIZE)
  held = shards.load(tmp_path)
  assert len(held) == 12
  assert [held.record(i)["pose"] for i in range(12)] == [
    r["pose"] for r in records
  ]
  assert held.name(3).endswith("00001-of-00003:0")
  assert held.name(11).endswith("00002-of-00003:2")
  builder = tfds.builder_from_directory(folder)
  assert builder.info.splits["train"].num_examples == 12
  assert len(builder.as_data_source("train")) == 12


def test_framing_is_tfrecords(data_dir):
  """By the format's own definition, bit by bit."""
  record = bytes(range(256)) * 3

  def masked(data):
    crc = int.from_bytes(google_crc32c.Checksum(data).digest(), "big")
    rotated = (crc >> 15) | (crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)

  length = struct.pack("<Q", 768)
  framed = length + masked(length) + record + masked(record)
  assert shards.frame(record) == framed
  starts, lengths = shards.scan(framed * 2, name="x", verify=True)
  assert starts.tolist() == [12, 12 + len(framed)]
  assert lengths.tolist() == [768, 768]


# What a user with TensorFlow types, in one process, because the import is slow.
_TENSORFLOW = """
import sys
import numpy as np
import tensorflow_datasets as tfds

ds, info = tfds.load("geneperson", split="train", with_info=True)
examples = list(ds.as_numpy_iterator())
flat = {key: np.stack([e[key] for e in examples])
        for key in ("image", "pid", "cell", "pose", "prompt")}
view = info.features["view"]
flat["view"] = np.array([view.int2str(e["view"]) for e in examples])
flat["skin"] = np.stack([e["attributes"]["skin"] for e in examples])
half = tfds.load("geneperson", split="train[:50%]", as_supervised=True)
flat["half"] = np.array([int(pid) for _, pid in half])
assert "dppp_jax" not in sys.modules
from dppp_jax.geneperson import dataset  # Registers our own builder.
builder = tfds.builder("geneperson")
assert isinstance(builder, dataset.Geneperson)
flat["ours"] = np.array(len(builder.as_dataset(split="train")))
np.savez(sys.argv[1], **flat)
"""


def test_tensorflow_reads_it(data_dir, tmp_path):
  """With no import of ours: TFDS_DATA_DIR is all that it needs."""
  done = subprocess.run(
    [sys.executable, "-c", _TENSORFLOW, str(tmp_path / "read.npz")],
    cwd=pathlib.Path(pipeline.__file__).parents[2],
    env=os.environ | {"TFDS_DATA_DIR": str(data_dir)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  read = np.load(tmp_path / "read.npz")
  held = shards.load(data_dir)
  records = [held.record(i) for i in range(18)]
  for key in ("pid", "cell", "pose", "view"):
    assert read[key].tolist() == [record[key] for record in records]
  prompts = [prompt.decode() for prompt in read["prompt"].tolist()]
  assert prompts == [record["prompt"] for record in records]
  skins = [skin.decode() for skin in read["skin"].tolist()]
  assert skins == [record["attributes"]["skin"] for record in records]
  pictures = np.stack([record["image"] for record in records]).astype(int)
  assert read["image"].shape == (18, *_SIZE, 3)
  # TensorFlow's JPEG decoder takes the fast DCT, Pillow's the exact one.
  assert np.abs(read["image"] - pictures).mean() < 1.0
  assert read["half"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
  assert read["ours"] == 18


# No TensorFlow, and none of this package: what other people's machines have.
_BLOCK = """
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    if name.split(".")[0] in ("tensorflow", "dppp_jax"):
      return None
    return super().find_spec(name, path, target)

sys.meta_path[:] = [
    f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
sys.path_importer_cache.clear()
import importlib.util
assert importlib.util.find_spec("tensorflow") is None
assert importlib.util.find_spec("dppp_jax") is None
import tensorflow_datasets as tfds
"""


def _elsewhere(script, tmp_path, **env):
  return subprocess.run(
    [sys.executable, "-c", _BLOCK + script],
    cwd=tmp_path,
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env,
    capture_output=True,
    text=True,
    check=False,
  )


def test_loads_without_tensorflow_and_without_us(data_dir, tmp_path):
  folder = data_dir / "geneperson" / "1.0.0"
  script = f"""
import json
sources = [
  tfds.builder_from_directory({str(folder)!r}).as_data_source("train"),
  tfds.builder("geneperson").as_data_source(split="train"),
  tfds.data_source("geneperson", data_dir={str(data_dir)!r}, split="train"),
]
for source in sources:
  e = source[7]
  print(json.dumps([len(source), int(e["pid"]), int(e["view"]),
                    e["prompt"].decode(), e["attributes"]["skin"].decode(),
                    list(e["image"].shape), e["image"][0, 0].tolist()]))
assert "tensorflow" not in sys.modules
"""
  # tfds.builder finds the files by TFDS_DATA_DIR alone.
  done = _elsewhere(script, tmp_path, TFDS_DATA_DIR=str(data_dir))
  assert done.returncode == 0, done.stderr
  pixel = shards.load(data_dir).read(7)[0, 0].tolist()
  wanted = [18, 2, 0, "a person — № 2", "skin of 2", [*_SIZE, 3], pixel]
  assert [json.loads(line) for line in done.stdout.splitlines()] == [wanted] * 3


def test_our_builder_keeps_both_formats_and_the_size(data_dir):
  builder = tfds.builder("geneperson", data_dir=data_dir)
  assert isinstance(builder, dataset.Geneperson)
  builder.download_and_prepare()
  assert builder.info.features["image"].shape == (*_SIZE, 3)
  assert builder.as_data_source("train")[4]["pid"] == 1


def test_our_builder_says_how_to_make_the_data(tmp_path):
  builder = dataset.Geneperson(data_dir=tmp_path / "none")
  with pytest.raises(errors.UserError, match=r"launch/generate\.py --data_dir"):
    builder.download_and_prepare()


@pytest.mark.parametrize("key", ["tfrecord", "array_record"])
def test_both_formats_hold_the_same_bytes(data_dir, key):
  held = shards.load(data_dir)
  folder = data_dir / "geneperson" / "1.0.0"
  path = folder / dataset.shard_name(0, 1, key)
  if key == "tfrecord":
    starts, lengths = shards.scan(path.read_bytes(), name="x", verify=True)
    assert len(starts) == 18 and lengths.min() > 100
    return
  from array_record.python import array_record_module

  reader = array_record_module.ArrayRecordReader(str(path))
  assert reader.read_all() == [held.raw(i) for i in range(18)]
  reader.close()


def test_contact_sheets_were_drawn(data_dir):
  folder = data_dir / "geneperson" / "1.0.0"
  names = sorted(path.name for path in folder.glob("contact_sheet-*.png"))
  assert names == [f"contact_sheet-{pid:06d}.png" for pid in (0, 2, 5)]
  sheet = np.asarray(PIL.Image.open(folder / names[1]))
  assert sheet.shape == (3 * 24, 3 * 12, 3)  # 3 people, 3 pictures each.
  # Person 1 (second row) is green, its first picture's stripe on top.
  assert np.abs(sheet[24 + 16, 6].astype(int) - (0, 200, 0)).max() < 12
  assert sheet[24 + 1, 6].min() > 240


# What goes wrong, and what is said.


def _expect(data_dir, message, **kwargs):
  with pytest.raises(errors.UserError, match=message) as info:
    shards.load(data_dir, **kwargs)
  assert "\n" not in str(info.value)
  return str(info.value)


def test_missing(tmp_path):
  said = _expect(tmp_path / "nowhere", "no such dataset")
  assert f"python launch/generate.py --data_dir {tmp_path / 'nowhere'}" in said


def test_not_finished(tmp_path):
  (tmp_path / "geneperson" / "1.0.0.parts").mkdir(parents=True)
  _expect(tmp_path, r"not finished yet: run `python launch/generate\.py")


def test_no_metadata(copy):
  (copy[1] / "dataset_info.json").unlink()
  _expect(copy[0], r"dataset_info\.json: missing")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"splits": []}'])
def test_damaged_metadata(copy, text):
  (copy[1] / "dataset_info.json").write_text(text)
  _expect(copy[0], r"dataset_info\.json: cannot be read")


def test_unknown_split(data_dir):
  _expect(data_dir, "no split 'test'", split="test")


def test_missing_shard(copy):
  next(copy[1].glob("*.tfrecord-*")).unlink()
  _expect(copy[0], "tfrecord-00000-of-00001: missing shard")


@pytest.mark.parametrize("cut", [1, 10, 900, 10**9])
def test_truncated_shard(copy, cut):
  path = next(copy[1].glob("*.tfrecord-*"))
  os.truncate(path, max(0, path.stat().st_size - cut))
  _expect(copy[0], r"tfrecord-00000-of-00001: (record \d+ is torn|holds 0)")


def test_flipped_bits(copy):
  path = next(copy[1].glob("*.tfrecord-*"))
  held = shards.load(copy[0])
  start = int(held._starts[4])
  data = bytearray(path.read_bytes())
  data[start + 300] ^= 4  # In the JPEG or the words of record 4.
  path.write_bytes(data)
  _expect(copy[0], "record 4 is damaged .its bytes.", verify=True)
  data[start + 300] ^= 4
  data[start - 9] ^= 1  # In its length.
  path.write_bytes(data)
  _expect(copy[0], "record 4 is damaged .its length.")


def _rewrite(path, records):
  path.write_bytes(b"".join(shards.frame(record) for record in records))


def test_a_corrupt_picture_is_named_by_shard_and_record(copy):
  held = shards.load(copy[0])
  records = [held.raw(i) for i in range(18)]
  jpeg = held._feature(5)["image"].bytes_list.value[0]
  records[5] = records[5].replace(jpeg, jpeg[:100] + bytes(len(jpeg) - 100))
  _rewrite(next(copy[1].glob("*.tfrecord-*")), records)
  held = shards.load(copy[0], verify=True)
  held.read(4)
  with pytest.raises(images.CorruptImageError, match="of-00001:5: cannot be"):
    held.read(5)


def test_what_is_no_example_is_named(copy):
  _rewrite(next(copy[1].glob("*.tfrecord-*")), [b"\xff" * 90] * 18)
  _expect(copy[0], r"of-00001:0: not a tf\.train\.Example")


def test_examples_of_another_dataset_are_named(copy):
  _rewrite(next(copy[1].glob("*.tfrecord-*")), [b""] * 18)
  _expect(copy[0], "of-00001:0: has no pid")


def test_missing_shard_folder_is_a_path_not_a_crash(tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  _expect(pathlib.Path(file), "no such dataset")
