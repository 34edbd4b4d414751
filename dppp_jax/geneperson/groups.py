"""Groups of numbers: which pictures are drawn side by side.

A network may round a picture differently beside other neighbours. So the place
of a number in its batch and its neighbours depend on the number alone: group g
of size B holds g B .. g B + B - 1, and is always drawn whole, whoever of it is
asked for. What was there already is drawn again and not kept; the numbers
behind the last one asked for fill its group.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import itertools

import jax.numpy as jnp
import numpy as np

from dppp_jax import types


def split(
  numbers: Iterable[int], size: int
) -> Iterator[tuple[range, list[int]]]:
  """Yields (all numbers of a group, those of them that are asked for).

  Args:
    numbers: that are asked for, ascending.
    size: numbers of a group.
  """
  for group, some in itertools.groupby(numbers, lambda number: number // size):
    yield range(group * size, (group + 1) * size), list(some)


def owner(number: int, *, size: int, count: int) -> int:
  """Returns which of `count` stripes makes a number: stripes own groups."""
  return number // size % count


def drawn(
  draw: Callable[[np.ndarray, int], types.Array], counts: Sequence[int]
) -> types.Array:
  """Draws a group once for each number of chunks that its prompts have.

  So a prompt has the chunks that it needs, whatever its neighbours need. In
  each of these batches the first row of that number fills the places of the
  others: one program for any number of rows.

  Args:
    draw: (rows [B], chunks) -> pictures [B, H, W, 3].
    counts: [B], chunks of each row; 0 where a row cannot be drawn, which then
      holds the picture of another.
  """
  counts, pictures = np.asarray(counts), None
  for count in np.unique(counts[counts > 0]):
    own = counts == count
    rows = np.where(own, np.arange(len(counts)), own.argmax())
    some = draw(rows, int(count))
    if pictures is None:
      pictures = some
    else:
      pictures = jnp.where(own[:, None, None, None], some, pictures)
  if pictures is None:
    raise ValueError("no row of the group can be drawn")
  return pictures
