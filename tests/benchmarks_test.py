import pathlib
import unittest.mock

from absl import logging
import numpy as np
import pytest

from dppp_jax import errors
from dppp_jax.data import benchmarks, images, source

# {subset folder: file names}; persons and cameras as their authors name them.
MARKET = {
  "bounding_box_train": [
    "0002_c1s1_000451_03.jpg",
    "0002_c6s3_000451_03.jpg",
    "0007_c3s3_077419_03.jpg",
  ],
  "query": ["0001_c1s1_001051_00.jpg", "0003_c10s2_003071_00.jpg"],
  "bounding_box_test": [
    "-1_c1s1_000401_03.jpg",
    "0000_c2s1_000076_02.jpg",
    "0001_c2s1_001976_01.jpg",
    "0003_c1s1_001976_01.jpg",
  ],
}
DUKE = {
  "bounding_box_train": ["0001_c2_f0046182.jpg", "0001_c8_f0046302.jpg"],
  "query": ["0005_c2_f0046985.jpg"],
  "bounding_box_test": [
    "0005_c5_f0061285.jpg",
    "0006_c5_f0061285.jpg",
    "0000_c1_f0061285.jpg",
  ],
}


def write(folder: pathlib.Path, names: dict[str, list[str]]) -> pathlib.Path:
  """Makes the folder; each file holds a grey that tells it from the others."""
  grey = 0
  for subset, files in names.items():
    (folder / subset).mkdir(parents=True)
    for file in files:
      grey += 20
      pixels = np.full((8, 4, 3), grey, np.uint8)
      (folder / subset / file).write_bytes(images.encode_jpeg(pixels))
  return folder


def load(name, root):
  with unittest.mock.patch.object(logging, "warning"):
    return benchmarks.load(name, root, allow_partial=True)


def test_market_is_parsed(tmp_path):
  write(tmp_path, MARKET)
  (tmp_path / "bounding_box_test" / "Thumbs.db").write_bytes(b"x")
  (tmp_path / "bounding_box_test" / "._0001_c2s1_001976_01.jpg").touch()
  found = load("Market-1501", tmp_path)

  assert found.name == "market1501" and found.root == tmp_path
  assert found.train.pids.tolist() == [2, 2, 7]
  assert found.train.camids.tolist() == [0, 5, 2]
  assert found.query.pids.tolist() == [1, 3]
  assert found.query.camids.tolist() == [0, 9]  # Two digits are not cut to 1.
  # Junk is gone, the distractor stays, in the order of the names.
  assert found.gallery.pids.tolist() == [0, 1, 3]
  assert found.gallery.camids.tolist() == [1, 1, 0]
  assert isinstance(found.gallery, source.Source)
  assert found.gallery.pids.dtype == found.gallery.camids.dtype == np.int64
  assert found.counts == {
    "train": benchmarks.Counts(3, 2),
    "query": benchmarks.Counts(2, 2),
    "gallery": benchmarks.Counts(3, 3),
  }
  assert not found.is_whole


def test_pictures_belong_to_their_names(tmp_path):
  write(tmp_path, MARKET)
  train = load("market1501", tmp_path).train
  assert [int(train.read(i).mean()) for i in range(3)] == [20, 40, 60]
  assert train.name(2).endswith("0007_c3s3_077419_03.jpg")


def test_distractors_never_train(tmp_path):
  names = MARKET | {
    "bounding_box_train": ["0000_c1s1_000451_03.jpg", "0002_c1s1_000451_03.jpg"]
  }
  found = load("market1501", write(tmp_path, names))
  assert found.train.pids.tolist() == [2]


def test_duke_is_parsed(tmp_path):
  found = load("dukemtmcreid", write(tmp_path, DUKE))
  assert found.train.pids.tolist() == [1, 1]
  assert found.train.camids.tolist() == [1, 7]
  # Duke names no distractors: person 0 would be a person.
  assert found.gallery.pids.tolist() == [0, 5, 6]


def test_folders_above_are_not_parsed(tmp_path):
  root = write(tmp_path / "run-2_c3" / "0009_c9s9_1_1", MARKET)
  assert load("market1501", root).query.camids.tolist() == [0, 9]


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png", ".PNG"])
def test_suffixes(tmp_path, suffix):
  names = {
    folder: [str(pathlib.Path(f).with_suffix(suffix)) for f in files]
    for folder, files in MARKET.items()
  }
  assert len(load("market1501", write(tmp_path, names)).train) == 3


@pytest.mark.parametrize(
  ("name", "spelling"),
  [
    ("market1501", "."),
    ("market1501", "Market-1501-v15.09.15"),
    ("market1501", "market1501"),
    ("market1501", "Market1501"),
    ("market1501", "market1501/Market-1501-v15.09.15"),
    ("dukemtmcreid", "."),
    ("dukemtmcreid", "DukeMTMC-reID"),
    ("dukemtmcreid", "dukemtmcreid"),
    ("dukemtmcreid", "dukemtmc-reid/DukeMTMC-reID"),
  ],
)
def test_parent_spellings(tmp_path, name, spelling):
  # Another benchmark beside it must not disturb.
  other, names = (
    ("DukeMTMC-reID", MARKET) if name == "market1501" else ("market1501", DUKE)
  )
  write(tmp_path / spelling, names)
  if spelling != ".":
    write(tmp_path / other, DUKE if names is MARKET else MARKET)
  assert load(name, tmp_path).root == (tmp_path / spelling)


def test_counts_that_differ_name_both_numbers(tmp_path):
  write(tmp_path, MARKET)
  with pytest.raises(errors.UserError) as caught:
    benchmarks.load("market1501", tmp_path)
  message = str(caught.value)
  assert "train has 3 images of 2 persons" in message
  assert "published are 12,936 images of 751 persons" in message
  assert "15,913 images of 751" in message and "3,368 images of 750" in message
  assert "--allow_partial" in message and "\n" not in message

  with unittest.mock.patch.object(logging, "warning") as warning:
    benchmarks.load("market1501", tmp_path, allow_partial=True)
  warned = warning.call_args.args[0] % warning.call_args.args[1:]
  assert "3 images" in warned and "12,936" in warned


def test_the_whole_benchmark_needs_no_permission(tmp_path, monkeypatch):
  # The published counts, with empty files: names are all that is read.
  row = benchmarks._ROWS["market1501"]
  counts = {"train": (12, 7), "query": (6, 5), "gallery": (15, 6)}
  published = {k: benchmarks.Counts(*v) for k, v in counts.items()}
  monkeypatch.setitem(
    benchmarks._ROWS,
    "market1501",
    benchmarks.dataclasses.replace(row, published=published),
  )
  for subset, first, distractors in (
    ("train", 100, 0), ("query", 1, 0), ("gallery", 1, 1)
  ):  # fmt: skip
    folder = tmp_path / row.folders[subset]
    folder.mkdir()
    num_images, num_ids = counts[subset]
    for i in range(num_images):
      pid = i % num_ids + first - distractors
      camera = 1 if subset == "query" else 2
      (folder / f"{pid:04}_c{camera}s1_{i:06}_00.jpg").touch()
  assert benchmarks.load("market1501", tmp_path).is_whole


def with_files(changes: dict[str, list[str]]):
  return lambda folder: write(folder, MARKET | changes)


@pytest.mark.parametrize(
  ("build", "says"),
  [
    (lambda root: root.parent / "none", ["none: no such folder", "query"]),
    (lambda root: root, ["no folder query nor bounding_box_test", "looked"]),
    (
      lambda root: write(root / "Market-1501", {"query": MARKET["query"]}),
      ["Market-1501: no folder bounding_box_test of Market-1501"],
    ),
    (with_files({"query": []}), ["query: holds no .jpg, .jpeg, .png, .bmp"]),
    (with_files({"query": ["a.gif"]}), ["query: holds no .jpg"]),
    (
      with_files({"query": ["1" * 30 + "_c1s1_000401_03.jpg"]}),
      ["numbers end at 2,147,483,647", "rename it"],
    ),
    (
      with_files({"query": ["0001_c" + "9" * 20 + "s1_000401_03.jpg"]}),
      ["numbers end at 2,147,483,647"],
    ),
    (
      with_files({"query": ["-1_c1s1_000401_03.jpg"]}),
      ["query: none of its 1 files shows a known person"],
    ),
    (
      with_files({"query": ["0005_c2_f0046985.jpg"]}),
      ["0005_c2_f0046985.jpg: not a file name of Market-1501", "0002_c1s1"],
    ),
    (
      with_files({"query": ["0001_c0s1_001051_00.jpg"]}),
      ["0001_c0s1_001051_00.jpg: not a file name"],  # Cameras count from 1.
    ),
    (
      with_files({"query": ["0002_c1s1_001051_00.jpg"]}),
      ["1 persons are both in bounding_box_train and in query", "is 2"],
    ),
    (
      with_files({"query": ["0001_c2s1_001051_00.jpg"]}),
      ["no query has a picture of the same person from another camera"],
    ),
  ],
)
def test_bad_folders_are_named(tmp_path, build, says):
  root = tmp_path / "benchmarks"
  root.mkdir()
  built = build(root)
  root = built if not built.exists() else root
  with pytest.raises(errors.UserError) as caught:
    benchmarks.load("market1501", root, allow_partial=True)
  message = str(caught.value)
  assert all(part in message for part in says), message
  assert "\n" not in message


@pytest.mark.parametrize("is_absent", [True, False])
def test_training_pictures_may_be_missing(tmp_path, is_absent):
  files = {k: v for k, v in MARKET.items() if k != "bounding_box_train"}
  folder = write(tmp_path / "market1501", files)
  if not is_absent:
    (folder / "bounding_box_train").mkdir(exist_ok=True)
  found = benchmarks.load("market1501", tmp_path, allow_partial=True)
  assert len(found.train) == 0 and found.train.counts.ids == 0
  assert len(found.query) and len(found.gallery)
  with pytest.raises(errors.UserError, match="bounding_box_train"):
    benchmarks.load(
      "market1501", tmp_path, allow_partial=True, needs=("train",)
    )


def test_training_needs_no_query(tmp_path):
  name = "bounding_box_train"
  write(tmp_path / "market1501", {name: MARKET[name]})
  found = benchmarks.load(
    "market1501", tmp_path, allow_partial=True, needs=("train",)
  )
  assert len(found.train) and not len(found.query) and not len(found.gallery)


def test_what_a_mac_leaves_is_no_picture(tmp_path, monkeypatch):
  folder = write(tmp_path / "market1501", MARKET)
  for name in ("._0001_c1s1_001051_00.jpg", ".DS_Store"):
    (folder / "query" / name).touch()
  write(tmp_path / "._market1501", MARKET)
  monkeypatch.setenv("HOME", str(tmp_path))
  found = benchmarks.load("market1501", "~", allow_partial=True)
  assert found.root == folder
  assert len(found.query) == len(MARKET["query"])


def test_upper_case_and_other_suffixes_are_read(tmp_path):
  files = {
    k: [x.replace(".jpg", s) for x, s in zip(v, (".JPG", ".PNG", ".tif") * 9)]
    for k, v in MARKET.items()
  }
  write(tmp_path / "a", MARKET)
  write(tmp_path / "b", files)
  counts = [
    benchmarks.load("market1501", tmp_path / name, allow_partial=True).counts
    for name in "ab"
  ]
  assert counts[0] == counts[1]


def test_two_copies_are_not_guessed_between(tmp_path):
  write(tmp_path / "market1501", MARKET)
  write(tmp_path / "Market-1501-v15.09.15", MARKET)
  with pytest.raises(errors.UserError, match="more than once"):
    benchmarks.load("market1501", tmp_path, allow_partial=True)


def test_link_to_a_copy_is_no_second_one(tmp_path):
  folder = write(tmp_path / "Market-1501-v15.09.15", MARKET)
  (tmp_path / "market1501").symlink_to(folder)
  assert load("market1501", tmp_path).root.resolve() == folder


def test_unknown_name(tmp_path):
  with pytest.raises(errors.UserError, match="use one of market1501, dukemtmc"):
    benchmarks.load("msmt", tmp_path)


def test_queries_without_a_match_are_counted(tmp_path):
  queries = ["0001_c1s1_001051_00.jpg", "0009_c1s1_001051_00.jpg"]
  write(tmp_path, MARKET | {"query": queries})
  with unittest.mock.patch.object(logging, "warning") as warning:
    benchmarks.load("market1501", tmp_path, allow_partial=True)
  warned = [c.args[0] % c.args[1:] for c in warning.call_args_list]
  assert any("1 of 2 queries" in w and "0009_c1s1" in w for w in warned)


def test_files_that_vanish_or_break_are_named(tmp_path):
  train = load("market1501", write(tmp_path, MARKET)).train
  train.paths[0].unlink()
  with pytest.raises(images.CorruptImageError, match=r"0002_c1s1.*cannot be"):
    train.read(0)
  train.paths[1].write_bytes(train.paths[1].read_bytes()[:-40])
  with pytest.raises(images.CorruptImageError, match="0002_c6s3"):
    train.read(1)
