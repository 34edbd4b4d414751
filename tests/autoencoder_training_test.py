"""pretraining/autoencoder.py: its loss, its measures, and a short run."""

import json
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax import checkpoints, cli, errors, trees
from dppp_jax.models import vae
from dppp_jax.paperdoll import canvas_corpus
from dppp_jax.pretraining import autoencoder, corpora, methods
from dppp_jax.weights import diffusers_folder
from tests import training_test


def test_parts_of_the_loss_equal_loops_over_pixels():
  rng = np.random.default_rng(0)
  error = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
  l1, down, right, laplacian, square = [], [], [], [], []
  for b, c in np.ndindex(2, 3):
    e = error[b, :, :, c].astype(float)
    for y, x in np.ndindex(5, 4):
      l1.append(abs(e[y, x]))
      square.append(e[y, x] ** 2)
      if y + 1 < 5:
        down.append(abs(e[y + 1, x] - e[y, x]))
      if x + 1 < 4:
        right.append(abs(e[y, x + 1] - e[y, x]))
      if 0 < y < 4 and 0 < x < 3:
        around = e[y - 1, x] + e[y + 1, x] + e[y, x - 1] + e[y, x + 1]
        laplacian.append(abs(e[y, x] - around / 4))
  got = autoencoder.errors_of(jnp.asarray(error))
  np.testing.assert_allclose(got["l1"], np.mean(l1), rtol=1e-5)
  want = (np.mean(down) + np.mean(right)) / 2
  np.testing.assert_allclose(got["gradient"], want, rtol=1e-5)
  colour = [x - sum(x) / 3 for x in error.reshape(-1, 3).astype(float)]
  want = np.mean(np.square(colour))
  np.testing.assert_allclose(got["chroma"], want, rtol=1e-5)
  np.testing.assert_allclose(got["l2"], np.mean(square), rtol=1e-5)
  np.testing.assert_allclose(got["laplacian"], np.mean(laplacian), rtol=1e-5)
  # Pictures in [-1, 1] have a peak-to-peak of 2.
  want = 20 * math.log10(2) - 10 * math.log10(np.mean(square))
  np.testing.assert_allclose(got["psnr"], want, rtol=1e-5)


def test_edge_terms_see_lost_stripes_and_not_a_wrong_shade():
  stripes = jnp.zeros((1, 8, 8, 1)).at[:, ::2].set(0.2)
  shade = jnp.full((1, 8, 8, 1), float(jnp.mean(stripes)))
  lost, shifted = (autoencoder.errors_of(x) for x in (stripes, shade))
  np.testing.assert_allclose(lost["l1"], shifted["l1"], rtol=1e-6)
  assert lost["gradient"] > 0.09 and lost["laplacian"] > 0.09
  assert shifted["gradient"] < 1e-6 and shifted["laplacian"] < 1e-6


def test_kl_is_torchs():
  rng = np.random.default_rng(1)
  mean, logvar = rng.normal(size=(2, 2, 3, 3, 4)).astype(np.float32)
  theirs = torch.distributions.kl_divergence(
    torch.distributions.Normal(
      torch.tensor(mean), torch.tensor(np.exp(0.5 * logvar))
    ),
    torch.distributions.Normal(0.0, 1.0),
  )
  got = autoencoder.kl(vae.Moments(jnp.asarray(mean), jnp.asarray(logvar)))
  np.testing.assert_allclose(got, theirs.mean().numpy(), rtol=1e-5)


def test_loss_is_the_weighted_sum_of_its_parts():
  config = autoencoder.make_config(
    {
      "block_out_channels": (4, 4),
      "layers_per_block": 1,
      "norm_num_groups": 2,
      "mid_block_add_attention": False,
    }
  )
  weights = autoencoder.Weights(
    square=2.0, chroma=3.0, gradient=0.3, laplacian=0.7, kl=0.01
  )
  params = vae.init_params(config, jax.random.key(0))
  images = np.random.default_rng(2).uniform(-1, 1, (2, 16, 8, 3))
  loss = jax.jit(autoencoder.make_loss(config, weights, crop=(8, 4)))
  batch = {"image": jnp.asarray(images, jnp.float32)}
  total, aux = loss(params, {}, batch, jax.random.key(1))
  m = aux.metrics
  want = m["l1"] + 2 * m["l2"] + 0.3 * m["gradient"] + 0.7 * m["laplacian"]
  want += 0.01 * m["kl"] + 3 * m["chroma"]
  np.testing.assert_allclose(total, want, rtol=1e-6)
  # Other noise, and another window: the loss is drawn by lot.
  assert float(loss(params, {}, batch, jax.random.key(2))[0]) != float(total)


def test_a_window_is_a_piece_of_all_pictures():
  images = jnp.arange(2 * 6 * 5).reshape(2, 6, 5, 1)
  seen = set()
  for i in range(60):
    got = np.asarray(autoencoder._window(images, (4, 4), jax.random.key(i)))
    y, x = divmod(int(got[0, 0, 0, 0]), 5)
    np.testing.assert_array_equal(got, images[:, y : y + 4, x : x + 4])
    seen.add((y, x))
  # Every place, the last as well as the first.
  assert seen == {(y, x) for y in range(3) for x in range(2)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """What launch/pretrain.py leaves behind, and what it says."""
  root = tmp_path_factory.mktemp("vae")
  config = cli.load_config("configs/pretrain_vae.py:smoke").to_dict()
  config["data"]["cache"] = str(root / "canvases")
  methods.train(config, str(root / "run"))
  return root / "run", config


def test_run_ends_with_a_folder_that_diffusers_reads(trained):
  workdir, _ = trained
  folder = workdir / "vae"
  theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
  config, params = diffusers_folder.vae(folder)
  assert config.scaling_factor == theirs.config.scaling_factor
  image = np.random.default_rng(0).uniform(-1, 1, (1, 16, 8, 3))
  image = image.astype(np.float32)
  with torch.no_grad():
    want = theirs(torch.tensor(image.transpose(0, 3, 1, 2))).sample
  ours = vae.VAE(config).apply({"params": params}, image)
  want = want.numpy().transpose(0, 2, 3, 1)
  assert np.linalg.norm(ours - want) < 1e-5 * np.linalg.norm(want)
  _, kept = checkpoints.restore_model(workdir)
  for name, value in trees.flatten(kept).items():
    np.testing.assert_array_equal(
      trees.flatten(params)[name], np.asarray(value).astype(np.float16)
    )


def test_latents_have_the_spread_that_the_factor_says(trained):
  workdir, config = trained
  net_config, params = diffusers_folder.vae(workdir / "vae")
  corpus = corpora.draw(config["data"], "train", 8)
  images = corpus.images.astype(np.float32) / 127.5 - 1
  mean = vae.VAE(net_config).apply({"params": params}, images, method="encode")
  latents = vae.normalize(mean.mean, net_config)
  assert abs(float(np.std(latents)) - 1) < 0.01


def test_card_and_sheets_say_what_was_measured(trained):
  workdir, config = trained
  metrics = json.loads((workdir / "vae" / "metrics.json").read_text())
  text = (workdir / "vae" / "README.md").read_text()
  assert text == autoencoder.card(config, metrics)
  assert f"{metrics['psnr_people']:.2f} dB" in text and "drawn" in text
  assert metrics["steps"] == 4 and metrics["num_canvases"] == 8
  corpus = corpora.draw(config["data"], "held_out", 8)
  made = autoencoder.reconstruct(
    *diffusers_folder.vae(workdir / "vae"), corpus.images
  )
  error = made.astype(float) - corpus.images
  each = [10 * np.log10(255**2 / np.mean(e**2)) for e in error]
  places = corpus.is_scene
  want = np.mean([x for x, place in zip(each, places, strict=True) if place])
  np.testing.assert_allclose(metrics["psnr_places"], want, rtol=1e-6)
  sheets = sorted(p.name for p in (workdir / "sheets").iterdir())
  assert sheets == ["canvases-000002.png", "windows-000002.png"]


def test_launcher_takes_the_network_of_the_config(trained, capsys):
  """A finished run, run again, only says what it has."""
  workdir, config = trained
  code, out, _ = training_test.launch(
    capsys,
    "launch/pretrain.py",
    "--config=configs/pretrain_vae.py:smoke",
    f"--workdir={workdir}",
    f"--config.data.cache={config['data']['cache']}",
    default="pretrain_clip.py",
  )
  assert code == 0 and "Mini VAE" in out and str(workdir / "vae") in out


def test_unknown_method_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match="autoencoder, clip_pretrain"):
    methods.train({"method": "gan"}, str(tmp_path))


def test_measure_tells_people_from_places(monkeypatch):
  """A VAE that returns grey: its errors are those of the pictures."""
  corpus = canvas_corpus.draw(8, seed=5, processes=1)
  grey = lambda config, params, images: np.full_like(images, 128)
  monkeypatch.setattr(autoencoder, "reconstruct", grey)
  monkeypatch.setattr(diffusers_folder, "vae", lambda folder: (None, None))
  got = autoencoder.measure("anywhere", corpus)
  error = corpus.images.astype(float) - 128
  people = corpus.alphas > 127
  want = [
    10 * np.log10(255**2 / np.mean(error[i][people[i]] ** 2)) for i in range(7)
  ]
  np.testing.assert_allclose(got["psnr_people"], np.mean(want), rtol=1e-6)
  want = 10 * np.log10(255**2 / np.mean(error[7] ** 2))
  np.testing.assert_allclose(got["psnr_places"], want, rtol=1e-6)
