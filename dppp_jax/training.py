"""From a configuration of `configs/` to a trained run folder."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from dppp_jax import cli, devices, errors, paths, ranges
from dppp_jax.data import benchmarks, images, shards, transforms
from dppp_jax.data import source as source_lib
from dppp_jax.evals import benchmark as benchmark_lib
from dppp_jax.evals import extractor as extractor_lib
from dppp_jax.evals import spec as spec_lib
from dppp_jax.methods import dppp, dppp_options
from dppp_jax.train import loop, run
from dppp_jax.train import stage as stage_lib
from dppp_jax.weights import load

# Keys that change where a run looks and what it shows, not what it learns.
_FREE = (
  "data.data_dir", "data.num_threads", "data.placement", "eval",
  "train.log_every", "train.checkpoint_every", "train.eval_every_epochs",
  "train.tensorboard",
)  # fmt: skip

# Of the keys that no dataclass looks at as they are.
RANGES = {
  "data.image_size": ranges.PAIR,
  "data.num_threads": ranges.WHOLE,
  "data.max_ids": ranges.WHOLE,
  "train.seed": ranges.WHOLE,
  "train.P": ranges.COUNT,
  "train.K": ranges.COUNT,
  "train.log_every": ranges.COUNT,
  "train.checkpoint_every": ranges.COUNT,
  "train.eval_every_epochs": ranges.WHOLE,
}


def train(
  config: Mapping[str, Any], *, data_dir: str, workdir: str
) -> loop.Outcome:
  """Trains a method, or goes on where its run folder stands.

  Args:
    config: the resolved configuration as a nested dict.
    data_dir: of the dataset, where `config["data"]["data_dir"]` is not given.
    workdir: run folder; holds config.json, environment.json, extractor.json,
      checkpoints/ and metrics.jsonl afterwards.

  Returns:
    How it ended; `finished` is False where a signal stopped it.

  Raises:
    errors.UserError: a configuration, dataset, checkpoint or run folder that
      cannot be used.
  """
  if config["method"] != "dppp":
    raise errors.UserError(
      f"config method {config['method']!r}: there is 'dppp' so far"
    )
  ranges.check(config, RANGES, where="config ")
  for key in ("clip", "dtype"):
    ranges.kind(f"config {key}", config[key], str)
  evaluation = config["eval"]
  ranges.kind("config eval.allow_partial", evaluation["allow_partial"], bool)
  augment = transforms.Augment(**config["augment"])
  options = dppp.Options(**_tuples(config["dppp"]))
  loop_options = _loop_options(config, augment)
  source = load_source(config["data"], data_dir)
  where = _locate(config["clip"])
  clip_config, params = load.clip(where)
  tokenizer = load.tokenizer(where)
  settings = config["train"]
  stages = dppp.stages(
    clip_config,
    params,
    tokenizer,
    num_classes=len(np.unique(source.pids)),
    batches=stage_lib.PK(settings["P"], settings["K"]),
    augment=augment,
    options=options,
    dtype=compute_dtype(config["dtype"]),
  )
  judge = _Judge(
    config,
    clip_config,
    options,
    paths.expand(workdir),
    last_stage=stages[-1].name,
  )
  folder = run.prepare(workdir, config, free=_FREE)
  outcome = loop.fit(
    stages,
    source,
    workdir=folder,
    options=dataclasses.replace(loop_options, best_metric=judge.best_metric),
    evaluator=judge,
  )
  if outcome.finished:  # Perhaps long ago, and eval.feature is another now.
    judge.write_spec(stages[-1].name)
  return outcome


def idle(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns what a training does not read, for `cli.refuse_idle`.

  Args:
    config: the resolved configuration as a nested dict.

  Returns:
    flag or "config.key" -> why it does nothing.
  """
  found = {}
  if config["data"]["data_dir"]:
    found["data_dir"] = "config.data.data_dir says where the dataset lies"
  evaluation = config["eval"]
  if not evaluation["benchmark_root"]:
    why = "nothing is evaluated without config.eval.benchmark_root"
    keys = ("benchmarks", "allow_partial", "dtype")
    found |= {f"config.eval.{key}": why for key in keys}
  elif not evaluation["benchmarks"]:
    why = "config.eval.benchmarks is empty"
    keys = ("benchmark_root", "allow_partial", "dtype")
    found |= {f"config.eval.{key}": why for key in keys}
  options = dppp.Options(**_tuples(config["dppp"]))
  for key, why in dppp_options.idle(options).items():
    found[f"config.dppp.{key}"] = why
  return found


def _loop_options(
  config: Mapping[str, Any], augment: transforms.Augment
) -> loop.Options:
  """Returns how the loop runs; refuses what it could not begin with."""
  data, settings = config["data"], config["train"]
  for key in ("data", "eval"):
    try:
      images.check_resize(data["image_size"], config[key]["interpolation"])
    except errors.UserError as error:
      raise errors.UserError(f"config {key}.{error}") from error
  return loop.Options(
    seed=settings["seed"],
    image_size=tuple(data["image_size"]),
    interpolation=data["interpolation"],
    placement=data["placement"],
    on_corrupt=data["on_corrupt"],
    num_threads=data["num_threads"],
    mean=augment.mean,
    std=augment.std,
    log_every=settings["log_every"],
    checkpoint_every=settings["checkpoint_every"],
    eval_every=settings["eval_every_epochs"],
    tensorboard=settings["tensorboard"],
  )


def load_source(data: Mapping[str, Any], data_dir: str) -> source_lib.Source:
  """Opens the training pictures that a configuration names."""
  where, name = data["data_dir"] or data_dir, data["dataset"]
  if name == "geneperson":
    source = shards.load(where)
  elif name in benchmarks.NAMES:
    source = benchmarks.load(
      name, where, allow_partial=True, needs=("train",)
    ).train
  else:
    raise errors.UserError(
      f"config data.dataset {name!r}: choose geneperson or one of"
      f" {', '.join(benchmarks.NAMES)}"
    )
  return source_lib.first_ids(source, data["max_ids"])


def compute_dtype(name: str) -> jnp.dtype:
  """Returns the dtype of matrix products; "auto" is bfloat16 on a GPU."""
  if name == "auto":
    name = "bfloat16" if devices.platform() == "gpu" else "float32"
  if name not in ("float32", "bfloat16"):
    raise errors.UserError(
      f"config dtype {name!r}: choose auto, float32 or bfloat16"
    )
  return jnp.dtype(name)


class _Judge:
  """Called by the loop: says how to read features, then measures them."""

  def __init__(self, config, clip_config, options, workdir, *, last_stage):
    self._config, self._clip_config = config, clip_config
    self._options, self._workdir = options, workdir
    self._last_stage = last_stage
    evaluation = config["eval"]
    features = ("auto", *spec_lib.FEATURES)
    if evaluation["feature"] not in features:
      raise errors.UserError(
        f"config eval.feature {evaluation['feature']!r}: choose one of"
        f" {', '.join(features)}"
      )
    if evaluation["dtype"] not in extractor_lib.DTYPES:
      raise errors.UserError(
        f"config eval.dtype {evaluation['dtype']!r}: choose one of"
        f" {', '.join(extractor_lib.DTYPES)}"
      )
    self._spec(last_stage)
    names = evaluation["benchmarks"] if evaluation["benchmark_root"] else ()
    self._benchmarks = [self._open(name) for name in dict.fromkeys(names)]
    first = self._benchmarks[0].name if self._benchmarks else None
    self.best_metric = f"{first}/mAP" if first else None

  def _open(self, name: str) -> benchmarks.Benchmark:
    evaluation = self._config["eval"]
    try:
      return benchmarks.load(
        name,
        evaluation["benchmark_root"],
        allow_partial=evaluation["allow_partial"],
      )
    except errors.UserError as error:
      raise errors.UserError(
        f"{error}; --config.eval.benchmarks says what is evaluated"
      ) from error

  def write_spec(self, stage: str) -> pathlib.Path:
    """Writes extractor.json as of the end of a stage."""
    path = self._workdir / "extractor.json"
    run.write_json(path, self._spec(stage))
    return path

  def _spec(self, stage: str) -> dict[str, Any]:
    config = self._config
    feature = config["eval"]["feature"]
    if feature == "content" and stage != self._last_stage:
      feature = "projected"  # Its projector is yet to come.
    return dppp.extractor_spec(
      self._clip_config,
      stage=stage,
      image_size=config["data"]["image_size"],
      mean=config["augment"]["mean"],
      std=config["augment"]["std"],
      interpolation=config["eval"]["interpolation"],
      feature=feature,
      options=self._options,
    )

  def __call__(self, stage: str, params) -> dict[str, float]:
    path = self.write_spec(stage)
    if not self._benchmarks:
      return {}
    extractor = extractor_lib.Extractor(
      spec_lib.Spec.from_json(path),
      params,
      dtype=self._config["eval"]["dtype"],
    )
    metrics = {}
    for benchmark in self._benchmarks:
      found = benchmark_lib.evaluate(extractor, benchmark).result
      metrics[f"{benchmark.name}/mAP"] = found.mAP
      metrics[f"{benchmark.name}/Rank-1"] = float(found.cmc[0])
    return metrics


def _locate(folder: str) -> str:
  """Finds a shipped checkpoint from wherever the command was typed."""
  shipped = cli.ROOT / folder
  return str(shipped) if shipped.is_dir() else folder


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
  """Gives back to lists, which JSON makes of tuples, their first type."""
  return {
    key: tuple(x) if isinstance(x, list) else x for key, x in values.items()
  }
