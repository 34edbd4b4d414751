"""Processes that work through a list: order, early ends, deaths."""

import operator
import os

import pytest

from dppp_jax import errors, workers


@pytest.mark.parametrize("num_processes", [0, 2])
def test_results_come_in_the_order_of_the_items(num_processes):
  found = workers.each(operator.neg, range(7), num_processes=num_processes)
  assert list(found) == [(i, -i) for i in range(7)]


@pytest.mark.parametrize("num_processes", [0, 2])
def test_no_more_come_once_it_is_stopped(num_processes):
  seen = []
  for item, _ in workers.each(
    operator.neg,
    range(7),
    num_processes=num_processes,
    stopped=lambda: len(seen) == 3,
  ):
    seen.append(item)
  assert seen == [0, 1, 2]


def test_a_process_that_dies_is_told_in_one_line():
  with pytest.raises(errors.UserError, match=r"died at 5 .*fewer processes"):
    list(workers.each(os._exit, [5], num_processes=1))
