"""Processes that work through a list, deaf to signals and mortal."""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from typing import TypeVar

from dppp_jax import errors

Item = TypeVar("Item")
Made = TypeVar("Made")


def each(
  function: Callable[[Item], Made],
  items: Sequence[Item],
  *,
  num_processes: int,
  stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Item, Made]]:
  """Yields (item, function(item)) in the order of the items, until stopped.

  Args:
    function: pure; pickled for other processes, as are items and results.
    items: what to work through.
    num_processes: that work side by side; 0 is this one alone.
    stopped: whether to begin no more.

  Raises:
    errors.UserError: a process died.
  """
  if not num_processes:
    for item in items:
      if stopped():
        return
      yield item, function(item)
    return
  left, begun = iter(items), collections.deque()
  pool = futures.ProcessPoolExecutor(
    min(num_processes, max(1, len(items))),
    # A fork of a process with threads may hang.
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_in_worker,
  )
  try:
    with _deaf():  # Each of the first submissions starts a process.
      for item in itertools.islice(left, num_processes):
        begun.append((item, pool.submit(function, item)))
    while not stopped():
      for item in itertools.islice(left, 2 * num_processes - len(begun)):
        begun.append((item, pool.submit(function, item)))
      if not begun:
        break
      item, future = begun.popleft()
      yield item, future.result()
  except futures.process.BrokenProcessPool as error:
    raise errors.UserError(
      f"a process died at {item} (out of memory?): run again with fewer"
      " processes"
    ) from error
  finally:  # Also where Ctrl-C ends it: what has not begun need not.
    pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
  """Lets processes be born deaf to Ctrl-C, which goes to all on a terminal."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  old = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, old)


def _in_worker() -> None:
  """Leaves Ctrl-C to the parent, and ends when the parent was killed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = os.getppid()

  def watch():
    while os.getppid() == parent:
      time.sleep(1.0)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
