"""Invented people, in batches: prompts, canvases, cells, mattes, pictures.

    maker = Maker(draw, people=prompts.People(0), bank=bank, layout=layout, ...)
    for pid, person in maker.people(range(6641)): ...

A person is a pure function of (seed, pid): prompt, skeletons and the seed of
the canvas are, a short batch is filled up so that all run the same program,
and what a sample becomes does not depend on its neighbours.

The device is given the next batch (text, steps, decoding, mattes) before the
host waits for the one before, judges its cells and hands them on; pictures are
fused by whoever encodes them, after the cap.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import functools
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dppp_jax import errors, types
from dppp_jax.data import images
from dppp_jax.geneperson import (
  backgrounds,
  compose,
  identity,
  matting,
  pose_bank,
  poses,
  prompts,
  quality,
)
from dppp_jax.geneperson import canvas as canvas_lib


class Draw(Protocol):
  """The sampler, with steps, guidance and scales set."""

  def __call__(
    self,
    texts: Sequence[str],
    seeds: Sequence[int],
    *,
    skeletons: np.ndarray,
    grid: np.ndarray,
  ) -> types.Array:
    """Returns uint8 [B, H, W, 3], perhaps still being computed.

    Args:
      texts: B prompts.
      seeds: B.
      skeletons: uint8 [B, H, W, 3].
      grid: uint8 [H, W, 3], the edges between the cells.
    """


class Mattes(Protocol):
  """Of matting.Matting."""

  def dispatch(self, cells: types.Array) -> matting.Mattes:
    """Returns alpha [B, N, h, w], peak [B, N] of cells [B, N, h, w, 3]."""


class Plan(NamedTuple):
  """What a canvas is drawn from.

  Attributes:
    person: who.
    prompt: of the canvas.
    seed: of the canvas.
    chosen: a pose for each cell.
    figures: those poses, in pixels of their cells.
    skeletons: uint8 [H, W, 3], their drawing.
  """

  person: prompts.Person
  prompt: str
  seed: int
  chosen: tuple[pose_bank.Pose, ...]
  figures: tuple[poses.Keypoints, ...]
  skeletons: np.ndarray


class Maker:
  """Makes people in batches; see identity.BatchMaker.

  Attributes:
    unit: what it makes.
    layout: of the cells.
  """

  unit = "canvases"

  def __init__(
    self,
    draw: Draw,
    *,
    people: prompts.People,
    bank: pose_bank.Bank,
    layout: canvas_lib.Layout,
    mattes: Mattes,
    pool: backgrounds.Pool,
    seed: int,
    batch_size: int,
    rules: quality.Rules | None = None,
    image_size: tuple[int, int] | None = None,
    template: str = prompts.TEMPLATE,
    fill: float = 0.93,
    line_width: int = 2,
    canny: tuple[float, float] = (100, 200),
    decontaminate: bool = False,
    num_threads: int = 2,
  ):
    """Sets the maker up; draws nothing.

    Args:
      draw: the sampler.
      people: who there is.
      bank: of skeletons.
      layout: of the cells.
      mattes: the matting network.
      pool: of backgrounds, for every light of the people.
      seed: of the canvases.
      batch_size: canvases at once.
      rules: which cells are thrown away.
      image_size: (height, width) of the pictures; the cells' by default.
      template: of the prompts.
      fill: share of a cell's height that a skeleton takes.
      line_width: of the grid between the cells, pixels.
      canny: low and high threshold of its edges.
      decontaminate: see `compose.fuse`.
      num_threads: that plan canvases and judge cells.

    Raises:
      errors.UserError: a skeleton does not fit the cells.
    """
    self.layout = layout
    self._draw, self._mattes, self._pool = draw, mattes, pool
    self._people, self._bank, self._template = people, bank, template
    self._seed, self._batch_size = seed, batch_size
    self._rules = rules or quality.Rules()
    self._image_size = tuple(image_size or layout.cell)
    self._fill, self._decontaminate = fill, decontaminate
    self._num_threads = num_threads
    grid = canvas_lib.grid_map(layout, line_width=line_width)
    self._grid = canvas_lib.line_map(grid, low=canny[0], high=canny[1])
    self._cut = jax.jit(functools.partial(canvas_lib.cut, layout=layout))

  def prepare(self, *, stopped: Callable[[], bool]) -> None:
    """Draws the backgrounds that are not there yet."""
    with _memory(self._batch_size):
      self._pool.prepare(stopped=stopped)

  def people(
    self, pids: Iterable[int]
  ) -> Iterator[tuple[int, identity.Identity]]:
    """Yields the people of the pids in their order; see the module.

    Raises:
      errors.UserError: a prompt that is too long, the device's memory is.
    """
    with futures.ThreadPoolExecutor(self._num_threads) as threads:
      begun = (
        self._begin(some, threads)
        for some in backgrounds.batched(pids, self._batch_size)
      )
      with _memory(self._batch_size):
        for plans, *found in backgrounds.ahead(begun):
          canvases, alpha, peak = (np.asarray(x) for x in found)
          judged = [
            threads.submit(self._judge, plan, *one)
            for plan, *one in zip(plans, canvases, alpha, peak, strict=False)
          ]
          for plan, job in zip(plans, judged, strict=True):
            yield plan.person.pid, job.result()

  def plan(self, pid: int) -> Plan:
    """Returns what the canvas of a person is drawn from."""
    person = self._people[pid]
    chosen = self._bank.choose(
      self.layout.num_cells,
      seed=self._seed,
      pid=pid,
      body=person.words["body"],
      activity=person.words["activity"],
    )
    figures = tuple(
      pose.fit(self.layout.cell, fill=self._fill) for pose in chosen
    )
    return Plan(
      person,
      person.prompt(self._template),
      identity.seed_of("canvas", self._seed, pid),
      chosen,
      figures,
      canvas_lib.skeleton_map(figures, self.layout),
    )

  def _begin(
    self, pids: Sequence[int], threads: futures.Executor
  ) -> tuple[Any, ...]:
    """Hands a batch to the device, and waits for nothing."""
    plans = list(threads.map(self.plan, pids))
    full = backgrounds.filled(plans, self._batch_size)
    canvases = self._draw(
      [plan.prompt for plan in full],
      [plan.seed for plan in full],
      skeletons=np.stack([plan.skeletons for plan in full]),
      grid=self._grid,
    )
    found = self._mattes.dispatch(self._cut(canvases))
    return plans, canvases, found.alpha, found.peak

  def _judge(
    self, plan: Plan, canvas: np.ndarray, alpha: np.ndarray, peak: np.ndarray
  ) -> identity.Identity:
    """Cuts a canvas, and throws away what breaks a rule."""
    cells = canvas_lib.cut(canvas, self.layout)
    reasons = quality.judge(
      cells, alpha, peak=peak, skeletons=plan.figures, rules=self._rules
    )
    person, records, dropped = plan.person, [], {}
    for i, reason in enumerate(reasons):
      if reason is not None:
        dropped[reason] = dropped.get(reason, 0) + 1
        continue
      scene, _ = self._pool.choose(person.lighting, pid=person.pid, cell=i)
      records.append(
        {
          "image": functools.partial(
            self._picture, cells[i], alpha[i], person=person, number=i
          ),
          "pid": person.pid,
          "cell": i,
          "pose": plan.chosen[i].number,
          "view": plan.chosen[i].view,
          "lighting": person.lighting,
          "background": scene.place,
          "prompt": plan.prompt,
          "attributes": person.attributes,
        }
      )
    steps = functools.partial(self._steps, plan, canvas, alpha, records)
    return identity.Identity(
      records, dropped, prompt=plan.prompt, seed=plan.seed, steps=steps
    )

  def _steps(
    self,
    plan: Plan,
    canvas: np.ndarray,
    alpha: np.ndarray,
    records: Sequence[Mapping[str, Any]],
  ) -> np.ndarray:
    """Draws skeletons, canvas, mattes and pictures side by side.

    Returns:
      uint8 [H, 4 W, 3] for a canvas of [H, W, 3]; the place of a cell that was
      thrown away is white among the pictures.
    """
    pictures = np.full((*alpha.shape, 3), 255, np.uint8)
    for record in records:
      pictures[record["cell"]] = images.resize(
        record["image"](), self.layout.cell
      )
    mattes = np.repeat(alpha[..., None], 3, axis=-1)
    join = lambda cells: canvas_lib.join(cells, self.layout)
    return np.hstack([plan.skeletons, canvas, join(mattes), join(pictures)])

  def _picture(
    self,
    cell: np.ndarray,
    alpha: np.ndarray,
    *,
    person: prompts.Person,
    number: int,
  ) -> np.ndarray:
    """Returns a person's cell before its background, however often called."""
    scene, rng = self._pool.choose(person.lighting, pid=person.pid, cell=number)
    ground = self._pool.crop(scene, cell.shape[:2], rng=rng)
    fused = compose.fuse(
      cell, alpha, background=ground, decontaminate=self._decontaminate
    )
    if fused.shape[:2] == self._image_size:
      return fused
    return images.resize(fused, self._image_size)


@contextlib.contextmanager
def _memory(batch_size: int) -> Iterator[None]:
  """Says in one line that the device's memory is too small for a batch."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise errors.UserError(
      f"the device's memory does not hold a batch of {batch_size} canvases: run"
      " again with a smaller --config.run.batch_size, nothing that was finished"
      " is lost"
    ) from error
