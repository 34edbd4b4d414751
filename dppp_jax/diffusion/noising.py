"""Where the steps of a sampler stand: betas, timesteps and noise levels.

Everything here is numpy on the host. Betas and sigmas are rounded to float32
where diffusers and torch round them, because a checkpoint has met those.
"""

from collections.abc import Mapping
import dataclasses
import json
import math
from typing import Any, get_args, Literal

import numpy as np

from dppp_jax import errors, ranges

Method = Literal["euler_ancestral", "euler", "ddim", "dpmpp_2m"]
Spacing = Literal["leading", "trailing", "linspace", "quadratic"]

_CLASSES: dict[str, Method] = {
  "EulerAncestralDiscreteScheduler": "euler_ancestral",
  "EulerDiscreteScheduler": "euler",
  "DDIMScheduler": "ddim",
  "DPMSolverMultistepScheduler": "dpmpp_2m",
}
# Samplers of networks that learned noise on discrete betas: any of them may be
# exchanged for another. EDM, flow matching and others are other networks.
_COMPATIBLE = frozenset(
  f"{name}Scheduler"
  for name in (
    *("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel"),
    *("DEISMultistep", "DPMSolverMultistep", "DPMSolverMultistepInverse"),
    *("DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete"),
    *("EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
    *("KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD"),
    "UniPCMultistep",
  )
)
# What `Config.from_hf` reads.
_READ = frozenset(
  (
    *("prediction_type", "num_train_timesteps", "beta_start", "beta_end"),
    *("beta_schedule", "timestep_spacing", "steps_offset"),
    *("use_karras_sigmas", "rescale_betas_zero_snr", "set_alpha_to_one"),
  )
)
_FLAGS = ("use_karras_sigmas", "rescale_betas_zero_snr")
# How some sampler of diffusers steps: without effect on all others, in whose
# files they stand all the same (SDXL's own says skip_prk_steps). Where they
# have an effect on one that is built here, `_ONLY` says so.
_OTHERS = frozenset(
  (
    *("skip_prk_steps", "clip_sample", "clip_sample_range", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value", "variance_type"),
    *("algorithm_type", "solver_type", "solver_order", "solver_p"),
    *("lower_order_final", "euler_at_final", "use_exponential_sigmas"),
    *("use_beta_sigmas", "use_lu_lambdas", "final_sigmas_type"),
    *("lambda_min_clipped", "interpolation_type", "predict_x0"),
    *("disable_corrector", "original_inference_steps", "timestep_scaling"),
    *("noise_sampler_seed", "predictor_order", "corrector_order", "tau_func"),
    *("time_shift_type", "flow_shift"),  # Of flows, which are refused.
  )
)
# Of training; all have 1000.
_STEPS = dataclasses.replace(ranges.COUNT, low=2, high=10**6)
_BETA = dataclasses.replace(ranges.POSITIVE, high=1, open_high=True)
_RHO = 7.0  # Karras et al. 2022, Eq. 5.
# What a folder may ask, and only one answer is built: of any sampler, where it
# is about the network, and of one.
_SHARED = {
  "trained_betas": None,
  "timestep_type": "discrete",
  "sigma_min": None,
  "sigma_max": None,
  "use_flow_sigmas": False,
}
_ONLY: dict[Method, dict[str, Any]] = {
  "euler_ancestral": _SHARED,
  "euler": {
    **_SHARED,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "interpolation_type": "linear",
    "final_sigmas_type": "zero",
  },
  "ddim": {**_SHARED, "thresholding": False, "clip_sample": False},
  "dpmpp_2m": {
    **_SHARED,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "thresholding": False,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "variance_type": None,
    "lambda_min_clipped": -math.inf,
  },
}
# Where a folder's own sampler has no such steps, it cannot mean them.
_RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_UNSPACED = ("euler_ancestral", "ddim")


@dataclasses.dataclass(frozen=True)
class Config:
  """What a step table depends on; the defaults are SDXL's with "Euler a".

  Attributes:
    method: the sampler.
    prediction_type: what the network predicts.
    num_train_timesteps: T of training.
    beta_start: first beta.
    beta_end: last beta.
    beta_schedule: how the betas lie between.
    timestep_spacing: where the steps lie; "quadratic", which diffusers does not
      have, begins at the last timestep and is denser towards the picture.
    steps_offset: added to the timesteps of "leading".
    log_interpolation: interpolate log-sigmas, not sigmas.
    continuous: k-diffusion's conventions where diffusers differs: DPM++ visits
      as many points as there are steps, at fractional timesteps, and the first
      latents are sigma_max z.
    karras: respace the sigmas as Karras et al. do.
    zero_snr: rescale the betas so that the last step is pure noise.
    set_alpha_to_one: DDIM's last step ends at x0, not at timestep 0.
    eta: share of the ancestral noise; None is 1 for Euler a and 0 for DDIM.
  """

  method: Method = "euler_ancestral"
  prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
  num_train_timesteps: int = 1000
  beta_start: float = 0.00085
  beta_end: float = 0.012
  beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
  timestep_spacing: Spacing = "leading"
  steps_offset: int = 1
  log_interpolation: bool = False
  continuous: bool = False
  karras: bool = False
  zero_snr: bool = False
  set_alpha_to_one: bool = True
  eta: float | None = None

  @classmethod
  def from_hf(
    cls,
    given: Mapping[str, Any],
    *,
    method: Method | None = None,
    prediction_type: str | None = None,
  ) -> "Config":
    """Reads a scheduler_config.json, as diffusers' `from_config` would.

    Args:
      given: the parsed file.
      method: another sampler than the folder's; an absent key then means the
        default of that sampler, as it does in diffusers.
      prediction_type: another one than the folder's.

    Raises:
      errors.UserError: a sampler or an option that is not built here, a network
        that no sampler built here is for, or a number without meaning.
    """
    own = method is None
    method = _method(given, method)
    # DDIM clips where the file is silent; no checkpoint of latents means it.
    only = _ONLY[method]
    if own and method in _UNSPACED:
      only = only | dict.fromkeys(_RESPACED, False)
    for key, value in given.items():
      allowed = only.get(key)
      is_known = key.startswith("_") or key in _READ | _OTHERS
      if key in _FLAGS and type(value) not in (bool, type(None)):
        raise errors.UserError(
          f"scheduler_config.json: {key}={value!r}: must be true or false"
        )
      if key in only and value != allowed:
        raise errors.UserError(
          f"scheduler_config.json: {key}={value!r} is not built for"
          f" {method}: set it to {json.dumps(allowed)}"
        )
      if key not in only and not is_known and value not in (None, False):
        raise errors.UserError(
          f"scheduler_config.json: {key}={value!r} is not built here: use"
          " another base, or remove the key if it has no meaning"
        )
    default = "leading" if method == "ddim" else "linspace"
    config = cls(
      method=method,
      prediction_type=prediction_type
      or given.get("prediction_type", "epsilon"),
      num_train_timesteps=given.get("num_train_timesteps", 1000),
      beta_start=given.get("beta_start", 1e-4),
      beta_end=given.get("beta_end", 0.02),
      beta_schedule=given.get("beta_schedule", "linear"),
      timestep_spacing=given.get("timestep_spacing", default),
      steps_offset=given.get("steps_offset", 0),
      # diffusers has Karras sigmas for these two only.
      karras=method in ("euler", "dpmpp_2m")
      and bool(given.get("use_karras_sigmas", False)),
      zero_snr=bool(given.get("rescale_betas_zero_snr", False)),
      set_alpha_to_one=given.get("set_alpha_to_one", True),
    )
    _check_values(config)
    return config


def _method(given: Mapping[str, Any], method: Method | None) -> Method:
  """Returns the sampler; refuses a network that none of them is for."""
  name = given.get("_class_name") or ""
  if name and (not isinstance(name, str) or name not in _COMPATIBLE):
    raise errors.UserError(
      f"scheduler_config.json is of a {name}, and no sampler that is built here"
      " runs such a network: use a base that was trained on discrete noise"
      " (epsilon or v_prediction)"
    )
  if method is None and name not in _CLASSES:
    raise errors.UserError(
      f"scheduler_config.json: sampler {name or 'without a name'!r} is"
      f" not built: choose one of {', '.join(_CLASSES.values())}"
    )
  return method or _CLASSES[name]


def _check_values(config: Config) -> None:
  """Refuses values of scheduler_config.json that mean nothing."""
  steps, offset = config.num_train_timesteps, config.steps_offset
  is_steps = _STEPS.holds(steps)
  sound = {
    "prediction_type": config.prediction_type in ("epsilon", "v_prediction"),
    "num_train_timesteps": is_steps,
    "beta_start": _BETA.holds(config.beta_start),
    "beta_end": _BETA.holds(config.beta_end),
    "beta_schedule": config.beta_schedule in ("linear", "scaled_linear"),
    "timestep_spacing": config.timestep_spacing in get_args(Spacing),
    "steps_offset": is_steps and ranges.WHOLE.holds(offset) and offset < steps,
    "set_alpha_to_one": type(config.set_alpha_to_one) is bool,
  }
  for key, is_sound in sound.items():
    if not is_sound:
      raise errors.UserError(
        f"scheduler_config.json: {key}={getattr(config, key)!r} is not built"
        " here or means nothing: correct it"
      )


def k_diffusion(config: Config) -> Config:
  """Returns the same sampler by k-diffusion's conventions."""
  return dataclasses.replace(
    config,
    timestep_spacing="linspace",
    log_interpolation=True,
    continuous=True,
  )


def alphas_cumprod(config: Config) -> np.ndarray:
  """Returns alpha-bar of the training steps, float32 [T], rounded as torch.

  Betas and alphas are float32 there; their product is not. Exact arithmetic
  would move the sigmas by 1e-5.
  """
  steps, one = config.num_train_timesteps, np.float32(1)
  if config.beta_schedule == "linear":
    betas = _linspace(config.beta_start, config.beta_end, steps)
  elif config.beta_schedule == "scaled_linear":
    betas = _linspace(config.beta_start**0.5, config.beta_end**0.5, steps) ** 2
  else:
    raise errors.UserError(
      f"beta_schedule {config.beta_schedule!r} is not built: use"
      " scaled_linear or linear"
    )
  if config.zero_snr:
    # Lin et al. 2023, Algorithm 1.
    root = np.sqrt(_cumprod(one - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    bar = root**2
    betas = one - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
  cumulative = _cumprod(one - betas)
  if config.zero_snr and config.method != "ddim":
    cumulative[-1] = 2.0**-24  # Sigma stays finite.
  return cumulative


def schedule(
  num_steps: int, config: Config
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Says where the steps of a run stand.

  Args:
    num_steps: T.
    config: the sampler.

  Returns:
    float64: the timesteps [T]; then the mean and the std of the latents, each
    [2, T], before and after every step.

  Raises:
    errors.UserError: a combination that has no meaning, or T out of range.
  """
  _check(num_steps, config)
  cumulative = alphas_cumprod(config)
  timesteps = _timesteps(num_steps, config)
  if config.method == "ddim":
    # A step of diffusers' DDIM ends T // steps before its timestep, wherever
    # the next one begins: the chain is broken but for "leading".
    at = timesteps.astype(int)
    before = at - config.num_train_timesteps // num_steps
    final = 1.0 if config.set_alpha_to_one else cumulative[0]
    bar = np.stack(
      [
        cumulative[at],
        np.where(before < 0, final, cumulative[np.maximum(before, 0)]),
      ]
    ).astype(np.float64)
    return timesteps, np.sqrt(bar), np.sqrt(1 - bar)
  levels = _sigmas(cumulative)
  timesteps, sigmas = _place(timesteps, config, levels)
  # diffusers keeps the sigmas in float32: every later number starts there.
  sigmas = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
  scale = np.ones_like(sigmas)
  if config.method == "dpmpp_2m":
    scale = np.sqrt(1 + sigmas**2)
  pairs = lambda x: np.stack([x[:-1], x[1:]])
  return timesteps, pairs(1 / scale), pairs(sigmas / scale)


def _timesteps(num_steps: int, config: Config) -> np.ndarray:
  """Returns the timesteps [T] of a spacing, falling."""
  last, extra = config.num_train_timesteps, _num_extra(config)
  if config.timestep_spacing == "leading":
    at = np.arange(num_steps + extra)[::-1] * (last // (num_steps + extra))
    at = at + config.steps_offset
    if at[0] >= last:
      raise errors.UserError(
        f"num_steps={num_steps} with timestep_spacing leading and"
        f" steps_offset={config.steps_offset} passes timestep {last - 1}:"
        " take fewer steps or trailing"
      )
  elif config.timestep_spacing == "trailing":
    at = np.arange(last, 0, -last / num_steps).round() - 1
  elif config.timestep_spacing == "quadratic":
    # Song et al. 2021 (DDIM), appendix D.3: tau_i = c i^2; here up to the end.
    shares = np.arange(num_steps, 0, -1) / num_steps
    at = (last * shares**2).round() - 1
    if (np.diff(at) >= 0).any() or at[-1] < 0:
      raise errors.UserError(
        f"num_steps={num_steps} with timestep_spacing quadratic visits some"
        " timesteps twice: take fewer steps or trailing"
      )
  elif config.method == "ddim" or extra:
    at = np.linspace(0, last - 1, num_steps + extra).round()[::-1]
  elif config.continuous:
    # From the last timestep down, so that a single step begins there.
    at = np.linspace(last - 1, 0, num_steps, dtype=np.float32)
  else:
    # In float32 as in diffusers: the sigmas notice. A single step of
    # diffusers' linspace is at timestep 0.
    at = np.linspace(0, last - 1, num_steps, dtype=np.float32)[::-1]
  return at[:num_steps].astype(np.float64)


def _place(
  timesteps: np.ndarray, config: Config, levels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns timesteps and sigmas [T], respaced where Karras is asked for."""
  logs = np.log(levels).astype(np.float64)
  index = np.arange(len(levels))
  if config.log_interpolation:
    sigmas = np.exp(np.interp(timesteps, index, logs))
  else:
    sigmas = np.interp(timesteps, index, levels)
  if config.karras:
    # DPM++ and k-diffusion span all of training, Euler what it would visit.
    spans_all = config.continuous or config.method == "dpmpp_2m"
    ends = levels[[-1, 0]] if spans_all else sigmas[[0, -1]]
    high, low = (float(end) ** (1 / _RHO) for end in ends)
    ramp = np.linspace(0, 1, len(timesteps))
    sigmas = (high + ramp * (low - high)) ** _RHO
    timesteps = np.interp(np.log(sigmas), logs, index)
    if _num_extra(config):
      timesteps = timesteps.round()
  return timesteps, sigmas


def _num_extra(config: Config) -> int:
  """DPM++ of diffusers spaces one point more, and leaves out the last."""
  return int(config.method == "dpmpp_2m" and not config.continuous)


def _check(num_steps: int, config: Config) -> None:
  last = config.num_train_timesteps
  if not 1 <= num_steps <= last:
    raise errors.UserError(
      f"num_steps={num_steps}: choose between 1 and {last}"
    )
  if config.prediction_type not in ("epsilon", "v_prediction"):
    raise errors.UserError(
      f"prediction_type {config.prediction_type!r} is not built: use epsilon"
      " or v_prediction"
    )
  if config.timestep_spacing not in get_args(Spacing):
    raise errors.UserError(
      f"timestep_spacing {config.timestep_spacing!r} is not known: use"
      " leading, trailing, linspace or quadratic"
    )
  is_quadratic = config.timestep_spacing == "quadratic"
  if is_quadratic and (config.karras or config.method == "ddim"):
    raise errors.UserError(
      "timestep_spacing quadratic goes neither with Karras sigmas, which say"
      " themselves where the steps lie, nor with ddim, whose steps are of one"
      " length: choose another spacing, or another sampler"
    )
  if config.method not in _CLASSES.values():
    raise errors.UserError(
      f"sampler {config.method!r} is not built: choose one of"
      f" {', '.join(_CLASSES.values())}"
    )
  if config.eta is not None and not 0 <= config.eta <= 1:
    raise errors.UserError(f"eta={config.eta}: choose between 0 and 1")
  if config.method == "ddim" and (config.karras or config.continuous):
    raise errors.UserError(
      "ddim has neither Karras sigmas nor k-diffusion's steps: use euler"
    )
  if (
    config.method == "ddim"
    and config.zero_snr
    and config.prediction_type == "epsilon"
  ):
    raise errors.UserError(
      "ddim cannot begin at zero signal with prediction_type epsilon: use"
      " v_prediction, or zero_snr=False"
    )


def _sigmas(cumulative: np.ndarray) -> np.ndarray:
  """Returns sigma of the training steps, float32 as in torch."""
  one = np.float32(1)
  return np.sqrt((one - cumulative) / cumulative)


def _cumprod(values: np.ndarray) -> np.ndarray:
  return np.cumprod(values.astype(np.float64)).astype(np.float32)


def _linspace(start: float, end: float, steps: int) -> np.ndarray:
  """torch.linspace in float32: from the nearer end, one rounding a number."""
  start, end = np.float32(start), np.float32(end)
  gap = ((end - start) / np.float32(steps - 1)).astype(np.float64)
  i = np.arange(steps)
  return np.where(
    i < steps // 2, start + gap * i, end - gap * (steps - 1 - i)
  ).astype(np.float32)
