"""Convolution by 3x3 kernels with four ninths of the multiplications.

Winograd's minimal filtering F(2x2, 3x3), as in Lavin and Gray 2016, Eq. 8: of a
4x4 tile d of the picture and a kernel g, the 2x2 tile

    Y = A^T [(G g G^T) * (B^T d B)] A

of the output, where * is a product of matrices over channels. B, G and A hold
zeros, ones and halves, so that sums are as exact as those of the plain way.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dppp_jax import types

Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(
  x: types.Array, kernel: types.Array, padding: Padding
) -> jax.Array:
  """Convolves with stride 1.

  Args:
    x: [B, H, W, C].
    kernel: [3, 3, C, F] in the dtype of x.
    padding: ((top, bottom), (left, right)), zeros; none negative.

  Returns:
    [B, H', W', F] with H' = H + top + bottom - 2, and W' likewise.
  """
  pairs = zip(x.shape[1:3], padding, strict=True)
  high, wide = (side + sum(pair) - 2 for side, pair in pairs)
  tiles = _of_picture(x, padding, (high, wide))
  columns = jnp.stack(_G(kernel))
  weights = jnp.stack(_G([columns[:, j] for j in range(3)]), axis=1)
  found = jnp.matmul(_matrices(tiles), _matrices(weights))
  found = found.reshape(*tiles.shape[:-1], kernel.shape[-1])
  y = jnp.stack(_A(jnp.stack(_A(found), axis=3)), axis=4)
  count, rows, _, columns, _, features = y.shape
  y = y.reshape(count, 2 * rows, 2 * columns, features)
  return y[:, :high, :wide]


def kernel_gradient(
  x: types.Array, dy: types.Array, padding: Padding
) -> jax.Array:
  """Returns the gradient [3, 3, C, F] of the kernel.

  Args:
    x: [B, H, W, C], as `convolve` was given it.
    dy: [B, H', W', F], gradient of what it returned.
    padding: as it was given.
  """
  size = dy.shape[1:3]
  seen = _of_picture(x, padding, size)
  even = _pad(dy, [(0, side % 2) for side in size])
  rows = jnp.stack(_A_turned([even[:, i::2] for i in range(2)]))
  given = [rows[:, :, :, j::2] for j in range(2)]
  given = jnp.stack(_A_turned(given), axis=1)
  found = jnp.einsum("kmc,kmf->kcf", _matrices(seen), _matrices(given))
  rows = jnp.stack(_G_turned(found.reshape(4, 4, *found.shape[1:])))
  return jnp.stack(_G_turned([rows[:, j] for j in range(4)]), axis=1)


def _of_picture(
  x: types.Array, padding: Padding, size: Sequence[int]
) -> jax.Array:
  """Returns B^T d B of all tiles, [4, 4, B, tiles, tiles, C]."""
  # The last tile of an odd side sees a zero more.
  pairs = zip(padding, size, strict=True)
  x = _pad(x, [(low, high + side % 2) for (low, high), side in pairs])
  high, wide = (2 * ((side + 1) // 2) for side in size)
  rows = jnp.stack(_B([x[:, i : i + high : 2] for i in range(4)]))
  columns = [rows[:, :, :, j : j + wide : 2] for j in range(4)]
  return jnp.stack(_B(columns), axis=1)


def _pad(x: types.Array, sides: Sequence[tuple[int, int]]) -> jax.Array:
  return jnp.pad(x, ((0, 0), *sides, (0, 0)))


def _matrices(x: jax.Array) -> jax.Array:
  """Returns [16, M, N] of [4, 4, ..., N]."""
  return x.reshape(16, -1, x.shape[-1])


# The matrices, written out as sums.


def _B(d):
  return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _G(g):
  ends, middle = (g[0] + g[2]) / 2, g[1] / 2
  return g[0], ends + middle, ends - middle, g[2]


def _A(m):
  return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _A_turned(y):
  return y[0], y[0] + y[1], y[0] - y[1], -y[1]


def _G_turned(u):
  both = (u[1] + u[2]) / 2
  return u[0] + both, (u[1] - u[2]) / 2, both + u[3]
