"""The benchmark of the rules: what it takes off, counts and writes."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import common
import rules

from dppp_jax.paperdoll import world

_SIZE = (96, 48)


@pytest.fixture(scope="module")
def people():
  return [world.studio(pid, 0, seed=11, size=_SIZE) for pid in range(4)]


def test_what_is_taken_off_is_paper(people):
  for person in people:
    points = np.concatenate(
      [person.keypoints.xy, person.keypoints.visible[:, None]], axis=1
    )
    bands = rules.bands(points, _SIZE[0])
    assert bands["no_head"][0] == 0 and bands["no_legs"][1] == _SIZE[0]
    assert bands["no_head"][1] < bands["no_legs"][0] < bands["no_shins"][0]
    for first, end in bands.values():
      changed = rules.painted(person.image, (first, end))
      kept = np.r_[:first, end : _SIZE[0]]
      np.testing.assert_array_equal(changed[kept], person.image[kept])
      # One colour a row, near that of the paper at the edge.
      assert not np.ptp(changed[first:end], axis=1).any()
      apart = changed[first:end, 0].astype(int) - person.image[first:end, 2]
      assert np.abs(apart).mean() < 12


def test_the_table_counts_what_is_below_a_bound(people):
  alphas = np.stack([person.alpha for person in people])
  figures = [person.keypoints for person in people]
  cells = np.stack([person.image for person in people])
  whole = rules.judged(cells, alphas, figures)
  assert len(whole) == 4
  assert all(one["least_of_parts"] <= one["all_points"] for one in whole)
  beheaded = alphas.copy()
  for alpha, figure in zip(beheaded, figures, strict=True):
    alpha[: int(figure.xy[1, 1])] = 0
  found = rules.judged(cells, beheaded, figures)
  groups = {"whole": whole, "no_head": found, "no_legs": []}
  table = rules.table(groups, {"whole": 4, "no_head": 5, "no_legs": 2})
  assert table["dropped_by_other_rules"] == {
    "whole": 0, "no_head": 1 - len(found) / 5, "no_legs": 1,
  }  # fmt: skip
  assert table["least_of_parts"]["0.5"] == {"whole": 0.0, "no_head": 1.0}
  assert table["all_points"]["0.5"] == {"whole": 0.0, "no_head": 0.0}


def test_the_page_says_what_the_table_has():
  kinds = ("whole", "no_head", "no_shins", "no_legs")
  shares = dict(zip(kinds, (0.01, 0.25, 0.5, 1.0), strict=True))
  results = {
    "num": 3,
    "seed": 1,
    "cells": dict.fromkeys(rules._KINDS, 0) | dict.fromkeys(kinds, 18),
    "dropped_by_other_rules": shares,
    "least_of_parts": {"0.5": shares},
    "all_points": {"0.5": shares},
  }
  text = rules.page({"results": results, "environment": common.environment()})
  assert "| whole | 18 | 1.0 % |" in text
  assert "| below 0.5 | 1.0 % | 25.0 % | 50.0 % | 100.0 % |" in text
  assert "like drawings" in " ".join(text.split())
  assert "by itself" not in text


def test_the_page_is_current():
  page = pathlib.Path(__file__).parents[1] / "docs/rules.md"
  assert page.read_text(encoding="utf-8") == rules.page(common.read("rules"))
