"""Floating-point operations that one PTL step needs, counted from its sizes.

Matrix products only, a multiplication and an addition each. Counted is what
the mathematics asks for: prompts at their own length and their beginnings once,
of the last block only the rows that are read, and no keys and values where so
few rows ask that it takes less without. Whoever computes more does not earn
more for it.
"""

from typing import Any

from dppp_jax.methods import prompts

# Of dense bfloat16 products in FLOP/s, by what a device calls itself; the
# first that is found in the name counts. From NVIDIA's data sheets.
_PEAKS = {
  "H100 PCIe": 756e12,
  "H100": 989e12,
  "H200": 989e12,
  "A100": 312e12,
}


def bfloat16_peak(device: str) -> float | None:
  """Returns a device's dense bfloat16 peak in FLOP/s; None if not known."""
  found = (peak for name, peak in _PEAKS.items() if name in device)
  return next(found, None)


def ptl_step(setting: Any) -> dict[str, float]:
  """Returns the FLOPs of a step, by part.

  A trained layer costs its forward pass three times: once forward, once for
  the gradient of its input, once for that of its weights. The frozen text
  tower has no use for the last, the patch embedding none for the one before.

  Args:
    setting: `ptl.Setting`.
  """
  vision, text = setting.config.vision, setting.config.text
  options, out = setting.options, setting.config.projection_dim
  rows, columns = vision.grid(*setting.image_size)
  patches, width = rows * columns, vision.hidden_size
  tower = _tower(vision, patches + 1) + 2 * width * out
  pixels = vision.patch_size**2 * vision.num_channels
  embedding = 2 * patches * pixels * width
  tokens, kept = options.num_styles, options.num_selected
  hidden = options.style_mlp_ratio * width
  heads = options.style_heads
  length = tokens + patches
  style = (options.style_layers - 1) * _block(length, width, hidden, heads)
  style += _block(length, width, hidden, heads, rows=tokens)
  style += 2 * tokens * width * out
  words = kept * _mlp3(out, options.style_hidden, text.hidden_size)
  words += _mlp3(out, options.content_hidden, text.hidden_size)
  classifiers = 2 * (width + out) * setting.num_classes
  each = {
    "vision": 3 * tower + 2 * embedding,
    "inversion": 3 * (style + words),
    "heads": 3 * classifiers,
  }
  found = {name: float(setting.batch_size * x) for name, x in each.items()}
  return found | {"text": float(2 * _texts(setting))}


def _tower(config: Any, length: int) -> int:
  """Forward FLOPs of a tower of which one row is read."""
  sizes = (
    config.hidden_size,
    config.intermediate_size,
    config.num_attention_heads,
  )
  whole = _block(length, *sizes)
  return (config.num_hidden_layers - 1) * whole + _block(length, *sizes, rows=1)


def _texts(setting: Any) -> int:
  """Forward FLOPs of all prompts of a batch, packed (`models/packing.py`)."""
  config, batch = setting.config.text, setting.batch_size
  width, hidden = config.hidden_size, config.intermediate_size
  packing = prompts.Prompts(setting.templates).packing
  shared, own = len(packing.shared_positions), len(packing.own_positions)
  rows, ends = shared + batch * own, batch * len(packing.ends)
  pairs = batch * own * (shared + own) + shared**2
  whole = 2 * rows * (4 * width**2 + 2 * width * hidden) + 4 * pairs * width
  last = 2 * (2 * rows + 2 * ends) * width**2 + 4 * ends * width * hidden
  last += 4 * ends * (shared + own) * width
  projection = 2 * ends * width * setting.config.projection_dim
  return (config.num_hidden_layers - 1) * whole + last + projection


def _block(
  length: int, width: int, hidden: int, heads: int, rows: int | None = None
) -> int:
  """Forward FLOPs of a transformer block, of which some rows are wanted."""
  rows = length if rows is None else rows
  attention = min(
    4 * length * width**2 + 4 * rows * length * width,
    4 * rows * width**2 + 4 * rows * heads * length * width,
  )
  query_and_out = 4 * rows * width**2
  mlp = 4 * rows * width * hidden
  return attention + query_and_out + mlp


def _mlp3(given: int, hidden: int, out: int) -> int:
  return 2 * (given * hidden + hidden**2 + hidden * out)
