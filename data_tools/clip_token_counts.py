"""Counts the tokens that CLIP's tokenizer makes of every word of the prompts.

python data_tools/clip_token_counts.py --tokenizer FOLDER [--check]

FOLDER holds vocab.json and merges.txt of CLIP. The table lets a test hold the
longest prompt to CLIP's 77 tokens without that vocabulary: CLIP's tokenizer
cuts text at blanks and commas first, so that a prompt has as many tokens as its
words have together.
"""

from collections.abc import Iterable, Mapping
import json
import pathlib
import re
from typing import Any

from absl import flags

from dppp_jax import cli, errors, paths
from dppp_jax.geneperson import prompts, vocabulary
from dppp_jax.weights import load

_PATH = cli.ROOT / "tests/clip_token_counts.json"


def define_flags():
  """Defines where the tokenizer lies, and where the table goes."""
  text = flags.DEFINE_string
  text("tokenizer", None, "Folder of CLIP's vocabulary.", required=True)
  text("out", str(_PATH), "Table to write, or to check.")
  flags.DEFINE_bool("check", False, "Compare with the table, write nothing.")


def pieces(text: str) -> list[str]:
  """Returns the words and commas of a text."""
  return re.findall(r"[^\s,]+|,", text)


def texts() -> Iterable[str]:
  """Yields all that a prompt of the shipped vocabulary may hold."""
  words = vocabulary.default()
  for template in (prompts.TEMPLATE, prompts.BACKGROUND):
    yield re.sub(r"\{\w+\}", " ", template)
  yield from (prompts.NEGATIVE, prompts.NEGATIVE_BACKGROUND)
  for key in ("gender", "color", *vocabulary.OUTFIT, *words.keys):
    yield from words.values(key)
  for places in words.raw["place"].values():
    yield from places


def counts(tokenizer: Any) -> Mapping[str, int]:
  """Returns {word or comma: number of tokens}, sorted."""
  found = sorted({piece for text in texts() for piece in pieces(text)})
  ids = tokenizer(found, add_special_tokens=False)["input_ids"]
  return {piece: len(one) for piece, one in zip(found, ids, strict=True)}


def main(args) -> None:
  """Writes or checks the table."""
  tokenizer = load.tokenizer(paths.expand(args.tokenizer))
  found = counts(tokenizer)
  people = prompts.People(0)
  some = [people[pid].prompt() for pid in range(200)]
  ids = tokenizer(some, add_special_tokens=False)["input_ids"]
  for prompt, one in zip(some, ids, strict=True):
    if len(one) != sum(found[piece] for piece in pieces(prompt)):
      raise errors.UserError(
        f"{args.tokenizer} does not cut text at blanks and commas: {prompt}"
      )
  path = pathlib.Path(args.out)
  if args.check:
    if json.loads(path.read_text()) != found:
      raise errors.UserError(
        f"{path} is not of this tokenizer, or not of the shipped vocabulary:"
        " write it anew by leaving --check out"
      )
    print(
      f"{path}: agrees, {len(found)} words; longest of 200 prompts"
      f" {max(map(len, ids)) + 2} tokens"
    )
    return
  path.write_text(json.dumps(found, indent=0) + "\n")
  print(path)


if __name__ == "__main__":
  cli.run(main, define_flags=define_flags)
