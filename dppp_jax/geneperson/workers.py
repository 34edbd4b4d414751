"""Processes that make people one by one, deaf to signals and mortal."""

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

from dppp_jax import errors
from dppp_jax.geneperson import identity


def make(
  make_identity: identity.MakeIdentity,
  pids: Sequence[int],
  *,
  stopped: Callable[[], bool],
  num_processes: int,
) -> Iterator[tuple[int, identity.Identity]]:
  """Yields (pid, identity) in the order of the pids, until stopped.

  Args:
    make_identity: a pure function of the pid; pickled for other processes.
    pids: who is to be made.
    stopped: whether to begin no more.
    num_processes: 0 makes them in this one.

  Raises:
    errors.UserError: a process died.
  """
  if not num_processes:
    for pid in pids:
      if stopped():
        return
      yield pid, _call(make_identity, pid)
    return
  left, begun = iter(pids), collections.deque()
  with futures.ProcessPoolExecutor(
    min(num_processes, max(1, len(pids))),
    # A fork of a process with threads may hang.
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_in_worker,
  ) as pool:
    with _deaf():  # Each of the first submissions starts a process.
      for pid in itertools.islice(left, num_processes):
        begun.append((pid, pool.submit(_call, make_identity, pid)))
    while not stopped():
      for pid in itertools.islice(left, 2 * num_processes - len(begun)):
        begun.append((pid, pool.submit(_call, make_identity, pid)))
      if not begun:
        break
      pid, future = begun.popleft()
      try:
        yield pid, future.result()
      except futures.process.BrokenProcessPool as error:
        raise errors.UserError(
          f"a process that makes people died at pid {pid} (out of memory?):"
          " run again with fewer --num_processes"
        ) from error
    pool.shutdown(cancel_futures=True)


def _call(make_identity: identity.MakeIdentity, pid: int) -> identity.Identity:
  made = make_identity(pid)
  if isinstance(made, identity.Identity):
    return made
  return identity.Identity(list(made))


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
