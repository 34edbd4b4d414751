"""Floating-point operations that one PTL step needs, counted from its sizes.

Matrix products only, a multiplication and an addition each. Counted is what
the mathematics asks for: prompts at their own length, and of the last block
only the rows that are read. Whoever computes more does not earn more for it.
"""

from typing import Any

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
  style = (options.style_layers - 1) * _block(tokens + patches, width, hidden)
  style += _block(tokens + patches, width, hidden, rows=tokens)
  style += 2 * tokens * width * out
  words = kept * _mlp3(out, options.style_hidden, text.hidden_size)
  words += _mlp3(out, options.content_hidden, text.hidden_size)
  heads = 2 * (width + out) * setting.num_classes
  reading = sum(
    _tower(text, len(template.ids)) + 2 * text.hidden_size * out
    for template in setting.templates
  )
  each = {
    "vision": 3 * tower + 2 * embedding,
    "inversion": 3 * (style + words),
    "heads": 3 * heads,
    "text": 2 * reading,
  }
  return {name: float(setting.batch_size * x) for name, x in each.items()}


def _tower(config: Any, length: int) -> int:
  """Forward FLOPs of a tower of which one row is read."""
  width, hidden = config.hidden_size, config.intermediate_size
  whole = _block(length, width, hidden)
  return (config.num_hidden_layers - 1) * whole + _block(
    length, width, hidden, rows=1
  )


def _block(
  length: int, width: int, hidden: int, rows: int | None = None
) -> int:
  """Forward FLOPs of a transformer block, of which some rows are wanted."""
  rows = length if rows is None else rows
  keys_and_values = 2 * 2 * length * width**2
  query_and_out = 2 * 2 * rows * width**2
  attention = 2 * 2 * rows * length * width
  mlp = 2 * 2 * rows * width * hidden
  return keys_and_values + query_and_out + attention + mlp


def _mlp3(given: int, hidden: int, out: int) -> int:
  return 2 * (given * hidden + hidden**2 + hidden * out)
