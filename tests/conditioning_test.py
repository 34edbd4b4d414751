"""Prompts as tokens and vectors, against transformers' tokenisers and nets."""

import diffusers_twins as twins
import jax
import numpy as np
import prompts_test
import pytest
import torch
import transformers

from dppp_jax import errors
from dppp_jax.diffusion import conditioning
from dppp_jax.models import clip
from dppp_jax.weights import rules, tokenizer

LIMIT = 12
SHORT = "a red coat, front view"
LONG = (
  "a red coat, a blue bag, black shoes and white socks, long hair, side view,"
  " back view, front view"
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
  """Every word is one token; the second pads with "!"."""
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizer.train_tokenizer([SHORT, LONG], folder, vocab_size=700)
  load = lambda **options: transformers.CLIPTokenizer.from_pretrained(
    folder, model_max_length=LIMIT, **options
  )
  return load(), load(pad_token="!")


def _text(cls, vocab, seed, layers, eos, **options):
  config = transformers.CLIPTextConfig(
    vocab_size=vocab,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=layers,
    num_attention_heads=2,
    max_position_embeddings=LIMIT,
    projection_dim=16,
    bos_token_id=vocab - 2,
    eos_token_id=eos,
    pad_token_id=0,
    **options,
  )
  return twins.randomise(cls(config), seed)


@pytest.fixture(scope="module")
def encoders(tokenizers):
  """Two encoders of transformers, and their configurations and trees here."""
  vocab = len(tokenizers[0])
  nets = (
    _text(transformers.CLIPTextModel, vocab, 0, 3, 2),
    _text(
      transformers.CLIPTextModelWithProjection,
      vocab,
      1,
      4,
      vocab - 1,
      hidden_act="gelu",
    ),
  )
  towers, params = [], []
  for net, prefix in zip(nets, ("", "text_model."), strict=True):
    values = net.config.to_dict()
    if not prefix:
      values["projection_dim"] = None
    config = clip.text_from_hf(values)
    towers.append(clip.TextTower(config))
    table = rules.hf_text(prefix)
    params.append(twins.params(net, table, clip.param_shapes(config)))
  return nets, towers, params


@pytest.mark.parametrize("which", [0, 1])
def test_ids_are_those_of_transformers(tokenizers, which):
  prompts = [SHORT, "", LONG, "Front  VIEW"]
  want = tokenizers[which](
    prompts, padding="max_length", max_length=LIMIT, truncation=True
  )["input_ids"]
  got = conditioning.tokenize(tokenizers, prompts, limit=LIMIT, long="truncate")
  np.testing.assert_array_equal(got.ids[which][:, 0], want)
  assert got.ids[which].shape == (4, 1, LIMIT)
  assert got.ids[which].dtype == np.int32
  assert got.counts.tolist() == [1] * 4


def test_dropped_text_is_named(tokenizers):
  tokens = conditioning.tokenize(
    tokenizers, [SHORT, LONG], limit=LIMIT, long="truncate"
  )
  lost = "and white socks , long hair , side view , back view , front view"
  assert tokens.dropped == ("", lost)
  with pytest.raises(errors.UserError, match=f'"{lost}" would be lost') as e:
    conditioning.tokenize(tokenizers, [SHORT, LONG], limit=LIMIT)
  assert "has 27 tokens, 15 over the encoder's 12" in str(e.value)
  assert "\n" not in str(e.value)
  with pytest.raises(errors.UserError, match="choose error, truncate or chunk"):
    conditioning.tokenize(tokenizers, [SHORT], limit=LIMIT, long="cut")
  # As long as it may be.
  fits = "red " * (LIMIT - 2)
  tokens = conditioning.tokenize(tokenizers, [fits], limit=LIMIT)
  assert tokens.dropped == ("",)


def test_chunks_end_at_commas_and_lose_nothing(tokenizers):
  tokens = conditioning.tokenize(
    tokenizers, [LONG, SHORT], limit=LIMIT, long="chunk"
  )
  texts = [
    [first.decode(row, skip_special_tokens=True) for row in one]
    for first, one in zip(tokenizers[:1] * 2, tokens.ids[0], strict=True)
  ]
  assert texts[0] == [
    "a red coat , a blue bag ,",
    "black shoes and white socks , long hair ,",
    "side view , back view , front view",
  ]
  assert texts[1] == ["a red coat , front view", "", ""]
  assert tokens.counts.tolist() == [3, 1]
  assert tokens.dropped == ("", "")
  for one, ids in zip(tokenizers, tokens.ids, strict=True):
    assert (ids[..., 0] == one.bos_token_id).all()
    assert ids[1, 2].tolist()[2:] == [one.pad_token_id] * (LIMIT - 2)
  assert tokenizers[1].pad_token_id == tokenizers[1].get_vocab()["!"]
  # Without a comma in reach a chunk is filled; the empty prompt is a chunk.
  tokens = conditioning.tokenize(
    tokenizers, ["red " * 11, ""], limit=LIMIT, long="chunk", min_chunks=4
  )
  assert tokens.ids[0].shape == (2, 4, LIMIT)
  assert tokens.counts.tolist() == [2, 1]
  assert (tokens.ids[0][0, 0] == tokens.ids[0][0, 1]).sum() == 3
  # A comma that is further back than twenty tokens is no reason.
  prompt = "red, " + "coat " * 30
  tokens = conditioning.tokenize(tokenizers, [prompt], limit=26, long="chunk")
  assert tokenizers[0].decode(tokens.ids[0][0, 1][1:-1]).startswith("coat")
  assert (tokens.ids[0][0, 0] == tokenizers[0].eos_token_id).sum() == 1


def _run(encoders, tokens, **options):
  _, towers, params = encoders
  some = slice(None) if options["is_xl"] else slice(1)
  call = lambda params, ids, counts, skip: conditioning.encode(
    towers[some], params, ids, counts=counts, skip=skip, **options
  )
  skip = np.array([False, True])
  return twins.run(call, params[some], tokens.ids[some], tokens.counts, skip)


@torch.no_grad()
def _states(net, ids):
  return net(torch.from_numpy(ids).long(), output_hidden_states=True)


def test_chunking_builds_no_dict_of_the_vocabulary(tokenizers, monkeypatch):
  """Such a dict takes a tenth of a second, for CLIP's vocabulary."""
  ids = [t.get_vocab()[",</w>"] for t in tokenizers]
  assert [conditioning._comma(t) for t in tokenizers] == ids
  for one in {type(t) for t in tokenizers}:
    monkeypatch.setattr(one, "get_vocab", None)
  looked_up = []
  comma = conditioning._comma
  monkeypatch.setattr(
    conditioning, "_comma", lambda t: looked_up.append(t) or comma(t)
  )
  conditioning.tokenize(tokenizers, [SHORT, LONG] * 3, limit=9, long="chunk")
  assert looked_up == list(tokenizers)


def test_a_vocabulary_without_commas_is_cut_anywhere(tmp_path):
  words = prompts_test.make_tokenizer(tmp_path, words=("walking",))
  assert conditioning._comma(words) is None
  found = conditioning.tokenize(
    [words], ["walking " * 5], limit=4, long="chunk"
  )
  assert found.counts.tolist() == [3]


def test_xl_reads_each_chunk_as_transformers_does(tokenizers, encoders):
  tokens = conditioning.tokenize(
    tokenizers, [SHORT, LONG], limit=LIMIT, long="chunk"
  )
  got = _run(encoders, tokens, is_xl=True, clip_skip=1, pooled="last")
  first = _run(encoders, tokens, is_xl=True)
  for i, skip in enumerate((2, 3)):  # The first is a negative prompt.
    rows, pooled = [], []
    for chunk in range(3):
      outputs = [
        _states(net, ids[i, chunk][None])
        for net, ids in zip(encoders[0], tokens.ids, strict=True)
      ]
      states = [output.hidden_states[-skip][0] for output in outputs]
      rows.append(torch.cat(states, dim=-1))
      pooled.append(outputs[1].text_embeds[0])
    assert twins.distance(got.context[i], torch.cat(rows)) < 2e-6
    last = pooled[tokens.counts[i] - 1]
    assert twins.distance(got.pooled[i], last) < 2e-6
    assert twins.distance(first.pooled[i], pooled[0]) < 2e-6
  np.testing.assert_allclose(first.context[0], got.context[0], atol=1e-5)
  assert twins.distance(first.context[1], got.context[1]) > 0.1


def test_sd1_reads_the_normed_last_state(tokenizers, encoders):
  tokens = conditioning.tokenize(tokenizers, [SHORT, "a bag"], limit=LIMIT)
  got = _run(encoders, tokens, is_xl=False, clip_skip=1)
  assert got.pooled is None
  net = encoders[0][0]
  output = _states(net, tokens.ids[0][:, 0])
  assert twins.distance(got.context[0], output.last_hidden_state[0]) < 2e-6
  with torch.no_grad():
    skipped = net.final_layer_norm(output.hidden_states[-2][1])
  assert twins.distance(got.context[1], skipped) < 2e-6


def test_encoders_that_cannot_serve_are_refused(tokenizers, encoders):
  tokens = conditioning.tokenize(tokenizers, [SHORT, "a bag"], limit=LIMIT)
  with pytest.raises(errors.UserError, match="clip_skip is too large"):
    _run(encoders, tokens, is_xl=True, clip_skip=3)
  _, towers, params = encoders
  texts = [tower.config for tower in towers]
  least = min(text.num_hidden_layers for text in texts)
  for is_xl, most in ((True, least - 1), (False, least)):
    conditioning.check(texts, is_xl=is_xl, clip_skip=most)
    for skip in (-1, most + 1):
      with pytest.raises(errors.UserError, match=f"clip_skip={skip}: must be"):
        conditioning.check(texts, is_xl=is_xl, clip_skip=skip)
  with pytest.raises(errors.UserError, match="pooled=frist: choose one of"):
    conditioning.check(texts, is_xl=True, pooled="frist")
  alone = lambda ids: conditioning.encode(
    towers[:1], params[:1], ids, counts=tokens.counts, is_xl=True
  )
  with pytest.raises(errors.UserError, match="has no text_projection"):
    jax.eval_shape(alone, tokens.ids[:1])


def test_time_ids_are_heights_first():
  ids = conditioning.time_ids((1536, 896), conditioning.Sizes())
  assert ids.dtype == np.float32
  assert ids.tolist() == [1536, 896, 0, 0, 1536, 896]
  sizes = conditioning.Sizes((1250, 700), (3, 5), (1024, 512))
  ids = conditioning.time_ids((1536, 896), sizes)
  assert ids.tolist() == [1250, 700, 3, 5, 1024, 512]
