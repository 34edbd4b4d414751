"""What the tests of the diffusion networks share: a twin in torch for each.

Weights are random, and so are norms, biases and "zero" convolutions: at their
defaults of 1 and 0 half of all mistakes would not show.
"""

import contextlib
import math
from unittest import mock

import diffusers
from diffusers.models import embeddings as torch_embeddings
import jax
import jax.numpy as jnp
import numpy as np
import torch

from dppp_jax import trees
from dppp_jax.weights import convert

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # Networks this small only wait for each other.

# SDXL with small numbers: three levels, of which the finest has no text.
XL = dict(
  block_out_channels=(32, 64, 128),
  layers_per_block=1,
  norm_num_groups=8,
  down_block_types=(
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
  ),
  up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
  cross_attention_dim=64,
  transformer_layers_per_block=(1, 1, 2),
  attention_head_dim=(1, 2, 4),
  use_linear_projection=True,
  addition_embed_type="text_time",
  addition_time_embed_dim=8,
  projection_class_embeddings_input_dim=6 * 8 + 32,
)
# SDXL itself.
SDXL = XL | dict(
  block_out_channels=(320, 640, 1280),
  layers_per_block=2,
  norm_num_groups=32,
  cross_attention_dim=2048,
  transformer_layers_per_block=(1, 2, 10),
  attention_head_dim=(5, 10, 20),
  addition_time_embed_dim=256,
  projection_class_embeddings_input_dim=2816,
)


def randomise(module, seed=0):
  """Gives every parameter of a torch module a value that matters."""
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for p in module.parameters():
      if p.ndim < 2:
        value = rng.uniform(-0.5, 0.5, p.shape)
      else:
        value = rng.normal(size=p.shape) / math.sqrt(np.prod(p.shape[1:]))
      p.copy_(torch.from_numpy(value))
    for m in module.modules():
      if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
        m.weight += 1
  return module.eval()


def tensors(module):
  return {k: v.detach().numpy() for k, v in module.state_dict().items()}


def params(module, rules, shapes):
  """The module's weights by the tables, complete and strict."""
  flat = convert.convert(tensors(module), rules, where="twin")
  return trees.merge(shapes, flat, where="twin")


def shapes(module, rules):
  """The shapes of a torch module's weights by the tables, with no weights.

  Small stand-ins go through the tables: an axis of length 3 stands for the
  first one, 5 for the second and so on, and 1 for a third of the first.
  """
  true = {k: tuple(v.shape) for k, v in module.state_dict().items()}
  codes = (3, 5, 7, 11)
  small = {k: np.zeros(codes[: len(v)], np.float32) for k, v in true.items()}
  found = {}
  for name in true:
    lengths = dict(zip(codes, true[name], strict=False))
    lengths[1] = true[name][0] // 3
    flat = convert.convert({name: small[name]}, rules, where="twin")
    for path, value in flat.items():
      assert path not in found
      found[path] = tuple(lengths[n] for n in value.shape)
  return found


def flat_shapes(tree):
  return {name: leaf.shape for name, leaf in trees.flatten(tree).items()}


def run(function, *args, **kwargs):
  """Compiles quickly rather than well, and runs."""
  options = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  }
  compiled = jax.jit(function).lower(*args, **kwargs).compile(options)
  return compiled(*args, **kwargs)


def inputs(config, seed=1, batch=2, size=(25, 17), tokens=7):
  """Latents of uneven, odd sizes, times that are not whole, text, sizes."""
  rng = np.random.default_rng(seed)
  text_dim = getattr(config, "encoder_hid_dim", None) or config.text_dim
  args = [
    rng.normal(size=(batch, *size, config.in_channels)),
    np.array([500.45, 3.0][:batch]),
    rng.normal(size=(batch, tokens, text_dim)),
  ]
  conditions = {}
  if config.addition_embed_type:
    ids = [[1250.0, 900, 3, 5, 128, 256], [64, 32, 0, 0, 1024, 1024]]
    conditions["pooled"] = rng.normal(size=(batch, 32))
    conditions["time_ids"] = np.array(ids[:batch])
  return args, conditions


def torch_inputs(args, conditions):
  """The same for the twin's forward: positional and keyword arguments."""
  sample, *others = args
  args = [nchw(sample), *(torch.from_numpy(x) for x in others)]
  if not conditions:
    return args, {}
  names = {"pooled": "text_embeds", "time_ids": "time_ids"}
  added = {names[k]: torch.from_numpy(v) for k, v in conditions.items()}
  return args, {"added_cond_kwargs": added}


@contextlib.contextmanager
def float64():
  """Both libraries in float64, torch's float32 sinusoids included."""

  def sinusoid(
    timesteps, embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, **_
  ):
    half = embedding_dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float64)
    angles = timesteps.double()[:, None] * torch.exp(
      exponent / (half - downscale_freq_shift)
    )
    parts = [torch.sin(angles), torch.cos(angles)]
    return torch.cat(parts[::-1] if flip_sin_to_cos else parts, dim=-1)

  with (
    contextlib.ExitStack() as stack,
    jax.enable_x64(True),
    mock.patch.object(torch_embeddings, "get_timestep_embedding", sinusoid),
    torch.no_grad(),
  ):
    # The dtype of some of diffusers' constants.
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float64)
    yield


def wide(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def nchw(x):
  """A contiguous torch tensor: torch's norm is inexact on channels_last."""
  x = np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))
  return torch.from_numpy(x)


def nhwc(x):
  return np.moveaxis(x.numpy(), 1, -1)


def distance(ours, theirs):
  """Relative L2 distance; shapes must agree."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  assert np.linalg.norm(theirs) > 0
  return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
