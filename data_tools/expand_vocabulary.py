"""Asks a language model the paper's questions and adds its answers.

python data_tools/expand_vocabulary.py --endpoint http://127.0.0.1:8080/v1 \
    --model NAME --out vocabulary.json
"""

import http.client
import json
import os
import pathlib
import urllib.request

from absl import flags

from dppp_jax import cli, errors, logs
from dppp_jax.geneperson import outfits, vocabulary

_QUESTIONS = {
  "color": "Please list specific color names",
  "upper_pattern": "What types of patterns are used in clothing design",
  "upper_type": "What are the styles of clothing for the upper body of a {}",
  "lower_type": "What are the styles of clothing for the legs of a {}",
  "footwear_type": "What are the styles of footwear of a {}",
  "body": "What are the different types of body shapes of a {}",
  "hair_style": "What are the different kinds of hairstyles of a {}",
  "hair_color": "Please list specific hair color names",
  "skin": "Please list the common skin colors",
}
_FAULTS = (OSError, ValueError, LookupError, TypeError)
_FORM = "? Answer with a JSON array of short lower-case English phrases only."


def define_flags():
  """Defines whom to ask what, and where the result goes."""
  text = flags.DEFINE_string
  text("endpoint", None, "Base URL of an OpenAI-compatible API.", required=True)
  text("model", None, "Name of the model there.", required=True)
  cli.path("out", None, "Vocabulary file to write.", required=True)
  cli.path("vocabulary", str(vocabulary.PATH), "Vocabulary file to begin with.")
  text("api_key_env", "OPENAI_API_KEY", "Variable that holds the key, if any.")
  flags.DEFINE_multi_enum("ask", list(_QUESTIONS), list(_QUESTIONS), "Lists.")


def main(args) -> None:
  """Writes the longer vocabulary; prints what was added and refused."""
  out = pathlib.Path(args.out)
  if out.exists() or not out.parent.is_dir():
    raise errors.UserError(f"{out} exists, or has no folder: change --out")
  raw = vocabulary.load(args.vocabulary).raw
  for key in logs.progress(args.ask, desc="asking", unit="list"):
    for gender in raw["gender"] if isinstance(raw[key], dict) else [None]:
      answer = _ask(args, _QUESTIONS[key].format(gender) + _FORM)
      words = vocabulary.parse_answer(answer)
      raw, refused = vocabulary.merge(raw, key, words, gender=gender)
      name = key if gender is None else f"{key} ({gender})"
      print(f"{name}: {len(words) - len(refused)} of {len(words)} added")
      for word, reason in refused.items():
        print(f"  not {word!r}: it {reason}")
  raw = _wearable(raw)
  out.write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n")


def _wearable(raw):
  """Returns the vocabulary without types that the rules leave nobody."""
  longer = vocabulary.Vocabulary(raw, where="the longer vocabulary")
  for gender in longer.genders:
    for key, word in outfits.unworn(longer, outfits.TYPES, gender):
      print(f"  not {word!r} ({gender}): the rules let nothing go with it")
      words = raw[key][gender] if isinstance(raw[key], dict) else raw[key]
      words.remove(word)
      return _wearable(raw)
  for gender in longer.genders:
    for key, words in outfits.shares(longer, gender).items():
      for word, share in words.items():
        if not 0.5 <= share <= 2:
          print(
            f"{key} ({gender}): {word!r} is worn {share:.1f} times as often as"
            " the others: see the rules about it"
          )
  return raw


def _ask(args, question: str) -> str:
  url = args.endpoint.rstrip("/") + "/chat/completions"
  message = {"role": "user", "content": question}
  body = json.dumps({"model": args.model, "messages": [message]}).encode()
  head = {"Content-Type": "application/json"}
  if key := os.environ.get(args.api_key_env):
    head["Authorization"] = f"Bearer {key}"
  try:
    request = urllib.request.Request(url, body, head)
    with urllib.request.urlopen(request, timeout=120) as reply:
      answer = json.load(reply)["choices"][0]["message"]["content"]
      return str.strip(answer)  # A TypeError where it is no text.
  except (*_FAULTS, http.client.HTTPException) as error:
    raise errors.UserError(f"{url} gave no answer ({error!r})") from error


if __name__ == "__main__":
  cli.run(main, define_flags=define_flags)
