"""The step's benchmark: both sides compute the same, and FLOPs are counted."""

import argparse
import dataclasses
import math
import pathlib
import sys

import jax
from jax.interpreters import partial_eval
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import flops
import ptl
import remote
import torch_ptl
import train_step

from dppp_jax.methods import dppp
from dppp_jax.models import clip

_SETTING = ptl.Setting(
  clip.Config(
    vision=clip.VisionConfig(
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=2,
      image_size=32,
      patch_size=8,
    ),
    text=clip.TextConfig(
      vocab_size=60,
      hidden_size=24,
      intermediate_size=40,
      num_hidden_layers=2,
      num_attention_heads=3,
      max_position_embeddings=20,
      bos_token_id=58,
      eos_token_id=59,
    ),
    projection_dim=20,
  ),
  image_size=(32, 16),
  P=3,
  K=2,
  num_classes=11,
  options=dppp.Options(
    num_styles=5,
    num_selected=2,
    style_layers=2,
    content_hidden=14,
    style_hidden=18,
  ),
  gpu=False,
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
  folder = tmp_path_factory.mktemp("train_step") / "clip"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", "")  # A side adds to those of its process.
    yield folder, ptl.Side(str(folder), _SETTING)


def their_side(ours, setting=_SETTING):
  folder, side = ours
  return torch_ptl.Side(
    str(folder), side.new_modules(), setting.batch(), setting
  )


def test_both_sides_compute_the_same(ours):
  theirs = their_side(ours)
  rows = ptl.compare(ours[1], theirs, ("prompt's length", "77 tokens"))
  assert len(rows) == 6
  for row in rows:
    np.testing.assert_allclose(*row["loss"], rtol=1e-5)
    np.testing.assert_allclose(*row["grad_norm"], rtol=1e-5)
    assert row["difference"] < 1e-5
  # Adam moves both, so later steps compare the updates too.
  losses = [row["loss"][0] for row in rows]
  assert len(set(losses)) == 6
  assert rows[0]["grad_norm"][0] > 1e-2


def test_other_mathematics_is_noticed(ours):
  other = dataclasses.replace(_SETTING.options, text_squared=False)
  theirs = their_side(ours, dataclasses.replace(_SETTING, options=other))
  rows = ptl.compare(ours[1], theirs, ("prompt's length",))
  assert rows[0]["difference"] > 1e-3


def _dots(jaxpr):
  """Sums 2 m n k over the matrix products of a jaxpr and those in it."""
  total = 0
  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      total += _dots(inner) if hasattr(inner, "eqns") else 0
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      depth = math.prod(shape[i] for i in contracted)
      total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
  return total


def test_flops_are_those_of_the_traced_step(ours):
  """The formula leaves out what is small: resizing, similarities."""
  jaxpr = ours[1].trace().jaxpr
  # Gradients of what is frozen are traced, and dropped before they run.
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  counted = sum(flops.ptl_step(_SETTING).values())
  np.testing.assert_allclose(counted, _dots(jaxpr), rtol=0.02)


def test_flops_of_vit_b_16():
  """86M weights x 129 tokens x 6 are nearly all of the vision tower's."""
  setting = ptl.settings(gpu=True)["vit-b-16"]
  found = flops.ptl_step(setting)
  rough = 6 * 85e6 * 129 * setting.batch_size
  assert 0.85 * rough < found["vision"] < 1.1 * rough
  assert found["vision"] > 0.75 * sum(found.values())


@pytest.mark.parametrize(
  ("name", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("cpu", None),
  ],
)
def test_peaks(name, peak):
  assert flops.bfloat16_peak(name) == peak


class _Ours:
  """What a `remote.Remote` of our side answers."""

  def __init__(self, path, *args):
    if path.startswith("torch_ptl"):
      raise remote.Failed("RuntimeError: torch 2.13 has no CUDA device here")

  def __getattr__(self, name):
    answers = {"time": (2.0, 1.0), "matmul_flops": 1e9, "host_memory": 3}
    return lambda *args: answers.get(name, 0.5)


def test_where_pytorch_cannot_run_ours_is_measured_alone(monkeypatch, capsys):
  monkeypatch.setattr(remote, "Remote", _Ours)
  args = argparse.Namespace(model="tiny", rounds=2, steps=1, no_compile=False)
  found = train_step._run(args, gpu=False)
  assert found["notes"] == [
    "torch: RuntimeError: torch 2.13 has no CUDA device here"
  ]
  assert list(found["variants"]) == ["ours"]
  assert found["variants"]["ours"]["times_s"] == [2.0, 2.0]
  assert found["peak_memory_bytes"] == {"ours": 3}
  assert "times_faster" not in found and found["largest_difference"] is None
  train_step._print(found)
  assert "no CUDA device" in capsys.readouterr().out
