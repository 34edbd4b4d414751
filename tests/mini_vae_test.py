"""The shipped mini VAE: size, parity with diffusers, what it keeps."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch

from dppp_jax import cli
from dppp_jax.models import vae
from dppp_jax.paperdoll import canvas_corpus, canvases
from dppp_jax.pretraining import autoencoder
from dppp_jax.weights import diffusers_folder

_FOLDER = cli.ROOT / "dppp_jax/assets/mini/sdxl/vae"


@pytest.fixture(scope="module")
def corpus():
  """Other people and another world seed than those of the card."""
  return canvas_corpus.draw(16, seed=7, split="held_out", processes=1)


def test_is_small():
  assert sum(p.stat().st_size for p in _FOLDER.iterdir()) <= 3 * 2**20


def test_keeps_what_is_on_held_out_canvases(corpus):
  found = autoencoder.measure(_FOLDER, corpus)
  assert found["psnr_canvases"] >= 29  # The bar of the card is 26.
  # Where paper does not flatter.
  assert found["psnr_people"] >= 25


def test_patterns_survive(corpus):
  """Edges of stripes, dots and checks are as strong as they were, nearly."""
  patterned = [
    i
    for i, record in enumerate(corpus.records)
    if record["words"].get("upper_pattern", "plain") != "plain"
  ][:8]
  images = corpus.images[patterned]
  made = autoencoder.reconstruct(*diffusers_folder.vae(_FOLDER), images)
  inside = corpus.alphas[patterned][:, 1:] > 127

  def steps(x):
    down = np.diff(x.astype(float).mean(-1), axis=1)
    return down[inside]

  before, after = steps(images), steps(made)
  assert np.corrcoef(before, after)[0, 1] > 0.9
  assert after.std() > 0.85 * before.std()


def test_latents_are_of_variance_one(corpus):
  config, params = diffusers_folder.vae(_FOLDER)
  images = corpus.images[:8].astype(np.float32) / 127.5 - 1
  encode = jax.jit(
    lambda x: vae.VAE(config).apply({"params": params}, x, method="encode")
  )
  latents = vae.normalize(encode(images).mean, config)
  height, width = canvases.LAYOUT.size
  assert latents.shape[1:3] == (height // 4, width // 4)
  assert abs(float(np.std(latents)) - 1) < 0.1


def test_diffusers_gives_the_same(corpus):
  theirs = diffusers.AutoencoderKL.from_pretrained(_FOLDER).double().eval()
  pixels = corpus.images[0][:32, :48].astype(np.float64) / 127.5 - 1
  with torch.no_grad():
    want = theirs(torch.tensor(pixels.transpose(2, 0, 1)[None])).sample
  with jax.enable_x64(True):
    config, params = diffusers_folder.vae(_FOLDER)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    net = vae.VAE(config, dtype=np.float64)
    got = net.apply({"params": params}, pixels[None])
  want = want.numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(got, want, atol=1e-9)


def test_card_says_what_was_measured():
  metrics = json.loads((_FOLDER / "metrics.json").read_text())
  config = json.loads((_FOLDER / "training.json").read_text())
  text = (_FOLDER / "README.md").read_text()
  assert autoencoder.card(config, metrics) == text
  assert metrics["psnr_canvases"] >= 26 and "drawn" in text
  committed = cli.load_config("configs/pretrain_vae.py").to_dict()
  assert json.loads(json.dumps(committed)) == config
