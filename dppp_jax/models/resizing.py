"""Pictures of another size."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dppp_jax import types


def resize(
  images: types.Array, size: Sequence[int], method: str, *, antialias: bool
) -> jax.Array:
  """Resizes pictures as `jax.image.resize` does.

  With the channels in front: XLA does not compile the products of [H, h] and
  [W, w] with several channels and pictures ahead of time for a GPU ("Couldn't
  find output tile sizes").

  Args:
    images: [B, h, w, C].
    size: (H, W).
    method: see `jax.image.ResizeMethod`.
    antialias: whether shrinking takes a wider window.

  Returns:
    [B, H, W, C] in the dtype of the pictures.
  """
  if images.shape[1:3] == tuple(size):
    return images
  images = jnp.moveaxis(images, 3, 1)
  shape = (*images.shape[:2], *size)
  images = jax.image.resize(images, shape, method, antialias=antialias)
  return jnp.moveaxis(images, 1, 3)
