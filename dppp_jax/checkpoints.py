"""Orbax checkpoints in three items: model, opt and data.

The model item is complete in itself (all parameters, frozen ones too), so that
an extractor reads it and nothing else. Damage of the newest checkpoint is not
the end of a run: restoring goes from the newest to the oldest and says so.
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from dppp_jax import errors, logs, types

_FOLDER = "checkpoints"


class Restored(NamedTuple):
  """A checkpoint that was read back.

  Attributes:
    step: global step.
    params: nested dict of arrays.
    collections: nested dict of arrays.
    opt: optimiser state.
    data: the JSON record of where training stood.
  """

  step: int
  params: types.Params
  collections: types.Collections
  opt: Any
  data: dict[str, Any]


class Manager:
  """Saves and restores the checkpoints of one run folder.

  Args:
    workdir: the run folder; checkpoints lie in `workdir/checkpoints`.
    best_metric: name of the metric in `workdir/metrics.jsonl` by which one best
      checkpoint is kept beside the newest, or None.
    source: digest of what is learned from; the checkpoints of another one are
      refused, those that say nothing are not.
    max_latest: how many of the newest are kept. Two, because a damaged newest
      one must leave something to fall back on.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    best_metric: str | None = None,
    source: str | None = None,
    max_latest: int = 2,
  ):
    policies = ocp.checkpoint_managers
    keep = [policies.LatestN(max_latest)]
    if best_metric is not None:
      keep.append(_Best(workdir, best_metric))
    self._source = source
    self._root = pathlib.Path(workdir).absolute() / _FOLDER
    self._manager = ocp.CheckpointManager(
      self._root,
      item_names=("model", "opt", "data"),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
      ),
    )

  def save(
    self,
    step: int,
    *,
    params: types.Params,
    collections: types.Collections,
    opt: Any,
    data: Mapping[str, Any],
  ) -> None:
    """Saves in the background; an existing step is left as it is.

    Leaves are copied first: the arrays are about to be donated, and on a CPU
    the background writer would otherwise read the memory of the next step.
    """
    if step in self._manager.all_steps():
      return
    copy = lambda tree: jax.tree.map(lambda x: np.array(x, copy=True), tree)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(
          copy({"params": params, "collections": collections})
        ),
        opt=ocp.args.StandardSave(copy({"state": opt})),
        data=ocp.args.JsonSave({**data, "source": self._source}),
      ),
    )

  def restore(
    self, abstract_opt: Callable[[types.Params, dict[str, Any]], Any]
  ) -> Restored | None:
    """Restores the newest sound checkpoint.

    Args:
      abstract_opt: (params, data) -> the optimiser state as a tree of
        ShapeDtypeStructs, which tells Orbax the structure to fill.

    Returns:
      The checkpoint, or None where there is none yet.

    Raises:
      errors.UserError: there are checkpoints and none can be read, or they
        are of another source.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for number, step in enumerate(steps):
      try:
        items = ocp.args.Composite(
          model=ocp.args.StandardRestore(), data=ocp.args.JsonRestore()
        )
        read = self._manager.restore(step, args=items)
        model, data = read["model"], read["data"]
        self._check(data.get("source"))
        target = {"state": abstract_opt(model["params"], data)}
        opt = self._manager.restore(
          step,
          args=ocp.args.Composite(opt=ocp.args.StandardRestore(target)),
        )["opt"]["state"]
        # Only now: a folder of damaged ones must not look like a new run.
        self._discard(steps[:number])
        return Restored(
          step, model["params"], model.get("collections") or {}, opt, data
        )
      except errors.UserError:
        raise
      except Exception as error:  # pylint: disable=broad-except
        # Orbax raises ValueError, KeyError, FileNotFoundError and others for
        # one and the same thing: a checkpoint that cannot be read.
        logging.warning(
          "checkpoint %s/%d is damaged (%s); trying the one before it",
          self._root,
          step,
          _first_line(error),
        )
    if steps:
      raise errors.UserError(
        f"{self._root}: none of the checkpoints {steps} can be read; move the"
        " folder away to start afresh"
      )
    return None

  def wait(self) -> None:
    """Waits until everything saved so far is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and closes."""
    self._manager.close()

  def _check(self, source: str | None) -> None:
    if None not in (source, self._source) and source != self._source:
      raise errors.UserError(
        f"{self._root}: trained on another dataset than the one given; name"
        " that one, or choose another --workdir"
      )

  def _discard(self, steps: Sequence[int]) -> None:
    """Moves damaged checkpoints aside: their steps will be saved again."""
    for step in steps:
      folder = self._root / str(step)
      folder.rename(folder.with_name(f"damaged-{step}"))
    if steps:
      self._manager.reload()


class _Best:
  """Orbax's policy that preserves the checkpoint of the highest metric.

  Orbax forgets its own metrics when a run is started again; the log does not.
  """

  def __init__(self, workdir: str | pathlib.Path, metric: str):
    self._workdir, self._metric = workdir, metric

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Returns whether each of the checkpoints is the best."""
    del context
    scores = logs.by_step(self._workdir, self._metric)
    steps = [each.step for each in checkpoints]
    scored = [step for step in steps if step in scores]
    best = max(scored, key=lambda step: (scores[step], step), default=None)
    return [step == best for step in steps]


def steps(workdir: str | pathlib.Path) -> list[int]:
  """Returns the global steps of a run's checkpoints, the newest first."""
  root = pathlib.Path(workdir) / _FOLDER
  # Not isdigit, which "²" is.
  found = (int(p.name) for p in root.glob("*") if p.name.isdecimal())
  return sorted(found, reverse=True)


def restore_model(
  workdir: str | pathlib.Path, step: int | None = None
) -> tuple[int, types.Params]:
  """Reads the parameters of a run, without its optimiser.

  Args:
    workdir: the run folder.
    step: global step, or None for the newest sound checkpoint.

  Returns:
    (step, params).

  Raises:
    errors.UserError: no checkpoint, or not that one, or none can be read.
  """
  root = pathlib.Path(workdir).absolute() / _FOLDER
  there = steps(workdir)
  if not there:
    raise errors.UserError(
      f"{root}: no checkpoint; train first, or name another --workdir"
    )
  if step is not None and step not in there:
    raise errors.UserError(f"{root}: no step {step}; there are {there}")
  for candidate in there if step is None else [step]:
    try:
      with ocp.StandardCheckpointer() as reader:
        model = reader.restore(root / str(candidate) / "model")
      return candidate, model["params"]
    except Exception as error:  # pylint: disable=broad-except
      logging.warning(
        "checkpoint %s/%d is damaged (%s)",
        root,
        candidate,
        _first_line(error),
      )
  raise errors.UserError(
    f"{root}: checkpoint {step or there} cannot be read; restore it from a"
    " copy or train again"
  )


def _first_line(error: Exception) -> str:
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:120] if text else ''}"
