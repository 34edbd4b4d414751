"""The only training loop: compile, step, log, evaluate, save, resume exactly.

A run is a list of stages. Everything random is a pure function of (seed,
stage, step), and the order of examples is a plan that is known beforehand, so
a run that was killed and started again ends with the same bits as one that
was not.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import (
  checkpoints,
  errors,
  interrupts,
  logs,
  ranges,
  rngs,
  trees,
  types,
)
from dppp_jax.data import sampler
from dppp_jax.data import source as source_lib
from dppp_jax.train import feed as feed_lib
from dppp_jax.train import optim
from dppp_jax.train import stage as stage_lib
from dppp_jax.train import step as step_lib

# (stage name, params) -> metrics such as {"market1501/mAP": .3}.
Evaluator = Callable[[str, types.Params], Mapping[str, float]]
# (stage name, step of the stage, params) -> metrics, perhaps none.
Watcher = Callable[[str, int, types.Params], Mapping[str, float]]

RANGES = {
  "seed": ranges.WHOLE,
  "image_size": ranges.PAIR,
  "num_threads": ranges.WHOLE,
  "mean": ranges.COLOUR,
  "std": ranges.SPREAD,
  "log_every": ranges.COUNT,
  "checkpoint_every": ranges.COUNT,
  "eval_every": ranges.WHOLE,
  "watch_every": ranges.WHOLE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How the loop runs, apart from what is learned.

  Attributes:
    seed: of initialisation, sampling and augmentation.
    image_size: (H, W) that pictures are resized to.
    interpolation: "bicubic" or "bilinear".
    placement: "device" keeps the whole uint8 dataset in the accelerator's
      memory and gathers batches inside the step; "host" decodes in threads
      and sends batches ahead.
    on_corrupt: "error" or "skip".
    num_threads: threads that decode.
    mean, std: normalisation of stages without augmentation.
    log_every: steps between two lines of metrics.
    checkpoint_every: steps between two checkpoints within a stage.
    eval_every: epochs between two evaluations; the end of a stage is always
      evaluated; 0 for the end only.
    watch_every: steps between two looks of the watcher; 0 for none.
    best_metric: evaluator's metric by which the best checkpoint is kept, and
      whose lack in the log says that an evaluation was cut off.
    tensorboard: whether TensorBoard files are written too.
  """

  seed: int = 1234
  image_size: tuple[int, int] = (256, 128)
  interpolation: str = "bicubic"
  placement: str = "device"
  on_corrupt: str = "error"
  num_threads: int = 8
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  log_every: int = 50
  checkpoint_every: int = 1000
  eval_every: int = 0
  watch_every: int = 0
  best_metric: str | None = None
  tensorboard: bool = False

  def __post_init__(self):
    ranges.check(self, RANGES, where="config train.")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    finished: False where a signal stopped it; run again to go on.
    step: global step.
    params: nested dict; averaged, where the last stage keeps averages.
    collections: such as BatchNorm's statistics.
  """

  finished: bool
  step: int
  params: types.Params
  collections: types.Collections = dataclasses.field(default_factory=dict)


def fit(
  stages: Sequence[stage_lib.Stage],
  source: source_lib.Source,
  *,
  workdir: str | pathlib.Path,
  options: Options,
  evaluator: Evaluator | None = None,
  watcher: Watcher | None = None,
) -> Outcome:
  """Trains the stages one after the other, from where the run folder stands.

  Args:
    stages: what to train; their parameters pass from one to the next.
    source: labelled pictures.
    workdir: run folder; receives checkpoints/ and metrics.jsonl.
    options: see `Options`.
    evaluator: called at the end of a stage, and between, see `Options`.
    watcher: called every `watch_every` steps, e.g. to draw samples; both see
      averaged parameters, where a stage keeps averages.

  Returns:
    The outcome; on SIGTERM or Ctrl-C everything is saved first.

  Raises:
    errors.UserError: bad data, a damaged run folder, a loss that is not
      finite (with the step, the pids of its batch and the last metrics).
  """
  manager = checkpoints.Manager(
    workdir,
    best_metric=options.best_metric,
    source=source_lib.digest(source),
  )
  feed = feed_lib.Feed(
    source,
    image_size=options.image_size,
    interpolation=options.interpolation,
    placement=options.placement,
    on_corrupt=options.on_corrupt,
    num_threads=options.num_threads,
  )
  plans = [_plan(stage, source, options) for stage in stages]
  offsets = np.cumsum([0] + [len(plan.indices) for plan in plans])
  restored = manager.restore(
    lambda params, data: _abstract_opt(stages, params, data, workdir)
  )
  params, collections, opt, start = {}, {}, None, (0, 0)
  if restored is not None:
    params, collections = restored.params, restored.collections
    opt = restored.opt
    start = (restored.data["stage"], restored.data["step"])
    begun, ends = offsets[start[0] : start[0] + 2]
    if restored.step != begun + start[1] or restored.step > ends:
      raise _beyond(workdir)
    logs.say(f"resuming at step {restored.step}")
  writer = logs.Writer(
    workdir,
    tensorboard=options.tensorboard,
    resume_step=restored.step if restored else 0,
  )
  root = jax.random.key(options.seed)
  with interrupts.Interrupts("saving, then stopping") as signals:
    try:
      for number in range(start[0], len(stages)):
        stage = stages[number]
        begin = start[1] if number == start[0] else 0
        if begin == 0 and (restored is None or number > start[0]):
          key = rngs.stream(root, f"init/{stage.name}")
          params, collections = stage.init(params, collections, key)
          params = trees.to_float32(params)  # The masters; files hold less.
          opt = None
        run = _StageRun(stage, number, int(offsets[number]), plans[number])
        params, collections, opt, done = run.train(
          params,
          collections,
          opt,
          begin=begin,
          feed=feed,
          options=options,
          manager=manager,
          writer=writer,
          evaluator=evaluator,
          watcher=watcher,
          signals=signals,
        )
        if not done:
          manager.wait()
          step = int(offsets[number]) + run.step
          logs.say(f"stopped at step {step}; run again to go on")
          params = stage_lib.averaged(params, collections)
          return Outcome(False, step, params, collections)
    finally:
      manager.close()
      writer.close()
  params = stage_lib.averaged(params, collections)
  return Outcome(True, int(offsets[-1]), params, collections)


class _StageRun:
  """The steps of one stage, with what has to be remembered between them."""

  def __init__(
    self,
    stage: stage_lib.Stage,
    number: int,
    offset: int,
    plan: sampler.Plan,
  ):
    self.stage = stage
    self.number = number
    self.offset = offset
    self.plan = plan
    self.step = 0
    self.last: dict[str, float] = {}

  def train(
    self,
    params,
    collections,
    opt,
    *,
    begin: int,
    feed: feed_lib.Feed,
    options: Options,
    manager: checkpoints.Manager,
    writer: logs.Writer,
    evaluator: Evaluator | None,
    watcher: Watcher | None,
    signals: interrupts.Interrupts,
  ):
    """Runs from step `begin` to the stage's end or to a signal."""
    stage, plan = self.stage, self.plan
    total = len(plan.indices)
    trainable, frozen, rates = optim.split(params, stage.rules)
    self.step = begin
    if opt is None:
      opt = step_lib.make_tx(stage, rates).init(trainable)
      collections = _begin_average(collections, trainable, stage.ema)
    state = jax.device_put((trainable, collections, opt))
    frozen = jax.device_put(frozen)
    disk = {k: x for k, x in stage.extras.items() if isinstance(x, np.memmap)}
    dataset = jax.device_put(
      {
        "label": feed.labels,
        **feed.resident,
        **{k: np.asarray(x) for k, x in stage.extras.items() if k not in disk},
      }
    )

    def evaluate():
      results = evaluator(stage.name, self._averaged(state, frozen))
      if results:
        writer.write(self.offset + self.step, stage.name, results)

    was_due = begin and evaluator is not None and self._ends(begin, options)
    if was_due and not writer.holds(self.offset + begin, options.best_metric):
      evaluate()
    if begin >= total:
      return self._join(state, frozen), state[1], state[2], True
    batches = feed.batches(plan, begin, disk)
    step_fn, names = step_lib.make_step(
      stage,
      rates,
      seed=options.seed,
      mean=options.mean,
      std=options.std,
    )
    first = next(batches)
    factor = jnp.float32(0)
    compiled = step_lib.compile_ahead(
      step_fn, state, frozen, dataset, first, np.int32(0), factor
    )
    pending: list[tuple[int, jax.Array]] = []
    clock = time.monotonic()
    bar = logs.progress(
      total=total, desc=stage.name, unit="step", initial=begin
    )
    batch = first
    with bar:
      for step in range(begin, total):
        epoch = int(plan.epochs[step])
        factor = np.float32(stage.schedule(epoch, step / total))
        state, values = compiled(
          state, frozen, dataset, batch, np.int32(step), factor
        )
        pending.append((step, values))
        self.step = step + 1
        if len(pending) > 1:  # Each step that waits holds its temporaries.
          jax.block_until_ready(pending[-2][1])
        bar.update()
        is_last = self.step == total
        stopping = bool(signals.number)
        saving = (
          stopping or is_last or self.step % options.checkpoint_every == 0
        )
        evaluating = evaluator is not None and self._ends(self.step, options)
        watching = (
          watcher is not None
          and options.watch_every > 0
          and (is_last or self.step % options.watch_every == 0)
        )
        if (
          self.step % options.log_every == 0
          or watching
          or saving
          or evaluating
          or self.step == 1
        ):
          self._log(
            pending, names, feed.pids, writer, epoch, factor, clock, bar
          )
          pending, clock = [], time.monotonic()
        if watching:
          seen = watcher(stage.name, self.step, self._averaged(state, frozen))
          if seen:
            writer.write(self.offset + self.step, stage.name, seen)
          clock = time.monotonic()
        if saving or evaluating:
          manager.save(
            self.offset + self.step,
            params=self._join(state, frozen),
            collections=state[1],
            opt=state[2],
            data={"stage": self.number, "step": self.step},
          )
        if evaluating:
          evaluate()
          clock = time.monotonic()
        if stopping and not is_last:
          return self._join(state, frozen), state[1], state[2], False
        if not is_last:
          batch = next(batches)
    return self._join(state, frozen), state[1], state[2], True

  def _ends(self, step: int, options: Options) -> bool:
    """Whether an evaluation follows the first `step` steps of the stage."""
    epochs = self.plan.epochs
    return step == len(epochs) or bool(
      options.eval_every > 0
      and epochs[step] != epochs[step - 1]
      and epochs[step - 1] % options.eval_every == 0
    )

  def _join(self, state, frozen) -> types.Params:
    return trees.unflatten({**state[0], **frozen})

  def _averaged(self, state, frozen) -> types.Params:
    return stage_lib.averaged(self._join(state, frozen), state[1])

  def _log(self, pending, names, pids, writer, epoch, factor, clock, bar):
    """Fetches the metrics of the last steps, checks them, writes their mean."""
    values = np.stack([np.asarray(v) for _, v in pending])
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
      step = pending[bad[0]][0]
      row = dict(zip(names, values[bad[0]].tolist(), strict=True))
      batch_pids = sorted({int(pids[i]) for i in self.plan.indices[step]})
      raise errors.UserError(
        f"{self.stage.name}: the loss is not finite at step"
        f" {self.offset + step}: {row}; pids of the batch: {batch_pids};"
        f" last good metrics: {self.last or 'none'}; lower the learning"
        " rate or look at those pictures"
      )
    mean = dict(zip(names, values.mean(axis=0).tolist(), strict=True))
    size = self.plan.indices.shape[1]
    seconds = max(time.monotonic() - clock, 1e-9)
    self.last = mean
    line = {
      **mean,
      "epoch": epoch,
      "lr_factor": float(factor),
      **{
        f"lr/{rate:g}": rate * float(factor)
        for rate in sorted({r for _, r in self.stage.rules if r})
      },
      "images_per_second": len(pending) * size / seconds,
    }
    writer.write(self.offset + self.step, self.stage.name, line)
    bar.set_postfix_str(
      f"loss {mean['loss']:.3f}, {line['images_per_second']:.0f} images/s"
    )
    if bar.disable:  # Nobody watches a bar: lines for a log file.
      logs.say(
        f"{self.stage.name} step {self.step}/{len(self.plan.indices)}"
        f" loss {mean['loss']:.4f}, {line['images_per_second']:.0f} images/s"
      )


def _plan(
  stage: stage_lib.Stage, source: source_lib.Source, options: Options
) -> sampler.Plan:
  seed = options.seed
  if isinstance(stage.batches, stage_lib.PK):
    return sampler.pk(
      source.pids,
      P=stage.batches.P,
      K=stage.batches.K,
      epochs=stage.epochs,
      seed=seed,
    )
  return sampler.shuffled(
    len(source),
    batch_size=stage.batches.batch_size,
    epochs=stage.epochs,
    seed=seed,
  )


def _begin_average(collections, trainable, decay):
  """Returns the collections with a stage's own average, or without any."""
  others = {k: v for k, v in collections.items() if k != "ema"}
  if decay is None:
    return others
  # A copy: both are donated to the step.
  copies = {k: jnp.array(x, jnp.float32) for k, x in trainable.items()}
  return {**others, "ema": trees.unflatten(copies)}


def _abstract_opt(
  stages: Sequence[stage_lib.Stage],
  params: types.Params,
  data: Mapping[str, int],
  workdir: str | pathlib.Path,
) -> Any:
  """Returns the optimiser state that belongs to a checkpoint's parameters.

  Raises:
    errors.UserError: they are not the parameters of these stages. That is no
      damage, and no older checkpoint would mend it.
  """
  if data["stage"] >= len(stages):
    raise _beyond(workdir)

  def begin(rng):
    expected, collections = {}, {}
    for stage in stages[: data["stage"] + 1]:
      expected, collections = stage.init(expected, collections, rng)
    return expected

  expected = jax.eval_shape(begin, jax.random.key(0))
  trees.merge(expected, params, where=f"{workdir}/checkpoints")
  stage = stages[data["stage"]]
  trainable, _, rates = optim.split(params, stage.rules)
  return jax.eval_shape(step_lib.make_tx(stage, rates).init, trainable)


def _beyond(workdir: str | pathlib.Path) -> errors.UserError:
  return errors.UserError(
    f"{workdir}: its checkpoint lies beyond this configuration's steps, or its"
    " stages had other lengths; choose another --workdir"
  )
