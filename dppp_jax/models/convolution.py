"""Convolutions that are fast on a CPU as well.

`Conv` is `nn.Conv` with the same parameters and the same numbers. What it adds
is chosen when a program is traced for a CPU; on any other device XLA's own
convolution and its gradients are used.

On a CPU three things are better done otherwise. XLA's gradients of convolutions
fall back to plain loops wherever the program around them is itself a loop, a
thousand times slower: here the gradient of the input is another convolution,
and that of the kernel is matrix products. Wide 3x3 kernels need not multiply as
often as they are written (`winograd.py`). And operands in bfloat16 are widened,
while products of matrices in bfloat16 run several times as fast as float32 on
CPUs that have such instructions: there a wide convolution is a sum of shifted
products.
"""

from collections.abc import Iterator, Sequence
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dppp_jax import devices, types
from dppp_jax.models import winograd

_NUMBERS = ("NHWC", "HWIO", "NHWC")
# From so many channels on shifted products in bfloat16 beat XLA's convolution.
_WIDE = 48
# Up to so many, columns are joined to make the products deeper.
_JOINED = 96
# From so many channels on, Winograd's products outweigh what it adds to them,
# and up to so many numbers in a picture: it copies each four times.
_MANY, _LARGE = 32, 2**25


class Window(NamedTuple):
  """How a kernel moves over a picture, rows first.

  Attributes:
    strides: of the kernel.
    padding: ((top, bottom), (left, right)), zeros.
    dilation: distance of the kernel's taps.
  """

  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  dilation: tuple[int, int]

  def size(self, shape: Sequence[int], taps: Sequence[int]) -> tuple[int, ...]:
    """Returns the output's (H', W') for a padded picture of (H, W)."""
    return tuple(
      (have - (count - 1) * dilation - 1) // stride + 1
      for have, count, dilation, stride in zip(
        shape, taps, self.dilation, self.strides, strict=True
      )
    )


def general(
  lhs: types.Array,
  rhs: types.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  feature_group_count: int = 1,
  **options: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated` as nn.Conv calls it.

  Args:
    lhs: [B, H, W, C].
    rhs: kernel [h, w, C, F].
    window_strides: see there.
    padding: see there.
    lhs_dilation: see there.
    rhs_dilation: see there.
    feature_group_count: see there.
    **options: see there.

  Returns:
    [B, H', W', F].
  """
  is_plain = (
    lhs.ndim == 4
    and feature_group_count == 1
    and all(step == 1 for step in lhs_dilation or ())
  )
  if devices.platform() != "cpu" or not is_plain:
    return jax.lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      lhs_dilation=lhs_dilation,
      rhs_dilation=rhs_dilation,
      feature_group_count=feature_group_count,
      **options,
    )
  dilation = tuple(rhs_dilation or (1, 1))
  if isinstance(padding, str):
    reach = [
      (n - 1) * step + 1
      for n, step in zip(rhs.shape[:2], dilation, strict=True)
    ]
    padding = jax.lax.padtype_to_pads(
      lhs.shape[1:3], reach, window_strides, padding
    )
  padding = tuple(tuple(pair) for pair in padding)
  return convolve(lhs, rhs, Window(tuple(window_strides), padding, dilation))


Conv = functools.partial(nn.Conv, conv_general_dilated=general)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: types.Array, kernel: types.Array, window: Window) -> jax.Array:
  """Convolves on a CPU.

  Args:
    x: [B, H, W, C].
    kernel: [h, w, C, F] in the dtype of x.
    window: how it moves.

  Returns:
    [B, H', W', F] in the dtype of x; sums are float32 at least.
  """
  is_point = kernel.shape[:2] == (1, 1)
  is_wide = x.dtype == jnp.bfloat16 and min(kernel.shape[2:]) >= _WIDE
  if is_point or is_wide:
    return by_products(x, kernel, window)
  if _is_for_winograd(x, kernel.shape, window):
    return winograd.convolve(x, kernel, window.padding)
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window.strides,
    window.padding,
    rhs_dilation=window.dilation,
    dimension_numbers=_NUMBERS,
  )


def _forward(x, kernel, window):
  return convolve(x, kernel, window), (x, kernel)


def _backward(window, saved, dy):
  x, kernel = saved
  dx = input_gradient(dy, kernel, window, x.shape)
  return dx, kernel_gradient(x, dy, window, kernel.shape)


convolve.defvjp(_forward, _backward)


def by_products(
  x: types.Array, kernel: types.Array, window: Window
) -> jax.Array:
  """`convolve` as a sum of shifted matrix products."""
  channels, features = kernel.shape[2:]
  padded = _pad(x, window.padding)
  size = window.size(padded.shape[1:3], kernel.shape[:2])
  weights = kernel.reshape(-1, features)
  total = 0
  for first, rows in _shifted(
    padded, kernel.shape[:2], window, size, joined=channels <= _JOINED
  ):
    some = weights[first * channels :][: rows.shape[-1]]
    total = total + _product(rows, some)
  return total.astype(x.dtype).reshape(len(x), *size, features)


def input_gradient(
  dy: types.Array, kernel: types.Array, window: Window, shape: Sequence[int]
) -> jax.Array:
  """Returns the gradient [B, H, W, C] of x for dy [B, H', W', F].

  It is a convolution of the gradient, with zeros put between its pixels where
  there are strides, by the kernel turned around.
  """
  turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
  apart = [(0, 0, step - 1) for step in window.strides]
  if any(step > 1 for step in window.strides):
    zero = jnp.zeros((), dy.dtype)
    dy = jax.lax.pad(dy, zero, [(0, 0, 0), *apart, (0, 0, 0)])
  padding = _turned_padding(dy.shape, kernel.shape, window, shape)
  return convolve(dy, turned, Window((1, 1), padding, window.dilation))


def kernel_gradient(
  x: types.Array, dy: types.Array, window: Window, shape: Sequence[int]
) -> jax.Array:
  """Returns the gradient [h, w, C, F] of the kernel for dy [B, H', W', F].

  Each tap's is x^T dy, one of them shifted: the narrower, to copy less.
  """
  taps, (channels, features) = shape[:2], shape[2:]
  if _is_for_winograd(x, shape, window):
    return winograd.kernel_gradient(x, dy, window.padding)
  # A transposed operand keeps products in bfloat16 from being fast ones.
  is_half = x.dtype == jnp.bfloat16
  flat = lambda y: y.reshape(-1, y.shape[-1])
  found = []
  if channels < features or window.strides != (1, 1):
    padded = _pad(x, window.padding)
    fixed = _transpose(flat(dy), is_half)
    for _, rows in _shifted(
      padded, taps, window, dy.shape[1:3], joined=not is_half
    ):
      found.append(_product(fixed, flat(rows)).T)
    dk = jnp.concatenate(found).reshape(shape)
    return dk.astype(x.dtype)
  # x is fixed, and the tap that looks ahead sees the gradient from behind.
  padding = _turned_padding(dy.shape, shape, window, x.shape)
  fixed = _transpose(flat(x), is_half)
  for _, rows in _shifted(
    _pad(dy, padding), taps, window, x.shape[1:3], joined=not is_half
  ):
    one = _product(fixed, flat(rows)).reshape(channels, -1, features)
    found.append(jnp.swapaxes(one, 0, 1))
  dk = jnp.concatenate(found)[::-1].reshape(shape)
  return dk.astype(x.dtype)


def _is_for_winograd(
  x: types.Array, kernel: Sequence[int], window: Window
) -> bool:
  return (
    tuple(kernel[:2]) == (3, 3)
    and window.strides == window.dilation == (1, 1)
    and min(kernel[2:]) >= _MANY
    and min(min(pair) for pair in window.padding) >= 0
    and x.dtype != jnp.bfloat16
    and math.prod(x.shape) <= _LARGE
  )


def _turned_padding(
  outer: Sequence[int],
  kernel: Sequence[int],
  window: Window,
  shape: Sequence[int],
) -> tuple[tuple[int, int], ...]:
  """Returns padding with which a gradient `outer` gives x's `shape`."""
  pairs = []
  for axis in (0, 1):
    reach = (kernel[axis] - 1) * window.dilation[axis]
    low = reach - window.padding[axis][0]
    pairs.append((low, shape[1 + axis] - outer[1 + axis] - low + reach))
  return tuple(pairs)


def _pad(x: types.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
  """Pads rows and columns with zeros; less than none cuts."""
  if not any(any(pair) for pair in padding):
    return x
  pairs = [(low, high, 0) for low, high in padding]
  zero = jnp.zeros((), x.dtype)
  return jax.lax.pad(x, zero, [(0, 0, 0), *pairs, (0, 0, 0)])


def _shifted(
  padded: jax.Array,
  taps: Sequence[int],
  window: Window,
  size: Sequence[int],
  *,
  joined: bool,
) -> Iterator[tuple[int, jax.Array]]:
  """Yields (number of the first tap, pixels that each output sees by it).

  Args:
    padded: [B, H, W, C].
    taps: (h, w) of the kernel.
    window: how it moves; its padding is done.
    size: (H', W').
    joined: the taps of a row of the kernel side by side, [B, H', W', w C];
      otherwise each alone, [B, H', W', C].
  """

  def cut(x: jax.Array, tap: int, axis: int) -> jax.Array:
    stride, start = window.strides[axis], tap * window.dilation[axis]
    stop = start + (size[axis] - 1) * stride + 1
    return jax.lax.slice_in_dim(x, start, stop, stride, axis=1 + axis)

  columns = [cut(padded, j, 1) for j in range(taps[1])]
  if joined and len(columns) > 1:
    columns = [jnp.concatenate(columns, axis=-1)]
  for i in range(taps[0]):
    for j, column in enumerate(columns):
      yield i * taps[1] + j, cut(column, i, 0)


def _transpose(x: jax.Array, is_copied: bool) -> jax.Array:
  """Returns x^T, as something new in memory if wanted."""
  return jax.lax.optimization_barrier(x.T) if is_copied else x.T


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  wide = jnp.promote_types(a.dtype, jnp.float32)
  return jnp.matmul(a, b, preferred_element_type=wide)
