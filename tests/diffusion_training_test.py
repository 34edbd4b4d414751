"""pretraining/{unet,controlnet,lora}.py: short runs, and what they leave."""

import json

import diffusers
import jax
import numpy as np
import PIL.Image
import pytest
import torch

from dppp_jax import checkpoints, cli, errors, trees
from dppp_jax.geneperson import canvas, components
from dppp_jax.models import vae
from dppp_jax.paperdoll import canvas_corpus, canvases
from dppp_jax.pretraining import controlnet, latents, lora, methods, unet
from dppp_jax.weights import diffusers_folder
from dppp_jax.weights import lora as lora_lib

# diffusers hands torch tensors to numpy in a way that numpy 2 discourages.
pytestmark = pytest.mark.filterwarnings(
  "ignore:__array__ implementation:DeprecationWarning"
)


def _config(name, root, **data):
  config = cli.load_config(f"configs/{name}.py:smoke")
  config.data.cache = str(root / "cache")
  if name == "pretrain_unet":  # With Muon its program takes a gigabyte more.
    config.train.muon = False  # The VAE's training has it.
  # Of a VAE that makes a latent of 4 x 4 pixels.
  if "control" in config.model:
    config.model.control.conditioning_embedding_out_channels = (4, 4, 8)
  if "conditioning_embedding_out_channels" in config.model:
    config.model.conditioning_embedding_out_channels = (4, 4, 8)
  for key, value in data.items():
    config.data[key] = value
  return config.to_dict()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A folder with a VAE that is small, at random, and good enough here."""
  folder = tmp_path_factory.mktemp("stack")
  config = vae.Config(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(4, 4, 4),
    norm_num_groups=2,
    scaling_factor=1.0,
    mid_block_add_attention=False,
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (rng.normal(size=x.shape) * 0.3).astype(np.float32),
    vae.param_shapes(config),
  )
  diffusers_folder.save(folder / "vae", config, params)
  return folder


@pytest.fixture(scope="module")
def sdxl(root):
  config = _config("pretrain_unet", root, vae=str(root / "vae"))
  assert methods.METHODS[config["method"]] is unet.train
  return unet.train(config, str(root / "unet"))


def test_unet_ends_as_a_pipeline_of_diffusers(root, sdxl):
  pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
    sdxl, add_watermarker=False
  )
  pipeline.set_progress_bar_config(disable=True)
  assert pipeline.default_sample_size == 48  # 192 / 4.
  assert pipeline.tokenizer.model_max_length == 77
  with torch.no_grad():
    images = pipeline(
      "man, red jacket", num_inference_steps=1, height=32, width=16,
      output_type="np",
    ).images  # fmt: skip
  assert images.shape == (1, 32, 16, 3) and np.isfinite(images).all()
  # What is exported is the average, and not the last step.
  _, params = checkpoints.restore_model(root / "unet")
  parts = components.load_components(sdxl)
  last = trees.flatten(params["unet"])
  moved = 0
  for name, leaf in trees.flatten(parts.params["unet"]).items():
    moved += not np.array_equal(leaf, last[name].astype(np.float16))
  assert moved > 50
  # The first text encoder is the CLIP's, to the bit; the second has learned.
  texts = [trees.flatten(parts.params[name]) for name in parts.text_names]
  learned = [
    k for k in texts[0] if not np.array_equal(texts[0][k], texts[1][k])
  ]
  assert len(learned) > 20
  metrics = json.loads((sdxl / "metrics.json").read_text())
  assert metrics["steps"] == 2 and metrics["held_out_mse"] > 0
  assert "all timesteps alike" in (sdxl / "README.md").read_text()
  sheets = sorted((root / "unet" / "sheets").iterdir())
  assert [path.name for path in sheets] == ["windows-000002.png"]
  # Drawn canvases, skeletons, and what is generated of them.
  assert PIL.Image.open(sheets[0]).size == (2 * 144, 3 * 192)


def test_controlnet_learns_beside_the_unet(root, sdxl):
  folder = root / "unet" / "controlnet-openpose"
  net = diffusers.ControlNetModel.from_pretrained(folder)
  assert all(conv.weight.abs().max() > 0 for conv in net.controlnet_down_blocks)
  assert "the UNet learns beside it" in (folder / "README.md").read_text()
  ours = json.loads((folder / "metrics.json").read_text())
  alone = json.loads((sdxl / "metrics.json").read_text())["held_out_mse"]
  np.testing.assert_allclose(ours["held_out_mse_without"], alone, rtol=1e-6)
  assert ours["held_out_mse"] != alone
  # Its copy of the way down went its own way.
  base = diffusers.UNet2DConditionModel.from_pretrained(sdxl / "unet")
  assert not torch.equal(net.conv_in.weight, base.conv_in.weight)


def test_unet_and_controlnet_go_on_where_a_run_ended(root, sdxl):
  """With rates of zero they stay where they are."""
  config = _config("pretrain_unet", root, vae="nowhere", clip="nowhere")
  config["begin"] = str(root / "unet")
  config["train"]["sheet_every"] = 0
  config["train"]["phases"][0]["lr"] = 0.0
  again = unet.train(config, str(root / "more"))
  name = "controlnet-openpose"
  before, after = (
    components.load_components(folder, controlnets=[folder.parent / name])
    for folder in (sdxl, again)
  )
  assert before.unet == after.unet and before.scheduler == after.scheduler
  trees_ = [trees.flatten(parts.params) for parts in (before, after)]
  assert trees_[0].keys() == trees_[1].keys()
  for key, leaf in trees_[0].items():
    np.testing.assert_array_equal(leaf, trees_[1][key], err_msg=key)
  read = lambda folder: json.loads((folder / name / "metrics.json").read_text())
  for key in ("held_out_mse", "held_out_mse_without"):
    a, b = read(root / "unet")[key], read(root / "more")[key]
    np.testing.assert_allclose(a, b, rtol=1e-2)  # Exported in float16.


def test_controlnet_steers_by_skeletons(root, sdxl):
  config = _config("pretrain_controlnet_openpose", root, base=str(sdxl))
  assert methods.METHODS[config["method"]] is controlnet.train
  config["train"]["sheet_every"] = 0
  folder = controlnet.train(config, str(root / "openpose"))
  assert folder.name == "controlnet-openpose"
  net = diffusers.ControlNetModel.from_pretrained(folder)
  # All that begins at zero has moved, or nothing would ever be steered.
  assert all(conv.weight.abs().max() > 0 for conv in net.controlnet_down_blocks)
  parts = components.load_components(sdxl, controlnets=[folder])
  assert len(parts.controlnets) == 1
  metrics = json.loads((folder / "metrics.json").read_text())
  # Without it, the error is that of the UNet alone.
  base = json.loads((sdxl / "metrics.json").read_text())["held_out_mse"]
  np.testing.assert_allclose(
    metrics["held_out_mse_without"], base, rtol=1e-2
  )  # The folder is in float16.
  assert metrics["held_out_mse"] != metrics["held_out_mse_without"]


def test_loras_are_files_that_merge(root, sdxl):
  config = _config("pretrain_lora", root, base=str(sdxl), kinds=("style",))
  config["train"]["sheet_every"] = 0  # The samples that are measured will do.
  assert methods.METHODS[config["method"]] is lora.train
  folder = lora.train(config, str(root / "lora"))
  before = components.load_components(sdxl)
  after = components.load_components(
    sdxl, loras=[lora_lib.Lora(folder / "style.safetensors", scale=1.0)]
  )
  changed = [
    np.abs(x - y).max() > 0
    for x, y in zip(
      trees.flatten(before.params["unet"]).values(),
      trees.flatten(after.params["unet"]).values(),
      strict=True,
    )
  ]
  assert sum(changed) > 20
  metrics = json.loads((folder / "metrics.json").read_text())
  assert set(metrics) == {"style"}
  assert {"with", "without", "wanted"} <= set(metrics["style"])


def test_control_images_are_those_of_stage_a(root):
  drawn = canvas_corpus.draw(8, seed=0, processes=1, cache=root / "cache")
  data = {"cache": str(root / "cache")}
  found = {
    kind: controlnet.control_images(drawn, kind, data)
    for kind in ("openpose", "canny")
  }
  for i in range(8):
    sample = canvases.draw(0, i)
    np.testing.assert_array_equal(found["openpose"][i], sample.skeleton)
    lines = canvas.line_map(sample.image) if sample.is_scene else sample.lines
    np.testing.assert_array_equal(found["canny"][i], lines)
  assert drawn.is_scene.any() and found["canny"][drawn.is_scene].any()


def test_latents_are_the_posterior_of_changed_pictures(root):
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 8, 3), np.uint8)
  flip = lambda i, image: image[::-1] if i == 1 else image
  options = {"cache": root / "latents", "transform": flip}
  got = latents.moments(images, root / "vae", label="a", **options)
  assert isinstance(got, np.memmap) and got.dtype == np.float16
  config, params = diffusers_folder.vae(root / "vae")
  images[1] = images[1, ::-1]
  want = vae.VAE(config).apply(
    {"params": params}, images.astype(np.float32) / 127.5 - 1, method="encode"
  )
  want = np.concatenate([np.asarray(x) for x in want], axis=-1)
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
  later = np.stack([images[0], *(images[1:] * 0)])
  again = latents.moments(later, root / "vae", label="a", **options)
  np.testing.assert_array_equal(again, got)  # Read, not encoded.
  other = latents.moments(images * 0, root / "vae", label="a", **options)
  assert np.abs(np.asarray(other) - got).max() > 0.01
  other = latents.moments(images * 0, root / "vae", label="b", **options)
  assert np.abs(np.asarray(other) - got).max() > 0.01


def test_each_change_moves_what_is_measured():
  samples = [canvases.draw(0, i) for i in range(16) if i % 8 != 7]
  images = np.stack([sample.image for sample in samples])
  words = [sample.words for sample in samples]
  of = lambda kind: np.stack(
    [lora.CHANGES[kind](x, w) for x, w in zip(images, words, strict=True)]
  )
  assert lora.sharpness(of("detail")) > 1.3 * lora.sharpness(images)
  assert lora.warmth(of("style")) > lora.warmth(images) + 10
  before, after = (lora.light_range(x, words) for x in (images, of("lighting")))
  assert before > 10 and after > 1.5 * before
  flat = np.full((2, 4, 4, 3), (130, 110, 100), np.uint8)
  assert lora.sharpness(flat) == 0 and lora.warmth(flat) == 30


@pytest.mark.parametrize(
  ("name", "key", "words"),
  [
    ("pretrain_controlnet_canny", {"kind": "depth"}, "data.kind 'depth'"),
    ("pretrain_lora", {"kinds": ("glow",)}, "data.kinds 'glow'"),
    ("pretrain_unet", {"vae": "nowhere"}, "nowhere"),
    ("pretrain_unet", {"vae": 3}, "data.vae=3: give a text"),
    ("pretrain_unet", {"num_canvases": {}}, r"data.num_canvases=\{\}: give a"),
    ("pretrain_lora", {"kinds": ()}, r"data.kinds=\(\): give one word or more"),
  ],
)
def test_bad_configuration_is_one_line(tmp_path, name, key, words):
  config = _config(name, tmp_path)
  config["data"] |= key
  with pytest.raises(errors.UserError, match=words):
    methods.train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
