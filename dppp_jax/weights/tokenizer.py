"""CLIP's byte-pair vocabulary: trained on captions, written as files.

The layout is OpenAI's: 256 bytes as visible characters, the same with the end
of a word, `</w>`, then one token for each merge, then the two end marks.
"""

import collections
from collections.abc import Iterable, Sequence
import itertools
import json
import logging
import pathlib
from typing import Any

from dppp_jax import errors, logs

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
_END = "</w>"
_FIXED = 2 * 256 + 2


def library() -> Any:
  """Imports transformers without its notice that PyTorch is not installed.

  The import takes two seconds, so it waits until a tokenizer is wanted. The
  tokenizer is written in Rust and needs no PyTorch.
  """
  logger = logging.getLogger("transformers")
  about_others = lambda line: "PyTorch was not found" not in line.getMessage()
  logger.addFilter(about_others)
  try:
    import transformers
  finally:
    logger.removeFilter(about_others)
  return transformers


def train_tokenizer(
  captions: Iterable[str], folder: str | pathlib.Path, *, vocab_size: int
) -> int:
  """Trains a byte-pair vocabulary; the same captions give the same files.

  Args:
    captions: texts of the words that shall be short.
    folder: where vocab.json, merges.txt, tokenizer_config.json and
      special_tokens_map.json are written; made if need be.
    vocab_size: the largest size; at least 514, the bytes and the end marks.

  Returns:
    The size reached: less than vocab_size where every word is one token.

  Raises:
    errors.UserError: vocab_size is too small, or there is no word.
  """
  if vocab_size < _FIXED:
    raise errors.UserError(
      f"vocab_size {vocab_size} is too small: the bytes and the end marks"
      f" alone need {_FIXED}"
    )
  words = _words(captions)
  if not words:
    raise errors.UserError("the captions hold no word to train a tokenizer on")
  return write(folder, _merges(words, vocab_size - _FIXED))


def write(folder: str | pathlib.Path, merges: Sequence[tuple[str, str]]) -> int:
  """Writes the vocabulary that a list of merges makes.

  Args:
    folder: where the four files are written; made if need be.
    merges: pairs of tokens, the most common pair first.

  Returns:
    The number of tokens.
  """
  tokens = _byte_characters()
  tokens += [token + _END for token in tokens]
  tokens += ["".join(pair) for pair in merges]
  # Two different merges may spell one token; it has one id.
  tokens = [*dict.fromkeys(tokens), BOS, EOS]
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  _write(folder, {token: i for i, token in enumerate(tokens)}, merges)
  return len(tokens)


def save(tokenizer: Any, folder: str | pathlib.Path) -> None:
  """Writes a CLIPTokenizer as vocab.json and merges.txt.

  transformers 5 itself writes tokenizer.json alone, which the many older
  readers of CLIP folders do not know.
  """
  backend = json.loads(tokenizer.backend_tokenizer.to_str())
  merges = [
    tuple(m.split(" ")) if isinstance(m, str) else tuple(m)
    for m in backend["model"]["merges"]
  ]
  vocab = dict(sorted(tokenizer.get_vocab().items(), key=lambda kv: kv[1]))
  _write(pathlib.Path(folder), vocab, merges, str(tokenizer.pad_token))


def _write(
  folder: pathlib.Path,
  vocab: dict[str, int],
  merges: Sequence[tuple[str, str]],
  pad: str = EOS,
) -> None:
  def dump(name: str, values: Any) -> None:
    text = json.dumps(values, ensure_ascii=False, indent=None)
    (folder / name).write_text(text + "\n", encoding="utf-8")

  special = {
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": pad,
    "unk_token": EOS,
  }
  dump("vocab.json", vocab)
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
  dump("special_tokens_map.json", special)
  dump("tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **special})


def _words(captions: Iterable[str]) -> dict[tuple[str, ...], int]:
  """Counts the words of the captions, as tuples of byte characters."""
  transformers = library()
  # CLIP's own rules for case and for the borders of words.
  backend = transformers.CLIPTokenizer().backend_tokenizer
  texts = collections.Counter(captions)
  counts: collections.Counter[str] = collections.Counter()
  for text, times in logs.progress(texts.items(), desc="words", unit="text"):
    text = backend.normalizer.normalize_str(text)
    for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
      counts[word] += times
  return {(*w[:-1], w[-1] + _END): n for w, n in sorted(counts.items())}


def _merges(
  words: dict[tuple[str, ...], int], limit: int
) -> list[tuple[str, str]]:
  """Joins the most frequent pair, again and again (byte-pair encoding)."""
  merges: list[tuple[str, str]] = []
  for _ in logs.progress(range(limit), desc="merges", unit="merge"):
    pairs: collections.Counter[tuple[str, str]] = collections.Counter()
    for word, times in words.items():
      for pair in itertools.pairwise(word):
        pairs[pair] += times
    if not pairs:
      break
    # Ties go to the first in the alphabet: no order of the input counts.
    best = min(pairs, key=lambda pair: (-pairs[pair], pair))
    merges.append(best)
    joined: collections.Counter[tuple[str, ...]] = collections.Counter()
    for word, times in words.items():
      joined[_join(word, best)] += times
    words = joined
  return merges


def _join(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
  joined: list[str] = []
  i = 0
  while i < len(word):
    if word[i : i + 2] == pair:
      joined.append(word[i] + word[i + 1])
      i += 2
    else:
      joined.append(word[i])
      i += 1
  return tuple(joined)


def _byte_characters() -> list[str]:
  """Returns a visible character for each byte, in the order of GPT-2's ids.

  Printable Latin-1 stands for itself; the rest follows from code point 256.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = sorted(set(range(256)) - set(printable))
  return [chr(b) for b in printable] + [
    chr(256 + i) for i in range(len(hidden))
  ]
