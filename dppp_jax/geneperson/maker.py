"""Invented people, in batches: prompts, canvases, cells, mattes, pictures.

    maker = Maker(draw, people=prompts.People(0), bank=bank, layout=layout, ...)
    for pid, person in maker.people(range(6641)): ...

A person is a pure function of (seed, pid): prompt, skeletons and the seeds of
its canvases are, and a canvas is always drawn in the same place of the same
batch (see `groups`).

Who keeps too few cells of a canvas is given another one, of another seed, for
which its whole group is drawn again; the others' are not looked at.

The device is given the next batch (text, steps, decoding, mattes) before the
host waits for the one before, judges its cells and hands them on; pictures are
fused by whoever encodes them, after the cap.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import functools
import itertools
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dppp_jax import errors, types
from dppp_jax.data import images
from dppp_jax.geneperson import (
  backgrounds,
  compose,
  groups,
  identity,
  matting,
  pose_bank,
  poses,
  prompts,
  quality,
)
from dppp_jax.geneperson import canvas as canvas_lib

_cut = jax.jit(canvas_lib.cut, static_argnames="layout")


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


class Drawn(NamedTuple):
  """A canvas, or a batch of them that is perhaps still being computed.

  Attributes:
    canvas: uint8 [H, W, 3].
    alpha: uint8 [N, h, w], the mattes of its cells.
    peak: float32 [N], see matting.Mattes.
  """

  canvas: types.Array
  alpha: types.Array
  peak: types.Array


class Plan(NamedTuple):
  """What the canvases of a person are drawn from.

  Attributes:
    person: who.
    prompt: of the canvases.
    seeds: of the canvases, one for each try.
    chosen: a pose for each cell.
    figures: those poses, in pixels of their cells.
    skeletons: uint8 [H, W, 3], their drawing.
  """

  person: prompts.Person
  prompt: str
  seeds: tuple[int, ...]
  chosen: tuple[pose_bank.Pose, ...]
  figures: tuple[poses.Keypoints, ...]
  skeletons: np.ndarray


class Maker:
  """Makes people in batches; see identity.BatchMaker.

  Attributes:
    unit: what it makes.
    group_size: canvases that are drawn at once.
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
    tries: int = 1,
    min_images: int = 1,
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
      batch_size: canvases at once; people of a group.
      tries: canvases that a person may be given.
      min_images: cells that must be kept for no other canvas to be drawn.
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
    self._seed, self.group_size = seed, batch_size
    self._tries, self._min_images = tries, min_images
    self._rules = rules or quality.Rules()
    self._image_size = tuple(image_size or layout.cell)
    self._fill, self._decontaminate = fill, decontaminate
    self._num_threads = num_threads
    grid = canvas_lib.grid_map(layout, line_width=line_width)
    self._grid = canvas_lib.line_map(grid, low=canny[0], high=canny[1])

  def prepare(self, *, stopped: Callable[[], bool]) -> None:
    """Draws the backgrounds that are not there yet."""
    with _memory(self.group_size):
      self._pool.prepare(stopped=stopped)

  def people(
    self, pids: Iterable[int], *, stopped: Callable[[], bool] = lambda: False
  ) -> Iterator[tuple[int, identity.Identity]]:
    """Yields the people of the pids, ascending; see the module.

    Args:
      pids: who is asked for, ascending.
      stopped: whether to begin no more: groups in progress are ended, but
        nobody is given another canvas, and who needs one is left out.

    Raises:
      errors.UserError: a prompt that is too long, the device's memory is.
    """
    with futures.ThreadPoolExecutor(self._num_threads) as threads:
      begun = (
        self._begin(group, some, threads)
        for group, some in itertools.takewhile(
          lambda _: not stopped(), groups.split(pids, self.group_size)
        )
      )
      with _memory(self.group_size):
        for plans, some, drawn in backgrounds.ahead(begun):
          made = self._made(plans, some, drawn, threads, stopped)
          yield from sorted(made.items())

  def _seed_of(self, pid: int, number: int) -> int:
    """Returns the seed of a person's canvas; number: of the try, from 0."""
    further = (number,) if number else ()
    return identity.seed_of("canvas", self._seed, pid, *further)

  def plan(self, pid: int) -> Plan:
    """Returns what the canvases of a person are drawn from."""
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
      tuple(self._seed_of(pid, number) for number in range(self._tries)),
      chosen,
      figures,
      canvas_lib.skeleton_map(figures, self.layout),
    )

  def _begin(
    self, group: range, pids: Sequence[int], threads: futures.Executor
  ) -> tuple[list[Plan], dict[int, int], Drawn]:
    """Hands a group to the device, and waits for nothing.

    Returns:
      Its plans, {pid: place in the group} of those asked for, and the canvases.
    """
    places = {pid: group.index(pid) for pid in pids}

    def plan(pid: int) -> Plan | None:
      try:
        return self.plan(pid)
      except errors.UserError:  # E.g. the vocabulary dresses nobody more.
        if pid in places:
          raise
        return None

    plans = list(threads.map(plan, group))
    first = next(plan for plan in plans if plan is not None)
    plans = [plan or first for plan in plans]
    return plans, places, self._drawn(plans, 0)

  def _drawn(self, plans: Sequence[Plan], number: int) -> Drawn:
    """Begins a canvas for everybody of a group, with the seeds of a try."""
    canvases = self._draw(
      [plan.prompt for plan in plans],
      [plan.seeds[number] for plan in plans],
      skeletons=np.stack([plan.skeletons for plan in plans]),
      grid=self._grid,
    )
    found = self._mattes.dispatch(_cut(canvases, layout=self.layout))
    return Drawn(canvases, found.alpha, found.peak)

  def _made(
    self,
    plans: Sequence[Plan],
    places: Mapping[int, int],
    drawn: Drawn,
    threads: futures.Executor,
    stopped: Callable[[], bool],
  ) -> dict[int, identity.Identity]:
    """Returns {pid: person} of a group, with as many canvases as they need."""
    canvases: dict[int, list[Drawn]] = {pid: [] for pid in places}
    made: dict[int, identity.Identity] = {}
    few = list(places)
    for number in range(self._tries):
      if number:
        drawn = self._drawn(plans, number)
      drawn = Drawn(*(np.asarray(part) for part in drawn))
      jobs = {}
      for pid in few:
        canvases[pid].append(Drawn(*(part[places[pid]] for part in drawn)))
        jobs[pid] = threads.submit(
          self._judge, plans[places[pid]], canvases[pid]
        )
      made |= {pid: job.result() for pid, job in jobs.items()}
      few = [pid for pid in few if len(made[pid].records) < self._min_images]
      if not few:
        break
      if stopped() and number + 1 < self._tries:
        return {pid: one for pid, one in made.items() if pid not in few}
    return made

  def _judge(self, plan: Plan, drawn: Sequence[Drawn]) -> identity.Identity:
    """Cuts the canvases of a person, and throws away what breaks a rule.

    The cells of the second canvas are counted on from those of the first.
    """
    size, count = self.layout.num_cells, len(drawn)
    join = lambda parts: np.concatenate(list(parts))
    cells = join(canvas_lib.cut(one.canvas, self.layout) for one in drawn)
    alpha = join(one.alpha for one in drawn)
    reasons = quality.judge(
      cells,
      alpha,
      peak=join(one.peak for one in drawn),
      skeletons=plan.figures * count,
      rules=self._rules,
    )
    person, records, dropped = plan.person, [], {}
    for i, reason in enumerate(reasons):
      if reason is not None:
        dropped[reason] = dropped.get(reason, 0) + 1
        continue
      scene, _ = self._pool.choose(person.lighting, pid=person.pid, cell=i)
      pose = plan.chosen[i % size]
      records.append(
        {
          "image": functools.partial(
            self._picture, cells[i], alpha[i], person=person, number=i
          ),
          "pid": person.pid,
          "cell": i,
          "pose": pose.number,
          "view": pose.view,
          "lighting": person.lighting,
          "background": scene.place,
          "prompt": plan.prompt,
          "attributes": person.attributes,
        }
      )
    return identity.Identity(
      records,
      dropped,
      prompt=plan.prompt,
      seed=plan.seeds[0],
      further_seeds=plan.seeds[1:count],
      steps=functools.partial(self._steps, plan, tuple(drawn), records),
    )

  def _steps(
    self,
    plan: Plan,
    drawn: Sequence[Drawn],
    records: Sequence[Mapping[str, Any]],
  ) -> np.ndarray:
    """Draws skeletons, canvas, mattes and pictures side by side.

    Returns:
      uint8 [K H, 4 W, 3] for K canvases of [H, W, 3]; the place of a cell that
      was thrown away is white among the pictures.
    """
    size = self.layout.num_cells
    shape = (len(drawn) * size, *self.layout.cell, 3)
    pictures = np.full(shape, 255, np.uint8)
    for record in records:
      pictures[record["cell"]] = images.resize(
        record["image"](), self.layout.cell
      )
    join = lambda cells: canvas_lib.join(cells, self.layout)
    rows = []
    for one, own in zip(drawn, np.split(pictures, len(drawn)), strict=True):
      mattes = np.repeat(one.alpha[..., None], 3, axis=-1)
      rows.append(
        np.hstack([plan.skeletons, one.canvas, join(mattes), join(own)])
      )
    return np.vstack(rows)

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
