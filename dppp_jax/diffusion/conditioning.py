"""What a network of Stable Diffusion is told: texts and sizes.

Prompts become tokens on the host, and tokens become vectors in a compiled
program:

    tokens = conditioning.tokenize(tokenizers, prompts, limit=77)
    text = conditioning.encode(towers, params, tokens.ids, ...)

SDXL reads the last but one state of two encoders, side by side, and the
projection of the second; Stable Diffusion 1.x and 2.x the last state of one,
after its final norm. Padding is attended to like any other token, so what pads
a prompt matters: the two encoders of SDXL pad differently.
"""

from collections.abc import Sequence
import typing
from typing import Any, Literal, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, types
from dppp_jax.models import clip

Long = Literal["error", "truncate", "chunk"]
Pooled = Literal["first", "last"]

# A chunk ends after a comma where one stands among its last tokens, as in the
# WebUI: a garment and its colour should not be parted.
_BACKTRACK = 20
_COMMA = ",</w>"


class Tokens(NamedTuple):
  """Prompts as the encoders take them.

  Attributes:
    ids: for each encoder int32 [B, C, N]: C chunks of N tokens.
    counts: int32 [B], how many of the C chunks hold text.
    dropped: for each prompt the text that was cut off, mostly "".
  """

  ids: tuple[np.ndarray, ...]
  counts: np.ndarray
  dropped: tuple[str, ...]


class Text(NamedTuple):
  """Encoded prompts.

  Attributes:
    context: [B, C N, D], what the attentions look at.
    pooled: [B, P]; None where the network wants none (SD 1.x, 2.x).
  """

  context: jax.Array
  pooled: jax.Array | None


class Sizes(NamedTuple):
  """What SDXL is told of the picture's history, in pixels, height first.

  Attributes:
    original: size before it was resized; None: that of the canvas.
    crop: top and left of the crop.
    target: size wanted; None: that of the canvas.
  """

  original: tuple[int, int] | None = None
  crop: tuple[int, int] = (0, 0)
  target: tuple[int, int] | None = None


def time_ids(canvas: tuple[int, int], sizes: Sizes) -> np.ndarray:
  """Returns float32 [6]: original size, crop and target size of a canvas.

  In bfloat16 a height of 1250 would be 1248: never cast them.
  """
  values = (*(sizes.original or canvas), *sizes.crop)
  return np.array([*values, *(sizes.target or canvas)], np.float32)


def tokenize(
  tokenizers: Sequence[Any],
  prompts: Sequence[str],
  *,
  limit: int,
  long: Long = "error",
  min_chunks: int = 1,
) -> Tokens:
  """Turns prompts into ids, all of one shape.

  Args:
    tokenizers: one `transformers.CLIPTokenizer` for each encoder; each pads
      with its own padding token.
    prompts: B texts; those of both polarities together, so that they get
      the same C.
    limit: N, tokens of a chunk with both its end marks; 77 for CLIP.
    long: of a prompt that does not fit: `error`, `truncate` (diffusers' way;
      the loss is logged and returned), or `chunk` (the WebUI's way: as many
      chunks as it takes, each encoded alone; the other prompts get empty
      ones).
    min_chunks: with `chunk`, the least C. The compiled programs know C, so a
      fixed number above the longest prompt's keeps them few.

  Raises:
    errors.UserError: a prompt is too long, with `error`.
  """
  if long not in ("error", "truncate", "chunk"):
    raise errors.UserError(
      f"long prompts cannot be treated by {long!r}: choose error, truncate or"
      " chunk"
    )
  dropped = [""] * len(prompts)
  every_chunks = []
  for tokenizer in tokenizers:
    every_ids = tokenizer(
      list(prompts), add_special_tokens=False, verbose=False
    )["input_ids"]
    chunks = []
    comma = _comma(tokenizer) if long == "chunk" else None
    for i, ids in enumerate(every_ids):
      if long == "chunk":
        chunks.append(_split(ids, limit - 2, comma))
        continue
      if len(ids) > limit - 2:
        lost = tokenizer.decode(ids[limit - 2 :]).strip()
        if long == "error":
          raise errors.UserError(
            f"a prompt has {len(ids) + 2} tokens, {len(ids) + 2 - limit} over"
            f' the encoder\'s {limit}, and "{lost}" would be lost: shorten it,'
            " or set long_prompts to truncate or chunk"
          )
        dropped[i] = max(dropped[i], lost, key=len)
      chunks.append([ids[: limit - 2]])
    every_chunks.append(chunks)
  for lost in filter(None, dropped):
    logging.warning("a prompt is cut at %d tokens; lost: %s", limit, lost)
  counts = np.array(
    [
      max(len(chunks[i]) for chunks in every_chunks)
      for i in range(len(prompts))
    ],
    np.int32,
  )
  most = int(max(counts, default=1))
  if long == "chunk":
    most = max(most, min_chunks)
  ids = tuple(
    _pack(tokenizer, chunks, most, limit)
    for tokenizer, chunks in zip(tokenizers, every_chunks, strict=True)
  )
  return Tokens(ids, counts, tuple(dropped))


def check(
  texts: Sequence[clip.TextConfig],
  *,
  is_xl: bool,
  clip_skip: int = 0,
  pooled: Pooled = "first",
) -> None:
  """Refuses what `encode` cannot be asked.

  Args:
    texts: the encoders.
    is_xl: as of `encode`, like the others.
    clip_skip: likewise.
    pooled: likewise.

  Raises:
    errors.UserError: a value without meaning for these encoders.
  """
  most = min(text.num_hidden_layers for text in texts) + 1 + _last(is_xl)
  if not 0 <= clip_skip <= most:
    raise errors.UserError(
      f"clip_skip={clip_skip}: must be 0 to {most} for these text encoders"
    )
  if pooled not in typing.get_args(Pooled):
    raise errors.UserError(
      f"pooled={pooled}: choose one of {', '.join(typing.get_args(Pooled))}"
    )


def encode(
  towers: Sequence[clip.TextTower],
  params: Sequence[types.Params],
  ids: Sequence[types.Array],
  *,
  counts: types.Array,
  is_xl: bool,
  skip: types.Array | None = None,
  clip_skip: int = 0,
  pooled: Pooled = "first",
) -> Text:
  """Encodes tokens; pure, to be called inside jit.

  Args:
    towers: the encoders.
    params: of each.
    ids: for each int [B, C, N].
    counts: see `Tokens`.
    is_xl: SDXL's rule; otherwise that of SD 1.x.
    skip: bool [B], whose states are taken `clip_skip` blocks earlier. In
      diffusers the negative prompts' never are. None: all.
    clip_skip: how many blocks before the usual one.
    pooled: of which chunk SDXL's pooled vector is; "last" is that of the last
      one that holds text.
  """
  batch, chunks, length = ids[0].shape
  usual = _last(is_xl)
  taps = (usual,) if clip_skip == 0 else (usual, usual - clip_skip)
  contexts, vector = [], None
  for tower, weights, one in zip(towers, params, ids, strict=True):
    output = tower.apply(
      {"params": weights},
      one.reshape(batch * chunks, length),
      hidden=taps,
      final_norm=not is_xl,
    )
    state = output.hidden[-1].reshape(batch, chunks * length, -1)
    if skip is not None and clip_skip:
      others = output.hidden[0].reshape(state.shape)
      state = jnp.where(skip[:, None, None], state, others)
    contexts.append(state)
    if output.projected is not None:
      vector = output.projected.reshape(batch, chunks, -1)
  context = jnp.concatenate(contexts, axis=-1)
  if not is_xl:
    return Text(context, None)
  if vector is None:
    raise errors.UserError(
      "the second text encoder of this SDXL has no text_projection: it must be"
      " a CLIPTextModelWithProjection"
    )
  at = jnp.zeros_like(counts) if pooled == "first" else counts - 1
  vector = jnp.take_along_axis(vector, at[:, None, None], axis=1)[:, 0]
  return Text(context, vector)


def _last(is_xl: bool) -> int:
  """Returns which hidden state is read, counted from the last."""
  return -2 if is_xl else -1


def _comma(tokenizer: Any) -> int | None:
  """Returns the id of a comma, or None for a vocabulary that has none."""
  # One look-up: a dict of the whole vocabulary takes a tenth of a second.
  number = tokenizer.convert_tokens_to_ids(_COMMA)
  is_known = number is not None and (
    tokenizer.convert_ids_to_tokens(number) == _COMMA
  )
  return number if is_known else None


def _split(ids: list[int], length: int, comma: int | None) -> list[list[int]]:
  """Returns chunks of at most `length` tokens, at least one."""
  chunks = []
  while len(ids) > length:
    end = length
    for i in range(length - 1, max(length - 1 - _BACKTRACK, 0), -1):
      if ids[i] == comma:
        end = i + 1
        break
    chunks.append(ids[:end])
    ids = ids[end:]
  return [*chunks, ids]


def _pack(
  tokenizer: Any, prompts: list[list[list[int]]], most: int, limit: int
) -> np.ndarray:
  """Returns int32 [B, most, limit]: each chunk with its end marks, padded."""
  begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
  packed = np.full(
    (len(prompts), most, limit), tokenizer.pad_token_id, np.int32
  )
  packed[..., 0], packed[..., 1] = begin, end  # Of chunks that hold no text.
  for rows, chunks in zip(packed, prompts, strict=True):
    for row, ids in zip(rows, chunks, strict=False):
      row[1 : 2 + len(ids)] = [*ids, end]
  return packed
