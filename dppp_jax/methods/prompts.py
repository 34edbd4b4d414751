"""Prompts with pseudo-words: token ids, and the places that are filled.

A prompt is encoded at its own length: the text tower is causal and reads the
end token, so the padding to 77 that follows it changes nothing.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, types
from dppp_jax.models import clip, packing

PLACEHOLDER = "X"


@dataclasses.dataclass(frozen=True)
class Template:
  """A tokenised prompt.

  Attributes:
    ids: all N token ids, begin and end included.
    slots: places of the pseudo-words in `ids`, in reading order.
  """

  ids: tuple[int, ...]
  slots: tuple[int, ...]

  @property
  def eot(self) -> int:
    """Place of the end token, where the text feature is read."""
    return len(self.ids) - 1


def make(sentence: str, tokenizer: Any) -> Template:
  """Tokenises a sentence; each word "X" is one place to fill.

  Words are tokenised one by one, which is what a CLIP tokenizer does to a
  sentence: its merges stop at word ends. So places are known by counting, and
  a small vocabulary that splits a word in two does not shift them.

  Args:
    sentence: words between blanks; a full stop is a word of its own.
    tokenizer: a transformers CLIPTokenizer.

  Returns:
    The template.

  Raises:
    errors.UserError: the tokenizer has no ids for a word.
  """
  ids, slots = [tokenizer.bos_token_id], []
  specials = set(tokenizer.all_special_ids)
  for word in sentence.split():
    pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
    if word == PLACEHOLDER:
      slots.append(len(ids))
      # The embedding is replaced, so any id will do where X is not one token.
      ids.append(pieces[0] if pieces else tokenizer.eos_token_id)
    elif not pieces or specials & set(pieces):
      raise errors.UserError(
        f"the tokenizer cannot spell {word!r} of the prompt {sentence!r}: its"
        " vocab.json lacks single letters; use a CLIP vocabulary"
      )
    else:
      ids += pieces
  ids.append(tokenizer.eos_token_id)
  return Template(tuple(ids), tuple(slots))


def style_content(
  tokenizer: Any, *, k: int, full_stop: bool = False
) -> Template:
  """Returns "a [S_1 ... S_k] style of a [C] person": k slots, then one."""
  styles = " ".join([PLACEHOLDER] * k)
  sentence = f"a {styles} style of a {PLACEHOLDER} person"
  return make(_stop(sentence, full_stop), tokenizer)


def content(tokenizer: Any, *, full_stop: bool = False) -> Template:
  """Returns "a photo of a [C] person": one slot."""
  return make(_stop(f"a photo of a {PLACEHOLDER} person", full_stop), tokenizer)


def generic(tokenizer: Any, *, full_stop: bool = False) -> Template:
  """Returns "a photo of a person": no slot."""
  return make(_stop("a photo of a person", full_stop), tokenizer)


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The prompts that are read of each picture, in one pass.

  Attributes:
    templates: T of them; each has a slot at least.
  """

  templates: tuple[Template, ...]

  @functools.cached_property
  def packing(self) -> packing.Packing:
    """Says where the tokens lie: all before a first slot is shared."""
    return packing.Packing(
      tuple(len(template.ids) for template in self.templates),
      tuple(template.slots[0] for template in self.templates),
    )

  def read(
    self,
    tower: clip.TextTower,
    params: types.Params,
    words: Sequence[types.Array],
  ) -> list[jax.Array]:
    """Encodes all prompts with pseudo-words in their places.

    Args:
      tower: the text tower.
      params: of the CLIP.
      words: for each template [B, S, D], in reading order.

    Returns:
      For each template its text features [B, E].
    """
    shared, own, slots = [], [], []
    for template, given in zip(self.templates, words, strict=True):
      if given.shape[1] != len(template.slots):
        raise ValueError(
          f"{given.shape[1]} words for {len(template.slots)} places"
        )
      begin = template.slots[0]
      slots += [len(own) + slot - begin for slot in template.slots]
      shared += template.ids[:begin]
      own += template.ids[begin:]
    variables = {"params": params}
    ids = np.asarray([shared + own], np.int32)
    tokens = tower.apply(variables, ids, method="embed")
    filled = packing.put_words(
      tokens[:, len(shared) :],
      jnp.concatenate(list(words), axis=1),
      positions=slots,
    )
    features = tower.apply(
      variables, self.packing, tokens[0, : len(shared)], filled, method="read"
    )
    return [features[:, i] for i in range(len(self.templates))]


def _stop(sentence: str, full_stop: bool) -> str:
  return f"{sentence} ." if full_stop else sentence
