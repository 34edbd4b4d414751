"""PyTorch diffusers drawing the canvases of benchmarks/generation.py.

With what makes it fast: bfloat16 and fused attention on a GPU, channels-last
convolutions, and torch.compile of all networks as a variant.
"""

import contextlib
import pathlib
import shutil
import time
from typing import Any
from unittest import mock
import warnings

import diffusers
from diffusers.schedulers import scheduling_euler_ancestral_discrete
import generation_setting
import numpy as np
import remote
import torch
import transformers

warnings.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()


class Writer:
  """`write`, for a process of its own."""

  def write(self, *args: Any) -> tuple[str, tuple[str, ...]]:
    """See `write`."""
    return write(*args)


def write(folder: str, networks: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
  """Writes random networks as diffusers does.

  Args:
    folder: where to.
    networks: as `Setting.networks`.

  Returns:
    Folders of the pipeline and of two ControlNets.
  """
  torch.manual_seed(generation_setting.SEED)
  place = pathlib.Path(folder)
  pipeline = _pipeline(networks, (), "cpu", torch.float32)
  _wake(pipeline)
  pipeline.save_pretrained(place / "sdxl")
  found = []
  for name in ("controlnet-openpose", "controlnet-canny"):
    net = _controlnet(pipeline.unet, networks)
    _wake(net)
    net.save_pretrained(place / name)
    found.append(str(place / name))
  return str(place / "sdxl"), tuple(found)


def _wake(module: Any) -> None:
  """Gives zero convolutions weights, without which they would do nothing."""
  parts = getattr(module, "components", {"": module}).values()
  for part in parts:
    for p in part.parameters() if isinstance(part, torch.nn.Module) else ():
      if p.ndim > 1 and not p.any():
        torch.nn.init.normal_(p, std=0.02)


def _controlnet(unet: Any, networks: dict[str, Any]) -> Any:
  return diffusers.ControlNetModel.from_unet(
    unet, conditioning_embedding_out_channels=networks["hint"]
  )


def _pipeline(
  networks: dict[str, Any], controlnets: Any, device: str, dtype: torch.dtype
) -> Any:
  """Builds a pipeline with torch's own initial weights, on the device."""
  towers = (
    transformers.CLIPTextModel,
    transformers.CLIPTextModelWithProjection,
  )
  tokenizer = transformers.CLIPTokenizer.from_pretrained(
    generation_setting.MINI / "clip", model_max_length=77
  )
  texts = [
    dict(text, **generation_setting.TEXT)
    | (
      {"bos_token_id": tokenizer.bos_token_id}
      | {"pad_token_id": tokenizer.pad_token_id}
    )
    for text in networks["texts"]
  ]
  before = torch.get_default_dtype()
  torch.set_default_dtype(dtype)
  try:
    with torch.device(device):
      unet = diffusers.UNet2DConditionModel(**networks["unet"])
      vae = diffusers.AutoencoderKL(**networks["vae"])
      first, second = (
        tower(transformers.CLIPTextConfig(**text))
        for tower, text in zip(towers, texts, strict=True)
      )
      nets = [_controlnet(unet, networks) for _ in controlnets]
  finally:
    torch.set_default_dtype(before)
  parts = dict(
    vae=vae,
    text_encoder=first,
    text_encoder_2=second,
    tokenizer=tokenizer,
    tokenizer_2=tokenizer,
    unet=unet,
    scheduler=diffusers.EulerAncestralDiscreteScheduler(
      **(generation_setting.BETAS | networks["scheduler"])
    ),
    add_watermarker=False,
  )
  if nets:
    cls = diffusers.StableDiffusionXLControlNetPipeline
    return cls(**parts, controlnet=nets)
  return diffusers.StableDiffusionXLPipeline(**parts)


def _nchw(x: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


class Side:
  """diffusers' pipeline, plain and compiled."""

  def __init__(self, setting: generation_setting.Setting, mode: str = ""):
    """Loads or draws the weights.

    Args:
      setting: what is drawn.
      mode: of torch.compile; "" for its default.
    """
    self._setting = setting
    self.device = "cuda" if setting.gpu else "cpu"
    dtype = torch.bfloat16 if setting.gpu else torch.float32
    torch.manual_seed(generation_setting.SEED)
    torch.backends.cudnn.benchmark = True
    if setting.folder:
      nets = [
        diffusers.ControlNetModel.from_pretrained(path, dtype=dtype)
        for path in setting.controlnets
      ]
      cls, more = diffusers.StableDiffusionXLPipeline, {}
      if nets:
        cls = diffusers.StableDiffusionXLControlNetPipeline
        more = {"controlnet": nets}
      self._pipeline = cls.from_pretrained(
        setting.folder, dtype=dtype, add_watermarker=False, **more
      ).to(self.device)
    else:
      self._pipeline = _pipeline(
        setting.networks, setting.controlnets, self.device, dtype
      )
    self._pipeline.set_progress_bar_config(disable=True)
    nets = self._networks()
    for net in nets:
      net.to(memory_format=torch.channels_last).eval()
    self._mode = mode or None
    self._compiled = False

  def _networks(self) -> list[torch.nn.Module]:
    control = getattr(self._pipeline, "controlnet", None)
    nets = getattr(control, "nets", [control] if control is not None else [])
    return [self._pipeline.unet, self._pipeline.vae.decoder, *nets]

  def draw(
    self, variant: str, batch: int, noise: list[np.ndarray] | None = None
  ) -> np.ndarray:
    """Draws uint8 [B, H, W, 3].

    Args:
      variant: "eager" or "compiled".
      batch: number of canvases.
      noise: [B, h, w, C], of the first latents and of each step; None: drawn.
    """
    setting = self._setting
    if variant == "compiled" and not self._compiled:
      if self.device == "cpu" and shutil.which("g++") is None:
        raise RuntimeError("torch.compile needs g++ on a CPU")
      for net in self._networks():
        net.compile(mode=self._mode, dynamic=False)
      self._compiled = True
    images = [_nchw(x.astype(np.float32) / 255) for x in setting.images(batch)]
    options: dict[str, Any] = {}
    if images:
      options["image"] = images
    stance = "default" if variant == "compiled" else "force_eager"
    with contextlib.ExitStack() as stack:
      stack.enter_context(torch.no_grad())
      stack.enter_context(torch.compiler.set_stance(stance))
      if noise is not None:
        every = iter([_nchw(x) for x in noise])
        options["latents"] = next(every)
        stack.enter_context(
          mock.patch.object(
            scheduling_euler_ancestral_discrete,
            "randn_tensor",
            lambda *a, **k: next(every),
          )
        )
      pictures = self._pipeline(
        prompt=setting.prompts(batch),
        height=setting.size[0],
        width=setting.size[1],
        num_inference_steps=setting.steps,
        guidance_scale=setting.guidance,
        output_type="np",
        **options,
      ).images
    return (np.asarray(pictures) * 255).round().astype(np.uint8)

  def time(self, variant: str, batch: int) -> tuple[float, float]:
    """Returns seconds and seconds of processor time of one draw."""
    begin, cpu = time.perf_counter(), time.process_time()
    pictures = self.draw(variant, batch)
    if pictures.shape != (batch, *self._setting.size, 3):
      raise RuntimeError(f"drew {pictures.shape}")
    return time.perf_counter() - begin, time.process_time() - cpu

  def matmul_flops(self, size: int = 2048, repeats: int = 5) -> float:
    """Returns FLOP/s of a square float32 product, the best of some."""
    a = torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
      begin = time.perf_counter()
      a @ a
      seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)

  def memory(self) -> dict[str, float]:
    """Returns the most bytes, of the process (see `remote`) and on the GPU."""
    found = {"host": remote.resident("VmHWM")}
    if self.device == "cuda":
      found["device"] = torch.cuda.max_memory_allocated()
    return found
