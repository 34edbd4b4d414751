"""What a denoiser learns: noise levels, targets, weights, dropped prompts.

    tables = objective.tables(config, snr_gamma=5.0)
    t = objective.timesteps(rng, batch, num=len(tables.mean))
    noisy = objective.add_noise(tables, t, x0, noise)
    value = objective.loss(tables, t, net(noisy, t), x0=x0, noise=noise).mean()

Training visits the discrete timesteps of the folder's betas, in DDPM's scale
(mean^2 + std^2 = 1), which is what every sampler of `schedulers` feeds the
network. Tables are float64 on the host, the arithmetic is that of its inputs.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dppp_jax import errors, types
from dppp_jax.diffusion import conditioning, noising


class Tables(NamedTuple):
  """The numbers of every training timestep, float64 [T].

  Attributes:
    mean: factor of x0 in the noisy latents, the root of alpha-bar.
    std: factor of the noise.
    weight: of the squared error.
    target_x0: factor of x0 in what the network predicts.
    target_noise: factor of the noise in it.
  """

  mean: np.ndarray
  std: np.ndarray
  weight: np.ndarray
  target_x0: np.ndarray
  target_noise: np.ndarray


def tables(config: noising.Config, *, snr_gamma: float | None = None) -> Tables:
  """Works out the tables of a schedule.

  With epsilon-prediction the target is the noise; with v-prediction it is
  mean noise - std x0 (Salimans and Ho 2022). Min-SNR-gamma weights (Hang et
  al. 2023, Eq. 9) are min(SNR, gamma) on the error of x0, that is
  min(SNR, gamma) / SNR on that of the noise and min(SNR, gamma) / (SNR + 1) on
  that of v.

  Args:
    config: betas, zero_snr and prediction_type count; the sampler does not.
    snr_gamma: gamma; None weights all timesteps alike.

  Raises:
    errors.UserError: a prediction that has no meaning at the last timestep,
      or a gamma that is not positive.
  """
  is_noise = config.prediction_type == "epsilon"
  if not is_noise and config.prediction_type != "v_prediction":
    raise errors.UserError(
      f"prediction_type {config.prediction_type!r} is not built: use epsilon"
      " or v_prediction"
    )
  if config.zero_snr and is_noise:
    raise errors.UserError(
      "zero_snr with prediction_type epsilon teaches nothing at the last"
      " timestep, which is noise already: use v_prediction"
    )
  if snr_gamma is not None and not snr_gamma > 0:
    raise errors.UserError(f"snr_gamma={snr_gamma}: must be positive, or None")
  # DDIM's table ends at exactly 0 with zero_snr; the other samplers lift it a
  # little, because they divide by it. Training does not.
  config = dataclasses.replace(config, method="ddim")
  bar = noising.alphas_cumprod(config).astype(np.float64)
  mean, std = np.sqrt(bar), np.sqrt(1 - bar)
  weight = np.ones_like(bar)
  if snr_gamma is not None:
    snr = bar / (1 - bar)
    below = np.minimum(snr, snr_gamma)
    weight = below / (snr if is_noise else snr + 1)
  return Tables(
    mean,
    std,
    weight,
    np.zeros_like(bar) if is_noise else -std,
    np.ones_like(bar) if is_noise else mean,
  )


def timesteps(rng: jax.Array, batch: int, *, num: int) -> jax.Array:
  """Draws a timestep for each example, uniform in 0 .. num - 1, int32 [B].

  They share one random offset and stand evenly around the circle, in random
  order: each is uniform, and the batch covers all noise levels (Kingma et al.
  2021, I.1), so that its loss says more.
  """
  rng_offset, rng_order = jax.random.split(rng)
  # In whole numbers, or rounding would favour some of them.
  offset = jax.random.randint(rng_offset, (), 0, num)
  even = jnp.arange(batch) * num // batch
  return jax.random.permutation(rng_order, (even + offset) % num)


def add_noise(
  numbers: Tables,
  t: types.Array,
  x0: types.Array,
  noise: types.Array,
) -> jax.Array:
  """Returns mean_t x0 + std_t noise, [B, h, w, C].

  Args:
    numbers: of `tables`.
    t: int [B].
    x0: clean latents [B, h, w, C], normalised as the network works on them.
    noise: standard normal [B, h, w, C].
  """
  at = lambda table: _rows(table, t, x0)
  return at(numbers.mean) * x0 + at(numbers.std) * noise


def target(
  numbers: Tables,
  t: types.Array,
  x0: types.Array,
  noise: types.Array,
) -> jax.Array:
  """Returns what the network should predict; arguments of `add_noise`."""
  at = lambda table: _rows(table, t, x0)
  return at(numbers.target_x0) * x0 + at(numbers.target_noise) * noise


def loss(
  numbers: Tables,
  t: types.Array,
  output: types.Array,
  *,
  x0: types.Array,
  noise: types.Array,
) -> jax.Array:
  """Returns the weighted mean squared error of each example, [B].

  Args:
    numbers: of `tables`.
    t: int [B].
    output: of the network, [B, h, w, C].
    x0: see `add_noise`.
    noise: see `add_noise`.
  """
  error = jnp.square(output - target(numbers, t, x0, noise)).mean((1, 2, 3))
  return jnp.asarray(numbers.weight, error.dtype)[t] * error


def dropped(rng: jax.Array, batch: int, *, share: float) -> jax.Array:
  """Draws which examples lose their prompt, bool [B] (Ho and Salimans)."""
  return jax.random.bernoulli(rng, share, (batch,))


def empty_ids(
  ids: types.Array, empty: types.Array, drop: types.Array
) -> jax.Array:
  """Returns the ids of "" where prompts are dropped, int [B, C, N].

  This is what a sampler reads in the negative half where the folder has
  force_zeros_for_empty_prompt false (SD 1.x, and negative prompts of "").

  Args:
    ids: of `conditioning.tokenize`.
    empty: those of "", [1, C, N].
    drop: bool [B].
  """
  return jnp.where(drop[:, None, None], empty, ids)


def zero_text(text: conditioning.Text, drop: types.Array) -> conditioning.Text:
  """Returns zeros where prompts are dropped, for the tokens and the pooled.

  This is what a sampler reads in the negative half where the folder has
  force_zeros_for_empty_prompt true (most SDXL checkpoints).
  """
  zero = lambda x: jnp.where(
    jnp.expand_dims(drop, range(1, x.ndim)), jnp.zeros_like(x), x
  )
  return jax.tree.map(zero, text)


def _rows(table: np.ndarray, t: types.Array, like: types.Array) -> jax.Array:
  """Returns table[t] as [B, 1, 1, 1] in the dtype of the latents."""
  return jnp.asarray(table, like.dtype)[t][:, None, None, None]
