"""Orbax checkpoints in three items: model, opt and data.

The model item is complete in itself (all parameters, frozen ones too), so that
an extractor reads it and nothing else. Damage of the newest checkpoint is not
the end of a run: restoring goes from the newest to the oldest and says so.
"""

from collections.abc import Callable, Mapping
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from dppp_jax import errors, types

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
    best_metric: name of the metric by which one best checkpoint is kept beside
      the newest, or None.
    max_latest: how many of the newest are kept. Two, because a damaged newest
      one must leave something to fall back on.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    best_metric: str | None = None,
    max_latest: int = 2,
  ):
    policies = ocp.checkpoint_managers
    keep = [policies.LatestN(max_latest)]
    if best_metric is not None:
      keep.append(
        policies.BestN(
          get_metric_fn=lambda metrics: metrics[best_metric],
          n=1,
          keep_checkpoints_without_metrics=False,
        )
      )
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
    metrics: Mapping[str, float] | None = None,
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
        data=ocp.args.JsonSave(dict(data)),
      ),
      metrics=dict(metrics) if metrics else None,
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
      errors.UserError: there are checkpoints and none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        items = ocp.args.Composite(
          model=ocp.args.StandardRestore(), data=ocp.args.JsonRestore()
        )
        read = self._manager.restore(step, args=items)
        model, data = read["model"], read["data"]
        target = {"state": abstract_opt(model["params"], data)}
        opt = self._manager.restore(
          step,
          args=ocp.args.Composite(opt=ocp.args.StandardRestore(target)),
        )["opt"]["state"]
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
        self._discard(step)
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

  def _discard(self, step: int) -> None:
    """Moves a damaged checkpoint aside: its step will be saved again."""
    folder = self._root / str(step)
    if folder.exists():
      folder.rename(folder.with_name(f"damaged-{step}"))
    self._manager.reload()


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
  steps = sorted(
    (int(p.name) for p in root.glob("*") if p.name.isdigit()), reverse=True
  )
  if not steps:
    raise errors.UserError(
      f"{root}: no checkpoint; train first, or name another --workdir"
    )
  if step is not None and step not in steps:
    raise errors.UserError(f"{root}: no step {step}; there are {steps}")
  for candidate in steps if step is None else [step]:
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
    f"{root}: checkpoint {step or steps} cannot be read; restore it from a"
    " copy or train again"
  )


def _first_line(error: Exception) -> str:
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:120] if text else ''}"
