"""Prompts with pseudo-words, several of an example in one stack of rows."""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import types
from dppp_jax.models import attention


@dataclasses.dataclass(frozen=True)
class Packing:
  """Where the tokens of T prompts lie for a batch of B examples.

  A prompt with pseudo-words is the same for all examples up to its first
  pseudo-word, and in a causal tower so are all states of these tokens: they
  are computed once. The other tokens of all prompts follow, example by
  example, so that one pass reads all prompts:

      S shared rows, then B times M own rows.

  Attributes:
    lengths: tokens of each prompt.
    shared: how many first tokens of each prompt all examples share; at least
      one (the begin of text) and not all (the end of text is read).
  """

  lengths: tuple[int, ...]
  shared: tuple[int, ...]

  def __post_init__(self):
    """Checks the counts."""
    for length, shared in zip(self.lengths, self.shared, strict=True):
      if not 0 < shared < length:
        raise ValueError(f"{shared} shared of {length} tokens")

  @functools.cached_property
  def shared_positions(self) -> np.ndarray:
    """Returns the position in its prompt of each shared row, int [S]."""
    return np.concatenate([np.arange(n) for n in self.shared])

  @functools.cached_property
  def own_positions(self) -> np.ndarray:
    """Returns the position in its prompt of each own row, int [M]."""
    both = zip(self.shared, self.lengths, strict=True)
    return np.concatenate([np.arange(*x) for x in both])

  @functools.cached_property
  def ends(self) -> np.ndarray:
    """Returns the own row of each prompt's last token, int [T]."""
    return np.cumsum(self._own_counts) - 1

  def stack(self, shared: types.Array, own: types.Array) -> jax.Array:
    """Returns all rows [S + B * M, D] of shared [S, D] and own [B, M, D]."""
    return jnp.concatenate([shared, own.reshape(-1, own.shape[-1])])

  def last_rows(self, batch: int) -> np.ndarray:
    """Returns the rows of all last tokens in the stack, int [B * T]."""
    first = len(self.shared_positions) + len(self.own_positions) * np.arange(
      batch
    )
    return (first[:, None] + self.ends).reshape(-1)

  def attend(
    self, query: types.Array, key: types.Array, value: types.Array
  ) -> jax.Array:
    """Causal attention within each prompt.

    Args:
      query: [S + B * M, heads, d], or [B * T, heads, d] of the last tokens.
      key: [S + B * M, heads, d].
      value: [S + B * M, heads, d].

    Returns:
      As many rows as `query` has, in the dtype of `value`.
    """
    first, own = len(self.shared_positions), len(self.own_positions)
    by_example = lambda y, rows: y.reshape(-1, rows, *y.shape[1:])
    batch = (len(key) - first) // own

    def seen(y):
      begin = jnp.broadcast_to(y[:first], (batch, first, *y.shape[1:]))
      return jnp.concatenate([begin, by_example(y[first:], own)], axis=1)

    flat = lambda y: y.reshape(-1, *y.shape[2:])
    key_seen, value_seen = seen(key), seen(value)
    mask = self._mask[first:]
    if len(query) != len(key):
      query = by_example(query, len(self.ends))
      return flat(
        attention.dot_product(
          query, key_seen, value_seen, mask=mask[None, self.ends]
        )
      )
    begin = attention.dot_product(
      *(y[None, :first] for y in (query, key, value)),
      mask=self._mask[None, :first, :first],
    )
    rest = attention.dot_product(
      by_example(query[first:], own), key_seen, value_seen, mask=mask[None]
    )
    return jnp.concatenate([begin[0], flat(rest)])

  @property
  def _own_counts(self) -> np.ndarray:
    return np.subtract(self.lengths, self.shared)

  @functools.cached_property
  def _mask(self) -> np.ndarray:
    """Returns which rows an example's rows see, bool [S + M, S + M]."""
    prompts = np.arange(len(self.lengths))
    prompt = np.concatenate(
      [np.repeat(prompts, self.shared), np.repeat(prompts, self._own_counts)]
    )
    position = np.concatenate([self.shared_positions, self.own_positions])
    return (prompt[:, None] == prompt) & (position[:, None] >= position)


def put_words(
  embeddings: types.Array, words: types.Array, *, positions: Sequence[int]
) -> jax.Array:
  """Puts pseudo-words in the place of chosen tokens of one template.

  Args:
    embeddings: [B, N, D] or [1, N, D], of `TextTower.embed`.
    words: [B, k, D]; gradients flow into them.
    positions: k different positions of the prompt, one for each word.

  Returns:
    [B, N, D].
  """
  batch = (words.shape[0], *embeddings.shape[1:])
  index = jnp.asarray(tuple(positions))
  return (
    jnp.broadcast_to(embeddings, batch)
    .at[:, index]
    .set(words.astype(embeddings.dtype), unique_indices=True)
  )
