"""One PTL step of this project, and what both sides of it start from."""

from collections.abc import Sequence
import dataclasses
import functools
import time
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import process, trees
from dppp_jax.methods import dppp, prompts
from dppp_jax.models import clip
from dppp_jax.train import optim
from dppp_jax.train import stage as stage_lib
from dppp_jax.train import step as step_lib
from dppp_jax.weights import export, load

_SEED = 0
_CHECKED_STEPS = 3  # The third sees two updates of Adam.
# Of tests: both towers, and nothing that takes time.
TINY = clip.Config(
  vision=clip.VisionConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
  ),
  text=clip.TextConfig(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=20,
    bos_token_id=58,
    eos_token_id=59,
  ),
  projection_dim=16,
)


class _Words:
  """A tokenizer with one id for a word, as CLIP's has for these prompts."""

  def __init__(self, config: clip.TextConfig):
    self._size = config.vocab_size - 2
    self.bos_token_id, self.eos_token_id = self._size, self._size + 1
    self.all_special_ids = (self.bos_token_id, self.eos_token_id)

  def __call__(self, word: str, add_special_tokens: bool) -> dict[str, list]:
    return {"input_ids": [sum(word.encode()) % self._size]}


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is measured; both sides are built from it.

  Attributes:
    config: sizes of the CLIP.
    image_size: (H, W).
    P: identities in a batch.
    K: pictures of each.
    num_classes: identities in the data set.
    options: of DPPP; the losses of the PyTorch side know the paper's only.
    gpu: bfloat16 on a GPU, or float32 on the CPU.
  """

  config: clip.Config
  image_size: tuple[int, int]
  P: int
  K: int
  num_classes: int
  options: dppp.Options
  gpu: bool

  @property
  def batch_size(self) -> int:
    """Returns B."""
    return self.P * self.K

  @functools.cached_property
  def tokenizer(self) -> _Words:
    """Returns what stands for the tokenizer."""
    return _Words(self.config.text)

  @property
  def templates(self) -> tuple[prompts.Template, ...]:
    """Returns the prompt of styles and content, and that of content."""
    k = self.options.num_selected
    return (
      prompts.style_content(self.tokenizer, k=k),
      prompts.content(self.tokenizer),
    )

  def batch(self) -> dict[str, np.ndarray]:
    """Returns a batch of noise; identities are a shift of its brightness."""
    rng = np.random.default_rng(_SEED)
    label = np.repeat(np.arange(self.P), self.K).astype(np.int32)
    shape = (self.batch_size, *self.image_size, 3)
    image = rng.integers(0, 156, shape) + 99 * label[:, None, None, None] // (
      self.P
    )
    return {"image": image.astype(np.uint8), "label": label}


def settings(*, gpu: bool) -> dict[str, Setting]:
  """Returns what --model chooses from."""
  mini = clip.Config(
    vision=clip.VisionConfig(
      hidden_size=128,
      intermediate_size=512,
      num_hidden_layers=6,
      num_attention_heads=4,
      image_size=96,
      patch_size=12,
    ),
    text=clip.TextConfig(
      vocab_size=512,
      hidden_size=128,
      intermediate_size=512,
      num_hidden_layers=3,
      num_attention_heads=4,
      max_position_embeddings=77,
      bos_token_id=510,
      eos_token_id=511,
    ),
    projection_dim=128,
  )
  side = 8 if gpu else 2
  small = dict(style_hidden=16, content_hidden=16, projector_hidden=16)
  return {
    "vit-b-16": Setting(
      clip.VARIANTS["ViT-B/16"],
      (256, 128),
      side,
      side,
      6641,
      dppp.Options(),
      gpu,
    ),
    "mini": Setting(
      mini,
      (96, 48),
      8,
      8,
      200,
      dppp.Options(content_hidden=128, style_hidden=512),
      gpu,
    ),
    "tiny": Setting(
      TINY,
      (32, 16),
      2,
      2,
      5,
      dppp.Options(num_styles=4, num_selected=2, **small),
      gpu,
    ),
  }


class Side:
  """This project's training step: `train/step.py`, compiled ahead, donated."""

  def __init__(self, folder: str, setting: Setting):
    """Draws all weights, and leaves the CLIP's in `folder`."""
    process.tune_memory()  # As launchers do.
    process.fuse_outputs()  # As launch/train.py does.
    rng = np.random.default_rng(_SEED)
    # Norms and biases too differ from the ones and zeros that hide mistakes.
    flat = {
      name: 0.02 * rng.standard_normal(x.shape, np.float32)
      + name.endswith("scale")
      for name, x in trees.flatten(clip.param_shapes(setting.config)).items()
    }
    # Both sides read what the real converter wrote.
    export.clip(folder, setting.config, trees.unflatten(flat))
    del flat
    _, params = load.clip(folder)
    self._setting, self._batch = setting, setting.batch()
    self._stages = {x: self._stage(params, bfloat16=x) for x in (False, True)}
    stage = self._stages[False]
    params, collections = stage.init({}, {}, jax.random.key(_SEED))
    trainable, frozen, self._rates = optim.split(params, stage.rules)
    self._new = {
      name: np.asarray(x)
      for name, x in trainable.items()
      if not name.startswith("clip/")
    }
    opt = step_lib.make_tx(stage, self._rates).init(trainable)
    self._state = jax.device_put((trainable, collections, opt))
    self._frozen = jax.device_put(frozen)
    self._dataset = {"label": jax.device_put(self._batch["label"])}
    self._feed = jax.device_put(
      {
        "image": self._batch["image"],
        "index": np.arange(setting.batch_size, dtype=np.int32),
      }
    )
    self._count = 0
    self._programs: dict[bool, tuple[Any, list[str]]] = {}
    self._compile_seconds: dict[bool, float] = {}

  def new_modules(self) -> dict[str, np.ndarray]:
    """Returns {name: the first value} of what is not the CLIP's."""
    return self._new

  def _stage(self, params: Any, *, bfloat16: bool) -> stage_lib.Stage:
    setting = self._setting
    return dppp.stages(
      setting.config,
      params,
      setting.tokenizer,
      num_classes=setting.num_classes,
      batches=stage_lib.PK(setting.P, setting.K),
      augment=None,
      options=setting.options,
      dtype=jnp.bfloat16 if bfloat16 else jnp.float32,
    )[0]

  def _program(self, *, bfloat16: bool) -> tuple[Any, list[str]]:
    """Returns the compiled step and the names of its metrics."""
    if bfloat16 not in self._programs:
      begin = time.perf_counter()
      fn, names = self._step_fn(bfloat16=bfloat16)
      # On a GPU a float32 product is TF32 unless one asks for more.
      with jax.default_matmul_precision(None if bfloat16 else "highest"):
        compiled = step_lib.compile_ahead(fn, *self._arguments())
      self._programs[bfloat16] = compiled, names
      self._compile_seconds[bfloat16] = time.perf_counter() - begin
    return self._programs[bfloat16]

  def _step_fn(self, *, bfloat16: bool) -> tuple[Any, list[str]]:
    half = (0.5, 0.5, 0.5)
    return step_lib.make_step(
      self._stages[bfloat16], self._rates, seed=_SEED, mean=half, std=half
    )

  def trace(self) -> Any:
    """Returns the closed jaxpr of a float32 step."""
    fn, _ = self._step_fn(bfloat16=False)
    return jax.make_jaxpr(fn)(*self._arguments())

  def _arguments(self) -> tuple[Any, ...]:
    count, factor = np.int32(self._count), np.float32(1)
    return (
      self._state,
      self._frozen,
      self._dataset,
      self._feed,
      count,
      factor,
    )

  def step(self, variant: str, *, bfloat16: bool | None = None) -> jax.Array:
    """Runs one step; returns its metrics, on the device."""
    del variant
    use = self._setting.gpu if bfloat16 is None else bfloat16
    compiled, _ = self._program(bfloat16=use)
    self._state, values = compiled(*self._arguments())
    self._count += 1
    return values

  def check(
    self, variant: str, steps: int, bfloat16: bool = False
  ) -> list[tuple[float, float]]:
    """Returns (loss, gradient norm) of the next steps, mostly in float32."""
    found = []
    for _ in range(steps):
      values = np.asarray(self.step(variant, bfloat16=bfloat16))
      names = self._program(bfloat16=bfloat16)[1]
      row = dict(zip(names, values.tolist(), strict=True))
      found.append((row["loss"], row["grad_norm"]))
    return found

  def prepare(self, variant: str) -> float:
    """Runs a step; returns its seconds and those of its compilation.

    The comparison of both sides may have compiled the step already.
    """
    self._program(bfloat16=self._setting.gpu)
    seconds = self._compile_seconds[self._setting.gpu]
    return seconds + self.time(variant, 1)[0]

  def time(self, variant: str, steps: int) -> tuple[float, float]:
    """Returns seconds and seconds of CPU time per step."""
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
      values = self.step(variant)
    jax.block_until_ready((values, self._state))
    seconds = time.perf_counter() - begin
    return seconds / steps, (time.process_time() - cpu) / steps

  def matmul_flops(self, size: int = 2048, repeats: int = 5) -> float:
    """Returns FLOP/s of a square float32 product, the best of some."""
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    timed = common.measure(lambda: product(a, a), repeats=repeats)
    return 2 * size**3 / timed["min"]

  def device_memory(self) -> int | None:
    """Returns the most bytes that a GPU held so far."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def compare(
  ours: Any, theirs: Any, variants: Sequence[str]
) -> list[dict[str, Any]]:
  """Runs both sides for a few steps and compares what they compute.

  Args:
    ours: a `Side`, or a `remote.Remote` of one.
    theirs: a `torch_ptl.Side`, likewise.
    variants: of theirs; each goes on where the one before ended.

  Returns:
    A row for each step: {"variant", "loss", "grad_norm": (ours, theirs),
    "difference": the larger relative one}.
  """
  rows = []
  for variant in variants:
    pairs = zip(
      ours.check("ours", _CHECKED_STEPS),
      theirs.check(variant, _CHECKED_STEPS),
      strict=True,
    )
    for (loss, norm), (their_loss, their_norm) in pairs:
      difference = max(abs(loss / their_loss - 1), abs(norm / their_norm - 1))
      rows.append(
        {
          "variant": variant,
          "loss": (loss, their_loss),
          "grad_norm": (norm, their_norm),
          "difference": difference,
        }
      )
  return rows
