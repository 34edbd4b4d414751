"""SIGTERM and Ctrl-C as a flag that a long loop reads between two steps."""

import signal
import threading
from typing import Any

from absl import logging


class Interrupts:
  """Catches the first signal; a second one gets through.

  Args:
    note: what is said when a signal is caught.

  Attributes:
    number: of the signal caught, or 0.
  """

  def __init__(self, note: str):
    self.number = 0
    self._note = note
    self._old: dict[int, Any] = {}

  def __enter__(self) -> "Interrupts":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._catch)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)
    self._old = {}

  def _catch(self, number: int, frame: Any) -> None:
    del frame
    self.number = number
    self.__exit__()
    logging.warning("%s; again to abort", self._note)
