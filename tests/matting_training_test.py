"""pretraining/matting.py: its loss, what it does to cells, and a short run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from dppp_jax import checkpoints, cli, trees
from dppp_jax.models import u2net
from dppp_jax.paperdoll import canvas_corpus, canvases
from dppp_jax.pretraining import matting, methods
from dppp_jax.weights import u2net as u2net_weights


def test_supervision_is_torchs_cross_entropy_of_seven_outputs():
  rng = np.random.default_rng(0)
  fused = rng.normal(size=(2, 4, 3)).astype(np.float32) * 30
  sides = rng.normal(size=(2, 4, 3, 6)).astype(np.float32) * 3
  mattes = rng.random((2, 4, 3)).astype(np.float32)
  bce = torch.nn.functional.binary_cross_entropy_with_logits
  want = bce(torch.tensor(fused), torch.tensor(mattes)).item()
  want_sides = sum(
    bce(torch.tensor(sides[..., i]), torch.tensor(mattes)).item()
    for i in range(6)
  )
  got, got_sides = matting.supervise(
    u2net.Output(jnp.asarray(fused), jnp.asarray(sides)), jnp.asarray(mattes)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(got_sides, want_sides, rtol=1e-5)


def test_iou_equals_a_loop():
  rng = np.random.default_rng(1)
  found, wanted = rng.random((2, 5, 4, 4)) > 0.5
  found[3] = wanted[3] = False  # Nobody, and nobody found: right.
  want = []
  for a, b in zip(found, wanted, strict=True):
    pairs = list(zip(a.ravel(), b.ravel(), strict=True))
    either = sum(x or y for x, y in pairs)
    want.append(sum(x and y for x, y in pairs) / either if either else 1.0)
  np.testing.assert_allclose(matting.iou(found, wanted), np.mean(want))


def test_degraded_cells_keep_their_mattes():
  """A white shape on black: where it goes, the matte goes."""
  mattes = np.zeros((64, 48, 24), np.float32)
  mattes[:, 10:40, 4:15] = 1  # Off the middle, so that a mirror shows.
  images = jnp.asarray(40 + 180 * mattes[..., None] * np.ones(3))
  seen, kept = matting.degrade(images, jnp.asarray(mattes), jax.random.key(0))
  seen, kept = np.asarray(seen), np.asarray(kept)
  assert seen.min() >= 0 and seen.max() <= 255
  empty = kept.max(axis=(1, 2)) == 0
  assert 0 < empty.sum() < 12
  inside, outside = kept > 0.5, kept < 0.5
  for image, a, b in zip(seen[~empty], inside[~empty], outside[~empty]):
    grey = image.mean(-1)
    assert grey[a].mean() > grey[b].mean() + 60
    assert (grey[a] > 110).mean() > 0.9
  turned = kept[:, 12:38, 4:8].mean((1, 2)) < 0.5
  assert 0.2 < turned[~empty].mean() < 0.8
  # An empty cell is paper all over.
  assert (seen[empty].mean((1, 3))[:, 6:-6] < 110).all()
  # Lines remain at some borders, and belong to nobody.
  assert (kept[:, :1] == 0).all()
  assert (seen[:, 0].mean((1, 2)) < 62).mean() > 0.5


def test_degrading_draws_anew_for_each_key_and_picture():
  images = jnp.full((4, 24, 24, 3), 120.0)
  mattes = jnp.zeros((4, 24, 24))
  first, _ = matting.degrade(images, mattes, jax.random.key(0))
  again, _ = matting.degrade(images, mattes, jax.random.key(0))
  other, _ = matting.degrade(images, mattes, jax.random.key(1))
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, other)
  assert len({x.tobytes() for x in np.asarray(first)}) == 4


def test_cells_are_those_of_the_canvases(monkeypatch):
  corpus = canvas_corpus.draw(8, seed=2, processes=1)
  images, mattes = matting.cells(corpus)
  assert images.shape == (42, 96, 48, 3) and mattes.shape == (42, 96, 48)
  for i in (0, 5, 6, 41):
    canvas, (row, col) = i // 6, divmod(i % 6, 3)
    window = (
      slice(96 * row, 96 * row + 96),
      slice(48 * col, 48 * col + 48),
    )
    np.testing.assert_array_equal(images[i], corpus.images[canvas][window])
    np.testing.assert_array_equal(mattes[i], corpus.alphas[canvas][window])
  # Every second canvas comes out of the autoencoder.
  monkeypatch.setattr(matting.diffusers_folder, "vae", lambda _: (None, None))
  monkeypatch.setattr(
    matting.autoencoder, "reconstruct", lambda config, params, x: 255 - x
  )
  mixed, _ = matting.cells(corpus, vae="somewhere")
  np.testing.assert_array_equal(mixed[:6], 255 - images[:6])
  np.testing.assert_array_equal(mixed[6:12], images[6:12])
  assert canvases.LAYOUT.num_cells == 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  root = tmp_path_factory.mktemp("u2netp")
  config = cli.load_config("configs/pretrain_u2netp.py:smoke").to_dict()
  config["data"]["cache"] = str(root / "canvases")
  methods.train(config, str(root / "run"))
  return root / "run", config


def test_run_ends_with_a_file_that_loads(trained):
  workdir, config = trained
  net_config, variables = u2net_weights.load(workdir / "u2netp")
  assert net_config == matting.make_config(config["model"])
  _, kept = checkpoints.restore_model(workdir)
  for name, value in trees.flatten(kept).items():
    np.testing.assert_array_equal(
      trees.flatten(variables["params"])[name],
      np.asarray(value).astype(np.float16),
    )
  # The statistics of the batches have moved, and are written as well.
  moved = trees.flatten(variables["batch_stats"])
  assert all(np.any(x != 0) for k, x in moved.items() if k.endswith("mean"))
  path = workdir / "u2netp" / matting.FILE
  tensors = safetensors.numpy.load_file(path)
  assert "stage1d.rebnconv2d.bn_s1.running_var" in tensors
  assert {x.dtype for x in tensors.values()} == {np.dtype(np.float16)}


def test_card_says_what_was_measured(trained):
  workdir, config = trained
  metrics = json.loads((workdir / "u2netp" / "metrics.json").read_text())
  text = (workdir / "u2netp" / "README.md").read_text()
  assert text == matting.card(config, metrics)
  assert f"{metrics['iou_degraded']:.4f}" in text and "drawn" in text
  assert metrics["num_cells"] == 18 and metrics["steps"] == 3
  assert [p.name for p in (workdir / "sheets").iterdir()] == [
    "matting-000003.png"
  ]


def test_run_begins_at_hes_kernels():
  config = u2net.Config(((4, 8),) * 6, ((4, 8),) * 5)
  params, collections = matting._begin(config, {}, {}, jax.random.key(0))
  u2net_shapes = u2net_weights.shapes(config)
  given = {"params": params, **collections}
  trees.merge(u2net_shapes, given, where="test")
  kernel = params["stage4d"]["rebnconv1"]["conv_s1"]["kernel"]
  limit = np.sqrt(6 / np.prod(kernel.shape[:-1]))
  assert 0.95 * limit < np.abs(kernel).max() <= limit
  assert abs(kernel.std() - limit / np.sqrt(3)) < 0.1 * limit
  flat = trees.flatten(given)
  assert all((x == 1).all() for k, x in flat.items() if k.endswith("/scale"))
  assert all((x == 0).all() for k, x in flat.items() if k.endswith("/bias"))
