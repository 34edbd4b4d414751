"""Optimiser rules against torch.optim, and the schedules by hand."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dppp_jax import errors, process
from dppp_jax.train import optim, stage


def _trees(rng, dtype):
  shapes = {"a/kernel": (3, 4), "a/bias": (4,), "b/kernel": (2, 2)}
  return {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("one_loop", [False, True])
def test_same_as_torch(monkeypatch, decoupled, decay, dtype, one_loop):
  monkeypatch.setenv("XLA_FLAGS", "")
  assert not one_loop or process.fuse_outputs()
  with jax.enable_x64(dtype == np.float64):
    _compare_with_torch(decoupled, decay, dtype)


def _compare_with_torch(decoupled, weight_decay, dtype):
  rng = np.random.default_rng(0)
  params = _trees(rng, dtype)
  rates = {"a/kernel": 1e-2, "a/bias": 1e-2, "b/kernel": 3e-3}
  tx = optim.make(
    rates,
    weight_decay=weight_decay,
    decoupled=decoupled,
    bias_lr_multiplier=2.0,
  )
  theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
  kind = torch.optim.AdamW if decoupled else torch.optim.Adam
  decay = {
    k: 0.0 if decoupled and v.ndim < 2 else weight_decay
    for k, v in params.items()
  }
  lr = {k: v * (2 if k.endswith("bias") else 1) for k, v in rates.items()}
  groups = [
    {"params": [p], "lr": lr[k], "weight_decay": decay[k], "name": k}
    for k, p in theirs.items()
  ]
  torch_optimizer = kind(groups)
  ours = {k: jnp.asarray(v) for k, v in params.items()}
  state = tx.init(ours)
  for step in range(7):
    factor = 0.1 if step >= 4 else 1.0
    grads = _trees(rng, dtype)
    for group in torch_optimizer.param_groups:
      group["lr"] = lr[group["name"]] * factor
      group["params"][0].grad = torch.tensor(grads[group["name"]])
    torch_optimizer.step()
    updates, state = tx.update(grads, state, ours)
    ours = optim.apply(ours, updates, dtype(factor))
  rtol, atol = (2e-6, 2e-7) if dtype == np.float32 else (1e-12, 0)
  for key, value in ours.items():
    want = theirs[key].detach().numpy()
    assert value.dtype == dtype
    np.testing.assert_allclose(value, want, rtol=rtol, atol=atol)


def test_state_of_adam_does_not_depend_on_its_loops(monkeypatch):
  """A checkpoint of one is a checkpoint of the other."""

  def structure(flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    tx = optim.make({"a/kernel": 0.1}, weight_decay=0.1)
    return jax.tree.structure(tx.init({"a/kernel": jnp.ones((2, 3))}))

  plain = structure("")
  assert process.fuse_outputs()
  assert structure(os.environ["XLA_FLAGS"]) == plain


def test_muon_makes_the_momentum_of_kernels_orthogonal():
  shapes = {
    "conv/kernel": (3, 3, 4, 6),
    "dense/kernel": (5, 3),
    "dense/bias": (3,),
    "token/embedding": (7, 3),
  }
  rng = np.random.default_rng(0)
  draw = lambda: {k: rng.normal(size=s) for k, s in shapes.items()}
  zeros = lambda: {k: np.zeros(s) for k, s in shapes.items()}
  params, first, second = draw(), zeros(), zeros()
  tx = optim.make(
    dict.fromkeys(shapes, 0.1), weight_decay=0.01, decoupled=True, muon=True
  )
  with jax.enable_x64(True):
    ours = {k: jnp.asarray(x) for k, x in params.items()}
    state = tx.init(ours)
    for step in range(1, 5):
      grads = draw()
      updates, state = tx.update(
        {k: jnp.asarray(x) for k, x in grads.items()}, state, ours
      )
      ours = optim.apply(ours, updates, jnp.float64(1.0))
      for name, g in grads.items():
        beta = 0.95 if name.endswith("kernel") else 0.9
        first[name] = beta * first[name] + (1 - beta) * g
        second[name] = 0.999 * second[name] + 0.001 * g**2
        ahead = beta * first[name] / (1 - beta ** (step + 1))
        ahead = ahead + (1 - beta) * g / (1 - beta**step)
        if name.endswith("kernel"):
          moved = _orthogonal(ahead.reshape(-1, shapes[name][-1]))
          moved = 0.2 * np.sqrt(max(moved.shape)) * moved.reshape(shapes[name])
        else:  # Dozat 2016.
          spread = np.sqrt(second[name] / (1 - 0.999**step))
          moved = ahead / (spread + 1e-8)
        if params[name].ndim > 1:
          moved = moved + 0.01 * params[name]
        params[name] = params[name] - 0.1 * moved
    for name, value in ours.items():
      np.testing.assert_allclose(value, params[name], rtol=1e-9, err_msg=name)


def _orthogonal(x):
  """Jordan's five steps towards the orthogonal factor, without transposing."""
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
  return x


def test_muon_needs_a_decay_of_its_own():
  with pytest.raises(ValueError, match="decoupled=True"):
    optim.make({"a/kernel": 0.1}, weight_decay=0.1, muon=True)


def test_split_follows_the_first_rule():
  params = {"clip": {"text": {"w": 1}, "vision": {"w": 2}}, "head": {"w": 3}}
  rules = (("clip/text/.*", None), ("clip/.*", 5e-6), (".*", 5e-5))
  trainable, frozen, rates = optim.split(params, rules)
  assert trainable == {"clip/vision/w": 2, "head/w": 3}
  assert frozen == {"clip/text/w": 1}
  assert rates == {"clip/vision/w": 5e-6, "head/w": 5e-5}


def test_parameter_without_a_rule_is_an_error():
  with pytest.raises(errors.UserError, match="head/w is matched by no rule"):
    optim.split({"head": {"w": 1}}, (("clip/.*", 1.0),))


def test_rule_that_matches_nothing_is_an_error():
  with pytest.raises(errors.UserError, match=r"'heda/.\*' matches no param"):
    optim.split({"head": {"w": 1}}, (("heda/.*", 1.0), (".*", None)))


def test_clip_sees_the_norm_of_all_trainables():
  tx = optim.make({"a": 1.0, "b": 1.0}, weight_decay=0.0, clip_norm=1.0)
  grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  state = tx.init(grads)
  _, state = tx.update(grads, state, grads)
  moments = optax.tree.get(state, "mu")
  np.testing.assert_allclose(moments["a"], [0.1 * 3 / 5], rtol=1e-6)
  np.testing.assert_allclose(optim.norm(grads), 5.0, rtol=1e-6)


def test_clip_reid_schedule_counts_epochs_from_one():
  paper = stage.step_decay((15, 20))
  factors = [paper(epoch, 0.0) for epoch in range(1, 21)]
  np.testing.assert_allclose(factors, [1] * 14 + [0.1] * 5 + [0.01])
  # CLIP-ReID's second stage: 9.5e-7, 5e-6 and 5e-7 of 5e-6 (recipe).
  warm = stage.step_decay((30, 50), warmup_epochs=10, warmup_factor=0.1)
  got = [5e-6 * warm(epoch, 0.0) for epoch in (1, 10, 29, 30, 50)]
  np.testing.assert_allclose(got, [9.5e-7, 5e-6, 5e-6, 5e-7, 5e-8])


def test_warmup_cosine_by_hand():
  schedule = stage.warmup_cosine(warmup=0.2, final=0.1)
  got = [schedule(1, f) for f in (0.0, 0.1, 0.2, 0.6, 1.0)]
  np.testing.assert_allclose(got, [0.0, 0.5, 1.0, 0.55, 0.1])
