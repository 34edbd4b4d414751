"""Adam and Muon over named parameters: one rate each, frozen ones unseen."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from dppp_jax import process, trees, types


def split(
  params: types.Params, rules: Sequence[tuple[str, float | None]]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, float]]:
  """Sorts parameters into trainable and frozen ones.

  Args:
    params: nested dict.
    rules: (regex, lr | None), see `trees.match`; None is frozen.

  Returns:
    (trainable {name: leaf}, frozen {name: leaf}, {name: lr} of trainables).
  """
  flat = trees.flatten(params)
  rates = trees.match(flat, rules)
  trainable = {name: x for name, x in flat.items() if rates[name] is not None}
  frozen = {name: x for name, x in flat.items() if rates[name] is None}
  return trainable, frozen, {name: rates[name] for name in trainable}


def make(
  rates: Mapping[str, float],
  *,
  weight_decay: float,
  decoupled: bool = False,
  muon: bool = False,
  bias_lr_multiplier: float = 1.0,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """Returns Adam with one learning rate per name, before the schedule.

  torch.optim.Adam adds the decay to the gradient, so that it passes through
  the moments; AdamW adds it after them. Both are here, because CLIP-ReID uses
  the first and contrastive pre-training the second. Clipping comes before the
  decay and sees trainable gradients only.

  Muon (Jordan 2024) makes the momentum of each kernel orthogonal, so that all
  its directions learn alike, and not those alone that learn fast. Its updates
  have the root mean square of Adam's (0.2; Liu et al. 2025, Eq. 4), hence the
  same rates. Kernels of convolutions are matrices from all they read to what
  they give; embeddings and vectors are left to Adam with Nesterov's momentum.

  Args:
    rates: {name: lr} of all trainable parameters.
    weight_decay: L2 strength.
    decoupled: AdamW; vectors (biases, norms) are then not decayed.
    muon: Muon for kernels; needs `decoupled`.
    bias_lr_multiplier: factor of the rate of names that end with "bias".
    clip_norm: global norm to clip to, or None.

  Returns:
    A transformation over {name: gradient}; updates point downhill and are
    scaled by lr. The loop multiplies them with the schedule's factor.
  """
  is_bias = lambda name: name.rsplit("/", 1)[-1].endswith("bias")
  scale = {
    name: -lr * (bias_lr_multiplier if is_bias(name) else 1.0)
    for name, lr in rates.items()
  }
  clip = (
    optax.identity()
    if clip_norm is None
    else optax.clip_by_global_norm(clip_norm)
  )
  if muon and not decoupled:
    raise ValueError("muon has no decay inside its moments: decoupled=True")
  if decoupled:
    moments = _muon() if muon else optax.scale_by_adam()
    is_matrix = lambda params: {k: x.ndim > 1 for k, x in params.items()}
    decay = optax.add_decayed_weights(weight_decay, mask=is_matrix)
    chain = (clip, moments, decay)
  else:
    chain = (clip, *_decayed_adam(weight_decay))
  rate = optax.stateless(
    lambda updates, _: {k: scale[k] * u for k, u in updates.items()}
  )
  return optax.chain(*chain, rate)


def apply(
  params: Mapping[str, jax.Array],
  updates: Mapping[str, jax.Array],
  factor: jax.Array,
) -> dict[str, jax.Array]:
  """Returns params + factor * updates, in the dtype of the parameters."""
  return {
    name: (x + factor * updates[name]).astype(x.dtype)
    for name, x in params.items()
  }


def average(
  before: types.Params,
  params: Mapping[str, jax.Array],
  *,
  decay: float,
  step: jax.Array,
) -> types.Params:
  """Moves an average of parameters towards those of a step, in float32.

  Args:
    before: the average so far, nested.
    params: {name: leaf} after the step.
    decay: weight of what was, at most: early steps weigh (1 + step) /
      (10 + step), or a random beginning would stay in the average for long.
    step: int [], counted from 0.
  """
  weight = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  before = trees.flatten(before)
  return trees.unflatten(
    {k: weight * before[k] + (1 - weight) * x for k, x in params.items()}
  )


def norm(grads: Mapping[str, jax.Array]) -> jax.Array:
  """Returns the global L2 norm in float32; zero for no gradients at all."""

  def square(g):
    # Rows first: XLA's CPU backend takes longer for all at once.
    rows = jnp.sum(jnp.square(g.astype(jnp.float32)), axis=g.ndim - 1)
    return jnp.sum(rows)

  squares = [square(jnp.atleast_1d(g)) for g in grads.values()]
  return jnp.sqrt(sum(squares, start=jnp.zeros(())))


def _decayed_adam(decay: float) -> tuple[optax.GradientTransformation, ...]:
  """Adam of decayed gradients, uphill and at a rate of one: two links."""
  if process.outputs_are_fused():
    return optax.identity(), _adam_of_one_loop(decay)
  return optax.add_decayed_weights(decay), optax.scale_by_adam()


def _adam_of_one_loop(
  decay: float, *, b1: float = 0.9, b2: float = 0.999, epsilon: float = 1e-8
) -> optax.GradientTransformation:
  """Adam (Kingma & Ba 2015, Algorithm 1) for loops that write several arrays.

  `add_decayed_weights` and `optax.scale_by_adam`, of whose state this one's is.
  There the decayed gradient leads to the moments, and these to the update.
  Here the update and both moments are each written out from the old moments,
  with factors of their own, so that no array stands between and XLA computes
  all three in one loop (`process.fuse_outputs`; otherwise it would copy the
  old moments). Such a loop is bound by memory, not by its arithmetic.

  Args:
    decay: L2 strength, added to the gradient.
    b1: of the first moment.
    b2: of the second moment.
    epsilon: added to the root of the second moment.
  """

  def decayed(scale, gradient, parameter):
    if not decay:
      return scale * gradient
    return scale * gradient + (scale * decay) * parameter

  def first(keep, scale, moment, gradient, parameter):
    return keep * moment + decayed(scale, gradient, parameter)

  def second(keep, scale, moment, gradient, parameter):
    return keep * moment + jnp.square(decayed(scale, gradient, parameter))

  def update(gradients, state, parameters):
    count = optax.safe_increment(state.count)
    unbias1, unbias2 = (1 / (1 - b**count) for b in (b1, b2))
    new1, new2 = 1 - b1, (1 - b2) ** 0.5

    def leaf(m, v, g, p):
      ahead = first(b1 * unbias1, new1 * unbias1, m, g, p)
      spread = second(b2 * unbias2, new2 * unbias2**0.5, v, g, p)
      ahead = ahead / (jnp.sqrt(spread) + epsilon)
      return ahead, first(b1, new1, m, g, p), second(b2, new2, v, g, p)

    found = {
      name: leaf(state.mu[name], state.nu[name], g, parameters[name])
      for name, g in gradients.items()
    }
    updates, mu, nu = ({k: x[i] for k, x in found.items()} for i in range(3))
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(optax.scale_by_adam().init, update)


def _muon() -> optax.GradientTransformation:
  """Muon for kernels and Adam for the rest, uphill and at a rate of one."""

  def matrix(name, x):
    if not name.endswith("kernel") or isinstance(x, optax.MaskedNode):
      return None
    return optax.contrib.MuonDimensionNumbers(
      reduction_axis=tuple(range(x.ndim - 1)), output_axis=x.ndim - 1
    )

  def matrices(params):
    return {name: matrix(name, x) for name, x in params.items()}

  return optax.contrib.muon(
    -1.0, consistent_rms=0.2, muon_weight_dimension_numbers=matrices
  )
