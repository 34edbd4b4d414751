"""Prompts against the sentence as transformers' CLIPTokenizer reads it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from dppp_jax import errors
from dppp_jax.methods import prompts
from dppp_jax.models import clip, packing

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


def _tower(whole):
  config = clip.TextConfig(
    vocab_size=len(whole),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    projection_dim=6,
    bos_token_id=whole.bos_token_id,
    eos_token_id=whole.eos_token_id,
  )
  params = clip.init_params(config, jax.random.key(0))
  return clip.TextTower(config, dtype=jnp.float64), params


def test_pseudo_words_are_read_as_words(whole):
  """A filled prompt encodes as the sentence of its words, padded to 77."""
  tower, params = _tower(whole)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    variables = {"params": params}
    asked = prompts.Prompts(
      (prompts.style_content(whole, k=2), prompts.content(whole))
    )
    real = [
      ("a photo of style of a photo person", "photo of photo"),
      ("a photo of a style person", "style"),
    ]
    words, expected = [], []
    for sentence, fills in real:
      ids = whole(fills, add_special_tokens=False)["input_ids"]
      found = tower.apply(variables, jnp.array([ids]), method="embed")
      # The second example has other words, so that none is read for another.
      words.append(jnp.concatenate([found, 0.5 * found]))
      ids = whole(sentence, padding="max_length", max_length=77)["input_ids"]
      expected.append(tower.apply(variables, jnp.array([ids])).projected[0])
    found = asked.read(tower, params, words)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one[0], other, rtol=0, atol=1e-12)
    assert not np.allclose(one[1], other, rtol=1e-3)


def test_prompts_read_together_are_those_read_alone(whole):
  """Features, and gradients of the words and of a tower that trains."""
  tower, params = _tower(whole)
  templates = (prompts.style_content(whole, k=2), prompts.content(whole))
  rng = np.random.default_rng(0)
  words = [rng.normal(size=(3, n, 16)) for n in (3, 1)]
  weights = rng.normal(size=(2, 3, 6))

  def alone(params, words):
    found = []
    for template, given in zip(templates, words, strict=True):
      variables = {"params": params}
      ids = np.array([template.ids])
      tokens = tower.apply(variables, ids, method="embed")
      tokens = jnp.tile(tokens, (3, 1, 1))
      for i, slot in enumerate(template.slots):
        tokens = tokens.at[:, slot].set(given[:, i])
      found.append(
        tower.apply(variables, embeddings=tokens, eot=template.eot).projected
      )
    return found

  together = lambda params, words: prompts.Prompts(templates).read(
    tower, params, words
  )

  def scored(read):
    score = lambda *a: jnp.sum(jnp.stack(read(*a)) * weights)
    return jax.jit(jax.value_and_grad(score, argnums=(0, 1)))

  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    ours, theirs = scored(together)(params, words), scored(alone)(params, words)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
    ours,
    theirs,
  )
  with pytest.raises(ValueError, match="1 words for 3"):
    together(params, words[::-1])


def test_a_prompt_that_all_share_is_not_packed():
  with pytest.raises(ValueError, match="4 shared of 4"):
    packing.Packing((4,), (4,))
