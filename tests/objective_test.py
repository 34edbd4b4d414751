"""The training objective against loops from the equations and diffusers."""

from unittest import mock

import diffusers
from diffusers import training_utils
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax import errors
from dppp_jax.diffusion import conditioning, noising, objective, schedulers

# diffusers hands torch tensors to numpy in a way that numpy 2 discourages.
pytestmark = pytest.mark.filterwarnings(
  "ignore:__array__ implementation:DeprecationWarning"
)

CONFIGS = [
  noising.Config(),
  noising.Config(prediction_type="v_prediction", beta_schedule="linear"),
  noising.Config(prediction_type="v_prediction", zero_snr=True),
]


def _tolerance(config):
  # Rescaling takes a dozen roundings to float32; ours and torch's roots differ
  # in the last bit here and there.
  return 5e-7 if config.zero_snr else 1e-9


T = np.array([0, 1, 17, 500, 998, 999])


def _arrays(seed=0, batch=len(T)):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(batch, 3, 2, 4)) for _ in range(3)]


def _ddpm(config):
  scheduler = diffusers.DDPMScheduler(
    beta_start=config.beta_start,
    beta_end=config.beta_end,
    beta_schedule=config.beta_schedule,
    prediction_type=config.prediction_type,
    rescale_betas_zero_snr=config.zero_snr,
  )
  scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
  return scheduler


@pytest.mark.parametrize("config", CONFIGS)
def test_noise_and_target_are_those_of_diffusers(config):
  scheduler = _ddpm(config)
  x0, noise, _ = _arrays()
  torch_args = [torch.from_numpy(x) for x in (x0, noise)]
  want = scheduler.add_noise(*torch_args, torch.from_numpy(T)).numpy()
  want_target = noise
  if config.prediction_type == "v_prediction":
    velocity = scheduler.get_velocity(*torch_args, torch.from_numpy(T))
    want_target = velocity.numpy()
  numbers = objective.tables(config)
  with jax.enable_x64(True):
    got = objective.add_noise(numbers, T, jnp.asarray(x0), noise)
    target = objective.target(numbers, T, jnp.asarray(x0), noise)
    atol = _tolerance(config)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
    np.testing.assert_allclose(target, want_target, rtol=0, atol=atol)
  if config.zero_snr:
    np.testing.assert_array_equal(np.asarray(got)[-1], noise[-1])


@pytest.mark.parametrize("gamma", [5.0, 1.0])
@pytest.mark.parametrize("config", CONFIGS)
def test_weights_are_min_snr_of_diffusers(config, gamma):
  t = torch.arange(1000)
  # compute_snr goes to float32 on its way.
  with mock.patch.object(torch.Tensor, "float", lambda x: x):
    # Of our own table, which the test above compares: the last bits of its
    # roots differ between processors, and 1 - bar is as small as they are.
    scheduler = _ddpm(config)
    bar = objective.tables(config).mean ** 2
    scheduler.alphas_cumprod = torch.from_numpy(bar)
    snr = training_utils.compute_snr(scheduler, t).numpy()
  if config.prediction_type == "epsilon":
    want = np.minimum(snr, gamma) / snr
  else:  # As in diffusers' training scripts.
    want = np.minimum(snr, gamma) / (snr + 1)
  got = objective.tables(config, snr_gamma=gamma).weight
  np.testing.assert_allclose(got, want, rtol=1e-9)
  assert got.min() < 0.05 and got.max() <= 1
  np.testing.assert_array_equal(objective.tables(config).weight, 1)


@pytest.mark.parametrize("config", CONFIGS)
def test_loss_is_the_sum_of_the_equations(config):
  x0, noise, output = _arrays()
  bar = _ddpm(config).alphas_cumprod.numpy()
  want = []
  for i, t in enumerate(T):
    alpha, sigma = np.sqrt(bar[t]), np.sqrt(1 - bar[t])
    snr = alpha**2 / sigma**2
    total = 0.0
    for place in np.ndindex(*x0.shape[1:]):
      x, e, y = x0[i][place], noise[i][place], output[i][place]
      if config.prediction_type == "epsilon":
        total += min(snr, 5) / snr * (y - e) ** 2
      else:
        total += min(snr, 5) / (snr + 1) * (y - (alpha * e - sigma * x)) ** 2
    want.append(total / x0[i].size)
  numbers = objective.tables(config, snr_gamma=5.0)
  with jax.enable_x64(True):
    x0, noise, output = map(jnp.asarray, (x0, noise, output))
    got = objective.loss(numbers, T, output, x0=x0, noise=noise)
    exact = objective.target(numbers, T, x0, noise)
    nothing = objective.loss(numbers, T, exact, x0=x0, noise=noise)
  np.testing.assert_allclose(got, want, rtol=_tolerance(config))
  np.testing.assert_array_equal(nothing, 0)


@pytest.mark.parametrize("config", CONFIGS)
def test_sampler_undoes_what_training_teaches(config):
  """A network that predicts the target exactly leads a sampler to x0."""
  numbers = objective.tables(config)
  euler = noising.Config(
    **{**vars(config), "method": "euler", "timestep_spacing": "trailing"}
  )
  table = schedulers.init(10, euler)
  x0, noise, _ = (x[:1].astype(np.float32) for x in _arrays())
  state = schedulers.begin_from(table, 3, jnp.asarray(x0), noise=noise)
  for i in range(3, 10):
    t = np.array([int(table.timesteps[i])])
    fed = schedulers.network_input(table, i, state)
    want = objective.add_noise(numbers, t, jnp.asarray(x0), noise)
    np.testing.assert_allclose(fed, want, atol=2e-5)
    output = objective.target(numbers, t, jnp.asarray(x0), noise)
    state = schedulers.step(table, i, state, output=output, noise=None)
  np.testing.assert_allclose(state.latents, x0, atol=1e-4)


def test_timesteps_are_uniform_and_cover_a_batch():
  draw = jax.jit(jax.vmap(lambda key: objective.timesteps(key, 8, num=1000)))
  found = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
  assert found.min() == 0 and found.max() == 999
  # Every batch has one in each eighth of the circle.
  gaps = np.diff(np.sort(found, axis=1), axis=1)
  np.testing.assert_array_equal(gaps, 125)
  # Each place of the batch is uniform: 8 bins, chi-square of 7 degrees.
  for place in (0, 7):
    counts = np.bincount(found[:, place] // 125, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 30


def test_dropped_prompts_become_what_the_sampler_reads():
  drop = np.array([True, False, True])
  rng = np.random.default_rng(0)
  text = conditioning.Text(
    jnp.asarray(rng.normal(size=(3, 5, 4))),
    jnp.asarray(rng.normal(size=(3, 6))),
  )
  zeroed = objective.zero_text(text, drop)
  for before, after in zip(text, zeroed, strict=True):
    np.testing.assert_array_equal(after[1], before[1])
    np.testing.assert_array_equal(after[np.flatnonzero(drop)], 0)
  ids = rng.integers(1, 9, (3, 2, 4))
  empty = np.full((1, 2, 4), 77)
  got = objective.empty_ids(ids, empty, drop)
  np.testing.assert_array_equal(got[1], ids[1])
  np.testing.assert_array_equal(got[::2], 77)
  share = np.mean(objective.dropped(jax.random.key(1), 20000, share=0.1))
  assert abs(share - 0.1) < 0.01


@pytest.mark.parametrize(
  ("options", "gamma", "words"),
  [
    ({"prediction_type": "sample"}, None, "prediction_type 'sample'"),
    ({"zero_snr": True}, None, "use v_prediction"),
    ({}, 0.0, "snr_gamma=0.0"),
  ],
)
def test_what_has_no_meaning_is_refused(options, gamma, words):
  with pytest.raises(errors.UserError, match=words):
    objective.tables(noising.Config(**options), snr_gamma=gamma)
