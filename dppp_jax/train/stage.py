"""What one training stage is: data for the only loop, not a loop of its own."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import jax

from dppp_jax import ranges, trees, types
from dppp_jax.data import transforms


class Aux(NamedTuple):
  """What a loss returns beside its value.

  Attributes:
    metrics: flat dict of scalars to log.
    collections: the collections after this step (BatchNorm statistics).
  """

  metrics: types.Metrics
  collections: types.Collections


class PK(NamedTuple):
  """Batches of P identities with K pictures each (CLIP-ReID's epochs)."""

  P: int
  K: int

  @property
  def batch_size(self) -> int:
    """Returns B."""
    return self.P * self.K


class Shuffled(NamedTuple):
  """Batches of a shuffled pass; its first rows fill up the last batch."""

  batch_size: int


# (epoch counted from 1, fraction of the stage's steps done) -> factor of lr.
Schedule = Callable[[int, float], float]

# (params, collections, batch, rng) -> (loss, Aux).
Loss = Callable[
  [types.Params, types.Collections, Mapping[str, jax.Array], jax.Array],
  tuple[jax.Array, Aux],
]

# (params, collections, rng) -> (params, collections). The first stage of a
# method receives empty dicts, later stages what the stage before ended with.
Init = Callable[
  [types.Params, types.Collections, jax.Array],
  tuple[types.Params, types.Collections],
]


def constant(epoch: int, fraction: float) -> float:
  """A learning rate that stays as it is."""
  del epoch, fraction
  return 1.0


def step_decay(
  milestones: tuple[int, ...],
  *,
  gamma: float = 0.1,
  warmup_epochs: int = 0,
  warmup_factor: float = 0.1,
) -> Schedule:
  """CLIP-ReID's WarmupMultiStepLR: epochs count from 1, milestones included.

  Args:
    milestones: epochs from which on the rate is multiplied by gamma once more.
    gamma: the factor at each milestone.
    warmup_epochs: length of the linear warm-up; 0 for none.
    warmup_factor: the factor at epoch 0 of the warm-up.
  """

  def schedule(epoch: int, fraction: float) -> float:
    del fraction
    factor = gamma ** sum(epoch >= milestone for milestone in milestones)
    if epoch < warmup_epochs:
      alpha = epoch / warmup_epochs
      factor *= warmup_factor * (1 - alpha) + alpha
    return factor

  return schedule


def warmup_cosine(*, warmup: float, final: float = 0.0) -> Schedule:
  """Linear warm-up, then a half cosine, both in fractions of the stage.

  Args:
    warmup: fraction of the steps that the warm-up takes, in [0, 1).
    final: the factor at the end.
  """

  def schedule(epoch: int, fraction: float) -> float:
    del epoch
    if fraction < warmup:
      return fraction / warmup
    angle = math.pi * (fraction - warmup) / (1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(angle))

  return schedule


def averaged(
  params: types.Params, collections: types.Collections
) -> types.Params:
  """Returns parameters with their moving averages in the place of the last.

  Args:
    params: nested dict.
    collections: of the same moment; without "ema" nothing is averaged.
  """
  average = trees.flatten(collections.get("ema", {}))
  return trees.unflatten({**trees.flatten(params), **average})


RANGES = {
  "epochs": ranges.WHOLE,
  "weight_decay": ranges.NON_NEGATIVE,
  "bias_lr_multiplier": ranges.NON_NEGATIVE,
  "clip_norm": ranges.or_none(ranges.POSITIVE),
  "ema": ranges.or_none(ranges.SHARE),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """One training stage.

  Attributes:
    name: e.g. "ptl"; names the stage's metrics and random streams.
    init: how parameters begin, see `Init`.
    loss: the pure loss, see `Loss`.
    rules: (regex, lr | None) over "/"-joined parameter names, in order; the
      first full match wins, every parameter must match, None is frozen.
    batches: `PK` or `Shuffled`.
    epochs: number of epochs.
    schedule: factor of every learning rate.
    augment: what is done to the pictures; None for the test transform.
    weight_decay: L2 strength.
    decoupled: False adds the decay to the gradient as torch.optim.Adam does;
      True is AdamW, and then spares vectors (biases, norms).
    muon: Muon instead of Adam for kernels, see `optim.make`.
    bias_lr_multiplier: factor of the rate of every parameter named "bias".
    clip_norm: global norm that trainable gradients are clipped to, or None.
    extras: per-example arrays [N, ...] that are gathered into the batch. They
      are kept on the device, but for a `np.memmap`: of that the rows of each
      batch are read from the disk, a batch ahead.
    ema: decay of a moving average of the trainable parameters, or None. It is
      the collection "ema"; see `averaged`.
  """

  name: str
  init: Init
  loss: Loss
  rules: tuple[tuple[str, float | None], ...]
  batches: PK | Shuffled
  epochs: int
  schedule: Schedule = constant
  augment: transforms.Augment | None = None
  weight_decay: float = 1e-4
  decoupled: bool = False
  muon: bool = False
  bias_lr_multiplier: float = 2.0
  clip_norm: float | None = None
  extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ema: float | None = None

  def __post_init__(self):
    where = f"stage {self.name}: "
    numbers = {name: getattr(self, name) for name in RANGES}
    ranges.check(numbers, RANGES, where=where)
    for pattern, rate in self.rules:
      if rate is not None:
        ranges.one(f"{where}lr of {pattern}", rate, ranges.NON_NEGATIVE)
