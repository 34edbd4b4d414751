"""Matting against the steps of rembg, done with Pillow and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from dppp_jax import errors
from dppp_jax.geneperson import matting
from dppp_jax.models import u2net
from dppp_jax.paperdoll import world
from dppp_jax.weights import u2net as weights

CELL = (96, 48)
SIZE = (64, 64)


def _network(variables, images):
  """Dark on light: a logit per pixel, sharp enough to be sure of a person."""
  return variables["bias"] - variables["gain"] * images.mean(-1)


VARIABLES = {"gain": jnp.float32(1.0), "bias": jnp.float32(0.8)}


def _make(**options):
  options = {"size": SIZE, "batch_size": 4} | options
  return matting.Matting(_network, VARIABLES, **options)


@pytest.fixture(scope="module")
def cells():
  return np.stack(
    [world.studio(pid, 0, seed=3, size=CELL).image for pid in range(6)]
  )


def _rembg(cell):
  """Its U2netSession: normalise, predict, min-max, resize back."""
  image = PIL.Image.fromarray(cell).resize(SIZE[::-1], PIL.Image.LANCZOS)
  values = np.array(image) / max(np.max(np.array(image)), 1e-6)
  values = (values - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  logits = 0.8 - values.mean(-1)
  found = 1 / (1 + np.exp(-logits))
  peak = found.max()
  found = (found - found.min()) / (found.max() - found.min())
  mask = PIL.Image.fromarray((found * 255).astype("uint8"))
  return np.array(mask.resize(CELL[::-1], PIL.Image.LANCZOS)), peak


def test_equals_rembg(cells):
  alpha, peak = _make()(cells)
  assert alpha.dtype == np.uint8 and alpha.shape == (6, *CELL)
  for i, cell in enumerate(cells):
    expected, expected_peak = _rembg(cell)
    apart = np.abs(alpha[i].astype(int) - expected)
    # Pillow rounds to bytes between its passes and truncates the mask.
    assert apart.max() <= 6 and apart.mean() < 1.2
    assert abs(peak[i] - expected_peak) < 5e-3
    assert alpha[i].max() >= 250


def test_a_cell_does_not_depend_on_its_batch(cells):
  together = _make()(cells)
  for i in (0, 5):
    alone = _make()(cells[i : i + 1])
    np.testing.assert_array_equal(alone.alpha[0], together.alpha[i])
  before = matting._program._cache_size()
  _make()(cells[:3])
  assert matting._program._cache_size() == before


def test_brightness_of_a_cell_does_not_matter(cells):
  """Each cell is divided by its own maximum."""
  bright = cells[:1] // 2 * 2
  both = np.concatenate([bright, bright // 2])
  alpha, peak = _make(size=CELL)(both)
  np.testing.assert_allclose(peak[0], peak[1], atol=1e-5)
  assert np.abs(alpha[0].astype(int) - alpha[1]).max() <= 1


def test_empty_cells_are_empty():
  """A plain ground: min-max alone would make a person of its grain."""
  rng = np.random.default_rng(0)
  empty = rng.integers(205, 215, (2, *CELL, 3)).astype(np.uint8)
  alpha, peak = _make()(empty)
  assert not alpha.any() and (peak < 0.4).all()
  blown_up, _ = _make(min_peak=0.0)(empty)
  assert (blown_up > 128).mean() > 0.05
  black = np.zeros((1, *CELL, 3), np.uint8)
  assert np.isfinite(_make()(black).peak).all()


def test_loads_a_file_and_runs_its_network(tmp_path):
  config = u2net.Config(((2, 3),) * 6, ((2, 3),) * 5)
  variables = jax.tree.map(
    lambda leaf: np.ones(leaf.shape, np.float32), weights.shapes(config)
  )
  weights.save(tmp_path / "u2netp.safetensors", variables)
  made = matting.load(tmp_path, dtype=jnp.bfloat16, size=(40, 24))
  assert made.size == (40, 24)
  jax.tree.map(np.testing.assert_array_equal, made.variables, variables)
  images = jnp.zeros((2, 40, 24, 3))
  logits = jax.eval_shape(made.network, made.variables, images)
  assert logits.shape == (2, 40, 24) and logits.dtype == jnp.float32


def test_nothing_in_nothing_out():
  alpha, peak = _make()(np.zeros((0, *CELL, 3), np.uint8))
  assert alpha.shape == (0, *CELL) and peak.shape == (0,)


def test_refuses_other_pictures():
  with pytest.raises(errors.UserError, match="float32"):
    _make()(np.zeros((1, *CELL, 3), np.float32))
