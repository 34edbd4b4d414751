"""Samplers of diffusion models as tables of numbers.

Euler ancestral, Euler, DDIM and DPM++ 2M differ only in numbers: each step is

    x0 = x0_latents x + x0_output output
    x <- keep x + denoised x0 + previous x0_before + noise z,

so the numbers are worked out on the host in float64 and handed to the compiled
program as an argument. One program then serves every sampler, every number of
steps (`length` pads the table), eps- and v-prediction, and all spacings.

Two conventions for where a step stands. `diffusers`: sigmas are interpolated
linearly and the spacing of the checkpoint holds ("leading" for SDXL).
`k-diffusion` (`k_diffusion(config)`): evenly spaced timesteps that begin at
the last one, log-sigmas interpolated; WebUI's "Euler a" and "DPM++ 2M".

Latents are mean x0 + std z throughout. Euler has mean 1 and std sigma; DDIM and
DPM++ have mean^2 + std^2 = 1, which is what the network is fed by all of them.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, types
from dppp_jax.diffusion import noising

Config = noising.Config
k_diffusion = noising.k_diffusion
alphas_cumprod = noising.alphas_cumprod


class Table(NamedTuple):
  """The numbers of one run, all float32 [L] but where said; L >= T.

  Attributes:
    num_steps: int32 [], T. Rows from T on are padding.
    init_noise_sigma: [], factor of the first standard normal latents.
    timesteps: what the network is told; fractional for some spacings.
    sigmas: noise over signal of the latents that enter a step.
    scale_in: factor of the latents as they enter the network.
    x0_latents: see the module.
    x0_output: see the module.
    keep: see the module.
    denoised: see the module.
    previous: see the module.
    noise: see the module.
    mean: signal in the latents that enter a step.
    std: noise in the latents that enter a step.
  """

  num_steps: types.Array
  init_noise_sigma: types.Array
  timesteps: types.Array
  sigmas: types.Array
  scale_in: types.Array
  x0_latents: types.Array
  x0_output: types.Array
  keep: types.Array
  denoised: types.Array
  previous: types.Array
  noise: types.Array
  mean: types.Array
  std: types.Array


class State(NamedTuple):
  """What a run carries from step to step, float32 [B, h, w, c] each.

  Attributes:
    latents: x.
    denoised: the x0 that the last step predicted; zeros before the first.
  """

  latents: types.Array
  denoised: types.Array


def init(num_steps: int, config: Config, *, length: int | None = None) -> Table:
  """Works out the step table of a run.

  Args:
    num_steps: T.
    config: the sampler.
    length: L, to which the table is padded so that runs of other T share the
      compiled program; T by default.

  Raises:
    errors.UserError: a combination that has no meaning, or T out of range.
  """
  if length is not None and length < num_steps:
    raise errors.UserError(
      f"num_steps={num_steps} does not fit a table of length {length}"
    )
  timesteps, signal, spread = noising.schedule(num_steps, config)
  (mean, mean_after), (std, std_after) = signal, spread
  power = mean**2 + std**2
  if config.prediction_type == "epsilon":
    with np.errstate(divide="ignore", invalid="ignore"):
      x0_latents, x0_output = 1 / mean, -std / mean
  else:
    x0_latents, x0_output = mean / power, -std / np.sqrt(power)
  # Ancestral steps go a little too far and put fresh noise on it.
  shrink = std_after * mean / (mean_after * std)  # Ratio of the sigmas.
  noise = _eta(config) * std_after * np.sqrt(np.maximum(1 - shrink**2, 0))
  keep = np.sqrt(std_after**2 - noise**2) / std
  denoised, previous = mean_after - mean * keep, np.zeros(num_steps)
  if config.method == "dpmpp_2m":
    half = _second_order(mean, std)
    denoised, previous = denoised * (1 + half), -denoised * half
  # Euler of diffusers adds the signal's unit variance for "leading" only.
  is_noise_only = config.continuous or (
    config.method.startswith("euler") and config.timestep_spacing != "leading"
  )
  with np.errstate(divide="ignore"):
    sigmas = std / mean
  rows = {
    "timesteps": timesteps,
    "sigmas": sigmas,
    "scale_in": 1 / np.sqrt(power),
    "x0_latents": x0_latents,
    "x0_output": x0_output,
    "keep": keep,
    "denoised": denoised,
    "previous": previous,
    "noise": noise,
    "mean": mean,
    "std": std,
  }
  pad = (0, (length or num_steps) - num_steps)
  return Table(
    num_steps=np.int32(num_steps),
    init_noise_sigma=np.float32(
      std[0] if is_noise_only else math.sqrt(power[0])
    ),
    **{k: np.pad(v, pad).astype(np.float32) for k, v in rows.items()},
  )


def begin(table: Table, noise: types.Array) -> State:
  """Returns the state before step 0 for standard normal noise [B, h, w, c]."""
  latents = jnp.asarray(noise, jnp.float32) * table.init_noise_sigma
  return State(latents, jnp.zeros_like(latents))


def begin_from(
  table: Table, i: types.Array | int, x0: types.Array, *, noise: types.Array
) -> State:
  """Returns the state before step i of a picture that is drawn over.

  Args:
    table: the run.
    i: the first step that will be taken, int [].
    x0: clean latents [B, h, w, c].
    noise: standard normal [B, h, w, c].
  """
  latents = table.mean[i] * x0 + table.std[i] * noise
  return State(latents.astype(jnp.float32), jnp.zeros_like(noise, jnp.float32))


def network_input(
  table: Table, i: types.Array | int, state: State
) -> jax.Array:
  """Returns the latents [B, h, w, c] as the network wants them at step i."""
  return state.latents * table.scale_in[i]


def step(
  table: Table,
  i: types.Array | int,
  state: State,
  *,
  output: types.Array,
  noise: types.Array | None,
) -> State:
  """Takes step i; pure, in float32, inside jit, fori_loop or scan.

  Args:
    table: the run.
    i: int [].
    state: before the step.
    output: of the network, [B, h, w, c] in any float dtype.
    noise: standard normal [B, h, w, c]; None where the sampler adds none.

  Returns:
    The state after the step. After the last one, `latents` is x0.
  """
  output = output.astype(jnp.float32)
  x0 = table.x0_latents[i] * state.latents + table.x0_output[i] * output
  latents = (
    table.keep[i] * state.latents
    + table.denoised[i] * x0
    + table.previous[i] * state.denoised
  )
  if noise is not None:
    latents = latents + table.noise[i] * noise.astype(jnp.float32)
  return State(latents, x0)


def draw(
  keys: jax.Array, i: types.Array | int, *, shape: Sequence[int]
) -> jax.Array:
  """Draws the noise of step i, sample by sample.

  Args:
    keys: one `jax.random.key` per sample, [B].
    i: int []; use -1 for the first latents.
    shape: (h, w, c).

  Returns:
    Standard normal float32 [B, h, w, c]; a sample's noise depends on its own
    key alone, not on the batch that it is drawn in.
  """
  one = lambda key: jax.random.normal(
    jax.random.fold_in(key, jnp.asarray(i, jnp.int32).astype(jnp.uint32)),
    tuple(shape),
    jnp.float32,
  )
  return jax.vmap(one)(keys)


def _eta(config: Config) -> float:
  if config.method == "euler_ancestral":
    return 1.0 if config.eta is None else config.eta
  return (config.eta or 0.0) if config.method == "ddim" else 0.0


def _second_order(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
  """Returns 1 / 2r of DPM-Solver++(2M), Lu et al. 2022, midpoint rule, [T].

  The first and the last step are of first order: nothing came before, or the
  step in log-SNR is infinite.
  """
  half = np.zeros_like(mean)
  if len(mean) > 2:
    widths = np.diff(np.log(mean / std))
    half[1:-1] = 0.5 * widths[1:] / widths[:-1]
  return half
