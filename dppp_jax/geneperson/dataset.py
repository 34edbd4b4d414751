"""The TFDS dataset `geneperson`: its features, records and metadata.

TFDS needs TensorFlow to write TFRecord; the few lines that do it without are in
store.py. Whatever reads the folder (tfds.load with TensorFlow, as_data_source
without) does so by the JSON files that are written here.
"""

from collections.abc import Mapping
import errno
import os
import pathlib
import shutil
from typing import Any

from array_record.python import array_record_module
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info as dataset_info_lib
from tensorflow_datasets.core import splits as splits_lib
from tensorflow_datasets.proto import tf_example_pb2

from dppp_jax import errors
from dppp_jax.data import shards

NAME = "geneperson"
VERSION = "1.0.0"
SPLIT = "train"
VIEWS = ("front", "side", "back")
ATTRIBUTES = (
  "gender",
  "body",
  "skin",
  "hair_color",
  "hair_length",
  "hair_style",
  "upper_type",
  "upper_color",
  "upper_pattern",
  "lower_type",
  "lower_color",
  "lower_pattern",
  "footwear_type",
  "footwear_color",
  "footwear_pattern",
  "hat",
  "hat_color",
  "bag",
  "bag_color",
)
RECORD_KEYS = (
  "image",
  "pid",
  "cell",
  "pose",
  "view",
  "lighting",
  "background",
  "prompt",
  "attributes",
)
_DESCRIPTION = """\
GenePerson: invented people for person re-identification. Every identity (pid)
is seen in several cells: poses, views, lightings and backgrounds. Nobody in it
exists. manifest.json in the same folder says what made the pictures: seeds,
configuration, versions, prompts, counts and why cells were dropped.
"""
_INFO = {
  "description": _DESCRIPTION,
  "homepage": "https://arxiv.org/abs/2511.05092",  # Where it was proposed.
  "supervised_keys": ("image", "pid"),
  "alternative_file_formats": ["array_record"],
}


def features(
  image_size: tuple[int | None, int | None] = (None, None),
) -> tfds.features.FeaturesDict:
  """Returns the dataset's features.

  `view` is a ClassLabel because its values are closed (`int2str` names them);
  the other words come from vocabularies that may grow, and are strings.

  Args:
    image_size: (height, width) of every picture; None where it is not known.
  """
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(
        shape=(*image_size, 3), encoding_format="jpeg"
      ),
      "pid": tfds.features.Scalar(np.int64, doc="Identity, from 0."),
      "cell": tfds.features.Scalar(
        np.int64,
        doc="Place on the identity's canvas, row by row; on its second canvas"
        " from the number of cells on.",
      ),
      "pose": tfds.features.Scalar(np.int64, doc="Skeleton of the pose bank."),
      "view": tfds.features.ClassLabel(names=list(VIEWS)),
      "lighting": tfds.features.Text(),
      "background": tfds.features.Text(),
      "prompt": tfds.features.Text(),
      "attributes": tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in ATTRIBUTES}
      ),
    }
  )


def serialize(
  record: Mapping[str, Any], spec: tfds.features.FeaturesDict
) -> bytes:
  """Returns a record as a tf.train.Example: same record, same bytes.

  Args:
    record: see RECORD_KEYS; `image` is encoded JPEG bytes, absent attributes
      become "".
    spec: of `features`.

  Raises:
    ValueError: keys that the dataset does not have, or lacks.
  """
  attributes = record["attributes"]
  if set(record) != set(RECORD_KEYS):
    raise ValueError(f"a record has {RECORD_KEYS}, not {tuple(record)}")
  if unknown := set(attributes) - set(ATTRIBUTES):
    raise ValueError(f"attributes {sorted(unknown)} are not in {ATTRIBUTES}")
  if record["view"] not in VIEWS:
    raise ValueError(f"view {record['view']!r} is not in {VIEWS}")
  if not isinstance(record["image"], bytes):
    raise ValueError("the image must be encoded")
  full = {name: attributes.get(name, "") for name in ATTRIBUTES}
  encoded = spec.encode_example({**record, "attributes": full})
  # A protobuf map is written in the order of its hash table, which differs
  # from process to process unless it is asked to be deterministic.
  example = tf_example_pb2.Example.FromString(spec.serialize_example(encoded))
  return example.SerializeToString(deterministic=True)


def shard_name(index: int, count: int, suffix: str) -> str:
  """Returns the file name of one shard; suffix: "tfrecord", "array_record"."""
  return f"{NAME}-{SPLIT}.{suffix}-{index:05d}-of-{count:05d}"


def write_folder(
  folder: pathlib.Path,
  parts: Mapping[pathlib.Path, int],
  *,
  image_size: tuple[int, int],
) -> None:
  """Writes shards in both formats and the metadata into an empty folder.

  Args:
    folder: the dataset's folder.
    parts: TFRecord files, which become shards by hard links, and the number of
      records that each must hold.
    image_size: (height, width).

  Raises:
    errors.UserError: a part is damaged.
    OSError: no space left.
  """
  num_bytes = sum(path.stat().st_size for path in parts)
  if shutil.disk_usage(folder).free < 1.1 * num_bytes:
    raise OSError(
      errno.ENOSPC, f"{1.1 * num_bytes / 1e6:.0f} MB needed for ArrayRecord"
    )
  for i, (path, count) in enumerate(parts.items()):
    buffer = path.read_bytes()
    starts, lengths = shards.scan(buffer, name=str(path), verify=True)
    if len(starts) != count:
      raise errors.UserError(
        f"{path}: holds {len(starts)} records, its journal says {count}: remove"
        f" {path.parent} and generate again"
      )
    _link(path, folder / shard_name(i, len(parts), "tfrecord"))
    # One record per group: random access reads one picture, not a group.
    writer = array_record_module.ArrayRecordWriter(
      str(folder / shard_name(i, len(parts), "array_record")),
      "group_size:1,uncompressed",
    )
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
      writer.write(buffer[start : start + length])
    writer.close()
  _write_metadata(
    folder,
    image_size=image_size,
    shard_lengths=list(parts.values()),
    num_bytes=num_bytes,
  )


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  try:
    os.link(source, target)
  except OSError as error:
    if error.errno == errno.ENOSPC:
      raise
    shutil.copy2(source, target)  # A file system without hard links.


def _write_metadata(
  folder: pathlib.Path,
  *,
  image_size: tuple[int, int],
  shard_lengths: list[int],
  num_bytes: int,
) -> None:
  """Writes dataset_info.json and features.json.

  TFRecord is the primary format and ArrayRecord the alternative: tfds.load
  reads only TFRecord, as_data_source looks for the alternative, and the other
  way round neither works.
  """
  info = dataset_info_lib.DatasetInfo(
    builder=dataset_info_lib.DatasetIdentity(
      name=NAME,
      version=tfds.core.Version(VERSION),
      data_dir=os.fspath(folder),
      module_name="",
    ),
    features=features(image_size),
    **_INFO,
  )
  info.set_file_format("tfrecord")
  template = tfds.core.ShardedFileTemplate(
    dataset_name=NAME,
    data_dir=folder,
    split=SPLIT,
    filetype_suffix="tfrecord",
  )
  split = tfds.core.SplitInfo(
    name=SPLIT,
    shard_lengths=shard_lengths,
    num_bytes=num_bytes,
    filename_template=template,
  )
  info.set_splits(splits_lib.SplitDict([split]))
  info.write_to_directory(folder)


class Geneperson(tfds.core.GeneratorBasedBuilder):
  """Makes `tfds.load("geneperson")` say what to do where there is no data.

  It generates nothing. Importing this module registers it; it then reads the
  same folder as TFDS does without it.
  """

  VERSION = tfds.core.Version(VERSION)

  def _info(self) -> tfds.core.DatasetInfo:
    written = pathlib.Path(self.data_dir) / "features.json"
    spec = features()
    if written.exists():  # Knows the size of the pictures.
      spec = tfds.features.FeaturesDict.from_config(self.data_dir)
    return tfds.core.DatasetInfo(builder=self, features=spec, **_INFO)

  def _split_generators(self, dl_manager):
    del dl_manager
    raise errors.UserError(
      f"{self.data_dir}: no dataset {NAME}: run `python launch/generate.py"
      f" --data_dir {pathlib.Path(self.data_dir).parents[1]}` first"
    )

  def _generate_examples(self):
    yield from ()

  def download_and_prepare(self, **kwargs) -> None:
    """Does nothing where the data is there; else says how to make it."""
    del kwargs
    if not self.is_prepared():
      self._split_generators(None)
