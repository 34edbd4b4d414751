"""The canvas benchmark: both sides draw the same, and FLOPs are counted."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest

_REPO = pathlib.Path(__file__).parents[1]
_MINI = _REPO / "dppp_jax/assets/mini"
sys.path.insert(0, str(_REPO / "benchmarks"))

import flax_generation
import generation
import generation_setting
import torch_generation
import traced_flops

from dppp_jax.models import unet_config, vae

# diffusers hands torch tensors to numpy in a way that numpy 2 discourages.
pytestmark = pytest.mark.filterwarnings(
  "ignore:__array__ implementation:DeprecationWarning"
)

_TEXT = dict(
  hidden_size=16,
  intermediate_size=16,
  num_hidden_layers=2,
  num_attention_heads=1,
  hidden_act="quick_gelu",
  projection_dim=16,
)
_TINY = {
  "unet": dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(1, 2),
    transformer_layers_per_block=1,
    cross_attention_dim=32,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=6 * 4 + 16,
  ),
  "vae": dict(
    block_out_channels=(4, 4),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=4,
    norm_num_groups=2,
  ),
  "hint": (4, 8),
  "texts": (_TEXT, _TEXT),
  "scheduler": dict(
    timestep_spacing="trailing", prediction_type="v_prediction"
  ),
}
_SETTING = generation_setting.Setting(
  "tiny", (16, 32), 3, False, cells=2, matting=(16, 16)
)


def test_both_sides_draw_the_same_picture(tmp_path):
  base, nets = torch_generation.write(str(tmp_path), _TINY)
  setting = dataclasses.replace(_SETTING, folder=base, controlnets=nets)
  ours = flax_generation.Side(setting)
  theirs = torch_generation.Side(setting)
  noise = ours.noise(2)
  a = ours.draw("", 2).astype(int)
  b = theirs.draw("eager", 2, noise).astype(int)
  assert a.shape == (2, 16, 32, 3)
  assert abs(a - b).max() <= 1
  assert a.std() > 5
  # The comparison sees it if the noise is another.
  other = theirs.draw("eager", 2, noise[::-1][:1] + noise[1:]).astype(int)
  assert abs(a - other).max() > 20
  seconds, cpu = ours.time("", 2)
  assert seconds > 0 and cpu > 0
  assert ours.memory()["host"] > 1e8
  parts = ours.flops()
  assert set(parts) == {"unet", "controlnet", "vae"}
  assert parts["unet"] > parts["controlnet"] > 0


def test_random_weights_need_no_folder():
  """What a GPU is measured with, in small."""
  setting = dataclasses.replace(_SETTING, networks=_TINY, controlnets=("",))
  pictures = flax_generation.Side(setting).draw("", 1)
  assert pictures.shape == (1, 16, 32, 3)
  drawn = torch_generation.Side(setting).draw("eager", 1)
  assert drawn.shape == (1, 16, 32, 3)


@pytest.mark.parametrize(
  ("size", "wanted"),
  [
    ((128, 128), {"unet": 6.761e12, "controlnet": 3.020e12, "vae": 10.470e12}),
  ],
)
def test_flops_of_sdxl(size, wanted):
  """What PyTorch's counter says, of the same networks on the meta device."""
  networks = generation_setting.settings(gpu=True)["canvas"].networks
  net = unet_config.Config.from_hf(networks["unet"])
  shared = {*networks["unet"]} - {"up_block_types", "sample_size"}
  control = unet_config.ControlNetConfig.from_hf(
    {name: networks["unet"][name] for name in shared}
  )
  decoder = vae.Config.from_hf(networks["vae"])
  found = traced_flops.diffusion(net, control, decoder, size=size, tokens=77)
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-3)
  whole = traced_flops.canvas(found, steps=30, controlnets=2)
  np.testing.assert_allclose(whole, 778e12, rtol=2e-3)


def test_mini_has_the_sizes_of_what_is_shipped():
  networks = generation_setting.mini_networks()
  shipped = lambda folder: json.loads(
    (_MINI / folder / "config.json").read_text()
  )
  for name, kind in (("vae", vae.Config), ("unet", unet_config.Config)):
    file = shipped(f"sdxl/{name}")
    # No sizes: the latents' scale is measured.
    values = {
      k: file[k] for k in ("scaling_factor", "force_upcast") if k in file
    }
    assert kind.from_hf(networks[name] | values) == kind.from_hf(file)
  hint = shipped("controlnet-openpose")["conditioning_embedding_out_channels"]
  assert networks["hint"] == tuple(hint)
  text = shipped("sdxl/text_encoder_2")
  assert networks["texts"][0].items() <= text.items()


def test_failures_become_notes(capsys):
  notes = generation._Notes()
  with notes.instead("this"):
    raise MemoryError("too big\nfor words")
  assert notes == ["this: MemoryError: too big"]
  assert "too big" in capsys.readouterr().out


def test_ratio_is_to_the_best_of_pytorch():
  row = lambda s, cpu: {"s_per_canvas": s, "cpu_s_per_canvas": cpu}
  found = generation._ratios(
    {
      1: {"ours": row(2.0, 4.0), "torch eager": row(5.0, 9.0)},
      4: {"ours": row(3.0, 3.5), "torch compiled": row(4.0, 7.0)},
    }
  )
  assert found["times_faster"] == 2.0
  assert found["times_faster_by_cpu_time"] == 2.0
  assert found["best_pytorch"] == "torch compiled, batch 4"
