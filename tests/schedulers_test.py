"""Step tables against diffusers' schedulers, k-diffusion's equations, tables.

Both sides get the same network output and the same noise at every step; the
network is a fixed mixture of what it is fed, so that a wrong scale of the input
shows too.
"""

import dataclasses
import functools
import math

import diffusers
from diffusers.schedulers import scheduling_euler_ancestral_discrete
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dppp_jax import errors
from dppp_jax.diffusion import schedulers

# diffusers hands torch tensors to numpy in a way that numpy 2 discourages.
pytestmark = pytest.mark.filterwarnings(
  "ignore:__array__ implementation:DeprecationWarning"
)

SDXL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
CLASSES = {
  "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
  "euler": diffusers.EulerDiscreteScheduler,
  "ddim": diffusers.DDIMScheduler,
  "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
SHAPE = (2, 3, 5, 4)
_step = jax.jit(schedulers.step)
_input = jax.jit(schedulers.network_input)


def _normal(seed):
  return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def _network(x, timestep):
  """Some smooth function of input and time, in float64 for both sides."""
  x = np.asarray(x, np.float64)
  y = 0.6 * x + 0.4 * np.tanh(x[..., ::-1, :] + 1e-3 * float(timestep))
  return (y + 0.1 * np.roll(x, 1, axis=-1)).astype(np.float32)


def _distance(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def _oracle(method, **options):
  options = SDXL | options
  if method == "ddim":
    options |= {"clip_sample": False}
  return CLASSES[method](**options)


def _run_oracle(scheduler, num_steps, monkeypatch, eta=0.0, **where):
  """Returns inputs, outputs and latents of diffusers' loop, step by step."""
  drawn = iter(range(1, 1000))
  monkeypatch.setattr(
    scheduling_euler_ancestral_discrete,
    "randn_tensor",
    lambda *a, **k: torch.from_numpy(_normal(next(drawn))),
  )
  scheduler.set_timesteps(None if where else num_steps, **where)
  scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else 0
  latents = torch.from_numpy(_normal(0)) * scheduler.init_noise_sigma
  trace = [(None, None, latents.numpy())]
  for timestep in scheduler.timesteps:
    fed = scheduler.scale_model_input(latents, timestep)
    output = _network(fed.numpy(), timestep)
    extra = {}
    if eta:
      noise = torch.from_numpy(_normal(next(drawn)))
      extra = {"eta": eta, "variance_noise": noise}
    latents = scheduler.step(
      torch.from_numpy(output), timestep, latents, **extra
    ).prev_sample
    trace.append((fed.numpy(), output, latents.numpy()))
  return trace


def _run(table):
  """Returns the latents of our loop, each step with its own output."""
  state = schedulers.begin(table, _normal(0))
  trace = [np.asarray(state.latents)]
  for i in range(int(table.num_steps)):
    fed = _input(table, i, state)
    output = _network(fed, table.timesteps[i])
    state = _step(table, i, state, output=output, noise=_normal(i + 1))
    trace.append(np.asarray(state.latents))
  return trace


CASES = [
  (method, spacing, num_steps, prediction, karras)
  for method in CLASSES
  for spacing, num_steps, prediction, karras in [
    ("leading", 4, "epsilon", False),
    ("leading", 30, "v_prediction", False),
    ("trailing", 20, "epsilon", False),
    ("trailing", 1, "v_prediction", False),
    ("linspace", 30, "epsilon", False),
    ("linspace", 50, "v_prediction", False),
    ("leading", 20, "epsilon", True),
    ("linspace", 4, "v_prediction", True),
  ]
  if not (karras and method in ("euler_ancestral", "ddim"))
]


@pytest.mark.parametrize("method,spacing,num_steps,prediction,karras", CASES)
def test_follows_diffusers(
  method, spacing, num_steps, prediction, karras, monkeypatch
):
  options = dict(
    timestep_spacing=spacing, prediction_type=prediction, steps_offset=1
  )
  if karras:
    options["use_karras_sigmas"] = True
  oracle = _oracle(method, **options)
  expected = _run_oracle(oracle, num_steps, monkeypatch)
  config = schedulers.Config.from_hf(dict(oracle.config), method=method)
  # Padded to one length, so that all of these cases share one program.
  table = schedulers.init(num_steps, config, length=50)
  np.testing.assert_allclose(
    table.timesteps[:num_steps], oracle.timesteps.numpy(), rtol=0, atol=1e-3
  )
  # Each step alone, from diffusers' own latents ...
  state = schedulers.begin(table, _normal(0))
  for i, (fed, output, latents) in enumerate(expected[1:]):
    before = expected[i][2]
    state = schedulers.State(before, state.denoised)
    assert _distance(_input(table, i, state), fed) < 2e-6
    state = _step(table, i, state, output=output, noise=_normal(i + 1))
    assert _distance(state.latents, latents) < 2e-6, (i, num_steps)
  # ... and the whole run on its own feet.
  ours = _run(table)
  assert _distance(ours[0], expected[0][2]) < 1e-7
  assert _distance(ours[-1], expected[-1][2]) < 2e-6


def test_all_cases_shared_one_program():
  table = schedulers.init(4, schedulers.Config(), length=50)
  state = schedulers.begin(table, _normal(0))
  _step(table, 1, state, output=_normal(1), noise=_normal(2))
  before = _step._cache_size()
  for config in (
    schedulers.Config(method="dpmpp_2m"),
    schedulers.Config(method="ddim", prediction_type="v_prediction"),
    schedulers.k_diffusion(schedulers.Config()),
  ):
    table = schedulers.init(17, config, length=50)
    _step(table, 3, state, output=_normal(1), noise=_normal(2))
  assert _step._cache_size() == before


def test_ddim_with_noise_follows_diffusers(monkeypatch):
  oracle = _oracle("ddim", steps_offset=1)
  expected = _run_oracle(oracle, 20, monkeypatch, eta=0.7)
  config = schedulers.Config(method="ddim", eta=0.7)
  ours = _run(schedulers.init(20, config))
  assert _distance(ours[-1], expected[-1][2]) < 2e-6


@pytest.mark.parametrize("method", ["euler_ancestral", "euler", "ddim"])
def test_zero_terminal_snr_follows_diffusers(method, monkeypatch):
  oracle = _oracle(
    method,
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    prediction_type="v_prediction",
  )
  expected = _run_oracle(oracle, 10, monkeypatch)
  config = schedulers.Config.from_hf(dict(oracle.config), method=method)
  ours = _run(schedulers.init(10, config))
  assert np.isfinite(ours[-1]).all()
  # diffusers itself carries sigma 4096 in float32: 4096 / 2^24.
  assert _distance(ours[-1], expected[-1][2]) < 2e-5


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("method", ["euler", "dpmpp_2m"])
def test_quadratic_spacing_follows_diffusers_at_given_timesteps(
  method, zero_snr, monkeypatch
):
  oracle = _oracle(
    method,
    rescale_betas_zero_snr=zero_snr,
    timestep_spacing="trailing",
    prediction_type="v_prediction",
  )
  # 1000 (i / 8)^2, rounded, less 1.
  at = [999, 765, 561, 390, 249, 140, 61, 15]
  expected = _run_oracle(oracle, 8, monkeypatch, timesteps=at)
  config = schedulers.Config.from_hf(dict(oracle.config), method=method)
  config = dataclasses.replace(config, timestep_spacing="quadratic")
  table = schedulers.init(8, config)
  np.testing.assert_array_equal(table.timesteps, at)
  # Euler of diffusers carries sigma 4096 in float32, and steps from there to 6.
  limit = 5e-5 if zero_snr and method == "euler" else 2e-6
  assert _distance(_run(table)[-1], expected[-1][2]) < limit


# 30 steps of SDXL: first timesteps, last ones, first sigmas, last, initial.
GOLDEN = {
    "leading": (
        (958, 925, 892), (34, 1), (11.47685, 9.54359, 8.00431), 0.041314,
        11.52033,
    ),
    "trailing": (
        (999, 966, 932), (66, 32), (14.61465, 12.01775, 9.91718), 0.176322,
        14.61465,
    ),
    "linspace": (
        (999, 964.5517, 930.1035), (34.448, 0), (14.61465, 11.91756, 9.81418),
        0.029168, 14.61465,
    ),
}  # fmt: skip


@pytest.mark.parametrize("spacing", GOLDEN)
def test_golden_table(spacing):
  first, last, sigmas, sigma_last, initial = GOLDEN[spacing]
  table = schedulers.init(
    30, schedulers.Config(timestep_spacing=spacing), length=32
  )
  np.testing.assert_allclose(table.timesteps[:3], first, atol=5e-4)
  np.testing.assert_allclose(table.timesteps[28:30], last, atol=5e-4)
  np.testing.assert_allclose(table.sigmas[:3], sigmas, atol=6e-6)
  np.testing.assert_allclose(table.sigmas[29], sigma_last, atol=6e-7)
  np.testing.assert_allclose(table.init_noise_sigma, initial, atol=6e-6)
  assert not table.sigmas[30:].any() and not table.noise[29:].any()


@functools.cache
def _levels():
  betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
  bar = np.cumprod(1 - betas)
  return np.sqrt((1 - bar) / bar)


def _sigmas_by_k_diffusion(num_steps, karras):
  """Its DiscreteSchedule.get_sigmas and get_sigmas_karras, in float64."""
  logs = np.log(_levels())
  if karras:
    low, high = _levels()[0] ** (1 / 7), _levels()[-1] ** (1 / 7)
    sigmas = (high + np.linspace(0, 1, num_steps) * (low - high)) ** 7
  else:
    t = np.linspace(999, 0, num_steps)
    below = np.floor(t).astype(int)
    w = t - below
    above = np.minimum(below + 1, 999)
    sigmas = np.exp((1 - w) * logs[below] + w * logs[above])
  return np.append(sigmas, 0.0)


def _time(sigma):
  """Its sigma_to_t without rounding."""
  logs = np.log(_levels())
  below = np.clip(np.searchsorted(logs, np.log(sigma)) - 1, 0, 998)
  w = (logs[below] - np.log(sigma)) / (logs[below] - logs[below + 1])
  return below + np.clip(w, 0, 1)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("method", ["euler_ancestral", "dpmpp_2m"])
def test_follows_k_diffusion(method, prediction, karras):
  """sample_euler_ancestral and sample_dpmpp_2m, written down in float64."""
  num_steps = 12
  sigmas = _sigmas_by_k_diffusion(num_steps, karras)
  x, old = sigmas[0] * _normal(0).astype(np.float64), None
  for i in range(num_steps):
    now, later = sigmas[i], sigmas[i + 1]
    output = _network(x / math.sqrt(now**2 + 1), _time(now)).astype(np.float64)
    if prediction == "epsilon":
      denoised = x - now * output
    else:
      denoised = x / (now**2 + 1) - output * now / math.sqrt(now**2 + 1)
    if method == "euler_ancestral":
      up = min(later, math.sqrt(later**2 * (now**2 - later**2) / now**2))
      down = math.sqrt(later**2 - up**2)
      x = x + (x - denoised) / now * (down - now)
      x = x + _normal(i + 1) * up
    elif old is None or later == 0:
      x = (later / now) * x + (1 - later / now) * denoised
    else:
      h, before = math.log(now / later), math.log(sigmas[i - 1] / now)
      r = before / h
      mixed = (1 + 1 / (2 * r)) * denoised - old / (2 * r)
      x = (later / now) * x - math.expm1(-h) * mixed
    old = denoised
  config = schedulers.k_diffusion(
    schedulers.Config(method=method, prediction_type=prediction, karras=karras)
  )
  table = schedulers.init(num_steps, config, length=50)
  np.testing.assert_allclose(table.sigmas[:num_steps], sigmas[:-1], rtol=3e-5)
  # The float32 betas of torch move the sigmas by 1.3e-5 of themselves.
  assert _distance(_run(table)[-1], x) < 3e-5


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("method", ["euler_ancestral", "euler", "dpmpp_2m"])
def test_one_step_of_k_diffusion_begins_at_the_highest_sigma(method, karras):
  """Its get_sigmas(1) is [sigma_max, 0]: one step from pure noise to x0."""
  config = schedulers.k_diffusion(
    schedulers.Config(method=method, karras=karras)
  )
  table = schedulers.init(1, config)
  highest = _levels()[-1]
  np.testing.assert_allclose(table.timesteps, [999], rtol=1e-6)
  np.testing.assert_allclose(table.sigmas, [highest], rtol=3e-5)
  state = schedulers.begin(table, np.ones((1, 1, 1, 1)))
  if method != "dpmpp_2m":
    np.testing.assert_allclose(state.latents, highest, rtol=3e-5)
  output = np.full((1, 1, 1, 1), 0.5)
  latents = schedulers.step(
    table, 0, state, output=output, noise=np.ones((1, 1, 1, 1))
  ).latents
  x0 = schedulers.network_input(table, 0, state) * math.hypot(1, highest)
  np.testing.assert_allclose(latents, x0 - highest * 0.5, rtol=3e-5)


def test_k_diffusion_is_near_linear_interpolation():
  linear = schedulers.Config(timestep_spacing="linspace")
  logs = schedulers.k_diffusion(linear)
  a, b = schedulers.init(30, linear), schedulers.init(30, logs)
  worst = np.abs(b.sigmas / a.sigmas - 1).max()
  assert 1e-6 < worst < 3.1e-5
  np.testing.assert_array_equal(a.timesteps, b.timesteps)


def test_perfect_network_lands_on_the_picture():
  """If the output is right at every step, every sampler ends at x0."""
  x0 = 3 * _normal(7)
  for method in CLASSES:
    for prediction in ("epsilon", "v_prediction"):
      table = schedulers.init(
        9,
        schedulers.Config(method=method, prediction_type=prediction),
        length=50,
      )
      state = schedulers.begin_from(table, 0, x0, noise=_normal(1))
      for i in range(9):
        mean, std = table.mean[i], table.std[i]
        z = (np.asarray(state.latents) - mean * x0) / std
        r = np.hypot(mean, std)
        output = z if prediction == "epsilon" else (mean * z - std * x0) / r
        state = _step(table, i, state, output=output, noise=_normal(20 + i))
      np.testing.assert_allclose(state.latents, x0, atol=2e-5)


@pytest.mark.parametrize("method", CLASSES)
def test_drawing_over_begins_where_diffusers_begins(method):
  oracle = _oracle(method, steps_offset=1, timestep_spacing="leading")
  oracle.set_timesteps(20)
  table = schedulers.init(20, schedulers.Config(method=method))
  x0, noise = _normal(1), _normal(2)
  expected = oracle.add_noise(
    torch.from_numpy(x0), torch.from_numpy(noise), oracle.timesteps[7:8]
  )
  state = schedulers.begin_from(table, 7, x0, noise=noise)
  assert _distance(state.latents, expected.numpy()) < 2e-6


def test_runs_inside_a_compiled_loop():
  table = schedulers.init(6, schedulers.Config(), length=8)
  keys = jax.random.split(jax.random.key(0), 2)

  @jax.jit
  def sample(table, keys):
    shape = SHAPE[1:]

    def body(i, state):
      fed = schedulers.network_input(table, i, state)
      noise = schedulers.draw(keys, i, shape=shape)
      return schedulers.step(
        table, i, state, output=0.8 * fed.astype(jnp.bfloat16), noise=noise
      )

    state = schedulers.begin(table, schedulers.draw(keys, -1, shape=shape))
    return jax.lax.fori_loop(0, table.num_steps, body, state).latents

  together = sample(table, keys)
  assert together.dtype == jnp.float32 and np.isfinite(together).all()
  longer = sample(schedulers.init(8, schedulers.Config()), keys)
  assert sample._cache_size() == 1
  assert _distance(longer, together) > 1e-3
  alone = sample(table, keys[1:])
  np.testing.assert_allclose(alone[0], together[1], rtol=1e-6, atol=1e-6)
  noise = schedulers.draw(keys, 3, shape=(64, 64, 4))
  assert abs(float(noise.std()) - 1) < 0.02


def test_folder_of_sdxl_gives_euler_a_of_diffusers():
  given = diffusers.EulerDiscreteScheduler(
    **SDXL, timestep_spacing="leading", steps_offset=1
  ).config
  config = schedulers.Config.from_hf(given, method="euler_ancestral")
  assert config == schedulers.Config()


@pytest.mark.parametrize(
  "given,words",
  [
    ({"_class_name": "LMSDiscreteScheduler"}, "LMSDiscreteScheduler"),
    ({}, "without a name"),
    (
      {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
      },
      "algorithm_type",
    ),
    ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample"),
    (
      {"_class_name": "EulerDiscreteScheduler", "trained_betas": [0.1]},
      "trained_betas",
    ),
  ],
)
def test_refuses_samplers_that_are_not_built(given, words):
  with pytest.raises(errors.UserError, match=words):
    schedulers.Config.from_hf(given)


@pytest.mark.parametrize(
  "num_steps,options,words",
  [
    (0, {}, "num_steps=0"),
    (1001, {}, "num_steps=1001"),
    (1000, {}, "passes timestep"),
    (30, {"prediction_type": "sample"}, "prediction_type"),
    (30, {"timestep_spacing": "even"}, "timestep_spacing"),
    (45, {"timestep_spacing": "quadratic"}, "timesteps twice"),
    (8, {"timestep_spacing": "quadratic", "karras": True}, "Karras sigmas"),
    (8, {"timestep_spacing": "quadratic", "method": "ddim"}, "nor with ddim"),
    (30, {"method": "heun"}, "heun"),
    (30, {"eta": 1.5}, "eta=1.5"),
    (30, {"beta_schedule": "cosine"}, "beta_schedule"),
    (30, {"method": "ddim", "karras": True}, "Karras"),
    (30, {"method": "ddim", "zero_snr": True}, "zero signal"),
  ],
)
def test_refuses_runs_without_a_meaning(num_steps, options, words):
  with pytest.raises(errors.UserError, match=words):
    schedulers.init(num_steps, schedulers.Config(**options))
  with pytest.raises(errors.UserError, match="length 8"):
    schedulers.init(9, schedulers.Config(), length=8)
