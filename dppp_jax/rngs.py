"""Named random streams, so that adding one never shifts another."""

import zlib

import jax


def stream(key: jax.Array, name: str) -> jax.Array:
  """Returns the key of a named stream: the same name, the same numbers.

  Args:
    key: a key of `jax.random.key`.
    name: what the numbers are for, e.g. "augment".
  """
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def at_step(key: jax.Array, step: int | jax.Array) -> jax.Array:
  """Returns the key of one step, without any state to carry or to save."""
  return jax.random.fold_in(key, step)
