"""Prompts against the sentence as transformers' CLIPTokenizer reads it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from dppp_jax import errors
from dppp_jax.methods import prompts
from dppp_jax.models import clip

_WORDS = ("a", "photo", "of", "style", "person", ".")
_LETTERS = "abcdefghijklmnopqrstuvwxyz."


def make_tokenizer(folder, *, words=(), letters=_LETTERS):
  """A CLIP vocabulary with these words whole, and single letters."""
  tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
  merges = []
  for word in words:
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while len(pieces) > 1:
      merges.append(f"{pieces[0]} {pieces[1]}")
      pieces[:2] = ["".join(pieces[:2])]
      tokens.append(pieces[0])
  tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
  vocab = {token: i for i, token in enumerate(tokens)}
  (folder / "vocab.json").write_text(json.dumps(vocab))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
  return transformers.CLIPTokenizer(
    str(folder / "vocab.json"), str(folder / "merges.txt")
  )


@pytest.fixture
def whole(tmp_path):
  """Every word of the prompts is one token, as in OpenAI's vocabulary."""
  tokenizer = make_tokenizer(tmp_path, words=_WORDS)
  for word in _WORDS:
    assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
  return tokenizer


@pytest.fixture
def spelled(tmp_path):
  """Every word is spelled letter by letter."""
  return make_tokenizer(tmp_path)


def test_the_papers_prompts(whole):
  style_content = prompts.style_content(whole, k=6)
  assert len(style_content.ids) == 14
  assert style_content.slots == (2, 3, 4, 5, 6, 7, 11)
  assert style_content.eot == 13
  content = prompts.content(whole)
  assert len(content.ids) == 8
  assert content.slots == (5,)
  assert prompts.generic(whole).slots == ()


@pytest.mark.parametrize("kind", ["whole", "spelled"])
@pytest.mark.parametrize("full_stop", [False, True])
def test_ids_are_those_of_the_sentence(kind, full_stop, request):
  tokenizer = request.getfixturevalue(kind)
  stop = "." if full_stop else ""
  for template, sentence in (
    (
      prompts.style_content(tokenizer, k=3, full_stop=full_stop),
      "a X X X style of a X person",
    ),
    (
      prompts.content(tokenizer, full_stop=full_stop),
      "a photo of a X person",
    ),
    (prompts.generic(tokenizer, full_stop=full_stop), "a photo of a person"),
  ):
    ids = tokenizer(sentence + stop)["input_ids"]
    assert list(template.ids) == ids
    assert template.ids[template.eot] == tokenizer.eos_token_id
    x = tokenizer("X", add_special_tokens=False)["input_ids"]
    assert len(x) == 1
    assert template.slots == tuple(i for i, t in enumerate(ids) if t == x[0])
    assert len(template.slots) == sentence.count("X")


def test_a_placeholder_of_two_tokens_is_one_place(whole, monkeypatch):
  """Where X is unknown or split, the places are counted all the same."""
  monkeypatch.setattr(prompts, "PLACEHOLDER", "of")
  template = prompts.make("a of of person", whole)
  monkeypatch.setattr(prompts, "PLACEHOLDER", "zebra")
  split = prompts.make("a zebra zebra person", whole)
  assert split.slots == template.slots == (2, 3)
  assert len(split.ids) == len(template.ids)


def test_a_vocabulary_without_letters_is_named(tmp_path):
  letters = _LETTERS.replace("y", "")
  tokenizer = make_tokenizer(tmp_path, letters=letters)
  prompts.content(tokenizer)
  with pytest.raises(errors.UserError, match=r"cannot spell 'style'.*vocab"):
    prompts.style_content(tokenizer, k=6)


def test_fill_puts_words_in_reading_order(whole):
  template = prompts.style_content(whole, k=2)
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(len(template.ids), 5)).astype(np.float32)
  words = rng.normal(size=(3, 3, 5)).astype(np.float32)
  filled = np.asarray(prompts.fill(template, tokens, words))
  assert filled.shape == (3, 10, 5)
  for b in range(3):
    expected = tokens.copy()
    expected[2], expected[3], expected[7] = words[b]
    np.testing.assert_array_equal(filled[b], expected)
  grad = jax.grad(lambda w: prompts.fill(template, tokens, w).sum())(words)
  assert np.array_equal(grad, np.ones_like(words))
  with pytest.raises(ValueError, match="2 words for 3"):
    prompts.fill(template, tokens, words[:, :2])


def test_own_length_is_enough(whole):
  """A filled prompt encodes as the sentence of its words, padded to 77."""
  config = clip.TextConfig(
    vocab_size=len(whole),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=6,
    bos_token_id=whole.bos_token_id,
    eos_token_id=whole.eos_token_id,
  )
  tower = clip.TextTower(config)
  variables = {"params": clip.init_params(config, jax.random.key(0))}
  template = prompts.style_content(whole, k=2)
  embed = lambda ids: tower.apply(variables, ids, method="embed")
  real = "a photo of style of a photo person"
  ids = whole(real, padding="max_length", max_length=77)["input_ids"]
  expected = tower.apply(variables, jnp.array([ids])).projected
  words = whole("photo of photo", add_special_tokens=False)["input_ids"]
  filled = prompts.fill(
    template, embed(jnp.array([template.ids]))[0], embed(jnp.array([words]))
  )
  output = tower.apply(variables, embeddings=filled, eot=template.eot)
  np.testing.assert_allclose(output.projected, expected, rtol=2e-6, atol=1e-7)
  other = whole("a photo of style of a person person")["input_ids"]
  other = tower.apply(variables, jnp.array([other]))
  assert not np.allclose(other.projected, expected, rtol=1e-3)
