"""What benchmarks/generation.py draws; both sides are built from it."""

import dataclasses
import pathlib
import runpy
from typing import Any

import numpy as np

_ROOT = pathlib.Path(__file__).resolve().parents[1]
MINI = _ROOT / "dppp_jax" / "assets" / "mini"
SEED = 0
PROMPT = "a woman in a red coat and blue trousers, front view"

# Stable Diffusion XL: what its config.json files say.
_SDXL: dict[str, Any] = {
  "unet": dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    layers_per_block=2,
    down_block_types=(
      "DownBlock2D",
      "CrossAttnDownBlock2D",
      "CrossAttnDownBlock2D",
    ),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
  ),
  "vae": dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=1024,
    scaling_factor=0.13025,
    force_upcast=False,
  ),
  "hint": (16, 32, 96, 256),
  "texts": (
    dict(
      hidden_size=768,
      intermediate_size=3072,
      num_hidden_layers=12,
      num_attention_heads=12,
      hidden_act="quick_gelu",
    ),
    dict(
      hidden_size=1280,
      intermediate_size=5120,
      num_hidden_layers=32,
      num_attention_heads=20,
      hidden_act="gelu",
      projection_dim=1280,
    ),
  ),
  "scheduler": dict(timestep_spacing="leading", steps_offset=1),
}
# Of both encoders of both systems; 2: the highest id of a prompt ends it.
TEXT = dict(vocab_size=49408, max_position_embeddings=77, eos_token_id=2)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@dataclasses.dataclass(frozen=True)
class Setting:
  """A canvas and the networks that draw it.

  Attributes:
    name: of the results.
    size: (H, W) of the canvas.
    steps: of the sampler.
    gpu: bfloat16 on a GPU, or float32 on the CPU.
    folder: a diffusers pipeline that both sides read; "": random weights of
      `networks`, each side its own.
    controlnets: folders of ControlNets; "" each where the weights are random.
    networks: sizes, as `_SDXL`.
    guidance: of the sampler.
    cells: number of cells that are matted.
    matting: (height, width) at which U2-Net looks at them.
    stack_from: see `models.unet`; ours only.
  """

  name: str
  size: tuple[int, int]
  steps: int
  gpu: bool
  folder: str = ""
  controlnets: tuple[str, ...] = ()
  networks: dict[str, Any] = dataclasses.field(default_factory=dict)
  guidance: float = 5.0
  cells: int = 42
  matting: tuple[int, int] = (320, 320)
  stack_from: int = 0

  def images(self, batch: int) -> list[np.ndarray]:
    """Returns a picture uint8 [B, H, W, 3] for each ControlNet."""
    rng = np.random.default_rng(SEED)
    # Coarse squares, as maps of lines and joints are no noise.
    coarse = (batch, self.size[0] // 8, self.size[1] // 8, 3)
    draw = lambda: rng.integers(0, 256, coarse, np.uint8)
    return [draw().repeat(8, 1).repeat(8, 2) for _ in self.controlnets]

  def prompts(self, batch: int) -> list[str]:
    """Returns B prompts."""
    return [PROMPT] * batch


def settings(*, gpu: bool) -> dict[str, Setting]:
  """Returns what --model chooses from; the first is the default."""
  mini = Setting("mini", (192, 144), 20, gpu, cells=6, matting=(96, 48))
  canvas = Setting(
    "canvas", (896, 1536), 30, gpu, controlnets=("", ""), networks=_SDXL
  )
  sdxl = Setting("sdxl", (1024, 1024), 30, gpu, networks=_SDXL)
  order = (canvas, sdxl, mini) if gpu else (mini,)
  return {setting.name: setting for setting in order}


def shipped() -> tuple[str, tuple[str, ...]] | None:
  """Returns base and ControlNets of assets/mini, or None without them."""
  places = [MINI / "sdxl", MINI / "controlnet-openpose"]
  places.append(MINI / "controlnet-canny")
  if not all((place / "config.json").is_file() for place in places[1:]):
    return None
  if not (places[0] / "model_index.json").is_file():
    return None
  return str(places[0]), tuple(str(place) for place in places[1:])


def mini_networks() -> dict[str, Any]:
  """Returns the sizes that the mini networks are trained with."""
  read = lambda name: runpy.run_path(str(_ROOT / "configs" / f"{name}.py"))
  config = lambda name: read(name)["get_config"]().to_dict()
  unet_config = config("pretrain_unet")
  unet = dict(unet_config["model"]["unet"])
  vae = dict(config("pretrain_vae")["model"])
  levels = len(vae["block_out_channels"])
  vae |= {
    "down_block_types": ("DownEncoderBlock2D",) * levels,
    "up_block_types": ("UpDecoderBlock2D",) * levels,
  }
  text = dict(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_act="quick_gelu",
    projection_dim=128,
  )
  unet |= dict(
    in_channels=vae["latent_channels"],
    out_channels=vae["latent_channels"],
    cross_attention_dim=2 * text["hidden_size"],
    use_linear_projection=True,
    addition_embed_type="text_time",
    projection_class_embeddings_input_dim=6 * unet["addition_time_embed_dim"]
    + text["projection_dim"],
  )
  hint = unet_config["model"]["control"]["conditioning_embedding_out_channels"]
  scheduler = dict(unet_config["scheduler"])
  scheduler.pop("_class_name")
  return {
    "unet": unet,
    "vae": vae,
    "hint": tuple(hint),
    "texts": (text, text),
    "scheduler": scheduler,
  }


def mini_u2net() -> dict[str, Any]:
  """Returns the widths of the mini U2-Net."""
  path = _ROOT / "configs" / "pretrain_u2netp.py"
  return runpy.run_path(str(path))["get_config"]().model.to_dict()
