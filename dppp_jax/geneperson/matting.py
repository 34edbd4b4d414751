"""Mattes of cells by U2-Net, in batches on the device."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, trees, types
from dppp_jax.models import resizing, u2net
from dppp_jax.weights import u2net as u2net_weights

# Of ImageNet, which U2-Net was trained with.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)

# (variables, images [B, h, w, 3]) -> logits [B, h, w].
Network = Callable[[Any, types.Array], jax.Array]


class Mattes(NamedTuple):
  """What is the person in each cell.

  Attributes:
    alpha: uint8 [N, H, W]; all zero where the cell is empty.
    peak: float32 [N], the highest probability before normalisation.
  """

  alpha: np.ndarray
  peak: np.ndarray


@dataclasses.dataclass(frozen=True)
class Matting:
  """A network and how it is fed.

  Attributes:
    network: what gives logits.
    variables: of the network.
    size: (height, width) at which the network looks at a cell.
    batch_size: cells at once; the last batch is filled up, so that any number
      of cells runs in one compiled program.
    min_peak: a cell whose highest probability stays below is empty. Without
      this, normalisation would blow noise up to a person.
  """

  network: Network
  variables: Any
  size: tuple[int, int] = (320, 320)
  batch_size: int = 42
  min_peak: float = 0.5

  def __call__(self, cells: np.ndarray) -> Mattes:
    """Returns the mattes of uint8 cells [N, H, W, 3] of any one size."""
    cells = np.asarray(cells)
    if cells.dtype != np.uint8 or cells.ndim != 4 or cells.shape[-1] != 3:
      raise errors.UserError(
        f"cells are uint8 [N, H, W, 3], not {cells.dtype} {cells.shape}"
      )
    count = len(cells)
    parts = []
    for start in range(0, count, self.batch_size):
      batch = cells[start : start + self.batch_size]
      missing = self.batch_size - len(batch)
      batch = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
      # Dispatch all before waiting for any.
      parts.append(
        _mattes(self.network, self.variables, batch, self.size, self.min_peak)
      )
    if not parts:
      return Mattes(
        np.zeros(cells.shape[:3], np.uint8), np.zeros(0, np.float32)
      )
    join = lambda i: np.concatenate([np.asarray(p[i]) for p in parts])[:count]
    return Mattes(join(0), join(1))

  def dispatch(self, cells: types.Array) -> Mattes:
    """Returns the mattes of the cells of many canvases, still being computed.

    Canvas by canvas in one program, so that it needs the memory of one.

    Args:
      cells: uint8 [B, N, H, W, 3], on the device or not.

    Returns:
      alpha [B, N, H, W] and peak [B, N], on the device.
    """
    return Mattes(
      *_canvases(
        self.network,
        tuple(self.size),
        self.variables,
        cells,
        jnp.float32(self.min_peak),
      )
    )


def load(
  spec: str | pathlib.Path,
  *,
  dtype: jax.typing.DTypeLike = jnp.float32,
  **options: Any,
) -> Matting:
  """Loads a U2-Net file or folder.

  Args:
    spec: see weights.u2net.load.
    dtype: of the convolutions.
    **options: of `Matting`: size, batch_size, min_peak.
  """
  config, variables = u2net_weights.load(spec)
  net = u2net.U2Net(config, dtype)
  network = lambda variables, images: net.apply(variables, images).fused
  return Matting(network, trees.to_float32(variables), **options)


def normalize(cells: types.Array) -> jax.Array:
  """Returns what U2-Net is fed: each cell over its own maximum, then ImageNet.

  Args:
    cells: float32 [B, h, w, 3] in 0..255.
  """
  top = cells.max(axis=(1, 2, 3), keepdims=True)
  scaled = cells / jnp.maximum(top, 1e-6)
  return (scaled - _MEAN[None, None, None]) / _STD[None, None, None]


def _mattes(network, variables, cells, size, min_peak):
  return _program(network, tuple(size), variables, cells, jnp.float32(min_peak))


def _run(
  network: Network,
  size: tuple[int, int],
  variables: Any,
  cells: jax.Array,
  min_peak: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns alpha uint8 [B, H, W] and peak [B]."""
  images = _resize(cells.astype(jnp.float32), size)
  # rembg and the U2-Net authors resize bytes.
  images = jnp.round(jnp.clip(images, 0, 255))
  logits = network(variables, normalize(images)).astype(jnp.float32)
  found = jax.nn.sigmoid(logits)
  low = found.min(axis=(1, 2), keepdims=True)
  peak = found.max(axis=(1, 2), keepdims=True)
  # Per cell: over the whole batch a faint person would come out thin.
  alpha = (found - low) / jnp.maximum(peak - low, 1e-6)
  alpha = jnp.where(peak >= min_peak, alpha, 0)
  alpha = _resize(alpha[..., None], cells.shape[1:3])[..., 0]
  alpha = jnp.round(jnp.clip(alpha, 0, 1) * 255).astype(jnp.uint8)
  return alpha, peak[:, 0, 0]


_program = jax.jit(_run, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _canvases(network, size, variables, cells, min_peak):
  return jax.lax.map(
    lambda some: _run(network, size, variables, some, min_peak), cells
  )


def _resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes [B, h, w, C] with Lanczos' window of three, as rembg does."""
  return resizing.resize(x, size, "lanczos3", antialias=True)
