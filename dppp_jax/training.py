"""From a configuration of `configs/` to a trained run folder."""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import cli, errors
from dppp_jax.data import benchmarks, shards, transforms
from dppp_jax.data import source as source_lib
from dppp_jax.evals import benchmark as benchmark_lib
from dppp_jax.evals import extractor as extractor_lib
from dppp_jax.evals import spec as spec_lib
from dppp_jax.methods import dppp
from dppp_jax.train import loop, run
from dppp_jax.train import stage as stage_lib
from dppp_jax.weights import load

# Keys that change where a run looks and what it shows, not what it learns.
_FREE = (
  "data.data_dir", "data.num_threads", "eval", "train.log_every",
  "train.checkpoint_every", "train.eval_every_epochs", "train.tensorboard",
)  # fmt: skip


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
  source = load_source(config["data"], data_dir)
  where = _locate(config["clip"])
  clip_config, params = load.clip(where)
  tokenizer = load.tokenizer(where)
  augment = transforms.Augment(**config["augment"])
  options = dppp.Options(**_tuples(config["dppp"]))
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
  judge = _Judge(config, clip_config, options, pathlib.Path(workdir))
  folder = run.prepare(workdir, config, free=_FREE)
  return loop.fit(
    stages,
    source,
    workdir=folder,
    options=loop.Options(
      seed=settings["seed"],
      image_size=tuple(config["data"]["image_size"]),
      interpolation=config["data"]["interpolation"],
      placement=config["data"]["placement"],
      on_corrupt=config["data"]["on_corrupt"],
      num_threads=config["data"]["num_threads"],
      mean=augment.mean,
      std=augment.std,
      log_every=settings["log_every"],
      checkpoint_every=settings["checkpoint_every"],
      eval_every=settings["eval_every_epochs"],
      best_metric=judge.best_metric,
      tensorboard=settings["tensorboard"],
    ),
    evaluator=judge,
  )


def load_source(data: Mapping[str, Any], data_dir: str) -> source_lib.Source:
  """Opens the training pictures that a configuration names."""
  where, name = data["data_dir"] or data_dir, data["dataset"]
  if name == "geneperson":
    source = shards.load(where)
  elif name in benchmarks.NAMES:
    source = benchmarks.load(name, where, allow_partial=True).train
  else:
    raise errors.UserError(
      f"config data.dataset {name!r}: choose geneperson or one of"
      f" {', '.join(benchmarks.NAMES)}"
    )
  return source_lib.first_ids(source, data["max_ids"])


def compute_dtype(name: str) -> jnp.dtype:
  """Returns the dtype of matrix products; "auto" is bfloat16 on a GPU."""
  if name == "auto":
    name = "bfloat16" if jax.default_backend() == "gpu" else "float32"
  if name not in ("float32", "bfloat16"):
    raise errors.UserError(
      f"config dtype {name!r}: choose auto, float32 or bfloat16"
    )
  return jnp.dtype(name)


class _Judge:
  """Called by the loop: says how to read features, then measures them."""

  def __init__(self, config, clip_config, options, workdir):
    self._config, self._clip_config = config, clip_config
    self._options, self._workdir = options, workdir
    evaluation = config["eval"]
    names = evaluation["benchmarks"] if evaluation["benchmark_root"] else ()
    self._benchmarks = [
      benchmarks.load(
        name,
        evaluation["benchmark_root"],
        allow_partial=evaluation["allow_partial"],
      )
      for name in names
    ]
    first = self._benchmarks[0].name if self._benchmarks else None
    self.best_metric = f"{first}/mAP" if first else None

  def __call__(self, stage: str, params) -> dict[str, float]:
    config = self._config
    spec = dppp.extractor_spec(
      self._clip_config,
      stage=stage,
      image_size=config["data"]["image_size"],
      mean=config["augment"]["mean"],
      std=config["augment"]["std"],
      interpolation=config["eval"]["interpolation"],
      feature=config["eval"]["feature"],
      options=self._options,
    )
    path = self._workdir / "extractor.json"
    run.write_json(path, spec)
    if not self._benchmarks:
      return {}
    extractor = extractor_lib.Extractor(
      spec_lib.Spec.from_json(path),
      params,
      dtype=compute_dtype(config["dtype"]),
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
